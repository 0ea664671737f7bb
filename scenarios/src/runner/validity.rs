//! Whether the guest and the client kept up: where they did not, the figures are theirs and not the network's.
//!
//! A run is valid unless
//! - more than one packet in a hundred was sent later than its sender is allowed, outside of the pause and half a second
//!   after the guest's wake;
//! - a packet was dropped at either socket, at any time: both hold seconds of packets;
//! - more may have waited in the target's tap during the pause than its queue holds;
//! - the probe has a reason of its own: the reflector could not be asked, a kernel refused to send, the clock was set.
//!
//! A guest that wakes is slow at first: it takes in what waited for it and answers, and where it is emulated, its code has
//! to be translated anew on the target. That is the pause's doing, and takes a few hundred milliseconds.

use std::time::Duration;

use dataplane_probe::packets::{PacketLog, Trace};
use dataplane_probe::reflect::RESCHEDULE;
use dataplane_probe::report as probe;

use crate::lab::TAP_QUEUE;
use crate::report::Pause;

/// How late the client may send: a thread with real-time priority that waits for nothing.
const CLIENT_BOUND: Duration = Duration::from_millis(10);
/// How late the guest may send: its processor is emulated by a thread that shares the machine.
const GUEST_BOUND: Duration = Duration::from_millis(50);
/// The guest has come to itself so long after its wake.
const SETTLED: Duration = Duration::from_millis(500);
/// One packet in so many may be late.
const LATE_ONE_IN: u64 = 100;
/// A pause is taken to be so long at least, for what may wait in a tap.
pub(super) const LONG_PAUSE_MS: u64 = 1_000;

/// Why a flow's figures are not the network's; empty where they are.
pub(super) fn reasons(
    measured: &probe::Report,
    packets: Option<&PacketLog>,
    pause: Option<Pause>,
) -> Vec<String> {
    let mut reasons = measured.reasons.clone();
    let Some(packets) = packets else {
        reasons.push(
            "there is no log of the packets: how late they were sent is not known".to_owned(),
        );
        return reasons;
    };
    let late = [
        ("client", &packets.to_vm, CLIENT_BOUND),
        ("guest", &packets.from_vm, GUEST_BOUND),
    ];
    for (who, traces, bound) in late {
        let (late, of) = late_outside(traces, measured.to_vm.period_us, bound, pause);
        if late > of.div_ceil(LATE_ONE_IN) {
            reasons.push(format!(
                "the {who} sent {late} of {of} packets more than {} ms late outside of the pause and {} ms after it",
                bound.as_millis(),
                SETTLED.as_millis()
            ));
        }
    }
    reasons
}

/// Why more may have waited in the target's tap than its queue holds, at so many packets a second over all flows.
pub(super) fn overfull(rate_hz: u32, pause: Option<Pause>) -> Option<String> {
    let pause_ms = pause.and_then(|pause| pause.awake_ns?.checked_sub(pause.paused_ns));
    let pause_ms = pause_ms.map_or(0, |nanos| nanos / 1_000_000);
    let waiting = waiting(rate_hz, pause_ms);
    (waiting >= TAP_QUEUE.into()).then(|| {
        format!(
            "{waiting} frames may have come for the guest while it slept for {pause_ms} ms, and its tap holds {TAP_QUEUE}"
        )
    })
}

/// How many frames come for a guest that sleeps: its packets, the records of its streams and attempts to connect.
pub(super) const fn waiting(rate_hz: u32, pause_ms: u64) -> u64 {
    rate_hz as u64 * 5 / 4 * pause_ms / 1_000
}

