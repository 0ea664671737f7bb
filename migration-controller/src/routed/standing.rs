//! The rows that make a guest's place a matter of which address set holds its address: what they
//! should be, and what is to be written to make them so.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use ovsdb_rs::{Datum, InsertOp, Mutation, Row, Transaction};
use uuid::Uuid;

use super::names::{CHASSIS, OWNER, SEGUE, ballast, inside_set, place_set};
use super::{Family, Topology};
use crate::ovn::{AddressSet, LogicalRouter, LogicalRouterPolicy, WRITER_LOCK};

/// Priority of policies that let traffic go its usual way.
const ALLOW: i64 = 1110;
/// Priority of policies that send traffic to a guest's gateway.
const REROUTE: i64 = 1100;

/// What a gateway has just translated back: replies to what a guest opened through it. Source:
/// ovn-sb(5), `ct.rpl`. Rerouted, they would make the guest's next packets pass for replies at its
/// new gateway, which would send them out untranslated.
const REPLY: &str = "ct.rpl";

/// What segue's rows should be.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Desired {
    /// Address sets by name.
    pub(super) sets: BTreeMap<String, Set>,
    /// Routing policies.
    pub(super) policies: BTreeSet<Policy>,
}

/// An address set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Set {
    /// The addresses of guests, which are not this module's business, and ballast.
    Place {
        /// `Chassis.name`.
        chassis: String,
        /// Which addresses.
        family: Family,
    },
    /// Networks.
    Inside(BTreeSet<String>),
}

/// A routing policy.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Policy {
    /// Its router's row.
    pub(super) router: Uuid,
    /// What traffic.
    pub(super) r#match: String,
    /// Where it is sent to; nowhere in particular where nothing is said.
    pub(super) next_hop: Option<IpAddr>,
}

/// What segue's rows are.
#[derive(Clone, Debug, Default)]
pub(super) struct Present {
    /// Its address sets.
    pub(super) sets: Vec<(Uuid, Arc<AddressSet>)>,
    /// Its routing policies.
    pub(super) policies: Vec<(Uuid, Arc<LogicalRouterPolicy>)>,
    /// All routers.
    pub(super) routers: Vec<(Uuid, Arc<LogicalRouter>)>,
}

