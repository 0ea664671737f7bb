//! One early opening: what was asked of the target's agent, and what came of it.

use std::time::Duration;

use node_hooks_api::agent as wire;

use super::time::Nanos;
use crate::api::{EarlyOpening, Moment, OpeningResult};

/// How long after its stamp a pause is news. What an agent tells later than that it tells again, to a controller that is
/// new to it, or it was cut off meanwhile: the guest may have gone on since, where it was.
///
/// Longer than a guest is paused and its agent's word takes to get here, by as much as clocks of nodes that are kept in
/// step may differ. A node whose clock is further behind the controller's has no early openings, and OVN opens its
/// guests' ports; one whose clock is ahead has its pauses taken for news for longer by as much.
const NEWS: Duration = Duration::from_secs(1);

/// The pause of a guest, as its source's agent told it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Pause {
    /// By the hypervisor's stamp; zero where that is not to be believed.
    pub(super) at: Nanos,
    /// When the agent learned of it.
    pub(super) seen: Nanos,
    /// When the controller heard of it.
    pub(super) heard: Nanos,
    /// It is to open the target: the handover was ready then, and it was news.
    pub(super) opens: bool,
}

/// An order to open, and its outcome.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Opening {
    pub(super) pause: Pause,
    pub(super) command: u64,
    pub(super) result: OpeningResult,
    reason: Option<String>,
    hops: wire::Hops,
}

/// Whether a pause that bears this stamp is news. What nobody stamped is: it is as old as its telling, for all that is
/// known.
pub(super) fn is_news(stamp: Nanos, now: Nanos) -> bool {
    !stamp.is_stamped() || now <= stamp.after(NEWS)
}

impl Opening {
    pub(super) fn asked(pause: Pause, command: u64) -> Self {
        Self {
            pause,
            command,
            result: OpeningResult::Asked,
            reason: None,
            hops: wire::Hops::default(),
        }
    }

    /// Takes the agent's answer.
    pub(super) fn answered(&mut self, outcome: &wire::Outcome) {
        use wire::outcome::Result;
        self.result = match outcome.result() {
            Result::Done => OpeningResult::Opened,
            Result::Stale => OpeningResult::Stale,
            Result::Unknown => OpeningResult::NotArmed,
            Result::Failed | Result::Unspecified => OpeningResult::Failed,
        };
        self.reason = shortened(&outcome.reason);
        self.hops = outcome.hops.unwrap_or_default();
    }

    /// Nobody could be asked.
    pub(super) fn unasked(&mut self) {
        self.result = OpeningResult::NoAgent;
    }

    /// When the ports were open.
    pub(super) fn opened_at(&self) -> Option<Moment> {
        if self.result != OpeningResult::Opened {
            return None;
        }
        let stamps = [self.hops.processed_at_ns, self.hops.sent_at_ns].map(Nanos);
        let sane = |at: &Nanos| at.is_within(super::board::CLOCK_ERROR, self.pause.heard);
        stamps.into_iter().find(sane).map(Nanos::moment)
    }

    /// As it goes into the record.
    pub(super) fn record(&self) -> EarlyOpening {
        let Pause {
            at, seen, heard, ..
        } = self.pause;
        let received = Nanos(self.hops.received_at_ns);
        let sent = Nanos(self.hops.sent_at_ns);
        let processed = Nanos(self.hops.processed_at_ns);
        let hop = |from: Nanos, to: Nanos| {
            let stamped = from.is_stamped() && to.is_stamped();
            stamped.then(|| to.micros_since(from))
        };
        EarlyOpening {
            result: self.result,
            reason: self.reason.clone(),
            paused_at: if at.is_stamped() { at } else { heard }.moment(),
            paused_to_seen_us: hop(at, seen),
            paused_to_heard_us: hop(at, heard),
            heard_to_received_us: hop(heard, received),
            received_to_sent_us: hop(received, sent),
            sent_to_processed_us: hop(sent, processed),
        }
    }
}

/// What a person may want to read of what an agent wrote.
pub(super) fn shortened(text: &str) -> Option<String> {
    const LONGEST: usize = 300;
    let text = text.trim();
    (!text.is_empty()).then(|| text.chars().take(LONGEST).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEARD: u64 = 1_500_000_000_000_000_000;

    fn opening() -> Opening {
        let pause = Pause {
            at: Nanos(HEARD - 300_000),
            seen: Nanos(HEARD - 200_000),
            heard: Nanos(HEARD),
            opens: true,
        };
        Opening::asked(pause, 1)
    }

    fn done() -> wire::Outcome {
        wire::Outcome {
            result: wire::outcome::Result::Done.into(),
            hops: Some(wire::Hops {
                received_at_ns: HEARD + 150_000,
                sent_at_ns: HEARD + 190_000,
                processed_at_ns: HEARD + 690_000,
            }),
            ..wire::Outcome::default()
        }
    }

    #[test]
    fn every_hop_is_recorded_in_microseconds() {
        let mut opening = opening();
        opening.answered(&done());
        let record = opening.record();
        let hops = [
            record.paused_to_seen_us,
            record.paused_to_heard_us,
            record.heard_to_received_us,
            record.received_to_sent_us,
            record.sent_to_processed_us,
        ];
        assert_eq!(hops, [100, 300, 150, 40, 500].map(Some));
        assert_eq!(record.result, OpeningResult::Opened);
        let opened = opening.opened_at().unwrap();
        assert_eq!(opened, Nanos(HEARD + 690_000).moment());
    }

    #[test]
    fn what_nobody_stamped_is_no_hop() {
        let mut opening = opening();
        opening.pause.at = Nanos::default();
        let outcome = wire::Outcome {
            result: wire::outcome::Result::Failed.into(),
            reason: " no interface ".into(),
            ..wire::Outcome::default()
        };
        opening.answered(&outcome);
        let record = opening.record();
        assert_eq!(record.paused_at, Nanos(HEARD).moment());
        assert_eq!(record.paused_to_heard_us, None);
        assert_eq!(record.heard_to_received_us, None);
        assert_eq!(record.reason.as_deref(), Some("no interface"));
        assert_eq!(opening.opened_at(), None);
    }
}
