//! What goes over the wire: one UDP packet format and the first bytes of a TCP connection.
//!
//! All integers are big-endian. Every packet starts with
//!
//! | offset | bytes | field |
//! | --- | --- | --- |
//! | 0 | 4 | magic `DPPB` |
//! | 4 | 1 | version, [`VERSION`] |
//! | 5 | 1 | kind |
//! | 6 | 2 | zero |
//! | 8 | 8 | session, random, drawn by the client |
//!
//! Packets of data go on with the sequence number (8), the sender's `CLOCK_MONOTONIC` time at which it meant to send
//! (8, ns), and how late it did (4, µs; then 4 of zero). Those from the reflector end with what it has received so
//! far (see [`Received`]): packets received (8), the highest sequence number (8), and three ages in µs (4 each; then 4
//! of zero). What follows is padding.
//!
//! Whatever does not have magic, version, a known kind and the session at hand is foreign: it is counted as such and
//! never as received.

use thiserror::Error;

/// The version of the packets and of the control channel.
pub const VERSION: u8 = 1;
/// The smallest packet of data, and so the smallest size that can be asked for.
pub const MIN_PACKET: usize = 72;
/// The largest packet, so that a 9,000-byte MTU can be exercised but a length never overflows a datagram.
pub const MAX_PACKET: usize = 9000;
/// Length of what opens a TCP connection.
pub const GREETING: usize = 16;
/// An age that says "there was none".
const NO_AGE: u32 = u32::MAX;

const MAGIC: u32 = u32::from_be_bytes(*b"DPPB");
const HEADER: usize = 16;
const DATA: usize = 40;

/// Why bytes are not a packet of this program.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum Malformed {
    /// Shorter than its kind must be.
    #[error("{got} bytes where at least {needed} are needed")]
    Short {
        /// How long it is.
        got: usize,
        /// How long it must be.
        needed: usize,
    },
    /// The first four bytes are not the magic.
    #[error("no dataplane-probe magic")]
    Magic,
    /// A version that this program does not speak.
    #[error("version {0} where {VERSION} is spoken; run the same dataplane-probe on both sides")]
    Version(u8),
    /// A kind that this version does not have.
    #[error("unknown kind {0}")]
    Kind(u8),
}

/// A UDP packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Packet {
    /// The session it belongs to.
    pub session: u64,
    /// What it says.
    pub body: Body,
}

/// What a UDP packet says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Body {
    /// Client to reflector: are you there, and may UDP pass?
    Hello,
    /// Reflector to client: yes.
    Welcome,
    /// Client to reflector.
    ToVm(Data),
    /// Reflector to client.
    FromVm(Data, Received),
}

/// Sequence number and time of a packet of data.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Data {
    /// Counts from 0 in each direction.
    pub sequence: u64,
    /// When it was meant to be sent, on the sender's `CLOCK_MONOTONIC`.
    pub intended_ns: u64,
    /// How much later it was handed to the kernel, saturating.
    pub late_us: u32,
}

/// What the reflector has received, as of the moment the packet that carries it was sent.
///
/// Ages, not times: the reflector's clock cannot be compared with the client's.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Received {
    /// Different sequence numbers received.
    pub count: u64,
    /// The highest of them; 0 when there is none.
    pub highest: u64,
    /// How long ago the newest arrival was.
    pub last_age_us: Option<u32>,
    /// How long ago the first arrival since the previous packet was sent was; none if none arrived since.
    pub first_new_age_us: Option<u32>,
    /// The longest pause between two arrivals since the previous packet was sent; 0 with fewer than two.
    pub inner_gap_us: u32,
}

/// What a TCP connection is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// One request and one response, see [`crate::control`].
    Control,
    /// Everything is echoed until the client closes.
    Stream,
    /// The greeting is echoed, then the connection closes.
    Connect,
}

/// The first bytes of a TCP connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Greeting {
    /// What the connection is for.
    pub role: Role,
    /// The session it belongs to.
    pub session: u64,
}

