//! Filters for the kernel, in classic BPF.
//!
//! Offsets are those of an Ethernet frame without a VLAN tag, which the kernel has taken off by then.

use std::io;

use socket2::{SockFilter, Socket};

use super::OUTGOING;
use super::frame::{ARP, IPV4, IPV6, Mac, RARP};

// As in linux/filter.h, where an instruction's code is 16 bits; libc has the parts as 32.
const LOAD_WORD: u16 = 0x20; // BPF_LD | BPF_W | BPF_ABS
const LOAD_HALF: u16 = 0x28; // BPF_LD | BPF_H | BPF_ABS
const LOAD_BYTE: u16 = 0x30; // BPF_LD | BPF_B | BPF_ABS
const LOAD_HALF_AT_INDEX: u16 = 0x48; // BPF_LD | BPF_H | BPF_IND
const INDEX_IPV4_HEADER: u16 = 0xb1; // BPF_LDX | BPF_B | BPF_MSH: four times the low half of a byte
const JUMP_EQUAL: u16 = 0x15; // BPF_JMP | BPF_JEQ | BPF_K
const RETURN: u16 = 0x06; // BPF_RET | BPF_K

/// Where the kernel shows a frame's `sll_pkttype`: SKF_AD_OFF + SKF_AD_PKTTYPE.
const PACKET_TYPE: u32 = 0xffff_f000 + 4;
/// ICMPv6 as the next header, and a neighbour advertisement as its type.
const ICMPV6: u32 = 58;
const NEIGHBOUR_ADVERTISEMENT: u32 = 136;
const TCP: u32 = 6;
const UDP: u32 = 17;
/// The whole frame; the socket's buffer cuts it.
const ACCEPT: u32 = u32::MAX;

/// Directions of which any frame is of interest, as none has been seen.
#[derive(Debug, Clone, Copy)]
pub(super) struct Unseen {
    pub(super) incoming: bool,
    pub(super) outgoing: bool,
}

#[derive(Debug, Clone, Copy)]
pub(super) struct Instruction {
    code: u16,
    then: u8,
    otherwise: u8,
    value: u32,
}

/// From `mac` (from anybody, if none): everything of the unseen directions, and what may be an announcement.
pub(super) fn interesting(mac: Option<Mac>, unseen: Unseen) -> Vec<Instruction> {
    let mut program = Vec::new();
    if let Some(Mac([a, b, rest @ ..])) = mac {
        program.extend([
            load(LOAD_WORD, 8),
            equal(u32::from_be_bytes(rest), 0, 2),
            load(LOAD_HALF, 6),
            equal(u32::from(u16::from_be_bytes([a, b])), 1, 0),
            give(0),
        ]);
    }
    if unseen.incoming {
        program.extend([
            load(LOAD_WORD, PACKET_TYPE),
            equal(u32::from(OUTGOING), 1, 0),
            give(ACCEPT),
        ]);
    }
    if unseen.outgoing {
        program.extend([
            load(LOAD_WORD, PACKET_TYPE),
            equal(u32::from(OUTGOING), 0, 1),
            give(ACCEPT),
        ]);
    }
    program.extend([
        load(LOAD_HALF, 12),
        equal(u32::from(RARP), 7, 0),
        equal(u32::from(ARP), 6, 0),
        equal(u32::from(IPV6), 0, 4),
        load(LOAD_BYTE, 20),
        equal(ICMPV6, 0, 2),
        load(LOAD_BYTE, 54),
        equal(NEIGHBOUR_ADVERTISEMENT, 1, 0),
        give(0),
        give(ACCEPT),
    ]);
    program
}

/// UDP and TCP over IP, to this port. What an IPv6 extension header or a later fragment hides is let go.
pub(super) fn to_port(port: u16) -> Vec<Instruction> {
    let port = u32::from(port);
    vec![
        load(LOAD_HALF, 12),
        equal(u32::from(IPV4), 0, 6),
        load(LOAD_BYTE, 23),
        equal(UDP, 1, 0),
        equal(TCP, 0, 10),
        load(INDEX_IPV4_HEADER, 14),
        load(LOAD_HALF_AT_INDEX, 16),
        equal(port, 6, 7),
        equal(u32::from(IPV6), 0, 6),
        load(LOAD_BYTE, 20),
        equal(UDP, 1, 0),
        equal(TCP, 0, 3),
        load(LOAD_HALF, 56),
        equal(port, 0, 1),
        give(ACCEPT),
        give(0),
    ]
}

/// Replaces the socket's filter, in one step.
pub(super) fn attach(socket: &Socket, program: &[Instruction]) -> io::Result<()> {
    let instruction = |i: &Instruction| SockFilter::new(i.code, i.then, i.otherwise, i.value);
    socket.attach_filter(&program.iter().map(instruction).collect::<Vec<_>>())
}

fn load(code: u16, offset: u32) -> Instruction {
    Instruction {
        code,
        then: 0,
        otherwise: 0,
        value: offset,
    }
}

