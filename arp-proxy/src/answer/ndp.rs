//! Neighbour discovery (RFC 4861), with `etherparse`: `pnet` panics on an option of 32 units or more.

use std::net::Ipv6Addr;

use etherparse::checksum::Sum16BitWords;
use etherparse::icmpv6::{
    NdpOptionHeader, NdpOptionType, NeighborAdvertisementHeader, NeighborAdvertisementPayload,
    PrefixInformation, RouterAdvertisementHeader, RouterAdvertisementPayload,
    TYPE_NEIGHBOR_ADVERTISEMENT, TYPE_NEIGHBOR_SOLICITATION, TYPE_ROUTER_SOLICITATION,
};
use etherparse::{Icmpv6Header, Icmpv6Slice, Icmpv6Type, Ipv6Header, Ipv6HeaderSlice, ip_number};

use super::ethernet::Frame;
use super::{Ignored, Kind, Malformed};
use crate::gateway::{Prefix, Router};
use crate::{Gateway, Mac};

pub(super) const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
pub(super) const ALL_ROUTERS: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 2);
/// The hop limit that proves that no router was on the way.
const FROM_THE_LINK: u8 = 255;
/// What hosts are to use as the hop limit of what they send, IANA's recommendation.
const HOP_LIMIT: u8 = 64;
/// A solicited-node address has the last 24 bits of the address behind ff02::1:ff00:0/104.
const SOLICITED_NODE: u128 = 0xff02_0000_0000_0000_0000_0001_ff00_0000;
const SOLICITED_NODE_SUFFIX: u128 = 0x00ff_ffff;
/// Hosts keep a prefix for as long as its router, or somewhat longer, without being told again.
const PREFIX_LIFETIME: u32 = 86_400;
/// In the flags of a neighbour advertisement, of which R is the first.
const SOLICITED: u8 = 0x40;

/// A question or a claim, past the rules that all of them share.
struct Message<'a> {
    source: Ipv6Addr,
    destination: Ipv6Addr,
    /// As in the ICMPv6 header.
    kind: u8,
    /// Behind its checksum: flags, in an advertisement.
    flags: u8,
    /// Behind the ICMPv6 header's eight bytes.
    body: &'a [u8],
}

/// What a neighbour advertisement says (RFC 4861, section 4.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NeighbourAdvertisement {
    /// The address that somebody has.
    pub target: Ipv6Addr,
    /// Whom it tells.
    pub destination: Ipv6Addr,
    /// It answers a solicitation.
    pub solicited: bool,
    /// Where it says the address is; where it does not, nothing but its Ethernet source does.
    pub link_layer_address: Option<Mac>,
}

/// The neighbour advertisement in a frame.
///
/// # Errors
/// Why there is none that a host would heed (RFC 4861, section 7.1.2).
pub fn neighbour_advertised(frame: &Frame<'_>) -> Result<NeighbourAdvertisement, Ignored> {
    if !frame.is_ipv6() {
        return Err(Ignored::NoQuestion);
    }
    let message = parse(frame)?;
    if message.kind != TYPE_NEIGHBOR_ADVERTISEMENT {
        return Err(Ignored::NoQuestion);
    }
    let (target, options) = target(&message)?;
    let solicited = message.flags & SOLICITED != 0;
    if solicited && message.destination.is_multicast() {
        return Err(Malformed::Target.into());
    }
    let told = find_option(options, NdpOptionType::TARGET_LINK_LAYER_ADDRESS)?;
    // The option's two bytes of header; what follows an Ethernet address in a longer one means nothing.
    let address = told.and_then(|option| option.get(2..)?.first_chunk::<6>());
    Ok(NeighbourAdvertisement {
        target,
        destination: message.destination,
        solicited,
        link_layer_address: address.map(|&address| Mac::from(address)),
    })
}

/// What is asked, where the answer goes, and the IPv6 packet in it.
pub(super) fn answer(
    gateway: &Gateway,
    frame: &Frame<'_>,
) -> Result<(Kind, Mac, Vec<u8>), Ignored> {
    let message = parse(frame)?;
    match message.kind {
        TYPE_NEIGHBOR_SOLICITATION => neighbour(gateway, frame, &message),
        TYPE_ROUTER_SOLICITATION => router(gateway, frame, &message),
        TYPE_NEIGHBOR_ADVERTISEMENT => Err(claim(gateway, &message)),
        _ => Err(Ignored::NoQuestion),
    }
}

