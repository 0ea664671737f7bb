//! Finds the routed topology in what a network's owner laid out. Pure: rows in, places out.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use ovsdb_rs::Snapshot;
use uuid::Uuid;

use super::address::address;
use super::{Family, Network};
use crate::ovn::{LogicalRouter, LogicalRouterPort, LogicalSwitch, LogicalSwitchPort};

/// `options` key of a gateway router: the chassis that it is on. Source: ovn-nb(5).
const CHASSIS: &str = "chassis";
/// `options` key of a switch port of type `router`: the router port that it is connected to.
const ROUTER_PORT: &str = "router-port";

/// `external_ids` key of a switch: the node that it is for.
const NODE: &str = "segue.io/node";

/// The rows that a topology is found in.
#[derive(Clone, Debug, Default)]
pub(crate) struct Layout {
    /// All routers.
    pub(crate) routers: Rows<LogicalRouter>,
    /// All router ports.
    pub(crate) router_ports: Rows<LogicalRouterPort>,
    /// All switches.
    pub(crate) switches: Rows<LogicalSwitch>,
    /// All switch ports that lead to routers.
    pub(crate) peers: Rows<LogicalSwitchPort>,
}

pub(crate) type Rows<T> = Vec<(Uuid, Arc<T>)>;

/// What there is of the routed topology.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Topology {
    /// The row of the cluster router.
    pub(crate) cluster: Uuid,
    /// The gateways by `Chassis.name`.
    pub(crate) gateways: BTreeMap<String, Gateway>,
    /// The routed switches.
    pub(crate) switches: BTreeMap<Uuid, RoutedSwitch>,
    /// Every network of a port of the cluster router.
    pub(crate) inside: BTreeSet<Network>,
    /// Routers that cannot be a gateway, with why.
    pub(crate) rejected: Vec<String>,
}

/// A switch of the cluster router's that no gateway is on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct RoutedSwitch {
    /// The node that it is for: `external_ids:segue.io/node`, else its own name. Where it is for none,
    /// no node is called that.
    pub(crate) node: String,
    /// Name of the cluster router's port on it.
    pub(crate) port: String,
}

/// The router that guests of one chassis reach the outside through.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Gateway {
    /// Its row.
    pub(crate) router: Uuid,
    /// Its name.
    pub(crate) name: String,
    /// Name of its port on the join switch.
    pub(crate) port: String,
    /// The address of that port, by family.
    pub(crate) next_hops: BTreeMap<Family, IpAddr>,
}

// === impl Layout ===

impl Layout {
    /// Whether the same topology is found in both. Replicas share the rows that did not change; of
    /// those that did, what machines' ports and static routes come and go with is no part of it.
    pub(crate) fn is_same(&self, other: &Self) -> bool {
        let same_switch = |old: &LogicalSwitch, new: &LogicalSwitch| {
            let on_both = |(uuid, _): &(Uuid, Arc<LogicalSwitchPort>)| {
                old.ports.contains(uuid) == new.ports.contains(uuid)
            };
            old.name == new.name
                && old.external_ids == new.external_ids
                && self.peers.iter().all(on_both)
        };
        same(&self.peers, &other.peers, |_, _| false)
            && same(&self.router_ports, &other.router_ports, |_, _| false)
            && same(&self.routers, &other.routers, LogicalRouter::is_same_node)
            && same(&self.switches, &other.switches, same_switch)
    }

    /// The topology around the router named `cluster`; `None` while there is no such router.
    pub(crate) fn topology(&self, cluster: &str) -> Option<Topology> {
        let named = |(_, router): &&(Uuid, Arc<LogicalRouter>)| router.name == cluster;
        let (uuid, router) = self.routers.iter().find(named)?;
        let ports: HashMap<_, _> = self
            .router_ports
            .iter()
            .map(|(uuid, port)| (*uuid, &**port))
            .collect();
        let networks = router.ports.iter().filter_map(|port| ports.get(port));
        let mut topology = Topology {
            cluster: *uuid,
            gateways: BTreeMap::new(),
            switches: BTreeMap::new(),
            inside: networks
                .flat_map(|port| &port.networks)
                .filter_map(|network| Network::parse(network))
                .collect(),
            rejected: Vec::new(),
        };
        let attachments = self.attachments(&ports);
        for (switch, row) in &self.switches {
            let attached: Vec<_> = row
                .ports
                .iter()
                .filter_map(|port| attachments.get(port))
                .collect();
            let Some(own) = attached.iter().find(|at| at.router == *uuid) else {
                continue;
            };
            let port = own.port.name.clone();
            let candidates: Vec<_> = attached
                .into_iter()
                .filter_map(|at| Some((at, at.chassis.as_ref()?)))
                .filter(|(at, _)| at.router != *uuid)
                .collect();
            if candidates.is_empty() {
                let node = row.external_ids.get(NODE).unwrap_or(&row.name).clone();
                topology
                    .switches
                    .insert(*switch, RoutedSwitch { node, port });
            }
            for (at, chassis) in candidates {
                topology.take(chassis, at.gateway());
            }
        }
        Some(topology)
    }

