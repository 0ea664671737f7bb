//! Messages, as far as they matter here: how they are cut out of a stream, read and written.

use std::io;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use thiserror::Error;
use tokio_util::codec::Decoder;

use super::version::{Version, Versions};

/// Every message's header: version, type, length, transaction (OpenFlow 1.0, section 5.1).
const HEADER: usize = 8;
/// Behind it, of an answer in parts: type, flags, padding (OpenFlow 1.3, `ofp_multipart_reply`).
pub(super) const MULTIPART_REPLY_HEADER: usize = 8;

/// `OFPHET_VERSIONBITMAP`.
const VERSION_BITMAP: u16 = 1;
/// `OFP_NO_BUFFER`: the frame is in the message.
const NO_BUFFER: u32 = u32::MAX;
/// `OFPMT_OXM`.
const MATCH_OXM: u16 = 1;
/// `OXM_OF_IN_PORT`: class 0x8000, field 0, no mask, four bytes.
const OXM_IN_PORT: u32 = 0x8000_0004;
/// Of the one action that packet-outs have here.
const ACTION_LENGTH: u16 = 16;

/// Types that have the same number in every version.
pub(super) mod kind {
    pub(in crate::openflow) const HELLO: u8 = 0;
    pub(in crate::openflow) const ERROR: u8 = 1;
    pub(in crate::openflow) const ECHO_REQUEST: u8 = 2;
    pub(in crate::openflow) const ECHO_REPLY: u8 = 3;
    pub(in crate::openflow) const PACKET_OUT: u8 = 13;
    /// From 1.1 on.
    pub(in crate::openflow) const FLOW_MOD: u8 = 14;
    /// From 1.1 on.
    pub(in crate::openflow) const MULTIPART_REQUEST: u8 = 18;
    /// From 1.1 on.
    pub(in crate::openflow) const MULTIPART_REPLY: u8 = 19;
}

/// A message that came in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Message {
    pub(super) version: u8,
    /// `OFPT_*`.
    pub(super) kind: u8,
    pub(super) xid: u32,
    /// Behind the header.
    pub(super) body: Bytes,
}

/// Cuts a stream into messages.
#[derive(Debug, Default)]
pub(super) struct Codec;

/// What comes is not OpenFlow.
#[derive(Debug, Error)]
pub(super) enum FrameError {
    #[error("a message says that it is {0} bytes long, and its header is {HEADER}")]
    Length(u16),
    #[error(transparent)]
    Read(#[from] io::Error),
}

impl Decoder for Codec {
    type Item = Message;
    type Error = FrameError;

