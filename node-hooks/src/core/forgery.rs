//! Announcements that open nothing: each is counted, few are told.

use std::collections::HashMap;
use std::time::{Duration, Instant};

/// How often the controller is told of the same thing on the same interface: a guest can announce
/// itself as often as it likes.
const INTERVAL: Duration = Duration::from_secs(1);
/// How many interfaces and reasons are told apart; what is beyond is counted and not told.
const KEPT: usize = 1024;

/// Why an announcement opened nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Forged {
    /// No handover of a VM with this interface is armed.
    NothingMoves,
    /// The node is the one that the VM leaves.
    OnSource,
    /// It names a MAC that is not its port's.
    AnothersAddress,
    /// It is the target, where nothing says yet that the guest runs, and its pod may have sent it.
    BeforeTheGuest,
}

/// Which forgeries were told lately.
#[derive(Debug, Default)]
pub(super) struct Told(HashMap<(String, Forged), Instant>);

impl Forged {
    /// Every reason there is.
    pub const ALL: [Self; 4] = [
        Self::NothingMoves,
        Self::OnSource,
        Self::AnothersAddress,
        Self::BeforeTheGuest,
    ];

    /// The reason, for people.
    pub fn reason(self) -> &'static str {
        match self {
            Self::NothingMoves => "an announcement while no handover is armed here",
            Self::OnSource => "an announcement on the node that the VM leaves",
            Self::AnothersAddress => "an announcement that names another's MAC",
            Self::BeforeTheGuest => "an announcement of the pod's own, ahead of its guest",
        }
    }

    /// The reason, for programs.
    pub fn name(self) -> &'static str {
        match self {
            Self::NothingMoves => "nothing_moves",
            Self::OnSource => "on_source",
            Self::AnothersAddress => "anothers_address",
            Self::BeforeTheGuest => "before_the_guest",
        }
    }
}

impl Told {
    /// Whether to tell of this one.
    pub(super) fn is_due(&mut self, interface: &str, forged: Forged, now: Instant) -> bool {
        let key = (interface.to_owned(), forged);
        let is_due = match self.0.get(&key) {
            Some(last) => now.saturating_duration_since(*last) >= INTERVAL,
            None => self.0.len() < KEPT,
        };
        if is_due {
            self.0.insert(key, now);
        }
        is_due
    }

    pub(super) fn forget(&mut self, now: Instant) {
        self.0
            .retain(|_, last| now.saturating_duration_since(*last) < INTERVAL);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_is_told_once_a_second() {
        let (mut told, start) = (Told::default(), Instant::now());
        assert!(told.is_due("tap0", Forged::OnSource, start));
        assert!(!told.is_due("tap0", Forged::OnSource, start + INTERVAL / 2));
        assert!(told.is_due("tap0", Forged::AnothersAddress, start));
        assert!(told.is_due("tap1", Forged::OnSource, start));
        assert!(told.is_due("tap0", Forged::OnSource, start + INTERVAL));
    }

    #[test]
    fn what_is_remembered_is_bounded_and_forgotten() {
        let (mut told, start) = (Told::default(), Instant::now());
        for number in 0..2 * KEPT {
            told.is_due(&format!("tap{number}"), Forged::OnSource, start);
        }
        assert_eq!(told.0.len(), KEPT);
        told.forget(start + INTERVAL);
        assert!(told.0.is_empty());
    }
}
