//! `scenarios run …`

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, Result, bail};
use clap::Args;
use scenarios::cluster::Parts;
use scenarios::kubevirt::{Delays, Role};
use scenarios::lab::{Accel, Lab, LabName, LabSpec, Progress as _, Suite, Terminal};
use scenarios::report::{self, Report};
use scenarios::runner::{Runner, report_path, write_report};
use scenarios::scenario::{self, Scenario};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;

use crate::cli_lab::interruptible;

/// Arguments of `scenarios run`.
#[derive(Debug, Args)]
pub(crate) struct RunArgs {
    /// Scenario files. They run one after the other on one lab.
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,

    /// Where reports go: DIR/report.json for one scenario, DIR/<scenario>/report.json for several.
    /// The logs of every host go to DIR/logs.
    #[arg(long, value_name = "DIR", default_value = "out")]
    out: PathBuf,

    /// The lab's name. Labs of different names live side by side.
    #[arg(long, env = "SEGUE_LAB", default_value_t)]
    name: LabName,

    /// Debian suite of the hosts, and with it the releases of OVN, Open vSwitch, libvirt and QEMU.
    #[arg(long, default_value_t)]
    suite: Suite,

    #[command(flatten)]
    parts: PartsArgs,
}

/// Where the programs under test are.
#[derive(Debug, Args)]
pub(crate) struct PartsArgs {
    /// The migration-controller; by default the one beside this program.
    #[arg(long, value_name = "PROGRAM", env = "SEGUE_CONTROLLER")]
    controller: Option<PathBuf>,

    /// node-hooks, the agent, for scenarios with `strategy: segue`; by default the one beside this program.
    #[arg(long, value_name = "PROGRAM", env = "SEGUE_NODE_HOOKS")]
    node_hooks: Option<PathBuf>,

    /// A static dataplane-probe, run in every guest; by default the one beside this program.
    #[arg(long, value_name = "PROGRAM", env = "SEGUE_GUEST_PROBE")]
    guest_probe: Option<PathBuf>,

    /// arp-proxy, for scenarios that need it; by default the one beside this program.
    #[arg(long, value_name = "PROGRAM", env = "SEGUE_ARP_PROXY")]
    arp_proxy: Option<PathBuf>,

    /// The real kube-ovn-controller, for scenarios with `cni: kube-ovn`; by default a stand-in writes as it does.
    #[arg(long, value_name = "PROGRAM", env = "SEGUE_KUBE_OVN_CONTROLLER")]
    kube_ovn_controller: Option<PathBuf>,

    /// The kustomize base that is applied.
    #[arg(long, value_name = "DIR", default_value = "manifests")]
    manifests: PathBuf,

    /// How guests' processors are had.
    #[arg(long, value_enum, default_value_t)]
    accel: Accel,
}

impl PartsArgs {
    pub(crate) fn parts(&self) -> Result<Parts> {
        let exe = std::env::current_exe().context("path of this program")?;
        let beside = exe.parent().context("the directory of this program")?;
        let built = |given: &Option<PathBuf>, default: PathBuf| {
            let path = given.clone().unwrap_or(default);
            let found = path.canonicalize();
            found.with_context(|| format!("{}: `make build` makes it", path.display()))
        };
        // Few scenarios need it; those say so where it is missing.
        let optional = |given: &Option<PathBuf>, name: &str| match given {
            Some(_) => built(given, PathBuf::new()).map(Some),
            None => Ok(beside.join(name).canonicalize().ok()),
        };
        Ok(Parts {
            arp_proxy: optional(&self.arp_proxy, "arp-proxy")?,
            node_hooks: optional(&self.node_hooks, "node-hooks")?,
            kube_ovn_controller: match &self.kube_ovn_controller {
                Some(path) => {
                    let found = path.canonicalize();
                    Some(found.with_context(|| path.display().to_string())?)
                }
                None => None,
            },
            controller: built(&self.controller, beside.join("migration-controller"))?,
            probe: built(&self.guest_probe, beside.join("dataplane-probe"))?,
            manifests: self.manifests.canonicalize().with_context(|| {
                let path = self.manifests.display();
                format!(
                    "{path}: run this in segue's own directory, or name the place with --manifests"
                )
            })?,
            accel: self.accel,
            roles: Role::ALL.to_vec(),
            delays: Delays::default(),
        })
    }
}

