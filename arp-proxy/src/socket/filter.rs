//! What the kernel lets through, in classic BPF (`bpf(4)`, `linux/filter.h`).
//!
//! Offsets are those of a frame without a tag, which the kernel has taken off by then; a second one is still there. A
//! load from beyond a frame's end drops the frame.

use std::io;

use socket2::{SockFilter, Socket};

// Codes are as in linux/filter.h, where an instruction's is 16 bits; libc has the parts as 32.

/// BPF_LD | BPF_W | BPF_ABS: four bytes at an offset, into the accumulator.
pub const LOAD_WORD: u16 = 0x20;
/// BPF_LD | BPF_H | BPF_ABS: two bytes.
pub const LOAD_HALF: u16 = 0x28;
/// BPF_LD | BPF_B | BPF_ABS: one byte.
pub const LOAD_BYTE: u16 = 0x30;
/// BPF_LD | BPF_H | BPF_IND: two bytes at an offset from the index.
pub const LOAD_HALF_INDEXED: u16 = 0x48;
/// BPF_LD | BPF_B | BPF_IND: one byte.
pub const LOAD_BYTE_INDEXED: u16 = 0x50;
/// BPF_LDX | BPF_W | BPF_IMM: the index becomes the value.
pub const SET_INDEX: u16 = 0x01;
/// BPF_MISC | BPF_TAX: the index becomes the accumulator.
pub const INDEX_ACCUMULATOR: u16 = 0x07;
/// BPF_JMP | BPF_JEQ | BPF_K: whether the accumulator is the value.
pub const JUMP_EQUAL: u16 = 0x15;
/// BPF_JMP | BPF_JEQ | BPF_X: whether the accumulator is the index.
pub const JUMP_EQUAL_INDEX: u16 = 0x1d;
/// BPF_JMP | BPF_JGE | BPF_K: whether the accumulator is the value or more.
pub const JUMP_AT_LEAST: u16 = 0x35;
/// BPF_JMP | BPF_JSET | BPF_K: whether the accumulator has any of the value's bits.
pub const JUMP_ANY_BIT: u16 = 0x45;
/// BPF_RET | BPF_K: so many bytes of the frame are let through.
pub const RETURN: u16 = 0x06;

/// Where the kernel shows a frame's `sll_pkttype`, to [`LOAD_WORD`]: SKF_AD_OFF + SKF_AD_PKTTYPE.
pub const PACKET_TYPE: u32 = 0xffff_f000 + 4;
/// Where it shows whether it took a VLAN tag off: SKF_AD_OFF + SKF_AD_VLAN_TAG_PRESENT.
pub const TAG_PRESENT: u32 = 0xffff_f000 + 48;
/// Where it shows a random number, another one for every load: SKF_AD_OFF + SKF_AD_RANDOM.
pub const RANDOM: u32 = 0xffff_f000 + 56;
/// The type of a packet that this host sends.
pub const OUTGOING: u32 = libc::PACKET_OUTGOING as u32;
/// The whole frame; the socket's buffer cuts it.
pub const ACCEPT: u32 = u32::MAX;
/// None of it.
pub const DROP: u32 = 0;

const ETHERTYPE: u32 = 12;
const TAG: u32 = 4;
const ARP: u32 = 0x0806;
const IPV6: u32 = 0x86dd;
const CUSTOMER: u32 = 0x8100;
const PROVIDER: u32 = 0x88a8;
/// IPv6: the next header, and the type of an ICMPv6 message right behind.
const NEXT_HEADER: u32 = 20;
const ICMPV6_TYPE: u32 = 54;
const ICMPV6: u32 = 58;
const ROUTER_SOLICITATION: u32 = 133;
const NEIGHBOUR_SOLICITATION: u32 = 135;
const NEIGHBOUR_ADVERTISEMENT: u32 = 136;

/// An instruction of a filter.
#[derive(Debug, Clone, Copy)]
pub struct Instruction {
    code: u16,
    then: u8,
    otherwise: u8,
    value: u32,
}

/// ARP, router and neighbour solicitations, and the advertisements that may be somebody's claim; with one tag or none.
pub(super) fn questions() -> Vec<Instruction> {
    vec![
        load(LOAD_WORD, PACKET_TYPE),
        equal(OUTGOING, 15, 0),
        load(SET_INDEX, 0),
        load(LOAD_HALF, ETHERTYPE),
        equal(CUSTOMER, 1, 0),
        equal(PROVIDER, 0, 1),
        load(SET_INDEX, TAG),
        load(LOAD_HALF_INDEXED, ETHERTYPE),
        equal(ARP, 7, 0),
        equal(IPV6, 0, 7),
        load(LOAD_BYTE_INDEXED, NEXT_HEADER),
        equal(ICMPV6, 0, 5),
        load(LOAD_BYTE_INDEXED, ICMPV6_TYPE),
        equal(ROUTER_SOLICITATION, 2, 0),
        equal(NEIGHBOUR_SOLICITATION, 1, 0),
        equal(NEIGHBOUR_ADVERTISEMENT, 0, 1),
        load(RETURN, ACCEPT),
        load(RETURN, DROP),
    ]
}

