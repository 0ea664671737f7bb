//! Everything that is built with one library is read with the other.

use std::net::{Ipv4Addr, Ipv6Addr};

use etherparse::icmpv6::{Icmpv6PayloadSlice, NdpOptionSlice, NeighborAdvertisementPayloadSlice};
use etherparse::{
    ArpOperation, ArpPacketSlice, EtherType, Icmpv6Slice, Icmpv6Type, Ipv6HeaderSlice, NetSlice,
    SlicedPacket, TransportSlice, ip_number,
};
use pnet_packet::Packet;
use pnet_packet::arp::{ArpOperations, ArpPacket};
use pnet_packet::icmpv6::ndp::{NdpOptionTypes, NeighborAdvertPacket, RouterAdvertPacket};
use pnet_packet::icmpv6::{Icmpv6Packet, Icmpv6Types, checksum};
use pnet_packet::ipv6::Ipv6Packet;
use proptest::prelude::*;
use rstest::rstest;

use super::samples::{self, Asked, Question, arp, gateway, icmpv6};
use super::*;
use crate::GatewayError;

const GUEST: Mac = pnet_base::MacAddr(0x0a, 0x58, 0x0a, 0x80, 0x01, 0x0a);
const MAC: Mac = Gateway::DEFAULT_MAC;
const V4: Ipv4Addr = Gateway::DEFAULT_IPV4;
const V6: Ipv6Addr = Gateway::DEFAULT_IPV6;
const GUEST_V4: Ipv4Addr = Ipv4Addr::new(10, 128, 1, 10);
const GUEST_V6: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0xa);
const HEADER: usize = 14;
const TAG: usize = 4;

fn question(asked: Asked) -> Question {
    Question {
        asker: GUEST,
        asked,
        tag: None,
        unicast: false,
    }
}

fn neighbour(source: Ipv6Addr) -> Question {
    question(Asked::Neighbour {
        source,
        told: false,
    })
}

fn answered(frame: &[u8]) -> Answer {
    decide(&gateway(), frame, None).unwrap()
}

fn ignored(frame: &[u8]) -> Ignored {
    decide(&gateway(), frame, None).unwrap_err()
}

fn broadcast(ethertype: EtherType, payload: &[u8]) -> Vec<u8> {
    samples::frame(Mac::broadcast(), GUEST, None, ethertype, payload)
}

/// A neighbour solicitation with anything in it.
fn solicitation(source: Ipv6Addr, to: Ipv6Addr, target: Ipv6Addr, options: &[u8]) -> Vec<u8> {
    let body = [&target.octets()[..], options].concat();
    let packet = icmpv6(source, to, Icmpv6Type::NeighborSolicitation, &body);
    let (group, _) = samples::all_nodes();
    samples::frame(group, GUEST, None, EtherType::IPV6, &packet)
}

/// The IPv6 packet of an answer without tags, and the ICMPv6 message in it, checked by `pnet`.
fn icmpv6_by_pnet(frame: &[u8]) -> (Ipv6Packet<'_>, Vec<u8>) {
    let packet = Ipv6Packet::new(&frame[HEADER..]).unwrap();
    let message = packet.payload().to_vec();
    let icmp = Icmpv6Packet::new(&message).unwrap();
    assert_eq!(packet.get_version(), 6);
    assert_eq!(usize::from(packet.get_payload_length()), message.len());
    assert_eq!(packet.get_hop_limit(), 255);
    let expected = checksum(&icmp, &packet.get_source(), &packet.get_destination());
    assert_eq!(icmp.get_checksum(), expected);
    (packet, message)
}

