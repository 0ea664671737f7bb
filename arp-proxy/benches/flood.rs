//! How many questions a second the proxy answers on one core, and how fast: `make bench-arp-proxy`, as root.
//!
//! Open loop: questions leave at fixed times, whatever comes back, and an answer's latency counts from the time at
//! which its question was to leave until the kernel received the answer. A late sender thus counts against the proxy.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a benchmark that cannot measure has nothing better to do"
)]

#[path = "flood/ask.rs"]
mod ask;
#[allow(dead_code, reason = "the tests use the rest")]
#[path = "../tests/e2e/support.rs"]
mod support;

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use comfy_table::{ContentArrangement, Table};
use hdrhistogram::Histogram;
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;
use serde_json::{Value, json};

use ask::{Flood, Kind, Outcome};
use support::{Lab, Running};

/// The proxy's, and the other, which asks and listens.
const CORES: [usize; 2] = [0, 1];
/// Waiting for its core more than this, the proxy shared it with something heavy.
const SHARED_PERCENT: f64 = 2.0;
const METRICS: [(&str, &str); 3] = [
    ("dropped", "arp_proxy_frames_dropped_total"),
    ("not_sent", "arp_proxy_send_failures_total"),
    ("limited", "arp_proxy_rate_limited_total"),
];

/// Floods an arp-proxy with questions and measures its answers.
#[derive(Debug, Parser)]
struct Options {
    /// Questions a second
    #[arg(long, default_value_t = 10_000)]
    rate: u32,
    /// How long, of each kind of question
    #[arg(long, default_value_t = 30)]
    seconds: u32,
    /// Stations that ask
    #[arg(long, default_value_t = 1000)]
    sources: u32,
    /// Let other processes have the proxy's core too; otherwise it goes before them (SCHED_FIFO), so that the core is
    /// its own on a machine that does other things
    #[arg(long)]
    share_core: bool,
    /// Where to write the results as JSON
    #[arg(long)]
    json: Option<PathBuf>,
    /// What cargo says
    #[arg(long, hide = true)]
    bench: bool,
}

/// One run.
struct Measured {
    kind: Kind,
    outcome: Outcome,
    latency_ns: Histogram<u64>,
    /// Of one core, as the kernel accounts it.
    cpu_percent: f64,
    /// Of the time, ready to run while others had the core.
    waited_percent: f64,
    metrics: Vec<(&'static str, u64)>,
}

fn main() -> ExitCode {
    let options = Options::parse();
    // What others do on the two cores shows in the figures, and is no fault of the proxy's.
    let load = fs::read_to_string("/proc/loadavg")
        .unwrap()
        .trim()
        .to_owned();
    let runs: Vec<Measured> = [Kind::Arp, Kind::Neighbour]
        .into_iter()
        .map(|kind| measure(&options, kind))
        .collect();
    println!("{}", table(&runs));
    println!("load of the machine before: {load}");
    println!(
        "{} questions a second from {} sources for {} s each; the proxy on core {}{}; latency from the intended sending",
        options.rate,
        options.sources,
        options.seconds,
        CORES[0],
        if options.share_core {
            ", shared"
        } else {
            ", its own"
        },
    );
    if let Some(path) = &options.json {
        if let Some(directory) = path.parent() {
            fs::create_dir_all(directory).unwrap();
        }
        let text = serde_json::to_string_pretty(&results(&options, &runs, &load)).unwrap();
        fs::write(path, text + "\n").unwrap();
        println!("written to {}", path.display());
    }
    if runs.iter().any(|run| run.waited_percent > SHARED_PERCENT) {
        println!("the proxy had to wait for its core: others had it");
    }
    let lost: u64 = runs.iter().map(|run| run.outcome.lost()).sum();
    if lost == 0 {
        ExitCode::SUCCESS
    } else {
        eprintln!("{lost} questions were not answered");
        ExitCode::FAILURE
    }
}

/// A link, a proxy and a flood of their own for each kind, so that neither is warmed or worn by the other.
fn measure(options: &Options, kind: Kind) -> Measured {
    let lab = Lab::linked();
    // What a thread starts inherits its core and its priority.
    pin(CORES[0]);
    ask::go_first(!options.share_core);
    // Its limits are the default ones.
    let proxy = lab.start(&["--interface", "tap0"], &["tap0"]);
    ask::go_first(false);
    pin(CORES[1]);
    let flood = Flood {
        kind,
        rate: options.rate,
        count: options.rate * options.seconds,
        sources: options.sources,
    };
    let before = core_ns(&proxy);
    let outcome = flood.run(&lab.guest, "eth0");
    let after = core_ns(&proxy);
    let percent = |from: u64, to: u64| micros(to - from) / 10_000.0 / outcome.seconds;
    let mut latency_ns = Histogram::new(3).unwrap();
    for latency in outcome.latencies() {
        latency_ns.record(latency).unwrap();
    }
    Measured {
        kind,
        cpu_percent: percent(before.0, after.0),
        waited_percent: percent(before.1, after.1),
        latency_ns,
        metrics: METRICS
            .map(|(name, metric)| (name, total(&proxy, metric)))
            .to_vec(),
        outcome,
    }
}

/// Keeps this thread, and what it starts, on one core.
fn pin(core: usize) {
    let mut set = CpuSet::new();
    set.set(core).unwrap();
    sched_setaffinity(Pid::from_raw(0), &set).unwrap();
}

/// Over all labels.
fn total(proxy: &Running, metric: &str) -> u64 {
    let text = proxy.ask("GET", "/metrics");
    let values = text
        .lines()
        .filter(|line| line.starts_with(metric))
        .filter_map(|line| line.rsplit(' ').next()?.parse::<u64>().ok());
    values.sum()
}

/// How long it has had a core so far, and how long it has waited for one, ready to run (`schedstat`; the kernel's
/// sched-stats documentation).
fn core_ns(proxy: &Running) -> (u64, u64) {
    let stat = fs::read_to_string(format!("/proc/{}/schedstat", proxy.pid())).unwrap();
    let mut fields = stat.split_whitespace().map(|field| field.parse().unwrap());
    (fields.next().unwrap(), fields.next().unwrap())
}

#[expect(
    clippy::cast_precision_loss,
    reason = "nanoseconds of a few seconds at most"
)]
fn micros(nanos: u64) -> f64 {
    nanos as f64 / 1000.0
}

