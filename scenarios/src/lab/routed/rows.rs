//! What the routed topology is in the Northbound, as arguments of `ovn-nbctl`.

use super::super::guest::Nic;
use super::plan::{
    CLUSTER_JOIN, GATEWAY_MAC, GATEWAY4, GATEWAY6, GUESTS4, GUESTS6, NodePlan, OUTSIDE, Pair,
};
use super::{CLUSTER_ROUTER, Gateway, JOIN_SWITCH, PHYSICAL_NETWORK, gateway_router};

/// Marks the rows that belong to a port, for their removal; of a VM whose pods have ports of their own, those, too.
pub const PORT_KEY: &str = "scenarios.segue.io/port";
/// What a guest is told: room for a tunnel's headers in 1500 bytes, so that it does not depend on the underlay.
const MTU: &str = "1400";
/// In seconds. A guest asks anew after half of it.
const LEASE: &str = "3600";

/// Arguments of one call, commands divided by `--`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Rows(Vec<String>);

impl Rows {
    /// Adds a command.
    pub(super) fn add<S: AsRef<str>>(&mut self, words: impl IntoIterator<Item = S>) -> &mut Self {
        if !self.0.is_empty() {
            self.0.push("--".to_owned());
        }
        self.0
            .extend(words.into_iter().map(|word| word.as_ref().to_owned()));
        self
    }

    /// The arguments, after those for the call as a whole.
    pub(super) fn after(self, options: &[&str]) -> Vec<String> {
        let options = options.iter().map(|option| (*option).to_owned());
        options.chain(self.0).collect()
    }

    fn router_port(&mut self, router: &str, switch: &str, port: &str, mac: &str, own: Pair) {
        let [v4, v6] = own.networks();
        let peer = format!("{switch}-to-{router}");
        self.add(["lrp-add", router, port, mac, &v4, &v6])
            .add(["lsp-add", switch, &peer])
            .add(["lsp-set-type", &peer, "router"])
            .add(["lsp-set-addresses", &peer, "router"])
            .add(["lsp-set-options", &peer, &format!("router-port={port}")]);
    }

    fn routes(&mut self, on: &str, routes: [(&str, String); 2], options: &[&str]) {
        for (prefix, via) in routes {
            let words = options.iter().copied();
            self.add(words.chain(["lr-route-add", on, prefix, &via]));
        }
    }
}

/// The cluster router and the join switch.
pub(super) fn cluster() -> Rows {
    let mut rows = Rows::default();
    rows.add(["lr-add", CLUSTER_ROUTER])
        .add(["ls-add", JOIN_SWITCH]);
    rows.router_port(
        CLUSTER_ROUTER,
        JOIN_SWITCH,
        &format!("{CLUSTER_ROUTER}-{JOIN_SWITCH}"),
        &CLUSTER_JOIN.mac().to_string(),
        CLUSTER_JOIN,
    );
    rows
}

/// A node's switch and gateway router, and the way from one to the other.
pub(super) fn node(name: &str, plan: NodePlan, gateway: &Gateway) -> Rows {
    let mut rows = Rows::default();
    switch(&mut rows, name, plan, gateway);
    let (router, external) = (gateway_router(name), format!("ext-{name}"));
    let chassis = format!("options:chassis={name}");
    rows.add(["lr-add", &router])
        .add(["set", "Logical_Router", &router, &chassis])
        .add(["ls-add", &external]);
    for (switch, own, suffix) in [
        (JOIN_SWITCH, plan.join(), "join"),
        (&external, plan.outside(), "ext"),
    ] {
        let port = format!("{router}-{suffix}");
        rows.router_port(&router, switch, &port, &own.mac().to_string(), own);
    }
    let localnet = format!("{external}-localnet");
    let network = format!("network_name={PHYSICAL_NETWORK}");
    rows.add(["lsp-add", &external, &localnet])
        .add(["lsp-set-type", &localnet, "localnet"])
        .add(["lsp-set-addresses", &localnet, "unknown"])
        .add(["lsp-set-options", &localnet, &network]);

    let via = |pair: Pair| [pair.v4.to_string(), pair.v6.to_string()];
    let [cluster4, cluster6] = via(CLUSTER_JOIN);
    rows.routes(&router, [(GUESTS4, cluster4), (GUESTS6, cluster6)], &[]);
    let [out4, out6] = via(OUTSIDE);
    rows.routes(&router, [("0.0.0.0/0", out4), ("::/0", out6)], &[]);
    // Without segue, guests leave by the gateway of the node where they were born.
    let ([own4, own6], [join4, join6]) = (plan.subnets(), via(plan.join()));
    let by_source = [(own4.as_str(), join4), (own6.as_str(), join6)];
    rows.routes(CLUSTER_ROUTER, by_source, &["--policy=src-ip"]);
    rows
}

fn switch(rows: &mut Rows, name: &str, plan: NodePlan, gateway: &Gateway) {
    let port = node_port(name);
    let own = plan.router();
    let mac = match gateway {
        Gateway::Ovn => own.mac(),
        // OVN then takes what guests send to their gateway, although somebody else tells them its address.
        Gateway::ArpProxy(_) => GATEWAY_MAC,
    };
    rows.add(["ls-add", name]);
    rows.router_port(CLUSTER_ROUTER, name, &port, &mac.to_string(), own);
    if *gateway == Gateway::Ovn {
        let proxy = format!(
            "options:arp_proxy=\"{GATEWAY_MAC} {GATEWAY4} {GATEWAY6} {GUESTS4} {GUESTS6}\""
        );
        let peer = format!("{name}-to-{CLUSTER_ROUTER}");
        rows.add(["set", "Logical_Switch_Port", &peer, &proxy]);
    }
}

