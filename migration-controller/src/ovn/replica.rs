//! Replicas of the tables that handovers read, and views of them per VM.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use handover::{Barrier, Binding, Mark, PortName, VmName};
use ovsdb_rs::{Client, Condition, Error, Index, Replica, ReplicaBuilder, Snapshot, SyncState};
use uuid::Uuid;

use super::owner::{Owners, candidates, owner};
use super::routed::RoutedTables;
use super::statics::Held;
use super::tables::{NORTHBOUND, SOUTHBOUND};
use super::{
    Chassis, ChassisPrivate, LogicalSwitchPort, NbGlobal, PlaceSets, Places, PortBinding,
    StaticRoutes,
};
use crate::routed::{Topology, port_addresses};

/// Southbound `Port_Binding.options` key: chassis that have activated the port, comma-separated.
/// Source: ovn-sb(5).
const ACTIVATED: &str = "additional-chassis-activated";

/// Both databases.
pub(crate) struct Databases {
    pub(super) nb: Replica,
    pub(super) sb: Replica,
    /// What the routed topology is read from; nothing where there is none.
    pub(super) routed: Option<RoutedTables>,
    ports_by_vm: Index<LogicalSwitchPort, VmName>,
    pub(super) ports_by_name: Index<LogicalSwitchPort, String>,
    ports_by_migration: Index<LogicalSwitchPort, String>,
    bindings_by_port: Index<PortBinding, String>,
    chassis_by_name: Index<Chassis, String>,
}

/// The databases as one VM's handovers see them at one moment.
pub(crate) struct View {
    sb: Snapshot,
    chassis_by_name: Index<Chassis, String>,
    /// The VM's ports, by name.
    pub(crate) ports: Vec<PortRow>,
    /// Where its routes lead.
    pub(crate) places: Places,
    /// Where the static routes to it lead.
    pub(crate) statics: StaticRoutes,
    nb: Snapshot,
    topology: Option<Arc<Topology>>,
    /// The row of `NB_Global` and its `nb_cfg`.
    pub(crate) nb_global: Option<(Uuid, i64)>,
}

/// One port of a VM, as it stands in both databases.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PortRow {
    /// The row of the Logical_Switch_Port.
    pub(crate) uuid: Uuid,
    /// Its name.
    pub(crate) name: PortName,
    /// `addresses`.
    pub(crate) addresses: Vec<String>,
    /// `options`.
    pub(crate) options: BTreeMap<String, String>,
    /// `external_ids`.
    pub(crate) external_ids: BTreeMap<String, String>,
    /// Its binding in the Southbound.
    pub(crate) binding: Binding,
    /// Names of the chassis that activated it.
    pub(crate) activated: BTreeSet<String>,
}

// === impl Databases ===

impl Databases {
    /// Starts both replicas; they synchronise by themselves. There is a routed topology where
    /// the name of its cluster router is given.
    pub(crate) fn start(
        nb: &Client,
        sb: &Client,
        cluster_router: Option<&str>,
    ) -> Result<Self, Error> {
        let mut northbound = Replica::builder(NORTHBOUND)
            .table::<LogicalSwitchPort>()
            .table::<NbGlobal>();
        let mut routed = None;
        if let Some(cluster_router) = cluster_router {
            northbound = RoutedTables::tables(northbound);
            routed = Some(RoutedTables::new(cluster_router, &mut northbound));
        }
        let ports_by_vm = northbound.index(candidates);
        let ports_by_name = northbound.index(|port: &LogicalSwitchPort| [port.name.clone()]);
        let ports_by_migration = northbound
            .index(|port: &LogicalSwitchPort| port.external_ids.get(Mark::MIGRATION).cloned());
        let mut southbound = southbound();
        let bindings_by_port =
            southbound.index(|binding: &PortBinding| [binding.logical_port.clone()]);
        let chassis_by_name = southbound.index(chassis_names);
        Ok(Self {
            nb: northbound.start(nb)?,
            sb: southbound.start(sb)?,
            routed,
            ports_by_vm,
            ports_by_name,
            ports_by_migration,
            bindings_by_port,
            chassis_by_name,
        })
    }

    /// Whether both replicas follow their servers.
    pub(crate) fn is_synced(&self) -> bool {
        self.nb.is_synced() && self.sb.is_synced()
    }

    /// What keeps each replica from following its server; nothing when both do.
    pub(crate) fn troubles(&self) -> Vec<String> {
        [(NORTHBOUND, &self.nb), (SOUTHBOUND, &self.sb)]
            .into_iter()
            .filter_map(
                |(database, replica)| match &*replica.sync_state().borrow() {
                    SyncState::Synced => None,
                    SyncState::Refused(reason) => Some(format!("{database}: {reason}")),
                    SyncState::Stale => Some(format!("{database}: connection lost")),
                    _ => Some(format!("{database}: not read yet")),
                },
            )
            .collect()
    }