/// How many packets were sent later than `bound`, and how many there were, outside of the pause and what follows it.
fn late_outside(
    traces: &[Trace],
    period_us: u64,
    bound: Duration,
    pause: Option<Pause>,
) -> (u64, u64) {
    let outside = |trace: &&Trace| {
        let Some(Pause {
            paused_ns,
            awake_ns,
        }) = pause
        else {
            return true;
        };
        let sent_ns = trace.sent.beside(paused_ns);
        let settled = |awake_ns: u64| Duration::from_nanos(awake_ns) + SETTLED;
        sent_ns < paused_ns
            || awake_ns.is_some_and(|awake| Duration::from_nanos(sent_ns) > settled(awake))
    };
    let (mut late, mut of) = (0, 0);
    for trace in traces.iter().filter(outside) {
        let Some(late_us) = trace.late_us else {
            continue;
        };
        // Those that the guest's sender left out because of it would have been as late.
        let left_out = if Duration::from_micros(late_us) > RESCHEDULE {
            late_us / period_us.max(1)
        } else {
            0
        };
        of += 1 + left_out;
        if Duration::from_micros(late_us) > bound {
            late += 1 + left_out;
        }
    }
    (late, of)
}

#[cfg(test)]
mod tests {
    use dataplane_probe::packets::Placed;

    use super::*;
    use crate::report::samples::measured;

    const MS: u64 = 1_000_000;
    const PAUSE: Pause = Pause {
        paused_ns: 2_000 * MS,
        awake_ns: Some(2_200 * MS),
    };

    /// Five seconds of packets, one each millisecond, of which those sent in `late` were late by so many milliseconds.
    fn traces(late: std::ops::Range<u64>, late_ms: u64) -> Vec<Trace> {
        let trace = |at: u64| Trace {
            sequence: at,
            sent: Placed::at(at * MS),
            late_us: Some(if late.contains(&at) {
                late_ms * 1_000
            } else {
                20
            }),
            arrivals: Vec::new(),
        };
        (0..5_000).map(trace).collect()
    }

    fn found(to_vm: Vec<Trace>, from_vm: Vec<Trace>, pause: Option<Pause>) -> usize {
        let log = PacketLog {
            to_vm,
            from_vm,
            forgotten: 0,
        };
        reasons(&measured(), Some(&log), pause).len()
    }

    #[test]
    fn a_pause_and_what_follows_it_make_no_run_invalid() {
        let on_time = || traces(0..0, 0);
        assert_eq!(found(on_time(), traces(2_000..2_701, 90), Some(PAUSE)), 0);
        assert_eq!(found(on_time(), traces(2_000..2_701, 90), None), 1);
        assert_eq!(found(on_time(), traces(2_701..2_760, 90), Some(PAUSE)), 1);
        let asleep = Pause {
            awake_ns: None,
            ..PAUSE
        };
        assert_eq!(found(on_time(), traces(2_000..5_000, 90), Some(asleep)), 0);
        assert_eq!(found(on_time(), traces(1_900..2_000, 90), Some(asleep)), 1);
    }

    #[test]
    fn each_sender_has_a_bound_and_one_packet_in_a_hundred_may_exceed_it() {
        let on_time = || traces(0..0, 0);
        assert_eq!(found(traces(0..50, 11), on_time(), None), 0);
        assert_eq!(found(traces(0..51, 11), on_time(), None), 1);
        assert_eq!(found(traces(0..51, 10), on_time(), None), 0);
        assert_eq!(found(on_time(), traces(0..51, 50), None), 0);
        assert_eq!(found(on_time(), traces(0..51, 51), None), 1);
        // One packet after a tenth of a second in which the guest did not run stands for all that it left out.
        assert_eq!(found(on_time(), traces(0..1, 101), None), 1);
    }

    #[test]
    fn what_the_probe_says_counts_and_without_a_log_nothing_is_known() {
        let mut complaining = measured();
        complaining.reasons = vec!["the reflector dropped 7 packets at its own socket".to_owned()];
        let log = PacketLog {
            to_vm: traces(0..0, 0),
            ..PacketLog::default()
        };
        assert_eq!(reasons(&complaining, Some(&log), None), complaining.reasons);
        assert_eq!(reasons(&measured(), None, None).len(), 1);
    }

    #[test]
    fn what_waits_in_the_tap_stays_below_its_queue() {
        let pause = |ms| {
            Some(Pause {
                paused_ns: MS,
                awake_ns: Some(MS + ms * MS),
            })
        };
        assert_eq!(overfull(1_000, pause(3_199)), None);
        assert!(overfull(1_000, pause(3_200)).is_some());
        assert_eq!(overfull(500, pause(3_200)), None);
        assert_eq!(overfull(1_000, None), None);
    }
}
