//! Frames by `etherparse`, which read none of them; filters in the kernel, on sockets that take no privilege.

use std::net::{Ipv4Addr, Ipv6Addr};

use arp_proxy::answer::Tag;
use arp_proxy::socket::filter::attach;
use etherparse::icmpv6::NeighborAdvertisementHeader;
use etherparse::{
    ArpHardwareId, ArpOperation, ArpPacket, EtherType, Ethernet2Header, Icmpv6Type, Ipv6Header,
    ip_number,
};
use proptest::prelude::*;
use rstest::rstest;
use socket2::{Domain, Socket, Type};

use super::filter::{HEADERS, Share, announcements, announcements_and, sample};
use super::*;

const GUEST: MacAddr = pnet_base::MacAddr(0x0a, 0x58, 0x0a, 0x80, 0x01, 0x0a);
const OTHER: MacAddr = pnet_base::MacAddr(0x0a, 0x58, 0x0a, 0x80, 0x01, 0x0b);
const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 128, 1, 10);
const ADDRESS_V6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0x10);
const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
const RARP: EtherType = EtherType(0x8035);

/// An announcement as others send it.
#[derive(Clone, Copy, Debug)]
struct Announced {
    kind: Heard,
    source: MacAddr,
    /// In the packet.
    sender: MacAddr,
    /// In RARP, whom it is for.
    target: MacAddr,
    /// Of ARP: a reply; of an advertisement: it tells no address.
    form: bool,
}

fn ethernet(source: MacAddr, ether_type: EtherType, payload: &[u8]) -> Vec<u8> {
    let header = Ethernet2Header {
        source: source.octets(),
        destination: [0xff; 6],
        ether_type,
    };
    [&header.to_bytes()[..], payload].concat()
}

fn arp(operation: u16, ends: [(MacAddr, Ipv4Addr); 2]) -> Vec<u8> {
    let [sender, target] = ends;
    let packet = ArpPacket::new(
        ArpHardwareId::ETHERNET,
        EtherType::IPV4,
        ArpOperation(operation),
        &sender.0.octets(),
        &sender.1.octets(),
        &target.0.octets(),
        &target.1.octets(),
    );
    let mut bytes = packet.unwrap().to_bytes().to_vec();
    // The shortest frame has 46 bytes of payload.
    bytes.resize(46, 0);
    bytes
}

fn advertisement(solicited: bool, to: Ipv6Addr, told: Option<MacAddr>) -> Vec<u8> {
    let mut body = ADDRESS_V6.octets().to_vec();
    if let Some(mac) = told {
        body.extend([2, 1]);
        body.extend(mac.octets());
    }
    let flags = NeighborAdvertisementHeader {
        router: false,
        solicited,
        r#override: true,
    };
    let (from, to) = (ADDRESS_V6.octets(), to.octets());
    let icmp = Icmpv6Type::NeighborAdvertisement(flags);
    let icmp = icmp.to_header(from, to, &body).unwrap();
    let header = Ipv6Header {
        payload_length: u16::try_from(icmp.header_len() + body.len()).unwrap(),
        next_header: ip_number::IPV6_ICMP,
        hop_limit: 255,
        source: from,
        destination: to,
        ..Ipv6Header::default()
    };
    [&header.to_bytes()[..], &icmp.to_bytes(), &body].concat()
}

fn ipv4(source: MacAddr) -> Vec<u8> {
    ethernet(source, EtherType::IPV4, &[0x45; 100])
}

impl Announced {
    fn frame(&self) -> Vec<u8> {
        let sender = (self.sender, ADDRESS);
        match self.kind {
            Heard::Rarp => {
                let nowhere = Ipv4Addr::UNSPECIFIED;
                let ends = [(self.sender, nowhere), (self.target, nowhere)];
                ethernet(self.source, RARP, &arp(3, ends))
            }
            Heard::Garp if self.form => {
                ethernet(self.source, EtherType::ARP, &arp(2, [sender, sender]))
            }
            Heard::Garp => {
                let nobody = (pnet_base::MacAddr::zero(), ADDRESS);
                ethernet(self.source, EtherType::ARP, &arp(1, [sender, nobody]))
            }
            _ => {
                let told = (!self.form).then_some(self.sender);
                ethernet(
                    self.source,
                    EtherType::IPV6,
                    &advertisement(false, ALL_NODES, told),
                )
            }
        }
    }

