//! Instants as they go over the wire.

use std::fmt;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

const SECOND: u64 = 1_000_000_000;

/// Nanoseconds of Unix time, on this node's clock.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Nanos(pub u64);

impl Nanos {
    /// Now.
    pub fn now() -> Self {
        let since = SystemTime::now().duration_since(UNIX_EPOCH);
        // A clock before 1970 has never been set.
        Self::from_duration(since.unwrap_or_default())
    }

    /// So many seconds and nanoseconds after 1970 began; none after the year 2554, where 64 bits end.
    pub fn from_parts(seconds: u64, nanoseconds: u32) -> Option<Self> {
        let seconds = seconds.checked_mul(SECOND)?;
        seconds.checked_add(nanoseconds.into()).map(Self)
    }

    /// How long after `earlier` this is; nothing if it is not after.
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }

    fn from_duration(duration: Duration) -> Self {
        Self(u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX))
    }
}

/// Seconds and nine decimals, as `date +%s.%N` prints.
impl fmt::Display for Nanos {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{}.{:09}", self.0 / SECOND, self.0 % SECOND)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_and_what_they_look_like() {
        let at = Nanos::from_parts(1_756_720_805, 7_000).unwrap();
        assert_eq!(at.to_string(), "1756720805.000007000");
        assert_eq!(Nanos::from_parts(u64::MAX, 0), None);
        assert_eq!(Nanos::from_parts(u64::MAX / SECOND, 999_999_999), None);
    }

    #[test]
    fn what_is_not_after_is_no_time_after() {
        let (early, late) = (Nanos(5), Nanos(1_000_000_005));
        assert_eq!(late.since(early), Duration::from_secs(1));
        assert_eq!(early.since(late), Duration::ZERO);
    }

    #[test]
    fn now_is_the_system_clock() {
        let before = Nanos::from_duration(SystemTime::now().duration_since(UNIX_EPOCH).unwrap());
        let now = Nanos::now();
        assert!(now >= before && now.since(before) < Duration::from_mins(1));
    }
}