/// The address whose low 24 bits `address` shares, to which questions about it go.
pub(super) fn solicited_node(address: Ipv6Addr) -> Ipv6Addr {
    Ipv6Addr::from_bits(SOLICITED_NODE | address.to_bits() & SOLICITED_NODE_SUFFIX)
}

/// The Ethernet address of an IPv6 multicast address (RFC 2464, section 7).
pub(super) fn multicast_mac(address: Ipv6Addr) -> Mac {
    let [.., a, b, c, d] = address.octets();
    pnet_base::MacAddr(0x33, 0x33, a, b, c, d)
}

/// The checks of RFC 4861, sections 6.1.1 and 7.1.1, that all messages share.
fn parse<'a>(frame: &Frame<'a>) -> Result<Message<'a>, Ignored> {
    let header = Ipv6HeaderSlice::from_slice(frame.payload).map_err(|error| match error {
        etherparse::err::ipv6::HeaderSliceError::Len(_) => Malformed::Length,
        etherparse::err::ipv6::HeaderSliceError::Content(_) => Malformed::Format,
    })?;
    if header.next_header() != ip_number::IPV6_ICMP {
        return Err(Ignored::NoQuestion);
    }
    // Short frames come with padding: the header says where the packet ends.
    let length = usize::from(header.payload_length());
    let payload = frame.payload.get(Ipv6Header::LEN..);
    let bytes = payload
        .and_then(|payload| payload.get(..length))
        .ok_or(Malformed::Length)?;
    let icmp = Icmpv6Slice::from_slice(bytes).map_err(|_| Malformed::Length)?;
    if !matches!(
        icmp.type_u8(),
        TYPE_ROUTER_SOLICITATION | TYPE_NEIGHBOR_SOLICITATION | TYPE_NEIGHBOR_ADVERTISEMENT
    ) {
        return Err(Ignored::NoQuestion);
    }
    if header.hop_limit() != FROM_THE_LINK {
        return Err(Malformed::HopLimit.into());
    }
    if !icmp.is_checksum_valid(header.source(), header.destination()) {
        return Err(Malformed::Checksum.into());
    }
    if icmp.code_u8() != 0 {
        return Err(Malformed::Code.into());
    }
    if !frame.has_source() || header.source_addr().is_multicast() {
        return Err(Malformed::Sender.into());
    }
    Ok(Message {
        source: header.source_addr(),
        destination: header.destination_addr(),
        kind: icmp.type_u8(),
        flags: icmp.bytes5to8()[0],
        body: icmp.payload(),
    })
}

fn neighbour(
    gateway: &Gateway,
    frame: &Frame<'_>,
    message: &Message<'_>,
) -> Result<(Kind, Mac, Vec<u8>), Ignored> {
    let (target, options) = target(message)?;
    let told = tells_link_layer_address(options)?;
    let unspecified = message.source.is_unspecified();
    // Duplicate address detection, which goes to the solicited-node address and tells nothing (section 7.1.1).
    if unspecified && (told || message.destination != solicited_node(target)) {
        return Err(Malformed::Unspecified.into());
    }
    if gateway.ipv6().contains(&message.source) {
        return Err(Ignored::Conflict);
    }
    if !gateway.ipv6().contains(&target) {
        return Err(Ignored::OtherAddress);
    }
    if !frame.is_for(gateway.mac()) {
        return Err(Ignored::OtherStation);
    }
    let (mac, to) = recipient(frame, message);
    // With the override flag: the gateway owns the address, it does not stand in for another host's.
    let flags = NeighborAdvertisementHeader {
        router: true,
        solicited: !unspecified,
        r#override: true,
    };
    let payload = neighbour_advertisement(gateway.mac(), target, to, flags);
    Ok((Kind::NeighbourSolicitation, mac, payload))
}

fn router(
    gateway: &Gateway,
    frame: &Frame<'_>,
    message: &Message<'_>,
) -> Result<(Kind, Mac, Vec<u8>), Ignored> {
    let told = tells_link_layer_address(message.body)?;
    if message.source.is_unspecified() && told {
        return Err(Malformed::Unspecified.into());
    }
    if gateway.ipv6().contains(&message.source) {
        return Err(Ignored::Conflict);
    }
    let (router, from) = gateway.router().ok_or(Ignored::NotARouter)?;
    if !frame.is_for(gateway.mac()) {
        return Err(Ignored::OtherStation);
    }
    let (mac, to) = recipient(frame, message);
    let payload = router_advertisement(gateway.mac(), router, from, to);
    Ok((Kind::RouterSolicitation, mac, payload))
}

