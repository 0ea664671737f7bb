use serde::de::DeserializeOwned;

/// A table's row as a plain struct.
///
/// Implemented by [`table!`](crate::table!), or by hand for a struct that derives
/// [`serde::Deserialize`]. Columns become fields thus:
///
/// | column | field |
/// | --- | --- |
/// | integer, real, boolean, string | `i64` (or a smaller integer), `f64`, `bool`, `String` (or an enum of unit variants) |
/// | uuid | [`uuid::Uuid`] |
/// | optional | `Option<_>` |
/// | set | `Vec<_>` (in the order of the values), `BTreeSet<_>`, `HashSet<_>` |
/// | map | `BTreeMap<_, _>`, `HashMap<_, _>` |
pub trait Table: DeserializeOwned + Clone + PartialEq + Send + Sync + 'static {
    /// The table's name in the schema.
    const NAME: &'static str;
    /// The columns to read, by their names in the schema.
    const COLUMNS: &'static [&'static str];
    /// Those of [`COLUMNS`](Self::COLUMNS) that an older server's schema may lack. Their fields must
    /// be an `Option` or have `#[serde(default)]`. Any other column that is missing is an error.
    const OPTIONAL_COLUMNS: &'static [&'static str] = &[];
}

/// Defines row structs and their [`Table`] in one go. Fields are named like columns.
///
/// ```
/// use std::collections::BTreeMap;
///
/// ovsdb_rs::table! {
///     /// A port of a logical switch.
///     #[derive(Eq)]
///     pub struct LogicalSwitchPort in "Logical_Switch_Port" {
///         pub name: String,
///         pub addresses: Vec<String>,
///         pub r#type: String,
///         pub up: Option<bool>,
///         pub external_ids: BTreeMap<String, String>,
///     }
/// }
///
/// use ovsdb_rs::Table;
/// assert_eq!(LogicalSwitchPort::COLUMNS[2], "type");
/// ```
#[macro_export]
macro_rules! table {
    ($(
        $(#[$attribute:meta])*
        $visibility:vis struct $name:ident in $table:literal {
            $(
                $(#[$field_attribute:meta])*
                $field_visibility:vis $field:ident: $type:ty
            ),* $(,)?
        }
    )+) => {$(
        $(#[$attribute])*
        #[derive(Clone, Debug, PartialEq, $crate::__private::serde::Deserialize)]
        #[serde(crate = "::ovsdb_rs::__private::serde")]
        $visibility struct $name {
            $(
                $(#[$field_attribute])*
                $field_visibility $field: $type,
            )*
        }

        impl $crate::Table for $name {
            const NAME: &'static str = $table;
            const COLUMNS: &'static [&'static str] =
                &[$($crate::__private::column_name(stringify!($field))),*];
        }
    )+};
}

/// The column that a field is named after: the identifier less its `r#`.
#[doc(hidden)]
pub const fn column_name(field: &'static str) -> &'static str {
    match field.as_bytes() {
        [b'r', b'#', ..] => field.split_at(2).1,
        _ => field,
    }
}
