//! The topology *routed*: a guest has an address and nothing else, and each node has a gateway of its own to the
//! outside (`docs/routed.md`).
//!
//! ```text
//!           outside 172.31.0.1
//!         ┌─────────┴──────────┐
//!     gr-node1 .11         gr-node2 .12       172.31.0.0/24, and 100.64.0.0/24 on the switch "join"
//!         └─────────┬──────────┘
//!                cluster
//!         ┌─────────┴──────────┐
//!       node1                node2            switches 10.20.1.0/24 and 10.20.2.0/24
//!     guest .10/32        client .5/24        the client on the last node
//! ```
//! It is laid on a lab that is up, beside the shared one. Without segue a guest's outside traffic takes the gateway of
//! the node where the guest was born, for good; so do the outside's routes to it.

mod outside;
mod plan;
mod pods;
mod rows;
mod services;

use std::collections::BTreeMap;
use std::fs::File;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::{Context as _, Result};

use super::{
    Lab,
    guest::Nic,
    host::Host,
    topology::{exists, find_of_pods, guest_nic, lsp_add, taken_addresses},
};

pub use outside::Carried;
pub use plan::{GATEWAY_MAC, GATEWAY4, GATEWAY6, is_routed};
pub use rows::{PORT_KEY, node_of, node_port};

use plan::NodePlan;
use rows::Rows;

/// The router that every node's switch is on.
pub const CLUSTER_ROUTER: &str = "cluster";
/// The switch between the cluster router and the gateway routers.
const JOIN_SWITCH: &str = "join";
/// The outside, as OVN names it on every node.
const PHYSICAL_NETWORK: &str = "outside";
/// The client's interface in the routed network.
const CLIENT_INTERFACE: &str = "routed";

/// Who tells guests the Ethernet address of their gateway.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Gateway {
    /// OVN's `arp_proxy`, of OVN 23.06 and newer.
    #[default]
    Ovn,
    /// This program of the machine, `arp-proxy`, on every node.
    ArpProxy(PathBuf),
}

/// The routed network of a lab.
#[derive(Clone, Copy, Debug)]
pub struct RoutedNetwork<'a> {
    lab: &'a Lab,
}

/// The addresses of the host `outside`.
pub fn outside_addresses() -> [IpAddr; 2] {
    [plan::OUTSIDE.v4.into(), plan::OUTSIDE.v6.into()]
}

/// The gateway router of a node.
fn gateway_router(node: &str) -> String {
    format!("gr-{node}")
}

impl<'a> RoutedNetwork<'a> {
    /// Lays out the network: routers and switches, the outside and its links, the client on the last node's switch.
    /// Returns once every node follows.
    pub async fn create(lab: &'a Lab, gateway: &Gateway) -> Result<Self> {
        let network = Self { lab };
        let nodes: Vec<_> = network.nodes().collect();
        outside::connect(lab, &nodes)
            .await
            .context("connect the outside")?;
        lab.nbctl(rows::cluster().after(&[])).await?;
        for (node, plan) in &nodes {
            lab.nbctl(rows::node(node.name(), *plan, gateway).after(&[]))
                .await?;
        }
        let (last, plan) = nodes.last().context("a lab without nodes")?;
        let client = plan.client();
        lab.nbctl(lsp_add(last.name(), &client, &[])).await?;
        lab.plug_client(CLIENT_INTERFACE, &client).await?;
        if let Gateway::ArpProxy(program) = gateway {
            for (node, _) in &nodes {
                start_arp_proxy(node, program)?;
            }
        }
        lab.nbctl(["--wait=hv", "sync"]).await?;
        outside::greet(lab, &nodes).await?;
        Ok(network)
    }

    /// The network, created unless an earlier run has; then `gateway` is as it was.
    pub async fn ensure(lab: &'a Lab, gateway: &Gateway) -> Result<Self> {
        if exists(lab, "Logical_Router", CLUSTER_ROUTER).await? {
            return Ok(Self { lab });
        }
        Self::create(lab, gateway).await
    }

    /// The network of a lab that has one.
    pub fn attach(lab: &'a Lab) -> Self {
        Self { lab }
    }

    /// An interface of a guest that is born on `node`: host number `host` of the node's subnet.
    ///
    /// # Errors
    /// When there is no such node.
    pub fn nic(&self, lsp: &str, node: &str, host: u8) -> Result<Nic> {
        let own = self.plan(node)?.host(host);
        let addresses = [own.v4.into(), own.v6.into()];
        Ok(guest_nic(lsp, own.mac(), &addresses))
    }