#[test]
fn an_arp_request_gets_a_unicast_reply() {
    let answer = answered(&question(Asked::Arp { sender: GUEST_V4 }).frame());
    assert_eq!((answer.kind, answer.asker), (Kind::Arp, GUEST));
    let parsed = SlicedPacket::from_ethernet(&answer.frame).unwrap();
    let header = parsed.link.unwrap().to_header().unwrap();
    assert_eq!(
        header.clone().ethernet2().unwrap().destination,
        GUEST.octets()
    );
    assert_eq!(header.ethernet2().unwrap().source, MAC.octets());
    let Some(NetSlice::Arp(arp)) = parsed.net else {
        panic!("{answer:?}")
    };
    assert_eq!(arp.operation(), ArpOperation::REPLY);
    assert_eq!(arp.sender_hw_addr(), MAC.octets());
    assert_eq!(arp.sender_protocol_addr(), V4.octets());
    assert_eq!(arp.target_hw_addr(), GUEST.octets());
    assert_eq!(arp.target_protocol_addr(), GUEST_V4.octets());
}

/// RFC 5227, section 2.1.1: the address is in use, and who probes for it must learn so.
#[test]
fn an_arp_probe_is_answered() {
    let sender = Ipv4Addr::UNSPECIFIED;
    let answer = answered(&question(Asked::Arp { sender }).frame());
    let reply = ArpPacket::new(&answer.frame[HEADER..]).unwrap();
    assert_eq!(reply.get_operation(), ArpOperations::Reply);
    assert_eq!(reply.get_sender_proto_addr(), V4);
    assert_eq!(reply.get_target_proto_addr(), sender);
}

#[rstest]
#[case::gratuitous_request(ArpOperation::REQUEST, V4, V4)]
#[case::gratuitous_reply(ArpOperation::REPLY, V4, V4)]
#[case::as_the_sender_of_a_request(ArpOperation::REQUEST, V4, GUEST_V4)]
#[case::reply_to_another(ArpOperation::REPLY, V4, GUEST_V4)]
fn a_claim_by_arp_is_a_conflict(
    #[case] operation: ArpOperation,
    #[case] sender: Ipv4Addr,
    #[case] target: Ipv4Addr,
) {
    let claim = broadcast(EtherType::ARP, &arp(operation, GUEST, sender, target));
    assert_eq!(ignored(&claim), Ignored::Conflict);
}

#[rstest]
#[case::own_frame(MAC, arp(ArpOperation::REQUEST, MAC, GUEST_V4, V4), Ignored::Own)]
#[case::own_address_in_it(GUEST, arp(ArpOperation::REQUEST, MAC, V4, V4), Ignored::Own)]
#[case::for_another(
    GUEST,
    arp(ArpOperation::REQUEST, GUEST, GUEST_V4, Ipv4Addr::new(169, 254, 1, 2)),
    Ignored::OtherAddress
)]
#[case::reply(
    GUEST,
    arp(ArpOperation::REPLY, GUEST, GUEST_V4, V4),
    Ignored::NoQuestion
)]
#[case::from_a_group(
    GUEST,
    arp(ArpOperation::REQUEST, Mac::broadcast(), GUEST_V4, V4),
    Ignored::Malformed(Malformed::Sender)
)]
#[case::from_a_group_by_ethernet(
    Mac::broadcast(),
    arp(ArpOperation::REQUEST, GUEST, GUEST_V4, V4),
    Ignored::Malformed(Malformed::Sender)
)]
#[case::short(GUEST, arp(ArpOperation::REQUEST, GUEST, GUEST_V4, V4)[..27].to_vec(), Ignored::Malformed(Malformed::Length))]
fn arp_that_is_not_answered(
    #[case] source: Mac,
    #[case] payload: Vec<u8>,
    #[case] reason: Ignored,
) {
    let frame = samples::frame(Mac::broadcast(), source, None, EtherType::ARP, &payload);
    assert_eq!(ignored(&frame), reason);
}

#[rstest]
#[case::hardware_type(0, 0)]
#[case::protocol_type(2, 0x86)]
#[case::hardware_length(4, 8)]
#[case::protocol_length(5, 16)]
fn arp_of_other_addresses_is_malformed(#[case] at: usize, #[case] byte: u8) {
    let mut frame = question(Asked::Arp { sender: GUEST_V4 }).frame();
    frame[HEADER + at] = byte;
    // The hardware type's low byte, so that it is not Ethernet's.
    frame[HEADER + 1] ^= u8::from(at == 0);
    assert_eq!(ignored(&frame), Ignored::Malformed(Malformed::Format));
}

