//! What `/metrics` tells of the agents and of what they measure.

use std::time::Duration;

use handover::Verdict;
use node_hooks_api::agent::outcome;
use node_hooks_api::agent::signal::{Kind, Source};
use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};

use super::board::Taken;
use crate::api::{HandoverStatus, OpeningResult};

/// The metrics of the agents.
#[derive(Clone)]
pub(crate) struct AgentMetrics {
    connected: Gauge,
    refused: Family<RefusalLabel, Counter>,
    ended: Family<EndLabel, Counter>,
    signals: Family<SignalLabels, Counter>,
    openings: Family<OpeningLabel, Counter>,
    forgeries: Counter,
    refusals: Family<OutcomeLabel, Counter>,
    gate_answers: Family<VerdictLabel, Counter>,
    gate_seconds: Histogram,
    pause_seconds: Histogram,
    blackout_seconds: Histogram,
    opening_seconds: Family<HopLabel, Histogram>,
}

/// Why an agent was not let in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
pub(crate) enum Refusal {
    /// The controller has no certificate that it can use.
    NoCertificate,
    /// The TLS handshake failed, or took too long.
    Handshake,
    /// The certificate is no node's, or several nodes'.
    NoNode,
    /// This controller does not lead.
    NotLeading,
    /// It said no Hello, or something else first.
    NoHello,
    /// It called itself another node than its certificate does.
    OtherNode,
    /// Its revision is too old.
    Revision,
}

