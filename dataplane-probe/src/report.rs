//! The report of a run: the JSON that the program writes and others read.
//!
//! `schema` is [`SCHEMA`]; within it fields are only ever added, so a reader should ignore those it does not know.
//! Times of day are `CLOCK_REALTIME` nanoseconds since the epoch, on the client. They are above 2^53: read them with a
//! parser that keeps 64-bit integers.

use std::fmt;
use std::net::{IpAddr, SocketAddr};

use serde::{Deserialize, Serialize};

/// The name and version of the format.
pub const SCHEMA: &str = "dataplane-probe.report/v1";

/// What one run measured.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// [`SCHEMA`].
    pub schema: String,
    /// The version of the program that measured.
    pub version: String,
    /// The reflector, as it was named on the command line.
    pub target: SocketAddr,
    /// The address family.
    pub family: Family,
    /// The session, in hexadecimal, as the reflector logs it.
    pub session: String,
    /// Packets a second in each direction.
    pub rate_hz: u32,
    /// UDP payload of each packet.
    pub packet_bytes: usize,
    /// When the first packet was meant to be sent.
    pub started_ns: u64,
    /// When the last packet had been sent, one period later.
    pub ended_ns: u64,
    /// Whether the figures are what they seem. See [`Report::reasons`].
    pub valid: bool,
    /// Why not, each in a sentence; empty when valid.
    pub reasons: Vec<String>,
    /// What the client sent and the reflector received.
    pub to_vm: Direction,
    /// What the reflector sent and the client received.
    pub from_vm: Direction,
    /// From the intended sending of a packet to the first that came back after its arrival; without the time spent
    /// waiting for that one to be due.
    pub round_trip: Option<Latency>,
    /// The long stream; none when it was switched off.
    pub tcp: Option<Tcp>,
    /// The new connections; none when they were switched off.
    pub new_connections: Option<NewConnections>,
    /// Packets that came to the client's socket and belong to no session of its own: old or stray ones.
    pub foreign: u64,
    /// Where the reflector called: the addresses that it was heard from, in the order they appeared. Behind a NAT they
    /// are the NAT's.
    #[serde(default)]
    pub callers: Vec<Caller>,
}

/// An address that the reflector called from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Caller {
    /// The address.
    pub address: IpAddr,
    /// The first time of day at which it was heard from.
    pub first_ns: u64,
    /// The last.
    pub last_ns: u64,
    /// Packets from there, duplicates included.
    pub packets: u64,
    /// Connections from there that were answered, the stream included.
    pub connections: u64,
}

/// Address family of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Family {
    /// IPv4.
    Ipv4,
    /// IPv6.
    Ipv6,
}

/// What happened to the packets of one direction.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Direction {
    /// Time between two packets.
    pub period_us: u64,
    /// Packets sent, as the sender counted.
    pub sent: u64,
    /// Different packets received by the end of the drain.
    pub received: u64,
    /// Packets sent and never received.
    pub lost: u64,
    /// The longest run of consecutive losses, as time: packets times period.
    pub longest_loss_ms: f64,
    /// Copies beyond the first.
    pub duplicated: u64,
    /// Packets whose first copy came after a newer packet (RFC 4737).
    pub reordered: u64,
    /// Arrivals so late that it cannot be told whether they are duplicates; see [`crate::ledger`].
    pub stale: u64,
    /// The longest time between two arrivals, less one period. Null if nothing arrived.
    pub service_gap_ms: Option<f64>,
    /// The last arrival before that gap.
    pub service_gap_start_ns: Option<u64>,
    /// The arrival that ended it; the end of the run if it is [open](Gap::open).
    pub service_gap_end_ns: Option<u64>,
    /// By how much the gap may really have been shorter, beyond the method's resolution (one period and jitter).
    pub service_gap_error_ms: f64,
    /// How late the packet that ended the gap was sent: this much of the gap is the sender's, not the network's.
    pub service_gap_sender_late_ms: f64,
    /// The gap lasted to the end of the run.
    pub service_gap_open: bool,
    /// How many separate runs of losses there were.
    pub loss_run_count: u64,
    /// The longest of them, in order of time.
    pub loss_runs: Vec<LossRun>,
    /// The longest gaps of more than two periods, in order of time.
    pub gaps: Vec<Gap>,
    /// How late the sender was.
    pub sender: Lateness,
    /// Packets that the receiver's own socket dropped because it was not read in time. They count as lost too, but
    /// the network did not lose them.
    pub receiver_overflow: u64,
    /// Packets that the sender's kernel refused: no route, link down, a local firewall. They count as sent and lost.
    pub send_errors: u64,
}

