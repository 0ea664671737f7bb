//! One migration, packet by packet.

use dataplane_probe::packets::{PacketLog, Trace};

use crate::runner::Switch;
use crate::scenario::{Strategy, Topology};

/// What is shown from before the pause.
pub(super) const BEFORE_MS: f64 = 60.0;
/// What is shown after the last thing of interest, and the least and the most after the pause.
const AFTER_MS: f64 = 60.0;
const LEAST_MS: f64 = 150.0;
const MOST_MS: f64 = 2_000.0;

/// The packets around the pause of one migration. Times are in milliseconds from the pause.
#[derive(Clone, Debug, PartialEq)]
pub struct Picture {
    /// Who handed the port over.
    pub strategy: Strategy,
    /// How the network is laid out.
    pub topology: Topology,
    /// An agent has opened the target's port.
    pub opened_ms: Option<f64>,
    /// OVN said that the target's port is activated.
    pub activated_ms: Option<f64>,
    /// The guest resumed.
    pub resumed_ms: Option<f64>,
    /// The traffic was led to the target.
    pub flipped_ms: Option<f64>,
    /// Packets towards the VM.
    pub to_vm: Way,
    /// Packets from the VM.
    pub from_vm: Way,
    /// Up to when there are packets.
    pub until_ms: f64,
}

/// What became of the packets of one direction, each list ascending.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Way {
    /// When each was sent.
    pub sent: Vec<f64>,
    /// When the first copy of each arrived that did.
    pub delivered: Vec<f64>,
    /// When each was sent that never arrived.
    pub lost: Vec<f64>,
    /// When further copies arrived.
    pub twice: Vec<f64>,
}

// === impl Picture ===

impl Picture {
    /// Of a migration whose packets and whose pause are known.
    pub(super) fn of(switch: &Switch) -> Option<Self> {
        let (paused_ns, packets) = (switch.paused_ns?, switch.packets.as_ref()?);
        let timeline = &switch.migration.timeline_us;
        let strategy = switch.migration.strategy.parse().ok()?;
        let opening = switch.migration.early_opening.as_ref();
        let opening = opening.filter(|opening| opening.is_opened());
        let picture = Self {
            opened_ms: opening.and_then(|opening| opening.open).map(millis),
            activated_ms: timeline.activated.map(millis),
            resumed_ms: timeline.resumed.map(millis),
            flipped_ms: timeline.flipped.map(millis),
            ..Self::empty(strategy, switch.migration.topology)
        };
        Some(picture.with(packets, paused_ns))
    }

    /// One without packets.
    pub(super) fn empty(strategy: Strategy, topology: Topology) -> Self {
        Self {
            strategy,
            topology,
            opened_ms: None,
            activated_ms: None,
            resumed_ms: None,
            flipped_ms: None,
            to_vm: Way::default(),
            from_vm: Way::default(),
            until_ms: 0.0,
        }
    }

    fn with(mut self, packets: &PacketLog, paused_ns: u64) -> Self {
        self.to_vm = Way::of(&packets.to_vm, paused_ns);
        self.from_vm = Way::of(&packets.from_vm, paused_ns);
        let ways = || [&self.to_vm, &self.from_vm];
        // A loss or a second copy long before or after has nothing to do with it.
        let within = |at: &f64| (-BEFORE_MS..=MOST_MS).contains(at);
        let packets = ways().into_iter().flat_map(|way| [&way.lost, &way.twice]);
        let packets = packets.flatten().copied().filter(within);
        let moments = [self.activated_ms, self.resumed_ms, self.flipped_ms];
        let last = moments.into_iter().flatten().chain(packets);
        let last = last.fold(0.0, f64::max) + AFTER_MS;
        self.until_ms = last.clamp(LEAST_MS, MOST_MS);
        for way in [&mut self.to_vm, &mut self.from_vm] {
            way.cut(-BEFORE_MS, self.until_ms);
        }
        self
    }
}

// === impl Way ===