fn equal(value: u32, then: u8, otherwise: u8) -> Instruction {
    Instruction {
        code: JUMP_EQUAL,
        then,
        otherwise,
        value,
    }
}

fn give(bytes: u32) -> Instruction {
    Instruction {
        code: RETURN,
        then: 0,
        otherwise: 0,
        value: bytes,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::watch::frame::{Kind, parse};

    const GUEST: Mac = Mac([0x0a, 0x58, 0x0a, 0x80, 0x01, 0x0a]);

    /// What the kernel would do; a load beyond the frame gives up on it.
    fn accepts(program: &[Instruction], frame: &[u8], packet_type: u8) -> bool {
        let mut accumulator = 0;
        let mut index = 0;
        let mut at = 0;
        loop {
            let Instruction {
                code,
                then,
                otherwise,
                value,
            } = program[at];
            at += 1;
            let bytes_at = |value: u32, count: usize| {
                let start = usize::try_from(value).expect("64 bits");
                let loaded = frame.get(start..start + count)?;
                Some(
                    loaded
                        .iter()
                        .fold(0, |number, &byte| number << 8 | u32::from(byte)),
                )
            };
            let bytes = |count: usize| bytes_at(value, count);
            let loaded = match code {
                INDEX_IPV4_HEADER => {
                    let Some(byte) = bytes(1) else { return false };
                    index = (byte & 0xf) * 4;
                    continue;
                }
                LOAD_HALF_AT_INDEX => bytes_at(value + index, 2),
                RETURN => return value > 0,
                JUMP_EQUAL => {
                    at += usize::from(if accumulator == value {
                        then
                    } else {
                        otherwise
                    });
                    continue;
                }
                LOAD_WORD if value == PACKET_TYPE => Some(u32::from(packet_type)),
                LOAD_WORD => bytes(4),
                LOAD_HALF => bytes(2),
                LOAD_BYTE => bytes(1),
                other => panic!("code {other:#x} is not used"),
            };
            let Some(loaded) = loaded else { return false };
            accumulator = loaded;
        }
    }

    fn frame() -> impl Strategy<Value = Vec<u8>> {
        let source = prop_oneof![Just(GUEST.0), any::<[u8; 6]>()];
        let ethertype = prop::sample::select(vec![ARP, RARP, IPV6, 0x0800, 0x88cc]);
        (
            source,
            ethertype,
            prop::collection::vec(any::<u8>(), 46..100),
            any::<bool>(),
        )
            .prop_map(|(source, ethertype, mut payload, advertisement)| {
                if advertisement {
                    payload[6] = 58;
                    payload[40] = 136;
                }
                [&[0xff; 6][..], &source, &ethertype.to_be_bytes(), &payload].concat()
            })
    }

    /// A frame of a protocol over IPv4 with options of this many words, or over IPv6, to a port.
    fn packet(v6: bool, options: u8, protocol: u8, port: u16) -> Vec<u8> {
        let (ethertype, header) = if v6 {
            let mut header = vec![0; 40];
            header[0] = 0x60;
            header[6] = protocol;
            (IPV6, header)
        } else {
            let mut header = vec![0; 20 + 4 * usize::from(options)];
            header[0] = 0x45 + options;
            header[9] = protocol;
            (IPV4, header)
        };
        let transport = [
            0x13,
            0x88,
            port.to_be_bytes()[0],
            port.to_be_bytes()[1],
            0,
            8,
            0,
            0,
        ];
        [&[0; 12][..], &ethertype.to_be_bytes(), &header, &transport].concat()
    }

    proptest! {
        #[test]
        fn a_port_is_found_in_both_families_and_both_protocols(
            v6 in any::<bool>(),
            options in 0..=10_u8,
            protocol in prop::sample::select(vec![6, 17, 1, 58, 132]),
            port in 6_990..7_010_u16,
        ) {
            let frame = packet(v6, options, protocol, port);
            let wanted = port == 7_001 && matches!(protocol, 6 | 17);
            prop_assert_eq!(accepts(&to_port(7_001), &frame, 0), wanted);
        }

        #[test]
        fn lets_pass_what_is_told(
            frame in frame(),
            only in any::<bool>(),
            incoming in any::<bool>(),
            outgoing in any::<bool>(),
            out in any::<bool>(),
        ) {
            let program = interesting(only.then_some(GUEST), Unseen { incoming, outgoing });
            let parsed = parse(&frame).expect("a whole header");
            let unseen = if out { outgoing } else { incoming };
            let passes = accepts(&program, &frame, if out { OUTGOING } else { 0 });
            if only && parsed.source != GUEST {
                prop_assert!(!passes);
            } else if unseen || parsed.kind.is_announcement() {
                prop_assert!(passes);
            } else if matches!(parsed.kind, Kind::Ipv4 | Kind::Other) {
                prop_assert!(!passes);
            }
        }
    }
}
