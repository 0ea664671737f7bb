//! Who the answers are for.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use thiserror::Error;

use crate::Mac;

/// The most prefixes that one router advertisement carries: it must fit in the smallest IPv6 MTU with room to spare.
const MAX_PREFIXES: usize = 8;

/// The gateway: an Ethernet address, and the addresses that are to be found there.
///
/// # Guarantees
/// The Ethernet address is one that a station may have, each address is one that a host may have, and a gateway that
/// advertises itself as a router has a link-local address to do it from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gateway {
    mac: Mac,
    ipv4: Vec<Ipv4Addr>,
    ipv6: Vec<Ipv6Addr>,
    router: Option<Router>,
}

/// What router advertisements say (RFC 4861, section 4.2).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Router {
    /// For how many seconds the gateway is a default router; 0 means that it is none.
    pub lifetime: u16,
    /// Addresses are to be had by DHCPv6 (the M flag).
    pub managed: bool,
    /// Prefixes to make addresses from; none are on-link, as everything is behind the gateway.
    pub prefixes: Vec<Prefix>,
}

/// A prefix that hosts may make addresses from (SLAAC).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Prefix {
    address: Ipv6Addr,
    length: u8,
}

/// Not a gateway.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum GatewayError {
    /// No host may have the Ethernet address.
    #[error("{0} is no station's Ethernet address: it is a group's, or zero")]
    Mac(Mac),
    /// No host may have the address.
    #[error("{0} is no host's address: a unicast address other than loopback is needed")]
    Address(IpAddr),
    /// There is nothing to answer for.
    #[error("the gateway has no address: give at least one, IPv4 or IPv6")]
    NoAddress,
    /// Router advertisements come from a link-local address (RFC 4861, section 6.1.2).
    #[error(
        "router advertisements need a link-local gateway address, such as fe80::1, to come from"
    )]
    NoLinkLocal,
    /// More than fit.
    #[error("{0} prefixes are more than the {MAX_PREFIXES} that a router advertisement may carry")]
    Prefixes(usize),
}

/// Not a prefix.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error(
    "{0:?} is no IPv6 prefix: ADDRESS/LENGTH with nothing set behind the length is needed, as in 2001:db8:0:1::/64"
)]
pub struct PrefixError(String);

impl Gateway {
    /// The Ethernet address that ovn-kubernetes and Calico's kin have made customary: of no vendor, the same everywhere.
    pub const DEFAULT_MAC: Mac = pnet_base::MacAddr(0x0a, 0x58, 0xa9, 0xfe, 0x01, 0x01);
    /// The IPv4 address that goes with it.
    pub const DEFAULT_IPV4: Ipv4Addr = Ipv4Addr::new(169, 254, 1, 1);
    /// The IPv6 address that goes with it.
    pub const DEFAULT_IPV6: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);

    /// A gateway with at least one address.
    ///
    /// # Errors
    /// [`GatewayError`], which says what no gateway can have.
    pub fn new(
        mac: Mac,
        addresses: impl IntoIterator<Item = IpAddr>,
    ) -> Result<Self, GatewayError> {
        if mac.is_multicast() || mac.is_zero() {
            return Err(GatewayError::Mac(mac));
        }
        let (mut ipv4, mut ipv6) = (Vec::new(), Vec::new());
        for address in addresses {
            match address {
                IpAddr::V4(address) if is_host_v4(address) => ipv4.push(address),
                IpAddr::V6(address) if is_host_v6(address) => ipv6.push(address),
                _ => return Err(GatewayError::Address(address)),
            }
        }
        if ipv4.is_empty() && ipv6.is_empty() {
            return Err(GatewayError::NoAddress);
        }
        Ok(Self {
            mac,
            ipv4,
            ipv6,
            router: None,
        })
    }

    /// The same, which advertises itself as a router.
    ///
    /// # Errors
    /// [`GatewayError::NoLinkLocal`], [`GatewayError::Prefixes`].
    pub fn with_router(mut self, router: Router) -> Result<Self, GatewayError> {
        if self.link_local().is_none() {
            return Err(GatewayError::NoLinkLocal);
        }
        if router.prefixes.len() > MAX_PREFIXES {
            return Err(GatewayError::Prefixes(router.prefixes.len()));
        }
        self.router = Some(router);
        Ok(self)
    }

    /// Its Ethernet address.
    pub fn mac(&self) -> Mac {
        self.mac
    }

    /// Its IPv4 addresses.
    pub fn ipv4(&self) -> &[Ipv4Addr] {
        &self.ipv4
    }

    /// Its IPv6 addresses.
    pub fn ipv6(&self) -> &[Ipv6Addr] {
        &self.ipv6
    }

    /// What it advertises as a router, with the address that it does so from; none if it does not.
    pub fn router(&self) -> Option<(&Router, Ipv6Addr)> {
        self.router.as_ref().zip(self.link_local())
    }

    fn link_local(&self) -> Option<Ipv6Addr> {
        self.ipv6
            .iter()
            .copied()
            .find(Ipv6Addr::is_unicast_link_local)
    }
}

