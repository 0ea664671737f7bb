//! OVN: its databases on central, its controller on each node.

use std::net::Ipv4Addr;

use anyhow::{Context as _, Result};
use futures::future::try_join_all;

use super::{
    Lab,
    daemon::{Daemon, NB_PORT, SB_PORT},
    exec::{command, output},
    host::Host,
    mac::MacAddr,
};

/// Carries a guest's 1500 bytes in Geneve over IPv4, with room for OVN's options (58 bytes together).
const UNDERLAY_MTU: u16 = 1600;
/// The interface of a node on the underlay.
const UPLINK: &str = "eth0";
/// The bridge in central's namespace that stands for the network between the machines.
const UNDERLAY_BRIDGE: &str = "underlay";
/// The interface of a node on the network beside the underlay.
const MANAGEMENT: &str = "mgmt0";
/// The bridge in central's namespace that stands for that network.
const MANAGEMENT_BRIDGE: &str = "management";
/// The bridge of a node that holds the uplink, so that tunnels of the userspace datapath find their way out.
const PHYSICAL_BRIDGE: &str = "br-phys";

impl Lab {
    /// Runs `ovn-nbctl` on central.
    pub async fn nbctl<I, S>(&self, args: I) -> Result<String>
    where
        I: IntoIterator<Item = S>,
        S: AsRef<std::ffi::OsStr>,
    {
        let mut command = self.central().command("ovn-nbctl");
        command.arg("--timeout=30").args(args);
        output(command).await
    }

    /// Runs `ovn-sbctl` on central.
    pub async fn sbctl<I, S>(&self, args: I) -> Result<String>
    where
        I: IntoIterator<Item = S>,
        S: AsRef<std::ffi::OsStr>,
    {
        let mut command = self.central().command("ovn-sbctl");
        command.arg("--timeout=30").args(args);
        output(command).await
    }

    /// The Northbound database, as seen from central and from the nodes.
    pub fn nb_endpoint(&self) -> String {
        format!("tcp:{}:{NB_PORT}", Lab::CENTRAL_UNDERLAY)
    }

    /// The Southbound database, as seen from central and from the nodes.
    pub fn sb_endpoint(&self) -> String {
        format!("tcp:{}:{SB_PORT}", Lab::CENTRAL_UNDERLAY)
    }

    /// Returns once every node's chassis is registered in the Southbound database and follows it.
    pub(super) async fn wait_chassis(&self) -> Result<()> {
        try_join_all(self.nodes().map(|node| async {
            let column = format!("name={}", node.name());
            self.sbctl(["wait-until", "Chassis", node.name(), &column])
                .await
                .with_context(|| format!("{} did not register with OVN", node.name()))
        }))
        .await?;
        self.nbctl(["--wait=hv", "sync"])
            .await
            .context("not every node follows OVN")
            .map(drop)
    }
}

/// Builds the network between the machines: a bridge in central's namespace, a link to each node's.
pub(super) async fn connect_underlay(central: &Host, nodes: &[&Host]) -> Result<()> {
    let netns = central.netns();
    netns
        .ip(&[
            "link set lo up".to_owned(),
            format!("link add {UNDERLAY_BRIDGE} mtu {UNDERLAY_MTU} type bridge"),
            format!(
                "addr add {}/24 dev {UNDERLAY_BRIDGE}",
                Lab::CENTRAL_UNDERLAY
            ),
            format!("link set {UNDERLAY_BRIDGE} up"),
        ])
        .await?;
    try_join_all(nodes.iter().map(|node| async {
        let port = node.name();
        let peer = node.netns_name();
        netns
            .ip(&[
                format!("link add {port} mtu {UNDERLAY_MTU} type veth peer name {UPLINK} mtu {UNDERLAY_MTU} netns {peer}"),
                format!("link set {port} master {UNDERLAY_BRIDGE} up"),
            ])
            .await?;
        node.netns()
            .ip(&[
                "link set lo up".to_owned(),
                // The switch takes a copy of each frame off the uplink, and the kernel sees it all the same. It would
                // answer ARP for the address of PHYSICAL_BRIDGE there as well (net.ipv4.conf.*.arp_ignore, 0), with the
                // uplink's Ethernet address. A switch that believes that answer tunnels to where nobody listens.
                format!("link set {UPLINK} arp off up"),
            ])
            .await?;
        checksum_in_software(central, port).await?;
        checksum_in_software(node, UPLINK).await
    }))
    .await
    .map(drop)
}

/// Builds a second network between the machines, which the nodes' switches have no part in.
///
/// Guests' memory is copied here, and segue's controller and agents talk here. On the underlay both would go through the
/// switch's one thread, and a migration's stream overruns the packet socket that it takes frames from (212,992 bytes):
/// thousands are dropped in every migration, and with the stream's, which TCP sends again, those of the guests' tunnels. In a
/// cluster a network of its own for migrations keeps them apart (KubeVirt, "Dedicated network for Live Migration").
pub(super) async fn connect_management(central: &Host, nodes: &[&Host]) -> Result<()> {
    let address = |host: &Host| {
        let address = host.management();
        address.with_context(|| format!("{} has no address", host.name()))
    };
    let netns = central.netns();
    netns
        .ip(&[
            format!("link add {MANAGEMENT_BRIDGE} type bridge"),
            format!("addr add {}/24 dev {MANAGEMENT_BRIDGE}", address(central)?),
            format!("link set {MANAGEMENT_BRIDGE} up"),
        ])
        .await?;
    try_join_all(nodes.iter().map(|node| async {
        let (port, peer) = (format!("m-{}", node.name()), node.netns_name());
        netns
            .ip(&[
                format!("link add {port} type veth peer name {MANAGEMENT} netns {peer}"),
                format!("link set {port} master {MANAGEMENT_BRIDGE} up"),
            ])
            .await?;
        node.netns()
            .ip(&[
                format!("addr add {}/24 dev {MANAGEMENT}", address(node)?),
                format!("link set {MANAGEMENT} up"),
            ])
            .await
    }))
    .await
    .map(drop)
}

