//! What a frame is answered with: the core, without I/O, time or state.
//!
//! # Guarantees
//! - An answer is only ever about an address of the gateway, and comes from the gateway's Ethernet address.
//! - It goes to the station that asked, as the frame names it, and to nobody else; to all nodes only where RFC 4861
//!   says so: the asker has no address yet.
//! - Answers and announcements are never answered, so that two proxies on one link cannot keep each other busy.
//! - No bytes, however wrong, cause a panic.

mod announce;
mod arp;
mod ethernet;
mod ndp;

use std::fmt;

use crate::{Gateway, Mac};
pub(crate) use announce::groups;
pub use announce::{advertisement, announcements, host_announcements};
pub use arp::is_ethernet_ipv4;
pub use ethernet::{Frame, Tag, Tags};
pub use ndp::{NeighbourAdvertisement, neighbour_advertised};

/// What a frame asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    /// Who has an IPv4 address (RFC 826, RFC 5227).
    Arp,
    /// Who has an IPv6 address (RFC 4861, section 4.3), or whether anybody has (RFC 4862).
    NeighbourSolicitation,
    /// Which routers there are (RFC 4861, section 4.1).
    RouterSolicitation,
}

/// A frame to send, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// What was asked.
    pub kind: Kind,
    /// The station that asked.
    pub asker: Mac,
    /// The answer, from the Ethernet header on, with the question's VLAN tags.
    pub frame: Vec<u8>,
}

/// Why there is no answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Ignored {
    /// It comes from the gateway's Ethernet address: this proxy's own frame come back, or another node's proxy.
    Own,
    /// It claims an address of the gateway for somebody else. Nothing is said against it: see the README.
    Conflict,
    /// It asks for an address that is not the gateway's.
    OtherAddress,
    /// It is for another station.
    OtherStation,
    /// It is no question: an answer, an announcement, other traffic.
    NoQuestion,
    /// It asks for routers, and the gateway does not advertise itself.
    NotARouter,
    /// It breaks a rule of its protocol.
    Malformed(Malformed),
}

/// The rule that a frame breaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Malformed {
    /// It ends too early, or a length in it says more than there is.
    Length,
    /// It is not of the version, or not about the kind of addresses, that its EtherType promises.
    Format,
    /// Its sender is no station's or no host's address.
    Sender,
    /// A hop limit other than 255: it has crossed a router, or wants to look as if it had not.
    HopLimit,
    /// Its checksum is wrong.
    Checksum,
    /// An ICMPv6 code other than 0.
    Code,
    /// It asks for a multicast address or tells where one is, or answers everybody at once.
    Target,
    /// An option has length 0, or reaches beyond the end.
    Options,
    /// It comes from the unspecified address and tells a link-layer address, or is not sent to a solicited-node address.
    Unspecified,
}

/// The answer to a frame as an interface received it: `bytes` from the Ethernet header on, and the tag that the kernel
/// took off, if any.
///
/// # Errors
/// Why there is none.
pub fn decide(gateway: &Gateway, bytes: &[u8], tag: Option<Tag>) -> Result<Answer, Ignored> {
    let frame = Frame::parse(bytes, tag).ok_or(Malformed::Length)?;
    if frame.source == gateway.mac() {
        return Err(Ignored::Own);
    }
    let (kind, destination, ethertype, payload) = if frame.is_arp() {
        let (destination, payload) = arp::answer(gateway, &frame)?;
        (Kind::Arp, destination, frame.ethertype, payload)
    } else if frame.is_ipv6() {
        let (kind, destination, payload) = ndp::answer(gateway, &frame)?;
        (kind, destination, frame.ethertype, payload)
    } else {
        return Err(Ignored::NoQuestion);
    };
    Ok(Answer {
        kind,
        asker: frame.source,
        frame: ethernet::build(destination, gateway.mac(), frame.tags, ethertype, &payload),
    })
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 3] = [
        Self::Arp,
        Self::NeighbourSolicitation,
        Self::RouterSolicitation,
    ];

    /// As metrics name it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Arp => "arp",
            Self::NeighbourSolicitation => "neighbour_solicitation",
            Self::RouterSolicitation => "router_solicitation",
        }
    }
}

impl Malformed {
    /// As metrics name it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Length => "length",
            Self::Format => "format",
            Self::Sender => "sender",
            Self::HopLimit => "hop_limit",
            Self::Checksum => "checksum",
            Self::Code => "code",
            Self::Target => "target",
            Self::Options => "options",
            Self::Unspecified => "unspecified",
        }
    }
}

impl From<Malformed> for Ignored {
    fn from(rule: Malformed) -> Self {
        Self::Malformed(rule)
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(self.name())
    }
}

#[cfg(test)]
pub(crate) mod samples;
#[cfg(test)]
mod tests;
