//! From the probe's figures to the report's.

use dataplane_probe::packets::Trace;
use dataplane_probe::report as probe;
use serde::{Deserialize, Serialize};

use super::{Losses, Places};

/// What happened to the packets of one direction.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Direction {
    /// Time between two packets.
    pub period_us: u64,
    /// Packets sent.
    pub sent: u64,
    /// Different packets received.
    pub received: u64,
    /// Packets that the network lost: those never received, but for what the receiver's own socket dropped.
    pub lost: u64,
    /// Where those that were never received were lost.
    #[serde(default)]
    pub losses: Losses,
    /// The longest run of consecutive losses.
    pub longest_loss_ms: f64,
    /// Copies beyond the first.
    pub duplicated: u64,
    /// Packets that came after a newer one.
    pub reordered: u64,
    /// The longest time between two arrivals, less one period. Null if nothing arrived.
    pub service_gap_ms: Option<f64>,
}

impl Direction {
    /// Of a direction of the probe's, given what became of each packet and what is known of the migration.
    pub(crate) fn of(measured: &probe::Direction, packets: &[Trace], places: Places) -> Self {
        let losses = Losses::of(measured, packets, places);
        Self {
            period_us: measured.period_us,
            sent: measured.sent,
            received: measured.received,
            lost: losses.by_network(),
            losses,
            longest_loss_ms: measured.longest_loss_ms,
            duplicated: measured.duplicated,
            reordered: measured.reordered,
            service_gap_ms: measured.service_gap_ms,
        }
    }

    /// How many packets are sent in so many milliseconds: what a bound in time allows at this rate. Of no time none, else
    /// one at least.
    #[expect(
        clippy::cast_precision_loss,
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "bounds are far below 2^52 packets, and never negative here"
    )]
    pub(crate) fn packets_in(&self, ms: f64) -> u64 {
        if ms <= 0.0 {
            return 0;
        }
        // Not a packet less because of how a fraction is rounded.
        let packets = ms * 1_000.0 / self.period_us.max(1) as f64 + 1e-6;
        (packets as u64).max(1)
    }
}

/// When the guest did not run, in nanoseconds of Unix time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pause {
    /// It paused.
    pub paused_ns: u64,
    /// It sent its first frame after that; where it came back to the source, it resumed. None where it did neither.
    pub awake_ns: Option<u64>,
}

/// The long TCP stream.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Tcp {
    /// It was never broken, and everything sent came back.
    pub survived: bool,
    /// What broke it, in the probe's words.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// The longest time without data, less one period.
    pub longest_stall_ms: f64,
    /// The longest of those that the pause lies in or touches, until the guest's wake. Null without a pause.
    #[serde(default)]
    pub stall_ms: Option<f64>,
    /// The longest of all others.
    #[serde(default)]
    pub longest_stall_elsewhere_ms: f64,
    /// `stall_ms` less the pause and the guest's wake; not clamped.
    #[serde(default)]
    pub added_ms: Option<f64>,
    /// Segments retransmitted, both directions.
    pub retransmits: u64,
}

impl Tcp {
    /// Of a run of the probe; nothing at all where it was switched off.
    pub(crate) fn of(measured: &probe::Report, pause: Option<Pause>) -> Self {
        let Some(measured) = &measured.tcp else {
            return Self::default();
        };
        let (around, elsewhere): (Vec<_>, Vec<_>) = measured
            .gaps
            .iter()
            .partition(|gap| pause.is_some_and(|pause| pause.touches(gap)));
        let longest = |gaps: Vec<&probe::Gap>| gaps.iter().map(|gap| gap.ms).fold(0.0, f64::max);
        let stall_ms = pause.map(|_| longest(around));
        Self {
            survived: measured.survived,
            error: measured.error.clone(),
            longest_stall_ms: measured.longest_stall_ms,
            stall_ms,
            longest_stall_elsewhere_ms: longest(elsewhere),
            added_ms: pause
                .and_then(Pause::ms)
                .zip(stall_ms)
                .map(|(pause_ms, stall_ms)| stall_ms - pause_ms),
            retransmits: measured.retransmits,
        }
    }
}

impl Pause {
    /// From the pause to the guest's wake.
    fn ms(self) -> Option<f64> {
        Some(ratio(self.awake_ns?.checked_sub(self.paused_ns)?, 1e6))
    }

    fn touches(self, gap: &probe::Gap) -> bool {
        gap.end_ns >= self.paused_ns && self.awake_ns.is_none_or(|awake| gap.start_ns <= awake)
    }
}

/// New TCP connections.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NewConnections {
    /// Connections attempted.
    pub attempted: u64,
    /// Connections not answered in time.
    pub failed: u64,
}

impl NewConnections {
    /// Of a run of the probe; nothing at all where it was switched off.
    pub(crate) fn of(measured: &probe::Report) -> Self {
        measured
            .new_connections
            .as_ref()
            .map(Into::into)
            .unwrap_or_default()
    }
}

impl From<&probe::NewConnections> for NewConnections {
    fn from(measured: &probe::NewConnections) -> Self {
        Self {
            attempted: measured.attempted,
            failed: measured.failed,
        }
    }
}

/// The hypervisor's own part of an interruption, in nanoseconds of Unix time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Interruption {
    /// The guest paused.
    pub paused_ns: u64,
    /// The guest resumed.
    pub resumed_ns: u64,
    /// The guest's first frame after it resumed.
    pub first_frame_ns: u64,
    /// The first of the probe's packets among them.
    pub first_packet_ns: Option<u64>,
}