impl Way {
    fn of(traces: &[Trace], paused_ns: u64) -> Self {
        let mut way = Self::default();
        let from_pause = |ns: u64| {
            let after = i64::try_from(ns.abs_diff(paused_ns) / 1_000).unwrap_or(i64::MAX);
            millis(if ns < paused_ns { -after } else { after })
        };
        for trace in traces {
            let sent = from_pause(trace.sent.beside(paused_ns));
            way.sent.push(sent);
            let mut arrivals = trace.arrivals.iter();
            match arrivals.next() {
                Some(first) => way.delivered.push(from_pause(first.beside(paused_ns))),
                None => way.lost.push(sent),
            }
            way.twice
                .extend(arrivals.map(|more| from_pause(more.beside(paused_ns))));
        }
        for times in way.each() {
            times.sort_by(f64::total_cmp);
        }
        way
    }

    fn each(&mut self) -> [&mut Vec<f64>; 4] {
        [
            &mut self.sent,
            &mut self.delivered,
            &mut self.lost,
            &mut self.twice,
        ]
    }

    fn cut(&mut self, from: f64, to: f64) {
        for times in self.each() {
            times.retain(|at| (from..=to).contains(at));
        }
    }
}

#[expect(
    clippy::cast_precision_loss,
    reason = "microseconds of a migration are far below 2^52"
)]
pub(super) fn millis(micros: i64) -> f64 {
    micros as f64 / 1_000.0
}

#[cfg(test)]
mod tests {
    use dataplane_probe::packets::Placed;

    use super::*;

    const MS: u64 = 1_000_000;
    const PAUSED: u64 = 1_000_000 * MS;

    fn trace(sequence: u64, sent_ms: u64, arrivals_ms: &[u64]) -> Trace {
        let at = |ms: u64| Placed::at(PAUSED + ms * MS - 100 * MS);
        Trace {
            sequence,
            sent: at(sent_ms),
            late_us: None,
            arrivals: arrivals_ms.iter().copied().map(at).collect(),
        }
    }

    #[test]
    fn every_packet_is_in_its_rows_counted_from_the_pause() {
        let packets = PacketLog {
            to_vm: vec![
                // From 100 ms before the pause on.
                trace(0, 0, &[1]),
                trace(1, 90, &[91]),
                trace(2, 110, &[]),
                trace(3, 120, &[150, 151]),
            ],
            from_vm: vec![trace(0, 95, &[95])],
            forgotten: 0,
        };
        let empty = Picture {
            resumed_ms: Some(45.0),
            ..Picture::empty(Strategy::KubeOvn, Topology::Shared)
        };
        let picture = empty.with(&packets, PAUSED);
        let to_vm = Way {
            sent: vec![-10.0, 10.0, 20.0],
            delivered: vec![-9.0, 50.0],
            lost: vec![10.0],
            twice: vec![51.0],
        };
        assert_eq!(picture.to_vm, to_vm);
        assert_eq!(picture.from_vm.delivered, [-5.0]);
        assert_eq!(Some(picture.until_ms), Some(LEAST_MS));
    }

    #[test]
    fn what_lies_on_either_side_of_the_pause_is_put_on_the_right_one() {
        let either = Placed {
            earliest_ns: PAUSED - MS,
            latest_ns: PAUSED + 79 * MS,
        };
        let lost = Trace {
            sequence: 0,
            sent: either,
            late_us: None,
            arrivals: Vec::new(),
        };
        assert_eq!(Way::of(&[lost], PAUSED).lost, [-1.0]);
    }

    #[test]
    fn a_long_blackout_is_shown_to_its_end_but_not_for_ever() {
        let until = |lost_ms: u64| {
            let packets = PacketLog {
                to_vm: vec![trace(0, 100 + lost_ms, &[])],
                ..PacketLog::default()
            };
            let empty = Picture::empty(Strategy::Single, Topology::Routed);
            Some(empty.with(&packets, PAUSED).until_ms)
        };
        assert_eq!(until(700), Some(700.0 + AFTER_MS));
        assert_eq!(until(1_990), Some(MOST_MS));
        assert_eq!(until(60_000), Some(LEAST_MS));
    }
}
