//! Conditions and mutations (RFC 7047, section 5.1).

use serde::ser::{Serialize, Serializer};
use uuid::Uuid;

use crate::{Atom, Datum};

/// Which rows an operation is about: those that meet all of its conditions.
///
/// Taken from an array or vector of [`Condition`]s, from one condition, or from a row's [`Uuid`].
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(transparent)]
pub struct Where(Vec<Condition>);

/// `[column, function, value]`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Condition {
    column: String,
    function: Function,
    value: Datum,
}

/// How a column compares to a condition's value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub enum Function {
    /// Equal as a whole.
    #[serde(rename = "==")]
    Equal,
    /// Not equal as a whole.
    #[serde(rename = "!=")]
    NotEqual,
    /// Less than; integers and reals only.
    #[serde(rename = "<")]
    Less,
    /// Less than or equal; integers and reals only.
    #[serde(rename = "<=")]
    LessOrEqual,
    /// Greater than; integers and reals only.
    #[serde(rename = ">")]
    Greater,
    /// Greater than or equal; integers and reals only.
    #[serde(rename = ">=")]
    GreaterOrEqual,
    /// The column holds all of the value's elements or pairs.
    #[serde(rename = "includes")]
    Includes,
    /// The column holds none of the value's elements or pairs.
    #[serde(rename = "excludes")]
    Excludes,
}

/// `[column, mutator, value]`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mutation {
    column: String,
    mutator: Mutator,
    value: Datum,
}

/// What a mutation does with its value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub enum Mutator {
    /// Adds it to every number of the column.
    #[serde(rename = "+=")]
    Add,
    /// Subtracts it from every number of the column.
    #[serde(rename = "-=")]
    Subtract,
    /// Multiplies every number of the column by it.
    #[serde(rename = "*=")]
    Multiply,
    /// Divides every number of the column by it.
    #[serde(rename = "/=")]
    Divide,
    /// Leaves of every integer of the column the remainder after division by it.
    #[serde(rename = "%=")]
    Remainder,
    /// Adds its elements or pairs; a map's pair whose key exists already is left as it is.
    #[serde(rename = "insert")]
    Insert,
    /// Removes its elements or pairs; of a map also, given a set, the keys in it.
    #[serde(rename = "delete")]
    Delete,
}

impl Where {
    /// Every row of the table.
    pub fn all() -> Self {
        Self(Vec::new())
    }
}

impl Condition {
    /// `column function value`
    pub fn new(column: impl Into<String>, function: Function, value: impl Into<Datum>) -> Self {
        Self {
            column: column.into(),
            function,
            value: value.into(),
        }
    }

    /// The column equals `value` as a whole.
    pub fn eq(column: impl Into<String>, value: impl Into<Datum>) -> Self {
        Self::new(column, Function::Equal, value)
    }

    /// The column differs from `value`.
    pub fn ne(column: impl Into<String>, value: impl Into<Datum>) -> Self {
        Self::new(column, Function::NotEqual, value)
    }

    /// The column holds all elements or pairs of `value`.
    pub fn includes(column: impl Into<String>, value: impl Into<Datum>) -> Self {
        Self::new(column, Function::Includes, value)
    }

    /// The column holds no element or pair of `value`.
    pub fn excludes(column: impl Into<String>, value: impl Into<Datum>) -> Self {
        Self::new(column, Function::Excludes, value)
    }

    /// The row is the one with this identity.
    pub fn uuid(uuid: Uuid) -> Self {
        Self::eq("_uuid", uuid)
    }
}

impl Mutation {
    /// `column mutator value`
    pub fn new(column: impl Into<String>, mutator: Mutator, value: impl Into<Datum>) -> Self {
        Self {
            column: column.into(),
            mutator,
            value: value.into(),
        }
    }

    /// Adds elements to a set, or pairs to a map where their keys are not in it yet.
    pub fn insert(column: impl Into<String>, value: impl Into<Datum>) -> Self {
        Self::new(column, Mutator::Insert, value)
    }

    /// Removes elements from a set, or from a map the pairs that are exactly those of `value`.
    pub fn delete(column: impl Into<String>, value: impl Into<Datum>) -> Self {
        Self::new(column, Mutator::Delete, value)
    }

    /// Removes from a map the pairs with these keys, whatever their values.
    pub fn delete_keys<K: Into<Atom>>(
        column: impl Into<String>,
        keys: impl IntoIterator<Item = K>,
    ) -> Self {
        Self::new(column, Mutator::Delete, Datum::set(keys))
    }

    /// Sets one pair of a map, leaving its other keys alone: removes the key, then inserts the pair,
    /// since an insert alone keeps a value that is there.
    pub fn put(
        column: impl Into<String>,
        key: impl Into<Atom>,
        value: impl Into<Atom>,
    ) -> [Self; 2] {
        let (column, key) = (column.into(), key.into());
        [
            Self::delete_keys(column.clone(), [key.clone()]),
            Self::insert(column, Datum::map([(key, value)])),
        ]
    }
}

impl Serialize for Condition {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        (&self.column, self.function, &self.value).serialize(serializer)
    }
}

impl Serialize for Mutation {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        (&self.column, self.mutator, &self.value).serialize(serializer)
    }
}

impl From<Vec<Condition>> for Where {
    fn from(conditions: Vec<Condition>) -> Self {
        Self(conditions)
    }
}

impl<const N: usize> From<[Condition; N]> for Where {
    fn from(conditions: [Condition; N]) -> Self {
        Self(conditions.into())
    }
}

impl From<Condition> for Where {
    fn from(condition: Condition) -> Self {
        Self(vec![condition])
    }
}

impl From<Uuid> for Where {
    fn from(uuid: Uuid) -> Self {
        Condition::uuid(uuid).into()
    }
}
