//! Moments as agents stamp them.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::api::Moment;

/// Nanoseconds of Unix time. Zero is what nobody stamped.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Nanos(pub(crate) u64);

impl Nanos {
    pub(crate) fn now() -> Self {
        let since = SystemTime::now().duration_since(UNIX_EPOCH);
        Self(since.map_or(0, |since| {
            u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
        }))
    }

    /// Whether somebody stamped it.
    pub(crate) fn is_stamped(self) -> bool {
        self.0 != 0
    }

    /// Whether the two are no further apart than this.
    pub(crate) fn is_within(self, distance: Duration, of: Self) -> bool {
        u128::from(self.0.abs_diff(of.0)) <= distance.as_nanos()
    }

    #[must_use]
    pub(crate) fn after(self, duration: Duration) -> Self {
        let nanos = u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
        Self(self.0.saturating_add(nanos))
    }

    /// Microseconds from `earlier` to this moment; negative where that is later.
    pub(crate) fn micros_since(self, earlier: Self) -> i64 {
        let micros = (i128::from(self.0) - i128::from(earlier.0)) / 1_000;
        i64::try_from(micros).unwrap_or(i64::MAX)
    }

    pub(crate) fn moment(self) -> Moment {
        let at = jiff::Timestamp::from_nanosecond(i128::from(self.0));
        at.map_or_else(|_| Moment::now(), Moment::from_jiff)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn microseconds_keep_their_sign_and_survive_nonsense() {
        let at = Nanos(1_500_000_000_000_001_000);
        assert_eq!(at.micros_since(Nanos(1_500_000_000_000_000_000)), 1);
        assert_eq!(Nanos(1_000).micros_since(Nanos(3_000)), -2);
        assert!(Nanos(u64::MAX).micros_since(Nanos(0)) > 0);
        let moment = at.moment().to_string();
        assert_eq!(moment, "2017-07-14T02:40:00.000001Z");
    }

    #[test]
    fn near_is_near_on_either_side() {
        let second = Duration::from_secs(1);
        let now = Nanos(10_000_000_000);
        assert!(now.is_within(second, Nanos(9_000_000_000)));
        assert!(now.is_within(second, Nanos(11_000_000_000)));
        assert!(!now.is_within(second, Nanos(8_999_999_999)));
        assert!(!now.is_within(second, Nanos(0)));
    }
}
