//! What nobody asked for: telling a link where the gateway is, or a host.

use std::net::IpAddr;

use etherparse::icmpv6::NeighborAdvertisementHeader;
use pnet_packet::arp::ArpOperations;
use pnet_packet::ethernet::EtherTypes;

use super::arp::{self, End};
use super::ndp::{self, ALL_NODES};
use super::{Tag, ethernet};
use crate::{Gateway, GatewayError, Mac};

/// Frames that put the gateway into every neighbour table that has an entry for it.
///
/// For each IPv4 address a gratuitous ARP request and a gratuitous ARP reply, as some systems heed only one of the two
/// (RFC 5227, section 3); for each IPv6 address an unsolicited neighbour advertisement with the override flag (RFC
/// 4861, section 7.2.6).
pub fn announcements(gateway: &Gateway, tag: Option<Tag>) -> Vec<Vec<u8>> {
    of_station(gateway, true, tag)
}

/// The same for a host, which is no router: where `addresses` are, whoever sends it.
///
/// # Errors
/// [`GatewayError`] for what no host can have.
pub fn host_announcements(
    mac: Mac,
    addresses: &[IpAddr],
    tag: Option<Tag>,
) -> Result<Vec<Vec<u8>>, GatewayError> {
    if addresses.is_empty() {
        return Ok(Vec::new());
    }
    // What addresses a gateway may have a host may have.
    let station = Gateway::new(mac, addresses.iter().copied())?;
    Ok(of_station(&station, false, tag))
}

fn of_station(station: &Gateway, router: bool, tag: Option<Tag>) -> Vec<Vec<u8>> {
    let mac = station.mac();
    let tags = [tag, None];
    let gratuitous = station.ipv4().iter().flat_map(|&address| {
        let owner = End { mac, address };
        // The target's Ethernet address means nothing in a request, and is the owner's own in an answer to itself.
        let nobody = End {
            mac: Mac::zero(),
            address,
        };
        [
            arp::build(ArpOperations::Request, owner, nobody),
            arp::build(ArpOperations::Reply, owner, owner),
        ]
    });
    let gratuitous =
        gratuitous.map(|arp| ethernet::build(Mac::broadcast(), mac, tags, EtherTypes::Arp, &arp));
    let unsolicited = station.ipv6().iter().map(|&address| {
        let flags = NeighborAdvertisementHeader {
            router,
            solicited: false,
            r#override: true,
        };
        let advertisement = ndp::neighbour_advertisement(mac, address, ALL_NODES, flags);
        to_all_nodes(mac, tag, &advertisement)
    });
    gratuitous.chain(unsolicited).collect()
}

/// A router advertisement to all nodes; none if the gateway does not advertise itself.
pub fn advertisement(gateway: &Gateway) -> Option<Vec<u8>> {
    let (router, from) = gateway.router()?;
    let packet = ndp::router_advertisement(gateway.mac(), router, from, ALL_NODES);
    Some(to_all_nodes(gateway.mac(), None, &packet))
}

fn to_all_nodes(mac: Mac, tag: Option<Tag>, packet: &[u8]) -> Vec<u8> {
    let destination = ndp::multicast_mac(ALL_NODES);
    ethernet::build(destination, mac, [tag, None], EtherTypes::Ipv6, packet)
}

/// The groups that questions for the gateway go to, which a station's hardware must be told to let in.
pub(crate) fn groups(gateway: &Gateway) -> Vec<Mac> {
    let solicited = gateway
        .ipv6()
        .iter()
        .map(|&address| ndp::solicited_node(address));
    let routers = gateway.router().map(|_| ndp::ALL_ROUTERS);
    let mut groups: Vec<Mac> = solicited.chain(routers).map(ndp::multicast_mac).collect();
    groups.sort_unstable();
    groups.dedup();
    groups
}
