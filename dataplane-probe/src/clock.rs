//! The two kernel clocks the probe uses, and sleeping to an absolute deadline.
//!
//! Pacing and ages use `CLOCK_MONOTONIC`; what is reported as a time of day uses `CLOCK_REALTIME`, because kernel
//! receive timestamps do and because it is what other logs can be lined up with.

use std::time::Duration;

/// Nanoseconds of one second.
pub const SECOND: u64 = 1_000_000_000;
/// Nanoseconds of one millisecond.
pub const MILLISECOND: u64 = 1_000_000;
/// Nanoseconds of one microsecond.
pub const MICROSECOND: u64 = 1_000;

/// `CLOCK_MONOTONIC` in nanoseconds.
pub fn monotonic_ns() -> u64 {
    now(libc::CLOCK_MONOTONIC)
}

/// `CLOCK_REALTIME` in nanoseconds since the epoch.
pub fn realtime_ns() -> u64 {
    now(libc::CLOCK_REALTIME)
}

/// How far the real-time clock is ahead of the monotonic one, in nanoseconds.
///
/// A change of this over a run is a step (or slew) of the wall clock: timestamps taken before and after it cannot be
/// subtracted from each other.
pub fn realtime_offset_ns() -> i64 {
    // The monotonic reading is taken on both sides so that being descheduled in between is halved, not added.
    let before = monotonic_ns();
    let real = realtime_ns();
    let after = monotonic_ns();
    let middle = before + (after - before) / 2;
    real.cast_signed().wrapping_sub(middle.cast_signed())
}

/// Sleeps until `CLOCK_MONOTONIC` reaches `deadline_ns`; returns at once when it has passed.
pub fn sleep_until(deadline_ns: u64) {
    let deadline = libc::timespec {
        tv_sec: i64::try_from(deadline_ns / SECOND).unwrap_or(i64::MAX),
        tv_nsec: i64::try_from(deadline_ns % SECOND).unwrap_or(0),
    };
    loop {
        // SAFETY: `deadline` is a valid timespec, and with TIMER_ABSTIME the remainder is never written.
        let result = unsafe {
            libc::clock_nanosleep(
                libc::CLOCK_MONOTONIC,
                libc::TIMER_ABSTIME,
                &raw const deadline,
                std::ptr::null_mut(),
            )
        };
        if result != libc::EINTR {
            return;
        }
    }
}

/// Nanoseconds of `duration`, saturating after 584 years.
pub fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// Milliseconds of a number of nanoseconds, as reports show them.
pub fn millis(nanoseconds: u64) -> f64 {
    // Rounded to a microsecond: reports would otherwise carry digits that no measurement here can back.
    #[expect(
        clippy::cast_precision_loss,
        reason = "2^53 microseconds are 285 years"
    )]
    let microseconds = (nanoseconds / MICROSECOND) as f64;
    microseconds / 1000.0
}

fn now(clock: libc::clockid_t) -> u64 {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: `time` is a valid place for a timespec; both clocks exist on every Linux, so the call cannot fail.
    unsafe { libc::clock_gettime(clock, &raw mut time) };
    time.tv_sec.cast_unsigned() * SECOND + time.tv_nsec.cast_unsigned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sleeps_until_the_deadline_and_never_less() {
        let deadline = monotonic_ns() + 3 * MILLISECOND;
        sleep_until(deadline);
        assert!(monotonic_ns() >= deadline);
    }

    #[test]
    fn a_deadline_in_the_past_returns() {
        sleep_until(0);
    }

    #[test]
    fn milliseconds_keep_a_microsecond() {
        assert_eq!(millis(137_250_999).to_string(), "137.25");
    }
}
