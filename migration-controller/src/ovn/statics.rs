//! Static routes of others that lead to a VM by where it is, and what makes them lead elsewhere.
//!
//! The cluster router has a route to each of the VM's addresses, out of its port on the switch of the
//! VM's node. It is that port which changes, in place: a route that is deleted and made again is, for
//! the seconds that northd computes, no route. A route that leads out of any other port leads
//! elsewhere, and is left alone.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use handover::{Route, RouteKey, RouteWrite};
use ovsdb_rs::{Datum, Row, Snapshot, Transaction};
use uuid::Uuid;

use super::routed::RoutedTables;
use super::{LogicalRouter, LogicalRouterStaticRoute, Mismatch};
use crate::routed::Topology;

/// The static routes to one VM.
#[derive(Clone, Debug, Default)]
pub(crate) struct StaticRoutes {
    /// Where they lead.
    pub(crate) routes: Vec<Route>,
    /// Names of the chassis that all of them can lead to: where the VM has ports with the addresses.
    pub(crate) gateways: BTreeSet<String>,
    /// Addresses that no port may leave: their routes would not follow.
    stuck: BTreeSet<IpAddr>,
    rows: BTreeMap<RouteKey, (Uuid, Arc<LogicalRouterStaticRoute>)>,
    /// The switch of each chassis' node, with the cluster router's port on it.
    switches: BTreeMap<String, (Uuid, String)>,
}

/// The addresses of a VM by how they are held.
pub(super) struct Held<'a> {
    /// The routed switches that have ports of the VM with the address.
    pub(super) on: BTreeMap<IpAddr, BTreeSet<Uuid>>,
    /// Those that other VMs have as well.
    pub(super) disputed: &'a BTreeSet<IpAddr>,
}

impl StaticRoutes {
    /// The cluster router's routes to these addresses. An address with several routes has none that
    /// could be said to lead to one place.
    pub(super) fn of(
        nb: &Snapshot,
        tables: &RoutedTables,
        topology: &Topology,
        held: &Held<'_>,
        chassis_of: &dyn Fn(&str) -> Option<String>,
    ) -> Self {
        let mut switches: BTreeMap<String, (Uuid, String)> = BTreeMap::new();
        let mut places: BTreeMap<&str, String> = BTreeMap::new();
        for (uuid, switch) in &topology.switches {
            let chassis = chassis_of(&switch.node);
            if let Some(chassis) = &chassis {
                let known = || (*uuid, switch.port.clone());
                switches.entry(chassis.clone()).or_insert_with(known);
            }
            // A node that is no more is still a place that a route can be led away from.
            let place = chassis.unwrap_or_else(|| switch.node.clone());
            places.insert(&switch.port, place);
        }
        let router = nb.get::<LogicalRouter>(&topology.cluster);
        let of_router = |uuid: &Uuid| {
            let router = router.as_ref();
            router.is_some_and(|router| router.static_routes.contains(uuid))
        };
        let mut found = Self {
            switches,
            ..Self::default()
        };
        let mut reach = Vec::new();
        for (address, on) in &held.on {
            let mut rows = nb.lookup(&tables.routes_by_address, address);
            rows.retain(|(uuid, _)| of_router(uuid));
            let place = |row: &LogicalRouterStaticRoute| {
                let port = row.output_port.as_deref()?;
                places.get(port).cloned()
            };
            match &rows[..] {
                [(uuid, row)] if !held.disputed.contains(address) => {
                    if let Some(place) = place(row) {
                        found.take(*uuid, row, place);
                        reach.push(found.chassis_on(on));
                    }
                }
                rows => {
                    if rows.iter().any(|(_, row)| place(row).is_some()) {
                        found.stuck.insert(*address);
                    }
                }
            }
        }
        let common = reach.into_iter();
        let common = common.reduce(|all, more| all.intersection(&more).cloned().collect());
        found.gateways = common.unwrap_or_default();
        found
    }

    fn take(&mut self, uuid: Uuid, row: &Arc<LogicalRouterStaticRoute>, place: String) {
        let key = RouteKey::new(&row.ip_prefix);
        self.routes.push(Route {
            key: key.clone(),
            leads_to: BTreeSet::from([place]),
        });
        self.rows.insert(key, (uuid, row.clone()));
    }

    fn chassis_on(&self, switches: &BTreeSet<Uuid>) -> BTreeSet<String> {
        let all = self.switches.iter();
        all.filter(|(_, (switch, _))| switches.contains(switch))
            .map(|(chassis, _)| chassis.clone())
            .collect()
    }

    /// The switch of the node of a chassis.
    pub(crate) fn switch_for(&self, chassis: &str) -> Option<Uuid> {
        self.switches.get(chassis).map(|(switch, _)| *switch)
    }

    /// Those of these addresses whose routes would stay behind where a port that has them moved.
    pub(super) fn stuck(&self, addresses: impl IntoIterator<Item = IpAddr>) -> Vec<IpAddr> {
        let addresses = addresses.into_iter();
        addresses
            .filter(|address| self.stuck.contains(address))
            .collect()
    }

    /// Adds the changes to a transaction, each guarded by what the route says now.
    pub(super) fn change(
        &self,
        writes: &[RouteWrite],
        tx: &mut Transaction,
    ) -> Result<(), Mismatch> {
        for write in writes {
            let place = |chassis: &str| Mismatch::Place {
                route: write.route.clone(),
                chassis: chassis.to_owned(),
            };
            let to = write.to.as_deref().unwrap_or_default();
            let (_, port) = self.switches.get(to).ok_or_else(|| place(to))?;
            let (uuid, row) = self.rows.get(&write.route).ok_or_else(|| place(to))?;
            let now = Datum::set(row.output_port.as_deref());
            let guard = Row::new()
                .set("ip_prefix", row.ip_prefix.as_str())
                .set("output_port", now);
            tx.expect("Logical_Router_Static_Route", *uuid, guard);
            let row = Row::new().set("output_port", port.as_str());
            tx.update("Logical_Router_Static_Route", *uuid, row);
        }
        Ok(())
    }
}
