//! The control channel: one request and one response, each a line of JSON, per TCP connection.
//!
//! A connection per request, so that nothing depends on one surviving; and every request can be repeated, so that the
//! client may simply try again.

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

use crate::gaps::Interval;
use crate::ledger::Summary;
use crate::packets::RemoteLog;

/// The longest request a reflector reads.
pub const MAX_REQUEST: u64 = 4 << 10;
/// The longest response a client reads.
pub const MAX_RESPONSE: u64 = 4 << 20;

/// From the client.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case")]
pub enum Request {
    /// Begin a session; packets of no other are answered.
    Open {
        /// Random, drawn by the client.
        session: u64,
        /// Time between two packets, both directions.
        period_ns: u64,
        /// UDP payload of the reflector's packets.
        packet_bytes: usize,
        /// Keep a [log](crate::packets) of every packet.
        #[serde(default)]
        log: bool,
    },
    /// Call the client instead of being called: greet it from the reflector's own UDP port, and open the stream, once.
    Call {
        /// Which.
        session: u64,
        /// An address of the client's.
        to: SocketAddr,
        /// Open the stream.
        stream: bool,
        /// Once it sends, also open new connections.
        connections: Option<Connections>,
    },
    /// Begin to send.
    Start {
        /// Which.
        session: u64,
    },
    /// Stop sending, and tell what was sent and received.
    Finish {
        /// Which.
        session: u64,
        /// How many packets the client sent, so that a lost tail is counted.
        to_vm_sent: u64,
    },
    /// Tell of every packet, once the session has finished.
    Log {
        /// Which.
        session: u64,
    },
    /// Forget the session.
    Close {
        /// Which.
        session: u64,
    },
}

/// New connections that the reflector is to open.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Connections {
    /// Time between two.
    pub every_ns: u64,
    /// After this, one that was not answered has failed.
    pub timeout_ns: u64,
}

/// From the reflector.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "result", rename_all = "snake_case")]
pub enum Response {
    /// Done.
    Done,
    /// What was sent and received.
    Finished(Box<Finished>),
    /// Every packet that is kept; empty if the session was opened without a log.
    Log(RemoteLog),
    /// Refused, and why.
    Refused {
        /// A sentence.
        reason: String,
    },
}

/// What the reflector knows of a session. Times are on its own `CLOCK_MONOTONIC`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finished {
    /// Packets sent.
    pub from_vm_sent: u64,
    /// Packets that its kernel refused.
    pub send_errors: u64,
    /// Those of them that were no outage but a shortage of the reflector's own.
    pub shortages: u64,
    /// How late they were sent: pairs of µs and how often.
    pub lateness: Vec<(u64, u64)>,
    /// How often the schedule was moved on because the clock had jumped or nothing had run for long.
    pub rescheduled: u64,
    /// The longest of these.
    pub longest_reschedule_ns: u64,
    /// What was received.
    pub to_vm: Summary,
    /// Datagrams the receiving socket dropped since the session began (of any session).
    pub receiver_overflow: u64,
    /// Its clock.
    pub now_ns: u64,
    /// How long ago the newest packet arrived.
    pub last_age_ns: u64,
    /// How long ago the first packet arrived that is not accounted for in a packet sent; none if there is none.
    pub first_new_age_ns: Option<u64>,
    /// The longest interval between two of those.
    pub inner_gap_ns: u64,
    /// The longest intervals between arrivals.
    pub gaps: Vec<Interval>,
    /// Up to this length, intervals may be missing from `gaps`.
    pub unlogged_gap_ns: u64,
    /// Segments retransmitted on the stream so far; none if there was no stream.
    pub stream_retransmits: Option<u64>,
    /// The new connections it opened; none if it was to open none.
    pub connections: Option<Attempts>,
}

/// New connections that the reflector opened.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attempts {
    /// Connections attempted.
    pub attempted: u64,
    /// Those of which it is not known yet how they end.
    pub pending: u64,
    /// Not answered in time.
    pub timed_out: u64,
    /// Refused.
    pub refused: u64,
    /// Connected, then broken.
    pub reset: u64,
    /// Failed for any other reason.
    pub other: u64,
    /// An example of a failure.
    pub error: Option<String>,
}
