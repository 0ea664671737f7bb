//! The network that is measured: the rows of `docs/routed.md`, and VMs on top of them.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result};
use ovsdb_rs::{Condition, Datum, InsertOp, Mutation, Row, Transaction, Where};
use uuid::Uuid;

use super::databases::{Databases, NORTH, SOUTH};
use super::layout::{
    CLUSTER, JOIN, MOVED, Node, PREFIX, RESIDENT, Vm, WATCHED, cluster_address, mac,
};
use crate::lab::{INTEGRATION_BRIDGE, Lab};

/// Everybody's gateway on a node's switch, always with the same Ethernet address.
const ARP_PROXY: &str = "0a:58:a9:fe:01:01 169.254.1.1 fe80::1";
/// Keeps every set larger than one, or ovn-controller would not follow a change incrementally.
const BALLAST: [&str; 2] = ["192.0.2.1", "192.0.2.2"];
/// The set of all that is inside.
const INSIDE: &str = "segue_inside_ip4";
/// Marks the rows that segue writes.
const OWNER: (&str, &str) = ("segue.io/owner", "segue");
const STAY: i64 = 1110;
/// The priority of the policies that lead to a VM's gateway, and of the flows that come of them.
pub(super) const REROUTE: i64 = 1100;
/// How many VMs one transaction adds: the server stays responsive between them.
const BATCH: u32 = 1000;

ovsdb_rs::table! {
    struct ChassisFeatures in "Chassis" {
        other_config: BTreeMap<String, String>,
    }

    struct DatapathBinding in "Datapath_Binding" {
        external_ids: BTreeMap<String, String>,
    }
}

/// The network, and the identities of the rows that flips change.
#[derive(Debug)]
pub(super) struct World {
    vms: u32,
    /// Address sets by node.
    sets: Vec<(Node, Uuid)>,
    chassis: Vec<(Node, Uuid)>,
    /// The moved VM's rows; known once it exists.
    pub(super) moved: Option<Moved>,
}

/// The rows of the VM that is moved.
#[derive(Clone, Copy, Debug)]
pub(super) struct Moved {
    pub(super) port: Uuid,
    pub(super) route: Uuid,
}

// === impl World ===

impl World {
    /// Writes everything but VMs.
    pub(super) async fn lay_out(databases: &Databases) -> Result<Self> {
        let chassis = register_chassis(databases).await?;
        let mut tx = Transaction::new();
        lay_out_cluster(&mut tx);
        let mut sets = Vec::new();
        for node in Node::all() {
            sets.push((node, lay_out_node(&mut tx, node)));
        }
        let reply = databases.north.transact(NORTH, tx).await?;
        let sets = sets
            .into_iter()
            .map(|(node, row)| Ok((node, reply.uuid(row)?)))
            .collect::<Result<_>>()?;
        Ok(Self {
            vms: 0,
            sets,
            chassis,
            moved: None,
        })
    }

    /// The address set of a node.
    pub(super) fn set(&self, node: Node) -> Result<Uuid> {
        find(&self.sets, node)
    }

    /// Adds VMs until there are `vms`.
    pub(super) async fn grow(
        &mut self,
        databases: &Databases,
        vms: u32,
        mut progress: impl FnMut(u32),
    ) -> Result<()> {
        while self.vms < vms {
            let end = vms.min(self.vms.saturating_add(BATCH));
            self.add(databases, end)
                .await
                .with_context(|| format!("add VMs up to the {end}th"))?;
            self.vms = end;
            progress(end);
        }
        Ok(())
    }

