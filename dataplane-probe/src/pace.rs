//! Open-loop pacing: absolute deadlines, and how late they were met.

use hdrhistogram::Histogram;

use crate::clock::{MICROSECOND, SECOND};
use crate::report::Lateness;

/// The largest lateness told apart, in µs: one hour.
const MAX_LATE_US: u64 = 3_600_000_000;

/// Deadlines at a fixed rate. A late one moves no other: the sender catches up, and no sequence number is skipped.
#[derive(Debug, Clone, Copy)]
pub struct Schedule {
    start_ns: u64,
    period_ns: u64,
}

/// How late deadlines were met, in µs.
#[derive(Debug, Clone)]
pub struct LatenessLog {
    histogram: Histogram<u64>,
    bound_us: u64,
    over_bound: u64,
}

/// An empty histogram of microseconds, from 1 µs to an hour, with three significant digits.
#[expect(
    clippy::missing_panics_doc,
    clippy::expect_used,
    reason = "the bounds are constants that the crate accepts"
)]
pub fn histogram_us() -> Histogram<u64> {
    Histogram::new_with_bounds(1, MAX_LATE_US, 3).expect("1 µs to an hour with three digits")
}

/// Saturates a number of nanoseconds into microseconds as packets carry them, leaving out the value that says "none".
pub fn micros_u32(nanoseconds: u64) -> u32 {
    u32::try_from(nanoseconds / MICROSECOND)
        .unwrap_or(u32::MAX)
        .min(u32::MAX - 1)
}

/// The period of a rate, in nanoseconds.
pub fn period_ns(rate_hz: u32) -> u64 {
    SECOND / u64::from(rate_hz.max(1))
}

impl Schedule {
    /// Deadlines at `start_ns`, `start_ns + period_ns`, …
    pub fn new(start_ns: u64, period_ns: u64) -> Self {
        Self {
            start_ns,
            period_ns,
        }
    }

    /// When packet `sequence` is due.
    pub fn due_ns(&self, sequence: u64) -> u64 {
        self.start_ns + sequence * self.period_ns
    }

    /// Moves everything from now on by `by_ns`.
    pub fn postpone(&mut self, by_ns: u64) {
        self.start_ns += by_ns;
    }
}

impl LatenessLog {
    /// Counts separately what was later than `bound_us`.
    pub fn new(bound_us: u64) -> Self {
        Self {
            histogram: histogram_us(),
            bound_us,
            over_bound: 0,
        }
    }

    /// Enters one deadline, met `late_us` late, `times` times.
    pub fn record_n(&mut self, late_us: u64, times: u64) {
        self.histogram.saturating_record_n(late_us, times);
        if late_us > self.bound_us {
            self.over_bound += times;
        }
    }

    /// As reports show it.
    pub fn report(&self) -> Lateness {
        Lateness {
            p50_us: self.histogram.value_at_quantile(0.5),
            p99_us: self.histogram.value_at_quantile(0.99),
            p999_us: self.histogram.value_at_quantile(0.999),
            max_us: self.histogram.max(),
            bound_us: self.bound_us,
            over_bound: self.over_bound,
            ..Lateness::default()
        }
    }

    /// The whole distribution.
    pub fn histogram(&self) -> &Histogram<u64> {
        &self.histogram
    }
}

impl Extend<(u64, u64)> for LatenessLog {
    /// Enters pairs of lateness in µs and how often.
    fn extend<I: IntoIterator<Item = (u64, u64)>>(&mut self, pairs: I) {
        pairs
            .into_iter()
            .for_each(|(late_us, times)| self.record_n(late_us, times));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_late_packet_moves_no_other() {
        let schedule = Schedule::new(1_000, 100);
        assert_eq!(
            (0..3)
                .map(|sequence| schedule.due_ns(sequence))
                .collect::<Vec<_>>(),
            [1_000, 1_100, 1_200]
        );
    }

    #[test]
    fn lateness_beyond_the_bound_is_counted() {
        let mut log = LatenessLog::new(10_000);
        log.extend([(5, 998), (10_000, 1), (25_000, 1)]);
        let report = log.report();
        assert_eq!((report.over_bound, report.p50_us), (1, 5));
        assert!(report.max_us.abs_diff(25_000) <= 25);
    }

    #[test]
    fn none_is_never_produced_by_saturation() {
        assert_eq!(micros_u32(u64::MAX), u32::MAX - 1);
        assert_eq!(micros_u32(1_999), 1);
    }
}
