//! What the routed topology is read from.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};

use ovsdb_rs::{Condition, Datum, Index, ReplicaBuilder, Snapshot};

use super::{
    AddressSet, Databases, LogicalRouter, LogicalRouterPolicy, LogicalRouterPort,
    LogicalRouterStaticRoute, LogicalSwitch, LogicalSwitchPort, PlaceSets,
};
use crate::routed::{Layout, Topology, host, names, port_addresses};

/// What is needed to read the routed topology from the Northbound's replica.
pub(super) struct RoutedTables {
    /// Name of the cluster router.
    cluster_router: String,
    /// The switch ports that lead to routers.
    peers: Index<LogicalSwitchPort, ()>,
    /// Ports of machines by each of their addresses.
    pub(super) ports_by_address: Index<LogicalSwitchPort, IpAddr>,
    /// Static routes by the address that they are to, where it is a single one.
    pub(super) routes_by_address: Index<LogicalRouterStaticRoute, IpAddr>,
    known: Mutex<Option<Known>>,
}

/// The topology last found.
struct Known {
    /// When: the generation of the snapshot.
    generation: u64,
    /// In what.
    layout: Layout,
    topology: Option<Arc<Topology>>,
}

impl RoutedTables {
    /// Adds the tables. Of address sets and policies only segue's own: others' may be many and large.
    pub(super) fn tables(builder: ReplicaBuilder) -> ReplicaBuilder {
        let ours = || {
            let owner = BTreeMap::from([(names::OWNER, names::SEGUE)]);
            [Condition::includes("external_ids", Datum::map(owner))]
        };
        builder
            .table::<LogicalSwitch>()
            .table::<LogicalRouter>()
            .table::<LogicalRouterPort>()
            .table::<LogicalRouterStaticRoute>()
            .table_where::<LogicalRouterPolicy>(ours())
            .table_where::<AddressSet>(ours())
    }

    pub(super) fn new(cluster_router: &str, builder: &mut ReplicaBuilder) -> Self {
        Self {
            cluster_router: cluster_router.to_owned(),
            peers: builder
                .index(|port: &LogicalSwitchPort| (port.r#type == "router").then_some(())),
            ports_by_address: builder.index(|port: &LogicalSwitchPort| {
                let is_machine = port.r#type.is_empty();
                let addresses = is_machine.then(|| port_addresses(&port.addresses));
                addresses.unwrap_or_default()
            }),
            routes_by_address: builder.index(|route: &LogicalRouterStaticRoute| {
                let to = route.policy.as_deref() != Some("src-ip");
                host(&route.ip_prefix).filter(|_| to)
            }),
            known: Mutex::default(),
        }
    }

    /// The topology as a snapshot has it; `None` while there is no cluster router.
    pub(super) fn topology(&self, nb: &Snapshot) -> Option<Arc<Topology>> {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = &*known
            && known.generation == nb.generation()
        {
            return known.topology.clone();
        }
        let layout = Layout {
            routers: nb.rows(),
            router_ports: nb.rows(),
            switches: nb.rows(),
            peers: nb.lookup(&self.peers, &()),
        };
        // Rows that changed nothing of the layout, such as a flip's, come much more often than others.
        let topology = match &*known {
            Some(known) if known.layout.is_same(&layout) => known.topology.clone(),
            _ => layout.topology(&self.cluster_router).map(Arc::new),
        };
        *known = Some(Known {
            generation: nb.generation(),
            layout,
            topology: topology.clone(),
        });
        topology
    }
}

impl Databases {
    /// Name of the cluster router, where there is to be a routed topology.
    pub(crate) fn cluster_router(&self) -> Option<&str> {
        let routed = self.routed.as_ref()?;
        Some(&routed.cluster_router)
    }

    /// The routed topology as it is now, with the rows it is in; nothing while there is no cluster
    /// router.
    pub(crate) fn topology(&self) -> Option<(Snapshot, Arc<Topology>)> {
        let nb = self.nb.snapshot();
        let topology = self.routed.as_ref()?.topology(&nb)?;
        Some((nb, topology))
    }

    /// The place sets, with the ports that have an address.
    pub(crate) fn place_sets(&self) -> PlaceSets {
        match &self.routed {
            Some(_) => PlaceSets::of(&self.nb.snapshot()),
            None => PlaceSets::default(),
        }
    }

    /// The ports of machines that have an address.
    pub(crate) fn ports_with(&self, address: IpAddr) -> Vec<Arc<LogicalSwitchPort>> {
        let Some(routed) = &self.routed else {
            return Vec::new();
        };
        let found = self.nb.lookup(&routed.ports_by_address, &address);
        found.into_iter().map(|(_, port)| port).collect()
    }
}