#[test]
fn a_neighbour_solicitation_gets_a_unicast_advertisement() {
    let answer = answered(&neighbour(GUEST_V6).frame());
    assert_eq!(answer.kind, Kind::NeighbourSolicitation);
    assert_eq!(answer.frame[..6], GUEST.octets());
    let (packet, message) = icmpv6_by_pnet(&answer.frame);
    assert_eq!(
        (packet.get_source(), packet.get_destination()),
        (V6, GUEST_V6)
    );
    let advertisement = NeighborAdvertPacket::new(&message).unwrap();
    assert_eq!(advertisement.get_icmpv6_type(), Icmpv6Types::NeighborAdvert);
    // Router, solicited, override.
    assert_eq!(advertisement.get_flags(), 0b1110_0000);
    assert_eq!(advertisement.get_target_addr(), V6);
    let options = advertisement.get_options();
    assert_eq!(options.len(), 1);
    assert_eq!(options[0].option_type, NdpOptionTypes::TargetLLAddr);
    assert_eq!(options[0].data, MAC.octets());
}

/// RFC 4861, section 7.2.4: who has no address yet is told where all nodes are, and not as if it had asked.
#[test]
fn duplicate_address_detection_is_answered_to_all_nodes() {
    let answer = answered(&neighbour(Ipv6Addr::UNSPECIFIED).frame());
    let (mac, all_nodes) = samples::all_nodes();
    assert_eq!(answer.frame[..6], mac.octets());
    assert_eq!(mac, pnet_base::MacAddr(0x33, 0x33, 0, 0, 0, 1));
    let (packet, message) = icmpv6_by_pnet(&answer.frame);
    assert_eq!(packet.get_destination(), all_nodes);
    let advertisement = NeighborAdvertPacket::new(&message).unwrap();
    assert_eq!(advertisement.get_flags(), 0b1010_0000);
}

/// The rules of RFC 4861, section 7.1.1, each broken on its own.
#[test]
fn solicitations_that_break_a_rule_are_discarded() {
    let group = "ff02::1:ff00:1".parse().unwrap();
    let valid = || solicitation(GUEST_V6, group, V6, &[]);
    assert!(decide(&gateway(), &valid(), None).is_ok());
    let changed = |at: usize, byte: u8| {
        let mut frame = valid();
        frame[HEADER + at] = byte;
        ignored(&frame)
    };
    let malformed = Ignored::Malformed;
    assert_eq!(changed(7, 254), malformed(Malformed::HopLimit));
    assert_eq!(changed(42, 0), malformed(Malformed::Checksum));
    assert_eq!(changed(0, 0x40), malformed(Malformed::Format));
    // The length says more than there is, and less than a solicitation has.
    assert_eq!(changed(5, 200), malformed(Malformed::Length));
    let short = icmpv6(GUEST_V6, group, Icmpv6Type::NeighborSolicitation, &[0; 15]);
    let short = broadcast(EtherType::IPV6, &short);
    assert_eq!(ignored(&short), malformed(Malformed::Length));
    let multicast = solicitation(GUEST_V6, group, group, &[]);
    assert_eq!(ignored(&multicast), malformed(Malformed::Target));
    for options in [
        &[1, 0, 0, 0, 0, 0, 0, 0][..],
        &[1, 2, 0, 0, 0, 0, 0, 0],
        &[1],
    ] {
        let options = solicitation(GUEST_V6, group, V6, options);
        assert_eq!(ignored(&options), malformed(Malformed::Options));
    }
    let nowhere = Ipv6Addr::UNSPECIFIED;
    let told = [&[1, 1][..], &GUEST.octets()].concat();
    let told = solicitation(nowhere, group, V6, &told);
    assert_eq!(ignored(&told), malformed(Malformed::Unspecified));
    let unicast = solicitation(nowhere, V6, V6, &[]);
    assert_eq!(ignored(&unicast), malformed(Malformed::Unspecified));
    let from_group = solicitation(group, group, V6, &[]);
    assert_eq!(ignored(&from_group), malformed(Malformed::Sender));
}