    /// The station that it names and that is not the guest.
    fn other(&self) -> Option<MacAddr> {
        let named = match (self.kind, self.form) {
            (Heard::Rarp, _) => vec![self.target, self.sender, self.source],
            (Heard::NeighbourAdvertisement, true) => vec![self.source],
            _ => vec![self.sender, self.source],
        };
        named.into_iter().find(|&mac| mac != GUEST)
    }
}

fn heard(frame: &[u8], tag: Option<Tag>) -> Option<(Heard, Option<MacAddr>)> {
    let announcement = Announcement::of(&Frame::parse(frame, tag)?)?;
    Some((announcement.heard, announcement.other_than(GUEST)))
}

/// A filter, and a socket in the kernel that has it.
struct Kernel {
    sender: Socket,
    receiver: Socket,
}

impl Kernel {
    fn with(program: &[arp_proxy::socket::filter::Instruction]) -> Self {
        let (sender, receiver) = Socket::pair(Domain::UNIX, Type::DGRAM, None).unwrap();
        attach(&receiver, program).unwrap();
        receiver.set_nonblocking(true).unwrap();
        Self { sender, receiver }
    }

    /// How much of a frame the filter lets through.
    fn passes(&self, frame: &[u8]) -> usize {
        let mut buffer = [std::mem::MaybeUninit::uninit(); 2048];
        self.sender.send(frame).unwrap();
        match self.receiver.recv(&mut buffer) {
            Ok(length) => length,
            Err(error) => {
                assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock);
                0
            }
        }
    }
}

fn station() -> impl Strategy<Value = MacAddr> {
    prop_oneof![
        3 => Just(GUEST),
        1 => any::<[u8; 5]>().prop_map(|[a, b, c, d, e]| pnet_base::MacAddr(2, a, b, c, d, e)),
    ]
}

fn announced() -> impl Strategy<Value = Announced> {
    let kind = prop::sample::select(vec![
        Heard::Rarp,
        Heard::Garp,
        Heard::NeighbourAdvertisement,
    ]);
    (kind, station(), station(), station(), any::<bool>()).prop_map(
        |(kind, source, sender, target, form)| Announced {
            kind,
            source,
            sender,
            target,
            form,
        },
    )
}

proptest! {
    #[test]
    fn announcements_are_told_from_each_other_and_whose_they_are(announced in announced()) {
        let frame = announced.frame();
        prop_assert_eq!(heard(&frame, None), Some((announced.kind, announced.other())));
        let kernel = [announcements(), announcements_and(GUEST)];
        for program in kernel {
            prop_assert_eq!(Kernel::with(&program).passes(&frame), frame.len());
        }
    }

    #[test]
    fn in_a_vlan_they_are_none(announced in announced(), tci in any::<u16>()) {
        let tag = Some(Tag { tpid: 0x8100, tci });
        prop_assert_eq!(heard(&announced.frame(), tag), None);
        let mut frame = announced.frame();
        frame.splice(12..12, [[0x81, 0], tci.to_be_bytes()].concat());
        prop_assert_eq!(heard(&frame, None), None);
        prop_assert_eq!(Kernel::with(&announcements()).passes(&frame), 0);
    }

    /// Whatever it is, if the kernel stops it there would have been nothing to tell.
    #[test]
    fn what_the_kernel_stops_is_no_announcement(
        announced in announced(),
        at in 0_usize..90,
        byte in any::<u8>(),
        length in 0_usize..110,
    ) {
        let mut frame = announced.frame();
        if let Some(place) = frame.get_mut(at) {
            *place = byte;
        }
        let kernel = Kernel::with(&announcements());
        for bytes in [&frame[..], &frame[..length.min(frame.len())]] {
            if bytes.is_empty() {
                continue;
            }
            let passed = kernel.passes(bytes);
            prop_assert!(passed == 0 || passed == bytes.len());
            if heard(bytes, None).is_some() {
                prop_assert_eq!(passed, bytes.len());
            }
        }
    }

    #[test]
    fn no_bytes_panic(bytes in prop::collection::vec(any::<u8>(), 0..128), ethertype in prop::sample::select(vec![0x0806, 0x8035, 0x86dd])) {
        let _ = heard(&bytes, None);
        let _ = heard(&ethernet(GUEST, EtherType(ethertype), &bytes), None);
    }

    #[test]
    fn of_the_rest_the_headers_pass_when_asked_for(
        source in station(),
        payload in prop::collection::vec(any::<u8>(), 50..100),
    ) {
        let frame = ethernet(source, EtherType::IPV4, &payload);
        let own = if source == GUEST { HEADERS as usize } else { 0 };
        prop_assert_eq!(Kernel::with(&announcements()).passes(&frame), 0);
        prop_assert_eq!(Kernel::with(&announcements_and(GUEST)).passes(&frame), own);
        prop_assert_eq!(Kernel::with(&sample(GUEST, Share::ALL)).passes(&frame), own);
    }
}