/// Consecutive packets that were lost.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct LossRun {
    /// The first sequence number.
    pub first: u64,
    /// How many.
    pub count: u64,
    /// Packets times period.
    pub ms: f64,
    /// `to_vm`: when the first was meant to be sent. `from_vm`: the last arrival before them. Null if unknown.
    pub start_ns: Option<u64>,
    /// `to_vm`: one period after the last was meant to be sent. `from_vm`: the first arrival after them. Null if
    /// unknown.
    pub end_ns: Option<u64>,
}

/// A time without arrivals.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Gap {
    /// The arrival before it.
    pub start_ns: u64,
    /// The arrival after it, or the end of the run.
    pub end_ns: u64,
    /// Its length less one period.
    pub ms: f64,
    /// By how much it may really have been shorter.
    pub error_ms: f64,
    /// How late the packet that ended it was sent.
    pub sender_late_ms: f64,
    /// It lasted to the end of the run.
    pub open: bool,
}

/// How late a sender was: from the intended time to handing the packet to its kernel.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Lateness {
    /// Median.
    pub p50_us: u64,
    /// 99th percentile.
    pub p99_us: u64,
    /// 99.9th percentile.
    pub p999_us: u64,
    /// Maximum.
    pub max_us: u64,
    /// What was allowed.
    pub bound_us: u64,
    /// Packets later than that.
    pub over_bound: u64,
    /// The reflector only: how often its clock jumped or it did not run for longer than it makes up for.
    pub rescheduled: u64,
    /// The longest of those.
    pub longest_reschedule_ms: f64,
    /// The sending thread had real-time priority.
    pub realtime: bool,
}

/// A distribution, briefly.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Latency {
    /// Median.
    pub p50_ms: f64,
    /// 99th percentile.
    pub p99_ms: f64,
    /// Maximum.
    pub max_ms: f64,
}

/// The long TCP stream: records sent at a fixed rate, echoed by the reflector.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Tcp {
    /// The connection was never broken and everything sent came back by the end of the drain.
    pub survived: bool,
    /// Why not.
    pub error: Option<String>,
    /// The longest time between two arrivals of echo, less one period. Either direction may have caused it.
    pub longest_stall_ms: f64,
    /// The last echo before that stall.
    pub stall_start_ns: Option<u64>,
    /// The echo that ended it.
    pub stall_end_ns: Option<u64>,
    /// The longest times of more than a period between two arrivals of echo, in order of time.
    #[serde(default)]
    pub gaps: Vec<Gap>,
    /// The last echo of all.
    #[serde(default)]
    pub last_echo_ns: Option<u64>,
    /// Segments retransmitted, both directions (`tcpi_total_retrans`).
    pub retransmits: u64,
    /// Those of the client.
    pub retransmits_to_vm: u64,
    /// Those of the reflector; null if it could not be asked.
    pub retransmits_from_vm: Option<u64>,
    /// Time between two records.
    pub period_us: u64,
    /// Bytes written.
    pub bytes_sent: u64,
    /// Bytes that came back.
    pub bytes_echoed: u64,
    /// From the intended sending of a record to its echo.
    pub round_trip: Option<Latency>,
}

/// Connections opened at a fixed rate, each greeting the reflector and waiting for its answer.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct NewConnections {
    /// Connections attempted.
    pub attempted: u64,
    /// Those not answered within the timeout, or broken.
    pub failed: u64,
    /// Time between two attempts.
    pub interval_ms: f64,
    /// From the time an attempt was due.
    pub timeout_ms: f64,
    /// Of the failed: not answered in time.
    pub timed_out: u64,
    /// Of the failed: refused.
    pub refused: u64,
    /// Of the failed: connected, then broken.
    pub reset: u64,
    /// Of the failed: anything else (no route, no local port …).
    pub other: u64,
    /// When the first failed attempt was due.
    pub first_failure_ns: Option<u64>,
    /// When the last failed attempt was due.
    pub last_failure_ns: Option<u64>,
    /// An example of a failure.
    pub error: Option<String>,
    /// From the time an attempt was due to its answer, of those that were answered.
    pub latency: Option<Latency>,
}

