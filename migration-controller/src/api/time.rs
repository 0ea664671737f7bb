use std::borrow::Cow;
use std::fmt;

use handover::Timestamp;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A moment to the microsecond; RFC 3339 with six decimals on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Moment(jiff::Timestamp);

impl Moment {
    /// The present moment.
    pub fn now() -> Self {
        Self::from_jiff(jiff::Timestamp::now())
    }

    /// A moment, less what is below a microsecond, so that it reads back as it was written.
    pub fn from_jiff(at: jiff::Timestamp) -> Self {
        Self(jiff::Timestamp::from_microsecond(at.as_microsecond()).unwrap_or(at))
    }

    /// The same as a `jiff` timestamp.
    pub fn as_jiff(self) -> jiff::Timestamp {
        self.0
    }

    /// The moment so many seconds later.
    #[must_use]
    pub fn after_seconds(self, seconds: f64) -> Self {
        let later = jiff::SignedDuration::try_from_secs_f64(seconds)
            .ok()
            .and_then(|span| self.0.checked_add(span).ok());
        later.map_or(self, Self::from_jiff)
    }

    /// Seconds from `earlier` to this moment; negative when it is not earlier.
    pub fn seconds_since(self, earlier: Self) -> f64 {
        self.0.duration_since(earlier.0).as_secs_f64()
    }
}

impl From<Moment> for Timestamp {
    fn from(moment: Moment) -> Self {
        Self(u64::try_from(moment.0.as_millisecond()).unwrap_or_default())
    }
}

impl From<jiff::Timestamp> for Moment {
    fn from(at: jiff::Timestamp) -> Self {
        Self::from_jiff(at)
    }
}

impl fmt::Display for Moment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.6}", self.0)
    }
}

impl Serialize for Moment {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Moment {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        jiff::Timestamp::deserialize(deserializer).map(Self::from_jiff)
    }
}

impl JsonSchema for Moment {
    fn schema_name() -> Cow<'static, str> {
        "Moment".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "type": "string", "format": "date-time" })
    }
}
