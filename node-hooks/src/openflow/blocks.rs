//! What OVN shuts a port with until it is activated, and how that is taken away.
//!
//! On a chassis that is not a port's first one, an activation strategy makes ovn-controller install flows of priority 1000
//! that do nothing, which is to drop: one in table 0 for all that comes in by the port, and one in the table that puts
//! frames out by it, ahead of the flow that does (OVN, controller/physical.c, `setup_activation_strategy_flows`, in older
//! releases `setup_rarp_activation_strategy`; these two are the only ones of this priority there). All flows of a port's
//! binding have one cookie: the first 32 bits of the binding's UUID. When a frame activates the port, ovn-controller
//! removes them, once its main loop gets to it: behind everything else that has changed on the chassis.
//!
//! They are found by what they are, not by where a release puts them, and removed by what was found: one that has become
//! another flow meanwhile stays. That ovn-controller removes them too a moment later changes nothing.

use bytes::{Buf, BufMut, Bytes, BytesMut};

use super::Error;
use super::message::{self, MULTIPART_REPLY_HEADER, kind};
use super::version::Version;

/// Of the flows that shut a port.
const PRIORITY: u16 = 1000;
/// Where frames come in (`OFTABLE_PHY_TO_LOG`, always 0).
const FIRST_TABLE: u8 = 0;
/// `OFPTT_ALL`.
const ALL_TABLES: u8 = 0xff;
/// `OFPMP_FLOW`, in 1.5 `OFPMP_FLOW_DESC`.
const FLOWS: u16 = 1;
/// `OFPFC_DELETE_STRICT`.
const DELETE_STRICT: u8 = 4;
/// `OFPP_ANY`, `OFPG_ANY`.
const ANY: u32 = u32::MAX;
/// `OFPMPF_REPLY_MORE`.
const MORE: u16 = 1;
/// A type and a length, before a match's fields.
const MATCH_HEADER: usize = 4;

/// A flow that shuts a port.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Block {
    table: u8,
    priority: u16,
    cookie: u64,
    /// `ofp_match`, with its padding.
    matched: Bytes,
}

impl Block {
    /// Whether it drops what comes in by the port, and not what goes out by it.
    pub(super) fn is_inward(&self) -> bool {
        self.table == FIRST_TABLE
    }
}

/// Which flows are asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wanted {
    /// Those of the first table for what comes in by a port.
    In(u16),
    /// Those of all tables with a cookie.
    With(u64),
}

/// A flow, as the switch describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Flow {
    block: Block,
    does_nothing: bool,
}

/// Whether this module knows how a version describes flows: with an OXM match (OpenFlow 1.3, 7.2.3) in answers of the
/// forms below.
pub(super) fn speaks(version: Version) -> bool {
    version >= Version::V13
}

/// Appends a request for flows.
pub(super) fn put_request(out: &mut BytesMut, version: Version, xid: u32, wanted: Wanted) {
    let mut body = BytesMut::with_capacity(64);
    body.put_u16(FLOWS);
    body.put_bytes(0, 6);
    let (table, cookie, mask, matched) = match wanted {
        Wanted::In(port) => (FIRST_TABLE, 0, 0, in_port(port)),
        Wanted::With(cookie) => (ALL_TABLES, cookie, u64::MAX, everything()),
    };
    body.put_u8(table);
    body.put_bytes(0, 3);
    body.put_u32(ANY);
    body.put_u32(ANY);
    body.put_bytes(0, 4);
    body.put_u64(cookie);
    body.put_u64(mask);
    body.extend_from_slice(&matched);
    message::put(out, version, kind::MULTIPART_REQUEST, xid, &body);
}

/// Appends the removal of a flow, if it is still the same.
pub(super) fn put_removal(out: &mut BytesMut, version: Version, xid: u32, block: &Block) {
    let mut body = BytesMut::with_capacity(64 + block.matched.len());
    body.put_u64(block.cookie);
    body.put_u64(u64::MAX);
    body.put_u8(block.table);
    body.put_u8(DELETE_STRICT);
    // Time-outs.
    body.put_bytes(0, 4);
    body.put_u16(block.priority);
    // No buffer, any port, any group; flags, and importance or padding.
    body.put_u32(ANY);
    body.put_u32(ANY);
    body.put_u32(ANY);
    body.put_bytes(0, 4);
    body.extend_from_slice(&block.matched);
    message::put(out, version, kind::FLOW_MOD, xid, &body);
}