/// Sets the socket's filter, in one step.
pub fn attach(socket: &Socket, program: &[Instruction]) -> io::Result<()> {
    let instruction = |i: &Instruction| SockFilter::new(i.code, i.then, i.otherwise, i.value);
    socket.attach_filter(&program.iter().map(instruction).collect::<Vec<_>>())
}

/// Any instruction that does not jump.
pub fn load(code: u16, value: u32) -> Instruction {
    Instruction {
        code,
        then: 0,
        otherwise: 0,
        value,
    }
}

/// How many instructions to skip if the accumulator is `value`, and if not.
fn equal(value: u32, then: u8, otherwise: u8) -> Instruction {
    jump(JUMP_EQUAL, value, then, otherwise)
}

/// How many instructions to skip if what a jump's code asks is so, and if not.
pub fn jump(code: u16, value: u32, then: u8, otherwise: u8) -> Instruction {
    Instruction {
        code,
        then,
        otherwise,
        value,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::answer::samples::{self, Question};
    use crate::answer::{Ignored, decide};

    const HOST: u8 = 0;
    const OTHER_HOST: u8 = 3;

    /// What the kernel would do; a load beyond the frame gives up on it.
    fn accepts(frame: &[u8], packet_type: u8) -> bool {
        let program = questions();
        let (mut accumulator, mut index, mut at) = (0, 0, 0);
        loop {
            let Instruction {
                code,
                then,
                otherwise,
                value,
            } = program[at];
            at += 1;
            let bytes = |offset: u32, count: usize| {
                let start = usize::try_from(offset).expect("64 bits");
                let loaded = frame.get(start..start + count)?;
                let number = |number, &byte: &u8| number << 8 | u32::from(byte);
                Some(loaded.iter().fold(0, number))
            };
            let loaded = match code {
                RETURN => return value > 0,
                SET_INDEX => {
                    index = value;
                    continue;
                }
                JUMP_EQUAL => {
                    let skip = if accumulator == value {
                        then
                    } else {
                        otherwise
                    };
                    at += usize::from(skip);
                    continue;
                }
                LOAD_WORD if value == PACKET_TYPE => Some(u32::from(packet_type)),
                LOAD_HALF => bytes(value, 2),
                LOAD_HALF_INDEXED => bytes(index + value, 2),
                LOAD_BYTE_INDEXED => bytes(index + value, 1),
                other => panic!("code {other:#x} is not used"),
            };
            let Some(loaded) = loaded else { return false };
            accumulator = loaded;
        }
    }

    proptest! {
        #[test]
        fn what_is_answered_passes(question in samples::question(), inner in samples::tag()) {
            let gateway = samples::gateway();
            let frame = Question { tag: inner, ..question }.frame();
            prop_assert!(decide(&gateway, &frame, None).is_ok());
            prop_assert!(accepts(&frame, HOST));
            prop_assert!(accepts(&frame, OTHER_HOST));
        }

        #[test]
        fn what_this_host_sends_does_not(question in samples::question()) {
            let outgoing = u8::try_from(OUTGOING).expect("small");
            prop_assert!(!accepts(&question.frame(), outgoing));
        }

        /// Whatever it is, if the filter stops it there would have been no answer.
        #[test]
        fn what_is_stopped_has_no_answer(
            question in samples::question(),
            at in 0_usize..70,
            byte in any::<u8>(),
        ) {
            let mut frame = question.frame();
            if let Some(place) = frame.get_mut(at) {
                *place = byte;
            }
            let decision = decide(&samples::gateway(), &frame, None);
            if !accepts(&frame, HOST) {
                prop_assert!(!matches!(decision, Ok(_) | Err(Ignored::Conflict)), "{decision:?}");
            }
        }
    }

    #[test]
    fn ordinary_traffic_does_not() {
        let ipv4 = samples::ethernet(0x0800, &[0x45; 60]);
        let udp = samples::ethernet(0x86dd, &{
            let mut packet = [0; 60];
            packet[0] = 0x60;
            packet[6] = 17;
            packet
        });
        for frame in [ipv4, udp] {
            assert!(!accepts(&frame, HOST));
        }
    }
}