fn table(runs: &[Measured]) -> Table {
    let mut table = Table::new();
    table.set_content_arrangement(ContentArrangement::Disabled);
    table.set_header([
        "questions",
        "asked",
        "lost",
        "duplicated",
        "p50 µs",
        "p99 µs",
        "p99.9 µs",
        "max µs",
        "sender late max µs",
        "CPU %",
        "waited for the core %",
    ]);
    for run in runs {
        let quantile = |q| format!("{:.0}", micros(run.latency_ns.value_at_quantile(q)));
        table.add_row([
            run.kind.name().to_owned(),
            run.outcome.asked().to_string(),
            run.outcome.lost().to_string(),
            run.outcome.duplicated.to_string(),
            quantile(0.5),
            quantile(0.99),
            quantile(0.999),
            format!("{:.0}", micros(run.latency_ns.max())),
            format!("{:.0}", micros(run.outcome.late_ns)),
            format!("{:.1}", run.cpu_percent),
            format!("{:.1}", run.waited_percent),
        ]);
    }
    table
}

fn results(options: &Options, runs: &[Measured], load: &str) -> Value {
    let runs: Vec<Value> = runs
        .iter()
        .map(|run| {
            let quantile = |q| micros(run.latency_ns.value_at_quantile(q));
            json!({
                "questions": run.kind.name(),
                "asked": run.outcome.asked(),
                "answered": run.outcome.asked() - run.outcome.lost(),
                "lost": run.outcome.lost(),
                "duplicated": run.outcome.duplicated,
                "latency_us": {
                    "p50": quantile(0.5), "p90": quantile(0.9), "p99": quantile(0.99),
                    "p99.9": quantile(0.999), "max": micros(run.latency_ns.max()),
                },
                "sender_late_max_us": micros(run.outcome.late_ns),
                "proxy_cpu_percent": run.cpu_percent,
                "proxy_waited_percent": run.waited_percent,
                "proxy": run.metrics.iter().map(|(name, value)| ((*name).to_owned(), json!(value))).collect::<serde_json::Map<_, _>>(),
            })
        })
        .collect();
    json!({
        "schema": "arp-proxy.flood/v1",
        "rate_hz": options.rate,
        "seconds": options.seconds,
        "sources": options.sources,
        "proxy_cores": 1,
        "proxy_core_shared": options.share_core,
        "load_before": load,
        "runs": runs,
    })
}
