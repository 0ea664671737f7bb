//! What is counted.

use prometheus_client::encoding::{EncodeLabelSet, text};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::Registry;

use crate::answer::{Ignored, Kind};

/// The proxy's metrics, of all its interfaces together.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    requests: Family<KindLabel, Counter>,
    answers: Family<KindLabel, Counter>,
    limited: Family<KindLabel, Counter>,
    ignored: Family<ReasonLabel, Counter>,
    malformed: Family<RuleLabel, Counter>,
    conflicts: Counter,
    failures: Counter,
    dropped: Counter,
    announcements: Counter,
    interfaces: Gauge,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct KindLabel {
    kind: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ReasonLabel {
    reason: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RuleLabel {
    rule: &'static str,
}

impl Metrics {
    pub(crate) fn new() -> Self {
        let metrics = Self {
            registry: Registry::with_prefix("arp_proxy"),
            requests: Family::default(),
            answers: Family::default(),
            limited: Family::default(),
            ignored: Family::default(),
            malformed: Family::default(),
            conflicts: Counter::default(),
            failures: Counter::default(),
            dropped: Counter::default(),
            announcements: Counter::default(),
            interfaces: Gauge::default(),
        };
        // A rate over a counter that appears with its first event misses that event.
        for kind in Kind::ALL {
            for family in [&metrics.requests, &metrics.answers, &metrics.limited] {
                drop(family.get_or_create(&KindLabel::of(kind)));
            }
        }
        metrics.registered()
    }

    fn registered(mut self) -> Self {
        let registry = &mut self.registry;
        let mut counter = |name, help, counter: &Counter| {
            registry.register(name, help, counter.clone());
        };
        counter(
            "conflicts",
            "Frames in which another station claims an address of the gateway; not answered",
            &self.conflicts,
        );
        counter(
            "send_failures",
            "Answers and announcements that the kernel did not take",
            &self.failures,
        );
        counter(
            "frames_dropped",
            "Frames that the kernel dropped because they were not read in time",
            &self.dropped,
        );
        counter(
            "announcements",
            "Times that the gateway was announced on an interface",
            &self.announcements,
        );
        registry.register(
            "requests",
            "Valid questions for the gateway",
            self.requests.clone(),
        );
        registry.register("answers", "Answers sent", self.answers.clone());
        registry.register(
            "rate_limited",
            "Valid questions for the gateway not answered because their source asks too often",
            self.limited.clone(),
        );
        registry.register(
            "ignored",
            "Frames not answered because they are no questions for the gateway",
            self.ignored.clone(),
        );
        registry.register(
            "malformed",
            "Frames not answered because they break a rule of their protocol",
            self.malformed.clone(),
        );
        registry.register("interfaces", "Interfaces watched", self.interfaces.clone());
        let version = Info::new([("version", env!("CARGO_PKG_VERSION"))]);
        registry.register("build", "The version that runs", version);
        self
    }

    pub(crate) fn asked(&self, kind: Kind) {
        self.requests.get_or_create(&KindLabel::of(kind)).inc();
    }

    pub(crate) fn answered(&self, kind: Kind) {
        self.answers.get_or_create(&KindLabel::of(kind)).inc();
    }

    pub(crate) fn limited(&self, kind: Kind) {
        self.limited.get_or_create(&KindLabel::of(kind)).inc();
    }

    pub(crate) fn ignored(&self, ignored: Ignored) {
        let reason = match ignored {
            Ignored::Malformed(rule) => {
                let rule = rule.name();
                self.malformed.get_or_create(&RuleLabel { rule }).inc();
                return;
            }
            Ignored::Conflict => {
                self.conflicts.inc();
                return;
            }
            Ignored::Own => "own",
            Ignored::OtherAddress => "other_address",
            Ignored::OtherStation => "other_station",
            Ignored::NoQuestion => "no_question",
            Ignored::NotARouter => "not_a_router",
        };
        self.ignored.get_or_create(&ReasonLabel { reason }).inc();
    }

    pub(crate) fn not_sent(&self) {
        self.failures.inc();
    }

    pub(crate) fn dropped(&self, frames: u32) {
        self.dropped.inc_by(u64::from(frames));
    }

    pub(crate) fn announced(&self) {
        self.announcements.inc();
    }

    pub(crate) fn watched(&self, interfaces: usize) {
        self.interfaces
            .set(i64::try_from(interfaces).unwrap_or(i64::MAX));
    }

    /// The exposition, in the OpenMetrics text format.
    ///
    /// # Errors
    /// The encoder's, which happens to none of these metrics.
    pub fn expose(&self) -> Result<String, std::fmt::Error> {
        let mut text = String::new();
        text::encode(&mut text, &self.registry)?;
        Ok(text)
    }
}

impl KindLabel {
    fn of(kind: Kind) -> Self {
        Self { kind: kind.name() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::answer::Malformed;

    #[test]
    fn every_outcome_is_counted_once_and_in_its_place() {
        let metrics = Metrics::new();
        metrics.asked(Kind::Arp);
        metrics.asked(Kind::Arp);
        metrics.answered(Kind::Arp);
        metrics.limited(Kind::Arp);
        metrics.ignored(Ignored::OtherAddress);
        metrics.ignored(Ignored::Conflict);
        metrics.ignored(Ignored::Malformed(Malformed::HopLimit));
        metrics.dropped(3);
        metrics.watched(2);
        let text = metrics.expose().unwrap();
        for line in [
            "arp_proxy_requests_total{kind=\"arp\"} 2",
            "arp_proxy_answers_total{kind=\"arp\"} 1",
            "arp_proxy_answers_total{kind=\"neighbour_solicitation\"} 0",
            "arp_proxy_rate_limited_total{kind=\"arp\"} 1",
            "arp_proxy_ignored_total{reason=\"other_address\"} 1",
            "arp_proxy_conflicts_total 1",
            "arp_proxy_malformed_total{rule=\"hop_limit\"} 1",
            "arp_proxy_frames_dropped_total 3",
            "arp_proxy_interfaces 2",
        ] {
            assert!(text.lines().any(|found| found == line), "{line}\n{text}");
        }
        assert_eq!(text.matches("reason=").count(), 1, "{text}");
        assert!(text.ends_with("# EOF\n"));
    }
}