#[rstest]
// Who has the neighbour's address?
#[case(EtherType::ARP, arp(1, [(GUEST, ADDRESS), (pnet_base::MacAddr::zero(), Ipv4Addr::new(10, 128, 1, 1))]))]
// Has anybody the guest's (RFC 5227, section 2.1.1)?
#[case(EtherType::ARP, arp(1, [(GUEST, Ipv4Addr::UNSPECIFIED), (pnet_base::MacAddr::zero(), ADDRESS)]))]
#[case(EtherType::ARP, arp(1, [(GUEST, Ipv4Addr::UNSPECIFIED), (pnet_base::MacAddr::zero(), Ipv4Addr::UNSPECIFIED)]))]
// Other operations with the forms of an announcement.
#[case(EtherType::ARP, arp(3, [(GUEST, ADDRESS), (GUEST, ADDRESS)]))]
#[case(RARP, arp(4, [(GUEST, ADDRESS), (GUEST, ADDRESS)]))]
#[case(RARP, arp(1, [(GUEST, ADDRESS), (GUEST, ADDRESS)]))]
// Answers, and what goes to one station.
#[case(EtherType::IPV6, advertisement(true, ADDRESS_V6, Some(GUEST)))]
#[case(EtherType::IPV6, advertisement(true, ALL_NODES, Some(GUEST)))]
#[case(EtherType::IPV6, advertisement(false, ADDRESS_V6, Some(GUEST)))]
#[case(EtherType::IPV4, vec![0x45; 60])]
fn no_announcement(#[case] ethertype: EtherType, #[case] payload: Vec<u8>) {
    assert_eq!(heard(&ethernet(GUEST, ethertype, &payload), None), None);
}

#[test]
fn an_advertisement_that_crossed_a_router_is_none() {
    let mut frame = ethernet(
        GUEST,
        EtherType::IPV6,
        &advertisement(false, ALL_NODES, Some(GUEST)),
    );
    assert!(heard(&frame, None).is_some());
    frame[14 + 7] = 254;
    assert_eq!(heard(&frame, None), None);
}

/// As QEMU's `announce_self_create` makes it.
#[test]
fn qemus_own_announcement() {
    let mac = [0x52, 0x54, 0, 0x12, 0x34, 0x56];
    let mut frame = [&[0xff; 6][..], &mac, &[0x80, 0x35, 0, 1, 8, 0, 6, 4, 0, 3]].concat();
    frame.extend([&mac[..], &[0; 4], &mac, &[0; 4]].concat());
    frame.resize(60, 0);
    let announcement = Announcement::of(&Frame::parse(&frame, None).unwrap()).unwrap();
    assert_eq!(announcement.heard, Heard::Rarp);
    assert_eq!(announcement.other_than(MacAddr::from(mac)), None);
    assert_eq!(announcement.other_than(GUEST), Some(MacAddr::from(mac)));
}

#[test]
fn a_sample_is_of_the_size_that_was_asked_for() {
    let kernel = Kernel::with(&sample(GUEST, Share::one_in(4)));
    let frame = ipv4(GUEST);
    let passed = (0..8000).filter(|_| kernel.passes(&frame) > 0).count();
    // Two thousand, with a standard deviation of 39.
    assert!((1750..2250).contains(&passed), "{passed} of 8000");
    assert_eq!(kernel.passes(&ipv4(OTHER)), 0);
}

#[tokio::test]
async fn an_interface_that_is_not_there() {
    let (sender, _receiver) = mpsc::channel(1);
    let error = Ear::listen("nowhere0", GUEST, sender, Arc::default()).unwrap_err();
    assert!(matches!(error, EarError::NoInterface { .. }), "{error}");
    assert!(error.to_string().contains("nowhere0"), "{error}");
}