    async fn add(&mut self, databases: &Databases, end: u32) -> Result<()> {
        let mut tx = Transaction::new();
        let mut routes = Vec::new();
        let mut moved = None;
        for node in Node::all() {
            let vms: Vec<_> = Vm::range(self.vms, end)
                .filter(|vm| vm.node() == node)
                .collect();
            let rows: Vec<_> = vms.iter().map(|vm| add_vm(&mut tx, *vm)).collect();
            if let Some(at) = vms.iter().position(|vm| *vm == MOVED) {
                moved = rows.get(at).copied();
            }
            tx.mutate(
                "Logical_Switch",
                Condition::eq("name", node.name()),
                [Mutation::insert(
                    "ports",
                    Datum::set(rows.iter().map(|(port, _)| port)),
                )],
            );
            let addresses = Datum::set(vms.iter().map(|vm| vm.address().to_string()));
            tx.mutate(
                "Address_Set",
                self.set(node)?,
                [Mutation::insert("addresses", addresses)],
            );
            routes.extend(rows.into_iter().map(|(_, route)| route));
        }
        tx.mutate(
            "Logical_Router",
            Condition::eq("name", CLUSTER),
            [Mutation::insert("static_routes", Datum::set(routes))],
        );
        let reply = databases.north.transact(NORTH, tx).await?;
        if let Some((port, route)) = moved {
            self.moved = Some(Moved {
                port: reply.uuid(port)?,
                route: reply.uuid(route)?,
            });
        }
        Ok(())
    }

    /// Binds what northd has made of the ports of the nodes that are only rows to those nodes' chassis, as their
    /// ovn-controllers would.
    pub(super) async fn bind(&self, databases: &Databases) -> Result<()> {
        let datapaths = self.datapaths(databases).await?;
        let mut tx = Transaction::new();
        let unbound = || Condition::eq("chassis", Datum::empty());
        for (node, datapath) in datapaths {
            let chassis = Row::new().set("chassis", find(&self.chassis, node)?);
            let vifs = [
                Condition::eq("datapath", datapath),
                Condition::eq("type", ""),
                unbound(),
            ];
            tx.update("Port_Binding", vifs, chassis.clone().set("up", true));
            let there = Datum::map([("l3gateway-chassis", node.name())]);
            let gateway = [
                Condition::eq("type", "l3gateway"),
                Condition::includes("options", there),
                unbound(),
            ];
            tx.update("Port_Binding", gateway, chassis);
        }
        databases.south.transact(SOUTH, tx).await.map(drop)?;
        Ok(())
    }

    /// The datapaths of the switches of the nodes that are only rows.
    async fn datapaths(&self, databases: &Databases) -> Result<Vec<(Node, Uuid)>> {
        let mut tx = Transaction::new();
        let selects: Vec<_> = self
            .chassis
            .iter()
            .map(|(node, _)| {
                let named = Datum::map([("name", node.name())]);
                let rows = Condition::includes("external_ids", named);
                (*node, tx.select("Datapath_Binding", rows, ["external_ids"]))
            })
            .collect();
        let reply = databases.south.transact(SOUTH, tx).await?;
        selects
            .into_iter()
            .map(|(node, select)| {
                let rows = reply.rows::<DatapathBinding>(select)?;
                let (uuid, _) = rows
                    .first()
                    .with_context(|| format!("the Southbound has no switch {}", node.name()))?;
                Ok((node, *uuid))
            })
            .collect()
    }
}

/// Lets the Southbound server and the watched node's ovn-controller leave each other alone for minutes, as large
/// deployments do: either gives up a peer that is busy for ten seconds, and then all begins anew.
pub(super) async fn be_patient(lab: &Lab) -> Result<()> {
    const PORT: u16 = 6643;
    let target = format!("target=\"ptcp:{PORT}\"");
    let create = ["--id=@patient", "create", "Connection"];
    let create = create
        .into_iter()
        .chain([target.as_str(), "inactivity_probe=0"]);
    let add = ["--", "set", "SB_Global", ".", "connections=@patient"];
    lab.sbctl(create.chain(add)).await?;
    let remote = [
        "-t",
        "/run/ovn/ovnsb_db.ctl",
        "ovsdb-server/add-remote",
        "db:OVN_Southbound,SB_Global,connections",
    ];
    lab.central().run("ovn-appctl", remote).await?;
    let node = lab.host(&WATCHED.name())?;
    let remote = format!(
        "external_ids:ovn-remote=tcp:{}:{PORT}",
        Lab::CENTRAL_UNDERLAY
    );
    let probe = "external_ids:ovn-remote-probe-interval=0";
    node.ovs()
        .vsctl(["set", "Open_vSwitch", ".", remote.as_str(), probe])
        .await
        .map(drop)
}

