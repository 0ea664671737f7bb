//! Runs scenarios: brings a lab and a cluster up once, then each file's VMs and steps.
//!
//! The runner believes nobody: what OVN's databases, the hypervisors and the guests' peers say is
//! read directly, and the controller's own record is one source among them.

mod checks;
mod dropping;
mod environment;
mod feeders;
mod inside;
mod measure;
mod migration;
mod moments;
mod ovn;
mod single;
mod vm;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context as _, Result};
use futures::future::try_join_all;
use tokio::sync::Mutex;

use crate::cluster::{Cluster, Controller, Parts};
use crate::lab::{Lab, Progress};
use crate::report::{self, Check, Environment, Report};
use crate::scenario::{Probe, Scenario, Step, Topology};

pub use single::SingleVm;

use checks::Checks;
use ovn::Ovn;
use vm::{Networks, RunningVm};

/// Runs scenarios, one after the other, on one lab.
pub struct Runner<'a> {
    lab: &'a Lab,
    cluster: Cluster,
    networks: Networks<'a>,
    ovn: Ovn,
    environment: Environment,
    migrations: AtomicU32,
}

/// What a scenario's steps work with.
struct Bench<'a> {
    lab: &'a Lab,
    cluster: &'a Cluster,
    controller: Arc<Mutex<Controller>>,
    ovn: &'a Ovn,
    probe: &'a Probe,
    topology: Topology,
    migrations: &'a AtomicU32,
}

impl Bench<'_> {
    /// A name for the next migration object of a VM, as KubeVirt's own are made up.
    fn next_name(&self, vm: &str) -> String {
        format!(
            "{vm}-migration-{}",
            self.migrations.fetch_add(1, Ordering::Relaxed)
        )
    }
}

impl<'a> Runner<'a> {
    /// Brings up what scenarios run on. The calling process is in central's network namespace.
    pub async fn start(lab: &'a Lab, parts: &Parts, progress: &dyn Progress) -> Result<Self> {
        let cluster = Cluster::start(lab, parts, progress).await?;
        let kubernetes = cluster.client().apiserver_version().await?.git_version;
        Ok(Self {
            lab,
            environment: environment::of(lab, kubernetes, parts.accel).await?,
            networks: Networks::open(lab).await?,
            ovn: Ovn::follow(lab).await?,
            cluster,
            migrations: AtomicU32::new(1),
        })
    }

    /// Runs one scenario. The report is there even if something broke on the way: then the last
    /// check says what.
    pub async fn run(&mut self, scenario: &Scenario, progress: &dyn Progress) -> Report {
        let mut report = Report {
            schema: report::SCHEMA.to_owned(),
            scenario: scenario.name.clone(),
            passed: false,
            environment: self.environment.clone(),
            migrations: Vec::new(),
            measurements: Vec::new(),
            checks: Vec::new(),
        };
        if let Err(error) = self.run_into(scenario, &mut report, progress).await {
            report.checks.push(Check {
                what: "the scenario comes to its end".to_owned(),
                failure: Some(format!("{error:#}")),
            });
        }
        report.passed = report.checks.iter().all(Check::held);
        report
    }

    /// Boots the VMs, takes the steps, and removes the VMs whatever came of it.
    async fn run_into(
        &mut self,
        scenario: &Scenario,
        report: &mut Report,
        progress: &dyn Progress,
    ) -> Result<()> {
        let ended = match self.boot(scenario, progress).await {
            Ok(vms) => self.steps(scenario, &vms, report, progress).await,
            Err(error) => Err(error),
        };
        let mut checks = Checks::default();
        for spec in &scenario.vms {
            let removed = vm::remove(self.cluster.client(), &self.networks, spec).await;
            checks.that(
                format!("{} can be removed", spec.key()),
                removed.is_ok(),
                || {
                    removed
                        .err()
                        .map_or_else(String::new, |error| format!("{error:#}"))
                },
            );
        }
        report.checks.append(&mut checks.0);
        ended
    }

