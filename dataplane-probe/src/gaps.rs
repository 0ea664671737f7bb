//! The longest gaps between arrivals.

use serde::{Deserialize, Serialize};

/// How many of the longest gaps are kept one by one.
pub const KEPT_GAPS: usize = 64;

/// A stretch of time without an arrival, from one arrival to the next, in nanoseconds of whatever clock it was taken on.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Interval {
    /// The arrival before it.
    pub start_ns: u64,
    /// The arrival that ended it, or the end of the measurement.
    pub end_ns: u64,
    /// By how much it may really have been shorter than `end_ns - start_ns`, beyond the method's resolution.
    pub error_ns: u64,
    /// How late the packet that ended it had been sent: this much of the gap is the sender's.
    pub sender_late_us: u32,
    /// No arrival ended it.
    pub open: bool,
}

impl Interval {
    /// From arrival to arrival.
    pub fn length_ns(&self) -> u64 {
        self.end_ns.saturating_sub(self.start_ns)
    }
}

/// Keeps the [`KEPT_GAPS`] longest intervals.
///
/// Intervals up to `floor_ns` are kept only while nothing longer is known: they are the rhythm itself, not a gap.
#[derive(Debug, Clone)]
pub struct Longest {
    floor_ns: u64,
    kept: Vec<Interval>,
    below: Option<Interval>,
}

impl Longest {
    /// Intervals of at most `floor_ns` are taken for the rhythm of the stream.
    pub fn above(floor_ns: u64) -> Self {
        Self {
            floor_ns,
            kept: Vec::new(),
            below: None,
        }
    }

    /// Enters an interval.
    pub fn push(&mut self, interval: Interval) {
        if interval.length_ns() <= self.floor_ns {
            if self
                .below
                .is_none_or(|below| below.length_ns() < interval.length_ns())
            {
                self.below = Some(interval);
            }
        } else if self.kept.len() < KEPT_GAPS {
            self.kept.push(interval);
        } else if let Some(shortest) = self.kept.iter_mut().min_by_key(|kept| kept.length_ns())
            && shortest.length_ns() < interval.length_ns()
        {
            *shortest = interval;
        }
    }

    /// Leaves out intervals that may not have been at all, where a surer one of that time is longer or as good as.
    ///
    /// That is what an arrival leaves behind that may have been at either end of a pause.
    pub fn drop_doubtful(&mut self) {
        let doubtful =
            |gap: &Interval| gap.length_ns().saturating_sub(gap.error_ns) <= self.floor_ns;
        let floor_ns = self.floor_ns;
        let surer = |gap: &Interval, other: &Interval| {
            let overlap = other.start_ns < gap.end_ns && gap.start_ns < other.end_ns;
            overlap
                && other.length_ns() + floor_ns > gap.length_ns()
                && other.error_ns < gap.error_ns
        };
        let kept = self.kept.clone();
        self.kept
            .retain(|gap| !doubtful(gap) || !kept.iter().any(|other| surer(gap, other)));
    }

    /// The longest interval of all.
    pub fn longest(&self) -> Option<Interval> {
        // The first of equals: `max_by_key` would give the last.
        self.kept
            .iter()
            .rev()
            .max_by_key(|kept| kept.length_ns())
            .copied()
            .or(self.below)
    }

    /// Intervals above the floor, in order of time.
    pub fn kept(&self) -> Vec<Interval> {
        let mut kept = self.kept.clone();
        kept.sort_by_key(|interval| interval.start_ns);
        kept
    }

    /// No interval that is not among [`Longest::kept`] is longer than this.
    pub fn unkept_bound_ns(&self) -> u64 {
        if self.kept.len() < KEPT_GAPS {
            return self.floor_ns;
        }
        self.kept
            .iter()
            .map(Interval::length_ns)
            .min()
            .unwrap_or(self.floor_ns)
    }
}

/// Turns arrival times, all taken on one clock, into gaps.
#[derive(Debug, Clone)]
pub struct Arrivals {
    last_ns: Option<u64>,
    longest: Longest,
}

impl Arrivals {
    /// For a stream that should arrive every `period_ns`: intervals of more than two are gaps.
    pub fn every(period_ns: u64) -> Self {
        Self::above(period_ns * 2)
    }

