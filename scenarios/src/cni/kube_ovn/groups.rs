//! The port groups that say which node's gateway the traffic of a port takes.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::api::core::v1::Pod;
use uuid::Uuid;

use super::cache::{Cache, Group};
use super::pods;
use super::write::{Membership, Write};
use super::{VENDOR, VENDOR_KEY};

/// The name of a node's port group (`pkg/controller/node.go`, `handleAddNode`).
pub(super) fn of_node(node: &str) -> String {
    format!("node.{node}").replace('-', ".")
}

/// The name of the port group of a subnet's ports on a node (`pkg/controller/subnet.go`,
/// `getOverlaySubnetsPortGroupName`).
pub(super) fn of_subnet(subnet: &str, node: &str) -> String {
    format!("{subnet}.{node}").replace('-', ".")
}

/// Makes those of these nodes and subnets that are not there (`handleAddNode`, `createPortGroupForDistributedSubnet`).
pub(super) fn create(cache: &Cache, nodes: &[String], subnets: &[String]) -> Vec<Write> {
    let ids = |pairs: &[(&str, &str)]| -> BTreeMap<String, String> {
        let owned = pairs
            .iter()
            .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()));
        owned.collect()
    };
    let mut groups = Vec::new();
    for node in nodes {
        let policy = format!("node/{node}");
        groups.push((of_node(node), ids(&[("node", node), ("np", &policy)])));
        for subnet in subnets {
            let policy = format!("{subnet}/{node}");
            let ids = ids(&[
                ("subnet", subnet),
                ("node", node),
                (VENDOR_KEY, VENDOR),
                ("np", &policy),
            ]);
            groups.push((of_subnet(subnet, node), ids));
        }
    }
    groups.retain(|(name, _)| cache.groups.iter().all(|group| group.name != *name));
    let made = groups.into_iter();
    made.map(|(name, external_ids)| Write::CreateGroup { name, external_ids })
        .collect()
}

/// Takes a port out of the other nodes' groups and puts it into this node's, first those of the nodes and then those of
/// the subnet (`pkg/controller/pod.go`, `reconcileRouteSubnets`).
pub(super) fn move_to(cache: &Cache, port: Uuid, subnet: &str, node: &str) -> Vec<Write> {
    let has = |group: &Group, key: &str| group.external_ids.contains_key(key);
    let mut writes = Vec::new();
    let of_nodes = |group: &Group| has(group, "node") && has(group, "np") && !has(group, "subnet");
    writes.extend(moved(cache, port, &of_node(node), of_nodes));
    let of_the_subnet = |group: &Group| {
        group
            .external_ids
            .get("subnet")
            .is_some_and(|is| is == subnet)
    };
    writes.extend(moved(cache, port, &of_subnet(subnet, node), of_the_subnet));
    writes
}

fn moved(cache: &Cache, port: Uuid, to: &str, among: impl Fn(&Group) -> bool) -> [Write; 2] {
    let others = cache
        .groups
        .iter()
        .filter(|group| among(group) && group.name != to);
    let left = others.filter(|group| group.ports.contains(&port));
    let leave = left.map(|group| Membership::Leave(group.name.clone(), BTreeSet::from([port])));
    let join = Membership::Join(to.to_owned(), BTreeSet::from([port]));
    [Write::Groups(leave.collect()), Write::Groups(vec![join])]
}

/// Takes a port out of every group (`RemovePortFromPortGroups` without names).
pub(super) fn leave_all(cache: &Cache, port: Uuid) -> Write {
    let left = cache
        .groups
        .iter()
        .filter(|group| group.ports.contains(&port));
    let leave = left.map(|group| Membership::Leave(group.name.clone(), BTreeSet::from([port])));
    Write::Groups(leave.collect())
}

/// What every minute's look at the nodes' groups sets right: in the group of a node is every port of every pod there
/// that has not ended, the target's of a migration like the source's (`pkg/controller/node.go`,
/// `checkAndUpdateNodePortGroup`).
pub(super) fn probe(cache: &Cache, nodes: &[String], pods: &[&Pod]) -> Vec<Write> {
    let mut writes = Vec::new();
    for node in nodes {
        let name = of_node(node);
        let Some(group) = cache.groups.iter().find(|group| group.name == name) else {
            continue;
        };
        let here = pods.iter().filter(|pod| pods::node(pod) == Some(node));
        let alive = here.filter(|pod| pods::is_alive(pod));
        let ports = alive.flat_map(|pod| pods::allocated_ports(pod));
        let wanted: BTreeSet<_> = ports
            .filter_map(|port| Some(cache.port(&port)?.0))
            .collect();
        let join: BTreeSet<_> = wanted.difference(&group.ports).copied().collect();
        let leave: BTreeSet<_> = group.ports.difference(&wanted).copied().collect();
        let changes = [
            (!join.is_empty()).then(|| Membership::Join(name.clone(), join)),
            (!leave.is_empty()).then(|| Membership::Leave(name.clone(), leave)),
        ];
        let changes: Vec<_> = changes.into_iter().flatten().collect();
        if !changes.is_empty() {
            writes.push(Write::Groups(changes));
        }
    }
    writes
}

/// What the controller makes of the subnets' groups when it starts: each pod that has not ended takes its VM's port into
/// its own node's group and out of the others. In the middle of a migration two pods do, and the later one has it
/// (`pkg/controller/subnet.go`, `reconcileDistributedSubnetRouteInDefaultVpc`).
pub(super) fn reconcile_subnets(
    cache: &Cache,
    subnets: &[String],
    nodes: &[String],
    pods: &[&Pod],
) -> Vec<Write> {
    let mut writes = Vec::new();
    for subnet in subnets {
        for pod in pods.iter().filter(|pod| pods::is_alive(pod)) {
            let Some(node) = pods::node(pod) else {
                continue;
            };
            let ports = pods::ports_on(pod, subnet);
            let ports: BTreeSet<_> = ports
                .filter_map(|port| Some(cache.port(&port)?.0))
                .collect();
            if ports.is_empty() {
                continue;
            }
            let others = nodes.iter().filter(|other| *other != node);
            let leave =
                others.map(|other| Membership::Leave(of_subnet(subnet, other), ports.clone()));
            writes.push(Write::Groups(leave.collect()));
            let join = Membership::Join(of_subnet(subnet, node), ports);
            writes.push(Write::Groups(vec![join]));
        }
    }
    writes
}
