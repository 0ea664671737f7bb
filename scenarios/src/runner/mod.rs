//! Runs scenarios: brings a lab and a cluster up once, then each file's VMs and steps.
//!
//! The runner believes nobody: what OVN's databases, the hypervisors and the guests' peers say is
//! read directly, and the controller's own record is one source among them.

mod agents;
mod bounds;
mod capture;
mod checks;
mod conduct;
mod contest;
mod dropping;
mod environment;
mod evidence;
mod feeders;
mod flows;
mod forbidden;
mod forging;
mod inside;
mod killing;
mod kube_ovn;
mod late;
mod measure;
mod migration;
mod moments;
mod networks;
mod ovn;
mod place;
mod pods;
mod policies;
mod rate;
mod shown;
mod single;
mod strategy;
mod surroundings;
mod taps;
mod validity;
mod vm;

use std::collections::BTreeSet;
use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context as _, Result};
use futures::future::try_join_all;
use tokio::sync::{Mutex, OnceCell};

use crate::cluster::{Cluster, Controller, Parts, Segue};
use crate::lab::routed::outside_addresses;
use crate::lab::{Lab, Progress};
use crate::report::{self, Baseline, Check, Environment, Report};
use crate::scenario::{Family, Peer, Scenario, Step, Strategy};

pub use contest::{Contest, Switch};
pub use single::SingleVm;

use capture::Captures;
use checks::Checks;
use networks::Networks;
use ovn::Ovn;
use surroundings::Surroundings;
use vm::RunningVm;

/// Runs scenarios, one after the other, on one lab.
pub struct Runner<'a> {
    lab: &'a Lab,
    cluster: Cluster,
    networks: Networks<'a>,
    ovn: Ovn,
    environment: Environment,
    /// What the first VM carries without a migration.
    baseline: OnceCell<Baseline>,
    migrations: AtomicU32,
    /// Addresses of VMs that had a place; none may have one in the end.
    placed: BTreeSet<IpAddr>,
}

/// Where what explains a failure goes: to a directory of this name beside the report.
const EVIDENCE: &str = "evidence";

/// What a scenario's steps work with.
#[derive(Clone)]
struct Bench<'a> {
    lab: &'a Lab,
    cluster: &'a Cluster,
    controller: Arc<Mutex<Controller>>,
    ovn: &'a Ovn,
    networks: &'a Networks<'a>,
    scenario: &'a Scenario,
    /// Who hands ports over.
    strategy: Strategy,
    /// Packets a second, each way, over all flows of a VM together.
    rate_hz: u32,
    migrations: &'a AtomicU32,
    /// Where captures of migrations go, if they are wanted.
    captures: Option<Arc<Captures>>,
    /// Where the report belongs; none where there is no scenario to report on.
    out: Option<&'a Path>,
}

