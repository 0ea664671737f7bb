//! What the commands do.

use std::fs::File;
use std::io::{self, BufWriter, IsTerminal, Write};
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use dataplane_probe::run::{Outcome, Probe};
use dataplane_probe::watch::{self, Watcher};
use dataplane_probe::{reflect, table};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::task::spawn_blocking;
use tokio::time::{MissedTickBehavior, interval};

use crate::cli::{Arguments, Command, Output, ReflectArguments, RunArguments, WatchArguments};

/// As shells report a program that ended by Ctrl-C.
const INTERRUPTED: i32 = 130;
/// How often it is looked whether a run is over.
const LOOK: Duration = Duration::from_millis(50);
/// Looks between two lines of progress.
const LOOKS_PER_LINE: u32 = 20;

struct Signals {
    interrupt: Signal,
    terminate: Signal,
}

impl Signals {
    fn new() -> io::Result<Self> {
        Ok(Self {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
        })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}

pub(crate) fn execute(arguments: Arguments) -> Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start")?;
    match arguments.command {
        Command::Reflect(arguments) => runtime.block_on(reflect(arguments)),
        Command::Run(arguments) => runtime.block_on(run(*arguments)),
        Command::Watch(arguments) => runtime.block_on(watch(arguments)),
    }
}

async fn reflect(arguments: ReflectArguments) -> Result<ExitCode> {
    let mut signals = Signals::new()?;
    let config = reflect::Config {
        bind: arguments.bind,
        port: arguments.port,
        realtime: arguments.realtime,
        may_call: arguments.may_call,
    };
    let reflector = reflect::Reflector::start(&config)?;
    let addresses: Vec<String> = reflector
        .addresses()
        .iter()
        .map(ToString::to_string)
        .collect();
    say(&format!("reflecting on {}", addresses.join(" and ")))?;
    signals.next().await;
    Ok(ExitCode::SUCCESS)
}

async fn run(arguments: RunArguments) -> Result<ExitCode> {
    let mut signals = Signals::new()?;
    let config = arguments
        .config()
        .context("cannot listen where --called-at says")?;
    let target = config.target;
    let starting = spawn_blocking(move || Probe::start(config));
    let probe = tokio::select! {
        started = starting => started.context("the run died")??,
        () = signals.next() => std::process::exit(INTERRUPTED),
    };
    if !arguments.output.quiet {
        eprintln!("measuring {target}, session {:016x}", probe.session());
    }
    until_over(&probe, &mut signals, !arguments.output.quiet).await;
    let finishing = spawn_blocking(move || probe.finish());
    let outcome = tokio::select! {
        outcome = finishing => outcome.context("the run died")?,
        () = signals.next() => std::process::exit(INTERRUPTED),
    };
    write_outputs(&arguments.output, &outcome)?;
    for warning in &outcome.warnings {
        eprintln!("dataplane-probe: {warning}");
    }
    let exceeded = arguments.thresholds().exceeded_by(&outcome.report);
    for exceeded in &exceeded {
        eprintln!("dataplane-probe: threshold exceeded: {exceeded}");
    }
    Ok(if exceeded.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

async fn until_over(probe: &Probe, signals: &mut Signals, progress: bool) {
    let on_terminal = io::stderr().is_terminal();
    let mut looks = 0_u32;
    let mut look = interval(LOOK);
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = signals.next() => break,
            _ = look.tick() => {}
        }
        if probe.is_over() {
            break;
        }
        looks += 1;
        if progress && on_terminal && looks.is_multiple_of(LOOKS_PER_LINE) {
            let now = probe.progress();
            eprint!(
                "\r{} sent, {} of them received; {} received back, {} missing, last {} ms ago \x1b[K",
                now.sent,
                now.reflector_received,
                now.received,
                now.missing,
                now.silent_ns / 1_000_000,
            );
        }
    }
    if progress && on_terminal {
        eprint!("\r\x1b[K");
    }
}

fn write_outputs(output: &Output, outcome: &Outcome) -> Result<()> {
    let mut json =
        serde_json::to_string_pretty(&outcome.report).context("cannot write the report as JSON")?;
    json.push('\n');
    let to_stdout = output.json.as_deref() == Some(Path::new("-"));
    let shown = if to_stdout {
        &json
    } else {
        &table::render(&outcome.report)
    };
    // A reader that has gone away has seen enough; the files are still to be written.
    match io::stdout().lock().write_all(shown.as_bytes()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            return Err(error).context("cannot print the report");
        }
        _ => {}
    }
    if let Some(path) = output.json.as_deref().filter(|_| !to_stdout) {
        std::fs::write(path, json).with_context(|| format!("cannot write {}", path.display()))?;
    }
    if let Some(path) = &output.histogram {
        let name = || format!("cannot write {}", path.display());
        let mut file = BufWriter::new(File::create(path).with_context(name)?);
        outcome
            .histograms
            .write_log(&mut file)
            .and_then(|()| file.flush())
            .with_context(name)?;
    }
    // Without a log there is a warning that says why.
    if let Some((path, packets)) = output.packets.as_ref().zip(outcome.packets.as_ref()) {
        let name = || format!("cannot write {}", path.display());
        let mut file = BufWriter::new(File::create(path).with_context(name)?);
        packets
            .write_csv(&mut file)
            .and_then(|()| file.flush())
            .with_context(name)?;
    }
    Ok(())
}

async fn watch(arguments: WatchArguments) -> Result<ExitCode> {
    let mut signals = Signals::new()?;
    let config = watch::Config {
        interface: arguments.interface,
        mac: arguments.mac,
        port: arguments.port,
        all: arguments.all,
    };
    let watcher = Watcher::open(&config)?;
    let show = move |event: &watch::Event| {
        if arguments.json {
            serde_json::to_string(event).map_err(io::Error::from)
        } else {
            Ok(event.to_string())
        }
    };
    say(&show(&watcher.ready())?)?;
    let stop = watcher.stop_handle();
    let timeout = arguments.timeout;
    let watching =
        spawn_blocking(move || watch_until(watcher, timeout, arguments.until_first, &show));
    tokio::select! {
        code = watching => code.context("watching died")?,
        () = signals.next() => {
            stop.stop();
            Ok(ExitCode::SUCCESS)
        }
    }
}

fn watch_until(
    mut watcher: Watcher,
    timeout: Option<Duration>,
    until_first: bool,
    show: &dyn Fn(&watch::Event) -> io::Result<String>,
) -> Result<ExitCode> {
    let code = watch_on(&mut watcher, timeout, until_first, show)?;
    let dropped = watcher.dropped()?;
    if dropped > 0 {
        eprintln!("warning: {dropped} frames came faster than they could be told of");
    }
    Ok(code)
}

fn watch_on(
    watcher: &mut Watcher,
    timeout: Option<Duration>,
    until_first: bool,
    show: &dyn Fn(&watch::Event) -> io::Result<String>,
) -> Result<ExitCode> {
    let deadline = timeout.map(|timeout| std::time::Instant::now() + timeout);
    loop {
        if deadline.is_some_and(|deadline| std::time::Instant::now() >= deadline) {
            return Ok(if until_first {
                ExitCode::FAILURE
            } else {
                ExitCode::SUCCESS
            });
        }
        let Some(events) = watcher.poll()? else {
            return Ok(ExitCode::SUCCESS);
        };
        for event in events {
            say(&show(&event)?)?;
            if until_first && event.is_first_in() {
                return Ok(ExitCode::SUCCESS);
            }
        }
    }
}

/// A line on standard output, at once: another program may be waiting for it.
fn say(line: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "{line}")?;
    out.flush()
}
