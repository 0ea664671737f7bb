//! What gateways do to packets: source NAT, load balancing.

use std::net::SocketAddr;

use anyhow::Result;

use super::outside::route_v4;
use super::plan::GUESTS4;
use super::rows::Rows;
use super::{RoutedNetwork, gateway_router};

/// The protocols that a node port is there for.
const PROTOCOLS: [&str; 2] = ["tcp", "udp"];

impl RoutedNetwork<'_> {
    /// Lets every gateway put its own outside address for the guests' IPv4 addresses, or no more. With it the outside
    /// knows no way to the guests' own addresses. IPv6 stays as it is. Returns once every node follows.
    pub async fn set_snat(&self, on: bool) -> Result<()> {
        let mut rows = Rows::default();
        for (node, plan) in self.nodes() {
            let router = gateway_router(node.name());
            rows.add(["--if-exists", "lr-nat-del", &router, "snat", GUESTS4]);
            if on {
                let external = plan.outside().v4.to_string();
                rows.add(["lr-nat-add", &router, "snat", &external, GUESTS4]);
            }
        }
        self.lab.nbctl(rows.after(&["--wait=hv"])).await?;
        let outside = self.lab.host("outside")?;
        for (_, plan) in self.nodes() {
            route_v4(outside, plan, !on).await?;
        }
        Ok(())
    }

    /// Lets a node's gateway pass on what comes to its outside address on `port`, TCP and UDP, to `target`, and put its
    /// own address on the join switch as the source, so that replies come back to it: what NodePort services are in
    /// OVN. Returns the address to connect to, once every node follows.
    pub async fn add_node_port(
        &self,
        node: &str,
        port: u16,
        target: SocketAddr,
    ) -> Result<SocketAddr> {
        let (v4, v6) = self.gateway_address(node)?;
        let at = if target.is_ipv4() {
            SocketAddr::new(v4.into(), port)
        } else {
            SocketAddr::new(v6.into(), port)
        };
        let router = gateway_router(node);
        let force = "options:lb_force_snat_ip=router_ip";
        let mut rows = Rows::default();
        rows.add(["set", "Logical_Router", &router, force]);
        for protocol in PROTOCOLS {
            let name = node_port(node, port, protocol);
            let (vip, target) = (at.to_string(), target.to_string());
            rows.add(["--may-exist", "lb-add", &name, &vip, &target, protocol])
                .add(["--may-exist", "lr-lb-add", &router, &name]);
        }
        self.lab.nbctl(rows.after(&["--wait=hv"])).await?;
        Ok(at)
    }

    /// Undoes [`add_node_port`](Self::add_node_port) in both families; a gateway without any passes packets on as they
    /// are.
    pub async fn del_node_port(&self, node: &str, port: u16) -> Result<()> {
        let router = gateway_router(node);
        let mut rows = Rows::default();
        for protocol in PROTOCOLS {
            let name = node_port(node, port, protocol);
            rows.add(["--if-exists", "lb-del", &name]);
        }
        self.lab.nbctl(rows.after(&[])).await?;
        let mut rows = Rows::default();
        if self.lab.nbctl(["lr-lb-list", &router]).await?.is_empty() {
            let option = ["options", "lb_force_snat_ip"];
            rows.add(
                ["remove", "Logical_Router", &router]
                    .into_iter()
                    .chain(option),
            );
        } else {
            rows.add(["sync"]);
        }
        self.lab.nbctl(rows.after(&["--wait=hv"])).await.map(drop)
    }
}

fn node_port(node: &str, port: u16, protocol: &str) -> String {
    format!("nodeport-{node}-{port}-{protocol}")
}