    /// The synchronisation state of each database, by name.
    pub(crate) fn replicas(&self) -> [(&'static str, &Replica); 2] {
        [("northbound", &self.nb), ("southbound", &self.sb)]
    }

    /// What the VM's handovers see: its own ports, and those that bear the mark of one of
    /// `migrations`, whoever they belong to by now.
    pub(crate) fn view(
        &self,
        vm: &VmName,
        migrations: &BTreeSet<String>,
        owners: &impl Owners,
    ) -> View {
        let (nb, sb) = (self.nb.snapshot(), self.sb.snapshot());
        let owned = nb
            .lookup(&self.ports_by_vm, vm)
            .into_iter()
            .filter(|(_, port)| owner(port, owners).as_ref().unwrap_or(vm) == vm);
        let owned: Vec<_> = owned.collect();
        let (places, statics) = self.places((&nb, &sb), vm, &owned, owners);
        let marked = migrations
            .iter()
            .flat_map(|uid| nb.lookup(&self.ports_by_migration, uid));
        let ports: BTreeMap<_, _> = owned.into_iter().chain(marked).collect();
        let mut ports: Vec<_> = ports
            .into_iter()
            .map(|(uuid, port)| self.port_row(&sb, uuid, &port))
            .collect();
        ports.sort_by(|a, b| a.name.cmp(&b.name));
        let nb_global = nb.rows::<NbGlobal>();
        View {
            ports,
            places,
            statics,
            topology: self.routed_at(&nb).map(|(_, topology)| topology),
            nb_global: nb_global.first().map(|(uuid, row)| (*uuid, row.nb_cfg)),
            nb,
            sb,
            chassis_by_name: self.chassis_by_name,
        }
    }

    /// The places of a VM's ports. Those on other than routed switches have none.
    fn places(
        &self,
        (nb, sb): (&Snapshot, &Snapshot),
        vm: &VmName,
        ports: &[(Uuid, Arc<LogicalSwitchPort>)],
        owners: &impl Owners,
    ) -> (Places, StaticRoutes) {
        let Some((routed, topology)) = self.routed_at(nb) else {
            return Default::default();
        };
        let is_routed = |uuid: &Uuid| topology.holds(nb, uuid);
        let routed_ports = ports.iter().filter(|(uuid, _)| is_routed(uuid));
        let mut on: BTreeMap<IpAddr, BTreeSet<Uuid>> = BTreeMap::new();
        for (uuid, port) in routed_ports {
            let switch = topology.switch_of(nb, uuid);
            for address in port_addresses(&port.addresses) {
                on.entry(address).or_default().extend(switch);
            }
        }
        if on.is_empty() {
            return Default::default();
        }
        let addresses: BTreeSet<_> = on.keys().copied().collect();
        let is_disputed = |address: &&IpAddr| {
            let mut holders = nb.lookup(&routed.ports_by_address, *address).into_iter();
            holders.any(|(uuid, port)| {
                is_routed(&uuid) && owner(&port, owners).is_some_and(|other| other != *vm)
            })
        };
        let disputed = addresses.iter().filter(is_disputed).copied().collect();
        let chassis_of = |node: &str| {
            let chassis = chassis_of(sb, self.chassis_by_name, node, owners);
            Some(chassis.ok()?.name)
        };
        let disputed: BTreeSet<_> = disputed;
        let held = Held {
            on,
            disputed: &disputed,
        };
        let statics = StaticRoutes::of(nb, routed, &topology, &held, &chassis_of);
        (Places::of(PlaceSets::of(nb), &addresses, disputed), statics)
    }

    /// The routed topology as a snapshot has it, while there is one.
    fn routed_at(&self, nb: &Snapshot) -> Option<(&RoutedTables, Arc<Topology>)> {
        let routed = self.routed.as_ref()?;
        Some((routed, routed.topology(nb)?))
    }

    fn port_row(&self, sb: &Snapshot, uuid: Uuid, port: &LogicalSwitchPort) -> PortRow {
        let name = |uuid: &Uuid| Some(sb.get::<Chassis>(uuid)?.name.clone());
        let found = sb.lookup(&self.bindings_by_port, &port.name);
        let binding = found.first().map(|(_, binding)| binding);
        let activated = binding.and_then(|binding| binding.options.get(ACTIVATED));
        PortRow {
            uuid,
            name: PortName::new(&port.name),
            addresses: port.addresses.clone(),
            options: port.options.clone(),
            external_ids: port.external_ids.clone(),
            binding: binding
                .map(|binding| Binding {
                    chassis: binding.chassis.as_ref().and_then(name),
                    additional: binding.additional_chassis.iter().filter_map(name).collect(),
                })
                .unwrap_or_default(),
            activated: activated
                .into_iter()
                .flat_map(|list| list.split(','))
                .map(|chassis| chassis.trim().to_owned())
                .collect(),
        }
    }

    /// The VMs whose ports bear a mark of segue's.
    pub(crate) fn marked_vms(&self, owners: &impl Owners) -> BTreeSet<VmName> {
        self.nb
            .rows::<LogicalSwitchPort>()
            .iter()
            .filter(|(_, port)| port.external_ids.contains_key(Mark::OWNER))
            .filter_map(|(_, port)| likely_owner(port, owners))
            .collect()
    }
}

/// The owner of a port; of a marked one whose VM is gone, the VM that it most likely had.
pub(super) fn likely_owner(port: &LogicalSwitchPort, owners: &impl Owners) -> Option<VmName> {
    let marked = port.external_ids.contains_key(Mark::OWNER);
    let fallback = || candidates(port).into_iter().next().filter(|_| marked);
    owner(port, owners).or_else(fallback)
}

fn southbound() -> ReplicaBuilder {
    Replica::builder(SOUTHBOUND)
        // Ports of machines only: patch, router and localnet ports outnumber them in some clusters.
        .table_where::<PortBinding>([Condition::eq("type", "")])
        .table::<Chassis>()
        .table::<ChassisPrivate>()
}

/// What a chassis is found by: its name, its hostname, and that without its domain.
fn chassis_names(chassis: &Chassis) -> BTreeSet<String> {
    let names = [&chassis.name, &chassis.hostname].map(String::as_str);
    let names = names.into_iter().chain([short(&chassis.hostname)]);
    names
        .filter(|name| !name.is_empty())
        .map(str::to_owned)
        .collect()
}

/// A hostname without its domain.
fn short(name: &str) -> &str {
    name.split('.').next().unwrap_or(name)
}

/// Why a node is no chassis.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Unmapped {
    /// Nothing in the Southbound is called like it.
    #[error(
        "no chassis in the Southbound has its name or hostname: name its chassis with the Node's \
         annotation k8s.ovn.org/node-chassis-id"
    )]
    None,
    /// Several are.
    #[error(
        "chassis {} have its hostname: remove those that are no more, or name its chassis with the \
         Node's annotation k8s.ovn.org/node-chassis-id",
        .0.join(" and ")
    )]
    Several(Vec<String>),
}