#[test]
fn a_code_other_than_zero_is_malformed() {
    let unknown = Icmpv6Type::Unknown {
        type_u8: 135,
        code_u8: 1,
        bytes5to8: [0; 4],
    };
    let packet = icmpv6(GUEST_V6, V6, unknown, &V6.octets());
    assert_eq!(
        ignored(&broadcast(EtherType::IPV6, &packet)),
        Ignored::Malformed(Malformed::Code)
    );
}

/// Section 7.1.1: options that mean nothing in a solicitation are ignored, whatever is in them; `etherparse`'s own
/// iterator stops at these two, and `pnet` panics at the second.
#[rstest]
#[case::mtu_of_the_wrong_length(&[&[5, 2][..], &[0; 14]].concat())]
#[case::long(&[&[14, 40][..], &[0; 318]].concat())]
fn options_without_meaning_are_ignored(#[case] options: &[u8]) {
    let frame = solicitation(GUEST_V6, V6, V6, options);
    assert_eq!(answered(&frame).kind, Kind::NeighbourSolicitation);
}

#[test]
fn padding_is_no_part_of_the_message() {
    for asked in [
        Asked::Arp { sender: GUEST_V4 },
        Asked::Neighbour {
            source: GUEST_V6,
            told: true,
        },
        Asked::Router {
            source: GUEST_V6,
            told: false,
        },
    ] {
        let mut frame = question(asked).frame();
        let unpadded = answered(&frame);
        frame.extend([0xff; 20]);
        assert_eq!(answered(&frame), unpadded);
    }
}

#[test]
fn a_claim_by_neighbour_discovery_is_a_conflict() {
    let flags = etherparse::icmpv6::NeighborAdvertisementHeader {
        router: false,
        solicited: false,
        r#override: true,
    };
    let (_, all) = samples::all_nodes();
    let claim = |target: Ipv6Addr| {
        let packet = icmpv6(
            GUEST_V6,
            all,
            Icmpv6Type::NeighborAdvertisement(flags),
            &target.octets(),
        );
        ignored(&broadcast(EtherType::IPV6, &packet))
    };
    assert_eq!(claim(V6), Ignored::Conflict);
    assert_eq!(claim(GUEST_V6), Ignored::NoQuestion);
    // One that asks from the gateway's address claims it too.
    assert_eq!(
        ignored(&solicitation(V6, GUEST_V6, GUEST_V6, &[])),
        Ignored::Conflict
    );
}

#[test]
fn other_addresses_and_stations_are_not_the_gateways_business() {
    let other = "fe80::2".parse().unwrap();
    let frame = solicitation(GUEST_V6, "ff02::1:ff00:2".parse().unwrap(), other, &[]);
    assert_eq!(ignored(&frame), Ignored::OtherAddress);
    for asked in [
        Asked::Arp { sender: GUEST_V4 },
        Asked::Neighbour {
            source: GUEST_V6,
            told: true,
        },
        Asked::Router {
            source: GUEST_V6,
            told: false,
        },
    ] {
        let mut frame = question(asked).frame();
        frame[..6].copy_from_slice(&[2, 0, 0, 0, 0, 9]);
        assert_eq!(ignored(&frame), Ignored::OtherStation);
    }
    assert_eq!(
        ignored(&samples::ethernet(0x0800, &[0x45; 40])),
        Ignored::NoQuestion
    );
    assert_eq!(ignored(&[0; 13]), Ignored::Malformed(Malformed::Length));
}

