//! What is counted.

use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use node_hooks_api::agent::outcome;
use node_hooks_api::agent::signal::{Kind, Source};
use prometheus_client::encoding::{EncodeLabelSet, text};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::{Registry, Unit};

use crate::core::{Again, Counted, Forged};

/// The agent's metrics.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    signals: Family<SignalLabels, Counter>,
    forgeries: Family<ReasonLabel, Counter>,
    commands: Family<CommandLabels, Counter>,
    reopenings: Family<ReasonLabel, Counter>,
    expired: Counter,
    armed: Gauge,
    open_written: Histogram,
    open_processed: Histogram,
    open_after_pause: Histogram,
    connected: Gauge,
    streams: Counter,
    answer_time: Histogram,
    dropped: Counter,
    gate: Family<ResultLabel, Counter>,
    not_done: Family<WhatLabel, Counter>,
    hypervisors: Gauge,
    monitors: Gauge,
    connections: Counter,
    malformed: Counter,
    disbelieved: Counter,
    missed: Counter,
    ovs_synced: Gauge,
    switch_warm: Gauge,
}

/// What came of a question of virt-handler's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GateResult {
    /// The controller let the migration go.
    Go,
    /// It let it go although the network was not ready.
    GoUnprepared,
    /// It refused it.
    Fail,
    /// It did not answer, and the migration went.
    TimeoutIgnored,
    /// It did not answer, and the migration was refused.
    TimeoutFailed,
    /// virt-handler waited no more.
    Cancelled,
    /// What virt-handler sent could not be read.
    Malformed,
}

