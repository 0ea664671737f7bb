//! The log of a run, packet by packet: when each was sent, and when each copy of it arrived.
//!
//! A report tells how many packets were lost and which gaps there were; this tells of every single one, for a picture
//! of the moments around an interruption. It is kept when [asked for](crate::run::Config::log).
//!
//! # Guarantees
//! - Memory is bounded: of each direction the newest [`KEPT`] sendings and arrivals are kept, and how many were not is
//!   told.
//! - Losses and duplicates follow from sequence numbers, so they are exact for whatever is kept.
//!
//! # Caveats
//! The reflector's clock stands still while its machine is paused. What it logged is placed between the packets from it
//! that arrived before and after, each of which tells both clocks; where the clock stood still between those two, a time
//! is known to be on one side of the pause or on the other, and [`Placed`] has both.

use std::collections::VecDeque;
use std::io::{self, Write};

use serde::{Deserialize, Serialize};

use crate::clock::MICROSECOND;

/// How many sendings and how many arrivals of each direction are kept, the newest: 65 s at 1 kHz.
pub const KEPT: usize = 1 << 16;

/// Every packet of a run that is kept, each direction in order of sequence.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PacketLog {
    /// What the client sent.
    pub to_vm: Vec<Trace>,
    /// What the reflector sent.
    pub from_vm: Vec<Trace>,
    /// Sendings and arrivals that there was no room for: the oldest.
    pub forgotten: u64,
}

/// One packet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Trace {
    /// Its sequence number.
    pub sequence: u64,
    /// When it was handed to its sender's kernel. Of what the reflector sent and the client received, the time on its
    /// way is included.
    pub sent: Placed,
    /// How much later than intended that was. Null where it is not known: of what the reflector sent and none arrived.
    #[serde(default)]
    pub late_us: Option<u64>,
    /// When each copy arrived, in order; empty if none did.
    pub arrivals: Vec<Placed>,
}

/// A time of day on the client, in nanoseconds of Unix time.
///
/// One time where both are equal. Otherwise the reflector's clock stood still in between, and it is the one or the other:
/// just before, or just after.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Placed {
    /// The earliest that it can have been.
    pub earliest_ns: u64,
    /// The latest.
    pub latest_ns: u64,
}

/// A packet that the client sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Sending {
    pub(crate) sequence: u64,
    pub(crate) at_ns: u64,
    pub(crate) late_us: u32,
}

/// A packet from the reflector that arrived: what both clocks showed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Heard {
    pub(crate) sequence: u64,
    /// When it arrived, on the client's clock.
    pub(crate) host_ns: u64,
    /// When it was sent, on the reflector's.
    pub(crate) remote_ns: u64,
    /// How much later than intended that was.
    pub(crate) late_us: u32,
}

/// What the reflector logged, on its own clock, in the order in which it happened.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RemoteLog {
    /// Sequence number and time of every copy that arrived.
    pub arrivals: Vec<(u64, u64)>,
    /// Sequence number and time of every packet sent.
    pub sent: Vec<(u64, u64)>,
    /// Those that there was no room for.
    pub forgotten: u64,
}

/// The newest of a series, and how many more there were.
#[derive(Debug, Clone)]
pub(crate) struct Newest<T> {
    kept: VecDeque<T>,
    room: usize,
    pub(crate) forgotten: u64,
}

/// Tells times of the reflector's clock on the client's.
struct Clocks {
    /// By time, ascending on both clocks.
    heard: Vec<Heard>,
    period_ns: u64,
}

impl Placed {
    /// A time that is known.
    pub fn at(ns: u64) -> Self {
        Self {
            earliest_ns: ns,
            latest_ns: ns,
        }
    }

    /// Which of the two it is, given when the machine was paused: in a paused machine nothing happens.
    pub fn beside(self, paused_ns: u64) -> u64 {
        if self.earliest_ns <= paused_ns {
            self.earliest_ns
        } else {
            self.latest_ns
        }
    }
}

impl<T> Newest<T> {
    pub(crate) fn with_room(room: usize) -> Self {
        Self {
            // At once: to move half a megabyte is a noticeable pause on a slow processor, in the midst of a measurement.
            kept: VecDeque::with_capacity(room),
            room,
            forgotten: 0,
        }
    }

    pub(crate) fn push(&mut self, item: T) {
        if self.kept.len() >= self.room {
            self.kept.pop_front();
            self.forgotten += 1;
        }
        self.kept.push_back(item);
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &T> {
        self.kept.iter()
    }
}

impl<T> Default for Newest<T> {
    fn default() -> Self {
        Self::with_room(KEPT)
    }
}

impl PacketLog {
    /// Brings both sides together. `sent` are the client's sendings; `heard` is every copy from the reflector that
    /// arrived, in the order of arrival.
    pub(crate) fn assemble(
        sent: &Newest<Sending>,
        heard: &Newest<Heard>,
        remote: &RemoteLog,
        period_ns: u64,
    ) -> Self {
        let clocks = Clocks::new(heard.iter().copied(), period_ns);
        Self {
            to_vm: to_vm(sent, remote, &clocks),
            from_vm: from_vm(heard, remote, &clocks),
            forgotten: sent.forgotten + heard.forgotten + remote.forgotten,
        }
    }

