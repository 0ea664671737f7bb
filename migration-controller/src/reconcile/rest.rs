//! The place of a guest that no migration moves.

use std::collections::BTreeSet;

use handover::{Chassis, Mark, RouteWrite, Step, Write};

use crate::api::RoutingMode;
use crate::cluster::VmObjects;
use crate::ovn::{Places, PortRow, guards};

/// What is to be done about the routes of a guest at rest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Rest {
    /// Nothing: they lead to where it is, it has none, or its place is not certain yet. What makes it
    /// certain is news of this VM's.
    Settled,
    /// Nothing until its node's chassis is known, which may be news of any kind.
    Unmapped,
    /// This.
    Place(Write),
}

/// Looks at a VM without an open handover.
///
/// Its node is believed only where its ports are bound there and nowhere else: KubeVirt's word and
/// OVN's come separately, and one of them can be from before the last migration.
pub(super) fn rest(
    objects: &VmObjects,
    ports: &[PortRow],
    places: &Places,
    mode: RoutingMode,
    chassis_of: &dyn Fn(&str) -> Option<Chassis>,
) -> Rest {
    let instance = objects.vmi.as_ref().filter(|vmi| !vmi.is_final());
    let node = instance.and_then(|vmi| vmi.node_name());
    let (Some(node), false) = (node, places.routes.is_empty()) else {
        return Rest::Settled;
    };
    let Some(here) = chassis_of(node) else {
        return Rest::Unmapped;
    };
    let marked = |ids: &std::collections::BTreeMap<_, _>| ids.contains_key(Mark::OWNER);
    let certain = ports
        .iter()
        .all(|row| row.binding.is_only_on(&here) && !marked(&row.external_ids));
    if !certain {
        return Rest::Settled;
    }
    let routes = match mode {
        RoutingMode::AddressSets => astray(places, &here),
        // Of the sets, whose policies would outweigh the routes, nothing is left.
        RoutingMode::StaticRoutes => leads(places, None, |leads_to| !leads_to.is_empty()),
    };
    if routes.is_empty() {
        return Rest::Settled;
    }
    guards(ports).map_or(Rest::Settled, |ports| {
        Rest::Place(Write {
            step: Step::Flip,
            ports,
            routes,
            raise_nb_cfg_from: None,
        })
    })
}

/// What leads elsewhere than to where the guest is. A chassis without a gateway can be led to by
/// nothing: then routes stay as they are.
fn astray(places: &Places, here: &Chassis) -> Vec<RouteWrite> {
    if !places.gateways.contains(&here.name) {
        return Vec::new();
    }
    let only = BTreeSet::from([here.name.clone()]);
    leads(places, Some(&here.name), |leads_to| *leads_to != only)
}

fn leads(
    places: &Places,
    to: Option<&String>,
    which: impl Fn(&BTreeSet<String>) -> bool,
) -> Vec<RouteWrite> {
    let routes = places.routes.iter();
    routes
        .filter(|route| which(&route.leads_to))
        .map(|route| RouteWrite {
            route: route.key.clone(),
            from: route.leads_to.clone(),
            to: to.cloned(),
        })
        .collect()
}