/// What is read off when the metrics are asked for.
#[derive(Clone, Copy, Debug, Default)]
pub struct Reading {
    /// Handovers that are armed.
    pub armed: usize,
    /// Hypervisors that are listened to.
    pub hypervisors: u64,
    /// Libvirt daemons that pass on the events of QEMU's monitors.
    pub monitors: u64,
    /// Connections to hypervisors, in all.
    pub connections: u64,
    /// What hypervisors said that could not be read, in all.
    pub malformed: u64,
    /// Events of another guest than their hypervisor's, in all.
    pub disbelieved: u64,
    /// Announcements of guests that were left out, in all.
    pub missed: u64,
    /// Open vSwitch's database is followed.
    pub ovs_synced: bool,
    /// There is a connection to the switch.
    pub switch_warm: bool,
    /// Messages to the controller that were dropped, in all.
    pub dropped: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct SignalLabels {
    kind: &'static str,
    source: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ReasonLabel {
    reason: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct CommandLabels {
    command: &'static str,
    result: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ResultLabel {
    result: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct WhatLabel {
    what: &'static str,
}

impl GateResult {
    const ALL: [Self; 7] = [
        Self::Go,
        Self::GoUnprepared,
        Self::Fail,
        Self::TimeoutIgnored,
        Self::TimeoutFailed,
        Self::Cancelled,
        Self::Malformed,
    ];

    fn name(self) -> &'static str {
        match self {
            Self::Go => "go",
            Self::GoUnprepared => "go_unprepared",
            Self::Fail => "fail",
            Self::TimeoutIgnored => "timeout_ignored",
            Self::TimeoutFailed => "timeout_failed",
            Self::Cancelled => "cancelled",
            Self::Malformed => "malformed",
        }
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

impl Metrics {
    /// Everything at zero.
    pub fn new() -> Self {
        // From 16 µs to half a second.
        let fast = || Histogram::new(exponential_buckets(0.000_016, 2.0, 16));
        let metrics = Self {
            registry: Registry::with_prefix("segue_agent"),
            signals: Family::default(),
            forgeries: Family::default(),
            commands: Family::default(),
            reopenings: Family::default(),
            expired: Counter::default(),
            armed: Gauge::default(),
            open_written: fast(),
            open_processed: fast(),
            open_after_pause: fast(),
            connected: Gauge::default(),
            streams: Counter::default(),
            answer_time: fast(),
            dropped: Counter::default(),
            gate: Family::default(),
            not_done: Family::default(),
            hypervisors: Gauge::default(),
            monitors: Gauge::default(),
            connections: Counter::default(),
            malformed: Counter::default(),
            disbelieved: Counter::default(),
            missed: Counter::default(),
            ovs_synced: Gauge::default(),
            switch_warm: Gauge::default(),
        };
        // A rate over a counter that appears with its first event misses that event.
        for forged in Forged::ALL {
            let reason = forged.name();
            drop(metrics.forgeries.get_or_create(&ReasonLabel { reason }));
        }
        for again in Again::ALL {
            let reason = again.name();
            drop(metrics.reopenings.get_or_create(&ReasonLabel { reason }));
        }
        for result in GateResult::ALL {
            let result = result.name();
            drop(metrics.gate.get_or_create(&ResultLabel { result }));
        }
        metrics.with_handovers().with_node().with_link()
    }

    fn with_handovers(mut self) -> Self {
        let registry = &mut self.registry;
        registry.register(
            "signals",
            "What was observed of VMs that are armed, by what it says and who says it",
            self.signals.clone(),
        );
        registry.register(
            "forgeries",
            "Announcements of guests that opened nothing: there was nothing to open for them",
            self.forgeries.clone(),
        );
        registry.register(
            "commands",
            "Commands of the controller by what came of them; STALE is a guard at work, not a fault",
            self.commands.clone(),
        );
        registry.register(
            "reopenings",
            "Openings without a command, of ports that OVN blocked: undone: an earlier opening was; guest_runs: their guest runs here",
            self.reopenings.clone(),
        );
        registry.register(
            "expired",
            "Handovers observed no more because no controller spoke of them for 15 minutes",
            self.expired.clone(),
        );
        registry.register("armed", "Handovers that are armed", self.armed.clone());
        registry.register_with_unit(
            "open_written",
            "From the command to open until what opens the ports was written into the switch's socket",
            Unit::Seconds,
            self.open_written.clone(),
        );
        registry.register_with_unit(
            "open_processed",
            "From the command to open until the switch had processed it",
            Unit::Seconds,
            self.open_processed.clone(),
        );
        registry.register_with_unit(
            "open_after_pause",
            "From the pause, on the source's clock, until what opens the ports was written, on this node's",
            Unit::Seconds,
            self.open_after_pause.clone(),
        );
        self
    }

    fn with_node(mut self) -> Self {
        let registry = &mut self.registry;
        registry.register(
            "not_done",
            "What could not be done on this node",
            self.not_done.clone(),
        );
        registry.register(
            "hypervisors",
            "Hypervisors that are listened to",
            self.hypervisors.clone(),
        );
        registry.register(
            "libvirt_monitors",
            "Libvirt daemons that pass on what QEMU's monitors tell",
            self.monitors.clone(),
        );
        registry.register(
            "hypervisor_connections",
            "Connections made to hypervisors; a launcher's daemon takes one or two",
            self.connections.clone(),
        );
        registry.register(
            "hypervisor_lines_malformed",
            "What hypervisors said that was no event as it should be",
            self.malformed.clone(),
        );
        registry.register(
            "hypervisor_events_disbelieved",
            "Events of another guest than the one that their hypervisor named first",
            self.disbelieved.clone(),
        );
        registry.register(
            "announcements_missed",
            "Announcements of guests that came too fast, or found no room, and were left out",
            self.missed.clone(),
        );
        registry.register(
            "ovs_synced",
            "1 while Open vSwitch's database is followed",
            self.ovs_synced.clone(),
        );
        registry.register(
            "switch_connected",
            "1 while there is an OpenFlow connection to the bridge; wanted while a target is armed",
            self.switch_warm.clone(),
        );
        self
    }

    fn with_link(mut self) -> Self {
        let registry = &mut self.registry;
        registry.register(
            "controller_connected",
            "1 while there is a stream to the controller that leads",
            self.connected.clone(),
        );
        registry.register(
            "controller_streams",
            "Streams made to a controller; all but the first are reconnections",
            self.streams.clone(),
        );
        registry.register_with_unit(
            "controller_answer",
            "How long the controller took to answer a heartbeat",
            Unit::Seconds,
            self.answer_time.clone(),
        );
        registry.register(
            "messages_dropped",
            "Messages to the controller that were dropped because it took none",
            self.dropped.clone(),
        );
        registry.register(
            "gate_answers",
            "Questions of virt-handler whether a migration may begin, by what came of them",
            self.gate.clone(),
        );
        registry.register(
            "build",
            "The version that runs",
            Info::new([("version", env!("CARGO_PKG_VERSION"))]),
        );
        self
    }

    /// The state machine wants this counted.
    pub fn count(&self, counted: Counted) {
        match counted {
            Counted::Signal(kind, source) => {
                let labels = SignalLabels {
                    kind: kind_name(kind),
                    source: source_name(source),
                };
                self.signals.get_or_create(&labels).inc();
            }
            Counted::Forgery(forged) => {
                let reason = forged.name();
                self.forgeries.get_or_create(&ReasonLabel { reason }).inc();
            }
            Counted::Command(command, result) => {
                let result = result_name(result);
                let labels = CommandLabels { command, result };
                self.commands.get_or_create(&labels).inc();
            }
            Counted::Reopened(again) => {
                let reason = again.name();
                self.reopenings.get_or_create(&ReasonLabel { reason }).inc();
            }
            Counted::Expired => {
                self.expired.inc();
            }
        }
    }

    /// A port was opened.
    pub fn opened(&self, written: Duration, after_pause: Option<Duration>) {
        self.open_written.observe(written.as_secs_f64());
        if let Some(after) = after_pause {
            self.open_after_pause.observe(after.as_secs_f64());
        }
    }

    /// The switch had processed what opens a port.
    pub fn processed(&self, after: Duration) {
        self.open_processed.observe(after.as_secs_f64());
    }

    /// Something could not be done; what, in a word.
    pub fn not_done(&self, what: &'static str) {
        self.not_done.get_or_create(&WhatLabel { what }).inc();
    }

    /// There is a stream to the controller.
    pub fn connected(&self) {
        self.connected.set(1);
        self.streams.inc();
    }

    /// There is none any more.
    pub fn disconnected(&self) {
        self.connected.set(0);
    }

    /// The controller answered a heartbeat.
    pub fn answered(&self, after: Duration) {
        self.answer_time.observe(after.as_secs_f64());
    }

    /// A question of virt-handler's has come to its end.
    pub fn gate(&self, result: GateResult) {
        let result = result.name();
        self.gate.get_or_create(&ResultLabel { result }).inc();
    }

    /// The exposition, in the OpenMetrics text format.
    ///
    /// # Errors
    /// The encoder's, which happens to none of these metrics.
    pub fn expose(&self, reading: &Reading) -> Result<String, std::fmt::Error> {
        let gauge = |count| i64::try_from(count).unwrap_or(i64::MAX);
        self.armed
            .set(gauge(u64::try_from(reading.armed).unwrap_or(u64::MAX)));
        self.hypervisors.set(gauge(reading.hypervisors));
        self.monitors.set(gauge(reading.monitors));
        self.ovs_synced.set(i64::from(reading.ovs_synced));
        self.switch_warm.set(i64::from(reading.switch_warm));
        for (counter, total) in [
            (&self.dropped, reading.dropped),
            (&self.connections, reading.connections),
            (&self.malformed, reading.malformed),
            (&self.disbelieved, reading.disbelieved),
            (&self.missed, reading.missed),
        ] {
            // Several may ask at once, and one's reading be older than what another has set.
            counter.inner().fetch_max(total, Relaxed);
        }
        let mut text = String::new();
        text::encode(&mut text, &self.registry)?;
        Ok(text)
    }
}

fn kind_name(kind: Kind) -> &'static str {
    match kind {
        Kind::Unspecified => "none",
        Kind::Paused => "paused",
        Kind::Resumed => "resumed",
        Kind::Left => "left",
        Kind::LastFrame => "last_frame",
        Kind::FirstFrame => "first_frame",
    }
}

fn source_name(source: Source) -> &'static str {
    match source {
        Source::Unspecified => "none",
        Source::Libvirt => "libvirt",
        Source::Qmp => "qmp",
        Source::Rarp => "rarp",
        Source::Garp => "garp",
        Source::NeighbourAdvertisement => "neighbour_advertisement",
        Source::Frame => "frame",
    }
}

fn result_name(result: outcome::Result) -> &'static str {
    match result {
        outcome::Result::Unspecified => "none",
        outcome::Result::Done => "done",
        outcome::Result::Stale => "stale",
        outcome::Result::Unknown => "unknown",
        outcome::Result::Failed => "failed",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_is_counted_in_its_place() {
        let metrics = Metrics::new();
        metrics.count(Counted::Signal(Kind::Paused, Source::Libvirt));
        metrics.count(Counted::Forgery(Forged::OnSource));
        metrics.count(Counted::Command("open", outcome::Result::Stale));
        metrics.count(Counted::Reopened(Again::Undone));
        metrics.opened(Duration::from_micros(100), None);
        metrics.opened(Duration::from_micros(100), Some(Duration::from_millis(1)));
        metrics.connected();
        metrics.connected();
        metrics.disconnected();
        metrics.gate(GateResult::Go);
        let reading = |dropped| Reading {
            armed: 2,
            ovs_synced: true,
            dropped,
            connections: 7,
            malformed: 8,
            disbelieved: 9,
            missed: 10,
            ..Reading::default()
        };
        assert!(metrics.expose(&reading(3)).is_ok());
        let text = metrics.expose(&reading(5)).unwrap();
        // A scrape that was overtaken by another takes nothing back.
        assert_eq!(metrics.expose(&reading(4)).unwrap(), text);
        for line in [
            "segue_agent_signals_total{kind=\"paused\",source=\"libvirt\"} 1",
            "segue_agent_forgeries_total{reason=\"on_source\"} 1",
            "segue_agent_forgeries_total{reason=\"nothing_moves\"} 0",
            "segue_agent_commands_total{command=\"open\",result=\"stale\"} 1",
            "segue_agent_reopenings_total{reason=\"undone\"} 1",
            "segue_agent_reopenings_total{reason=\"guest_runs\"} 0",
            "segue_agent_open_written_seconds_count 2",
            "segue_agent_open_after_pause_seconds_count 1",
            "segue_agent_controller_connected 0",
            "segue_agent_controller_streams_total 2",
            "segue_agent_gate_answers_total{result=\"go\"} 1",
            "segue_agent_gate_answers_total{result=\"cancelled\"} 0",
            "segue_agent_armed 2",
            "segue_agent_ovs_synced 1",
            "segue_agent_messages_dropped_total 5",
            "segue_agent_hypervisor_connections_total 7",
            "segue_agent_hypervisor_lines_malformed_total 8",
            "segue_agent_hypervisor_events_disbelieved_total 9",
            "segue_agent_announcements_missed_total 10",
        ] {
            assert!(text.lines().any(|found| found == line), "{line}\n{text}");
        }
        assert!(text.ends_with("# EOF\n"));
    }
}