    /// Which router port is behind each switch port that leads to one.
    fn attachments<'a>(
        &'a self,
        ports: &HashMap<Uuid, &'a LogicalRouterPort>,
    ) -> HashMap<Uuid, Attachment<'a>> {
        let mut by_name = HashMap::new();
        for (uuid, router) in &self.routers {
            for port in router.ports.iter().filter_map(|port| ports.get(port)) {
                let attachment = Attachment {
                    router: *uuid,
                    name: &router.name,
                    chassis: router
                        .options
                        .get(CHASSIS)
                        .filter(|chassis| !chassis.is_empty()),
                    port,
                };
                by_name.insert(port.name.as_str(), attachment);
            }
        }
        self.peers
            .iter()
            .filter_map(|(uuid, peer)| {
                let attachment = by_name.get(peer.options.get(ROUTER_PORT)?.as_str())?;
                Some((*uuid, *attachment))
            })
            .collect()
    }
}

/// Whether two tables have the same rows, each of them shared or `alike`.
fn same<T>(old: &Rows<T>, new: &Rows<T>, alike: impl Fn(&T, &T) -> bool) -> bool {
    let mut pairs = old.iter().zip(new);
    old.len() == new.len()
        && pairs.all(|(a, b)| a.0 == b.0 && (Arc::ptr_eq(&a.1, &b.1) || alike(&a.1, &b.1)))
}

/// A router's port as seen from a switch.
#[derive(Clone, Copy)]
struct Attachment<'a> {
    router: Uuid,
    name: &'a str,
    chassis: Option<&'a String>,
    port: &'a LogicalRouterPort,
}

impl Attachment<'_> {
    fn gateway(&self) -> Gateway {
        let addresses = self.port.networks.iter().filter_map(|text| address(text));
        let mut next_hops = BTreeMap::new();
        for hop in addresses.filter(|address| !is_link_local(*address)) {
            next_hops.entry(Family::of(hop)).or_insert(hop);
        }
        Gateway {
            router: self.router,
            name: self.name.to_owned(),
            port: self.port.name.clone(),
            next_hops,
        }
    }
}

/// A next hop must be in a network of the router that uses it, and a link-local one is in all.
fn is_link_local(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => address.is_link_local(),
        IpAddr::V6(address) => address.is_unicast_link_local(),
    }
}

// === impl Topology ===

impl Topology {
    /// Whether a switch port is on a routed switch.
    pub(crate) fn holds(&self, nb: &Snapshot, port: &Uuid) -> bool {
        self.switch_of(nb, port).is_some()
    }

    /// The routed switch that a switch port is on.
    pub(crate) fn switch_of(&self, nb: &Snapshot, port: &Uuid) -> Option<Uuid> {
        let on = |switch: &&Uuid| {
            let switch = nb.get::<LogicalSwitch>(switch);
            switch.is_some_and(|switch| switch.ports.contains(port))
        };
        self.switches.keys().find(on).copied()
    }

    /// The families that some gateway has a next hop of.
    pub(crate) fn families(&self) -> BTreeSet<Family> {
        let hops = self.gateways.values();
        hops.flat_map(|gateway| gateway.next_hops.keys().copied())
            .collect()
    }

    /// One chassis has one gateway: the first by name, so that the choice does not change with the
    /// order of rows.
    fn take(&mut self, chassis: &str, gateway: Gateway) {
        if gateway.next_hops.is_empty() {
            self.rejected.push(format!(
                "router {} has no address on the join switch: give its port {} a network",
                gateway.name, gateway.port
            ));
            return;
        }
        let (first, second) = match self.gateways.remove(chassis) {
            None => (gateway, None),
            Some(known) if known.name <= gateway.name => (known, Some(gateway)),
            Some(known) => (gateway, Some(known)),
        };
        if let Some(second) = second.filter(|second| second.router != first.router) {
            self.rejected.push(format!(
                "router {} is on chassis {chassis} as is {}, which is taken: a chassis has one \
                 gateway router",
                second.name, first.name
            ));
        }
        self.gateways.insert(chassis.to_owned(), first);
    }
}
