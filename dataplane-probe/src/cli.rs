//! What can be said on the command line.

use std::io;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use dataplane_probe::report::Thresholds;
use dataplane_probe::run::{Callee, Config};
use dataplane_probe::watch::Mac;

const PORT: u16 = 7000;

/// Measures what the peers of a machine see while something happens to it: loss, duplicates, reordering and gaps, each
/// direction on its own, over IPv4 or IPv6.
///
/// Start `dataplane-probe reflect` in the machine, then `dataplane-probe run --target ADDRESS` beside it.
#[derive(Debug, Parser)]
#[command(
    version,
    after_help = "Every option of the form --max-… or --fail-… makes `run` exit with 1 when exceeded; \
    2 means that nothing could be measured."
)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Answer the probes; run this in the machine to be measured
    ///
    /// One port, UDP and TCP, IPv4 and IPv6. Answers nobody who has not opened a session; up to 16 at a time.
    Reflect(ReflectArguments),
    /// Measure against a reflector, and report
    ///
    /// Ends after --duration, or at Ctrl-C or SIGTERM, with a report either way; a second signal aborts.
    Run(Box<RunArguments>),
    /// Tell when frames of a machine appear on an interface
    ///
    /// Prints RARP, gratuitous ARP, unsolicited neighbour advertisements, and the first frame of any kind in each
    /// direction, with kernel timestamps. Needs CAP_NET_RAW. The interface is not made promiscuous.
    Watch(WatchArguments),
}

#[derive(Debug, Args)]
pub(crate) struct ReflectArguments {
    /// Port to serve, UDP and TCP
    #[arg(long, default_value_t = PORT, env = "DATAPLANE_PROBE_PORT")]
    pub(crate) port: u16,
    /// Serve this address only; may be given more than once [default: all, IPv4 and IPv6]
    #[arg(long, value_name = "ADDRESS")]
    pub(crate) bind: Vec<IpAddr>,
    /// Try for real-time priority, for a machine that is busy with other things
    #[arg(long)]
    pub(crate) realtime: bool,
    /// Call whom a client tells it to (`run --called-at`): everybody who reaches the port may make it send anywhere
    #[arg(long)]
    pub(crate) may_call: bool,
}