/// What the network added: N = G − P − W, the larger of both directions, with G the longest gap
/// between arrivals that the pause lies in or touches. Returns N and its error: a period, and what
/// the probe says its gap may be off by.
///
/// Gaps elsewhere are not the migration's: on a busy machine the longest of a run may be one. From
/// the guest, W lasts until the first of the probe's packets is on the target's tap: a guest that
/// wakes answers what waits for it first, and until its sender comes to its turn the network has
/// nothing to carry. Where the probe says that a sender was later than that, its word counts.
pub fn network_added_ms(
    to_vm: &probe::Direction,
    from_vm: &probe::Direction,
    interruption: Interruption,
) -> Option<(f64, f64)> {
    let Interruption {
        paused_ns,
        resumed_ns,
        first_frame_ns,
        first_packet_ns,
    } = interruption;
    let pause_ms = ratio(resumed_ns.checked_sub(paused_ns)?, 1e6);
    let wake_ms = ratio(first_frame_ns.checked_sub(resumed_ns)?, 1e6);
    let touches = |gap: &&probe::Gap| gap.start_ns <= resumed_ns && gap.end_ns >= paused_ns;
    let packet_ms = first_packet_ns.and_then(|at| at.checked_sub(resumed_ns));
    let packet_ms = packet_ms.map_or(wake_ms, |nanos| ratio(nanos, 1e6));
    let added = |(direction, wake_ms): (&probe::Direction, f64)| {
        let gaps = direction.gaps.iter().filter(touches);
        let gap = gaps.max_by(|one, other| one.ms.total_cmp(&other.ms))?;
        let added = gap.ms - pause_ms - wake_ms.max(gap.sender_late_ms);
        Some((added, ratio(direction.period_us, 1e3) + gap.error_ms))
    };
    [(to_vm, wake_ms), (from_vm, packet_ms)]
        .into_iter()
        .filter_map(added)
        .max_by(|(one, _), (other, _)| one.total_cmp(other))
}

#[allow(
    clippy::cast_precision_loss,
    reason = "durations of a migration are far below 2^52 of their units"
)]
fn ratio(value: u64, unit: f64) -> f64 {
    value as f64 / unit
}

#[cfg(test)]
mod tests {
    use super::super::samples::measured;
    use super::*;

    const MS: u64 = 1_000_000;

    fn direction(gaps: &[(u64, u64)]) -> probe::Direction {
        let gaps = gaps.iter().map(|&(start, end)| probe::Gap {
            start_ns: start * MS,
            end_ns: end * MS,
            ms: ratio(end - start - 1, 1.0),
            error_ms: 0.5,
            sender_late_ms: 0.0,
            open: false,
        });
        probe::Direction {
            period_us: 1_000,
            gaps: gaps.collect(),
            ..probe::Direction::default()
        }
    }

    #[test]
    fn the_gap_around_the_pause_counts_and_nothing_is_clamped() {
        let interruption = Interruption {
            paused_ns: 1_000 * MS,
            resumed_ns: 1_050 * MS,
            first_frame_ns: 1_060 * MS,
            first_packet_ns: Some(1_062 * MS),
        };
        let added = |to_vm: &[(u64, u64)], from_vm: &[(u64, u64)]| {
            network_added_ms(&direction(to_vm), &direction(from_vm), interruption)
        };
        assert_eq!(added(&[(999, 1_061)], &[(999, 1_075)]), Some((13.0, 1.5)));
        assert_eq!(added(&[(999, 1_059)], &[]), Some((-1.0, 1.5)));
        let elsewhere = (2_000, 2_500);
        assert_eq!(added(&[elsewhere, (1_000, 1_061)], &[]), Some((0.0, 1.5)));
        assert_eq!(added(&[elsewhere], &[]), None);
    }

    #[test]
    fn the_stall_around_the_pause_is_told_from_those_elsewhere() {
        let of = |gaps: &[(u64, u64)], pause| {
            let mut measured = measured();
            measured.tcp = Some(probe::Tcp {
                gaps: direction(gaps).gaps,
                ..probe::Tcp::default()
            });
            let tcp = Tcp::of(&measured, pause);
            (tcp.stall_ms, tcp.longest_stall_elsewhere_ms, tcp.added_ms)
        };
        let pause = Pause {
            paused_ns: 1_000 * MS,
            awake_ns: Some(1_060 * MS),
        };
        let gaps = [(300, 701), (995, 1_086), (1_060, 1_081), (1_061, 1_300)];
        assert_eq!(of(&gaps, Some(pause)), (Some(90.0), 400.0, Some(30.0)));
        assert_eq!(of(&gaps, None), (None, 400.0, None));
        assert_eq!(of(&gaps[..1], Some(pause)), (Some(0.0), 400.0, Some(-60.0)));
        let asleep = Pause {
            awake_ns: None,
            ..pause
        };
        assert_eq!(of(&gaps, Some(asleep)), (Some(238.0), 400.0, None));
    }

    #[test]
    fn a_bound_in_time_is_one_in_packets_at_any_rate() {
        let at = |period_us, ms| {
            let direction = Direction {
                period_us,
                ..Direction::default()
            };
            direction.packets_in(ms)
        };
        assert_eq!((at(1_000, 3.85), at(1_000, 50.0)), (3, 50));
        assert_eq!((at(4_000, 3.85), at(4_000, 50.0)), (1, 12));
        assert_eq!((at(10_000, 3.0), at(10_000, 0.0)), (1, 0));
        assert_eq!(at(1_000, 0.3 * 10.0), 3);
    }
}
