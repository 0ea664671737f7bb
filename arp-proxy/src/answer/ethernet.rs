//! Ethernet and VLAN headers, with `pnet`.

use pnet_packet::ethernet::{EtherType, EtherTypes, EthernetPacket, MutableEthernetPacket};
use pnet_packet::vlan::{ClassOfService, MutableVlanPacket, VlanPacket};

use crate::Mac;

/// The customer's and the provider's tag, IEEE 802.1Q.
const CUSTOMER: u16 = 0x8100;
const PROVIDER: u16 = 0x88a8;
/// More tags than a frame has in practice mean something that is not for a gateway.
const MOST_TAGS: usize = 2;

/// A VLAN tag.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tag {
    /// The EtherType that introduces it: 0x8100, or 0x88a8 for a provider's.
    pub tpid: u16,
    /// Priority, drop eligibility and VLAN, as on the wire.
    pub tci: u16,
}

/// A frame taken apart.
#[derive(Clone, Copy, Debug)]
pub struct Frame<'a> {
    /// To whom.
    pub destination: Mac,
    /// From whom.
    pub source: Mac,
    /// From the outside in.
    pub tags: Tags,
    /// Behind the tags.
    pub ethertype: EtherType,
    /// Behind the tags, padding included.
    pub payload: &'a [u8],
}

/// The tags of a frame, from the outside in.
pub type Tags = [Option<Tag>; MOST_TAGS];

impl Tag {
    /// Of VLAN `id`, with no priority; none for what is no VLAN's id.
    pub fn vlan(id: u16) -> Option<Self> {
        matches!(id, 1..=4094).then_some(Self {
            tpid: CUSTOMER,
            tci: id,
        })
    }
}

impl<'a> Frame<'a> {
    /// Takes one apart as an interface received it: `bytes` from the Ethernet header on, and the tag that the kernel took
    /// off, if any.
    ///
    /// None if it ends within its headers, or has more than two tags.
    pub fn parse(bytes: &'a [u8], outer: Option<Tag>) -> Option<Self> {
        let header = EthernetPacket::new(bytes)?;
        let mut rest = bytes.get(EthernetPacket::minimum_packet_size()..)?;
        let mut ethertype = header.get_ethertype();
        let mut tags = [outer, None];
        while matches!(ethertype.0, CUSTOMER | PROVIDER) {
            let tag = VlanPacket::new(rest)?;
            let tci = u16::from(tag.get_priority_code_point().0) << 13
                | u16::from(tag.get_drop_eligible_indicator()) << 12
                | tag.get_vlan_identifier();
            let place = tags.iter_mut().find(|tag| tag.is_none())?;
            *place = Some(Tag {
                tpid: ethertype.0,
                tci,
            });
            ethertype = tag.get_ethertype();
            rest = rest.get(VlanPacket::minimum_packet_size()..)?;
        }
        Some(Self {
            destination: header.get_destination(),
            source: header.get_source(),
            tags,
            ethertype,
            payload: rest,
        })
    }

    pub(super) fn is_arp(&self) -> bool {
        self.ethertype == EtherTypes::Arp
    }

    pub(super) fn is_ipv6(&self) -> bool {
        self.ethertype == EtherTypes::Ipv6
    }

    /// Whether the gateway would take it if it were a station: interfaces show frames for others too.
    pub(super) fn is_for(&self, gateway: Mac) -> bool {
        self.destination == gateway || self.destination.is_multicast()
    }

    /// Whether its source is an address that a station may have.
    pub fn has_source(&self) -> bool {
        !self.source.is_multicast() && !self.source.is_zero()
    }
}

/// A frame from its parts.
pub(super) fn build(
    destination: Mac,
    source: Mac,
    tags: Tags,
    ethertype: EtherType,
    payload: &[u8],
) -> Vec<u8> {
    const HEADER: usize = EthernetPacket::minimum_packet_size();
    const TAG: usize = VlanPacket::minimum_packet_size();
    let tags: Vec<Tag> = tags.into_iter().flatten().collect();
    let mut bytes = vec![0; HEADER + TAG * tags.len()];
    // What follows the header and each tag: the next tag's type, in the end the payload's.
    let mut types = tags
        .iter()
        .map(|tag| EtherType(tag.tpid))
        .chain([ethertype]);
    if let Some(mut header) = MutableEthernetPacket::new(&mut bytes) {
        header.set_destination(destination);
        header.set_source(source);
        header.set_ethertype(types.next().unwrap_or(ethertype));
    }
    for (index, tag) in tags.iter().enumerate() {
        let place = bytes.get_mut(HEADER + TAG * index..).unwrap_or_default();
        if let Some(mut packet) = MutableVlanPacket::new(place) {
            let [high, _] = tag.tci.to_be_bytes();
            packet.set_priority_code_point(ClassOfService(high >> 5));
            packet.set_drop_eligible_indicator(high >> 4 & 1);
            packet.set_vlan_identifier(tag.tci & 0x0fff);
            packet.set_ethertype(types.next().unwrap_or(ethertype));
        }
    }
    bytes.extend_from_slice(payload);
    bytes
}
