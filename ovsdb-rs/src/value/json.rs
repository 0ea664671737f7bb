//! The JSON notation of values (RFC 7047, section 5.1: `<atom>`, `<value>`).

use std::fmt;

use serde::de::{Deserialize, Deserializer, Error as _, SeqAccess, Visitor};
use serde::ser::{Serialize, Serializer};
use uuid::Uuid;

use super::{Atom, Datum};

impl Serialize for Atom {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Integer(value) => serializer.serialize_i64(*value),
            Self::Real(value) => serializer.serialize_f64(*value),
            Self::Boolean(value) => serializer.serialize_bool(*value),
            Self::String(value) => serializer.serialize_str(value),
            Self::Uuid(value) => ("uuid", value).serialize(serializer),
            Self::NamedUuid(name) => ("named-uuid", name).serialize(serializer),
        }
    }
}

impl Serialize for Datum {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Set(atoms) => match self.scalar() {
                Some(atom) => atom.serialize(serializer),
                None => ("set", atoms).serialize(serializer),
            },
            Self::Map(pairs) => ("map", pairs).serialize(serializer),
        }
    }
}

impl<'de> Deserialize<'de> for Atom {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match deserializer.deserialize_any(ValueVisitor { atom: true })? {
            Value::Atom(atom) => Ok(atom),
            Value::Datum(_) => Err(D::Error::custom("a set or map where an atom belongs")),
        }
    }
}

impl<'de> Deserialize<'de> for Datum {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match deserializer.deserialize_any(ValueVisitor { atom: false })? {
            Value::Atom(atom) => Ok(atom.into()),
            Value::Datum(datum) => Ok(datum),
        }
    }
}

enum Value {
    Atom(Atom),
    Datum(Datum),
}

struct ValueVisitor {
    /// Sets and maps hold atoms only, so nesting ends here.
    atom: bool,
}

impl<'de> Visitor<'de> for ValueVisitor {
    type Value = Value;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(if self.atom {
            "an OVSDB atom"
        } else {
            "an OVSDB value"
        })
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Atom(Atom::Boolean(value)))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(Value::Atom(Atom::Integer(value)))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        // A real may be printed without a fraction; beyond i64 it cannot be an integer.
        #[allow(
            clippy::cast_precision_loss,
            reason = "a real has no more digits than an f64"
        )]
        let atom = i64::try_from(value).map_or(Atom::Real(value as f64), Atom::Integer);
        Ok(Value::Atom(atom))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(Value::Atom(Atom::Real(value)))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(Value::Atom(Atom::String(value.to_owned())))
    }

    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(Value::Atom(Atom::String(value)))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Value, A::Error> {
        let tag: String = next(&mut seq)?;
        let value = match tag.as_str() {
            "uuid" => Value::Atom(Atom::Uuid(next::<Uuid, _>(&mut seq)?)),
            "named-uuid" => Value::Atom(Atom::NamedUuid(next(&mut seq)?)),
            "set" if !self.atom => {
                let atoms: Vec<Atom> = next(&mut seq)?;
                Value::Datum(Datum::set(atoms))
            }
            "map" if !self.atom => {
                let pairs: Vec<(Atom, Atom)> = next(&mut seq)?;
                Value::Datum(Datum::map(pairs))
            }
            other => {
                return Err(A::Error::custom(format_args!(
                    "an array tagged {other:?} where {} belongs",
                    if self.atom { "an atom" } else { "a value" },
                )));
            }
        };
        match seq.next_element::<serde::de::IgnoredAny>()? {
            None => Ok(value),
            Some(_) => Err(A::Error::custom(format_args!(
                "more than two elements in an array tagged {tag:?}"
            ))),
        }
    }
}

fn next<'de, T: Deserialize<'de>, A: SeqAccess<'de>>(seq: &mut A) -> Result<T, A::Error> {
    seq.next_element()?.ok_or_else(|| {
        A::Error::custom("an array too short for the notation [\"tag\", value] of OVSDB")
    })
}