/// What a run is held to. Everything that is `None` or `false` is not checked.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Thresholds {
    /// Most packets lost, in each direction.
    pub max_lost: Option<u64>,
    /// Longest run of losses in ms, in each direction.
    pub max_loss_ms: Option<f64>,
    /// Most duplicates, in each direction.
    pub max_duplicated: Option<u64>,
    /// Most packets reordered, in each direction.
    pub max_reordered: Option<u64>,
    /// Longest service gap in ms, in each direction.
    pub max_gap_ms: Option<f64>,
    /// Longest stall of the stream in ms.
    pub max_stall_ms: Option<f64>,
    /// Most segments retransmitted.
    pub max_retransmits: Option<u64>,
    /// The stream must survive.
    pub stream_must_survive: bool,
    /// Every new connection must succeed.
    pub connections_must_succeed: bool,
    /// The report must be valid.
    pub must_be_valid: bool,
}

/// One threshold that a report exceeds.
#[derive(Debug, Clone, PartialEq)]
pub struct Exceeded {
    /// What was measured, as the JSON names it.
    pub what: String,
    /// The figure, or what happened.
    pub measured: String,
    /// What was allowed.
    pub allowed: String,
}

impl fmt::Display for Exceeded {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            out,
            "{} is {}, allowed: {}",
            self.what, self.measured, self.allowed
        )
    }
}

impl Thresholds {
    /// What of them `report` exceeds.
    pub fn exceeded_by(&self, report: &Report) -> Vec<Exceeded> {
        let mut found = Vec::new();
        for (name, direction) in [("to_vm", &report.to_vm), ("from_vm", &report.from_vm)] {
            self.check_direction(name, direction, &mut found);
        }
        if let Some(tcp) = &report.tcp {
            over(
                "tcp.longest_stall_ms",
                tcp.longest_stall_ms,
                self.max_stall_ms,
                &mut found,
            );
            over(
                "tcp.retransmits",
                tcp.retransmits,
                self.max_retransmits,
                &mut found,
            );
            if self.stream_must_survive && !tcp.survived {
                let why = tcp.error.as_deref().unwrap_or("it broke");
                found.push(exceeded("tcp.survived", format!("false ({why})"), "true"));
            }
        }
        if let Some(connections) = &report.new_connections
            && self.connections_must_succeed
        {
            over(
                "new_connections.failed",
                connections.failed,
                Some(0),
                &mut found,
            );
        }
        if self.must_be_valid && !report.valid {
            found.push(exceeded(
                "valid",
                format!("false ({})", report.reasons.join("; ")),
                "true",
            ));
        }
        found
    }

    fn check_direction(&self, name: &str, direction: &Direction, found: &mut Vec<Exceeded>) {
        over(
            &format!("{name}.lost"),
            direction.lost,
            self.max_lost,
            found,
        );
        over(
            &format!("{name}.longest_loss_ms"),
            direction.longest_loss_ms,
            self.max_loss_ms,
            found,
        );
        over(
            &format!("{name}.duplicated"),
            direction.duplicated,
            self.max_duplicated,
            found,
        );
        over(
            &format!("{name}.reordered"),
            direction.reordered,
            self.max_reordered,
            found,
        );
        match (direction.service_gap_ms, self.max_gap_ms) {
            (None, Some(allowed)) => {
                found.push(exceeded(
                    &format!("{name}.service_gap_ms"),
                    "unknown: nothing arrived",
                    allowed,
                ));
            }
            (Some(gap), allowed) => over(&format!("{name}.service_gap_ms"), gap, allowed, found),
            (None, None) => {}
        }
    }
}