    fn decode(&mut self, bytes: &mut BytesMut) -> Result<Option<Message>, FrameError> {
        let Some(&[version, kind, high, low, a, b, c, d]) = bytes.first_chunk::<HEADER>() else {
            return Ok(None);
        };
        let length = u16::from_be_bytes([high, low]);
        let whole = usize::from(length);
        if whole < HEADER {
            return Err(FrameError::Length(length));
        }
        if bytes.len() < whole {
            bytes.reserve(whole - bytes.len());
            return Ok(None);
        }
        let mut body = bytes.split_to(whole);
        body.advance(HEADER);
        Ok(Some(Message {
            version,
            kind,
            xid: u32::from_be_bytes([a, b, c, d]),
            body: body.freeze(),
        }))
    }
}

impl Message {
    /// Which versions a hello offers. What comes behind something malformed in it does not count.
    pub(super) fn offers(&self) -> Versions {
        let mut elements = &*self.body;
        while let Some(&[a, b, c, d]) = elements.first_chunk::<4>() {
            let length = usize::from(u16::from_be_bytes([c, d]));
            let Some(content) = elements.get(4..length) else {
                break;
            };
            if u16::from_be_bytes([a, b]) == VERSION_BITMAP {
                // Versions from 32 on are in the words after the first.
                if let Some(bits) = content.first_chunk() {
                    return Versions::from_bits(u32::from_be_bytes(*bits));
                }
            }
            elements = elements
                .get(length.next_multiple_of(8)..)
                .unwrap_or_default();
        }
        Versions::up_to(self.version)
    }
}

/// `OFPT_BARRIER_REQUEST`: the types around it moved once.
pub(super) fn barrier_request(version: Version) -> u8 {
    match version {
        Version::V10 => 18,
        _ => 20,
    }
}

/// `OFPT_BARRIER_REPLY`.
pub(super) fn barrier_reply(version: Version) -> u8 {
    barrier_request(version) + 1
}

/// A hello of the newest version with a bitmap of all.
pub(super) fn put_hello(out: &mut BytesMut) {
    put_header(out, Version::V15, kind::HELLO, 8, 0);
    out.put_u16(VERSION_BITMAP);
    out.put_u16(8);
    out.put_u32(Versions::OURS.bits());
}

/// A message without a body.
pub(super) fn put_plain(out: &mut BytesMut, version: Version, kind: u8, xid: u32) {
    put_header(out, version, kind, 0, xid);
}

/// The answer to an echo request: what it had.
pub(super) fn put_echo_reply(out: &mut BytesMut, version: Version, request: &Message) {
    put_header(
        out,
        version,
        kind::ECHO_REPLY,
        request.body.len(),
        request.xid,
    );
    out.extend_from_slice(&request.body);
}

/// A packet-out of a frame as if it had come in by `in_port`, through all tables.
pub(super) fn put_packet_out(
    out: &mut BytesMut,
    version: Version,
    xid: u32,
    in_port: u16,
    frame: &[u8],
) {
    let fixed = match version {
        Version::V10 => 8,
        Version::V15 => 24,
        _ => 16,
    };
    let length = fixed + usize::from(ACTION_LENGTH) + frame.len();
    put_header(out, version, kind::PACKET_OUT, length, xid);
    out.put_u32(NO_BUFFER);
    match version {
        Version::V10 => {
            out.put_u16(in_port);
            out.put_u16(ACTION_LENGTH);
        }
        Version::V15 => {
            out.put_u16(ACTION_LENGTH);
            out.put_bytes(0, 2);
            put_match_in_port(out, in_port);
        }
        _ => {
            // Ordinary ports have the same numbers in 16 and in 32 bits.
            out.put_u32(in_port.into());
            out.put_u16(ACTION_LENGTH);
            out.put_bytes(0, 6);
        }
    }
    put_resubmit(out);
    out.extend_from_slice(frame);
}

/// An OXM match of a port that frames come in by: 12 bytes, padded to 16.
pub(super) fn put_match_in_port(out: &mut BytesMut, in_port: u16) {
    out.put_u16(MATCH_OXM);
    out.put_u16(12);
    out.put_u32(OXM_IN_PORT);
    out.put_u32(in_port.into());
    out.put_bytes(0, 4);
}

/// A message with this body.
pub(super) fn put(out: &mut BytesMut, version: Version, kind: u8, xid: u32, body: &[u8]) {
    put_header(out, version, kind, body.len(), xid);
    out.extend_from_slice(body);
}

/// What surrounds a frame in the longest form of a packet-out.
pub(super) const PACKET_OUT_OVERHEAD: usize = HEADER + 24 + ACTION_LENGTH as usize;

/// `resubmit(,0)`: through the tables from the first one on, in port as it is. A Nicira extension (`NXAST_RESUBMIT_TABLE`,
/// ovs-actions(7)), the same in every version, and what OVN's own pipeline goes on with behind an activation.
fn put_resubmit(out: &mut BytesMut) {
    const EXPERIMENTER: u16 = 0xffff;
    const NICIRA: u32 = 0x0000_2320;
    const RESUBMIT_TABLE: u16 = 14;
    const IN_PORT: u16 = 0xfff8;
    out.put_u16(EXPERIMENTER);
    out.put_u16(ACTION_LENGTH);
    out.put_u32(NICIRA);
    out.put_u16(RESUBMIT_TABLE);
    out.put_u16(IN_PORT);
    // The table, and padding.
    out.put_bytes(0, 4);
}

fn put_header(out: &mut BytesMut, version: Version, kind: u8, body: usize, xid: u32) {
    // Frames are bounded where they are taken in, echoes by the decoder.
    let length = u16::try_from(HEADER + body).unwrap_or(u16::MAX);
    out.put_u8(version.number());
    out.put_u8(kind);
    out.put_u16(length);
    out.put_u32(xid);
}

#[cfg(test)]
#[path = "message_tests.rs"]
mod tests;
