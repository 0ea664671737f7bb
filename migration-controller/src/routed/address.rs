//! Addresses and networks as OVN's columns have them.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// An IP version.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Family {
    /// IPv4.
    Ip4,
    /// IPv6.
    Ip6,
}

/// A network: the part of its address that its prefix covers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Network {
    address: IpAddr,
    prefix: u8,
}

impl Family {
    pub(crate) const ALL: [Self; 2] = [Self::Ip4, Self::Ip6];

    pub(crate) fn of(address: IpAddr) -> Self {
        match address {
            IpAddr::V4(_) => Self::Ip4,
            IpAddr::V6(_) => Self::Ip6,
        }
    }

    /// What OVN's match language calls the protocol, and the ending of a set's name.
    pub(crate) fn field(self) -> &'static str {
        match self {
            Self::Ip4 => "ip4",
            Self::Ip6 => "ip6",
        }
    }
}

impl Network {
    /// The network that `text`, an address with or without a prefix length, is in.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let (address, prefix) = interface(text)?;
        let address = match address {
            IpAddr::V4(address) => {
                let mask = u32::MAX.checked_shl(32 - u32::from(prefix));
                Ipv4Addr::from_bits(address.to_bits() & mask.unwrap_or_default()).into()
            }
            IpAddr::V6(address) => {
                let mask = u128::MAX.checked_shl(128 - u32::from(prefix));
                Ipv6Addr::from_bits(address.to_bits() & mask.unwrap_or_default()).into()
            }
        };
        Some(Self { address, prefix })
    }

    pub(crate) fn family(self) -> Family {
        Family::of(self.address)
    }
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.prefix)
    }
}

/// The address in `text`, with or without a prefix length, and that length.
fn interface(text: &str) -> Option<(IpAddr, u8)> {
    let (address, prefix) = match text.split_once('/') {
        Some((address, prefix)) => (address, Some(prefix.parse().ok()?)),
        None => (text, None),
    };
    let address: IpAddr = address.parse().ok()?;
    let longest = match address {
        IpAddr::V4(_) => 32,
        IpAddr::V6(_) => 128,
    };
    let prefix = prefix.unwrap_or(longest);
    (prefix <= longest).then_some((address, prefix))
}

/// The address in `text`, with or without a prefix length.
pub(crate) fn address(text: &str) -> Option<IpAddr> {
    interface(text).map(|(address, _)| address)
}

/// The one address that a prefix covers, if it covers no more.
pub(crate) fn host(text: &str) -> Option<IpAddr> {
    let (address, prefix) = interface(text)?;
    let longest = match address {
        IpAddr::V4(_) => 32,
        IpAddr::V6(_) => 128,
    };
    (prefix == longest).then_some(address)
}

/// The addresses of a switch port's `addresses`: of each element, what comes after the Ethernet
/// address. `unknown`, `dynamic` and `router` tell of none. Source: ovn-nb(5).
pub(crate) fn port_addresses(elements: &[String]) -> Vec<IpAddr> {
    let mut found: Vec<_> = elements
        .iter()
        .flat_map(|element| element.split_whitespace().filter_map(address))
        .collect();
    found.sort_unstable();
    found.dedup();
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_network_is_the_covered_part() {
        for (text, network) in [
            ("10.1.2.3/16", "10.1.0.0/16"),
            ("10.1.2.3", "10.1.2.3/32"),
            ("10.1.2.3/0", "0.0.0.0/0"),
            ("2001:DB8::5/64", "2001:db8::/64"),
            ("2001:db8::5/128", "2001:db8::5/128"),
        ] {
            let found = Network::parse(text).map(|network| network.to_string());
            assert_eq!(found.as_deref(), Some(network), "{text}");
        }
        for nonsense in ["10.1.2.3/33", "10.1.2.3/x", "router", "", "2001:db8::5/129"] {
            assert_eq!(Network::parse(nonsense), None, "{nonsense}");
        }
    }

    #[test]
    fn a_ports_addresses_are_what_follows_the_ethernet_address() {
        let elements = [
            "0a:00:00:00:00:01 10.20.1.10 2001:DB8::10",
            "0a:00:00:00:00:02 10.20.1.11/32",
            "0a:00:00:00:00:03 dynamic",
            "unknown",
            "router",
            "0a:00:00:00:00:04",
        ]
        .map(str::to_owned);
        let found: Vec<_> = port_addresses(&elements)
            .iter()
            .map(ToString::to_string)
            .collect();
        assert_eq!(found, ["10.20.1.10", "10.20.1.11", "2001:db8::10"]);
    }
}
