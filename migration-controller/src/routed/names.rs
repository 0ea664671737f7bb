//! What the routed topology's rows are called.

use super::Family;

/// Key of `external_ids`: whose row it is. The same as on ports that segue holds.
pub(crate) const OWNER: &str = handover::Mark::OWNER;
/// Its value.
pub(crate) const SEGUE: &str = "segue";
/// Key of `external_ids`: the `Chassis.name` that a place set stands for.
pub(crate) const CHASSIS: &str = "segue.io/chassis";

/// Addresses of documentation (RFC 5737, RFC 3849) that keep every place set's size above one:
/// ovn-controller follows a smaller set's changes by recomputing.
pub(crate) fn ballast(family: Family) -> [&'static str; 2] {
    match family {
        Family::Ip4 => ["192.0.2.1", "192.0.2.2"],
        Family::Ip6 => ["2001:db8::1", "2001:db8::2"],
    }
}

/// Name of the set with the addresses of the guests whose outside traffic takes the chassis' gateway.
pub(crate) fn place_set(chassis: &str, family: Family) -> String {
    format!("segue_{}_{}", id(chassis), family.field())
}

/// The family of a place set, by its name.
pub(crate) fn family(set: &str) -> Option<Family> {
    let (_, ending) = set.rsplit_once('_')?;
    Family::ALL
        .into_iter()
        .find(|family| family.field() == ending)
}

/// Name of the set with the networks inside.
pub(crate) fn inside_set(family: Family) -> String {
    format!("segue_inside_{}", family.field())
}

/// The chassis' name in the letters that an address set's may have (ovn-nb(5)), and a hash of it:
/// two names that differ only in other letters must not share a set.
fn id(chassis: &str) -> String {
    let letter = |c: char| {
        if c.is_ascii_alphanumeric() || c == '.' {
            c
        } else {
            '_'
        }
    };
    let letters: String = chassis.chars().map(letter).collect();
    format!("{letters}_{:016x}", fnv1a(chassis.as_bytes()))
}

/// FNV-1a, 64 bits: it must be the same in every version of segue, which no hasher of the standard
/// library promises.
fn fnv1a(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sets_name_has_allowed_letters_only_and_is_the_chassis_own() {
        let names = ["node-1", "node_1", "node.1", "3f2a-88", "ä", ""];
        let sets: std::collections::BTreeSet<_> = names
            .iter()
            .map(|name| place_set(name, Family::Ip4))
            .collect();
        assert_eq!(sets.len(), names.len());
        for set in &sets {
            assert!(
                set.chars()
                    .all(|c| c.is_ascii_alphanumeric() || c == '_' || c == '.'),
                "{set}"
            );
        }
        assert!(!sets.contains(&inside_set(Family::Ip4)));
    }

    #[test]
    fn a_sets_name_stays_what_it_was_in_earlier_versions() {
        // FNV-1a's own test vector for "a".
        assert_eq!(place_set("a", Family::Ip6), "segue_a_af63dc4c8601ec8c_ip6");
    }
}
