//! What must hold of whatever is received. Shared by the fuzz target and the test that replays its corpus.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::LazyLock;

use arp_proxy::answer::{Answer, Kind, Tag, decide};
use arp_proxy::{Gateway, Router};

const HEADER: usize = 14;
const TAG: usize = 4;
const ALL_NODES: [u8; 6] = [0x33, 0x33, 0, 0, 0, 1];

/// One that is a router, with a second address of each family.
static GATEWAY: LazyLock<Gateway> = LazyLock::new(|| {
    let addresses = [
        IpAddr::from(Gateway::DEFAULT_IPV4),
        Gateway::DEFAULT_IPV6.into(),
        Ipv4Addr::new(10, 0, 0, 1).into(),
        "2001:db8::1".parse().expect("an address"),
    ];
    let router = Router {
        lifetime: 1800,
        managed: true,
        prefixes: vec!["2001:db8:0:1::/64".parse().expect("a prefix")],
    };
    Gateway::new(Gateway::DEFAULT_MAC, addresses)
        .and_then(|gateway| gateway.with_router(router))
        .expect("a gateway")
});

/// Takes an input for a tag that the kernel took off and the frame that it left, decides, and checks the answer.
///
/// The first byte says whether there is a tag, the next four are one, the rest is the frame.
pub(crate) fn check(input: &[u8]) {
    let Some((&[present, a, b, c, d], frame)) = input.split_first_chunk() else {
        return;
    };
    let tag = (present & 1 == 1).then_some(Tag {
        tpid: u16::from_be_bytes([a, b]),
        tci: u16::from_be_bytes([c, d]),
    });
    check_frame(frame, tag);
    // No fuzzer guesses a checksum, and behind it most rules wait.
    if let Some(repaired) = with_checksum(frame) {
        check_frame(&repaired, tag);
    }
}

fn check_frame(frame: &[u8], tag: Option<Tag>) {
    let gateway = &*GATEWAY;
    let decision = decide(gateway, frame, tag);
    assert_eq!(decision, decide(gateway, frame, tag), "not the same twice");
    let Ok(answer) = decision else {
        return;
    };
    // With its tags on the wire instead of beside it, an answer to the answer would go on for ever.
    assert!(
        decide(gateway, &answer.frame, None).is_err(),
        "answers itself"
    );
    let tags = check_header(&answer, frame, tag);
    let payload = &answer.frame[HEADER + TAG * tags..];
    let asked = &frame[HEADER + TAG * (tags - usize::from(tag.is_some()))..];
    match answer.kind {
        Kind::Arp => check_arp(payload, asked),
        Kind::NeighbourSolicitation | Kind::RouterSolicitation => check_icmpv6(payload),
    }
}

/// From the gateway to who asked, or to all nodes, in the same VLANs; how many.
fn check_header(answer: &Answer, question: &[u8], tag: Option<Tag>) -> usize {
    let sent = &answer.frame;
    assert_eq!(sent[6..12], GATEWAY.mac().octets());
    assert_eq!(answer.asker.octets(), question[6..12]);
    let to_all = answer.kind != Kind::Arp && sent[..6] == ALL_NODES;
    assert!(to_all || sent[..6] == question[6..12], "to a bystander");
    let inline = usize::from(matches!(question[12..14], [0x81, 0] | [0x88, 0xa8]));
    let twice = inline == 1 && matches!(question[16..18], [0x81, 0] | [0x88, 0xa8]);
    let inline = inline + usize::from(twice);
    let mut header = tag.map_or(Vec::new(), |tag| {
        [tag.tpid.to_be_bytes(), tag.tci.to_be_bytes()].concat()
    });
    header.extend(&question[12..HEADER + TAG * inline]);
    assert_eq!(sent[12..12 + header.len()], header, "not in the same VLANs");
    inline + usize::from(tag.is_some())
}

fn check_arp(reply: &[u8], request: &[u8]) {
    assert_eq!(reply.len(), 28);
    assert_eq!(reply[..8], [0, 1, 8, 0, 6, 4, 0, 2]);
    assert_eq!(reply[8..14], GATEWAY.mac().octets());
    let address = Ipv4Addr::from(*reply[14..].first_chunk::<4>().expect("long enough"));
    assert!(GATEWAY.ipv4().contains(&address), "for {address}");
    assert_eq!(reply[14..18], request[24..28], "not what was asked");
    assert_eq!(reply[18..28], request[8..18], "not to who asked");
}

fn check_icmpv6(packet: &[u8]) {
    let length = usize::from(u16::from_be_bytes([packet[4], packet[5]]));
    assert_eq!(packet.len(), 40 + length);
    assert_eq!((packet[6], packet[7]), (58, 255));
    let source: [u8; 16] = *packet[8..].first_chunk().expect("long enough");
    assert!(GATEWAY.ipv6().contains(&source.into()), "from {source:?}");
    assert_eq!(sum(packet), 0xffff, "checksum");
    match packet[40] {
        134 => {}
        136 => assert_eq!(packet[48..64], source, "not of its own address"),
        other => panic!("sends a message of type {other}"),
    }
}

/// The frame, if it has an untagged ICMPv6 packet, with the checksum that it should have.
fn with_checksum(frame: &[u8]) -> Option<Vec<u8>> {
    let mut frame = frame.to_vec();
    let packet = frame.get_mut(HEADER..)?;
    let length = usize::from(u16::from_be_bytes([*packet.get(4)?, *packet.get(5)?]));
    let packet = packet.get_mut(..40 + length)?;
    packet.get_mut(42..44)?.fill(0);
    let checksum = !sum(packet);
    packet[42..44].copy_from_slice(&checksum.to_be_bytes());
    Some(frame)
}

/// Over pseudo-header and message (RFC 4443, section 2.3), by the book: all ones if the checksum is right.
fn sum(packet: &[u8]) -> u16 {
    let pseudo = [&packet[8..40], &[0, 0, packet[4], packet[5], 0, 0, 0, 58]].concat();
    let words = pseudo.chunks(2).chain(packet[40..].chunks(2));
    let word = |word: &[u8]| u64::from(u16::from_be_bytes([word[0], *word.get(1).unwrap_or(&0)]));
    let sum: u64 = words.map(word).sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    u16::try_from((folded & 0xffff) + (folded >> 16)).expect("folded twice")
}
