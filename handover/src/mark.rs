//! The marks that segue leaves on a row while it owns it.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::{Epoch, MigrationUid};

/// Which handover owns a port, and what the port looked like before.
///
/// Kept in the port's `external_ids` under keys of segue's own, so that whoever finds the row
/// (a restarted controller, an operator, a newer handover) can tell whose it is and put it back.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mark {
    /// The migration on whose behalf the row was written.
    pub migration: MigrationUid,
    /// Its epoch.
    pub epoch: Epoch,
    /// `Chassis.name` of the source.
    pub source: String,
    /// `Chassis.name` of the target.
    pub target: String,
    /// What to put back.
    pub original: Original,
    /// The `NB_Global.nb_cfg` that the chassis must have applied before the port is ready; absent
    /// until the target claimed the port.
    pub barrier: Option<i64>,
    /// The source was seen to have given the port up before the target was made the only chassis.
    pub source_released: bool,
}

/// A port's own configuration before the first handover touched it.
#[derive(Clone, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Original {
    /// `options:requested-chassis`, to the letter.
    pub requested_chassis: Option<String>,
    /// `options:activation-strategy`, to the letter.
    pub activation_strategy: Option<String>,
}

/// A row bears segue's mark, but the mark cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum MarkError {
    /// A key that belongs to every mark is absent.
    #[error("external_ids has {} but no {key}", Mark::OWNER)]
    Missing {
        /// The absent key.
        key: &'static str,
    },
    /// A value is not what its key holds.
    #[error("external_ids:{key}={value:?} is not a number that it can hold")]
    NotANumber {
        /// The key.
        key: &'static str,
        /// Its value.
        value: String,
    },
}

impl Mark {
    /// Present on every row that segue owns; its value is the owner's name.
    pub const OWNER: &'static str = "segue.io/owner";
    /// Holds [`migration`](Self::migration): what to look a handover's rows up by.
    pub const MIGRATION: &'static str = "segue.io/migration";
    const EPOCH: &'static str = "segue.io/epoch";
    const SOURCE: &'static str = "segue.io/source";
    const TARGET: &'static str = "segue.io/target";
    const REQUESTED: &'static str = "segue.io/original-requested-chassis";
    const STRATEGY: &'static str = "segue.io/original-activation-strategy";
    const BARRIER: &'static str = "segue.io/barrier";
    const SOURCE_RELEASED: &'static str = "segue.io/source-released";

    /// Every key that a mark can occupy. Clearing these, and no others, clears a mark.
    pub const KEYS: [&'static str; 9] = [
        Self::OWNER,
        Self::MIGRATION,
        Self::EPOCH,
        Self::SOURCE,
        Self::TARGET,
        Self::REQUESTED,
        Self::STRATEGY,
        Self::BARRIER,
        Self::SOURCE_RELEASED,
    ];

    /// The mark as `external_ids`.
    pub fn to_external_ids(&self) -> BTreeMap<&'static str, String> {
        let mut ids = BTreeMap::from([
            (Self::OWNER, "segue".to_owned()),
            (Self::MIGRATION, self.migration.to_string()),
            (Self::EPOCH, self.epoch.to_string()),
            (Self::SOURCE, self.source.clone()),
            (Self::TARGET, self.target.clone()),
        ]);
        let optional = [
            (Self::REQUESTED, self.original.requested_chassis.clone()),
            (Self::STRATEGY, self.original.activation_strategy.clone()),
            (Self::BARRIER, self.barrier.map(|nb_cfg| nb_cfg.to_string())),
            (
                Self::SOURCE_RELEASED,
                self.source_released.then(|| "true".to_owned()),
            ),
        ];
        ids.extend(
            optional
                .into_iter()
                .filter_map(|(key, value)| Some((key, value?))),
        );
        ids
    }

    /// The mark in a row's `external_ids`, if the row bears one.
    ///
    /// # Errors
    ///
    /// A row with the owner's key but without a readable rest is an error, not an unmarked row:
    /// taking it for unmarked would lose what must be put back.
    pub fn from_external_ids(ids: &BTreeMap<String, String>) -> Result<Option<Self>, MarkError> {
        if !ids.contains_key(Self::OWNER) {
            return Ok(None);
        }
        let text = |key: &'static str| ids.get(key).cloned().ok_or(MarkError::Missing { key });
        Ok(Some(Self {
            migration: MigrationUid::new(text(Self::MIGRATION)?),
            epoch: epoch(text(Self::EPOCH)?)?,
            source: text(Self::SOURCE)?,
            target: text(Self::TARGET)?,
            original: Original {
                requested_chassis: ids.get(Self::REQUESTED).cloned(),
                activation_strategy: ids.get(Self::STRATEGY).cloned(),
            },
            barrier: ids
                .get(Self::BARRIER)
                .cloned()
                .map(|value| number(Self::BARRIER, value))
                .transpose()?,
            source_released: ids.contains_key(Self::SOURCE_RELEASED),
        }))
    }
}

