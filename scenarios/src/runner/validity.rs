//! Whether the guest and the client kept up: where they did not, the figures are theirs and not the network's.
//!
//! A run is valid unless
//! - more packets were sent late than their sender is allowed, outside of the pause and half a second after the guest's wake;
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

/// What a sender is allowed.
#[derive(Clone, Copy)]
struct Allowed {
    /// It may be so late,
    late: Duration,
    /// and later with one packet in so many.
    one_in: u64,
}

/// The client is a thread with real-time priority that waits for nothing.
const CLIENT: Allowed = Allowed {
    late: Duration::from_millis(10),
    one_in: 100,
};
/// The guest's processor is emulated by a thread that shares the machine. Beside compilers that wanted three times the
/// processors that there are it was late with one to five packets in a hundred, and lost none by it; what could not keep up
/// was late with forty.
const GUEST: Allowed = Allowed {
    late: Duration::from_millis(50),
    one_in: 20,
};
/// The guest has come to itself so long after its wake.
const SETTLED: Duration = Duration::from_millis(500);
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
        ("client", &packets.to_vm, 0, CLIENT),
        (
            "guest",
            &packets.from_vm,
            left_out(&measured.from_vm, pause),
            GUEST,
        ),
    ];
    for (who, traces, left_out, allowed) in late {
        let bound = allowed.late;
        let (late, of) = late_outside(traces, bound, pause);
        let (late, of) = (late + left_out, of + left_out);
        if late > of.div_ceil(allowed.one_in) {
            reasons.push(format!(
                "the {who} sent {late} of {of} packets more than {} ms late outside of the pause and {} ms after it",
                bound.as_millis(),
                SETTLED.as_millis()
            ));
            let since_ns = pause.map_or(measured.started_ns, |pause| pause.paused_ns);
            let when = times(traces, bound, since_ns);
            tracing::info!(who, ?when, "late, in ms from the pause or the beginning");
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

/// Whether a time is neither in the pause nor in what follows it.
fn is_outside(at_ns: u64, pause: Option<Pause>) -> bool {
    let Some(Pause {
        paused_ns,
        awake_ns,
    }) = pause
    else {
        return true;
    };
    let settled = |awake_ns: u64| Duration::from_nanos(awake_ns) + SETTLED;
    at_ns < paused_ns || awake_ns.is_some_and(|awake| Duration::from_nanos(at_ns) > settled(awake))
}

/// How many packets were sent later than `bound`, and how many there were, outside of the pause and what follows it.
fn late_outside(traces: &[Trace], bound: Duration, pause: Option<Pause>) -> (u64, u64) {
    let beside_ns = pause.map_or(0, |pause| pause.paused_ns);
    let outside = |trace: &&Trace| is_outside(trace.sent.beside(beside_ns), pause);
    let late_us = traces.iter().filter(outside).filter_map(|it| it.late_us);
    late_us.fold((0, 0), |(late, of), late_us| {
        let is_late = Duration::from_micros(late_us) > bound;
        (late + u64::from(is_late), of + 1)
    })
}

/// How many packets the guest's sender left out because the guest did not run: those of the gaps that the client saw and
/// that the sender's lateness explains, outside of the pause and what follows it. By its own clock alone the sender cannot
/// tell: the clock of a guest that came back to its source was seen to jump by a second while it sent one packet each
/// millisecond.
fn left_out(from_vm: &probe::Direction, pause: Option<Pause>) -> u64 {
    let outside = |gap: &&probe::Gap| {
        is_outside(gap.start_ns, pause) && is_outside(gap.end_ns, pause) && !spans(gap, pause)
    };
    let late_us = from_vm.gaps.iter().filter(outside).map(|gap| {
        // Gaps are of milliseconds to seconds, and never negative.
        let late = Duration::try_from_secs_f64(gap.sender_late_ms / 1_000.0).unwrap_or_default();
        if late > RESCHEDULE {
            u64::try_from(late.as_micros()).unwrap_or(u64::MAX)
        } else {
            0
        }
    });
    late_us.sum::<u64>() / from_vm.period_us.max(1)
}

fn spans(gap: &probe::Gap, pause: Option<Pause>) -> bool {
    pause.is_some_and(|pause| (gap.start_ns..=gap.end_ns).contains(&pause.paused_ns))
}

/// When packets were sent later than `bound`, for whoever wants to know why: from, to, and the latest by how much, in
/// milliseconds. Those that follow within 100 ms are taken together.
fn times(traces: &[Trace], bound: Duration, since_ns: u64) -> Vec<(i64, i64, u64)> {
    const TOGETHER_MS: i64 = 100;
    let mut times: Vec<(i64, i64, u64)> = Vec::new();
    for trace in traces {
        let late_us = trace.late_us.unwrap_or(0);
        if Duration::from_micros(late_us) <= bound {
            continue;
        }
        let at_ms = trace.sent.latest_ns.cast_signed() - since_ns.cast_signed();
        let at_ms = at_ms / 1_000_000;
        match times.last_mut() {
            Some((_, to, latest)) if at_ms - *to <= TOGETHER_MS => {
                *to = at_ms;
                *latest = (*latest).max(late_us / 1_000);
            }
            _ => times.push((at_ms, at_ms, late_us / 1_000)),
        }
    }
    times
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
        assert_eq!(found(on_time(), traces(2_701..3_000, 90), Some(PAUSE)), 1);
        let asleep = Pause {
            awake_ns: None,
            ..PAUSE
        };
        assert_eq!(found(on_time(), traces(2_000..5_000, 90), Some(asleep)), 0);
        assert_eq!(found(on_time(), traces(1_800..2_000, 90), Some(asleep)), 1);
    }

    #[test]
    fn each_sender_may_be_late_with_some_packets_and_not_with_more() {
        let on_time = || traces(0..0, 0);
        assert_eq!(found(traces(0..50, 11), on_time(), None), 0);
        assert_eq!(found(traces(0..51, 11), on_time(), None), 1);
        assert_eq!(found(traces(0..51, 10), on_time(), None), 0);
        assert_eq!(found(on_time(), traces(0..250, 51), None), 0);
        assert_eq!(found(on_time(), traces(0..251, 51), None), 1);
        assert_eq!(found(on_time(), traces(0..251, 50), None), 0);
    }

    #[test]
    fn what_a_guest_that_does_not_run_leaves_out_is_told_by_the_client() {
        let left_out = |start: u64, sender_late_ms, pause| {
            let gap = probe::Gap {
                start_ns: start * MS,
                end_ns: (start + 300) * MS,
                ms: 299.0,
                error_ms: 0.0,
                sender_late_ms,
                open: false,
            };
            let from_vm = probe::Direction {
                gaps: vec![gap],
                ..measured().from_vm
            };
            left_out(&from_vm, pause)
        };
        assert_eq!(left_out(500, 290.0, None), 290);
        // The network's, or what the sender makes up for.
        assert_eq!(left_out(500, 0.3, None), 0);
        assert_eq!(left_out(500, 100.0, None), 0);
        assert_eq!(left_out(500, 290.0, Some(PAUSE)), 290);
        assert_eq!(left_out(1_900, 290.0, Some(PAUSE)), 0);
        assert_eq!(left_out(2_100, 290.0, Some(PAUSE)), 0);
        assert_eq!(left_out(2_701, 290.0, Some(PAUSE)), 290);
        // A clock that jumps makes one packet late, and nobody misses any.
        assert_eq!(found(traces(0..0, 0), traces(0..1, 1_000), None), 0);
    }

    #[test]
    fn it_is_said_when_packets_were_late() {
        let mut late = traces(10..20, 60);
        late[100].late_us = Some(70_000);
        late[300].late_us = Some(80_000);
        let found = times(&late, GUEST.late, 5 * MS);
        assert_eq!(found, [(5, 95, 70), (295, 295, 80)]);
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