/// Gives the watched node an interface for its own VM and one for the VM that comes, as the taps of their guests.
pub(super) async fn plug(lab: &Lab) -> Result<()> {
    let node = lab.host(&WATCHED.name())?;
    for vm in [RESIDENT, MOVED] {
        let port = vm.port();
        let id = format!("external_ids:iface-id={port}");
        node.ovs()
            .vsctl([
                "add-port",
                INTEGRATION_BRIDGE,
                &port,
                "--",
                "set",
                "Interface",
                &port,
                "type=internal",
                &id,
            ])
            .await?;
    }
    node.ovs().wait_ovn_installed(&RESIDENT.port()).await
}

fn find(rows: &[(Node, Uuid)], node: Node) -> Result<Uuid> {
    rows.iter()
        .find(|(of, _)| *of == node)
        .map(|(_, uuid)| *uuid)
        .with_context(|| format!("{} has no such row", node.name()))
}

/// Writes the chassis of the nodes that are only rows. They say that they can do what the real one can: northd writes
/// for the least able.
async fn register_chassis(databases: &Databases) -> Result<Vec<(Node, Uuid)>> {
    let mut tx = Transaction::new();
    let real = Condition::eq("name", WATCHED.name());
    let select = tx.select("Chassis", real, ["other_config"]);
    let rows = databases
        .south
        .transact(SOUTH, tx)
        .await?
        .rows::<ChassisFeatures>(select)?;
    let (_, real) = rows
        .first()
        .with_context(|| format!("{} is not registered", WATCHED.name()))?;

    let mut tx = Transaction::new();
    let mut inserted = Vec::new();
    for node in Node::all().filter(|node| *node != WATCHED) {
        let encap = Row::new()
            .set("type", "geneve")
            .set("ip", node.tunnel_address().to_string())
            .set("chassis_name", node.name())
            .set("options", Datum::map([("csum", "true")]));
        let encap = tx.insert("Encap", encap);
        let chassis = Row::new()
            .set("name", node.name())
            .set("hostname", node.name())
            .set("encaps", encap)
            .set("other_config", real.other_config.clone());
        inserted.push((node, tx.insert("Chassis", chassis)));
    }
    let reply = databases.south.transact(SOUTH, tx).await?;
    inserted
        .into_iter()
        .map(|(node, row)| Ok((node, reply.uuid(row)?)))
        .collect()
}

/// The cluster router with its policies, and the join switch.
fn lay_out_cluster(tx: &mut Transaction) {
    let inside = Node::all()
        .map(|node| format!("{}/{PREFIX}", node.router_address()))
        .chain([format!("{}/{PREFIX}", cluster_address())]);
    let inside = owned()
        .set("name", INSIDE)
        .set("addresses", Datum::set(inside));
    tx.insert("Address_Set", inside);

    let stay = policy(tx, STAY, &format!("ip4.dst == ${INSIDE}"), None);
    let reroutes = Node::all().map(|node| {
        let matches = format!("ip4.src == ${}", node.address_set());
        policy(tx, REROUTE, &matches, Some(node))
    });
    let policies: Vec<_> = [stay]
        .into_iter()
        .chain(reroutes.collect::<Vec<_>>())
        .collect();
    let out = Row::new()
        .set("ip_prefix", "0.0.0.0/0")
        .set("nexthop", WATCHED.next_hop().to_string());
    let out = tx.insert("Logical_Router_Static_Route", out);
    let address = cluster_address();
    let port = Row::new()
        .set("name", "rtoj-cluster")
        .set("mac", mac(address))
        .set("networks", format!("{address}/{PREFIX}"));
    let port = tx.insert("Logical_Router_Port", port);
    let router = Row::new()
        .set("name", CLUSTER)
        .set("ports", port)
        .set("static_routes", out)
        .set("policies", Datum::set(policies));
    tx.insert("Logical_Router", router);

    let port = router_facing(tx, "jtor-cluster", "rtoj-cluster", None);
    let join = Row::new().set("name", JOIN).set("ports", port);
    tx.insert("Logical_Switch", join);
}

