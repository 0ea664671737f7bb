//! What `/metrics` tells.

use std::time::Duration;

use handover::{Phase, Step};
use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue, text};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::{Registry, Unit};

use crate::agents::AgentMetrics;
use crate::cluster::Kind;
use crate::ovn::Written;

/// The controller's metrics.
pub(crate) struct Metrics {
    registry: Registry,
    handovers: Family<PhaseLabel, Gauge>,
    phase_entries: Family<PhaseLabel, Counter>,
    phase_seconds: Family<PhaseLabel, Histogram>,
    writes: Family<WriteLabels, Counter>,
    write_seconds: Histogram,
    flip_seconds: Histogram,
    gateways: Gauge,
    routed_writes: Family<RoutedLabels, Counter>,
    swept: Counter,
    reconcile_seconds: Histogram,
    leader: Gauge,
    replicas_synced: Family<DatabaseLabel, Gauge>,
    damaged_marks: Gauge,
    malformed_objects: Family<KindLabel, Counter>,
    saves_failed: Counter,
    queue_depth: Gauge,
    /// Of the nodes' agents.
    pub(crate) agents: AgentMetrics,
}

/// What is read off when the metrics are asked for.
pub(crate) struct Reading {
    /// Handovers by phase.
    pub(crate) handovers: Vec<(Phase, i64)>,
    /// Whether each database's replica follows it.
    pub(crate) replicas: Vec<(&'static str, bool)>,
    /// Whether this controller holds the lock.
    pub(crate) leader: bool,
    /// Rows with marks that cannot be read.
    pub(crate) damaged_marks: i64,
    /// VMs that wait for a worker.
    pub(crate) queue_depth: i64,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PhaseLabel {
    phase: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct WriteLabels {
    step: String,
    result: WriteResult,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RoutedLabels {
    what: &'static str,
    result: WriteResult,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
enum WriteResult {
    Committed,
    Refused,
    NotLeader,
    Indeterminate,
    Failed,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct DatabaseLabel {
    database: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct KindLabel {
    kind: String,
}

impl Metrics {
    pub(crate) fn new() -> Self {
        let mut registry = Registry::with_prefix("segue");
        let fast = || Histogram::new(exponential_buckets(0.0005, 2.0, 14));
        let phase_seconds = Family::<PhaseLabel, Histogram>::new_with_constructor(|| {
            Histogram::new(exponential_buckets(0.005, 3.0, 12))
        });
        let metrics = Self {
            handovers: Family::default(),
            phase_entries: Family::default(),
            phase_seconds,
            writes: Family::default(),
            write_seconds: fast(),
            flip_seconds: fast(),
            gateways: Gauge::default(),
            routed_writes: Family::default(),
            swept: Counter::default(),
            reconcile_seconds: fast(),
            leader: Gauge::default(),
            replicas_synced: Family::default(),
            damaged_marks: Gauge::default(),
            malformed_objects: Family::default(),
            saves_failed: Counter::default(),
            queue_depth: Gauge::default(),
            agents: AgentMetrics::registered(&mut registry),
            registry: Registry::default(),
        };
        registry.register(
            "handovers",
            "Handover objects by phase",
            metrics.handovers.clone(),
        );
        registry.register(
            "phase_entries",
            "Times that a handover entered each phase, as this controller recorded it; Succeeded, \
             RolledBack and Failed count outcomes, also of Handovers that are gone",
            metrics.phase_entries.clone(),
        );
        registry.register_with_unit(
            "phase_duration",
            "How long handovers stayed in each phase",
            Unit::Seconds,
            metrics.phase_seconds.clone(),
        );
        registry.register(
            "ovn_writes",
            "Northbound transactions by protocol step and result; Refused is a guard at work, not a fault",
            metrics.writes.clone(),
        );
        registry.register_with_unit(
            "ovn_write_duration",
            "How long Northbound transactions took",
            Unit::Seconds,
            metrics.write_seconds.clone(),
        );
        metrics.register_routed(&mut registry);
        registry.register_with_unit(
            "reconcile_duration",
            "How long one look at a VM took, with what it led to",
            Unit::Seconds,
            metrics.reconcile_seconds.clone(),
        );
        registry.register(
            "build",
            "The version that runs",
            Info::new([("version", env!("CARGO_PKG_VERSION"))]),
        );
        registry.register(
            "leader",
            "1 where this controller holds the Northbound lock segue_writer",
            metrics.leader.clone(),
        );
        registry.register(
            "ovn_replica_synced",
            "1 while the replica of the database follows its server",
            metrics.replicas_synced.clone(),
        );
        registry.register(
            "damaged_marks",
            "Logical switch ports with a mark of segue's that cannot be read",
            metrics.damaged_marks.clone(),
        );
        registry.register(
            "malformed_objects",
            "Kubernetes objects seen that could not be read",
            metrics.malformed_objects.clone(),
        );
        registry.register(
            "handover_saves_failed",
            "Attempts to store a Handover that failed",
            metrics.saves_failed.clone(),
        );
        registry.register(
            "queue_depth",
            "VMs that wait for a worker",
            metrics.queue_depth.clone(),
        );
        Self {
            registry,
            ..metrics
        }
    }

    fn register_routed(&self, registry: &mut Registry) {
        registry.register_with_unit(
            "flip_duration",
            "How long the Northbound took to commit flips",
            Unit::Seconds,
            self.flip_seconds.clone(),
        );
        registry.register(
            "gateways",
            "Chassis with a gateway router on the join switch, as this controller sees them",
            self.gateways.clone(),
        );
        registry.register(
            "routed_writes",
            "Northbound transactions of the routed topology other than flips: rows kept as they \
             should be, guests at rest placed",
            self.routed_writes.clone(),
        );
        registry.register(
            "stray_addresses_removed",
            "Addresses taken out of their place sets because no port had them",
            self.swept.clone(),
        );
    }

    pub(crate) fn phase_entered(&self, phase: Phase) {
        self.phase_entries
            .get_or_create(&PhaseLabel::of(phase))
            .inc();
    }

    pub(crate) fn phase_ended(&self, phase: Phase, seconds: f64) {
        self.phase_seconds
            .get_or_create(&PhaseLabel::of(phase))
            .observe(seconds);
    }

    pub(crate) fn wrote(&self, step: Step, written: &Written, took: Duration) {
        let labels = WriteLabels {
            step: step.to_string(),
            result: WriteResult::of(written),
        };
        self.writes.get_or_create(&labels).inc();
        self.write_seconds.observe(took.as_secs_f64());
        if step == Step::Flip && *written == Written::Committed {
            self.flip_seconds.observe(took.as_secs_f64());
        }
    }

    /// The routed topology's rows were to be made as they should be.
    pub(crate) fn kept_rows(&self, written: &Written, took: Duration) {
        self.routed("rows", written, took);
    }

    /// A guest at rest was to be given its place.
    pub(crate) fn placed(&self, written: &Written, took: Duration) {
        self.routed("place", written, took);
    }

    fn routed(&self, what: &'static str, written: &Written, took: Duration) {
        let result = WriteResult::of(written);
        self.routed_writes
            .get_or_create(&RoutedLabels { what, result })
            .inc();
        self.write_seconds.observe(took.as_secs_f64());
    }

    /// This many gateways were found.
    pub(crate) fn gateways(&self, count: usize) {
        self.gateways.set(i64::try_from(count).unwrap_or(i64::MAX));
    }

    /// So many addresses were taken out of their sets.
    pub(crate) fn swept(&self, count: usize) {
        self.swept.inc_by(u64::try_from(count).unwrap_or(u64::MAX));
    }

    pub(crate) fn reconciled(&self, took: Duration) {
        self.reconcile_seconds.observe(took.as_secs_f64());
    }

    pub(crate) fn malformed(&self, kind: Kind) {
        let label = KindLabel {
            kind: kind.to_string(),
        };
        self.malformed_objects.get_or_create(&label).inc();
    }

    pub(crate) fn not_saved(&self) {
        self.saves_failed.inc();
    }

    /// The exposition, in the OpenMetrics text format.
    pub(crate) fn expose(&self, reading: &Reading) -> Result<String, std::fmt::Error> {
        for (phase, count) in &reading.handovers {
            self.handovers
                .get_or_create(&PhaseLabel::of(*phase))
                .set(*count);
        }
        for (database, synced) in &reading.replicas {
            let label = DatabaseLabel { database };
            self.replicas_synced
                .get_or_create(&label)
                .set(i64::from(*synced));
        }
        self.leader.set(i64::from(reading.leader));
        self.damaged_marks.set(reading.damaged_marks);
        self.queue_depth.set(reading.queue_depth);
        let mut text = String::new();
        text::encode(&mut text, &self.registry)?;
        Ok(text)
    }
}

impl WriteResult {
    fn of(written: &Written) -> Self {
        match written {
            Written::Committed => Self::Committed,
            Written::Refused(_) => Self::Refused,
            Written::NotLeader => Self::NotLeader,
            Written::Indeterminate(_) => Self::Indeterminate,
            Written::Failed(_) => Self::Failed,
        }
    }
}

impl PhaseLabel {
    fn of(phase: Phase) -> Self {
        Self {
            phase: phase.to_string(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outcomes_are_counted_and_gauges_are_read_when_asked() {
        let metrics = Metrics::new();
        metrics.phase_entered(Phase::Succeeded);
        metrics.phase_entered(Phase::Succeeded);
        metrics.wrote(Step::Arm, &Written::NotLeader, Duration::from_millis(1));
        let reading = |leader| Reading {
            handovers: vec![(Phase::Failed, 3)],
            replicas: vec![("northbound", true), ("southbound", false)],
            leader,
            damaged_marks: 0,
            queue_depth: 2,
        };
        let text = metrics.expose(&reading(true)).unwrap();
        for line in [
            "segue_phase_entries_total{phase=\"Succeeded\"} 2",
            "segue_handovers{phase=\"Failed\"} 3",
            "segue_ovn_writes_total{step=\"Arm\",result=\"NotLeader\"} 1",
            "segue_ovn_replica_synced{database=\"southbound\"} 0",
            "segue_leader 1",
            "segue_queue_depth 2",
        ] {
            assert!(text.lines().any(|found| found == line), "{line}\n{text}");
        }
        assert!(text.contains("segue_build_info{version="), "{text}");
        assert!(text.ends_with("# EOF\n"));
        let text = metrics.expose(&reading(false)).unwrap();
        assert!(text.contains("\nsegue_leader 0\n"), "{text}");
    }
}