    /// The client's interface, on the last node's switch.
    pub fn client(self) -> Result<Nic> {
        let last = self.nodes().last().context("a lab without nodes")?;
        Ok(last.1.client())
    }

    /// The lowest host number of a node's subnet, from `first` on, whose IPv4 address no port of the Northbound has.
    ///
    /// # Errors
    /// When the subnet is full.
    pub async fn free_host(&self, node: &str, first: u8) -> Result<u8> {
        let plan = self.plan(node)?;
        let taken = taken_addresses(self.lab).await?;
        (first..u8::MAX)
            .find(|host| !taken.contains(&plan.host(*host).v4.to_string()))
            .with_context(|| format!("no address is left on {node}"))
    }

    /// Adds a logical switch port on the switch of the node where the guest is born, with its addresses, what DHCP
    /// answers it, and `external_ids` as whoever owns it would write them. Returns once the Southbound database has it.
    pub async fn add_port(&self, nic: &Nic, external_ids: &[(&str, &str)]) -> Result<()> {
        let switch = self.birthplace(nic)?.name();
        let mut rows = Rows::default();
        rows.add(lsp_add(switch, nic, external_ids));
        rows::dhcp(&mut rows, nic, &nic.lsp);
        self.lab.nbctl(rows.after(&["--wait=sb"])).await.map(drop)
    }

    /// Removes a logical switch port, if it is there, or those of the VM's pods, with what DHCP answered it and the
    /// routes to it.
    pub async fn del_port(&self, lsp: &str) -> Result<()> {
        let mut rows = Rows::default();
        rows.add(["--if-exists", "lsp-del", lsp]);
        let found = |table| self.lab.nbctl(find_of_pods(table, lsp));
        for row in found("Logical_Switch_Port").await?.split_whitespace() {
            rows.add(["--if-exists", "lsp-del", row]);
        }
        for row in found("Logical_Router_Static_Route")
            .await?
            .split_whitespace()
        {
            let routes = ["remove", "Logical_Router", CLUSTER_ROUTER, "static_routes"];
            rows.add(routes.into_iter().chain([row]));
        }
        for row in found("DHCP_Options").await?.split_whitespace() {
            rows.add(["--if-exists", "destroy", "DHCP_Options", row]);
        }
        self.lab.nbctl(rows.after(&["--wait=sb"])).await.map(drop)
    }

    /// The addresses of a node's gateway router on the outside.
    pub fn gateway_address(&self, node: &str) -> Result<(Ipv4Addr, Ipv6Addr)> {
        let own = self.plan(node)?.outside();
        Ok((own.v4, own.v6))
    }

    /// How many frames have gone through each node's gateway so far, by node. What keeps neighbours known is among
    /// them, a few frames a minute.
    pub async fn carried(&self) -> Result<BTreeMap<String, Carried>> {
        outside::carried(self.lab).await
    }

    /// The nodes, numbered from 1.
    fn nodes(self) -> impl Iterator<Item = (&'a Host, NodePlan)> + use<'a> {
        self.lab.nodes().zip((1..).map(NodePlan))
    }

    fn plan(self, node: &str) -> Result<NodePlan> {
        let found = self.nodes().find(|(host, _)| host.name() == node);
        found
            .map(|(_, plan)| plan)
            .with_context(|| format!("lab {} has no node {node:?}", self.lab.name()))
    }

    /// The node whose subnet has the interface's address.
    fn birthplace(self, nic: &Nic) -> Result<&'a Host> {
        let plan = nic.v4.and_then(|(address, _)| NodePlan::of(address));
        let found = self.nodes().find(|(_, other)| Some(*other) == plan);
        found
            .map(|(host, _)| host)
            .with_context(|| format!("{} has no address of a node's subnet", nic.lsp))
    }
}

/// Starts `arp-proxy` for the logical ports of a node; it ends with the lab.
fn start_arp_proxy(node: &Host, program: &Path) -> Result<()> {
    let log = node.path("/var/log/arp-proxy.log");
    let log = File::create(&log).with_context(|| log.display().to_string())?;
    let mut command = node.netns_command(program)?;
    command
        .args(["--iface-id", "*", "--ovsdb"])
        .arg(node.path("/run/openvswitch/db.sock"))
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log);
    // Nobody waits for it here: tokio reaps it, and the teardown kills what is in the host's network.
    tokio::process::Command::from(command)
        .spawn()
        .map(drop)
        .with_context(|| format!("cannot start {}", program.display()))
}
