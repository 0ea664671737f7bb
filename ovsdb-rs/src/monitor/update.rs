//! `<table-updates2>` (ovsdb-server(7), section 4.1.14): rows as they are, and as they change.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde::de::IgnoredAny;
use uuid::Uuid;

use crate::{Atom, AtomMap, AtomicType, ColumnSchema, Datum, Row};

/// Rows by table and identity.
pub(crate) type TableUpdates = BTreeMap<String, BTreeMap<Uuid, RowUpdate>>;

#[derive(Debug, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum RowUpdate {
    /// In a reply: the row, less columns that have their default value.
    Initial(Row),
    /// A row that is new to the monitor, less columns that have their default value.
    Insert(Row),
    /// The difference to the row's columns, for those that changed.
    Modify(Row),
    /// Carries nothing.
    Delete(IgnoredAny),
}

impl ColumnSchema {
    /// The value that update notations leave out.
    pub(crate) fn default_datum(&self) -> Datum {
        match (self.value, self.min) {
            (None, 0) => Datum::empty(),
            (None, _) => Datum::set([self.key.default_atom()]),
            (Some(_), 0) => Datum::Map(AtomMap::default()),
            (Some(value), _) => Datum::map([(self.key.default_atom(), value.default_atom())]),
        }
    }

    /// Reads `datum` as this column's: what JSON cannot tell apart (whole reals from integers, the
    /// empty map from the empty set) becomes what the schema says.
    pub(crate) fn conform(&self, datum: Datum) -> Result<Datum, String> {
        match (self.value, datum) {
            (None, Datum::Set(atoms)) => Ok(Datum::Set(
                atoms
                    .into_iter()
                    .map(|atom| self.key.conform(atom))
                    .collect::<Result<_, _>>()?,
            )),
            (Some(value), Datum::Map(pairs)) => Ok(Datum::Map(
                pairs
                    .into_iter()
                    .map(|(key, atom)| Ok((self.key.conform(key)?, value.conform(atom)?)))
                    .collect::<Result<_, String>>()?,
            )),
            (Some(_), Datum::Set(atoms)) if atoms.is_empty() => Ok(Datum::Map(AtomMap::default())),
            (Some(_), Datum::Set(_)) => Err("a set where the schema has a map".into()),
            (None, Datum::Map(_)) => Err("a map where the schema has a set".into()),
        }
    }

    /// Applies the difference that a `modify` carries.
    ///
    /// Columns of at most one value carry the new value. Of two sets it is what only one of them
    /// has. Of two maps it is the pairs whose key only one has, and for a key of both the new pair;
    /// so a pair that is there as it stands was removed.
    pub(crate) fn apply(&self, current: &mut Datum, difference: Datum) {
        *current = match (std::mem::take(current), difference) {
            (Datum::Set(old), Datum::Set(difference)) if self.max > 1 => {
                Datum::Set(old.symmetric_difference(difference))
            }
            (Datum::Map(old), Datum::Map(difference)) if self.max > 1 => {
                Datum::Map(old.patched(difference))
            }
            (_, new) => new,
        };
    }
}

impl AtomicType {
    fn default_atom(self) -> Atom {
        match self {
            Self::Integer => Atom::Integer(0),
            Self::Real => Atom::Real(0.0),
            Self::Boolean => Atom::Boolean(false),
            Self::String => Atom::String(String::new()),
            Self::Uuid => Atom::Uuid(Uuid::nil()),
        }
    }

    fn conform(self, atom: Atom) -> Result<Atom, String> {
        match (self, atom) {
            (Self::Integer, atom @ Atom::Integer(_))
            | (Self::Real, atom @ Atom::Real(_))
            | (Self::Boolean, atom @ Atom::Boolean(_))
            | (Self::String, atom @ Atom::String(_))
            | (Self::Uuid, atom @ Atom::Uuid(_)) => Ok(atom),
            #[allow(
                clippy::cast_precision_loss,
                reason = "a real has no more digits than an f64"
            )]
            (Self::Real, Atom::Integer(value)) => Ok(Atom::Real(value as f64)),
            (expected, atom) => Err(format!("{atom:?} where the schema has {expected:?}")),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn column(key: AtomicType, value: Option<AtomicType>, min: u32, max: u32) -> ColumnSchema {
        ColumnSchema {
            key,
            value,
            min,
            max,
            mutable: true,
        }
    }