    async fn boot(
        &mut self,
        scenario: &Scenario,
        progress: &dyn Progress,
    ) -> Result<Vec<RunningVm>> {
        let mut vms = Vec::new();
        for (host, spec) in (vm::FIRST_HOST..).zip(&scenario.vms) {
            progress.step(&format!("Booting {} on {}", spec.key(), spec.node));
            let vm = RunningVm::start(
                self.lab,
                self.cluster.client(),
                &mut self.networks,
                &self.ovn,
                host,
                spec,
            );
            vms.push(vm.await?);
        }
        Ok(vms)
    }

    async fn steps(
        &self,
        scenario: &Scenario,
        vms: &[RunningVm],
        report: &mut Report,
        progress: &dyn Progress,
    ) -> Result<()> {
        let bench = Bench {
            lab: self.lab,
            cluster: &self.cluster,
            controller: Arc::clone(&self.cluster.controller),
            ovn: &self.ovn,
            probe: &scenario.probe,
            topology: scenario.topology,
            migrations: &self.migrations,
        };
        for step in &scenario.steps {
            take(&bench, vms, step, report, progress).await?;
        }
        Ok(())
    }

    /// Ends the cluster; the lab stays.
    pub async fn stop(self) -> Result<()> {
        self.cluster.stop().await
    }
}

async fn take(
    bench: &Bench<'_>,
    vms: &[RunningVm],
    step: &Step,
    report: &mut Report,
    progress: &dyn Progress,
) -> Result<()> {
    let vm = |name: &str| {
        let found = vms.iter().find(|vm| vm.spec.name == name);
        found.with_context(|| format!("no VM {name}"))
    };
    match step {
        Step::Migrate(migrate) => {
            progress.step(&format!("Migrating {} to {}", migrate.vm, migrate.to));
            let done = migration::run(bench, vm(&migrate.vm)?, migrate).await?;
            report.checks.extend(done.checks);
            report.migrations.push(done.migration);
        }
        Step::Together(migrations) => {
            progress.step(&format!(
                "Migrating {} VMs at the same time",
                migrations.len()
            ));
            let running = migrations
                .iter()
                .map(|migrate| Ok(migration::run(bench, vm(&migrate.vm)?, migrate)))
                .collect::<Result<Vec<_>>>()?;
            for done in try_join_all(running).await? {
                report.checks.extend(done.checks);
                report.migrations.push(done.migration);
            }
        }
        Step::Quiet(quiet) => {
            progress.step(&format!("Measuring for {} s", quiet.seconds));
            let done = measure::quiet(bench, vm(&quiet.vm)?, quiet).await?;
            report.checks.extend(done.checks);
            report.measurements.push(done.measurement);
        }
        Step::Outage(outage) => {
            progress.step(&format!("Measuring an outage of {} ms", outage.ms));
            let done = measure::outage(bench, vm(&outage.vm)?, outage).await?;
            report.checks.extend(done.checks);
            report.measurements.push(done.measurement);
        }
    }
    Ok(())
}

/// Where a report belongs: `<out>/report.json` for one scenario, `<out>/<name>/report.json` for
/// several.
pub fn report_path(out: &Path, scenario: &str, one_of_many: bool) -> PathBuf {
    let dir = if one_of_many {
        out.join(scenario)
    } else {
        out.to_owned()
    };
    dir.join("report.json")
}

/// Writes a report where it belongs and returns its path.
pub fn write_report(out: &Path, report: &Report, one_of_many: bool) -> Result<PathBuf> {
    let path = report_path(out, &report.scenario, one_of_many);
    if let Some(dir) = path.parent() {
        fs::create_dir_all(dir).with_context(|| dir.display().to_string())?;
    }
    let mut json = serde_json::to_string_pretty(report).context("the report")?;
    json.push('\n');
    fs::write(&path, json).with_context(|| path.display().to_string())?;
    Ok(path)
}
