//! What the kernel lets through, of what a port's interface receives.
//!
//! A filter is a tree of questions, each branch of which ends in an answer: how many bytes of the frame. So no jump is
//! counted by hand.

use arp_proxy::Mac;
use arp_proxy::socket::filter::{
    ACCEPT, DROP, INDEX_ACCUMULATOR, Instruction, JUMP_ANY_BIT, JUMP_AT_LEAST, JUMP_EQUAL,
    JUMP_EQUAL_INDEX, LOAD_BYTE, LOAD_HALF, LOAD_WORD, OUTGOING, PACKET_TYPE, RANDOM, RETURN,
    TAG_PRESENT, jump, load,
};

/// Of a frame that is no announcement its headers will do: 14 bytes of Ethernet's, and two tags.
pub(super) const HEADERS: u32 = 22;

const SOURCE: u32 = 6;
const ETHERTYPE: u32 = 12;
const ARP: u32 = 0x0806;
const RARP: u32 = 0x8035;
const IPV6: u32 = 0x86dd;
/// In ARP and RARP for Ethernet and IPv4: the operation, and the protocol addresses of sender and target.
const OPERATION: u32 = 20;
const SENDER: u32 = 28;
const TARGET: u32 = 38;
/// RARP's request, with which hypervisors announce a guest (RFC 903).
const REQUEST_REVERSE: u32 = 3;
/// In IPv6: the next header, and of an ICMPv6 message right behind its type and, of a neighbour advertisement, its flags.
const NEXT_HEADER: u32 = 20;
const ICMPV6_TYPE: u32 = 54;
const FLAGS: u32 = 58;
const ICMPV6: u32 = 58;
const NEIGHBOUR_ADVERTISEMENT: u32 = 136;
const SOLICITED: u32 = 0x40;

type Program = Vec<Instruction>;

/// Of a random share of frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Share(u32);

impl Share {
    /// Every frame.
    pub(super) const ALL: Self = Self(u32::MAX);

    /// One frame in so many, on average; 0 is as good as 1.
    pub(super) fn one_in(frames: u32) -> Self {
        Self(u32::MAX / frames.max(1))
    }

    /// How many frames there are to each that is let through, on average.
    pub(super) fn frames(self) -> u32 {
        u32::MAX / self.0.max(1)
    }
}

/// Announcements, by whomever and of whomever.
pub(super) fn announcements() -> Program {
    received(&announced(&give(DROP)))
}

/// Announcements, and the headers of everything that `mac` sends.
pub(super) fn announcements_and(mac: Mac) -> Program {
    received(&announced(&from(mac, &give(HEADERS))))
}

/// The headers of a share of what `mac` sends.
pub(super) fn sample(mac: Mac, share: Share) -> Program {
    let some = if share == Share::ALL {
        give(HEADERS)
    } else {
        ask(
            load(LOAD_WORD, RANDOM),
            (JUMP_AT_LEAST, share.0),
            &give(DROP),
            &give(HEADERS),
        )
    };
    received(&from(mac, &some))
}

/// Frames that come out of the guest; what goes to it, this host sends.
fn received(then: &[Instruction]) -> Program {
    let sent = (JUMP_EQUAL, OUTGOING);
    ask(load(LOAD_WORD, PACKET_TYPE), sent, &give(DROP), then)
}

fn from(mac: Mac, then: &[Instruction]) -> Program {
    let [a, b, rest @ ..] = mac.octets();
    let rest = (JUMP_EQUAL, u32::from_be_bytes(rest));
    let first = (JUMP_EQUAL, u32::from(u16::from_be_bytes([a, b])));
    let nothing = give(DROP);
    let then = ask(load(LOAD_HALF, SOURCE), first, then, &nothing);
    ask(load(LOAD_WORD, SOURCE + 2), rest, &then, &nothing)
}

/// Whole, if a frame may be an announcement, and is in no VLAN: that is another network than the port's.
fn announced(otherwise: &[Instruction]) -> Program {
    let whole = give(ACCEPT);
    let rarp = ask(
        load(LOAD_HALF, OPERATION),
        (JUMP_EQUAL, REQUEST_REVERSE),
        &whole,
        otherwise,
    );
    let gratuitous = [
        &[load(LOAD_WORD, SENDER), load(INDEX_ACCUMULATOR, 0)][..],
        &ask(
            load(LOAD_WORD, TARGET),
            (JUMP_EQUAL_INDEX, 0),
            &whole,
            otherwise,
        ),
    ]
    .concat();
    let unsolicited = ask(
        load(LOAD_BYTE, FLAGS),
        (JUMP_ANY_BIT, SOLICITED),
        otherwise,
        &whole,
    );
    let advertisement = ask(
        load(LOAD_BYTE, ICMPV6_TYPE),
        (JUMP_EQUAL, NEIGHBOUR_ADVERTISEMENT),
        &unsolicited,
        otherwise,
    );
    let icmp = ask(
        load(LOAD_BYTE, NEXT_HEADER),
        (JUMP_EQUAL, ICMPV6),
        &advertisement,
        otherwise,
    );
    let ipv6 = branch((JUMP_EQUAL, IPV6), &icmp, otherwise);
    let arp = branch((JUMP_EQUAL, ARP), &gratuitous, &ipv6);
    let kind = ask(load(LOAD_HALF, ETHERTYPE), (JUMP_EQUAL, RARP), &rarp, &arp);
    ask(
        load(LOAD_WORD, TAG_PRESENT),
        (JUMP_EQUAL, 0),
        &kind,
        otherwise,
    )
}

fn give(bytes: u32) -> Program {
    vec![load(RETURN, bytes)]
}

fn ask(
    loaded: Instruction,
    question: (u16, u32),
    then: &[Instruction],
    otherwise: &[Instruction],
) -> Program {
    let mut program = vec![loaded];
    program.extend(branch(question, then, otherwise));
    program
}

/// Either branch must end in an answer.
fn branch((code, value): (u16, u32), then: &[Instruction], otherwise: &[Instruction]) -> Program {
    // Branches here are some dozens of instructions long, which tests attach; a jump has room for 255.
    let skipped = u8::try_from(then.len()).unwrap_or(u8::MAX);
    let mut program = vec![jump(code, value, 0, skipped)];
    program.extend(then);
    program.extend(otherwise);
    program
}