pub(crate) fn run(args: &RunArgs) -> Result<ExitCode> {
    let loaded: Result<Vec<_>, _> = args.files.iter().map(|file| scenario::load(file)).collect();
    let scenarios = match loaded {
        Ok(scenarios) => scenarios,
        Err(error) => {
            // Debug shows the file with the place marked.
            eprintln!("{error:?}");
            bail!("{error}");
        }
    };
    let parts = args.parts.parts()?;
    remove_old_reports(&args.out, &scenarios)?;
    log_to(&args.out)?;
    let progress = Terminal::default();

    let spec = LabSpec {
        suite: args.suite.clone(),
        logs: Some(args.out.join("logs")),
        ..LabSpec::new(args.name.clone())?
    };
    let lab = {
        let runtime = tokio::runtime::Runtime::new().context("tokio runtime")?;
        runtime.block_on(interruptible(Lab::up(&spec, &progress)))?
    };
    // Threads inherit the network namespace of the thread that starts them: from here on, all do.
    lab.central().enter_netns()?;
    let runtime = tokio::runtime::Runtime::new().context("tokio runtime")?;
    let ran = runtime.block_on(interruptible(run_all(
        args, &lab, &parts, &scenarios, &progress,
    )));
    drop(runtime);

    progress.step("Taking the lab down");
    let down = lab.down();
    drop(progress);
    let failed = ran?;
    down?;
    println!(
        "{} passed, {} failed",
        scenarios.len() - failed.len(),
        failed.len()
    );
    Ok(if failed.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// A run that breaks off early must not leave the report of the one before to be taken for its own.
fn remove_old_reports(out: &Path, scenarios: &[Scenario]) -> Result<()> {
    for scenario in scenarios {
        let path = report_path(out, &scenario.name, scenarios.len() > 1);
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(error).with_context(|| path.display().to_string());
            }
            _ => {}
        }
    }
    Ok(())
}

/// What the runner and the stand-in for KubeVirt do goes to DIR/scenarios.log; the terminal is for
/// progress and results.
pub(crate) fn log_to(out: &Path) -> Result<()> {
    std::fs::create_dir_all(out).with_context(|| out.display().to_string())?;
    let path = out.join("scenarios.log");
    let file = std::fs::File::create(&path).with_context(|| path.display().to_string())?;
    log_into(std::sync::Mutex::new(file))
}

/// Logs of the runner and the stand-in for KubeVirt go there.
pub(crate) fn log_into(writer: impl for<'a> MakeWriter<'a> + Send + Sync + 'static) -> Result<()> {
    let filter = EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| EnvFilter::new("info,scenarios=debug,kube_client=off"));
    let subscriber = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(false)
        .with_writer(writer)
        .finish();
    tracing::subscriber::set_global_default(subscriber).context("logging")
}

/// Runs the scenarios and returns the names of those that failed.
async fn run_all(
    args: &RunArgs,
    lab: &Lab,
    parts: &Parts,
    scenarios: &[Scenario],
    progress: &Terminal,
) -> Result<Vec<String>> {
    let mut runner = Runner::start(lab, parts, progress).await?;
    let mut failed = Vec::new();
    for scenario in scenarios {
        progress.step(&format!("Scenario {}", scenario.name));
        let path = report_path(&args.out, &scenario.name, scenarios.len() > 1);
        let beside = path.parent().unwrap_or(&args.out);
        let report = runner.run(scenario, beside, progress).await;
        write_report(&path, &report)?;
        show(&report)?;
        println!("{}\n", path.display());
        if !report.passed {
            failed.push(scenario.name.clone());
        }
    }
    runner.stop().await?;
    Ok(failed)
}

fn show(report: &Report) -> Result<()> {
    writeln!(std::io::stdout(), "\n{}", report::render(report)).context("standard output")
}