/// An epoch that a record can hold, which has 63 bits for it. A larger one was not written by segue
/// and would fence every handover of the port for good.
fn epoch(value: String) -> Result<Epoch, MarkError> {
    let key = Mark::EPOCH;
    let number: i64 = number(key, value.clone())?;
    u64::try_from(number)
        .map(Epoch)
        .map_err(|_| MarkError::NotANumber { key, value })
}

fn number<N: std::str::FromStr>(key: &'static str, value: String) -> Result<N, MarkError> {
    value
        .parse()
        .map_err(|_| MarkError::NotANumber { key, value })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mark() -> Mark {
        Mark {
            migration: MigrationUid::new("m-1"),
            epoch: Epoch(7),
            source: "n1".into(),
            target: "n2".into(),
            original: Original {
                requested_chassis: Some("n1.example".into()),
                activation_strategy: None,
            },
            barrier: Some(42),
            source_released: true,
        }
    }

    fn owned(mark: &Mark) -> BTreeMap<String, String> {
        mark.to_external_ids()
            .into_iter()
            .map(|(key, value)| (key.to_owned(), value))
            .collect()
    }

    #[test]
    fn survives_the_row() {
        let mut bare = mark();
        bare.original = Original::default();
        bare.barrier = None;
        bare.source_released = false;
        for mark in [mark(), bare] {
            assert_eq!(Mark::from_external_ids(&owned(&mark)), Ok(Some(mark)));
        }
    }

    #[test]
    fn every_key_written_is_a_key_cleared() {
        let mark = Mark {
            original: Original {
                requested_chassis: Some(String::new()),
                activation_strategy: Some(String::new()),
            },
            ..mark()
        };
        let written: Vec<_> = mark.to_external_ids().into_keys().collect();
        let mut cleared = Mark::KEYS.to_vec();
        cleared.sort_unstable();
        assert_eq!(written, cleared);
    }

    #[test]
    fn a_row_of_others_bears_no_mark() {
        let ids = BTreeMap::from([("segue.io/vm".to_owned(), "ns/vm".to_owned())]);
        assert_eq!(Mark::from_external_ids(&ids), Ok(None));
    }

    #[test]
    fn a_damaged_mark_is_not_an_unmarked_row() {
        let mut ids = owned(&mark());
        ids.remove(Mark::TARGET);
        assert_eq!(
            Mark::from_external_ids(&ids),
            Err(MarkError::Missing { key: Mark::TARGET })
        );
        for nonsense in ["soon", "-1", "9223372036854775808"] {
            let mut ids = owned(&mark());
            ids.insert(Mark::EPOCH.to_owned(), nonsense.to_owned());
            assert!(matches!(
                Mark::from_external_ids(&ids),
                Err(MarkError::NotANumber {
                    key: Mark::EPOCH,
                    ..
                })
            ));
        }
    }
}
