//! The gate: whether a migration whose source is about to copy may begin.

use std::time::Duration;

/// How the network of a VM stands, as far as its migration is concerned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Network {
    /// What is known does not have the VM, or the migration, that the question is about. It will.
    Unknown,
    /// Nothing is to be handed over.
    NotWanted {
        /// Why not.
        why: String,
    },
    /// It is being prepared.
    Preparing {
        /// What it waits for.
        waiting: String,
    },
    /// It is ready for the guest on the target.
    Prepared,
    /// The handover has failed or is being rolled back.
    Failed {
        /// Why.
        why: String,
    },
}

/// How long a migration waits for its network, and what then.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GatePolicy {
    /// How long, from the first question on. virt-handler's own patience with a node hook is 30
    /// seconds where nobody says otherwise, so an answer has to come before that.
    pub deadline: Duration,
    /// What then.
    pub on_timeout: OnTimeout,
}

/// What becomes of a migration whose network is not ready in time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum OnTimeout {
    /// It goes: its guest's network follows as it can.
    #[default]
    Ignore,
    /// It is refused, before anything was copied; KubeVirt asks again.
    Fail,
}

/// Whether the migration may begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Verdict {
    /// It may: the network is ready, or none has to be.
    Go,
    /// It may, although the network is not ready.
    GoUnprepared,
    /// It may not.
    Fail,
}

/// The answer to whoever asks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// Whether it may begin.
    pub verdict: Verdict,
    /// Why, for people.
    pub reason: String,
}

impl Default for GatePolicy {
    fn default() -> Self {
        Self {
            deadline: Duration::from_secs(15),
            on_timeout: OnTimeout::default(),
        }
    }
}

/// The answer to a question that has `waited` for it; `None` while it is to wait on.
///
/// It depends on how things stand alone, so whoever asks twice gets the same.
pub fn answer(network: &Network, waited: Duration, policy: &GatePolicy) -> Option<Answer> {
    let (verdict, reason) = match network {
        Network::Prepared => (Verdict::Go, "the network is ready".to_owned()),
        Network::NotWanted { why } => (Verdict::Go, why.clone()),
        Network::Failed { why } => (Verdict::Fail, format!("the network handover failed: {why}")),
        Network::Preparing { .. } | Network::Unknown if waited < policy.deadline => return None,
        Network::Preparing { waiting } => timeout(waiting, policy),
        Network::Unknown => timeout("the controller does not know this migration yet", policy),
    };
    Some(Answer { verdict, reason })
}

fn timeout(what: &str, policy: &GatePolicy) -> (Verdict, String) {
    let verdict = match policy.on_timeout {
        OnTimeout::Ignore => Verdict::GoUnprepared,
        OnTimeout::Fail => Verdict::Fail,
    };
    let seconds = policy.deadline.as_secs_f64();
    let reason = format!("the network is not ready after {seconds} s: {what}");
    (verdict, reason)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHORT: Duration = Duration::from_secs(14);
    const LONG: Duration = Duration::from_secs(15);

    fn verdict(network: &Network, waited: Duration, on_timeout: OnTimeout) -> Option<Verdict> {
        let policy = GatePolicy {
            on_timeout,
            ..GatePolicy::default()
        };
        answer(network, waited, &policy).map(|answer| answer.verdict)
    }

    #[test]
    fn what_is_settled_is_answered_at_once_whatever_the_policy() {
        let why = || "because".to_owned();
        for (network, expected) in [
            (Network::Prepared, Verdict::Go),
            (Network::NotWanted { why: why() }, Verdict::Go),
            (Network::Failed { why: why() }, Verdict::Fail),
        ] {
            for on_timeout in [OnTimeout::Ignore, OnTimeout::Fail] {
                for waited in [Duration::ZERO, LONG] {
                    assert_eq!(verdict(&network, waited, on_timeout), Some(expected));
                }
            }
        }
    }

    #[test]
    fn what_is_not_waits_for_the_deadline_and_then_goes_or_fails_as_the_policy_says() {
        let waiting = "no chassis".to_owned();
        for network in [Network::Unknown, Network::Preparing { waiting }] {
            for (on_timeout, expected) in [
                (OnTimeout::Ignore, Verdict::GoUnprepared),
                (OnTimeout::Fail, Verdict::Fail),
            ] {
                assert_eq!(verdict(&network, SHORT, on_timeout), None);
                assert_eq!(verdict(&network, LONG, on_timeout), Some(expected));
            }
        }
    }

    #[test]
    fn a_timeout_says_what_was_missing() {
        let waiting = "chassis n2 has not claimed port a yet".to_owned();
        let network = Network::Preparing { waiting };
        let answer = answer(&network, LONG, &GatePolicy::default()).unwrap();
        assert_eq!(
            answer.reason,
            "the network is not ready after 15 s: chassis n2 has not claimed port a yet"
        );
    }
}