    /// Intervals above `floor_ns` are gaps.
    pub fn above(floor_ns: u64) -> Self {
        Self {
            last_ns: None,
            longest: Longest::above(floor_ns),
        }
    }

    /// Counts from `start_ns` although nothing arrived then: what should have been first was lost.
    pub fn expected_since(&mut self, start_ns: u64) {
        self.last_ns.get_or_insert(start_ns);
    }

    /// Enters an arrival; returns the time since the one before.
    pub fn arrived(&mut self, at_ns: u64, sender_late_us: u32) -> Option<u64> {
        let before = self.last_ns.replace(at_ns)?;
        let interval = Interval {
            start_ns: before,
            end_ns: at_ns,
            sender_late_us,
            ..Interval::default()
        };
        self.longest.push(interval);
        Some(interval.length_ns())
    }

    /// Nothing arrived from the last arrival to `end_ns`, although it should have.
    pub fn missing_until(&mut self, end_ns: u64) {
        if let Some(start_ns) = self.last_ns {
            self.longest.push(Interval {
                start_ns,
                end_ns,
                open: true,
                ..Interval::default()
            });
        }
    }

    /// The newest arrival.
    pub fn last_ns(&self) -> Option<u64> {
        self.last_ns
    }

    /// The gaps.
    pub fn longest(&self) -> &Longest {
        &self.longest
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lengths(longest: &Longest) -> Vec<u64> {
        longest.kept().iter().map(Interval::length_ns).collect()
    }

    #[test]
    fn the_longest_gap_has_its_begin_and_end() {
        let mut arrivals = Arrivals::every(10);
        for at in [100, 110, 120, 270, 280] {
            arrivals.arrived(at, 0);
        }
        let longest = arrivals.longest().longest().expect("there were arrivals");
        assert_eq!(
            (longest.start_ns, longest.end_ns, longest.open),
            (120, 270, false)
        );
        assert_eq!(lengths(arrivals.longest()), [150]);
    }

    #[test]
    fn a_quiet_run_still_has_a_longest_interval() {
        let mut arrivals = Arrivals::every(10);
        for at in [100, 110, 121, 130] {
            arrivals.arrived(at, 0);
        }
        assert_eq!(
            arrivals.longest().longest().map(|gap| gap.length_ns()),
            Some(11)
        );
        assert!(lengths(arrivals.longest()).is_empty());
    }

    #[test]
    fn an_outage_that_never_ends_counts_to_the_end() {
        let mut arrivals = Arrivals::every(10);
        arrivals.arrived(100, 0);
        arrivals.arrived(110, 0);
        arrivals.missing_until(500);
        let longest = arrivals.longest().longest().expect("there were arrivals");
        assert_eq!((longest.length_ns(), longest.open), (390, true));
    }

    #[test]
    fn an_outage_from_the_start_counts_from_the_start() {
        let mut arrivals = Arrivals::every(10);
        arrivals.expected_since(0);
        arrivals.arrived(200, 0);
        assert_eq!(
            arrivals.longest().longest().map(|gap| gap.length_ns()),
            Some(200)
        );
    }

    #[test]
    fn a_doubtful_interval_gives_way_to_a_surer_one_that_is_as_long() {
        let interval = |start_ns, end_ns, error_ns| Interval {
            start_ns,
            end_ns,
            error_ns,
            ..Interval::default()
        };
        let (sure, doubtful) = (interval(100, 300, 5), interval(99, 305, 200));
        let (later, longer) = (interval(400, 500, 99), interval(200, 900, 690));
        let mut longest = Longest::above(20);
        for interval in [sure, doubtful, later] {
            longest.push(interval);
        }
        longest.drop_doubtful();
        assert_eq!(longest.kept(), [sure, later]);
        longest.push(longer);
        longest.drop_doubtful();
        assert_eq!(
            longest.kept(),
            [sure, longer, later],
            "an upper bound is never left out"
        );
    }

    #[test]
    fn the_shortest_make_room() {
        let mut longest = Longest::above(0);
        for length in 1..=(KEPT_GAPS as u64 + 3) {
            longest.push(Interval {
                end_ns: length,
                ..Interval::default()
            });
        }
        assert_eq!(longest.kept().len(), KEPT_GAPS);
        assert_eq!(longest.unkept_bound_ns(), 4);
    }
}