/// What is to be written.
#[derive(Debug, Default)]
pub(super) struct Changes<'a> {
    new_sets: Vec<(&'a str, &'a Set)>,
    changed_sets: Vec<(Uuid, &'a AddressSet, Vec<Mutation>)>,
    old_sets: Vec<(Uuid, &'a AddressSet)>,
    new_policies: Vec<&'a Policy>,
    /// By router.
    old_policies: Vec<(Uuid, Uuid)>,
}

// === impl Desired ===

impl Desired {
    pub(super) fn of(topology: &Topology) -> Self {
        let mut desired = Self::default();
        for family in topology.families() {
            desired.inside(topology, family);
            for chassis in topology.gateways.keys() {
                desired.place(topology, family, chassis);
            }
        }
        for gateway in topology.gateways.values() {
            let from_inside = format!("inport == \"{}\"", gateway.port);
            let allowed = [from_inside, REPLY.to_owned()].map(|r#match| Policy {
                router: gateway.router,
                r#match,
                next_hop: None,
            });
            desired.policies.extend(allowed);
        }
        desired
    }

    fn inside(&mut self, topology: &Topology, family: Family) {
        let networks = topology.inside.iter();
        let networks = networks.filter(|network| network.family() == family);
        let set = inside_set(family);
        self.policies.insert(Policy {
            router: topology.cluster,
            r#match: format!("{}.dst == ${set}", family.field()),
            next_hop: None,
        });
        let members = Set::Inside(networks.map(ToString::to_string).collect());
        self.sets.insert(set, members);
    }

    /// The set of one chassis, and what leads to its gateway from everywhere else.
    fn place(&mut self, topology: &Topology, family: Family, chassis: &str) {
        let gateway = topology.gateways.get(chassis);
        let Some(next_hop) = gateway.and_then(|gateway| gateway.next_hops.get(&family)) else {
            return;
        };
        let (set, field) = (place_set(chassis, family), family.field());
        let next_hop = Some(*next_hop);
        self.policies.insert(Policy {
            router: topology.cluster,
            r#match: format!("{field}.src == ${set}"),
            next_hop,
        });
        let others = topology.gateways.iter();
        // A router without an address of this family has no way to the next hop.
        let others = others.filter(|(other, gateway)| {
            *other != chassis && gateway.next_hops.contains_key(&family)
        });
        self.policies.extend(others.map(|(_, other)| Policy {
            router: other.router,
            r#match: format!("{field}.dst == ${set}"),
            next_hop,
        }));
        let place = Set::Place {
            chassis: chassis.to_owned(),
            family,
        };
        self.sets.insert(set, place);
    }

    /// Names of the sets that are present for nothing.
    pub(super) fn unasked<'a>(&self, present: &'a Present) -> impl Iterator<Item = &'a str> {
        let names = present.sets.iter().map(|(_, row)| row.name.as_str());
        names.filter(|name| !self.sets.contains_key(*name))
    }

    /// What turns what is present into what is desired, less the removal of the sets `spared` and of
    /// the policies that match them.
    pub(super) fn changes<'a>(
        &'a self,
        present: &'a Present,
        spared: &BTreeSet<String>,
    ) -> Changes<'a> {
        let mut changes = Changes::default();
        self.compare_sets(present, spared, &mut changes);
        self.compare_policies(present, spared, &mut changes);
        changes
    }

    fn compare_sets<'a>(
        &'a self,
        present: &'a Present,
        spared: &BTreeSet<String>,
        changes: &mut Changes<'a>,
    ) {
        let mut missing: BTreeMap<_, _> = self.sets.iter().collect();
        for (uuid, row) in &present.sets {
            match missing.remove(&row.name) {
                None if spared.contains(&row.name) => {}
                None => changes.old_sets.push((*uuid, row)),
                Some(set) => {
                    let mutations = set.mutations(row);
                    if !mutations.is_empty() {
                        changes.changed_sets.push((*uuid, row, mutations));
                    }
                }
            }
        }
        let missing = missing.into_iter().map(|(name, set)| (name.as_str(), set));
        changes.new_sets.extend(missing);
    }

    fn compare_policies<'a>(
        &'a self,
        present: &'a Present,
        spared: &BTreeSet<String>,
        changes: &mut Changes<'a>,
    ) {
        let rows: HashMap<_, _> = present
            .policies
            .iter()
            .map(|(uuid, row)| (uuid, row))
            .collect();
        let mut missing: BTreeSet<_> = self.policies.iter().collect();
        for (router, row) in &present.routers {
            let ours = row.policies.iter();
            for (uuid, policy) in ours.filter_map(|uuid| Some((uuid, rows.get(uuid)?))) {
                let set = policy.r#match.rsplit_once('$').map(|(_, set)| set);
                if set.is_some_and(|set| spared.contains(set)) {
                    continue;
                }
                let found = Policy::of(*router, policy);
                if found.is_none_or(|found| !missing.remove(&found)) {
                    changes.old_policies.push((*router, *uuid));
                }
            }
        }
        changes.new_policies.extend(missing);
    }
}

// === impl Set ===

impl Set {
    fn external_ids(&self) -> Datum {
        let owner = (OWNER, SEGUE);
        match self {
            Self::Place { chassis, .. } => Datum::map([owner, (CHASSIS, chassis.as_str())]),
            Self::Inside(_) => Datum::map([owner]),
        }
    }

    /// The members to begin with.
    fn addresses(&self) -> Datum {
        match self {
            Self::Place { family, .. } => Datum::set(ballast(*family)),
            Self::Inside(networks) => Datum::set(networks.iter().map(String::as_str)),
        }
    }

    /// What brings a row in line.
    fn mutations(&self, row: &AddressSet) -> Vec<Mutation> {
        let mut mutations = Vec::new();
        match self {
            Self::Place { chassis, family } => {
                if row.external_ids.get(CHASSIS) != Some(chassis) {
                    mutations.extend(Mutation::put("external_ids", CHASSIS, chassis.as_str()));
                }
                let ballast = ballast(*family);
                if !ballast
                    .iter()
                    .all(|address| row.addresses.contains(*address))
                {
                    mutations.push(Mutation::insert("addresses", Datum::set(ballast)));
                }
            }
            Self::Inside(networks) => {
                let gone: Vec<_> = row.addresses.difference(networks).collect();
                if !gone.is_empty() {
                    let gone = Datum::set(gone.into_iter().map(String::as_str));
                    mutations.push(Mutation::delete("addresses", gone));
                }
                let come: Vec<_> = networks.difference(&row.addresses).collect();
                if !come.is_empty() {
                    let come = Datum::set(come.into_iter().map(String::as_str));
                    mutations.push(Mutation::insert("addresses", come));
                }
            }
        }
        mutations
    }
}

