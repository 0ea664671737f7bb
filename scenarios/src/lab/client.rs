//! The client: a peer of the guests with a port of its own.

use anyhow::{Context as _, Result};

use super::{Lab, guest::Nic, ovn::checksum_in_software, topology::Subnet};

/// The client's first port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientSpec {
    /// Name, addresses and logical switch port of its `eth0`.
    pub nic: Nic,
}

impl Default for ClientSpec {
    fn default() -> Self {
        Self {
            nic: Subnet(0).client(),
        }
    }
}

impl Lab {
    /// Gives the client an interface on the integration bridge of the last node, with the addresses of `nic`. It has a
    /// network once its logical switch port exists.
    pub async fn plug_client(&self, interface: &str, nic: &Nic) -> Result<()> {
        let client = self.host("client")?;
        let node = self.nodes().last().context("a lab without nodes")?;
        let port = format!("client-{interface}");
        node.netns()
            .ip(&[
                format!(
                    "link add {port} type veth peer name {interface} netns {}",
                    client.netns_name()
                ),
                format!("link set {port} up"),
            ])
            .await?;
        checksum_in_software(client, interface).await?;
        checksum_in_software(node, &port).await?;
        let mut lines = vec![
            "link set lo up".to_owned(),
            format!("link set {interface} address {} up", nic.mac),
        ];
        lines.extend(
            nic.v4
                .map(|(address, bits)| format!("addr add {address}/{bits} dev {interface}")),
        );
        lines.extend(
            nic.v6.map(|(address, bits)| {
                format!("-6 addr add {address}/{bits} dev {interface} nodad")
            }),
        );
        lines.extend(
            nic.gateway4
                .map(|gateway| format!("route add default via {gateway} dev {interface}")),
        );
        lines.extend(
            nic.gateway6
                .map(|gateway| format!("-6 route add default via {gateway} dev {interface}")),
        );
        client.netns().ip(&lines).await?;
        node.ovs().add_port(&port, &nic.lsp).await
    }
}

/// Gives the client of a new lab its first interface.
pub(super) async fn plug(lab: &Lab, spec: &ClientSpec) -> Result<()> {
    lab.plug_client("eth0", &spec.nic)
        .await
        .context("plug the client")
}
