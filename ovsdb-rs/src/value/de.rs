//! From OVSDB values to plain Rust types, through serde.
//!
//! The deserializer is where a bare one-element set, an empty set for an absent optional value, and
//! a UUID as `["uuid", …]` are understood, so that row structs need no attributes for them.

use serde::de::value::{Error as DecodeError, MapDeserializer, SeqDeserializer, StrDeserializer};
use serde::de::{
    self, DeserializeOwned, DeserializeSeed, Deserializer, IntoDeserializer, MapAccess, Visitor,
};
use serde::forward_to_deserialize_any;
use uuid::Uuid;

use super::{Atom, Datum, Row};

/// Deserializes `T` from named columns.
///
/// Columns that `T` does not know are skipped; columns that are missing are missing fields to serde.
pub(crate) fn from_columns<'a, T: DeserializeOwned>(
    columns: impl Iterator<Item = (&'a str, &'a Datum)>,
) -> Result<T, DecodeError> {
    T::deserialize(ColumnsDeserializer(columns))
}

impl Row {
    /// The row as a `T`.
    ///
    /// # Errors
    /// Names the column whose value does not fit, or the field for which there is no column.
    pub fn to<T: DeserializeOwned>(&self) -> Result<T, crate::Error> {
        from_columns(self.iter()).map_err(|error| crate::Error::Row(error.to_string()))
    }
}

// === columns ===

struct ColumnsDeserializer<I>(I);

impl<'a, 'de, I: Iterator<Item = (&'a str, &'a Datum)>> Deserializer<'de>
    for ColumnsDeserializer<I>
{
    type Error = DecodeError;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, DecodeError> {
        visitor.visit_map(ColumnsAccess {
            columns: self.0,
            current: None,
        })
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        visitor: V,
    ) -> Result<V::Value, DecodeError> {
        visitor.visit_newtype_struct(self)
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option
        unit unit_struct seq tuple tuple_struct map struct enum identifier ignored_any
    }
}

struct ColumnsAccess<'a, I> {
    columns: I,
    current: Option<(&'a str, &'a Datum)>,
}

impl<'a, 'de, I: Iterator<Item = (&'a str, &'a Datum)>> MapAccess<'de> for ColumnsAccess<'a, I> {
    type Error = DecodeError;

    fn next_key_seed<K: DeserializeSeed<'de>>(
        &mut self,
        seed: K,
    ) -> Result<Option<K::Value>, DecodeError> {
        self.current = self.columns.next();
        self.current
            .map(|(name, _)| seed.deserialize(StrDeserializer::new(name)))
            .transpose()
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(
        &mut self,
        seed: V,
    ) -> Result<V::Value, DecodeError> {
        let (name, datum) = self
            .current
            .take()
            .ok_or_else(|| de::Error::custom("a value asked for before its column"))?;
        seed.deserialize(datum)
            .map_err(|error| de::Error::custom(format_args!("column {name:?}: {error}")))
    }
}

// === Datum ===

impl Datum {
    fn only_atom(&self) -> Result<&Atom, DecodeError> {
        self.scalar().ok_or_else(|| {
            de::Error::custom(format_args!(
                "exactly one value expected, a {} of {} found",
                match self {
                    Self::Set(_) => "set",
                    Self::Map(_) => "map",
                },
                self.len()
            ))
        })
    }
}

macro_rules! scalars {
    ($($method:ident)*) => {$(
        fn $method<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, DecodeError> {
            self.only_atom()?.$method(visitor)
        }
    )*};
}

impl<'de> Deserializer<'de> for &Datum {
    type Error = DecodeError;

    scalars! {
        deserialize_bool deserialize_i8 deserialize_i16 deserialize_i32 deserialize_i64
        deserialize_i128 deserialize_u8 deserialize_u16 deserialize_u32 deserialize_u64
        deserialize_u128 deserialize_f32 deserialize_f64 deserialize_char deserialize_str
        deserialize_string deserialize_bytes deserialize_byte_buf deserialize_identifier
    }

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, DecodeError> {
        match self {
            Datum::Set(atoms) => match self.scalar() {
                Some(atom) => atom.deserialize_any(visitor),
                None => SeqDeserializer::new(atoms.iter()).deserialize_seq(visitor),
            },
            Datum::Map(pairs) => {
                MapDeserializer::new(pairs.iter().map(|(key, value)| (key, value)))
                    .deserialize_map(visitor)
            }
        }
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, DecodeError> {
        if self.is_empty() {
            visitor.visit_none()
        } else {
            visitor.visit_some(self)
        }
    }

    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, DecodeError> {
        match self {
            Datum::Set(atoms) => SeqDeserializer::new(atoms.iter()).deserialize_seq(visitor),
            Datum::Map(_) => Err(de::Error::custom("a set expected, a map found")),
        }
    }

    fn deserialize_tuple<V: Visitor<'de>>(
        self,
        _len: usize,
        visitor: V,
    ) -> Result<V::Value, DecodeError> {
        self.deserialize_seq(visitor)
    }

    fn deserialize_tuple_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        _len: usize,
        visitor: V,
    ) -> Result<V::Value, DecodeError> {
        self.deserialize_seq(visitor)
    }

    fn deserialize_map<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, DecodeError> {
        match self {
            Datum::Map(pairs) => {
                MapDeserializer::new(pairs.iter().map(|(key, value)| (key, value)))
                    .deserialize_map(visitor)
            }
            // Without the schema at hand an empty map and an empty set cannot be told apart.
            Datum::Set(atoms) if atoms.is_empty() => {
                MapDeserializer::new(std::iter::empty::<(&Atom, &Atom)>()).deserialize_map(visitor)
            }
            Datum::Set(_) => Err(de::Error::custom("a map expected, a set found")),
        }
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        _fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, DecodeError> {
        self.deserialize_map(visitor)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        name: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, DecodeError> {
        self.only_atom()?.deserialize_enum(name, variants, visitor)
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        visitor: V,
    ) -> Result<V::Value, DecodeError> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_unit<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, DecodeError> {
        self.deserialize_any(visitor)
    }

    fn deserialize_unit_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        visitor: V,
    ) -> Result<V::Value, DecodeError> {
        self.deserialize_any(visitor)
    }

    fn deserialize_ignored_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, DecodeError> {
        visitor.visit_unit()
    }
}

// === Atom ===

impl IntoDeserializer<'_, DecodeError> for &Atom {
    type Deserializer = Self;

    fn into_deserializer(self) -> Self {
        self
    }
}

impl<'de> Deserializer<'de> for &Atom {
    type Error = DecodeError;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, DecodeError> {
        match self {
            Atom::Integer(value) => visitor.visit_i64(*value),
            Atom::Real(value) => visitor.visit_f64(*value),
            Atom::Boolean(value) => visitor.visit_bool(*value),
            Atom::String(value) | Atom::NamedUuid(value) => visitor.visit_str(value),
            Atom::Uuid(value) => {
                visitor.visit_str(value.hyphenated().encode_lower(&mut Uuid::encode_buffer()))
            }
        }
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, DecodeError> {
        visitor.visit_some(self)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _name: &'static str,
        _variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, DecodeError> {
        match self {
            Atom::String(value) => visitor.visit_enum(value.as_str().into_deserializer()),
            other => Err(de::Error::custom(format_args!(
                "a string expected for an enum, {other:?} found"
            ))),
        }
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        visitor: V,
    ) -> Result<V::Value, DecodeError> {
        visitor.visit_newtype_struct(self)
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf
        unit unit_struct seq tuple tuple_struct map struct identifier ignored_any
    }
}
