//! What a captured frame carries between the probe and its reflector.

use dataplane_probe::wire::{Malformed, Packet};
use thiserror::Error;

use super::pcap::{Link, Record};
use crate::lab::REFLECTOR;

const UDP: u8 = 17;
const TCP: u8 = 6;

/// Captured with a snapshot length that leaves out what is needed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("record {0} has too little of its frame: capture with `-s 192` at least")]
pub struct TooShort(pub usize);

/// A frame between the probe and its reflector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Frame {
    /// When it passed, in nanoseconds of Unix time.
    pub at_ns: u64,
    /// It goes to the VM.
    pub to_vm: bool,
    /// It left the host where it was captured; unknown where the file does not tell.
    pub leaves: Option<bool>,
    pub carries: Carries,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Carries {
    /// A packet of the probe's.
    Packet(Packet),
    Segment(Segment),
}

/// What matters of a TCP segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Segment {
    /// The port of the VM's peer, which tells connections apart.
    pub peer_port: u16,
    /// Sequence number of the first byte of its payload.
    pub sequence: u32,
    /// It opens the connection.
    pub opens: bool,
    /// Bytes of payload.
    pub length: u32,
}

impl Frame {
    /// Reads a record; none if it is something else, as ARP or another program's packet.
    pub(super) fn of(link: Link, record: &Record<'_>) -> Result<Option<Self>, TooShort> {
        let (leaves, transport) = match dissect(link, record.bytes) {
            Some((leaves, Some(transport))) => (leaves, transport),
            None if record.cut => return Err(TooShort(record.number)),
            // Something else, and possibly malformed.
            _ => return Ok(None),
        };
        let (to_vm, peer_port) = match (transport.source, transport.destination) {
            (peer, REFLECTOR) => (true, peer),
            (REFLECTOR, peer) => (false, peer),
            _ => return Ok(None),
        };
        let carries = match transport.holds {
            Holds::Datagram(payload) => match Packet::decode(payload) {
                Ok(packet) => Carries::Packet(packet),
                Err(Malformed::Short { .. }) if record.cut => return Err(TooShort(record.number)),
                Err(_) => return Ok(None),
            },
            Holds::Segment {
                sequence,
                opens,
                length,
            } => Carries::Segment(Segment {
                peer_port,
                sequence,
                opens,
                length,
            }),
        };
        Ok(Some(Self {
            at_ns: record.at_ns,
            to_vm,
            leaves,
            carries,
        }))
    }
}

/// What is behind the headers of IP.
struct Transport<'a> {
    source: u16,
    destination: u16,
    holds: Holds<'a>,
}

enum Holds<'a> {
    Datagram(&'a [u8]),
    Segment {
        sequence: u32,
        opens: bool,
        length: u32,
    },
}

/// Whether a frame leaves its host, if that is told, and what it carries, if that is UDP or TCP.
/// None where bytes are missing.
fn dissect(link: Link, bytes: &[u8]) -> Option<(Option<bool>, Option<Transport<'_>>)> {
    /// `PACKET_OUTGOING`, packet(7).
    const OUTGOING: u8 = 4;
    let (leaves, ethertype, packet) = match link {
        Link::Ethernet => (None, u16_at(bytes, 12)?, bytes.get(14..)?),
        Link::Sll2 => {
            let leaves = *bytes.get(10)? == OUTGOING;
            (Some(leaves), u16_at(bytes, 0)?, bytes.get(20..)?)
        }
    };
    // Total lengths, not those captured: a snapshot has less, and short Ethernet frames are padded.
    let (protocol, header, total) = match ethertype {
        0x0800 => {
            let header = usize::from(packet.first()? & 0xf) * 4;
            (*packet.get(9)?, header, usize::from(u16_at(packet, 2)?))
        }
        // The probe has no extension headers.
        0x86dd => (*packet.get(6)?, 40, 40 + usize::from(u16_at(packet, 4)?)),
        _ => return Some((leaves, None)),
    };
    let inner = packet.get(header..)?;
    let length = total.saturating_sub(header);
    let holds = match protocol {
        UDP => Holds::Datagram(inner.get(8..length.min(inner.len()))?),
        TCP => {
            const SYN: u8 = 2;
            let data = usize::from(inner.get(12)? >> 4) * 4;
            Holds::Segment {
                sequence: u32::from_be_bytes(*inner.get(4..)?.first_chunk()?),
                opens: inner.get(13)? & SYN != 0,
                length: u32::try_from(length.saturating_sub(data)).ok()?,
            }
        }
        _ => return Some((leaves, None)),
    };
    let transport = Transport {
        source: u16_at(inner, 0)?,
        destination: u16_at(inner, 2)?,
        holds,
    };
    Some((leaves, Some(transport)))
}

fn u16_at(bytes: &[u8], offset: usize) -> Option<u16> {
    let two = bytes.get(offset..)?.first_chunk()?;
    Some(u16::from_be_bytes(*two))
}