/// The chassis of a node: the one that the node itself names, else the one of its name, else the only
/// one of its hostname, else the only one whose hostname is the node's but for a domain that one of
/// both lacks. Hostnames need not be unique: a node that was installed anew leaves its old chassis
/// behind.
fn chassis_of(
    sb: &Snapshot,
    by_name: Index<Chassis, String>,
    node: &str,
    owners: &impl Owners,
) -> Result<handover::Chassis, Unmapped> {
    let found = |name: &str| sb.lookup(&by_name, name);
    let annotated = owners.chassis_of(node);
    let named = annotated.as_deref().into_iter().chain([node]);
    let named = named.filter_map(|name| {
        let mut found = found(name).into_iter();
        found.find(|(_, chassis)| chassis.name == name)
    });
    if let Some((_, chassis)) = named.into_iter().next() {
        return Ok(handover::Chassis::new(&chassis.name, &chassis.hostname));
    }
    let is_same = |hostname: &str| {
        let lacks_domain = hostname == short(hostname) || node == short(node);
        lacks_domain && short(hostname) == short(node)
    };
    let mut candidates = found(node);
    candidates.retain(|(_, chassis)| chassis.hostname == node);
    if candidates.is_empty() {
        candidates = found(short(node));
        candidates.retain(|(_, chassis)| is_same(&chassis.hostname));
    }
    match &candidates[..] {
        [] => Err(Unmapped::None),
        [(_, only)] => Ok(handover::Chassis::new(&only.name, &only.hostname)),
        several => Err(Unmapped::Several(
            several
                .iter()
                .map(|(_, chassis)| chassis.name.clone())
                .collect(),
        )),
    }
}

// === impl View ===

impl View {
    /// The routed switch that a port is on.
    pub(crate) fn switch_of(&self, port: &Uuid) -> Option<Uuid> {
        self.topology.as_ref()?.switch_of(&self.nb, port)
    }

    /// The chassis of a node.
    pub(crate) fn chassis_of(
        &self,
        node: &str,
        owners: &impl Owners,
    ) -> Result<handover::Chassis, Unmapped> {
        chassis_of(&self.sb, self.chassis_by_name, node, owners)
    }

    /// How far the chassis have followed the Northbound.
    pub(crate) fn barrier(&self) -> Barrier {
        let follows = |row: &ChassisPrivate| {
            let chassis = row
                .chassis
                .as_ref()
                .and_then(|uuid| self.sb.get::<Chassis>(uuid));
            chassis.is_some_and(|chassis| !chassis.is_remote())
        };
        Barrier {
            nb_cfg: self.nb_global.map_or(0, |(_, nb_cfg)| nb_cfg),
            applied: self
                .sb
                .rows::<ChassisPrivate>()
                .into_iter()
                .filter(|(_, row)| follows(row))
                .map(|(_, row)| (row.name.clone(), row.nb_cfg))
                .collect(),
        }
    }
}
