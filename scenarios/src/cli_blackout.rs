//! `scenarios bench blackout`

use std::io::{Write as _, stdout};
use std::path::PathBuf;
use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow};
use clap::{Args, ValueEnum};
use scenarios::bench::blackout::{self, BlackoutSpec, Measured};
use scenarios::cluster::Parts;
use scenarios::kubevirt::Delays;
use scenarios::lab::{Lab, LabName, LabSpec, Progress as _, Suite, Terminal};
use scenarios::scenario::{Strategy, Topology};
use tokio::runtime::Runtime;

use crate::cli_lab::interruptible;
use crate::cli_run::{PartsArgs, log_to};

/// Arguments of `scenarios bench blackout`.
#[derive(Debug, Args)]
pub(crate) struct BlackoutArgs {
    /// Migrations of each strategy in each topology. One takes some 14 seconds.
    #[arg(long, value_name = "N", default_value_t = 20)]
    runs: usize,

    /// Who hands the port over, in turn.
    #[arg(long, value_name = "NAME", value_delimiter = ',', default_values_t = Strategy::ALL)]
    strategies: Vec<Strategy>,

    /// How the network is laid out; each gets a lab of its own.
    #[arg(long, value_enum, value_name = "NAME", value_delimiter = ',', default_values_t = Layout::ALL)]
    topologies: Vec<Layout>,

    /// For how long the stand-in for KubeVirt keeps the target pod's ready annotation back once virt-handler has reported
    /// that the domain runs: what ovn-kubernetes waits for. In a cluster the annotation comes 50 to 1,000 ms after the
    /// resume, an estimate from KubeVirt's code; with the report's own delay the default is about 300 ms.
    #[arg(long, value_name = "MS", default_value_t = default_ready_ms())]
    ready_annotation_ms: u64,

    /// Exits with 1 unless segue loses packets towards the VM for at most 1 ms in the median and 3 ms in the 99th percentile,
    /// none from it, duplicates none, and its loss and added downtime are below every other's; 20 runs at least.
    #[arg(long)]
    check: bool,

    /// Where results.json, runs.csv and the pictures go; the logs of every host go to DIR/logs/<topology>.
    #[arg(long, value_name = "DIR", default_value = "out/bench-blackout")]
    out: PathBuf,

    /// The lab's name. Labs of different names live side by side.
    #[arg(long, env = "SEGUE_LAB", default_value = "blackout")]
    name: LabName,

    /// Debian suite of the hosts, and with it the releases of OVN, Open vSwitch, libvirt and QEMU.
    #[arg(long, default_value_t)]
    suite: Suite,

    #[command(flatten)]
    parts: PartsArgs,
}

/// A topology, on the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Layout {
    /// One logical switch spans the nodes.
    Shared,
    /// The guest has an address and nothing else, and every node a switch and a gateway.
    Routed,
}

impl Layout {
    const ALL: [Self; 2] = [Self::Shared, Self::Routed];

    fn topology(self) -> Topology {
        match self {
            Self::Shared => Topology::Shared,
            Self::Routed => Topology::Routed,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Shared => "shared",
            Self::Routed => "routed",
        }
    }
}

impl std::fmt::Display for Layout {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

fn default_ready_ms() -> u64 {
    u64::try_from(Delays::default().ready_annotation.as_millis()).unwrap_or(u64::MAX)
}

pub(crate) fn run(args: &BlackoutArgs) -> Result<ExitCode> {
    let topologies = args.topologies.iter();
    let spec = BlackoutSpec {
        strategies: args.strategies.clone(),
        topologies: topologies.map(|layout| layout.topology()).collect(),
        runs: args.runs,
    };
    spec.validate()?;
    let parts = Parts {
        delays: Delays {
            ready_annotation: Duration::from_millis(args.ready_annotation_ms),
            ..Delays::default()
        },
        ..args.parts.parts()?
    };
    blackout::remove_old(&args.out)?;
    log_to(&args.out)?;
    let progress = Terminal::default();
    let mut measured = Measured::default();
    let mut ran = Ok(());
    for layout in &args.topologies {
        ran = in_lab(args, &parts, &spec, *layout, &mut measured, &progress);
        if ran.is_err() {
            break;
        }
    }
    drop(progress);
    // Whatever ended it: what has been measured is worth as much.
    let good = show(args, &measured)?;
    ran?;
    Ok(if good {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// Brings a lab up, measures, and takes it down.
fn in_lab(
    args: &BlackoutArgs,
    parts: &Parts,
    spec: &BlackoutSpec,
    layout: Layout,
    measured: &mut Measured,
    progress: &Terminal,
) -> Result<()> {
    let lab_spec = LabSpec {
        suite: args.suite.clone(),
        logs: Some(args.out.join("logs").join(layout.name())),
        ..LabSpec::new(args.name.clone())?
    };
    let lab = {
        let runtime = Runtime::new().context("tokio runtime")?;
        runtime.block_on(interruptible(Lab::up(&lab_spec, progress)))?
    };
    // Threads inherit the network namespace of the thread that starts them. One of its own for each lab: this one has to
    // stay outside to bring up the next.
    let ran = thread::scope(|scope| {
        let measuring = scope.spawn(|| {
            lab.central().enter_netns()?;
            let runtime = Runtime::new().context("tokio runtime")?;
            let topology = layout.topology();
            let done =
                |so_far: &Measured| blackout::write(&args.out, &so_far.results(), so_far).map(drop);
            let running = blackout::run(&lab, parts, spec, topology, measured, progress, done);
            runtime.block_on(interruptible(running))
        });
        let joined = measuring.join();
        joined.map_err(|_| anyhow!("the thread that measures has panicked"))?
    });
    progress.step("Taking the lab down");
    let down = lab.down();
    ran?;
    down.map(drop)
}

/// Writes and prints the figures, and says whether every migration ended as it must, enough of them are valid and the
/// claims held that were to.
fn show(args: &BlackoutArgs, measured: &Measured) -> Result<bool> {
    if measured.is_empty() {
        return Ok(false);
    }
    let mut results = measured.results();
    if args.check {
        results.check();
    }
    let pictures = blackout::write(&args.out, &results, measured)?;
    let mut out = stdout();
    writeln!(out, "\n{}", blackout::render(&results))?;
    writeln!(out, "{}", args.out.join("results.json").display())?;
    for picture in pictures {
        writeln!(out, "{}", picture.display())?;
    }
    Ok(results.is_sound() && results.checks.iter().all(|check| check.passed))
}