#[derive(Debug, Args)]
pub(crate) struct RunArguments {
    /// Where the reflector is: ADDRESS, ADDRESS:PORT, [ADDRESS]:PORT or a name
    #[arg(long, value_name = "ADDRESS", value_parser = target, env = "DATAPLANE_PROBE_TARGET")]
    target: SocketAddr,
    /// Have the reflector call this address of this machine, with ADDRESS:0 at a port that the system chooses: packets,
    /// stream and connections come from it then, as they must where a NAT is in between
    #[arg(long, value_name = "ADDRESS:PORT")]
    called_at: Option<SocketAddr>,
    /// Packets a second, each direction, up to 10000
    #[arg(long, default_value_t = 1000, value_name = "HZ")]
    rate: u32,
    /// UDP payload of each packet
    #[arg(long, default_value_t = 128, value_name = "BYTES")]
    packet_bytes: usize,
    /// How long to measure (500ms, 60s, 5m) [default: until Ctrl-C]
    #[arg(long, value_parser = duration)]
    duration: Option<Duration>,
    /// How long to try to reach the reflector
    #[arg(long, default_value = "5s", value_parser = duration, value_name = "DURATION")]
    reach: Duration,
    /// How long to wait at the end for packets on their way; what comes later counts as lost
    #[arg(long, default_value = "2s", value_parser = duration, value_name = "DURATION")]
    drain: Duration,
    /// How long to ask for the reflector's account at the end
    #[arg(long, default_value = "15s", value_parser = duration, value_name = "DURATION")]
    account_timeout: Duration,
    /// Time between two records of the long TCP stream
    #[arg(long, default_value = "10ms", value_parser = duration, value_name = "DURATION")]
    stream_every: Duration,
    /// Leave out the long TCP stream
    #[arg(long)]
    no_stream: bool,
    /// Time between two new TCP connections
    #[arg(long, default_value = "50ms", value_parser = duration, value_name = "DURATION")]
    connect_every: Duration,
    /// A new connection that is not answered this long after it was due has failed
    #[arg(long, default_value = "1s", value_parser = duration, value_name = "DURATION")]
    connect_timeout: Duration,
    /// Leave out the new TCP connections
    #[arg(long)]
    no_connections: bool,
    /// Keep to ordinary scheduling; otherwise real-time priority is used where permitted
    #[arg(long)]
    no_realtime: bool,
    #[command(flatten)]
    pub(crate) output: Output,
    #[command(flatten)]
    limits: Limits,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Output")]
pub(crate) struct Output {
    /// Write the report as JSON; "-" writes it to standard output, in place of the table
    #[arg(long, value_name = "FILE")]
    pub(crate) json: Option<PathBuf>,
    /// Write the distributions as an HdrHistogram log (V2)
    #[arg(long, value_name = "FILE")]
    pub(crate) histogram: Option<PathBuf>,
    /// Write every event as a line of JSON
    #[arg(long, value_name = "FILE")]
    events: Option<PathBuf>,
    /// Write when every packet was sent and when each copy of it arrived, as CSV; of a run longer than 65536 packets the
    /// newest
    #[arg(long, value_name = "FILE")]
    pub(crate) packets: Option<PathBuf>,
    /// No progress
    #[arg(long, short)]
    pub(crate) quiet: bool,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Thresholds (exit 1 when exceeded; each direction on its own)")]
struct Limits {
    /// Packets lost
    #[arg(long, value_name = "N")]
    max_lost: Option<u64>,
    /// The longest run of consecutive losses
    #[arg(long, value_name = "MS")]
    max_loss_ms: Option<f64>,
    /// Duplicates
    #[arg(long, value_name = "N")]
    max_duplicated: Option<u64>,
    /// Packets reordered
    #[arg(long, value_name = "N")]
    max_reordered: Option<u64>,
    /// The longest gap between arrivals, less one period
    #[arg(long, value_name = "MS")]
    max_gap_ms: Option<f64>,
    /// The longest stall of the stream
    #[arg(long, value_name = "MS")]
    max_stall_ms: Option<f64>,
    /// Segments of the stream retransmitted
    #[arg(long, value_name = "N")]
    max_retransmits: Option<u64>,
    /// The stream must survive
    #[arg(long)]
    fail_on_broken_stream: bool,
    /// Every new connection must succeed
    #[arg(long)]
    fail_on_new_connection_failure: bool,
    /// The run must be valid: senders on time, no packet dropped at the probe's own sockets
    #[arg(long)]
    fail_on_invalid: bool,
    /// The run is not valid if the client sent a packet later than this
    #[arg(long, value_name = "MS", default_value_t = 10)]
    max_late_ms: u64,
    /// The run is not valid if the reflector sent a packet later than this, by its own clock
    #[arg(long, value_name = "MS", default_value_t = 50)]
    max_late_reflector_ms: u64,
}

#[derive(Debug, Args)]
pub(crate) struct WatchArguments {
    /// Interface to watch
    #[arg(long, value_name = "NAME")]
    pub(crate) interface: String,
    /// Only frames from this source address [default: from any]
    #[arg(long)]
    pub(crate) mac: Option<Mac>,
    /// Only UDP and TCP to this port, every packet of it
    #[arg(long, conflicts_with = "mac")]
    pub(crate) port: Option<u16>,
    /// Print lines of JSON
    #[arg(long)]
    pub(crate) json: bool,
    /// Print every frame
    #[arg(long)]
    pub(crate) all: bool,
    /// End after the first frame that comes in (on a machine's tap: that the machine sent)
    #[arg(long)]
    pub(crate) until_first: bool,
    /// End after this long; with --until-first, exit with 1 if nothing came
    #[arg(long, value_parser = duration, value_name = "DURATION")]
    pub(crate) timeout: Option<Duration>,
}

impl RunArguments {
    pub(crate) fn config(&self) -> io::Result<Config> {
        let called_at = self.called_at.map(Callee::bind).transpose()?;
        Ok(Config {
            called_at: called_at.map(Arc::new),
            rate_hz: self.rate,
            packet_bytes: self.packet_bytes,
            duration: self.duration,
            reach: self.reach,
            drain: self.drain,
            account_timeout: self.account_timeout,
            stream_every: (!self.no_stream).then_some(self.stream_every),
            connect_every: (!self.no_connections).then_some(self.connect_every),
            connect_timeout: self.connect_timeout,
            max_late: Duration::from_millis(self.limits.max_late_ms),
            max_late_reflector: Duration::from_millis(self.limits.max_late_reflector_ms),
            realtime: !self.no_realtime,
            events: self.output.events.clone(),
            log: self.output.packets.is_some(),
            ..Config::new(self.target)
        })
    }

