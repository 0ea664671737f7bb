//! How fast announcements are taken, and what else comes from somebody who may have been taken over.

use std::time::Duration;

use tokio::time::Instant;

/// Announcements that are taken a second, in the long run.
pub const RATE: u32 = 100;
/// Announcements at once: QEMU sends five for a guest, a guest some for each of its addresses.
const BURST: u32 = 64;

/// A token bucket that is waited for.
#[derive(Debug)]
pub(crate) struct Pace {
    /// When the bucket will be full again.
    full_at: Instant,
}

impl Pace {
    pub(crate) fn new(now: Instant) -> Self {
        Self { full_at: now }
    }

    /// Until when to wait before the next is taken; a time that has passed most often.
    pub(crate) fn pause(&self) -> Instant {
        let filled = period() * (BURST - 1);
        self.full_at.checked_sub(filled).unwrap_or(self.full_at)
    }

    pub(crate) fn take(&mut self, now: Instant) {
        self.full_at = self.full_at.max(now) + period();
    }
}

fn period() -> Duration {
    Duration::from_secs(1) / RATE
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_goes_through_and_a_flood_is_slowed() {
        let start = Instant::now();
        let mut pace = Pace::new(start);
        let mut now = start;
        let mut taken = Vec::new();
        for _ in 0..BURST + 2 * RATE {
            now = now.max(pace.pause());
            pace.take(now);
            taken.push(now);
        }
        let at = |index: u32| taken[index as usize].duration_since(start);
        assert_eq!(at(BURST - 1), Duration::ZERO);
        assert_eq!(at(BURST + RATE - 1), Duration::from_secs(1));
        assert_eq!(at(BURST + 2 * RATE - 1), Duration::from_secs(2));
    }

    #[test]
    fn who_was_silent_may_burst_again() {
        let start = Instant::now();
        let mut pace = Pace::new(start);
        for _ in 0..BURST {
            pace.take(start);
        }
        assert!(pace.pause() > start);
        let later = start + Duration::from_secs(1);
        assert!(pace.pause() <= later);
    }
}
