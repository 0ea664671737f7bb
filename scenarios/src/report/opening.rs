//! How the target's ports were opened on the pause.

use migration_controller::api::{EarlyOpening as Recorded, OpeningResult};
use serde::{Deserialize, Serialize};

/// How the target's ports were opened on the pause, ahead of OVN's own activation, hop by hop, in microseconds.
///
/// All hosts of the lab have one clock. What the agents and the controller stamped is taken from the `Handover`; the pause
/// is QEMU's own stamp, and that OVN has activated the port is the Southbound's word, as the runner reads it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct EarlyOpening {
    /// What came of it: `Opened`, or why not.
    pub result: String,
    /// Why not, in words.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// From the pause to the source's agent knowing of it: QEMU, libvirt, `virsh`.
    pub event: Option<i64>,
    /// From there to the target's agent having the order to open: two streams, and the controller between them.
    pub stream: Option<i64>,
    /// From there to what opens the ports having been written to br-int's socket: the removals of the flows that shut them
    /// or, where these are not known, the packet-outs that have OVN remove them.
    pub packet_out: Option<i64>,
    /// From there to the switch having processed that: with the removals the ports are open now.
    pub switch: Option<i64>,
    /// From there to the Southbound telling of the activation. Behind removals it is OVN's word only, and asked for 2 ms later.
    pub ovn: Option<i64>,
    /// From the pause to what opens the ports having been written: the first three together.
    pub opened: Option<i64>,
    /// From the pause to the switch having processed that: the first four together.
    #[serde(default)]
    pub open: Option<i64>,
}

impl EarlyOpening {
    /// From the record of a handover. `paused` and `activated` are in microseconds of Unix time.
    pub(crate) fn of(recorded: &Recorded, paused: Option<i64>, activated: Option<i64>) -> Self {
        let told = recorded.paused_at.as_jiff().as_microsecond();
        let at = |after: Option<i64>| Some(told + after?);
        let seen = at(recorded.paused_to_seen_us);
        let heard = at(recorded.paused_to_heard_us);
        let next = |from: Option<i64>, hop: Option<i64>| Some(from? + hop?);
        let received = next(heard, recorded.heard_to_received_us);
        let sent = next(received, recorded.received_to_sent_us);
        let processed = next(sent, recorded.sent_to_processed_us);
        let between = |from: Option<i64>, to: Option<i64>| Some(to? - from?);
        Self {
            result: name(recorded.result),
            reason: recorded.reason.clone(),
            event: between(paused, seen),
            stream: between(seen, received),
            packet_out: between(received, sent),
            switch: between(sent, processed),
            ovn: between(processed, activated),
            opened: between(paused, sent),
            open: between(paused, processed),
        }
    }

    /// Whether the target's agent opened them.
    pub fn is_opened(&self) -> bool {
        self.result == name(OpeningResult::Opened)
    }
}

fn name(result: OpeningResult) -> String {
    format!("{result:?}")
}

#[cfg(test)]
mod tests {
    use migration_controller::api::Moment;

    use super::*;

    #[test]
    fn hops_add_up_to_the_whole() {
        let recorded = Recorded {
            result: OpeningResult::Opened,
            reason: None,
            paused_at: Moment::from_jiff(jiff::Timestamp::from_microsecond(1_000_000).unwrap()),
            paused_to_seen_us: Some(300),
            paused_to_heard_us: Some(500),
            heard_to_received_us: Some(150),
            received_to_sent_us: Some(40),
            sent_to_processed_us: Some(60),
        };
        // QEMU's stamp is the more exact one of the pause.
        let opening = EarlyOpening::of(&recorded, Some(1_000_100), Some(1_003_000));
        assert!(opening.is_opened());
        assert_eq!((opening.event, opening.stream), (Some(200), Some(350)));
        assert_eq!((opening.packet_out, opening.switch), (Some(40), Some(60)));
        assert_eq!((opening.ovn, opening.opened), (Some(2_250), Some(590)));
        assert_eq!(opening.open, Some(650));
        let unanswered = Recorded {
            result: OpeningResult::NoAgent,
            heard_to_received_us: None,
            ..recorded
        };
        let opening = EarlyOpening::of(&unanswered, Some(1_000_100), None);
        assert!(!opening.is_opened());
        assert_eq!((opening.event, opening.opened), (Some(200), None));
        assert_eq!(opening.open, None);
    }
}
