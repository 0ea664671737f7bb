//! Telling a VM's neighbours where its addresses are now: gratuitous ARP (RFC 5227, section 3; RFC 5944, section 4.6) and
//! unsolicited neighbour advertisements (RFC 4861, section 7.2.6).
//!
//! Where neighbours are depends on how the VM is attached:
//! - A port of a switch's: its neighbours are behind the switch. A frame that this host sends on the port's interface
//!   goes the other way, into the VM. [`through_switch`] has the switch take the frames as if the VM had sent them.
//! - A VM that this host routes to: its neighbours are on the host's uplinks, and find the host's Ethernet address there.
//!   [`on_uplink`] tells them.

use std::io;
use std::net::IpAddr;

use arp_proxy::answer::host_announcements;
use arp_proxy::{GatewayError, HostError, Mac, announce_host};
use nix::ifaddrs::getifaddrs;
use thiserror::Error;

use crate::openflow::{self, PacketOuts};

/// Nothing, or not everything, was announced.
#[derive(Debug, Error)]
pub enum Error {
    /// No host has such addresses.
    #[error("cannot announce a VM at {mac}")]
    Host {
        /// Its Ethernet address.
        mac: Mac,
        /// What is wrong.
        source: GatewayError,
    },
    /// The switch cannot be given the frames.
    #[error(transparent)]
    Switch(#[from] openflow::Error),
    /// The uplink's Ethernet address is not to be had.
    #[error("cannot tell the Ethernet address of {interface}")]
    Interface {
        /// The uplink.
        interface: String,
        /// Why not.
        source: io::Error,
    },
    /// The uplink does not take the frames.
    #[error(transparent)]
    Uplink(#[from] HostError),
}

/// Adds to `packets` what a VM at `mac` would announce of its addresses on its port.
///
/// # Errors
/// [`Error::Host`], [`Error::Switch`]; then some may have been added.
pub fn through_switch(
    packets: &mut PacketOuts,
    port: u32,
    mac: Mac,
    addresses: &[IpAddr],
) -> Result<(), Error> {
    let frames =
        host_announcements(mac, addresses, None).map_err(|source| Error::Host { mac, source })?;
    for frame in frames {
        packets.push(port, frame)?;
    }
    Ok(())
}

/// Announces on an uplink that addresses are at this host.
///
/// # Errors
/// [`Error::Interface`], [`Error::Uplink`]; doing it again does no harm.
pub fn on_uplink(interface: &str, addresses: &[IpAddr]) -> Result<(), Error> {
    let mac = mac_of(interface).map_err(|source| Error::Interface {
        interface: interface.to_owned(),
        source,
    })?;
    Ok(announce_host(mac, addresses, interface, None)?)
}

fn mac_of(interface: &str) -> io::Result<Mac> {
    let addresses = getifaddrs()?.filter(|entry| entry.interface_name == interface);
    let macs = addresses.filter_map(|entry| entry.address?.as_link_addr()?.addr());
    macs.map(Mac::from)
        .next()
        .ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "no such Ethernet interface"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::openflow::rarp;

    const MAC: Mac = pnet_base::MacAddr(0x52, 0x54, 0, 1, 2, 3);

    #[test]
    fn announcements_go_behind_what_opens_the_port() {
        let mut packets = PacketOuts::opening([(7, MAC)]).unwrap();
        let addresses = ["10.0.0.1", "2001:db8::1"].map(|text| text.parse().unwrap());
        through_switch(&mut packets, 7, MAC, &addresses).unwrap();
        // A RARP, two gratuitous ARPs, an advertisement.
        assert_eq!(packets.len(), 4);
        let mut opening = PacketOuts::new();
        opening.push(7, rarp(MAC).to_vec()).unwrap();
        assert_eq!(opening, PacketOuts::opening([(7, MAC)]).unwrap());
    }

    #[test]
    fn what_is_wrong_is_named() {
        let mut packets = PacketOuts::new();
        let group = ["224.0.0.1".parse().unwrap()];
        let error = through_switch(&mut packets, 7, MAC, &group).unwrap_err();
        assert!(arp_proxy::chain(&error).contains("224.0.0.1"));
        let address = ["10.0.0.1".parse().unwrap()];
        let error = through_switch(&mut packets, 0, MAC, &address).unwrap_err();
        assert!(matches!(error, Error::Switch(openflow::Error::Port(0))));
        let error = on_uplink("no-such-interface", &address).unwrap_err();
        assert!(error.to_string().contains("no-such-interface"), "{error}");
        // Its address is no station's.
        let error = on_uplink("lo", &address).unwrap_err();
        assert!(
            matches!(error, Error::Uplink(HostError::Host(_))),
            "{error:?}"
        );
    }
}