// === impl Policy ===

impl Policy {
    /// What a row says; `None` where it says something that segue never does.
    fn of(router: Uuid, row: &LogicalRouterPolicy) -> Option<Self> {
        let next_hop = match &row.nexthops[..] {
            [] => None,
            [only] => Some(only.parse().ok()?),
            _ => return None,
        };
        let policy = Self {
            router,
            r#match: row.r#match.clone(),
            next_hop,
        };
        let same = row.priority == policy.priority() && row.action == policy.action();
        same.then_some(policy)
    }

    fn priority(&self) -> i64 {
        if self.next_hop.is_some() {
            REROUTE
        } else {
            ALLOW
        }
    }

    fn action(&self) -> &'static str {
        if self.next_hop.is_some() {
            "reroute"
        } else {
            "allow"
        }
    }

    fn row(&self) -> Row {
        let hops = self.next_hop.iter().map(ToString::to_string);
        Row::new()
            .set("priority", self.priority())
            .set("match", self.r#match.as_str())
            .set("action", self.action())
            .set("nexthops", Datum::set(hops))
            .set("external_ids", Datum::map([(OWNER, SEGUE)]))
    }
}

// === impl Changes ===

impl Changes<'_> {
    pub(super) fn is_empty(&self) -> bool {
        self.new_sets.is_empty()
            && self.changed_sets.is_empty()
            && self.old_sets.is_empty()
            && self.new_policies.is_empty()
            && self.old_policies.is_empty()
    }

    /// How many rows come, change and go.
    pub(super) fn counts(&self) -> [usize; 3] {
        [
            self.new_sets.len() + self.new_policies.len(),
            self.changed_sets.len(),
            self.old_sets.len() + self.old_policies.len(),
        ]
    }

    /// One transaction: a policy whose set is not there yet would match nothing and be logged as an
    /// error by every chassis.
    ///
    /// Guarded by the marks of every set that changes or goes, and by the name of every router whose
    /// policies come or go: a row made again under the same name is another row. Policies themselves
    /// need no guard: they are found by row in their routers' references, and never changed.
    pub(super) fn transaction(&self, routers: &[(Uuid, Arc<LogicalRouter>)]) -> Transaction {
        let mut tx = Transaction::new();
        tx.assert_lock(WRITER_LOCK);
        let ours = |row: &AddressSet| {
            let ids = row.external_ids.iter();
            Row::new().set(
                "external_ids",
                Datum::map(ids.map(|(k, v)| (k.as_str(), v.as_str()))),
            )
        };
        for (uuid, row, mutations) in &self.changed_sets {
            tx.expect("Address_Set", *uuid, ours(row));
            tx.mutate("Address_Set", *uuid, mutations.iter().cloned());
        }
        for (uuid, row) in &self.old_sets {
            tx.expect("Address_Set", *uuid, ours(row));
            tx.delete("Address_Set", *uuid);
        }
        for (name, set) in &self.new_sets {
            let row = Row::new()
                .set("name", *name)
                .set("addresses", set.addresses())
                .set("external_ids", set.external_ids());
            tx.insert("Address_Set", row);
        }
        let mut come: BTreeMap<Uuid, Vec<InsertOp>> = BTreeMap::new();
        for policy in &self.new_policies {
            let insert = tx.insert("Logical_Router_Policy", policy.row());
            come.entry(policy.router).or_default().push(insert);
        }
        let mut gone: BTreeMap<Uuid, Vec<Uuid>> = BTreeMap::new();
        for (router, policy) in &self.old_policies {
            gone.entry(*router).or_default().push(*policy);
        }
        for (uuid, router) in routers {
            let (come, gone) = (come.remove(uuid), gone.remove(uuid));
            if come.is_none() && gone.is_none() {
                continue;
            }
            let name = Row::new().set("name", router.name.as_str());
            tx.expect("Logical_Router", *uuid, name);
            let delete = gone.map(|gone| Mutation::delete("policies", Datum::set(gone)));
            let come = come.map(Datum::set);
            let insert = come.map(|come| Mutation::insert("policies", come));
            tx.mutate("Logical_Router", *uuid, delete.into_iter().chain(insert));
        }
        tx.comment("segue: the routed topology's rows");
        tx
    }
}
