//! OVSDB's values: atoms, and the sets and maps made of them (RFC 7047, section 5.1).

mod collection;
mod de;
mod json;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};

pub use collection::{AtomMap, AtomSet};
pub(crate) use de::from_columns;
use uuid::Uuid;

/// One indivisible value.
#[derive(Clone, Debug)]
pub enum Atom {
    /// A 64-bit signed integer.
    Integer(i64),
    /// A finite double. Ordered and compared by [`f64::total_cmp`], so that atoms can be set members.
    Real(f64),
    /// A boolean.
    Boolean(bool),
    /// A UTF-8 string.
    String(String),
    /// The identity of a row that exists: `["uuid", "…"]`.
    Uuid(Uuid),
    /// A row inserted by the same transaction: `["named-uuid", "…"]`. Never sent by a server.
    NamedUuid(String),
}

/// The value of a column: a set of atoms, or a map from atoms to atoms.
///
/// A scalar is a set of one, an optional value a set of at most one; that is OVSDB's own model, and
/// why the wire may carry a one-element set bare. Built with `From` from Rust's own types:
///
/// ```
/// use std::collections::BTreeMap;
/// use ovsdb_rs::Datum;
///
/// assert_eq!(Datum::from("a"), Datum::from(vec!["a"]));
/// assert_eq!(Datum::from(None::<i64>), Datum::empty());
/// assert!(matches!(Datum::from(BTreeMap::from([("k", "v")])), Datum::Map(_)));
/// ```
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Datum {
    /// Distinct atoms.
    Set(AtomSet),
    /// Key–value pairs.
    Map(AtomMap),
}

/// Columns by name: a row as the wire has it, whole or in part.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(transparent)]
pub struct Row {
    columns: BTreeMap<String, Datum>,
}

impl Datum {
    /// The empty set, which is also how an optional column is cleared.
    pub fn empty() -> Self {
        Self::Set(AtomSet::default())
    }

    /// The set of `atoms`.
    pub fn set<A: Into<Atom>>(atoms: impl IntoIterator<Item = A>) -> Self {
        Self::Set(atoms.into_iter().map(Into::into).collect())
    }

    /// The map of `pairs`; of pairs with equal keys the last counts.
    pub fn map<K: Into<Atom>, V: Into<Atom>>(pairs: impl IntoIterator<Item = (K, V)>) -> Self {
        Self::Map(
            pairs
                .into_iter()
                .map(|(key, value)| (key.into(), value.into()))
                .collect(),
        )
    }

    /// How many atoms or pairs it holds.
    pub fn len(&self) -> usize {
        match self {
            Self::Set(atoms) => atoms.len(),
            Self::Map(pairs) => pairs.len(),
        }
    }

    /// Whether it holds nothing.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The atom of a set that holds exactly one.
    pub fn scalar(&self) -> Option<&Atom> {
        match self {
            Self::Set(atoms) if atoms.len() == 1 => atoms.iter().next(),
            _ => None,
        }
    }
}

/// The empty set.
impl Default for Datum {
    fn default() -> Self {
        Self::empty()
    }
}

impl Row {
    /// A row that names no column yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// The row with `column` set to `value`, replacing what was set before.
    #[must_use]
    pub fn set(mut self, column: impl Into<String>, value: impl Into<Datum>) -> Self {
        self.columns.insert(column.into(), value.into());
        self
    }

    /// The value of `column`, if the row has it.
    pub fn get(&self, column: &str) -> Option<&Datum> {
        self.columns.get(column)
    }

    /// The columns in the order of their names.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Datum)> {
        self.columns
            .iter()
            .map(|(name, datum)| (name.as_str(), datum))
    }

    /// How many columns the row names.
    pub fn len(&self) -> usize {
        self.columns.len()
    }

    /// Whether the row names no column.
    pub fn is_empty(&self) -> bool {
        self.columns.is_empty()
    }
}

impl IntoIterator for Row {
    type Item = (String, Datum);
    type IntoIter = std::collections::btree_map::IntoIter<String, Datum>;

    fn into_iter(self) -> Self::IntoIter {
        self.columns.into_iter()
    }
}

impl<S: Into<String>, D: Into<Datum>> FromIterator<(S, D)> for Row {
    fn from_iter<I: IntoIterator<Item = (S, D)>>(columns: I) -> Self {
        Self {
            columns: columns
                .into_iter()
                .map(|(name, datum)| (name.into(), datum.into()))
                .collect(),
        }
    }
}

// === ordering ===

impl Atom {
    fn rank(&self) -> u8 {
        match self {
            Self::Integer(_) => 0,
            Self::Real(_) => 1,
            Self::Boolean(_) => 2,
            Self::String(_) => 3,
            Self::Uuid(_) => 4,
            Self::NamedUuid(_) => 5,
        }
    }
}

impl Ord for Atom {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        match (self, other) {
            (Self::Integer(a), Self::Integer(b)) => a.cmp(b),
            (Self::Real(a), Self::Real(b)) => a.total_cmp(b),
            (Self::Boolean(a), Self::Boolean(b)) => a.cmp(b),
            (Self::String(a), Self::String(b)) | (Self::NamedUuid(a), Self::NamedUuid(b)) => {
                a.cmp(b)
            }
            (Self::Uuid(a), Self::Uuid(b)) => a.cmp(b),
            _ => self.rank().cmp(&other.rank()),
        }
    }
}

impl PartialOrd for Atom {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Atom {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Atom {}

impl std::hash::Hash for Atom {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        self.rank().hash(state);
        match self {
            Self::Integer(value) => value.hash(state),
            Self::Real(value) => value.to_bits().hash(state),
            Self::Boolean(value) => value.hash(state),
            Self::String(value) | Self::NamedUuid(value) => value.hash(state),
            Self::Uuid(value) => value.hash(state),
        }
    }
}

// === conversions ===

macro_rules! atom_from {
    ($($from:ty => |$value:ident| $atom:expr;)*) => {$(
        impl From<$from> for Atom {
            fn from($value: $from) -> Self {
                $atom
            }
        }

        impl From<$from> for Datum {
            fn from(value: $from) -> Self {
                Self::set([value])
            }
        }
    )*};
}

atom_from! {
    i64 => |value| Self::Integer(value);
    i32 => |value| Self::Integer(i64::from(value));
    u32 => |value| Self::Integer(i64::from(value));
    u16 => |value| Self::Integer(i64::from(value));
    f64 => |value| Self::Real(value);
    bool => |value| Self::Boolean(value);
    String => |value| Self::String(value);
    &String => |value| Self::String(value.clone());
    &str => |value| Self::String(value.to_owned());
    Uuid => |value| Self::Uuid(value);
}

impl From<Atom> for Datum {
    fn from(atom: Atom) -> Self {
        Self::set([atom])
    }
}

impl<A: Into<Atom>> From<Option<A>> for Datum {
    fn from(value: Option<A>) -> Self {
        Self::set(value)
    }
}

impl<A: Into<Atom>> From<Vec<A>> for Datum {
    fn from(values: Vec<A>) -> Self {
        Self::set(values)
    }
}

impl<A: Into<Atom>, const N: usize> From<[A; N]> for Datum {
    fn from(values: [A; N]) -> Self {
        Self::set(values)
    }
}

impl<A: Into<Atom>> From<BTreeSet<A>> for Datum {
    fn from(values: BTreeSet<A>) -> Self {
        Self::set(values)
    }
}

impl<K: Into<Atom>, V: Into<Atom>> From<BTreeMap<K, V>> for Datum {
    fn from(pairs: BTreeMap<K, V>) -> Self {
        Self::map(pairs)
    }
}