/// Why a stream came to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
pub(crate) enum End {
    /// The agent closed it, or the connection broke.
    Closed,
    /// The agent said nothing any more.
    Silent,
    /// The agent did not take what it was sent.
    Slow,
    /// A newer stream of the same node took its place.
    Replaced,
    /// This controller leads no more, or stops.
    NotLeading,
    /// The agent sent what no agent sends.
    Abuse,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RefusalLabel {
    reason: Refusal,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct EndLabel {
    reason: End,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct SignalLabels {
    kind: &'static str,
    source: &'static str,
    taken: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OutcomeLabel {
    result: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OpeningLabel {
    outcome: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct VerdictLabel {
    verdict: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct HopLabel {
    hop: &'static str,
}

// === impl AgentMetrics ===

impl AgentMetrics {
    pub(crate) fn registered(registry: &mut Registry) -> Self {
        // A millisecond to eight seconds.
        let span = || Histogram::new(exponential_buckets(0.001, 2.0, 14));
        let metrics = Self {
            connected: Gauge::default(),
            refused: Family::default(),
            ended: Family::default(),
            signals: Family::default(),
            openings: Family::default(),
            forgeries: Counter::default(),
            refusals: Family::default(),
            gate_answers: Family::default(),
            gate_seconds: Histogram::new(exponential_buckets(0.01, 2.0, 12)),
            pause_seconds: span(),
            blackout_seconds: span(),
            opening_seconds: Family::new_with_constructor(|| {
                // 25 microseconds to 0.2 seconds.
                Histogram::new(exponential_buckets(0.000_025, 2.0, 14))
            }),
        };
        metrics.register_streams(registry);
        metrics.register_measures(registry);
        metrics
    }

    fn register_streams(&self, registry: &mut Registry) {
        registry.register(
            "agents_connected",
            "Agents with a stream to this controller",
            self.connected.clone(),
        );
        registry.register(
            "agent_streams_refused",
            "Agents that were not let in, by reason",
            self.refused.clone(),
        );
        registry.register(
            "agent_streams_ended",
            "Agents' streams that ended, by reason",
            self.ended.clone(),
        );
        registry.register(
            // Not agent_signals: agents have a metric of that name, of what they observed.
            "told_signals",
            "What agents told of guests, by kind, source and what was made of it: New, Known before, \
             or Refused",
            self.signals.clone(),
        );
        registry.register(
            "told_forgeries",
            "Announcements that agents called forged",
            self.forgeries.clone(),
        );
        registry.register(
            "told_refusals",
            "Commands but those to open that agents did not carry out, by what came of them",
            self.refusals.clone(),
        );
        registry.register(
            "gate_answers",
            "Answers to virt-handlers that asked whether a migration may begin",
            self.gate_answers.clone(),
        );
        registry.register_with_unit(
            "gate_wait",
            "How long they waited for them",
            Unit::Seconds,
            self.gate_seconds.clone(),
        );
    }

    fn register_measures(&self, registry: &mut Registry) {
        registry.register(
            "openings",
            "Handovers whose target was to be opened on the pause, by what came of it; Asked is one \
             that was never answered",
            self.openings.clone(),
        );
        registry.register_with_unit(
            "early_opening",
            "How long each hop of an early opening took, from the pause to the switch having \
             processed it; a hop between two nodes has both their clocks in it",
            Unit::Seconds,
            self.opening_seconds.clone(),
        );
        registry.register_with_unit(
            "pause",
            "How long hypervisors had guests stopped in migrations",
            Unit::Seconds,
            self.pause_seconds.clone(),
        );
        registry.register_with_unit(
            "blackout",
            "From guests' last frames on the source to their first from the target",
            Unit::Seconds,
            self.blackout_seconds.clone(),
        );
    }

    pub(super) fn connected(&self, agents: usize) {
        self.connected
            .set(i64::try_from(agents).unwrap_or(i64::MAX));
    }

    pub(super) fn refused(&self, reason: Refusal) {
        self.refused.get_or_create(&RefusalLabel { reason }).inc();
    }

    pub(super) fn ended(&self, reason: End) {
        self.ended.get_or_create(&EndLabel { reason }).inc();
    }

    pub(super) fn told(&self, kind: Kind, source: Source, taken: Taken) {
        let labels = SignalLabels {
            kind: kind.as_str_name(),
            source: source.as_str_name(),
            taken: match taken {
                Taken::New => "New",
                Taken::Known => "Known",
                Taken::Refused => "Refused",
            },
        };
        self.signals.get_or_create(&labels).inc();
    }

    pub(super) fn forged(&self) {
        self.forgeries.inc();
    }

    pub(super) fn command_refused(&self, result: outcome::Result) {
        let result = result.as_str_name();
        self.refusals.get_or_create(&OutcomeLabel { result }).inc();
    }

    pub(super) fn answered(&self, verdict: Verdict, waited: Duration) {
        let verdict = match verdict {
            Verdict::Go => "Go",
            Verdict::GoUnprepared => "GoUnprepared",
            Verdict::Fail => "Fail",
        };
        self.gate_answers
            .get_or_create(&VerdictLabel { verdict })
            .inc();
        self.gate_seconds.observe(waited.as_secs_f64());
    }

    /// A handover is over: what was measured of it counts.
    pub(crate) fn over(&self, status: &HandoverStatus) {
        if let Some(millis) = status.pause_ms {
            self.pause_seconds.observe(millis / 1e3);
        }
        if let Some(millis) = status.blackout_ms {
            self.blackout_seconds.observe(millis / 1e3);
        }
        let Some(opening) = &status.early_opening else {
            return;
        };
        let outcome = match opening.result {
            OpeningResult::Asked => "Asked",
            OpeningResult::Opened => "Opened",
            OpeningResult::NoAgent => "NoAgent",
            OpeningResult::Stale => "Stale",
            OpeningResult::NotArmed => "NotArmed",
            OpeningResult::Failed => "Failed",
        };
        self.openings.get_or_create(&OpeningLabel { outcome }).inc();
        let stream_up = opening.paused_to_heard_us.zip(opening.paused_to_seen_us);
        let all = [
            opening.paused_to_heard_us,
            opening.heard_to_received_us,
            opening.received_to_sent_us,
            opening.sent_to_processed_us,
        ];
        let total = all.into_iter().sum::<Option<i64>>();
        let hops = [
            ("total", total),
            ("event", opening.paused_to_seen_us),
            (
                "stream_up",
                stream_up.map(|(heard, seen)| heard.saturating_sub(seen)),
            ),
            ("stream_down", opening.heard_to_received_us),
            ("packet_out", opening.received_to_sent_us),
            ("switch", opening.sent_to_processed_us),
        ];
        for (hop, micros) in hops {
            let micros = micros.and_then(|micros| u64::try_from(micros).ok());
            if let Some(took) = micros.map(Duration::from_micros) {
                self.opening_seconds
                    .get_or_create(&HopLabel { hop })
                    .observe(took.as_secs_f64());
            }
        }
    }
}