/// The cluster router's port on a node's switch.
pub fn node_port(node: &str) -> String {
    format!("{CLUSTER_ROUTER}-{node}")
}

/// The node whose switch a port of the cluster router is on.
pub fn node_of(port: &str) -> Option<&str> {
    port.strip_prefix(CLUSTER_ROUTER)?.strip_prefix('-')
}

fn mark(nic: &Nic) -> String {
    format!("external_ids:\"{PORT_KEY}\"=\"{}\"", nic.lsp)
}

/// The cluster router's routes to a guest that is on a node's switch, as ovn-kubernetes has them.
pub(super) fn host_routes(rows: &mut Rows, nic: &Nic, node: &str) {
    let out = format!("output_port=\"{}\"", node_port(node));
    for address in nic.addresses() {
        let (id, bits) = if address.is_ipv4() {
            ("@route4", 32)
        } else {
            ("@route6", 128)
        };
        rows.add([
            &format!("--id={id}"),
            "create",
            "Logical_Router_Static_Route",
            &format!("ip_prefix=\"{address}/{bits}\""),
            &format!("nexthop=\"{address}\""),
            &out,
            &mark(nic),
        ])
        .add(["add", "Logical_Router", CLUSTER_ROUTER, "static_routes", id]);
    }
}

/// What OVN answers to the DHCP requests of port `lsp`. The rows are an interface's own: a netmask of 255.255.255.255
/// comes only from a network of one address.
pub(super) fn dhcp(rows: &mut Rows, nic: &Nic, lsp: &str) {
    let mark = mark(nic);
    let port = ["set", "Logical_Switch_Port", lsp];
    if let Some((v4, bits)) = nic.v4 {
        let cidr = format!("cidr=\"{v4}/{bits}\"");
        let options = [
            format!("options:server_id={GATEWAY4}"),
            format!("options:server_mac=\"{GATEWAY_MAC}\""),
            format!("options:router={GATEWAY4}"),
            format!("options:lease_time={LEASE}"),
            format!("options:mtu={MTU}"),
            format!(
                "options:classless_static_route=\"{{{GATEWAY4}/32,0.0.0.0, 0.0.0.0/0,{GATEWAY4}}}\""
            ),
        ];
        let create = ["--id=@dhcp4", "create", "DHCP_Options", &cidr, &mark];
        rows.add(create.into_iter().chain(options.iter().map(String::as_str)))
            .add(port.into_iter().chain(["dhcpv4_options=@dhcp4"]));
    }
    if let Some((v6, bits)) = nic.v6 {
        let cidr = format!("cidr=\"{v6}/{bits}\"");
        let server = format!("options:server_id=\"{GATEWAY_MAC}\"");
        let create = ["--id=@dhcp6", "create", "DHCP_Options", &cidr, &mark];
        rows.add(create.into_iter().chain([server.as_str()]))
            .add(port.into_iter().chain(["dhcpv6_options=@dhcp6"]));
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::topology::guest_nic;
    use super::*;

    fn text(rows: Rows) -> String {
        rows.after(&[]).join(" ")
    }

    #[test]
    fn a_guest_is_offered_one_address_and_a_gateway_on_the_link() {
        let mut rows = Rows::default();
        let own = NodePlan(1).host(10);
        let nic = guest_nic("vm1", own.mac(), &[own.v4.into(), own.v6.into()]);
        dhcp(&mut rows, &nic, "vm1");
        let text = text(rows);
        for expected in [
            "cidr=\"10.20.1.10/32\"",
            "cidr=\"fd00:10:20:1::a/128\"",
            "classless_static_route=\"{169.254.1.1/32,0.0.0.0, 0.0.0.0/0,169.254.1.1}\"",
            "set Logical_Switch_Port vm1 dhcpv4_options=@dhcp4",
        ] {
            assert!(text.contains(expected), "{expected} is not in {text}");
        }
    }

    #[test]
    fn whoever_answers_for_the_gateway_is_the_only_one() {
        let ovn = text(node("node1", NodePlan(1), &Gateway::Ovn));
        assert!(ovn.contains("arp_proxy=\"0a:58:a9:fe:01:01 169.254.1.1 fe80::1 "));
        assert!(ovn.contains("lrp-add cluster cluster-node1 0a:58:0a:14:01:01"));
        let other = text(node("node1", NodePlan(1), &Gateway::ArpProxy("/x".into())));
        assert!(!other.contains("arp_proxy"));
        assert!(other.contains("lrp-add cluster cluster-node1 0a:58:a9:fe:01:01"));
    }

    #[test]
    fn a_host_route_leaves_by_the_port_of_the_guests_node() {
        let own = NodePlan(1).host(10);
        let nic = guest_nic("vm1", own.mac(), &[own.v4.into(), own.v6.into()]);
        let mut rows = Rows::default();
        host_routes(&mut rows, &nic, "node1");
        let text = text(rows);
        for prefix in ["10.20.1.10/32", "fd00:10:20:1::a/128"] {
            let expected = format!("ip_prefix=\"{prefix}\"");
            assert!(text.contains(&expected), "{expected} is not in {text}");
        }
        assert_eq!(text.matches("output_port=\"cluster-node1\"").count(), 2);
        assert_eq!(node_of("cluster-node1"), Some("node1"));
        assert_eq!(node_of("gr-node1-join"), None);
    }

    #[test]
    fn commands_are_divided() {
        let mut rows = Rows::default();
        rows.add(["a", "b"]).add(["c"]);
        assert_eq!(
            rows.after(&["--wait=sb"]),
            ["--wait=sb", "a", "b", "--", "c"]
        );
    }
}
