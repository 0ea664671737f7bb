//! Addresses in place sets that belong to no port any more.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;

use ovsdb_rs::{Datum, Mutation, Row, Transaction};
use uuid::Uuid;

use super::names::ballast;
use crate::ovn::{Databases, WRITER_LOCK};

/// Members of place sets that no port has, by set, as the sets have them; with the set's name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Strays(BTreeMap<Uuid, (String, BTreeSet<String>)>);

/// The members of place sets that no port of a machine has, whoever that machine is: one that is
/// switched off may keep its port, and that its address.
pub(super) fn strays(databases: &Databases) -> Strays {
    let mut strays = BTreeMap::new();
    for (family, uuid, set) in databases.place_sets().iter() {
        let ballast = ballast(family);
        let is_stray = |text: &&String| {
            let address = text.parse::<IpAddr>();
            let held = address.is_ok_and(|address| {
                // A member that is spelt otherwise leads nowhere that segue would look.
                address.to_string() == **text && !databases.ports_with(address).is_empty()
            });
            !held && !ballast.contains(&text.as_str())
        };
        let found: BTreeSet<_> = set.addresses.iter().filter(is_stray).cloned().collect();
        if !found.is_empty() {
            strays.insert(uuid, (set.name.clone(), found));
        }
    }
    Strays(strays)
}

impl Strays {
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn count(&self) -> usize {
        self.0.values().map(|(_, members)| members.len()).sum()
    }

    /// Those that were strays before already.
    pub(super) fn still(&self, before: &Self) -> Self {
        let both = self.0.iter().filter_map(|(uuid, (name, members))| {
            let (_, earlier) = before.0.get(uuid)?;
            let both: BTreeSet<_> = members.intersection(earlier).cloned().collect();
            (!both.is_empty()).then(|| (*uuid, (name.clone(), both)))
        });
        Self(both.collect())
    }

    /// What takes them out; nothing where there are none.
    ///
    /// No guard of OVSDB's can say that no port has an address. One that came back in the same
    /// moment loses its place and gets it again as soon as its VM is looked at.
    pub(super) fn transaction(&self) -> Option<Transaction> {
        if self.is_empty() {
            return None;
        }
        let mut tx = Transaction::new();
        tx.assert_lock(WRITER_LOCK);
        for (uuid, (name, members)) in &self.0 {
            tx.expect("Address_Set", *uuid, Row::new().set("name", name.as_str()));
            let members = Datum::set(members.iter().map(String::as_str));
            tx.mutate(
                "Address_Set",
                *uuid,
                [Mutation::delete("addresses", members)],
            );
        }
        tx.comment("segue: addresses that belong to no port");
        Some(tx)
    }
}

impl fmt::Display for Strays {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let members = self.0.values().flat_map(|(_, members)| members);
        let members: Vec<_> = members.map(String::as_str).collect();
        f.write_str(&members.join(", "))
    }
}