/// A neighbour advertisement of the gateway's address by another station.
fn claim(gateway: &Gateway, message: &Message<'_>) -> Ignored {
    match target(message) {
        Ok((target, _)) if gateway.ipv6().contains(&target) => Ignored::Conflict,
        Ok(_) => Ignored::NoQuestion,
        Err(wrong) => wrong.into(),
    }
}

/// An asker without an address is reached where all nodes are (RFC 4861, section 7.2.4).
fn recipient(frame: &Frame<'_>, message: &Message<'_>) -> (Mac, Ipv6Addr) {
    if message.source.is_unspecified() {
        (multicast_mac(ALL_NODES), ALL_NODES)
    } else {
        (frame.source, message.source)
    }
}

fn target<'a>(message: &Message<'a>) -> Result<(Ipv6Addr, &'a [u8]), Malformed> {
    let (target, options) = message
        .body
        .split_first_chunk::<16>()
        .ok_or(Malformed::Length)?;
    let target = Ipv6Addr::from(*target);
    if target.is_multicast() {
        return Err(Malformed::Target);
    }
    Ok((target, options))
}

/// Whether a source link-layer address is among the options.
fn tells_link_layer_address(options: &[u8]) -> Result<bool, Malformed> {
    let found = find_option(options, NdpOptionType::SOURCE_LINK_LAYER_ADDRESS)?;
    Ok(found.is_some())
}

/// The first option of a type, its header included. All of them must have a length and fit.
///
/// Not `NdpOptionsIterator`, which gives up at an option whose length is not what its type wants, where RFC 4861 says
/// to ignore the contents of options that mean nothing in a solicitation.
fn find_option(mut options: &[u8], wanted: NdpOptionType) -> Result<Option<&[u8]>, Malformed> {
    let mut found = None;
    while !options.is_empty() {
        let (header, _) = NdpOptionHeader::from_slice(options).map_err(|_| Malformed::Options)?;
        if header.length_units == 0 {
            return Err(Malformed::Options);
        }
        let (option, rest) = options
            .split_at_checked(header.byte_len())
            .ok_or(Malformed::Options)?;
        if header.option_type == wanted {
            found = found.or(Some(option));
        }
        options = rest;
    }
    Ok(found)
}

pub(super) fn neighbour_advertisement(
    mac: Mac,
    target: Ipv6Addr,
    to: Ipv6Addr,
    flags: NeighborAdvertisementHeader,
) -> Vec<u8> {
    let payload = NeighborAdvertisementPayload {
        target_address: target,
    };
    let mut body = payload.to_bytes().to_vec();
    body.extend(link_layer_address(
        NdpOptionType::TARGET_LINK_LAYER_ADDRESS,
        mac,
    ));
    packet(target, to, Icmpv6Type::NeighborAdvertisement(flags), &body)
}

pub(super) fn router_advertisement(
    mac: Mac,
    router: &Router,
    from: Ipv6Addr,
    to: Ipv6Addr,
) -> Vec<u8> {
    let header = RouterAdvertisementHeader {
        cur_hop_limit: HOP_LIMIT,
        managed_address_config: router.managed,
        other_config: router.managed,
        router_lifetime: router.lifetime,
    };
    // 0: no opinion.
    let payload = RouterAdvertisementPayload {
        reachable_time: 0,
        retrans_timer: 0,
    };
    let mut body = payload.to_bytes().to_vec();
    body.extend(link_layer_address(
        NdpOptionType::SOURCE_LINK_LAYER_ADDRESS,
        mac,
    ));
    for prefix in &router.prefixes {
        body.extend(prefix_information(*prefix).to_bytes());
    }
    packet(from, to, Icmpv6Type::RouterAdvertisement(header), &body)
}

fn prefix_information(prefix: Prefix) -> PrefixInformation {
    PrefixInformation {
        prefix_length: prefix.length(),
        on_link: false,
        autonomous_address_configuration: true,
        valid_lifetime: PREFIX_LIFETIME,
        preferred_lifetime: PREFIX_LIFETIME,
        prefix: prefix.address().octets(),
    }
}

fn link_layer_address(option_type: NdpOptionType, mac: Mac) -> impl Iterator<Item = u8> {
    let header = NdpOptionHeader {
        option_type,
        length_units: 1,
    };
    header.to_bytes().into_iter().chain(mac.octets())
}