impl<'a> Bench<'a> {
    /// The same for a migration that may have a strategy of its own; what it needs of segue runs.
    async fn handing_over_by(&self, own: Option<Strategy>) -> Result<Bench<'a>> {
        let strategy = own.unwrap_or(self.scenario.strategy);
        let segue = conduct::segue_of(strategy, agents::hook(self.scenario.hook));
        self.cluster.run_segue(segue).await?;
        Ok(Bench {
            strategy,
            ..self.clone()
        })
    }

    /// An address of a peer that VMs call.
    fn address_of(&self, peer: Peer, family: Family) -> Result<IpAddr> {
        let addresses = match peer {
            Peer::Outside => outside_addresses().to_vec(),
            Peer::Client => {
                let topology = self.scenario.topology;
                self.networks.client_addresses(topology, 1)?
            }
        };
        let address = flows::of_family(addresses, family);
        address.with_context(|| format!("{} has no {family:?} address", peer.host()))
    }

    /// The addresses, outside, of nodes' gateways.
    fn gateways(&self, nodes: &[String], family: Family) -> Result<Vec<IpAddr>> {
        let network = self.networks.routed()?;
        let address = |node: &String| {
            let (v4, v6) = network.gateway_address(node)?;
            let address = flows::of_family([v4.into(), v6.into()], family);
            address.with_context(|| format!("gateway {node} has no {family:?} address"))
        };
        nodes.iter().map(address).collect()
    }

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
            networks: Networks::open(lab)
                .await?
                .with_arp_proxy(parts.arp_proxy.clone()),
            ovn: Ovn::follow(lab).await?,
            cluster,
            baseline: OnceCell::new(),
            migrations: AtomicU32::new(1),
            placed: BTreeSet::new(),
        })
    }

    /// Runs one scenario, and where the guest or the client did not keep up a second time, whole and at half the rate.
    /// Invalid again, it has failed.
    ///
    /// The report is there even if something broke on the way: then the last check says what. Where a check fails, what the
    /// hosts say then goes to a directory below `out`, where the report belongs.
    pub async fn run(
        &mut self,
        scenario: &Scenario,
        out: &Path,
        progress: &dyn Progress,
    ) -> Report {
        let first = self.attempt(scenario, None, out, progress).await;
        let invalid = first.invalid();
        if invalid.is_empty() {
            return first;
        }
        let half = (first.rate_hz / 2).max(1);
        progress.step(&format!(
            "Scenario {} is invalid, and is repeated with {half} packets a second: {}",
            scenario.name,
            invalid.join("; ")
        ));
        let mut second = self.attempt(scenario, Some(half), out, progress).await;
        second.attempts += 1;
        second.repeated_because = invalid;
        second
    }

    /// Runs a scenario once: at half the rate where that is given, which is the last time then.
    async fn attempt(
        &mut self,
        scenario: &Scenario,
        half: Option<u32>,
        out: &Path,
        progress: &dyn Progress,
    ) -> Report {
        let mut report = Report {
            schema: report::SCHEMA.to_owned(),
            scenario: scenario.name.clone(),
            passed: false,
            environment: self.environment.clone(),
            rate_hz: half.unwrap_or(0),
            baseline: None,
            attempts: 1,
            repeated_because: Vec::new(),
            migrations: Vec::new(),
            measurements: Vec::new(),
            checks: Vec::new(),
        };
        let ran = self.run_into(scenario, half, &mut report, out, progress);
        if let Err(error) = ran.await {
            report.checks.push(Check {
                what: "the scenario comes to its end".to_owned(),
                failure: Some(format!("{error:#}")),
            });
        }
        let invalid = report.invalid();
        let mut checks = Checks(std::mem::take(&mut report.checks));
        checks.that(
            "the guest and the client keep up",
            invalid.is_empty(),
            || invalid.join("; "),
        );
        report.checks = checks.0;
        report.passed = report.checks.iter().all(Check::held);
        report
    }

    /// Sets the scenario up, takes its steps, and takes it down whatever came of it.
    async fn run_into(
        &mut self,
        scenario: &Scenario,
        half: Option<u32>,
        report: &mut Report,
        out: &Path,
        progress: &dyn Progress,
    ) -> Result<()> {
        self.networks.prepare(scenario).await?;
        let mut surroundings = Surroundings::new();
        let mut vms = Vec::new();
        let ended = self
            .play(
                (scenario, half),
                &mut vms,
                &mut surroundings,
                (report, out),
                progress,
            )
            .await;
        // What is invalid and will be repeated explains nothing.
        let counts = half.is_some() || report.invalid().is_empty();
        if counts && (ended.is_err() || !report.checks.iter().all(Check::held)) {
            self.gather(&vms, &out.join(EVIDENCE), progress).await;
        }
        let placed = surroundings.placed();
        let mut checks = Checks(surroundings.take_down(&self.networks).await);
        if ended.is_err() {
            // It may have been killed, and not started again.
            let restarted = self.cluster.controller.lock().await.restart(None).await;
            checks.worked("the controller can be started again", &restarted);
        }
        self.placed.extend(placed);
        for spec in &scenario.vms {
            let client = self.cluster.client();
            let removed = vm::remove(client, &self.networks, scenario.topology, spec).await;
            checks.worked(format!("{} can be removed", spec.key()), &removed);
        }
        let ended_cni = self.cluster.run_kube_ovn(None).await;
        checks.worked("the CNI's controller ends", &ended_cni);
        let client = self.cluster.client();
        let deleted = policies::delete(client, &scenario.policies).await;
        checks.worked("the policies can be deleted", &deleted);
        // With the VMs gone there is nothing left that somebody else has handed over.
        let restored = self.cluster.run_segue(Segue::Controller).await;
        checks.worked("the controller runs again", &restored);
        report.checks.append(&mut checks.0);
        ended
    }

    async fn play<'s>(
        &'s self,
        (scenario, half): (&'s Scenario, Option<u32>),
        vms: &mut Vec<RunningVm>,
        surroundings: &mut Surroundings<'s>,
        (report, out): (&mut Report, &'s Path),
        progress: &dyn Progress,
    ) -> Result<()> {
        let segue = conduct::segue_of(scenario.strategy, agents::hook(scenario.hook));
        self.cluster.run_segue(segue).await?;
        self.cluster
            .run_kube_ovn(kube_ovn::settings(self.lab, scenario))
            .await?;
        policies::apply(self.cluster.client(), &scenario.policies).await?;
        self.boot(scenario, vms, progress).await?;
        let baseline = self.baseline(vms.first(), progress).await?;
        report.baseline = Some(baseline.clone());
        report.rate_hz = half.unwrap_or(baseline.rate_hz);
        let captures = scenario.capture.then(|| Captures::below(out));
        let bench = Bench {
            lab: self.lab,
            cluster: &self.cluster,
            controller: Arc::clone(&self.cluster.controller),
            ovn: &self.ovn,
            networks: &self.networks,
            scenario,
            strategy: scenario.strategy,
            rate_hz: report.rate_hz,
            migrations: &self.migrations,
            captures: captures.transpose()?.map(Arc::new),
            out: Some(out),
        };
        surroundings.set_up(&bench, vms).await?;
        for step in &scenario.steps {
            take(&bench, vms, step, report, progress).await?;
            if half.is_none() && !report.invalid().is_empty() {
                // It will be repeated as a whole.
                break;
            }
        }
        Ok(())
    }

    /// What a VM carries without a migration: found once, with the first.
    async fn baseline(&self, vm: Option<&RunningVm>, progress: &dyn Progress) -> Result<&Baseline> {
        let find = || async {
            let vm = vm.context("no VM to find the rate with")?;
            rate::find(self.lab, &self.cluster, vm, progress).await
        };
        self.baseline.get_or_try_init(find).await
    }

    async fn boot(
        &self,
        scenario: &Scenario,
        vms: &mut Vec<RunningVm>,
        progress: &dyn Progress,
    ) -> Result<()> {
        for (host, spec) in (networks::FIRST_HOST..).zip(&scenario.vms) {
            progress.step(&format!("Booting {} on {}", spec.key(), spec.node));
            let vm = RunningVm::start(
                self.lab,
                self.cluster.client(),
                &self.networks,
                &self.ovn,
                scenario.layout(),
                host,
                spec,
            );
            let vm = vm.await?;
            // Nobody else keeps place sets.
            if scenario.strategy.is_segue() {
                vm.placed_on(&self.ovn, &spec.node).await?;
            }
            vms.push(vm);
        }
        Ok(())
    }

    /// Keeps what explains a failure, as far as it can be had: the failure is what is reported.
    async fn gather(&self, vms: &[RunningVm], dir: &Path, progress: &dyn Progress) {
        progress.step("A check failed: asking every host why");
        let hypervisor = &self.cluster.hypervisor;
        let guests: Vec<_> = vms
            .iter()
            .filter_map(|vm| hypervisor.guest(&vm.domain))
            .collect();
        match evidence::gather(self.lab, vms, &guests, dir).await {
            Ok(dir) => progress.step(&format!("What they say is in {}", dir.display())),
            Err(error) => progress.step(&format!("What they say could not be kept: {error:#}")),
        }
    }

    /// Ends the cluster; the lab stays.
    ///
    /// # Errors
    /// When something does not end, or what the VMs were is left in OVN.
    pub async fn stop(self) -> Result<()> {
        let placed = place::Placed::in_sets(self.placed.into_iter().collect());
        // Once for all scenarios: the controller waits a while for a port that may come back.
        let forgotten = place::settled(&self.ovn, &placed, None).await;
        self.cluster.stop().await?;
        forgotten.context("after the last VM is gone")
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
            let bench = bench.handing_over_by(migrate.strategy).await?;
            let (name, to, strategy) = (&migrate.vm, &migrate.to, bench.strategy);
            progress.step(&format!("Migrating {name} to {to} ({strategy})"));
            let done = migration::run(&bench, vm(name)?, migrate).await?;
            report.checks.extend(done.checks);
            report.migrations.push(done.migration);
        }
        Step::Together(migrations) => {
            progress.step(&format!(
                "Migrating {} VMs at the same time",
                migrations.len()
            ));
            // One machine carries them all.
            let together = u32::try_from(migrations.len()).unwrap_or(u32::MAX);
            let bench = &Bench {
                rate_hz: (bench.rate_hz / together.max(1)).max(1),
                ..bench.clone()
            };
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
        Step::Forge(forge) => {
            progress.step(&format!("{} announces itself, and does not move", forge.vm));
            let checks = forging::at_rest(bench, vm(&forge.vm)?).await?;
            report.checks.extend(checks);
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

/// Writes a report to its [path](report_path).
pub fn write_report(path: &Path, report: &Report) -> Result<()> {
    if let Some(dir) = path.parent() {
        fs::create_dir_all(dir).with_context(|| dir.display().to_string())?;
    }
    let mut json = serde_json::to_string_pretty(report).context("the report")?;
    json.push('\n');
    fs::write(path, json).with_context(|| path.display().to_string())
}
