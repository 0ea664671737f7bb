//! ARP (RFC 826), with `pnet`.

use std::net::Ipv4Addr;

use pnet_packet::arp::{
    ArpHardwareTypes, ArpOperation, ArpOperations, ArpPacket, MutableArpPacket,
};
use pnet_packet::ethernet::EtherTypes;

use super::ethernet::Frame;
use super::{Ignored, Malformed};
use crate::{Gateway, Mac};

/// One of the two ends that an ARP packet speaks of.
#[derive(Clone, Copy)]
pub(super) struct End {
    pub(super) mac: Mac,
    pub(super) address: Ipv4Addr,
}

/// Where the answer goes, and the ARP packet in it.
///
/// Unicast, as every host answers, and not broadcast as RFC 3927 asks of link-local addresses: 169.254.1.1 is
/// configured here, not chosen at random, and the others on the link have no use for an answer that is not theirs.
pub(super) fn answer(gateway: &Gateway, frame: &Frame<'_>) -> Result<(Mac, Vec<u8>), Ignored> {
    let arp = ArpPacket::new(frame.payload).ok_or(Malformed::Length)?;
    let sender = End {
        mac: arp.get_sender_hw_addr(),
        address: arp.get_sender_proto_addr(),
    };
    if !is_ethernet_ipv4(&arp) {
        return Err(Malformed::Format.into());
    }
    if sender.mac == gateway.mac() {
        return Err(Ignored::Own);
    }
    if !frame.has_source() || sender.mac.is_multicast() || sender.mac.is_zero() {
        return Err(Malformed::Sender.into());
    }
    // Any ARP packet with the address as its sender's is a claim to it (RFC 5227, section 2.4).
    if gateway.ipv4().contains(&sender.address) {
        return Err(Ignored::Conflict);
    }
    if arp.get_operation() != ArpOperations::Request {
        return Err(Ignored::NoQuestion);
    }
    let target = arp.get_target_proto_addr();
    if !gateway.ipv4().contains(&target) {
        return Err(Ignored::OtherAddress);
    }
    if !frame.is_for(gateway.mac()) {
        return Err(Ignored::OtherStation);
    }
    let owner = End {
        mac: gateway.mac(),
        address: target,
    };
    // A probe, from 0.0.0.0, is answered like any request: the address is taken (RFC 5227, section 2.1.1).
    Ok((frame.source, build(ArpOperations::Reply, owner, sender)))
}

pub(super) fn build(operation: ArpOperation, sender: End, target: End) -> Vec<u8> {
    let mut bytes = vec![0; ArpPacket::minimum_packet_size()];
    if let Some(mut arp) = MutableArpPacket::new(&mut bytes) {
        arp.set_hardware_type(ArpHardwareTypes::Ethernet);
        arp.set_protocol_type(EtherTypes::Ipv4);
        arp.set_hw_addr_len(6);
        arp.set_proto_addr_len(4);
        arp.set_operation(operation);
        arp.set_sender_hw_addr(sender.mac);
        arp.set_sender_proto_addr(sender.address);
        arp.set_target_hw_addr(target.mac);
        arp.set_target_proto_addr(target.address);
    }
    bytes
}

/// Whether an ARP or RARP packet is about Ethernet and IPv4.
///
/// `pnet` reads the addresses where these have them, whatever the packet says.
pub fn is_ethernet_ipv4(arp: &ArpPacket<'_>) -> bool {
    arp.get_hardware_type() == ArpHardwareTypes::Ethernet
        && arp.get_protocol_type() == EtherTypes::Ipv4
        && arp.get_hw_addr_len() == 6
        && arp.get_proto_addr_len() == 4
}
