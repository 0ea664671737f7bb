//! Which OpenFlow two ends can both speak.

use std::fmt;

/// A version of the protocol, by its number on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Version {
    /// OpenFlow 1.0.
    V10 = 1,
    /// OpenFlow 1.1.
    V11 = 2,
    /// OpenFlow 1.2.
    V12 = 3,
    /// OpenFlow 1.3.
    V13 = 4,
    /// OpenFlow 1.4.
    V14 = 5,
    /// OpenFlow 1.5.
    V15 = 6,
}

/// A set of versions, bit n for version n, as `OFPHET_VERSIONBITMAP` has it (OpenFlow 1.3.1, section 7.5.1). Versions
/// beyond 31 are not in any set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Versions(u32);

impl Version {
    /// Oldest first.
    pub const ALL: [Self; 6] = [
        Self::V10,
        Self::V11,
        Self::V12,
        Self::V13,
        Self::V14,
        Self::V15,
    ];

    /// As in a message's header.
    pub fn number(self) -> u8 {
        self as u8
    }
}

impl Versions {
    /// What this module speaks.
    pub const OURS: Self = Self(0b0111_1110);

    /// A bitmap of a hello.
    pub(super) fn from_bits(bits: u32) -> Self {
        Self(bits)
    }

    pub(super) fn bits(self) -> u32 {
        self.0
    }

    /// What a hello without a bitmap says: every version up to its header's (OpenFlow 1.3.1, section 6.3.1).
    pub(super) fn up_to(number: u8) -> Self {
        let bits = 2_u32
            .checked_shl(number.into())
            .map_or(u32::MAX, |above| above.wrapping_sub(1));
        // There is no version 0.
        Self(bits & !1)
    }

    /// The newest version in both.
    pub(super) fn newest_common(self, other: Self) -> Option<Version> {
        let common = self.0 & other.0;
        Version::ALL
            .into_iter()
            .rev()
            .find(|version| common & 1 << version.number() != 0)
    }
}

impl fmt::Display for Version {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "1.{}", self.number() - 1)
    }
}

impl fmt::Display for Versions {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut first = true;
        for number in 0..32_u8 {
            if self.0 & 1 << number == 0 {
                continue;
            }
            if !first {
                out.write_str(", ")?;
            }
            first = false;
            match number {
                1.. => write!(out, "1.{}", number - 1)?,
                0 => out.write_str("0")?,
            }
        }
        if first {
            out.write_str("none")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hello_without_a_bitmap_speaks_all_older_versions() {
        assert_eq!(Versions::up_to(0).bits(), 0);
        assert_eq!(Versions::up_to(1).bits(), 0b10);
        assert_eq!(Versions::up_to(6), Versions::OURS);
        assert_eq!(Versions::up_to(31).bits(), !1);
        assert_eq!(Versions::up_to(255).bits(), !1);
    }

    #[test]
    fn the_newest_common_version_wins() {
        let common = |bits| Versions::OURS.newest_common(Versions::from_bits(bits));
        assert_eq!(common(0b1000_0010), Some(Version::V10));
        assert_eq!(common(0b0001_0010), Some(Version::V13));
        assert_eq!(common(u32::MAX), Some(Version::V15));
        assert_eq!(common(0b1000_0001), None);
        assert_eq!(common(0), None);
    }

    #[test]
    fn versions_are_named_as_people_name_them() {
        assert_eq!(
            Versions::from_bits(0b0101_0010).to_string(),
            "1.0, 1.3, 1.5"
        );
        assert_eq!(Versions::from_bits(0).to_string(), "none");
        assert_eq!(Version::V15.to_string(), "1.5");
    }
}
