//! Where packets were lost.

use dataplane_probe::packets::Trace;
use dataplane_probe::report as probe;
use serde::{Deserialize, Serialize};

/// What is sent so long before the pause may still wait for the guest at the source when it pauses: the migration thread
/// keeps QEMU from its taps for half a millisecond before, and an emulated guest that has little of its processor is some
/// ten milliseconds behind.
const BEFORE_NS: u64 = 100_000_000;
/// A packet's way to the port, and what a switch takes to revise its cached flows once the port is open.
const TOLERANCE_NS: u64 = 1_000_000;

/// Where the packets of one direction were lost. Together they are all that never arrived.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Losses {
    /// Sent at most 100 ms before the guest paused: what still waited for it at the source.
    pub before_pause: u64,
    /// Sent from the pause on until the target's port was open.
    pub at_closed_port: u64,
    /// The queues of the guest's taps had no room: at most so many frames were dropped there.
    pub in_tap_queue: u64,
    /// By the network, nobody knows where.
    pub elsewhere: u64,
    /// At the receiver's own socket, the guest's or the client's, which was not read in time. The network had delivered
    /// them.
    pub at_socket: u64,
}

/// What is known of a migration that says where a packet was lost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Places {
    /// The guest paused, in nanoseconds of Unix time.
    pub(crate) paused_ns: Option<u64>,
    /// The target's port was open.
    pub(crate) open_ns: Option<u64>,
    /// Frames that the queues of the guest's taps had no room for.
    pub(crate) dropped_by_taps: u64,
}

impl Losses {
    /// The losses of a direction, given what became of each packet and what is known of the migration.
    pub(crate) fn of(measured: &probe::Direction, packets: &[Trace], places: Places) -> Self {
        let lost = packets.iter().filter(|trace| trace.arrivals.is_empty());
        let (mut before, mut closed) = (0, 0);
        for trace in lost {
            let Some(paused_ns) = places.paused_ns else {
                break;
            };
            let sent_ns = trace.sent.beside(paused_ns);
            if sent_ns < paused_ns {
                before += u64::from(paused_ns - sent_ns <= BEFORE_NS);
            } else if let Some(open_ns) = places.open_ns {
                closed += u64::from(sent_ns <= open_ns + TOLERANCE_NS);
            }
        }
        // Which of them the socket dropped is not known: those for which there is no other place, as far as they go.
        let at_socket = measured.receiver_overflow.min(measured.lost);
        let mut left = measured.lost - at_socket;
        let mut take = |most: u64| {
            let taken = most.min(left);
            left -= taken;
            taken
        };
        Self {
            at_closed_port: take(closed),
            before_pause: take(before),
            in_tap_queue: take(places.dropped_by_taps),
            elsewhere: take(u64::MAX),
            at_socket,
        }
    }

    /// What the network lost.
    pub fn by_network(&self) -> u64 {
        self.before_pause + self.at_closed_port + self.in_tap_queue + self.elsewhere
    }
}

#[cfg(test)]
mod tests {
    use dataplane_probe::packets::Placed;

    use super::*;

    const MS: u64 = 1_000_000;
    const PAUSED: u64 = 1_000 * MS;

    /// The losses among packets sent at these times, of which `overflow` were dropped at the socket.
    fn losses(sent_ms: &[u64], overflow: u64, places: Places) -> Losses {
        let trace = |&at: &u64| Trace {
            sequence: at,
            sent: Placed::at(at * MS),
            late_us: None,
            arrivals: Vec::new(),
        };
        let traces: Vec<_> = sent_ms.iter().map(trace).collect();
        let measured = probe::Direction {
            lost: traces.len() as u64,
            receiver_overflow: overflow,
            ..probe::Direction::default()
        };
        let losses = Losses::of(&measured, &traces, places);
        assert_eq!(losses.by_network() + losses.at_socket, measured.lost);
        losses
    }

    fn places() -> Places {
        Places {
            paused_ns: Some(PAUSED),
            open_ns: Some(PAUSED + 2 * MS),
            dropped_by_taps: 0,
        }
    }

    #[test]
    fn the_time_of_sending_says_where_a_packet_was_lost() {
        let found = losses(&[500, 899, 900, 999, 1_000, 1_003, 1_004], 0, places());
        let due = Losses {
            before_pause: 2,
            at_closed_port: 2,
            elsewhere: 3,
            ..Losses::default()
        };
        assert_eq!(found, due);
    }

    #[test]
    fn what_a_tap_dropped_is_among_what_has_no_other_place() {
        let dropping = |dropped_by_taps| Places {
            dropped_by_taps,
            ..places()
        };
        let found = losses(&[1_000, 1_100, 1_101], 0, dropping(1));
        assert_eq!((found.in_tap_queue, found.elsewhere), (1, 1));
        let found = losses(&[1_000, 1_100], 0, dropping(50));
        assert_eq!((found.at_closed_port, found.in_tap_queue), (1, 1));
    }

    #[test]
    fn what_the_socket_dropped_is_not_the_networks_loss() {
        let found = losses(&[1_000, 1_100, 1_101, 1_102], 2, places());
        assert_eq!((found.at_socket, found.by_network()), (2, 2));
        assert_eq!((found.at_closed_port, found.elsewhere), (1, 1));
        // The counter is the whole socket's, which may have dropped packets of other flows.
        let found = losses(&[1_000], 9, places());
        assert_eq!((found.at_socket, found.by_network()), (1, 0));
    }

    #[test]
    fn without_a_pause_or_an_open_port_nothing_is_made_up() {
        let unknown = losses(&[999, 1_000], 0, Places::default());
        assert_eq!(unknown.elsewhere, 2);
        let never_open = Places {
            open_ns: None,
            ..places()
        };
        let found = losses(&[999, 1_000], 0, never_open);
        assert_eq!((found.before_pause, found.elsewhere), (1, 1));
    }
}
