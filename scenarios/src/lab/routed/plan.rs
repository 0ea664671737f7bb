//! Who has which address in the routed topology.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::super::{guest::Nic, mac::MacAddr};

/// Every guest's gateway, wherever it runs.
pub const GATEWAY4: Ipv4Addr = Ipv4Addr::new(169, 254, 1, 1);
/// Every guest's IPv6 gateway.
pub const GATEWAY6: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);
/// The gateways' Ethernet address, the same on every node.
pub const GATEWAY_MAC: MacAddr = MacAddr([0x0a, 0x58, 0xa9, 0xfe, 0x01, 0x01]);

/// All nodes' subnets.
pub(super) const GUESTS4: &str = "10.20.0.0/16";
/// All nodes' IPv6 subnets.
pub(super) const GUESTS6: &str = "fd00:10:20::/48";

/// An address of each family, in one network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Pair {
    pub(super) v4: Ipv4Addr,
    pub(super) v6: Ipv6Addr,
}

/// The host beyond the gateways.
pub(super) const OUTSIDE: Pair = outside(1, 1);
/// The cluster router on the join switch.
pub(super) const CLUSTER_JOIN: Pair = join(1, 1);

/// The addresses that depend on a node, by its number from 1: its subnet is `10.20.<number>.0/24` and
/// `fd00:10:20:<number>::/64`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct NodePlan(pub(super) u8);

/// A network's addresses are written alike in both families: `.11` and `::11`.
const fn join(v4: u8, v6: u16) -> Pair {
    Pair {
        v4: Ipv4Addr::new(100, 64, 0, v4),
        v6: Ipv6Addr::new(0xfd98, 0, 0, 0, 0, 0, 0, v6),
    }
}

const fn outside(v4: u8, v6: u16) -> Pair {
    Pair {
        v4: Ipv4Addr::new(172, 31, 0, v4),
        v6: Ipv6Addr::new(0xfd00, 0x172, 0x31, 0, 0, 0, 0, v6),
    }
}

impl Pair {
    /// With prefix lengths, as a router port has them.
    pub(super) fn networks(self) -> [String; 2] {
        [format!("{}/24", self.v4), format!("{}/64", self.v6)]
    }

    pub(super) fn mac(self) -> MacAddr {
        MacAddr::of(self.v4)
    }
}

impl NodePlan {
    /// The node that an address of a guest was given out on.
    pub(super) fn of(address: Ipv4Addr) -> Option<Self> {
        match address.octets() {
            [10, 20, number, _] => Some(Self(number)),
            _ => None,
        }
    }

    /// Host number `host` of the node's subnet.
    pub(super) fn host(self, host: u8) -> Pair {
        let Self(number) = self;
        Pair {
            v4: Ipv4Addr::new(10, 20, number, host),
            v6: Ipv6Addr::new(0xfd00, 0x10, 0x20, number.into(), 0, 0, 0, host.into()),
        }
    }

    /// The cluster router on the node's switch.
    pub(super) fn router(self) -> Pair {
        self.host(1)
    }

    /// The node's gateway router on the join switch.
    pub(super) fn join(self) -> Pair {
        join(10 + self.0, 0x10 + u16::from(self.0))
    }

    /// The node's gateway router on the outside.
    pub(super) fn outside(self) -> Pair {
        outside(10 + self.0, 0x10 + u16::from(self.0))
    }

    /// The node's subnet in both families.
    pub(super) fn subnets(self) -> [String; 2] {
        let [v4, v6] = self.host(0).networks();
        [v4, v6]
    }

    /// The client on the node's switch: an ordinary host of the subnet.
    pub(super) fn client(self) -> Nic {
        let (own, router) = (self.host(5), self.router());
        Nic {
            lsp: "client-routed".to_owned(),
            mac: own.mac(),
            v4: Some((own.v4, 24)),
            v6: Some((own.v6, 64)),
            gateway4: Some(router.v4),
            gateway6: Some(router.v6),
            dhcp: false,
        }
    }
}

/// Whether an address was given to a guest by a routed network.
pub fn is_routed(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => NodePlan::of(address).is_some(),
        IpAddr::V6(address) => address.segments().starts_with(&[0xfd00, 0x10, 0x20]),
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::topology::Subnet;
    use super::*;

    #[test]
    fn both_families_read_alike() {
        let node = NodePlan(2);
        assert_eq!(node.subnets(), ["10.20.2.0/24", "fd00:10:20:2::/64"]);
        assert_eq!(node.join().networks(), ["100.64.0.12/24", "fd98::12/64"]);
        assert_eq!(node.outside().v6.to_string(), "fd00:172:31::12");
        assert_eq!(node.router().mac().to_string(), "0a:58:0a:14:02:01");
        assert_eq!(NodePlan::of(node.host(10).v4), Some(node));
    }

    #[test]
    fn shared_subnets_are_not_taken_for_routed_ones() {
        let shared = Subnet(0).nic("vm1", 10);
        assert!(!shared.addresses().any(is_routed));
        let own = NodePlan(1).host(10);
        assert!([own.v4.into(), own.v6.into()].into_iter().all(is_routed));
    }
}
