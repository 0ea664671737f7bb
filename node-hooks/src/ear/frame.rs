//! Which frames announce where a machine is.

use std::net::Ipv6Addr;

use arp_proxy::Mac;
use arp_proxy::answer::{Frame, is_ethernet_ipv4, neighbour_advertised};
use pnet_packet::arp::{ArpOperation, ArpPacket};
use pnet_packet::ethernet::EtherTypes;

use super::Heard;

/// RARP's request (RFC 903); pnet knows ARP's operations only.
const REQUEST_REVERSE: ArpOperation = ArpOperation(3);
const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);

/// What a frame announces, and the stations that it names: those in it, which say more of what it is after than the one
/// that it comes from, first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Announcement {
    pub(super) heard: Heard,
    named: [Mac; 3],
}

impl Announcement {
    /// Of a frame as an interface received it. None if it is no announcement that others would heed, or in a VLAN.
    pub(super) fn of(frame: &Frame<'_>) -> Option<Self> {
        if frame.tags.iter().any(Option::is_some) || !frame.has_source() {
            return None;
        }
        let source = frame.source;
        let (heard, named) = match frame.ethertype {
            EtherTypes::Rarp => {
                let (sender, target) = reverse_request(frame.payload)?;
                (Heard::Rarp, [target, sender, source])
            }
            EtherTypes::Arp => {
                let owner = gratuitous(frame.payload)?;
                (Heard::Garp, [owner, owner, source])
            }
            EtherTypes::Ipv6 => {
                let owner = unsolicited(frame)?;
                (Heard::NeighbourAdvertisement, [owner, owner, source])
            }
            _ => return None,
        };
        Some(Self { heard, named })
    }

    /// The station that it names and that is not `mac`, if there is one.
    pub(super) fn other_than(&self, mac: Mac) -> Option<Mac> {
        self.named.into_iter().find(|&named| named != mac)
    }
}

/// The hardware addresses of a RARP request: who asks, and for whom. A machine that asks for itself announces itself.
fn reverse_request(payload: &[u8]) -> Option<(Mac, Mac)> {
    let packet = ArpPacket::new(payload)?;
    let request = is_ethernet_ipv4(&packet) && packet.get_operation() == REQUEST_REVERSE;
    request.then(|| (packet.get_sender_hw_addr(), packet.get_target_hw_addr()))
}

/// Whose address an ARP request or reply is about whose sender and target are the same (RFC 5227, section 3). A probe has
/// no sender's address.
fn gratuitous(payload: &[u8]) -> Option<Mac> {
    let packet = ArpPacket::new(payload)?;
    let address = packet.get_sender_proto_addr();
    let gratuitous = is_ethernet_ipv4(&packet)
        && matches!(packet.get_operation().0, 1 | 2)
        && address == packet.get_target_proto_addr()
        && !address.is_unspecified();
    gratuitous.then(|| packet.get_sender_hw_addr())
}

/// Where a neighbour advertisement says its address is, to all nodes and answering nobody (RFC 4861, section 7.2.6). One
/// that does not say it means where it comes from.
fn unsolicited(frame: &Frame<'_>) -> Option<Mac> {
    let advertisement = neighbour_advertised(frame).ok()?;
    let unsolicited = !advertisement.solicited && advertisement.destination == ALL_NODES;
    unsolicited.then(|| advertisement.link_layer_address.unwrap_or(frame.source))
}