    /// The difference as ovsdb-server(7), section 4.1.14, defines it.
    fn difference(max: u32, old: &Datum, new: &Datum) -> Datum {
        match (old, new) {
            (Datum::Set(old), Datum::Set(new)) if max > 1 => {
                let only_old = old.iter().filter(|atom| !new.contains(atom));
                let only_new = new.iter().filter(|atom| !old.contains(atom));
                Datum::set(only_old.chain(only_new).cloned())
            }
            (Datum::Map(old), Datum::Map(new)) if max > 1 => {
                let only_old = old.iter().filter(|(key, _)| new.get(key).is_none());
                let changed = new
                    .iter()
                    .filter(|(key, value)| old.get(key) != Some(value));
                Datum::map(only_old.chain(changed).cloned())
            }
            _ => new.clone(),
        }
    }

    fn set(max: usize) -> impl Strategy<Value = Datum> {
        proptest::collection::btree_set(0..6_i64, 0..=max).prop_map(Datum::set)
    }

    fn map(max: usize) -> impl Strategy<Value = Datum> {
        proptest::collection::btree_map(0..5_i64, 0..3_i64, 0..=max).prop_map(Datum::map)
    }

    proptest! {
        #[test]
        fn the_difference_applied_to_the_old_set_is_the_new(
            (max, old, new) in (1..4_usize).prop_flat_map(|max| (Just(max), set(max), set(max)))
        ) {
            let max = u32::try_from(max).unwrap();
            let column = column(AtomicType::Integer, None, 0, max);
            let mut current = old.clone();
            column.apply(&mut current, difference(max, &old, &new));
            prop_assert_eq!(current, new);
        }

        #[test]
        fn the_difference_applied_to_the_old_map_is_the_new(
            (max, old, new) in (1..4_usize).prop_flat_map(|max| (Just(max), map(max), map(max)))
        ) {
            let max = u32::try_from(max).unwrap();
            let column = column(AtomicType::Integer, Some(AtomicType::Integer), 0, max);
            let mut current = old.clone();
            column.apply(&mut current, difference(max, &old, &new));
            prop_assert_eq!(current, new);
        }
    }

    #[test]
    fn what_updates_leave_out_is_the_types_default() {
        let scalar = column(AtomicType::String, None, 1, 1);
        assert_eq!(scalar.default_datum(), Datum::from(""));
        let optional = column(AtomicType::String, None, 0, 1);
        assert_eq!(optional.default_datum(), Datum::empty());
        let map = column(AtomicType::String, Some(AtomicType::Real), 0, u32::MAX);
        assert_eq!(map.default_datum(), Datum::Map(AtomMap::default()));
        let pair = column(AtomicType::Integer, Some(AtomicType::Boolean), 1, 1);
        assert_eq!(pair.default_datum(), Datum::map([(0_i64, false)]));
    }

    #[test]
    fn a_real_may_look_like_an_integer_and_an_integer_may_not_look_like_a_real() {
        let reals = column(AtomicType::Real, None, 0, u32::MAX);
        assert_eq!(reals.conform(Datum::set([1_i64])), Ok(Datum::set([1.0])));
        let integers = column(AtomicType::Integer, None, 0, u32::MAX);
        assert!(integers.conform(Datum::set([1.0])).is_err());
        let map = column(AtomicType::String, Some(AtomicType::String), 0, u32::MAX);
        assert_eq!(
            map.conform(Datum::empty()),
            Ok(Datum::Map(AtomMap::default()))
        );
        assert!(map.conform(Datum::from("a")).is_err());
    }
}