impl Packet {
    /// Writes the packet into `buffer`, padded with zeroes to its whole length.
    ///
    /// # Panics
    /// Never: what does not fit into a buffer shorter than [`MIN_PACKET`] is cut off, and decodes as [`Malformed`].
    pub fn encode(&self, buffer: &mut [u8]) {
        let mut bytes = [0; MIN_PACKET];
        let kind = match self.body {
            Body::Hello => 1,
            Body::Welcome => 2,
            Body::ToVm(_) => 3,
            Body::FromVm(..) => 4,
        };
        header(&mut bytes, kind, self.session);
        match &self.body {
            Body::Hello | Body::Welcome => {}
            Body::ToVm(data) => data.encode(&mut bytes),
            Body::FromVm(data, received) => {
                data.encode(&mut bytes);
                received.encode(&mut bytes);
            }
        }
        let length = buffer.len().min(MIN_PACKET);
        buffer[..length].copy_from_slice(&bytes[..length]);
        buffer[length..].fill(0);
    }

    /// Reads a packet.
    pub fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let (kind, session) = parse_header(bytes)?;
        let needed = match kind {
            1 | 2 => HEADER,
            3 => DATA,
            4 => MIN_PACKET,
            other => return Err(Malformed::Kind(other)),
        };
        if bytes.len() < needed {
            return Err(Malformed::Short {
                got: bytes.len(),
                needed,
            });
        }
        let body = match kind {
            1 => Body::Hello,
            2 => Body::Welcome,
            3 => Body::ToVm(Data::decode(bytes)),
            _ => Body::FromVm(Data::decode(bytes), Received::decode(bytes)),
        };
        Ok(Self { session, body })
    }
}

impl Data {
    fn encode(&self, bytes: &mut [u8; MIN_PACKET]) {
        bytes[16..24].copy_from_slice(&self.sequence.to_be_bytes());
        bytes[24..32].copy_from_slice(&self.intended_ns.to_be_bytes());
        bytes[32..36].copy_from_slice(&self.late_us.to_be_bytes());
    }

    fn decode(bytes: &[u8]) -> Self {
        Self {
            sequence: u64_at(bytes, 16),
            intended_ns: u64_at(bytes, 24),
            late_us: u32_at(bytes, 32),
        }
    }
}

impl Received {
    fn encode(&self, bytes: &mut [u8; MIN_PACKET]) {
        bytes[40..48].copy_from_slice(&self.count.to_be_bytes());
        bytes[48..56].copy_from_slice(&self.highest.to_be_bytes());
        bytes[56..60].copy_from_slice(&self.last_age_us.unwrap_or(NO_AGE).to_be_bytes());
        bytes[60..64].copy_from_slice(&self.first_new_age_us.unwrap_or(NO_AGE).to_be_bytes());
        bytes[64..68].copy_from_slice(&self.inner_gap_us.to_be_bytes());
    }

    fn decode(bytes: &[u8]) -> Self {
        let age = |offset| Some(u32_at(bytes, offset)).filter(|&age| age != NO_AGE);
        Self {
            count: u64_at(bytes, 40),
            highest: u64_at(bytes, 48),
            last_age_us: age(56),
            first_new_age_us: age(60),
            inner_gap_us: u32_at(bytes, 64),
        }
    }
}

impl Greeting {
    /// The bytes that open the connection.
    pub fn encode(&self) -> [u8; GREETING] {
        let mut bytes = [0; GREETING];
        let kind = match self.role {
            Role::Control => 16,
            Role::Stream => 17,
            Role::Connect => 18,
        };
        header(&mut bytes, kind, self.session);
        bytes
    }

    /// Reads the bytes that open a connection.
    pub fn decode(bytes: &[u8; GREETING]) -> Result<Self, Malformed> {
        let (kind, session) = parse_header(bytes)?;
        let role = match kind {
            16 => Role::Control,
            17 => Role::Stream,
            18 => Role::Connect,
            other => return Err(Malformed::Kind(other)),
        };
        Ok(Self { role, session })
    }
}

fn header(bytes: &mut [u8], kind: u8, session: u64) {
    bytes[..4].copy_from_slice(&MAGIC.to_be_bytes());
    bytes[4] = VERSION;
    bytes[5] = kind;
    bytes[8..16].copy_from_slice(&session.to_be_bytes());
}

