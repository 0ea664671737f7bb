//! What happened, in an operator's words.

use std::collections::BTreeSet;

use handover::{Answer, Phase, SignalKind, Verdict, Write};
use kube::runtime::events::EventType;

use super::record::{GUEST_GONE, Record};
use crate::api::Place;

/// Something to tell on the migration object.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct News {
    /// Whether it needs attention.
    pub(crate) warning: bool,
    /// In a word, for programs.
    pub(crate) reason: &'static str,
    /// In a sentence.
    pub(crate) note: String,
    /// The phase that began with it.
    pub(crate) entered: Option<Phase>,
    /// The phase that ended with it, and how many seconds it had lasted.
    pub(crate) ended: Option<(Phase, f64)>,
}

impl News {
    /// A handover entered its phase.
    pub(super) fn phase(record: &Record, ended: Option<(Phase, f64)>) -> Self {
        let ports = match record.spec.ports.len() {
            0 => "no port".to_owned(),
            _ => record.spec.ports.join(", "),
        };
        let source = node(record.spec.source.as_ref());
        let target = node(record.spec.target.as_ref());
        let status = &record.status;
        let message = status.message.clone().unwrap_or_default();
        let why = status.failure_reason.clone().unwrap_or_default();
        let armed = status.step(crate::api::TimelineStep::Armed).is_some()
            || status.step(crate::api::TimelineStep::Settled).is_some();
        let (reason, note) = match status.phase {
            Phase::Pending => (
                "NetworkPending",
                format!("the network is prepared when more is known: {message}"),
            ),
            Phase::Preparing => (
                "NetworkPreparing",
                format!("preparing the network on {target} for the guest of {source}: {ports}"),
            ),
            Phase::Ready => (
                "NetworkReady",
                format!("the network on {target} is ready for the guest: {ports}"),
            ),
            Phase::Switching => ("GuestPaused", format!("the guest paused on {source}")),
            Phase::Switched => {
                let resumed =
                    |seen: &&crate::api::SignalSeen| seen.kind == SignalKind::ResumedOnTarget;
                let by = status.signals.iter().find(resumed);
                let by = by.map_or_else(String::new, |seen| format!(" (told by {})", seen.source));
                ("GuestMoved", format!("the guest runs on {target}{by}"))
            }
            Phase::Finalising => (
                "NetworkFinalising",
                format!("the migration is over; {target} becomes the only place of {ports}"),
            ),
            Phase::Succeeded if why.is_empty() => (
                "NetworkHandedOver",
                format!("the network is on {target} alone: {ports}"),
            ),
            Phase::Succeeded => ("NetworkHandedOver", why),
            Phase::RollingBack if why == GUEST_GONE => (
                "NetworkRollingBack",
                format!("{why}; the ports get back what was set before: {ports}"),
            ),
            Phase::RollingBack => (
                "NetworkRollingBack",
                format!("{why}; {source} becomes the only place of {ports} again"),
            ),
            Phase::RolledBack if why == GUEST_GONE => (
                "NetworkReleased",
                format!("{why}; nothing of the handover is left on its ports: {ports}"),
            ),
            Phase::RolledBack if armed => (
                "NetworkRolledBack",
                format!("{why}; the network is as it was: {ports}"),
            ),
            Phase::RolledBack => (
                "NetworkUnchanged",
                format!("{why}; the network had not been touched"),
            ),
            Phase::Failed => ("NetworkHandoverFailed", format!("{why}: {message}")),
        };
        Self {
            warning: status.phase == Phase::Failed,
            reason,
            note,
            entered: Some(status.phase),
            ended,
        }
    }

    /// The routes were made to lead to where the guest went, or `back` to where it was.
    pub(super) fn flipped(record: &Record, write: &Write, back: bool) -> Self {
        let routes = &write.routes;
        let keys: Vec<_> = routes.iter().map(|route| route.route.as_str()).collect();
        let from: BTreeSet<_> = routes.iter().flat_map(|route| &route.from).collect();
        let from = from.into_iter().map(String::as_str).collect::<Vec<_>>();
        let to: BTreeSet<_> = routes
            .iter()
            .filter_map(|route| route.to.as_ref())
            .collect();
        let to = to.into_iter().map(String::as_str).collect::<Vec<_>>();
        let from = match &from[..] {
            [] => String::new(),
            from => format!("; before, they led to {}", from.join(", ")),
        };
        Self {
            warning: false,
            reason: if back {
                "RoutesReturned"
            } else {
                "RoutesFollowed"
            },
            note: format!(
                "routes of {} lead to chassis {} ({}){from}",
                record.spec.vm.name,
                to.join(", "),
                keys.join(", ")
            ),
            entered: None,
            ended: None,
        }
    }

    /// Something keeps the handover from acting.
    pub(super) fn trouble(note: String) -> Self {
        Self::warn("NetworkNeedsAttention", note)
    }

    /// The VM has an interface that will not keep its connections.
    pub(super) fn incompatible(note: String) -> Self {
        Self::warn("ConnectionsWillBreak", note)
    }

    /// A migration began without its network being ready, or was kept from beginning.
    pub(super) fn gate(answer: &Answer) -> Self {
        let reason = &answer.reason;
        match answer.verdict {
            Verdict::Fail => Self::warn(
                "MigrationHeldBack",
                format!("the migration does not begin: {reason}"),
            ),
            Verdict::Go | Verdict::GoUnprepared => Self::warn(
                "MigrationNotHeldBack",
                format!("the migration begins all the same: {reason}"),
            ),
        }
    }

    fn warn(reason: &'static str, note: String) -> Self {
        Self {
            warning: true,
            reason,
            note,
            entered: None,
            ended: None,
        }
    }

    /// Its kind as Kubernetes has it.
    pub(crate) fn event_type(&self) -> EventType {
        if self.warning {
            EventType::Warning
        } else {
            EventType::Normal
        }
    }
}

fn node(place: Option<&Place>) -> String {
    place.map_or_else(
        || "an unknown node".to_owned(),
        |place| format!("node {}", place.node),
    )
}