/// A node's switch, gateway router and address set; returns the last.
fn lay_out_node(tx: &mut Transaction, node: Node) -> InsertOp {
    let address = node.router_address();
    let port = Row::new()
        .set("name", node.router_port())
        .set("mac", mac(address))
        .set("networks", format!("{address}/{PREFIX}"));
    let port = tx.insert("Logical_Router_Port", port);
    attach(tx, "Logical_Router", CLUSTER, "ports", port);
    let stor = format!("stor-{}", node.name());
    let port = router_facing(tx, &stor, &node.router_port(), Some(ARP_PROXY));
    let switch = Row::new().set("name", node.name()).set("ports", port);
    tx.insert("Logical_Switch", switch);

    lay_out_gateway(tx, node);
    let set = owned()
        .set("name", node.address_set())
        .set("addresses", Datum::set(BALLAST))
        .set("external_ids", owned_by(&node.name()));
    tx.insert("Address_Set", set)
}

fn lay_out_gateway(tx: &mut Transaction, node: Node) {
    let address = node.next_hop();
    let port = Row::new()
        .set("name", node.join_port())
        .set("mac", mac(address))
        .set("networks", format!("{address}/{PREFIX}"));
    let port = tx.insert("Logical_Router_Port", port);
    let inwards = Row::new()
        .set("ip_prefix", "10.0.0.0/8")
        .set("nexthop", cluster_address().to_string());
    let inwards = tx.insert("Logical_Router_Static_Route", inwards);
    let from_inside = format!("inport == \"{}\"", node.join_port());
    let mut policies = vec![
        policy(tx, STAY, &from_inside, None),
        policy(tx, STAY, "ct.rpl", None),
    ];
    for other in Node::all().filter(|other| *other != node) {
        let matches = format!("ip4.dst == ${}", other.address_set());
        policies.push(policy(tx, REROUTE, &matches, Some(other)));
    }
    let router = Row::new()
        .set("name", node.gateway_router())
        .set("options", Datum::map([("chassis", node.name())]))
        .set("ports", port)
        .set("static_routes", inwards)
        .set("policies", Datum::set(policies));
    tx.insert("Logical_Router", router);

    let jtor = format!("jtor-{}", node.gateway_router());
    let port = router_facing(tx, &jtor, &node.join_port(), None);
    attach(tx, "Logical_Switch", JOIN, "ports", port);
}

/// A switch's port to a router's.
fn router_facing(
    tx: &mut Transaction,
    name: &str,
    router_port: &str,
    arp_proxy: Option<&str>,
) -> InsertOp {
    let options = [("router-port", router_port)]
        .into_iter()
        .chain(arp_proxy.map(|proxy| ("arp_proxy", proxy)));
    let port = Row::new()
        .set("name", name)
        .set("type", "router")
        .set("addresses", "router")
        .set("options", Datum::map(options));
    tx.insert("Logical_Switch_Port", port)
}

/// A policy that reroutes to a node's gateway, or, without one, lets pass.
fn policy(tx: &mut Transaction, priority: i64, matches: &str, to: Option<Node>) -> InsertOp {
    let row = owned().set("priority", priority).set("match", matches);
    let row = match to {
        Some(node) => row
            .set("action", "reroute")
            .set("nexthops", node.next_hop().to_string()),
        None => row.set("action", "allow"),
    };
    tx.insert("Logical_Router_Policy", row)
}

/// A VM's port and its host route.
fn add_vm(tx: &mut Transaction, vm: Vm) -> (InsertOp, InsertOp) {
    let address = vm.address();
    let mut port = Row::new()
        .set("name", vm.port())
        .set("addresses", format!("{} {address}", mac(address)));
    if vm == MOVED {
        // The watched node has an interface for it, and would take it.
        let options = Datum::map([("requested-chassis", vm.node().name())]);
        port = port.set("options", options);
    }
    let route = Row::new()
        .set("ip_prefix", format!("{address}/32"))
        .set("nexthop", address.to_string())
        .set("output_port", vm.node().router_port())
        .set("policy", "dst-ip");
    (
        tx.insert("Logical_Switch_Port", port),
        tx.insert("Logical_Router_Static_Route", route),
    )
}

fn attach(tx: &mut Transaction, table: &str, name: &str, column: &str, row: InsertOp) {
    let named: Where = Condition::eq("name", name).into();
    tx.mutate(table, named, [Mutation::insert(column, row)]);
}

fn owned() -> Row {
    Row::new().set("external_ids", Datum::map([OWNER]))
}

fn owned_by(chassis: &str) -> Datum {
    Datum::map([OWNER, ("segue.io/chassis", chassis)])
}
