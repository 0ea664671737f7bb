//! Names and addresses of the network that is measured.

use std::net::Ipv4Addr;

/// How many nodes there are, the real one included.
///
/// Every gateway router has a policy for each other one, so their number grows with the square. With few nodes the load
/// is VMs and not the layout, and the methods that make northd compile the policies anew are not charged for them.
pub(super) const NODES: u8 = 20;

/// The cluster router.
pub(super) const CLUSTER: &str = "cluster";
/// The switch with every gateway router on it.
pub(super) const JOIN: &str = "join";
/// The join network's prefix length, and that of every node's switch.
pub(super) const PREFIX: u8 = 16;

/// The node with a chassis; the others are rows.
pub(super) const WATCHED: Node = Node(1);
/// The node where [`MOVED`] lives at first.
pub(super) const OTHER: Node = Node(2);
/// A VM on [`WATCHED`].
pub(super) const RESIDENT: Vm = Vm(0);
/// The VM that is moved between [`OTHER`] and [`WATCHED`].
pub(super) const MOVED: Vm = Vm(1);

/// A node by its number, from 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Node(u8);

/// A VM by its number, from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Vm(u32);

// === impl Node ===

impl Node {
    pub(super) fn all() -> impl Iterator<Item = Self> {
        (1..=NODES).map(Self)
    }

    /// Also the name of its switch and of its chassis.
    pub(super) fn name(self) -> String {
        format!("node{}", self.0)
    }

    pub(super) fn gateway_router(self) -> String {
        format!("gr-{}", self.name())
    }

    /// The gateway router's port on the join switch.
    pub(super) fn join_port(self) -> String {
        format!("rtoj-{}", self.gateway_router())
    }

    /// The cluster router's port on the node's switch.
    pub(super) fn router_port(self) -> String {
        format!("rtos-{}", self.name())
    }

    /// The set of the guests whose outside traffic takes this node's gateway.
    pub(super) fn address_set(self) -> String {
        format!("segue_{}_ip4", self.name())
    }

    /// The next hop to its gateway router.
    pub(super) fn next_hop(self) -> Ipv4Addr {
        Ipv4Addr::new(100, 64, 0, 1 + self.0)
    }

    /// The address of the cluster router's port on the node's switch.
    pub(super) fn router_address(self) -> Ipv4Addr {
        self.host(1)
    }

    /// Where its chassis ends tunnels.
    pub(super) fn tunnel_address(self) -> Ipv4Addr {
        Ipv4Addr::new(172, 30, 0, 10 + self.0)
    }

    fn host(self, number: u16) -> Ipv4Addr {
        let [high, low] = number.to_be_bytes();
        Ipv4Addr::new(10, 64 + self.0, high, low)
    }
}

// === impl Vm ===

impl Vm {
    /// Host numbers of a switch that are not VMs'.
    const RESERVED: u16 = 10;

    /// As many as the switches have addresses for.
    pub(super) const MOST: u32 = NODES as u32 * (u16::MAX - Self::RESERVED) as u32;

    /// Those with the numbers from `first` up to, not including, `end`.
    pub(super) fn range(first: u32, end: u32) -> impl Iterator<Item = Self> {
        (first..end.min(Self::MOST)).map(Self)
    }

    /// Round and round.
    #[allow(clippy::cast_possible_truncation, reason = "below NODES, a u8")]
    pub(super) fn node(self) -> Node {
        Node(1 + (self.0 % u32::from(NODES)) as u8)
    }

    pub(super) fn port(self) -> String {
        format!("vm{}", self.0)
    }

    #[allow(
        clippy::cast_possible_truncation,
        reason = "a VM's number is below MOST, which fills the subnets"
    )]
    pub(super) fn address(self) -> Ipv4Addr {
        let number = (self.0 / u32::from(NODES)) as u16;
        self.node().host(Self::RESERVED + number)
    }
}

/// The cluster router's address on the join network.
pub(super) fn cluster_address() -> Ipv4Addr {
    Ipv4Addr::new(100, 64, 0, 1)
}

/// An Ethernet address made of an IPv4 address, as OVN's users do: `0a:58` and the four octets.
pub(super) fn mac(address: Ipv4Addr) -> String {
    let [a, b, c, d] = address.octets();
    format!("0a:58:{a:02x}:{b:02x}:{c:02x}:{d:02x}")
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn no_two_vms_share_an_address_up_to_the_most_there_can_be() {
        let addresses: HashSet<_> = Vm::range(0, u32::MAX).map(Vm::address).collect();
        assert_eq!(addresses.len(), usize::try_from(Vm::MOST).unwrap());
        for node in Node::all() {
            assert!(!addresses.contains(&node.router_address()));
        }
    }

    #[test]
    fn the_vms_that_matter_live_where_it_says() {
        assert_eq!(RESIDENT.node(), WATCHED);
        assert_eq!(MOVED.node(), OTHER);
    }
}
