//! `scenarios bench …`

use std::io::{Write as _, stdout};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use clap::{Args, Subcommand};
use scenarios::bench::{self, BenchSpec, LARGE, Measured, SMALL};
use scenarios::lab::{Lab, LabName, LabSpec, Progress as _, Suite, Terminal};
use tokio::runtime;

use crate::cli_blackout::{self, BlackoutArgs};
use crate::cli_lab::interruptible;

/// Arguments of `scenarios bench`.
#[derive(Debug, Args)]
pub(crate) struct BenchArgs {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Times how long OVN takes to follow a VM that has moved, by number of VMs and by what is written.
    ///
    /// On a lab of its own with a real Northbound, Southbound, northd and ovn-controller, without guests. From the
    /// commit to its acknowledgement, to the Southbound being up to date, and to the flows being installed.
    Flip(FlipArgs),
    /// Compares what a guest's peers see of its migrations, by who hands its port over: segue, and what others do.
    ///
    /// Real migrations on a lab for each topology. The strategies take turns; the peers' sequences of writes are replayed
    /// on the same lab. Ctrl-C ends it with the figures that there are.
    Blackout(BlackoutArgs),
}

/// Arguments of `scenarios bench flip`.
#[derive(Debug, Args)]
struct FlipArgs {
    /// Numbers of VMs, ascending. 100000 needs 16 GiB of memory and most of an hour, nearly all of it for routes.
    #[arg(long, value_name = "VMS", value_delimiter = ',', default_values_t = [SMALL, 1000, LARGE])]
    sizes: Vec<u32>,

    /// Flips of each method with each number of VMs, rounded up to an even number: there and back.
    #[arg(long, default_value_t = 100)]
    flips: usize,

    /// Where one flip takes five seconds or more, as many as fit in this time, and at least fifty; two where one takes
    /// twenty.
    #[arg(long, value_name = "SECONDS", default_value_t = 300)]
    patience: u64,

    /// Exits with 1 unless the median time of address-set to the Southbound grows at most threefold from 100 VMs to
    /// 10000, and is at most a hundredth of static-route's there.
    #[arg(long)]
    check: bool,

    /// Where results.json, flips.csv and flip.svg go; the logs of every host go to DIR/logs.
    #[arg(long, value_name = "DIR", default_value = "out/bench-flip")]
    out: PathBuf,

    /// The lab's name. Labs of different names live side by side.
    #[arg(long, env = "SEGUE_LAB", default_value = "bench")]
    name: LabName,

    /// Debian suite of the hosts, and with it the releases of OVN and Open vSwitch.
    #[arg(long, default_value_t)]
    suite: Suite,
}

pub(crate) fn run(args: &BenchArgs) -> Result<ExitCode> {
    match &args.what {
        What::Flip(args) => flip(args),
        What::Blackout(args) => cli_blackout::run(args),
    }
}

fn flip(args: &FlipArgs) -> Result<ExitCode> {
    let spec = BenchSpec {
        sizes: args.sizes.clone(),
        flips: args.flips,
        patience: Duration::from_secs(args.patience),
    };
    spec.validate()?;
    ensure!(
        !args.check || [SMALL, LARGE].iter().all(|size| args.sizes.contains(size)),
        "--check compares {SMALL} VMs with {LARGE}: both must be among --sizes"
    );
    bench::remove_old(&args.out)?;
    let progress = Terminal::default();
    let lab_spec = LabSpec {
        suite: args.suite.clone(),
        nodes: 1,
        hypervisors: false,
        logs: Some(args.out.join("logs")),
        ..LabSpec::new(args.name.clone())?
    };
    let lab = {
        let runtime = runtime::Runtime::new().context("tokio runtime")?;
        runtime.block_on(interruptible(Lab::up(&lab_spec, &progress)))?
    };
    // Threads inherit the network namespace of the thread that starts them: from here on, all do.
    lab.central().enter_netns()?;
    let runtime = prompt_runtime()?;
    let measuring = bench::run(&lab, &spec, &progress, |so_far| {
        bench::write(&args.out, so_far)
    });
    let ran = runtime.block_on(interruptible(measuring));
    drop(runtime);

    progress.step("Taking the lab down");
    let down = lab.down();
    drop(progress);
    let measured = ran?;
    down?;
    show(args, &measured)?;
    let held = measured.results.checks.iter().all(|check| check.passed);
    Ok(if held || !args.check {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn show(args: &FlipArgs, measured: &Measured) -> Result<()> {
    let mut out = stdout();
    writeln!(out, "\n{}", bench::render(&measured.results))?;
    for row in &measured.results.rows {
        if row.figures.flips < args.flips {
            writeln!(
                out,
                "{} with {} VMs: {} flips instead of {}, each takes so long (--patience)",
                row.method, row.vms, row.figures.flips, args.flips
            )?;
        }
    }
    writeln!(out, "{}", args.out.join("flip.svg").display())?;
    Ok(())
}

/// A runtime whose threads run as soon as there is something for them, however busy the daemons that are measured are:
/// what is timed is the daemons and not when this program gets a processor back.
fn prompt_runtime() -> Result<runtime::Runtime> {
    run_promptly();
    runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .on_thread_start(run_promptly)
        .enable_all()
        .build()
        .context("tokio runtime")
}

/// Makes the calling thread a real-time one (sched(7)), and no thread or process that it starts.
fn run_promptly() {
    let policy = libc::SCHED_RR | libc::SCHED_RESET_ON_FORK;
    let parameters = libc::sched_param { sched_priority: 1 };
    // SAFETY: sched_setscheduler(2) reads the parameters, which live until it returns.
    let refused = unsafe { libc::sched_setscheduler(0, policy, &raw const parameters) } != 0;
    if refused {
        // Some containers forbid it; the times are then longer by what this program waits.
        tracing::warn!(
            "no real-time scheduling: {}",
            std::io::Error::last_os_error()
        );
    }
}