impl Default for Gateway {
    fn default() -> Self {
        Self {
            mac: Self::DEFAULT_MAC,
            ipv4: vec![Self::DEFAULT_IPV4],
            ipv6: vec![Self::DEFAULT_IPV6],
            router: None,
        }
    }
}

impl Prefix {
    /// Its address.
    pub fn address(self) -> Ipv6Addr {
        self.address
    }

    /// How many of its bits count.
    pub fn length(self) -> u8 {
        self.length
    }
}

impl FromStr for Prefix {
    type Err = PrefixError;

    fn from_str(text: &str) -> Result<Self, PrefixError> {
        let wrong = || PrefixError(text.to_owned());
        let (address, length) = text.split_once('/').ok_or_else(wrong)?;
        let address: Ipv6Addr = address.parse().map_err(|_| wrong())?;
        let length: u8 = length.parse().map_err(|_| wrong())?;
        let behind = match length {
            0..=127 => u128::MAX >> length,
            128 => 0,
            _ => return Err(wrong()),
        };
        if address.to_bits() & behind != 0 {
            return Err(wrong());
        }
        Ok(Self { address, length })
    }
}

impl fmt::Display for Prefix {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{}/{}", self.address, self.length)
    }
}

fn is_host_v4(address: Ipv4Addr) -> bool {
    !(address.is_unspecified()
        || address.is_loopback()
        || address.is_multicast()
        || address.is_broadcast())
}

fn is_host_v6(address: Ipv6Addr) -> bool {
    !(address.is_unspecified() || address.is_loopback() || address.is_multicast())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn router() -> Router {
        Router {
            lifetime: 1800,
            managed: false,
            prefixes: Vec::new(),
        }
    }

    #[test]
    fn the_default_is_what_new_would_make() {
        let addresses = [
            IpAddr::from(Gateway::DEFAULT_IPV4),
            Gateway::DEFAULT_IPV6.into(),
        ];
        assert_eq!(
            Gateway::new(Gateway::DEFAULT_MAC, addresses),
            Ok(Gateway::default())
        );
    }

    #[test]
    fn what_no_host_has_is_refused() {
        let mac = Gateway::DEFAULT_MAC;
        for address in ["0.0.0.0", "127.0.0.1", "224.0.0.1", "255.255.255.255"] {
            let address: IpAddr = address.parse().unwrap();
            assert_eq!(
                Gateway::new(mac, [address]),
                Err(GatewayError::Address(address))
            );
        }
        for address in ["::", "::1", "ff02::1"] {
            let address: IpAddr = address.parse().unwrap();
            assert_eq!(
                Gateway::new(mac, [address]),
                Err(GatewayError::Address(address))
            );
        }
        assert_eq!(Gateway::new(mac, []), Err(GatewayError::NoAddress));
        for mac in [
            "ff:ff:ff:ff:ff:ff",
            "00:00:00:00:00:00",
            "01:00:5e:00:00:01",
        ] {
            let mac = mac.parse().unwrap();
            let addresses = [IpAddr::from(Gateway::DEFAULT_IPV4)];
            assert_eq!(Gateway::new(mac, addresses), Err(GatewayError::Mac(mac)));
        }
    }

    #[test]
    fn a_router_needs_a_link_local_address() {
        let global = "2001:db8::1".parse::<IpAddr>().unwrap();
        let gateway = Gateway::new(Gateway::DEFAULT_MAC, [global]).unwrap();
        assert_eq!(
            gateway.clone().with_router(router()),
            Err(GatewayError::NoLinkLocal)
        );
        let both =
            Gateway::new(Gateway::DEFAULT_MAC, [global, Gateway::DEFAULT_IPV6.into()]).unwrap();
        let both = both.with_router(router()).unwrap();
        assert_eq!(
            both.router().map(|(_, from)| from),
            Some(Gateway::DEFAULT_IPV6)
        );
        assert_eq!(gateway.router(), None);
    }

    #[test]
    fn prefixes() {
        let prefix: Prefix = "2001:db8:0:1::/64".parse().unwrap();
        assert_eq!(
            (prefix.address(), prefix.length()),
            ("2001:db8:0:1::".parse().unwrap(), 64)
        );
        assert_eq!(prefix.to_string(), "2001:db8:0:1::/64");
        assert!("::/0".parse::<Prefix>().is_ok());
        assert!("2001:db8::1/128".parse::<Prefix>().is_ok());
        for wrong in [
            "",
            "2001:db8::",
            "2001:db8::/129",
            "2001:db8::1/64",
            "10.0.0.0/8",
            "2001:db8::/x",
        ] {
            assert!(wrong.parse::<Prefix>().is_err(), "{wrong:?}");
        }
    }
}