    /// Writes a line of CSV for every copy, and one for every packet of which none arrived.
    pub fn write_csv(&self, out: &mut impl Write) -> io::Result<()> {
        writeln!(
            out,
            "direction,sequence,sent_ns,sent_latest_ns,arrived_ns,arrived_latest_ns"
        )?;
        for (direction, traces) in [("to_vm", &self.to_vm), ("from_vm", &self.from_vm)] {
            for trace in traces {
                let Placed {
                    earliest_ns,
                    latest_ns,
                } = trace.sent;
                let packet = format!("{direction},{},{earliest_ns},{latest_ns}", trace.sequence);
                for arrival in &trace.arrivals {
                    let (from, to) = (arrival.earliest_ns, arrival.latest_ns);
                    writeln!(out, "{packet},{from},{to}")?;
                }
                if trace.arrivals.is_empty() {
                    writeln!(out, "{packet},,")?;
                }
            }
        }
        Ok(())
    }
}

fn to_vm(sent: &Newest<Sending>, remote: &RemoteLog, clocks: &Clocks) -> Vec<Trace> {
    let mut traces: Vec<Trace> = sent
        .iter()
        .map(|sending| Trace {
            sequence: sending.sequence,
            sent: Placed::at(sending.at_ns),
            late_us: Some(sending.late_us.into()),
            arrivals: Vec::new(),
        })
        .collect();
    // Arrivals are in order: what came after something that can only have come after the pause did so too.
    let mut floor_ns = 0;
    for &(sequence, remote_ns) in &remote.arrivals {
        let Ok(at) = traces.binary_search_by_key(&sequence, |trace| trace.sequence) else {
            continue;
        };
        let Some(trace) = traces.get_mut(at) else {
            continue;
        };
        let placed = clocks.place(remote_ns, floor_ns.max(trace.sent.earliest_ns));
        floor_ns = placed.earliest_ns.max(floor_ns);
        trace.arrivals.push(placed);
    }
    traces
}

fn from_vm(heard: &Newest<Heard>, remote: &RemoteLog, clocks: &Clocks) -> Vec<Trace> {
    let mut floor_ns = 0;
    let mut traces: Vec<Trace> = Vec::new();
    for &(sequence, remote_ns) in &remote.sent {
        let sent = clocks.place(remote_ns, floor_ns);
        floor_ns = sent.earliest_ns.max(floor_ns);
        traces.push(Trace {
            sequence,
            sent,
            late_us: None,
            arrivals: Vec::new(),
        });
    }
    for copy in heard.iter() {
        let found = traces.binary_search_by_key(&copy.sequence, |trace| trace.sequence);
        if let Some(trace) = found.ok().and_then(|at| traces.get_mut(at)) {
            trace.late_us = Some(copy.late_us.into());
            trace.arrivals.push(Placed::at(copy.host_ns));
        }
    }
    traces
}

impl Clocks {
    /// Of copies and of packets that were overtaken the first and the faster count.
    fn new(heard: impl Iterator<Item = Heard>, period_ns: u64) -> Self {
        let mut all: Vec<Heard> = heard.collect();
        all.sort_by_key(|heard| (heard.remote_ns, heard.host_ns));
        all.dedup_by_key(|heard| heard.remote_ns);
        // One that arrived after a packet sent later was held up on its way.
        let mut next_ns = u64::MAX;
        let mut heard: Vec<Heard> = Vec::with_capacity(all.len());
        for one in all.into_iter().rev() {
            if one.host_ns <= next_ns {
                next_ns = one.host_ns;
                heard.push(one);
            }
        }
        heard.reverse();
        Self { heard, period_ns }
    }

