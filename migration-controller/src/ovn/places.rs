//! Where the routes of one VM lead, and what makes them lead elsewhere.
//!
//! A guest's place is which address set holds its address (see `docs/routed.md`). The sets of a
//! cluster are few and each is asked for one address at a time: an index of all addresses would be
//! rebuilt from a whole set at every flip.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use handover::{Route, RouteKey, RouteWrite};
use ovsdb_rs::{Condition, Datum, Mutation, Row, Snapshot, Transaction};
use uuid::Uuid;

use super::{AddressSet, Mismatch};
use crate::routed::{Family, names};

/// What of the routed topology concerns one VM.
#[derive(Clone, Debug, Default)]
pub(crate) struct Places {
    /// The VM's routes: one for each of its addresses.
    pub(crate) routes: Vec<Route>,
    /// Names of the chassis whose gateways carry every family of the VM's.
    pub(crate) gateways: BTreeSet<String>,
    /// Addresses that a port of another VM has as well. They are left alone: nobody can say whose
    /// place is theirs.
    pub(crate) disputed: BTreeSet<IpAddr>,
    /// Addresses that every set has as ballast. They are left alone: to look at the sets, they would
    /// lead everywhere.
    pub(crate) reserved: BTreeSet<IpAddr>,
    /// What they are read from and written to.
    pub(crate) sets: PlaceSets,
}

/// The place sets there are, by chassis and family.
#[derive(Clone, Debug, Default)]
pub(crate) struct PlaceSets(BTreeMap<(String, Family), (Uuid, Arc<AddressSet>)>);

// === impl PlaceSets ===

impl PlaceSets {
    pub(super) fn of(nb: &Snapshot) -> Self {
        let placed = |(uuid, row): (&Uuid, &Arc<AddressSet>)| {
            let chassis = row.external_ids.get(names::CHASSIS)?;
            let family = names::family(&row.name)?;
            Some(((chassis.clone(), family), (*uuid, row.clone())))
        };
        Self(nb.iter::<AddressSet>().filter_map(placed).collect())
    }

    /// The sets of guests' addresses.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (Family, Uuid, &AddressSet)> {
        let sets = self.0.iter();
        sets.map(|((_, family), (uuid, row))| (*family, *uuid, &**row))
    }

    fn leads_to(&self, address: IpAddr) -> BTreeSet<String> {
        let (family, text) = (Family::of(address), address.to_string());
        let sets = self.0.iter();
        sets.filter(|((_, of), (_, row))| *of == family && row.addresses.contains(&text))
            .map(|((chassis, _), _)| chassis.clone())
            .collect()
    }

    fn chassis(&self, family: Family) -> BTreeSet<String> {
        let keys = self.0.keys();
        keys.filter(|(_, of)| *of == family)
            .map(|(chassis, _)| chassis.clone())
            .collect()
    }
}

// === impl Places ===

impl Places {
    /// The places of a VM with these addresses. One of a family that no gateway carries is no route.
    pub(super) fn of(
        sets: PlaceSets,
        addresses: &BTreeSet<IpAddr>,
        disputed: BTreeSet<IpAddr>,
    ) -> Self {
        let carried: BTreeMap<_, _> = Family::ALL
            .into_iter()
            .map(|family| (family, sets.chassis(family)))
            .filter(|(_, chassis)| !chassis.is_empty())
            .collect();
        let reserved: BTreeSet<_> = addresses.iter().copied().filter(is_ballast).collect();
        let routed: Vec<_> = addresses
            .difference(&disputed)
            .filter(|address| !reserved.contains(address))
            .filter(|address| carried.contains_key(&Family::of(**address)))
            .collect();
        let needed: BTreeSet<_> = routed.iter().map(|address| Family::of(**address)).collect();
        let common = needed
            .iter()
            .filter_map(|family| carried.get(family).cloned());
        let gateways = common.reduce(|all, more| all.intersection(&more).cloned().collect());
        let route = |address: &IpAddr| Route {
            key: RouteKey::new(address.to_string()),
            leads_to: sets.leads_to(*address),
        };
        Self {
            routes: routed.into_iter().map(route).collect(),
            gateways: gateways.unwrap_or_default(),
            disputed,
            reserved,
            sets,
        }
    }

    /// The families of the VM's routes that no gateway of a chassis carries.
    pub(crate) fn not_carried_by(&self, chassis: &str) -> BTreeSet<Family> {
        let addresses = self
            .routes
            .iter()
            .filter_map(|route| route.key.as_str().parse().ok());
        let families: BTreeSet<_> = addresses.map(Family::of).collect();
        let carries = |family: &Family| self.sets.0.contains_key(&(chassis.to_owned(), *family));
        families
            .into_iter()
            .filter(|family| !carries(family))
            .collect()
    }

    /// Adds the changes to a transaction, each with its guards: that an address is in the sets that
    /// it leaves, and is not in the one that it comes to. What else a set holds is nobody's business
    /// here, so the flips of many VMs do not refuse each other. That no third set has the address is
    /// not asked of every one of them: only whoever holds the lock puts addresses in, and one that
    /// is in two sets all the same is seen and mended.
    pub(super) fn change(
        &self,
        writes: &[RouteWrite],
        tx: &mut Transaction,
    ) -> Result<(), Mismatch> {
        let mut changes: BTreeMap<Uuid, (Vec<&str>, Vec<&str>)> = BTreeMap::new();
        for write in writes {
            let text = write.route.as_str();
            let member = || Datum::set([text]);
            for chassis in &write.from {
                let (uuid, row) = self.set(&write.route, chassis)?;
                if write.to.as_ref() == Some(chassis) {
                    continue;
                }
                let has = Condition::includes("addresses", member());
                tx.expect("Address_Set", [Condition::uuid(uuid), has], named(row));
                changes.entry(uuid).or_default().0.push(text);
            }
            if let Some(to) = write.to.as_ref().filter(|to| !write.from.contains(*to)) {
                let (uuid, row) = self.set(&write.route, to)?;
                let lacks = Condition::excludes("addresses", member());
                tx.expect("Address_Set", [Condition::uuid(uuid), lacks], named(row));
                changes.entry(uuid).or_default().1.push(text);
            }
        }
        for (uuid, (gone, come)) in changes {
            let delete = Mutation::delete("addresses", Datum::set(gone));
            let insert = Mutation::insert("addresses", Datum::set(come));
            tx.mutate("Address_Set", uuid, [delete, insert]);
        }
        Ok(())
    }

    fn set(&self, route: &RouteKey, chassis: &str) -> Result<(Uuid, &AddressSet), Mismatch> {
        let mismatch = || Mismatch::Place {
            route: route.clone(),
            chassis: chassis.to_owned(),
        };
        let address: IpAddr = route.as_str().parse().map_err(|_| mismatch())?;
        let key = (chassis.to_owned(), Family::of(address));
        let (uuid, row) = self.sets.0.get(&key).ok_or_else(mismatch)?;
        Ok((*uuid, row))
    }
}

fn is_ballast(address: &IpAddr) -> bool {
    let text = address.to_string();
    names::ballast(Family::of(*address)).contains(&text.as_str())
}

/// A column whose value identifies the row: a guard's `where` does the rest.
fn named(row: &AddressSet) -> Row {
    Row::new().set("name", row.name.as_str())
}