fn packet(source: Ipv6Addr, destination: Ipv6Addr, kind: Icmpv6Type, body: &[u8]) -> Vec<u8> {
    let icmp = Icmpv6Header::new(kind);
    let length = icmp.header_len() + body.len();
    // A few hundred bytes at most: a gateway has few prefixes.
    let length = u16::try_from(length).unwrap_or(u16::MAX);
    let header = Ipv6Header {
        payload_length: length,
        next_header: ip_number::IPV6_ICMP,
        hop_limit: FROM_THE_LINK,
        source: source.octets(),
        destination: destination.octets(),
        ..Ipv6Header::default()
    };
    let checksum = Sum16BitWords::new()
        .add_16bytes(header.source)
        .add_16bytes(header.destination)
        .add_4bytes(u32::from(length).to_be_bytes())
        .add_2bytes([0, ip_number::IPV6_ICMP.0])
        .add_slice(&icmp.to_bytes())
        .add_slice(body)
        .ones_complement()
        .to_be();
    let mut bytes = header.to_bytes().to_vec();
    bytes.extend_from_slice(&Icmpv6Header { checksum, ..icmp }.to_bytes());
    bytes.extend_from_slice(body);
    bytes
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::super::samples::{ethernet, icmpv6};
    use super::*;

    const GUEST: Mac = pnet_base::MacAddr(0x0a, 0x58, 0x0a, 0x80, 0x01, 0x0a);
    const GUEST_V6: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0xa);
    const V6: Ipv6Addr = Gateway::DEFAULT_IPV6;

    /// A neighbour advertisement with anything in it.
    fn advertised(flags: [bool; 2], to: Ipv6Addr, target: Ipv6Addr, options: &[u8]) -> Vec<u8> {
        let [solicited, r#override] = flags;
        let header = NeighborAdvertisementHeader {
            router: false,
            solicited,
            r#override,
        };
        let body = [&target.octets()[..], options].concat();
        let packet = icmpv6(
            GUEST_V6,
            to,
            Icmpv6Type::NeighborAdvertisement(header),
            &body,
        );
        ethernet(0x86dd, &packet)
    }

    #[rstest]
    #[case(&[], Ok(None))]
    #[case(&[2, 1, 10, 88, 10, 128, 1, 10], Ok(Some(GUEST)))]
    // Longer than an Ethernet address needs, and behind an option that means nothing here.
    #[case(&[1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 10, 88, 10, 128, 1, 10, 0, 0, 0, 0, 0, 0, 0, 0], Ok(Some(GUEST)))]
    #[case(&[2, 0, 10, 88, 10, 128, 1, 10], Err(Malformed::Options))]
    #[case(&[2, 2, 10, 88, 10, 128, 1, 10], Err(Malformed::Options))]
    fn what_a_neighbour_advertisement_tells(
        #[case] options: &[u8],
        #[case] expected: Result<Option<Mac>, Malformed>,
    ) {
        for solicited in [false, true] {
            let bytes = advertised([solicited, true], GUEST_V6, V6, options);
            let told = neighbour_advertised(&Frame::parse(&bytes, None).unwrap());
            let expected = expected.map(|link_layer_address| NeighbourAdvertisement {
                target: V6,
                destination: GUEST_V6,
                solicited,
                link_layer_address,
            });
            assert_eq!(told, expected.map_err(Ignored::Malformed));
        }
    }

    #[test]
    fn advertisements_that_break_a_rule_are_discarded() {
        let told = |bytes: &[u8]| neighbour_advertised(&Frame::parse(bytes, None).unwrap());
        let unsolicited = advertised([false, true], ALL_NODES, V6, &[]);
        assert!(told(&unsolicited).is_ok());
        let answer_to_all = advertised([true, true], ALL_NODES, V6, &[]);
        assert_eq!(told(&answer_to_all), Err(Malformed::Target.into()));
        let group = advertised([false, true], ALL_NODES, ALL_NODES, &[]);
        assert_eq!(told(&group), Err(Malformed::Target.into()));
        let mut routed = unsolicited.clone();
        routed[14 + 7] = 64;
        assert_eq!(told(&routed), Err(Malformed::HopLimit.into()));
        for other in [
            ethernet(
                0x86dd,
                &icmpv6(GUEST_V6, V6, Icmpv6Type::NeighborSolicitation, &V6.octets()),
            ),
            ethernet(0x0806, &[0; 28]),
        ] {
            assert_eq!(told(&other), Err(Ignored::NoQuestion));
        }
    }
}
