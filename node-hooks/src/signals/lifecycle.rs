//! What a change of a domain's state means for a migration.

use std::collections::BTreeSet;

use crate::time::Nanos;

use super::Sign;

/// Domains that are remembered at once; a hypervisor that pauses more for migrations is lying.
pub(super) const MOST: usize = 4096;

/// Something that happened to a domain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Happened {
    pub(super) domain: String,
    pub(super) change: Change,
    /// By the clock of whoever told.
    pub(super) at: Nanos,
    /// When it had been read here.
    pub(super) seen: Nanos,
}

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Change {
    /// It waits for a guest that comes from elsewhere, or begins to be copied: whatever was before is over.
    Incoming,
    /// The guest stands still.
    Suspended {
        /// So that the rest of it can be copied.
        migrating: bool,
    },
    /// The guest runs.
    Resumed {
        /// After a migration, whether it came here or failed to leave.
        migrated: bool,
    },
    /// The domain is gone.
    Stopped {
        /// The guest runs elsewhere.
        migrated: bool,
    },
}

/// How a migration stands, as QEMU's event MIGRATION says: `MigrationStatus` of qapi/migration.json.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Status {
    UnderWay,
    Completed,
    Other,
}

impl From<&str> for Status {
    fn from(status: &str) -> Self {
        match status {
            "active" | "pre-switchover" | "device" | "postcopy-device" | "postcopy-active" => {
                Self::UnderWay
            }
            "completed" => Self::Completed,
            _ => Self::Other,
        }
    }
}

/// The domains of one hypervisor that stand still because they leave.
///
/// A hypervisor uses the same word for a guest that runs where it came to and for one that runs again where it could
/// not leave: `Resumed Migrated`, RESUME. Only the pause before tells them apart.
#[derive(Debug, Default)]
pub(super) struct Domains {
    leaving: BTreeSet<String>,
}

impl Domains {
    /// What a change is a sign of, if of anything.
    pub(super) fn sign(&mut self, domain: &str, change: Change) -> Option<Sign> {
        match change {
            Change::Incoming => {
                self.leaving.remove(domain);
                None
            }
            Change::Suspended { migrating: false } => None,
            Change::Suspended { migrating: true } => {
                if self.leaving.len() < MOST {
                    self.leaving.insert(domain.to_owned());
                }
                Some(Sign::Paused)
            }
            Change::Resumed { migrated } => {
                if self.leaving.remove(domain) {
                    Some(Sign::ResumedAfterFailure)
                } else {
                    migrated.then_some(Sign::Resumed)
                }
            }
            Change::Stopped { migrated } => {
                self.leaving.remove(domain);
                migrated.then_some(Sign::Left)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    const PAUSED: Change = Change::Suspended { migrating: true };
    const RESUMED: Change = Change::Resumed { migrated: true };
    const UNPAUSED: Change = Change::Resumed { migrated: false };
    const LEFT: Change = Change::Stopped { migrated: true };
    const ENDED: Change = Change::Stopped { migrated: false };
    const BY_A_PERSON: Change = Change::Suspended { migrating: false };

    #[rstest]
    #[case::it_leaves(&[PAUSED, LEFT], &[Sign::Paused, Sign::Left])]
    #[case::it_cannot_leave(&[PAUSED, RESUMED], &[Sign::Paused, Sign::ResumedAfterFailure])]
    #[case::a_person_resumes_it(&[PAUSED, UNPAUSED], &[Sign::Paused, Sign::ResumedAfterFailure])]
    #[case::it_comes(&[Change::Incoming, RESUMED], &[Sign::Resumed])]
    #[case::it_comes_back(
        &[PAUSED, LEFT, Change::Incoming, RESUMED],
        &[Sign::Paused, Sign::Left, Sign::Resumed]
    )]
    #[case::it_comes_back_and_its_leaving_was_not_heard(
        &[PAUSED, Change::Incoming, RESUMED],
        &[Sign::Paused, Sign::Resumed]
    )]
    #[case::it_fails_and_leaves_then(
        &[PAUSED, RESUMED, PAUSED, LEFT],
        &[Sign::Paused, Sign::ResumedAfterFailure, Sign::Paused, Sign::Left]
    )]
    #[case::it_boots(&[UNPAUSED, BY_A_PERSON, UNPAUSED, ENDED], &[])]
    #[case::it_dies_while_it_stands_still(&[PAUSED, ENDED, RESUMED], &[Sign::Paused, Sign::Resumed])]
    fn signs(#[case] changes: &[Change], #[case] expected: &[Sign]) {
        let mut domains = Domains::default();
        let signs: Vec<Sign> = changes
            .iter()
            .filter_map(|&change| domains.sign("default_web", change))
            .collect();
        assert_eq!(signs, expected);
    }

    #[test]
    fn domains_are_told_apart() {
        let mut domains = Domains::default();
        assert_eq!(domains.sign("a", PAUSED), Some(Sign::Paused));
        assert_eq!(domains.sign("b", RESUMED), Some(Sign::Resumed));
        assert_eq!(domains.sign("a", RESUMED), Some(Sign::ResumedAfterFailure));
    }

    #[test]
    fn memory_is_bounded_and_every_pause_is_a_sign_all_the_same() {
        let mut domains = Domains::default();
        for number in 0..MOST + 10 {
            assert_eq!(
                domains.sign(&number.to_string(), PAUSED),
                Some(Sign::Paused)
            );
        }
        assert_eq!(domains.leaving.len(), MOST);
    }
}