/// Makes the kernel compute checksums before a frame leaves this interface.
///
/// The userspace datapath takes frames off a packet socket and hands them on as they are: with checksum offload, TCP
/// through it carries unfinished checksums and dies, while ping works.
pub(super) async fn checksum_in_software(host: &Host, interface: &str) -> Result<()> {
    let mut ethtool = command("ethtool", ["-K", interface, "tx", "off"]);
    super::netns::run_in(&mut ethtool, host.netns().open()?);
    output(ethtool).await.map(drop)
}

/// Creates OVN's databases and starts its central daemons.
pub(super) async fn start_central(central: &Host) -> Result<()> {
    for (file, schema) in [("ovnnb_db", "ovn-nb"), ("ovnsb_db", "ovn-sb")] {
        let file = format!("/var/lib/ovn/{file}.db");
        let schema = format!("/usr/share/ovn/{schema}.ovsschema");
        central
            .run("ovsdb-tool", ["create", &file, &schema])
            .await?;
    }
    for daemon in [Daemon::NbDb, Daemon::SbDb, Daemon::Northd] {
        central.start(daemon).await?;
    }
    // These two create the databases' only rows, without which northd has nothing to work on.
    central.run("ovn-nbctl", ["init"]).await?;
    central.run("ovn-sbctl", ["init"]).await.map(drop)
}

/// The Ethernet address of a node, by its number, on the underlay.
fn underlay_mac(index: u8) -> MacAddr {
    MacAddr([2, 0, 0, 0, 0, index])
}

/// Tells each node's switch the others' Ethernet addresses on the underlay.
///
/// The userspace datapath drops the packet for which it has to ask: the first from one node to another would be lost,
/// in the midst of what is measured. An hour without a packet is the longest that it can be told to remember.
pub(super) async fn introduce(nodes: &[&Host]) -> Result<()> {
    try_join_all(nodes.iter().map(|node| async move {
        node.run("ovs-appctl", ["tnl/neigh/aging", "3600"]).await?;
        for (index, other) in (1u8..).zip(nodes) {
            let Some(address) = other.underlay.filter(|_| other != node) else {
                continue;
            };
            let (address, mac) = (address.to_string(), underlay_mac(index).to_string());
            node.run(
                "ovs-appctl",
                ["tnl/neigh/set", PHYSICAL_BRIDGE, &address, &mac],
            )
            .await?;
        }
        Ok(())
    }))
    .await
    .map(drop)
}

/// Starts a node's switch, with its uplink and its bridges.
pub(super) async fn start_switch(node: &Host, index: u8, address: Ipv4Addr) -> Result<()> {
    node.run(
        "ovsdb-tool",
        [
            "create",
            "/etc/openvswitch/conf.db",
            "/usr/share/openvswitch/vswitch.ovsschema",
        ],
    )
    .await?;
    node.start(Daemon::OvsDb).await?;
    let ovs = node.ovs();
    ovs.vsctl(["--no-wait", "init"]).await?;
    node.start(Daemon::Vswitchd).await?;
    let identity = [
        format!("external_ids:system-id={}", node.name()),
        format!("external_ids:hostname={}", node.name()),
        format!(
            "external_ids:ovn-remote=tcp:{}:{SB_PORT}",
            Lab::CENTRAL_UNDERLAY
        ),
        "external_ids:ovn-encap-type=geneve".to_owned(),
        format!("external_ids:ovn-encap-ip={address}"),
        "external_ids:ovn-bridge-datapath-type=netdev".to_owned(),
    ];
    let hwaddr = format!("other_config:hwaddr={}", underlay_mac(index));
    ovs.vsctl(
        ["set", "Open_vSwitch", "."]
            .into_iter()
            .chain(identity.iter().map(String::as_str))
            .chain(["--", "add-br", PHYSICAL_BRIDGE])
            .chain([
                "--",
                "set",
                "Bridge",
                PHYSICAL_BRIDGE,
                "datapath_type=netdev",
                &hwaddr,
            ])
            .chain(["--", "add-port", PHYSICAL_BRIDGE, UPLINK])
            .chain(["--", "add-br", super::INTEGRATION_BRIDGE])
            .chain([
                "--",
                "set",
                "Bridge",
                super::INTEGRATION_BRIDGE,
                "datapath_type=netdev",
                "fail_mode=secure",
            ]),
    )
    .await?;
    node.netns()
        .ip(&[
            format!("addr add {address}/24 dev {PHYSICAL_BRIDGE}"),
            format!("link set {PHYSICAL_BRIDGE} up"),
        ])
        .await?;
    checksum_in_software(node, PHYSICAL_BRIDGE).await
}
