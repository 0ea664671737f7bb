//! The schema of a database, as `get_schema` returns it (RFC 7047, section 3.2).

use std::collections::BTreeMap;

use serde::{Deserialize, Deserializer};

/// A database's tables.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct DatabaseSchema {
    /// The database's name.
    pub name: String,
    /// `x.y.z`; raised when the schema changes.
    #[serde(default)]
    pub version: String,
    /// The tables by name.
    pub tables: BTreeMap<String, TableSchema>,
}

/// A table's columns.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct TableSchema {
    /// The columns by name, less `_uuid` and `_version`, which every table has.
    pub columns: BTreeMap<String, ColumnSchema>,
    /// Whether rows live without being referred to.
    #[serde(default)]
    pub is_root: bool,
    /// The sets of columns whose values no two rows may share.
    #[serde(default)]
    pub indexes: Vec<Vec<String>>,
}

/// A column's type.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ColumnSchema {
    /// The type of a set's atoms, or of a map's keys.
    pub key: AtomicType,
    /// The type of a map's values; `None` for a set.
    pub value: Option<AtomicType>,
    /// The least number of atoms or pairs: 0 or 1.
    pub min: u32,
    /// The greatest number of atoms or pairs; `u32::MAX` when unlimited.
    pub max: u32,
    /// Whether the column can be written after the row was inserted.
    pub mutable: bool,
}

/// The type of an atom.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AtomicType {
    /// 64-bit signed.
    Integer,
    /// Double.
    Real,
    /// True or false.
    Boolean,
    /// UTF-8.
    String,
    /// A row's identity.
    Uuid,
}

// === notation ===

#[derive(Deserialize)]
struct Column {
    r#type: Type,
    #[serde(default = "yes")]
    mutable: bool,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Type {
    Atomic(AtomicType),
    Composite {
        key: BaseType,
        value: Option<BaseType>,
        #[serde(default = "one")]
        min: u32,
        max: Option<Max>,
    },
}

#[derive(Deserialize)]
#[serde(untagged)]
enum BaseType {
    Atomic(AtomicType),
    Constrained { r#type: AtomicType },
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Max {
    Limited(u32),
    Unlimited(Unlimited),
}

#[derive(Deserialize)]
#[serde(rename_all = "lowercase")]
enum Unlimited {
    Unlimited,
}

impl BaseType {
    fn atomic(&self) -> AtomicType {
        match self {
            Self::Atomic(atomic) | Self::Constrained { r#type: atomic } => *atomic,
        }
    }
}

impl<'de> Deserialize<'de> for ColumnSchema {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let column = Column::deserialize(deserializer)?;
        Ok(match column.r#type {
            Type::Atomic(key) => Self {
                key,
                value: None,
                min: 1,
                max: 1,
                mutable: column.mutable,
            },
            Type::Composite {
                key,
                value,
                min,
                max,
            } => Self {
                key: key.atomic(),
                value: value.as_ref().map(BaseType::atomic),
                min,
                max: match max {
                    None => 1,
                    Some(Max::Limited(max)) => max,
                    Some(Max::Unlimited(Unlimited::Unlimited)) => u32::MAX,
                },
                mutable: column.mutable,
            },
        })
    }
}

fn yes() -> bool {
    true
}

fn one() -> u32 {
    1
}