#[test]
fn a_router_solicitation_gets_an_advertisement() {
    let source = GUEST_V6;
    let answer = answered(&question(Asked::Router { source, told: true }).frame());
    assert_eq!(answer.kind, Kind::RouterSolicitation);
    let (packet, message) = icmpv6_by_pnet(&answer.frame);
    assert_eq!(
        (packet.get_source(), packet.get_destination()),
        (V6, GUEST_V6)
    );
    let advertisement = RouterAdvertPacket::new(&message).unwrap();
    assert_eq!(advertisement.get_icmpv6_type(), Icmpv6Types::RouterAdvert);
    assert_eq!(advertisement.get_hop_limit(), 64);
    assert_eq!(advertisement.get_flags(), 0);
    assert_eq!(advertisement.get_lifetime(), 1800);
    let options = advertisement.get_options();
    let [link, prefix] = &options[..] else {
        panic!("{options:?}")
    };
    assert_eq!(link.option_type, NdpOptionTypes::SourceLLAddr);
    assert_eq!(link.data, MAC.octets());
    assert_eq!(prefix.option_type, NdpOptionTypes::PrefixInformation);
    // Autonomous, not on-link.
    assert_eq!(prefix.data[..2], [64, 0b0100_0000]);
    let address: Ipv6Addr = "2001:db8:0:1::".parse().unwrap();
    assert_eq!(prefix.data[14..30], address.octets());
}

#[test]
fn a_gateway_that_is_no_router_does_not_advertise_itself() {
    let source = Ipv6Addr::UNSPECIFIED;
    let frame = question(Asked::Router {
        source,
        told: false,
    })
    .frame();
    assert_eq!(
        decide(&Gateway::default(), &frame, None),
        Err(Ignored::NotARouter)
    );
    assert_eq!(advertisement(&Gateway::default()), None);
}

/// RFC 4861, section 6.1.1.
#[test]
fn a_router_solicitation_from_nowhere_tells_no_address() {
    let source = Ipv6Addr::UNSPECIFIED;
    let frame = question(Asked::Router { source, told: true }).frame();
    assert_eq!(ignored(&frame), Ignored::Malformed(Malformed::Unspecified));
}

#[test]
fn announcements_say_where_every_address_is() {
    let addresses = [V4.into(), Ipv4Addr::new(10, 0, 0, 1).into(), V6.into()];
    let gateway = Gateway::new(MAC, addresses).unwrap();
    let frames = announcements(&gateway, None);
    assert_eq!(frames.len(), 5);
    let arps = frames[..4].iter().map(|frame| {
        assert_eq!(frame[..6], [0xff; 6]);
        let arp = ArpPacketSlice::from_slice(&frame[HEADER..]).unwrap();
        assert_eq!(arp.sender_hw_addr(), MAC.octets());
        assert_eq!(arp.sender_protocol_addr(), arp.target_protocol_addr());
        (arp.operation(), arp.sender_protocol_addr().to_vec())
    });
    let expected = [V4.octets(), [10, 0, 0, 1]]
        .into_iter()
        .flat_map(|address| {
            [ArpOperation::REQUEST, ArpOperation::REPLY]
                .map(|operation| (operation, address.to_vec()))
        });
    assert!(arps.eq(expected));
    let (packet, message) = icmpv6_by_pnet(&frames[4]);
    assert_eq!(packet.get_destination(), samples::all_nodes().1);
    let advertisement = NeighborAdvertPacket::new(&message).unwrap();
    assert_eq!(advertisement.get_flags(), 0b1010_0000);
    assert_eq!(advertisement.get_target_addr(), V6);
}

#[test]
fn a_host_is_announced_as_no_router() {
    let addresses = [GUEST_V4.into(), GUEST_V6.into()];
    let frames = host_announcements(GUEST, &addresses, None).unwrap();
    assert_eq!(frames.len(), 3);
    for frame in &frames[..2] {
        let arp = ArpPacketSlice::from_slice(&frame[HEADER..]).unwrap();
        assert_eq!(arp.sender_hw_addr(), GUEST.octets());
        assert_eq!(arp.sender_protocol_addr(), GUEST_V4.octets());
        assert_eq!(arp.target_protocol_addr(), GUEST_V4.octets());
    }
    let (packet, message) = icmpv6_by_pnet(&frames[2]);
    assert_eq!(packet.get_source(), GUEST_V6);
    let advertisement = NeighborAdvertPacket::new(&message).unwrap();
    assert_eq!(advertisement.get_flags(), 0b0010_0000);
    assert_eq!(advertisement.get_target_addr(), GUEST_V6);
    assert_eq!(host_announcements(GUEST, &[], None), Ok(Vec::new()));
    let group = Ipv4Addr::new(224, 0, 0, 1).into();
    assert_eq!(
        host_announcements(GUEST, &[group], None),
        Err(GatewayError::Address(group))
    );
}