/// Whether more of the answer is to come behind this part of it.
pub(super) fn has_more(part: &Bytes) -> bool {
    let flags = part.get(2..4).and_then(|flags| flags.first_chunk());
    flags.is_some_and(|flags| u16::from_be_bytes(*flags) & MORE != 0)
}

/// The cookie of the port's binding, if a flow of the first table shuts it.
pub(super) fn cookie(version: Version, parts: &[Bytes], port: u16) -> Result<Option<u64>, Error> {
    let shuts = |flow: &Flow| flow.shuts() && flow.block.matched == in_port(port);
    let flow = flows(version, parts)?.into_iter().find(shuts);
    // Flows that nobody gave a cookie are not OVN's.
    Ok(flow
        .map(|flow| flow.block.cookie)
        .filter(|&cookie| cookie != 0))
}

/// What shuts the port whose binding's flows these are.
pub(super) fn blocks(version: Version, parts: &[Bytes]) -> Result<Vec<Block>, Error> {
    let flows = flows(version, parts)?.into_iter();
    Ok(flows.filter(Flow::shuts).map(|flow| flow.block).collect())
}

impl Flow {
    fn shuts(&self) -> bool {
        self.does_nothing && self.block.priority == PRIORITY
    }
}

fn in_port(port: u16) -> Bytes {
    let mut matched = BytesMut::with_capacity(16);
    message::put_match_in_port(&mut matched, port);
    matched.freeze()
}

fn everything() -> Bytes {
    // An OXM match without a field.
    Bytes::from_static(&[0, 1, 0, 4, 0, 0, 0, 0])
}

fn flows(version: Version, parts: &[Bytes]) -> Result<Vec<Flow>, Error> {
    let mut flows = Vec::new();
    for part in parts {
        if part.len() < MULTIPART_REPLY_HEADER {
            return Err(malformed("its length"));
        }
        let mut rest = part.slice(MULTIPART_REPLY_HEADER..);
        while !rest.is_empty() {
            let length = rest.first_chunk().copied().map(u16::from_be_bytes);
            let length = usize::from(length.unwrap_or_default());
            // Also where it says that it is shorter than its own length.
            if length < 2 || length > rest.len() {
                return Err(malformed("its length"));
            }
            flows.push(flow(version, rest.split_to(length))?);
        }
    }
    Ok(flows)
}

/// One of an answer: `ofp_flow_stats`, in 1.5 `ofp_flow_desc`.
fn flow(version: Version, mut entry: Bytes) -> Result<Flow, Error> {
    let is_desc = version >= Version::V15;
    // How long what comes before the match is, and what is not looked at before table, priority and cookie.
    let (fixed, skipped) = if is_desc {
        (24, [4, 1, 8])
    } else {
        (48, [2, 9, 10])
    };
    if entry.len() < fixed {
        return Err(malformed("its length"));
    }
    let [before_table, before_priority, before_cookie] = skipped;
    let mut head = entry.split_to(fixed);
    head.advance(before_table);
    let table = head.get_u8();
    head.advance(before_priority);
    let priority = head.get_u16();
    head.advance(before_cookie);
    let cookie = head.get_u64();
    let matched = padded(&mut entry).ok_or_else(|| malformed("its match"))?;
    if is_desc {
        // `ofp_stats` has its length in the same place.
        padded(&mut entry).ok_or_else(|| malformed("its statistics"))?;
    }
    Ok(Flow {
        block: Block {
            table,
            priority,
            cookie,
            matched,
        },
        does_nothing: entry.is_empty(),
    })
}

/// Takes a structure whose second field is its length, and the padding to eight bytes behind it.
fn padded(bytes: &mut Bytes) -> Option<Bytes> {
    let length = bytes.get(2..4)?.first_chunk().copied()?;
    let length = usize::from(u16::from_be_bytes(length));
    let padded = length.next_multiple_of(8);
    (length >= MATCH_HEADER && padded <= bytes.len()).then(|| bytes.split_to(padded))
}

fn malformed(what: &str) -> Error {
    Error::Protocol(format!("a flow's description is wrong in {what}"))
}

#[cfg(test)]
#[path = "blocks_tests.rs"]
pub(super) mod tests;