fn parse_header(bytes: &[u8]) -> Result<(u8, u64), Malformed> {
    if bytes.len() < HEADER {
        return Err(Malformed::Short {
            got: bytes.len(),
            needed: HEADER,
        });
    }
    if u32_at(bytes, 0) != MAGIC {
        return Err(Malformed::Magic);
    }
    if bytes[4] != VERSION {
        return Err(Malformed::Version(bytes[4]));
    }
    Ok((bytes[5], u64_at(bytes, 8)))
}

/// The callers have checked the length; bytes that are not there read as zero rather than panic.
fn u64_at(bytes: &[u8], offset: usize) -> u64 {
    bytes
        .get(offset..)
        .and_then(<[u8]>::first_chunk)
        .map_or(0, |chunk| u64::from_be_bytes(*chunk))
}

fn u32_at(bytes: &[u8], offset: usize) -> u32 {
    bytes
        .get(offset..)
        .and_then(<[u8]>::first_chunk)
        .map_or(0, |chunk| u32::from_be_bytes(*chunk))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn data() -> impl Strategy<Value = Data> {
        any::<(u64, u64, u32)>().prop_map(|(sequence, intended_ns, late_us)| Data {
            sequence,
            intended_ns,
            late_us,
        })
    }

    fn age() -> impl Strategy<Value = Option<u32>> {
        prop::option::of(0..NO_AGE)
    }

    fn packet() -> impl Strategy<Value = Packet> {
        let received = (any::<(u64, u64, u32)>(), age(), age()).prop_map(
            |((count, highest, inner_gap_us), last_age_us, first_new_age_us)| Received {
                count,
                highest,
                last_age_us,
                first_new_age_us,
                inner_gap_us,
            },
        );
        let body = prop_oneof![
            Just(Body::Hello),
            Just(Body::Welcome),
            data().prop_map(Body::ToVm),
            (data(), received).prop_map(|(data, received)| Body::FromVm(data, received)),
        ];
        (any::<u64>(), body).prop_map(|(session, body)| Packet { session, body })
    }

    proptest! {
        #[test]
        fn reads_what_it_writes(packet in packet(), size in MIN_PACKET..2000) {
            let mut buffer = vec![0xff; size];
            packet.encode(&mut buffer);
            prop_assert_eq!(Packet::decode(&buffer), Ok(packet));
        }

        #[test]
        fn a_truncated_packet_is_refused_and_nothing_panics(packet in packet(), keep in 0..MIN_PACKET) {
            let mut buffer = vec![0; MIN_PACKET];
            packet.encode(&mut buffer);
            let needed = match packet.body {
                Body::Hello | Body::Welcome => HEADER,
                Body::ToVm(_) => DATA,
                Body::FromVm(..) => MIN_PACKET,
            };
            prop_assert_eq!(Packet::decode(&buffer[..keep]).is_ok(), keep >= needed);
        }

        #[test]
        fn random_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = Packet::decode(&bytes);
        }

        #[test]
        fn random_bytes_behind_a_good_header_never_panic(
            kind in any::<u8>(),
            bytes in prop::collection::vec(any::<u8>(), 0..200),
        ) {
            let mut packet = vec![0; HEADER];
            header(&mut packet, kind, 7);
            packet.extend(bytes);
            match Packet::decode(&packet) {
                Ok(packet) => prop_assert_eq!(packet.session, 7),
                Err(error) => prop_assert!(!matches!(error, Malformed::Magic | Malformed::Version(_))),
            }
        }

        #[test]
        fn another_magic_or_version_is_foreign(packet in packet(), byte in 0_usize..5, flip in 1_u8..) {
            let mut buffer = vec![0; MIN_PACKET];
            packet.encode(&mut buffer);
            buffer[byte] ^= flip;
            prop_assert!(Packet::decode(&buffer).is_err());
        }

        #[test]
        fn greetings_survive_and_random_ones_never_panic(session in any::<u64>(), bytes in any::<[u8; GREETING]>()) {
            for role in [Role::Control, Role::Stream, Role::Connect] {
                let greeting = Greeting { role, session };
                prop_assert_eq!(Greeting::decode(&greeting.encode()), Ok(greeting));
            }
            let _ = Greeting::decode(&bytes);
        }
    }
}