#[test]
fn hardware_must_let_in_what_questions_are_sent_to() {
    let macs = |gateway: &Gateway| -> Vec<String> {
        groups(gateway).iter().map(ToString::to_string).collect()
    };
    assert_eq!(macs(&Gateway::default()), ["33:33:ff:00:00:01"]);
    assert_eq!(macs(&gateway()), ["33:33:00:00:00:02", "33:33:ff:00:00:01"]);
}

fn any_three_tags() -> impl Strategy<Value = [Tag; 3]> {
    prop::array::uniform3(samples::some_tag())
}

/// The tags of a frame and what is behind them, read by `etherparse`.
fn by_etherparse(frame: &[u8]) -> (Vec<u16>, EtherType, Vec<u8>) {
    let parsed = SlicedPacket::from_ethernet(frame).unwrap();
    let ids = parsed.vlan_ids().iter().map(|id| id.value()).collect();
    let payload = parsed.ether_payload().unwrap();
    (ids, payload.ether_type, payload.payload.to_vec())
}

proptest! {
    #[test]
    fn no_bytes_panic(bytes in prop::collection::vec(any::<u8>(), 0..200), tag in samples::tag()) {
        let _ = decide(&gateway(), &bytes, tag);
    }

    /// Most random bytes end at the first check: valid questions with a few bytes changed get further.
    #[test]
    fn no_damage_panics(
        question in samples::question(),
        damage in prop::collection::vec((0_usize..120, any::<u8>()), 1..6),
        length in 0_usize..140,
        ipv6_length in any::<u8>(),
    ) {
        let mut frame = question.frame();
        for (at, byte) in damage {
            if let Some(place) = frame.get_mut(at) {
                *place = byte;
            }
        }
        if let Some(place) = frame.get_mut(HEADER + 5) {
            *place = ipv6_length;
        }
        frame.truncate(length);
        let _ = decide(&gateway(), &frame, None);
    }

    /// Whatever is asked in whichever tags, the answer is in the same, and the same as without.
    #[test]
    fn the_answer_has_the_tags_of_the_question(question in samples::question(), outer in samples::tag()) {
        let answer = decide(&gateway(), &question.frame(), outer).unwrap();
        let untagged = answered(&Question { tag: None, ..question.clone() }.frame());
        let tags: Vec<Tag> = [outer, question.tag].into_iter().flatten().collect();
        let (ids, ethertype, payload) = by_etherparse(&answer.frame);
        let expected: Vec<u16> = tags.iter().map(|tag| tag.tci & 0x0fff).collect();
        prop_assert_eq!(ids, expected);
        prop_assert_eq!(&payload, &untagged.frame[HEADER..]);
        let mut header = answer.frame[..12].to_vec();
        for tag in &tags {
            header.extend(tag.tpid.to_be_bytes());
            header.extend(tag.tci.to_be_bytes());
        }
        header.extend(ethertype.0.to_be_bytes());
        prop_assert_eq!(&answer.frame[..HEADER + TAG * tags.len()], &header);
    }

    #[test]
    fn three_tags_are_one_too_many(question in samples::question(), tags in any_three_tags()) {
        let [outer, middle, inner] = tags;
        let mut frame = Question { tag: Some(inner), ..question }.frame();
        frame.splice(12..12, [middle.tpid.to_be_bytes(), middle.tci.to_be_bytes()].concat());
        prop_assert_eq!(decide(&gateway(), &frame, Some(outer)), Err(Ignored::Malformed(Malformed::Length)));
        prop_assert!(decide(&gateway(), &frame, None).is_ok());
    }

    /// Two proxies on a link, or a frame that comes back, must not keep answering each other.
    #[test]
    fn answers_and_announcements_are_not_answered(question in samples::question()) {
        let gateway = gateway();
        let answer = decide(&gateway, &question.frame(), None).unwrap();
        prop_assert_eq!(decide(&gateway, &answer.frame, None), Err(Ignored::Own));
        // Another gateway, for the same addresses at another place.
        let other = Gateway::new(question.asker, [V4.into(), V6.into()]).unwrap();
        let frames = announcements(&other, question.tag).into_iter().chain(advertisement(&gateway));
        for frame in frames {
            prop_assert!(decide(&gateway, &frame, None).is_err());
        }
        let elsewhere = Gateway::new(pnet_base::MacAddr(2, 9, 9, 9, 9, 9), [V4.into(), V6.into()]).unwrap();
        prop_assert!(decide(&elsewhere, &answer.frame, None).is_err());
    }

    /// What `etherparse` reads in what was built with `pnet` (headers, ARP) and with itself (the rest).
    #[test]
    fn every_answer_is_well_formed(question in samples::question()) {
        let answer = answered(&question.frame());
        prop_assert_eq!(&answer.frame[6..12], MAC.octets());
        let to = &answer.frame[..6];
        let (all_nodes_mac, all_nodes) = samples::all_nodes();
        let unspecified = matches!(
            question.asked,
            Asked::Neighbour { source, .. } | Asked::Router { source, .. } if source.is_unspecified()
        );
        prop_assert_eq!(to, if unspecified { all_nodes_mac.octets() } else { question.asker.octets() });
        let (_, ethertype, payload) = by_etherparse(&answer.frame);
        match question.asked {
            Asked::Arp { sender } => {
                prop_assert_eq!(ethertype, EtherType::ARP);
                let reply = ArpPacketSlice::from_slice(&payload).unwrap().to_packet().try_eth_ipv4().unwrap();
                prop_assert_eq!(reply.operation, ArpOperation::REPLY);
                prop_assert_eq!((reply.sender_mac, reply.sender_ipv4_addr()), (MAC.octets(), V4));
                prop_assert_eq!((reply.target_mac, reply.target_ipv4_addr()), (question.asker.octets(), sender));
            }
            Asked::Neighbour { source, .. } | Asked::Router { source, .. } => {
                let header = Ipv6HeaderSlice::from_slice(&payload).unwrap();
                prop_assert_eq!(header.next_header(), ip_number::IPV6_ICMP);
                prop_assert_eq!(header.source_addr(), V6);
                prop_assert_eq!(header.destination_addr(), if unspecified { all_nodes } else { source });
                let icmp = Icmpv6Slice::from_slice(&payload[40..]).unwrap();
                prop_assert!(icmp.is_checksum_valid(header.source(), header.destination()));
                match icmp.payload_slice().unwrap() {
                    Icmpv6PayloadSlice::NeighborAdvertisement(advertisement) => {
                        prop_assert!(is_about_the_gateway(&advertisement));
                    }
                    Icmpv6PayloadSlice::RouterAdvertisement(advertisement) => {
                        prop_assert!(advertisement.options_iterator().all(|option| option.is_ok()));
                    }
                    other => prop_assert!(false, "{other:?}"),
                }
            }
        }
        let parsed = SlicedPacket::from_ethernet(&answer.frame).unwrap();
        prop_assert_eq!(matches!(parsed.transport, Some(TransportSlice::Icmpv6(_))), ethertype == EtherType::IPV6);
    }
}

fn is_about_the_gateway(advertisement: &NeighborAdvertisementPayloadSlice<'_>) -> bool {
    let options: Vec<_> = advertisement.options_iterator().collect();
    let told = matches!(
        &options[..],
        [Ok(NdpOptionSlice::TargetLinkLayerAddress(option))] if option.as_bytes()[2..] == MAC.octets()
    );
    told && advertisement.target_address() == V6
}