    pub(crate) fn thresholds(&self) -> Thresholds {
        let limits = &self.limits;
        Thresholds {
            max_lost: limits.max_lost,
            max_loss_ms: limits.max_loss_ms,
            max_duplicated: limits.max_duplicated,
            max_reordered: limits.max_reordered,
            max_gap_ms: limits.max_gap_ms,
            max_stall_ms: limits.max_stall_ms,
            max_retransmits: limits.max_retransmits,
            stream_must_survive: limits.fail_on_broken_stream,
            connections_must_succeed: limits.fail_on_new_connection_failure,
            must_be_valid: limits.fail_on_invalid,
        }
    }
}

/// Numbers are tried first: a static binary in a bare root has no resolver to ask.
fn target(text: &str) -> Result<SocketAddr, String> {
    if let Ok(address) = text.parse() {
        return Ok(address);
    }
    if let Ok(address) = text.parse::<IpAddr>() {
        return Ok((address, PORT).into());
    }
    let resolved = if text.contains(':') && !text.contains('%') {
        text.to_socket_addrs()
    } else {
        (text, PORT).to_socket_addrs()
    };
    let mut addresses = resolved.map_err(|error| {
        format!("neither an address (10.0.0.1, 10.0.0.1:7000, [fd00::1]:7000) nor a name that resolves: {error}")
    })?;
    addresses
        .next()
        .ok_or_else(|| "the name has no address".to_owned())
}

fn duration(text: &str) -> Result<Duration, String> {
    let digits = text.len()
        - text
            .trim_start_matches(|letter: char| letter.is_ascii_digit() || letter == '.')
            .len();
    let (number, unit) = text.split_at(digits);
    let unit = match unit {
        "us" => 0.000_001,
        "ms" => 0.001,
        "s" | "" => 1.0,
        "m" => 60.0,
        "h" => 3600.0,
        other => return Err(format!("{other:?} is no unit: us, ms, s, m or h")),
    };
    let number: f64 = number
        .parse()
        .map_err(|_| "a number with a unit is needed, as in 500ms, 60s or 5m".to_owned())?;
    Duration::try_from_secs_f64(number * unit).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn targets() {
        assert_eq!(
            target("10.0.0.1"),
            Ok("10.0.0.1:7000".parse().expect("valid"))
        );
        assert_eq!(
            target("10.0.0.1:9"),
            Ok("10.0.0.1:9".parse().expect("valid"))
        );
        assert_eq!(
            target("fd00::1"),
            Ok("[fd00::1]:7000".parse().expect("valid"))
        );
        assert_eq!(
            target("[fd00::1]:9"),
            Ok("[fd00::1]:9".parse().expect("valid"))
        );
        assert!(target("10.0.0.1:port").is_err());
    }

    #[test]
    fn durations() {
        assert_eq!(duration("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!(duration("1.5s"), Ok(Duration::from_millis(1500)));
        assert_eq!(duration("2m"), Ok(Duration::from_mins(2)));
        assert_eq!(duration("7"), Ok(Duration::from_secs(7)));
        for wrong in ["", "ms", "5 s", "-1s", "1e99h", "5x"] {
            assert!(duration(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn every_threshold_reaches_the_check() {
        let line = "dataplane-probe run --target 10.0.0.1 --max-lost 1 --max-loss-ms 2 --max-duplicated 3 \
            --max-reordered 4 --max-gap-ms 5 --max-stall-ms 6 --max-retransmits 7 --fail-on-broken-stream \
            --fail-on-new-connection-failure --fail-on-invalid";
        let arguments = Arguments::parse_from(line.split_whitespace());
        let Command::Run(run) = arguments.command else {
            panic!("run was asked for")
        };
        let expected = Thresholds {
            max_lost: Some(1),
            max_loss_ms: Some(2.0),
            max_duplicated: Some(3),
            max_reordered: Some(4),
            max_gap_ms: Some(5.0),
            max_stall_ms: Some(6.0),
            max_retransmits: Some(7),
            stream_must_survive: true,
            connections_must_succeed: true,
            must_be_valid: true,
        };
        assert_eq!(run.thresholds(), expected);
    }
}
