//! Static routes of others that lead to a VM by where it is, and what makes them lead elsewhere.
//!
//! The cluster router has a route to each of the VM's addresses, out of its port on the switch of the
//! VM's node. It is that port which changes, in place: a route that is deleted and made again is, for
//! the seconds that northd computes, no route.

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
    /// Names of the chassis that they can lead to.
    pub(crate) gateways: BTreeSet<String>,
    rows: BTreeMap<RouteKey, (Uuid, Arc<LogicalRouterStaticRoute>)>,
    /// The cluster router's port towards each chassis.
    ports: BTreeMap<String, String>,
}

impl StaticRoutes {
    /// The cluster router's routes to these addresses. An address with several routes has none that
    /// could be said to lead to one place.
    pub(super) fn of(
        nb: &Snapshot,
        tables: &RoutedTables,
        topology: &Topology,
        addresses: &BTreeSet<IpAddr>,
        chassis_of: &dyn Fn(&str) -> Option<String>,
    ) -> Self {
        let switches = topology.switches.values();
        let ports: BTreeMap<_, _> = switches
            .filter_map(|switch| Some((chassis_of(&switch.node)?, switch.port.clone())))
            .collect();
        let router = nb.get::<LogicalRouter>(&topology.cluster);
        let of_router = |uuid: &Uuid| {
            let router = router.as_ref();
            router.is_some_and(|router| router.static_routes.contains(uuid))
        };
        let mut found = Self {
            gateways: ports.keys().cloned().collect(),
            ports,
            ..Self::default()
        };
        for address in addresses {
            let mut rows = nb.lookup(&tables.routes_by_address, address);
            rows.retain(|(uuid, _)| of_router(uuid));
            if let [(uuid, row)] = &rows[..] {
                found.take(*uuid, row);
            }
        }
        found
    }

    fn take(&mut self, uuid: Uuid, row: &Arc<LogicalRouterStaticRoute>) {
        let key = RouteKey::new(&row.ip_prefix);
        let ports = self.ports.iter();
        let leads_to = ports
            .filter(|(_, port)| row.output_port.as_ref() == Some(port))
            .map(|(chassis, _)| chassis.clone())
            .collect();
        self.routes.push(Route {
            key: key.clone(),
            leads_to,
        });
        self.rows.insert(key, (uuid, row.clone()));
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
            let port = self.ports.get(to).ok_or_else(|| place(to))?;
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
