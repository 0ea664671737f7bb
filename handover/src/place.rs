//! Where a guest that migrates leaves from.

use crate::mend::Mend;

/// What is said of where a guest leaves from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub struct SourceWords<T> {
    /// KubeVirt's own word about this migration.
    pub told: Option<T>,
    /// Where KubeVirt says the guest is now, while the migration is under way.
    pub now: Option<T>,
    /// What the handover's record has.
    pub recorded: Option<T>,
    /// The handover has begun: something was written for it.
    pub begun: bool,
}

/// Where the guest leaves from.
///
/// KubeVirt's word about the migration outweighs all else. Before anything was written, where the
/// guest is now outweighs the record: a migration can wait while an earlier one moves the guest.
/// Afterwards the record does, which has what was written; the guest's node flips when it has moved.
pub fn source<T>(words: SourceWords<T>) -> Option<T> {
    let SourceWords {
        told,
        now,
        recorded,
        begun,
    } = words;
    let record_first = begun || !Mend::RecordedSource.holds();
    if record_first {
        told.or(recorded).or(now)
    } else {
        told.or(now).or(recorded)
    }
}
