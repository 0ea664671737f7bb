//! The network beyond the gateways: a bridge in the host `outside`, a link to each node.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result};
use futures::future::try_join_all;
use serde::Deserialize;

use super::super::{
    Lab,
    exec::{command, output},
    host::Host,
    ovn::checksum_in_software,
};
use super::PHYSICAL_NETWORK;
use super::plan::{NodePlan, OUTSIDE};

/// The bridge that holds the outside's address.
const BRIDGE: &str = "net0";
/// A node's bridge to the outside.
const EXTERNAL_BRIDGE: &str = "br-ex";
/// The interface of a node on the outside.
const UPLINK: &str = "ext0";

/// Frames that went through a node's gateway.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Carried {
    /// From the outside towards the guests.
    pub to_guests: u64,
    /// From the guests to the outside.
    pub from_guests: u64,
}

/// Builds the network and gives every node its bridge to it.
pub(super) async fn connect(lab: &Lab, nodes: &[(&Host, NodePlan)]) -> Result<()> {
    let outside = lab.host("outside")?;
    let [v4, v6] = OUTSIDE.networks();
    let lines = [
        "link set lo up".to_owned(),
        // A bridge that is given no address changes it with its ports.
        format!("link add {BRIDGE} address {} type bridge", OUTSIDE.mac()),
        format!("link set {BRIDGE} up"),
        format!("addr add {v4} dev {BRIDGE}"),
        format!("-6 addr add {v6} dev {BRIDGE} nodad"),
    ];
    outside.netns().ip(&lines).await?;
    try_join_all(
        nodes
            .iter()
            .map(|(node, plan)| connect_node(outside, node, *plan)),
    )
    .await
    .map(drop)
}

async fn connect_node(outside: &Host, node: &Host, plan: NodePlan) -> Result<()> {
    let (port, peer) = (node.name(), node.netns_name());
    let links = [
        format!("link add {port} type veth peer name {UPLINK} netns {peer}"),
        format!("link set {port} master {BRIDGE} up"),
    ];
    outside.netns().ip(&links).await?;
    node.netns().ip(&[format!("link set {UPLINK} up")]).await?;
    checksum_in_software(outside, port).await?;
    checksum_in_software(node, UPLINK).await?;
    let mapping = format!("external_ids:ovn-bridge-mappings={PHYSICAL_NETWORK}:{EXTERNAL_BRIDGE}");
    let bridge = ["set", "Bridge", EXTERNAL_BRIDGE, "datapath_type=netdev"];
    node.ovs()
        .vsctl(
            ["add-br", EXTERNAL_BRIDGE, "--"]
                .into_iter()
                .chain(bridge)
                .chain(["--", "add-port", EXTERNAL_BRIDGE, UPLINK])
                .chain(["--", "set", "Open_vSwitch", ".", &mapping]),
        )
        .await?;
    let [_, subnet6] = plan.subnets();
    let via6 = plan.outside().v6;
    let route6 = format!("-6 route replace {subnet6} via {via6}");
    outside.netns().ip(&[route6]).await?;
    route_v4(outside, plan, true).await
}

/// Lets the outside and the gateways know each other, as those do that have worked for a while: the first packets by a
/// gateway that has to ask for its next hop come late, or not at all.
pub(super) async fn greet(lab: &Lab, nodes: &[(&Host, NodePlan)]) -> Result<()> {
    let outside = lab.host("outside")?;
    try_join_all(nodes.iter().map(|(node, plan)| async {
        let own = plan.outside();
        for address in [own.v4.to_string(), own.v6.to_string()] {
            outside
                .run("busybox", ["ping", "-c", "1", "-W", "5", &address])
                .await
                .with_context(|| format!("the gateway of {} does not answer", node.name()))?;
        }
        Ok(())
    }))
    .await
    .map(drop)
}

/// Gives the outside its route to the guests born on a node, or takes it.
pub(super) async fn route_v4(outside: &Host, plan: NodePlan, there: bool) -> Result<()> {
    let [subnet, _] = plan.subnets();
    let line = if there {
        format!("route replace {subnet} via {}", plan.outside().v4)
    } else {
        // Unlike its removal, this is no error where there is none.
        format!("route flush exact {subnet}")
    };
    outside.netns().ip(&[line]).await
}

/// How much went through each node's gateway since the network was made, by node.
pub(super) async fn carried(lab: &Lab) -> Result<BTreeMap<String, Carried>> {
    let netns = lab.host("outside")?.netns_name();
    let shown = output(command("ip", ["-n", &netns, "-s", "-j", "link", "show"])).await?;
    let links: Vec<Link> = serde_json::from_str(&shown).context("output of `ip -j link`")?;
    let nodes = lab.nodes().map(|node| {
        let name = node.name();
        let link = links.iter().find(|link| link.ifname == name);
        let counted = link
            .and_then(|link| link.stats64)
            .with_context(|| format!("{name} is not connected with the outside"))?;
        let carried = Carried {
            to_guests: counted.tx.packets,
            from_guests: counted.rx.packets,
        };
        Ok((name.to_owned(), carried))
    });
    nodes.collect()
}

/// What `ip -j -s link` tells of an interface.
#[derive(Deserialize)]
struct Link {
    ifname: String,
    stats64: Option<Stats>,
}

#[derive(Clone, Copy, Deserialize)]
struct Stats {
    rx: Counted,
    tx: Counted,
}

#[derive(Clone, Copy, Deserialize)]
struct Counted {
    packets: u64,
}
