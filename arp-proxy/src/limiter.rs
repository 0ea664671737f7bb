//! How often a source is answered.

use std::collections::HashMap;
use std::num::NonZeroU32;
use std::time::{Duration, Instant};

use crate::Mac;

/// How many answers a source gets. Each watched interface keeps its own account.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Answers a second, in the long run, to one source.
    pub rate: NonZeroU32,
    /// Answers at once to a source that has been silent.
    pub burst: NonZeroU32,
    /// Sources that an account is kept of; those beyond share one.
    pub sources: usize,
}

/// A token bucket per source.
///
/// # Guarantees
/// - Memory is bounded by [`Limits::sources`], and a source whose bucket is full again takes none.
/// - A flood from made-up sources gets the answers of all accounts there are and one more, and takes nothing away from
///   a source that has its account already.
#[derive(Debug)]
pub struct Limiter {
    /// Between two tokens.
    period: Duration,
    /// How far ahead of its rate a source may be.
    tolerance: Duration,
    sources: usize,
    accounts: HashMap<Mac, Account>,
    shared: Account,
    /// When the table was last rid of those that no longer count.
    swept: Option<Instant>,
}

/// When the bucket will be full again: all of a token bucket that there is to remember.
#[derive(Clone, Copy, Debug, Default)]
struct Account {
    full_at: Option<Instant>,
}

impl Limiter {
    /// With all buckets full.
    pub fn new(limits: Limits) -> Self {
        let period = Duration::from_secs(1) / limits.rate.get();
        Self {
            period,
            tolerance: period * (limits.burst.get() - 1),
            sources: limits.sources,
            accounts: HashMap::new(),
            shared: Account::default(),
            swept: None,
        }
    }

    /// Whether `source` may have an answer now, which is then counted. `now` never goes back.
    pub fn allows(&mut self, source: Mac, now: Instant) -> bool {
        let (period, tolerance) = (self.period, self.tolerance);
        if !self.accounts.contains_key(&source) && self.accounts.len() >= self.sources {
            self.sweep(now);
            if self.accounts.len() >= self.sources {
                return self.shared.take(now, period, tolerance);
            }
        }
        let account = self.accounts.entry(source).or_default();
        account.take(now, period, tolerance)
    }

    /// Forgets those who would get a full bucket anyway; not more often than the table can have changed much, as it
    /// looks at all of it.
    fn sweep(&mut self, now: Instant) {
        let pause = self.tolerance + self.period;
        let recently = self
            .swept
            .is_some_and(|swept| now.saturating_duration_since(swept) < pause);
        if !recently {
            self.swept = Some(now);
            self.accounts
                .retain(|_, account| account.full_at.is_some_and(|full_at| full_at > now));
        }
    }
}

impl Default for Limits {
    /// More than any guest in good health asks for, and little enough work that a guest in bad health harms nobody.
    fn default() -> Self {
        const RATE: NonZeroU32 = NonZeroU32::new(50).unwrap();
        const BURST: NonZeroU32 = NonZeroU32::new(100).unwrap();
        Self {
            rate: RATE,
            burst: BURST,
            sources: 4096,
        }
    }
}

impl Account {
    fn take(&mut self, now: Instant, period: Duration, tolerance: Duration) -> bool {
        let full_at = self.full_at.map_or(now, |full_at| full_at.max(now));
        let allowed = full_at.saturating_duration_since(now) <= tolerance;
        if allowed {
            self.full_at = Some(full_at + period);
        }
        allowed
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn limits(rate: u32, burst: u32, sources: usize) -> Limits {
        Limits {
            rate: NonZeroU32::new(rate).unwrap(),
            burst: NonZeroU32::new(burst).unwrap(),
            sources,
        }
    }

    fn mac(number: u32) -> Mac {
        let [a, b, c, d] = number.to_be_bytes();
        pnet_base::MacAddr(2, 0, a, b, c, d)
    }

    fn allowed(limiter: &mut Limiter, source: u32, now: Instant, times: u32) -> u32 {
        let outcomes = (0..times).map(|_| u32::from(limiter.allows(mac(source), now)));
        outcomes.sum()
    }

    #[test]
    fn a_burst_and_then_the_rate() {
        let mut limiter = Limiter::new(limits(10, 5, 100));
        let start = Instant::now();
        assert_eq!(allowed(&mut limiter, 1, start, 20), 5);
        assert_eq!(
            allowed(&mut limiter, 1, start + Duration::from_millis(250), 20),
            2
        );
        assert_eq!(
            allowed(&mut limiter, 1, start + Duration::from_mins(1), 20),
            5
        );
    }

    #[test]
    fn sources_do_not_pay_for_each_other() {
        let mut limiter = Limiter::new(limits(10, 5, 100));
        let start = Instant::now();
        assert_eq!(allowed(&mut limiter, 1, start, 20), 5);
        assert_eq!(allowed(&mut limiter, 2, start, 20), 5);
    }

    #[test]
    fn made_up_sources_share_one_account_and_leave_the_others_theirs() {
        let mut limiter = Limiter::new(limits(10, 5, 3));
        let start = Instant::now();
        for source in 0..3 {
            assert!(limiter.allows(mac(source), start));
        }
        let flood: u32 = (100..1100)
            .map(|source| allowed(&mut limiter, source, start, 1))
            .sum();
        assert_eq!(flood, 5);
        assert_eq!(allowed(&mut limiter, 1, start, 20), 4);
        assert_eq!(limiter.accounts.len(), 3);
    }

    #[test]
    fn silent_sources_make_room() {
        let mut limiter = Limiter::new(limits(10, 5, 3));
        let start = Instant::now();
        for source in 0..10 {
            limiter.allows(mac(source), start);
        }
        let later = start + Duration::from_secs(10);
        assert_eq!(allowed(&mut limiter, 50, later, 20), 5);
        assert_eq!(allowed(&mut limiter, 51, later, 20), 5);
        assert_eq!(limiter.accounts.len(), 2);
    }

    proptest! {
        /// Over any stretch a source gets no more than its burst and its rate, and never less when it keeps below.
        #[test]
        fn no_source_exceeds_its_rate(
            rate in 1_u32..1000,
            burst in 1_u32..50,
            gaps in prop::collection::vec(0_u64..200, 1..200),
        ) {
            let mut limiter = Limiter::new(limits(rate, burst, 10));
            let start = Instant::now();
            let (mut now, mut taken) = (start, 0_u32);
            for gap in gaps {
                now += Duration::from_millis(gap);
                taken += u32::from(limiter.allows(mac(1), now));
            }
            let earned = (now - start).as_secs_f64() * f64::from(rate);
            prop_assert!(f64::from(taken) <= f64::from(burst) + earned + 1e-3);
        }

        #[test]
        fn who_keeps_to_the_rate_is_always_answered(rate in 1_u32..1000, count in 1_u32..100) {
            let mut limiter = Limiter::new(limits(rate, 1, 10));
            let start = Instant::now();
            let period = Duration::from_secs(1) / rate;
            for index in 0..count {
                prop_assert!(limiter.allows(mac(1), start + period * index));
            }
        }

        #[test]
        fn the_table_never_outgrows_its_bound(sources in prop::collection::vec(any::<u32>(), 0..300), bound in 0_usize..50) {
            let mut limiter = Limiter::new(limits(10, 5, bound));
            let now = Instant::now();
            for source in sources {
                limiter.allows(mac(source), now);
                prop_assert!(limiter.accounts.len() <= bound);
            }
        }
    }
}
