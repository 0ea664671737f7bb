//! Questions as others ask them, for tests: built with `etherparse` throughout, ARP too, so that what `pnet` reads was
//! not written by `pnet`.

use std::net::{Ipv4Addr, Ipv6Addr};

use etherparse::{
    ArpHardwareId, ArpOperation, ArpPacket, EtherType, Ethernet2Header, Icmpv6Type, Ipv6Header,
    ip_number,
};
use proptest::prelude::*;

use super::Tag;
use super::ndp::{ALL_NODES, ALL_ROUTERS, multicast_mac, solicited_node};
use crate::{Gateway, Mac, Router};

/// A question that is to be answered.
#[derive(Clone, Debug)]
pub(crate) struct Question {
    pub(crate) asker: Mac,
    pub(crate) asked: Asked,
    /// In the frame, not taken off by the kernel.
    pub(crate) tag: Option<Tag>,
    /// To the gateway's Ethernet address, as when an entry is verified.
    pub(crate) unicast: bool,
}

#[derive(Clone, Debug)]
pub(crate) enum Asked {
    Arp { sender: Ipv4Addr },
    Neighbour { source: Ipv6Addr, told: bool },
    Router { source: Ipv6Addr, told: bool },
}

/// The default one, that is a router too.
pub(crate) fn gateway() -> Gateway {
    let router = Router {
        lifetime: 1800,
        managed: false,
        prefixes: vec!["2001:db8:0:1::/64".parse().unwrap()],
    };
    Gateway::default().with_router(router).unwrap()
}

impl Question {
    pub(crate) fn frame(&self) -> Vec<u8> {
        let (group, ethertype, payload) = match self.asked {
            Asked::Arp { sender } => (
                Mac::broadcast(),
                EtherType::ARP,
                arp(
                    ArpOperation::REQUEST,
                    self.asker,
                    sender,
                    Gateway::DEFAULT_IPV4,
                ),
            ),
            Asked::Neighbour { source, told } => {
                let group = solicited_node(Gateway::DEFAULT_IPV6);
                let to = if self.unicast && !source.is_unspecified() {
                    Gateway::DEFAULT_IPV6
                } else {
                    group
                };
                let mut body = Gateway::DEFAULT_IPV6.octets().to_vec();
                body.extend(self.told(told));
                let packet = icmpv6(source, to, Icmpv6Type::NeighborSolicitation, &body);
                (multicast_mac(group), EtherType::IPV6, packet)
            }
            Asked::Router { source, told } => {
                let body = self.told(told);
                let packet = icmpv6(source, ALL_ROUTERS, Icmpv6Type::RouterSolicitation, &body);
                (multicast_mac(ALL_ROUTERS), EtherType::IPV6, packet)
            }
        };
        let destination = if self.unicast {
            Gateway::DEFAULT_MAC
        } else {
            group
        };
        frame(destination, self.asker, self.tag, ethertype, &payload)
    }

    fn told(&self, told: bool) -> Vec<u8> {
        let option = [&[1, 1][..], &self.asker.octets()].concat();
        if told { option } else { Vec::new() }
    }
}

pub(crate) fn frame(
    destination: Mac,
    source: Mac,
    tag: Option<Tag>,
    ether_type: EtherType,
    payload: &[u8],
) -> Vec<u8> {
    let header = Ethernet2Header {
        source: source.octets(),
        destination: destination.octets(),
        ether_type: tag.map_or(ether_type, |tag| EtherType(tag.tpid)),
    };
    let mut bytes = header.to_bytes().to_vec();
    if let Some(tag) = tag {
        bytes.extend(tag.tci.to_be_bytes());
        bytes.extend(ether_type.0.to_be_bytes());
    }
    bytes.extend(payload);
    bytes
}

/// Of a station, to all.
pub(crate) fn ethernet(ethertype: u16, payload: &[u8]) -> Vec<u8> {
    let source = pnet_base::MacAddr(2, 0, 0, 0, 0, 1);
    frame(
        Mac::broadcast(),
        source,
        None,
        EtherType(ethertype),
        payload,
    )
}

pub(crate) fn arp(
    operation: ArpOperation,
    mac: Mac,
    sender: Ipv4Addr,
    target: Ipv4Addr,
) -> Vec<u8> {
    let packet = ArpPacket::new(
        ArpHardwareId::ETHERNET,
        EtherType::IPV4,
        operation,
        &mac.octets(),
        &sender.octets(),
        &[0; 6],
        &target.octets(),
    );
    packet.unwrap().to_bytes().to_vec()
}

pub(crate) fn icmpv6(
    source: Ipv6Addr,
    destination: Ipv6Addr,
    kind: Icmpv6Type,
    body: &[u8],
) -> Vec<u8> {
    let (source, destination) = (source.octets(), destination.octets());
    let icmp = kind.to_header(source, destination, body).unwrap();
    let header = Ipv6Header {
        payload_length: u16::try_from(icmp.header_len() + body.len()).unwrap(),
        next_header: ip_number::IPV6_ICMP,
        hop_limit: 255,
        source,
        destination,
        ..Ipv6Header::default()
    };
    [&header.to_bytes()[..], &icmp.to_bytes(), body].concat()
}

/// Any station but the gateway.
pub(crate) fn station() -> impl Strategy<Value = Mac> {
    any::<[u8; 5]>().prop_map(|[a, b, c, d, e]| pnet_base::MacAddr(2, a, b, c, d, e))
}

pub(crate) fn tag() -> impl Strategy<Value = Option<Tag>> {
    prop::option::of(some_tag())
}

pub(crate) fn some_tag() -> impl Strategy<Value = Tag> {
    let tag = (prop::sample::select(vec![0x8100, 0x88a8]), any::<u16>());
    tag.prop_map(|(tpid, tci)| Tag { tpid, tci })
}

/// A host's address that is not the gateway's, or the unspecified one.
fn host_v6() -> impl Strategy<Value = Ipv6Addr> {
    let global =
        any::<u64>().prop_map(|host| Ipv6Addr::from_bits(0x2001_0db8 << 96 | u128::from(host)));
    let link_local =
        (2..u64::MAX).prop_map(|host| Ipv6Addr::from_bits(0xfe80 << 112 | u128::from(host)));
    prop_oneof![Just(Ipv6Addr::UNSPECIFIED), global, link_local]
}

fn asked() -> impl Strategy<Value = Asked> {
    let sender = prop_oneof![
        Just(Ipv4Addr::UNSPECIFIED),
        any::<[u8; 3]>().prop_map(|[b, c, d]| Ipv4Addr::new(10, b, c, d)),
    ];
    prop_oneof![
        sender.prop_map(|sender| Asked::Arp { sender }),
        (host_v6(), any::<bool>()).prop_map(|(source, told)| Asked::Neighbour {
            source,
            told: told && !source.is_unspecified(),
        }),
        (host_v6(), any::<bool>()).prop_map(|(source, told)| Asked::Router {
            source,
            told: told && !source.is_unspecified(),
        }),
    ]
}

/// A valid question for the gateway.
pub(crate) fn question() -> impl Strategy<Value = Question> {
    (station(), asked(), tag(), any::<bool>()).prop_map(|(asker, asked, tag, unicast)| Question {
        asker,
        asked,
        tag,
        unicast,
    })
}

/// What goes to all nodes because the asker has no address.
pub(crate) fn all_nodes() -> (Mac, Ipv6Addr) {
    (multicast_mac(ALL_NODES), ALL_NODES)
}