    /// Where a time of the reflector's clock was; not before `floor_ns`.
    fn place(&self, remote_ns: u64, floor_ns: u64) -> Placed {
        let at = self
            .heard
            .partition_point(|heard| heard.remote_ns < remote_ns);
        let after = self.heard.get(at);
        if let Some(exact) = after.filter(|after| after.remote_ns == remote_ns) {
            return Placed::at(exact.host_ns.max(floor_ns));
        }
        let before = at.checked_sub(1).and_then(|at| self.heard.get(at));
        let early = before.map(|before| {
            let since_ns = remote_ns - before.remote_ns;
            before.host_ns.saturating_add(since_ns)
        });
        let late = after.map(|after| {
            let ahead_ns = after.remote_ns - remote_ns;
            after.host_ns.saturating_sub(ahead_ns)
        });
        let (earliest_ns, latest_ns) = match (early, late) {
            (Some(early), Some(late)) => (early, late),
            (Some(only), None) | (None, Some(only)) => (only, only),
            (None, None) => (floor_ns, floor_ns),
        };
        // Below a period, or the other way round, it is the jitter of the path and not a pause. The second of the two
        // packets tells more: what it answers for is fresher.
        let jitter = latest_ns.saturating_sub(earliest_ns) <= self.period_ns;
        if jitter || earliest_ns.saturating_add(MICROSECOND) < floor_ns {
            Placed::at(latest_ns.max(floor_ns))
        } else {
            Placed {
                earliest_ns: earliest_ns.max(floor_ns),
                latest_ns: latest_ns.max(floor_ns),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::clock::MILLISECOND as MS;

    const PERIOD: u64 = MS;
    /// From either side to the other.
    const TRIP: u64 = MS / 4;
    /// The reflector's clock began elsewhere.
    const SKEW: u64 = 5_000_000 * MS;

    fn sending(sequence: u64, at_ns: u64) -> Sending {
        Sending {
            sequence,
            at_ns,
            late_us: 0,
        }
    }

    /// A machine that is paused from `pause.0` for `pause.1` (client's clock, from 0), with its clock standing still.
    struct World {
        pause: (u64, u64),
        count: u64,
    }

    impl World {
        fn resumed(&self) -> u64 {
            self.pause.0 + self.pause.1
        }

        /// When something that comes to the machine at `at` is taken in.
        fn taken_in(&self, at: u64) -> u64 {
            if at > self.pause.0 {
                at.max(self.resumed())
            } else {
                at
            }
        }

        fn remote(&self, host_ns: u64) -> u64 {
            let stood_still = host_ns.saturating_sub(self.pause.0).min(self.pause.1);
            SKEW + host_ns - stood_still
        }

        /// Sendings of the machine: its schedule goes by its clock.
        fn sends(&self) -> Vec<u64> {
            (0..self.count)
                .map(|sequence| {
                    let at = sequence * PERIOD + PERIOD / 3;
                    if at > self.pause.0 {
                        at + self.pause.1
                    } else {
                        at
                    }
                })
                .collect()
        }

        /// The log, with the packets to the machine in `lost_to` lost, those in `twice` delivered twice, and those from
        /// it in `lost_from` lost.
        fn log(
            &self,
            lost_to: &std::ops::Range<u64>,
            twice: &std::ops::Range<u64>,
            lost_from: &std::ops::Range<u64>,
        ) -> PacketLog {
            let (mut sent, mut heard) = (Newest::default(), Newest::default());
            let mut remote = RemoteLog::default();
            for sequence in 0..self.count {
                let at = sequence * PERIOD;
                sent.push(sending(sequence, at));
                if lost_to.contains(&sequence) {
                    continue;
                }
                let arrived = self.remote(self.taken_in(at + TRIP));
                let copies = if twice.contains(&sequence) { 2 } else { 1 };
                for _ in 0..copies {
                    remote.arrivals.push((sequence, arrived));
                }
            }
            for (sequence, at) in (0..).zip(self.sends()) {
                remote.sent.push((sequence, self.remote(at)));
                if !lost_from.contains(&sequence) {
                    heard.push(Heard {
                        sequence,
                        host_ns: at + TRIP,
                        remote_ns: self.remote(at),
                        late_us: 0,
                    });
                }
            }
            PacketLog::assemble(&sent, &heard, &remote, PERIOD)
        }
    }

    proptest! {
        #[test]
        fn what_arrived_is_placed_on_the_right_side_of_a_pause(
            begin in 50_u64..150,
            length in 3_u64..120,
            lost_to in (0_u64..300, 0_u64..100),
            twice in (0_u64..300, 0_u64..50),
            lost_from in (1_u64..290, 0_u64..20),
        ) {
            // Off the packets' own times: then on which side one is is no matter of nanoseconds.
            let world = World { pause: (begin * PERIOD + PERIOD / 2, length * PERIOD), count: 300 };
            let range = |(from, count): (u64, u64)| from..from + count;
            let (lost_to, twice) = (range(lost_to), range(twice));
            let log = world.log(&lost_to, &twice, &range(lost_from));
            prop_assert_eq!(log.to_vm.len(), 300);
            for trace in &log.to_vm {
                let sequence = trace.sequence;
                let copies = match (lost_to.contains(&sequence), twice.contains(&sequence)) {
                    (true, _) => 0,
                    (false, twice) => 1 + usize::from(twice),
                };
                prop_assert_eq!(trace.arrivals.len(), copies, "packet {}", sequence);
                let truth = world.taken_in(sequence * PERIOD + TRIP);
                for arrival in &trace.arrivals {
                    let placed = arrival.beside(world.pause.0);
                    // Packets from the machine tell the time of their arrival: their trip is on top.
                    prop_assert!(
                        placed.abs_diff(truth) <= 2 * TRIP + PERIOD,
                        "packet {} at {}, placed at {} of {:?}", sequence, truth, placed, arrival
                    );
                }
            }
        }

        #[test]
        fn what_was_lost_from_the_machine_was_sent_on_one_side_of_the_pause(
            begin in 50_u64..150,
            length in 3_u64..120,
            lost in (1_u64..290, 1_u64..20),
        ) {
            let world = World { pause: (begin * PERIOD, length * PERIOD), count: 300 };
            let lost = lost.0..(lost.0 + lost.1).min(299);
            let log = world.log(&(0..0), &(0..0), &lost);
            for (trace, truth) in log.from_vm.iter().zip(world.sends()) {
                prop_assert_eq!(trace.arrivals.is_empty(), lost.contains(&trace.sequence));
                let placed = trace.sent.beside(world.pause.0);
                prop_assert!(
                    placed.abs_diff(truth) <= TRIP + PERIOD,
                    "packet {} at {}, placed at {} of {:?}", trace.sequence, truth, placed, trace.sent
                );
            }
        }
    }

    #[test]
    fn without_a_word_from_the_reflector_losses_are_still_told_apart() {
        let mut sent = Newest::default();
        (0..3).for_each(|sequence| sent.push(sending(sequence, sequence * PERIOD)));
        let remote = RemoteLog {
            arrivals: vec![(0, 7), (2, 9)],
            ..RemoteLog::default()
        };
        let log = PacketLog::assemble(&sent, &Newest::default(), &remote, PERIOD);
        let copies: Vec<_> = log.to_vm.iter().map(|it| it.arrivals.len()).collect();
        assert_eq!(copies, [1, 0, 1]);
        assert!(log.from_vm.is_empty());
    }

    #[test]
    fn how_late_a_packet_was_sent_is_known_of_all_but_what_the_machine_sent_in_vain() {
        let mut sent = Newest::default();
        sent.push(Sending {
            late_us: 7,
            ..sending(0, PERIOD)
        });
        let mut heard = Newest::default();
        heard.push(Heard {
            sequence: 1,
            host_ns: 2 * PERIOD,
            remote_ns: SKEW + PERIOD,
            late_us: 9,
        });
        let remote = RemoteLog {
            sent: vec![(0, SKEW), (1, SKEW + PERIOD)],
            ..RemoteLog::default()
        };
        let log = PacketLog::assemble(&sent, &heard, &remote, PERIOD);
        let late = |traces: &[Trace]| traces.iter().map(|it| it.late_us).collect::<Vec<_>>();
        assert_eq!(late(&log.to_vm), [Some(7)]);
        assert_eq!(late(&log.from_vm), [None, Some(9)]);
    }

    #[test]
    fn the_oldest_make_room_and_are_counted() {
        let mut newest = Newest::with_room(2);
        (0..5).for_each(|item| newest.push(item));
        assert_eq!(newest.iter().copied().collect::<Vec<_>>(), [3, 4]);
        assert_eq!(newest.forgotten, 3);
    }

    #[test]
    fn a_packet_that_was_held_up_does_not_bend_the_clock() {
        let heard = [(0, 10), (1, 40), (2, 12)].map(|(sequence, host)| Heard {
            sequence,
            host_ns: host * MS,
            remote_ns: sequence * MS,
            late_us: 0,
        });
        let clocks = Clocks::new(heard.into_iter(), PERIOD);
        assert_eq!(clocks.heard.len(), 2);
        let middle = clocks.place(MS, 0);
        assert_eq!(middle, Placed::at(11 * MS));
    }

    #[test]
    fn the_csv_has_a_line_for_every_copy_and_for_every_loss() {
        let trace = |sequence, arrivals| Trace {
            sequence,
            sent: Placed::at(5),
            late_us: None,
            arrivals,
        };
        let log = PacketLog {
            to_vm: vec![
                trace(0, vec![Placed::at(6), Placed::at(7)]),
                trace(1, Vec::new()),
            ],
            from_vm: vec![trace(
                0,
                vec![Placed {
                    earliest_ns: 8,
                    latest_ns: 9,
                }],
            )],
            forgotten: 0,
        };
        let mut text = Vec::new();
        log.write_csv(&mut text).expect("a vector");
        let text = String::from_utf8(text).expect("CSV");
        let lines: Vec<_> = text.lines().skip(1).collect();
        assert_eq!(
            lines,
            [
                "to_vm,0,5,5,6,6",
                "to_vm,0,5,5,7,7",
                "to_vm,1,5,5,,",
                "from_vm,0,5,5,8,9"
            ]
        );
    }
}