fn over<T: PartialOrd + fmt::Display>(
    what: &str,
    measured: T,
    allowed: Option<T>,
    found: &mut Vec<Exceeded>,
) {
    if let Some(allowed) = allowed
        && measured > allowed
    {
        found.push(exceeded(what, measured, allowed));
    }
}

fn exceeded(what: &str, measured: impl fmt::Display, allowed: impl fmt::Display) -> Exceeded {
    Exceeded {
        what: what.to_owned(),
        measured: measured.to_string(),
        allowed: allowed.to_string(),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A report of a run in which nothing went wrong.
    pub(crate) fn quiet() -> Report {
        let direction = Direction {
            period_us: 1000,
            sent: 100,
            received: 100,
            service_gap_ms: Some(0.4),
            service_gap_start_ns: Some(1_700_000_000_000_000_000),
            service_gap_end_ns: Some(1_700_000_000_001_400_000),
            ..Direction::default()
        };
        Report {
            schema: SCHEMA.to_owned(),
            version: "0".to_owned(),
            target: ([192, 0, 2, 1], 7000).into(),
            family: Family::Ipv4,
            session: "00000000000000ff".to_owned(),
            rate_hz: 1000,
            packet_bytes: 128,
            started_ns: 1_700_000_000_000_000_000,
            ended_ns: 1_700_000_000_100_000_000,
            valid: true,
            reasons: Vec::new(),
            to_vm: direction.clone(),
            from_vm: direction,
            round_trip: None,
            tcp: Some(Tcp {
                survived: true,
                ..Tcp::default()
            }),
            new_connections: Some(NewConnections {
                attempted: 2,
                ..NewConnections::default()
            }),
            foreign: 0,
            callers: Vec::new(),
        }
    }

    fn strict() -> Thresholds {
        Thresholds {
            max_lost: Some(0),
            max_loss_ms: Some(0.0),
            max_duplicated: Some(0),
            max_reordered: Some(0),
            max_gap_ms: Some(1.0),
            max_stall_ms: Some(10.0),
            max_retransmits: Some(0),
            stream_must_survive: true,
            connections_must_succeed: true,
            must_be_valid: true,
        }
    }

    #[test]
    fn a_quiet_report_exceeds_nothing_and_survives_json() {
        assert_eq!(strict().exceeded_by(&quiet()), []);
        let json = serde_json::to_string(&quiet()).expect("plain data");
        assert_eq!(
            serde_json::from_str::<Report>(&json).expect("its own output"),
            quiet()
        );
    }

    #[test]
    fn every_threshold_is_named_with_its_direction() {
        let mut report = quiet();
        report.to_vm.lost = 3;
        report.to_vm.longest_loss_ms = 2.0;
        report.from_vm.duplicated = 1;
        report.from_vm.reordered = 1;
        report.from_vm.service_gap_ms = Some(90.5);
        report.to_vm.service_gap_ms = None;
        report.valid = false;
        report.reasons = vec!["the sender was late".to_owned()];
        report.tcp = Some(Tcp {
            error: Some("connection reset".to_owned()),
            longest_stall_ms: 300.0,
            retransmits: 4,
            ..Tcp::default()
        });
        report.new_connections = Some(NewConnections {
            attempted: 2,
            failed: 1,
            ..NewConnections::default()
        });
        let said: Vec<String> = strict()
            .exceeded_by(&report)
            .iter()
            .map(ToString::to_string)
            .collect();
        assert_eq!(
            said,
            [
                "to_vm.lost is 3, allowed: 0",
                "to_vm.longest_loss_ms is 2, allowed: 0",
                "to_vm.service_gap_ms is unknown: nothing arrived, allowed: 1",
                "from_vm.duplicated is 1, allowed: 0",
                "from_vm.reordered is 1, allowed: 0",
                "from_vm.service_gap_ms is 90.5, allowed: 1",
                "tcp.longest_stall_ms is 300, allowed: 10",
                "tcp.retransmits is 4, allowed: 0",
                "tcp.survived is false (connection reset), allowed: true",
                "new_connections.failed is 1, allowed: 0",
                "valid is false (the sender was late), allowed: true",
            ]
        );
        assert_eq!(Thresholds::default().exceeded_by(&report), []);
    }
}
