//! What to measure, and why nothing could be.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;

use super::Callee;
use crate::pace::period_ns;
use crate::wire::{MAX_PACKET, MIN_PACKET};

/// The fastest rate that is offered, in packets a second.
pub const MAX_RATE_HZ: u32 = 10_000;

/// What to measure.
#[derive(Debug, Clone)]
pub struct Config {
    /// The reflector.
    pub target: SocketAddr,
    /// Have the reflector call there: its packets, the stream and the new connections come from the machine then, as
    /// they must where a NAT is in between. Only the session is controlled over connections to `target`. The reflector
    /// has to be [allowed to](crate::reflect::Config::may_call).
    pub called_at: Option<Arc<Callee>>,
    /// Packets a second, each direction, 1 to [`MAX_RATE_HZ`].
    pub rate_hz: u32,
    /// UDP payload of a packet, [`MIN_PACKET`] to [`MAX_PACKET`].
    pub packet_bytes: usize,
    /// How long; until [`Probe::finish`](super::Probe::finish) if none.
    pub duration: Option<Duration>,
    /// How long to try to reach the reflector before giving up.
    pub reach: Duration,
    /// How long to wait for packets after the last was sent. What arrives later counts as lost.
    pub drain: Duration,
    /// How long to ask for the reflector's account at the end, which the way there may be too broken for.
    pub account_timeout: Duration,
    /// Time between two records of the long stream; no stream if none.
    pub stream_every: Option<Duration>,
    /// Time between two new connections; no connections if none.
    pub connect_every: Option<Duration>,
    /// After this, counted from when it was due, a new connection has failed.
    pub connect_timeout: Duration,
    /// The run is invalid if the client was later than this with any packet.
    pub max_late: Duration,
    /// The run is invalid if the reflector was.
    pub max_late_reflector: Duration,
    /// Try for real-time priority.
    pub realtime: bool,
    /// Where to write every event as a line of JSON.
    pub events: Option<PathBuf>,
    /// Keep a [log](crate::packets) of every packet.
    pub log: bool,
}

/// Why nothing could be measured.
#[derive(Debug, Error)]
pub enum Error {
    /// A setting makes no sense.
    #[error("{0}")]
    Config(String),
    /// No reflector answers over TCP.
    #[error(
        "no reflector answered at {target} over TCP within {:.1} s ({reason}); check that `dataplane-probe reflect` runs \
         there with this port, that a route leads there (`ip route get {}`) and that TCP and UDP to the port are let \
         through", waited.as_secs_f64(), target.ip()
    )]
    Unreachable {
        /// The reflector.
        target: SocketAddr,
        /// For how long it was tried.
        waited: Duration,
        /// How the last attempt ended.
        reason: String,
    },
    /// TCP works, UDP does not.
    #[error(
        "the reflector at {target} answers over TCP, but no UDP packet came back within {:.1} s; check that UDP to port \
         {} is let through, and the answers back", waited.as_secs_f64(), target.port()
    )]
    UdpUnreachable {
        /// The reflector.
        target: SocketAddr,
        /// For how long it was tried.
        waited: Duration,
    },
    /// The reflector was told to call, and nothing came.
    #[error(
        "the reflector at {target} was told to call {at}, but no {what} came within {:.1} s; check that a route leads \
         there from its machine and that what comes there is let through", waited.as_secs_f64()
    )]
    NotCalled {
        /// The reflector.
        target: SocketAddr,
        /// Where it should have called.
        at: SocketAddr,
        /// What was missing.
        what: &'static str,
        /// For how long it was waited.
        waited: Duration,
    },
    /// The reflector does not want to.
    #[error("the reflector at {target} refuses: {reason}")]
    Refused {
        /// The reflector.
        target: SocketAddr,
        /// Its words.
        reason: String,
    },
    /// Something else answers there.
    #[error("what answers at {target} is not a dataplane-probe reflector: {reason}")]
    NotAReflector {
        /// The address.
        target: SocketAddr,
        /// What it did.
        reason: String,
    },
    /// A local resource is missing.
    #[error("cannot {doing}")]
    Local {
        /// What was tried.
        doing: String,
        /// The system's answer.
        source: io::Error,
    },
}

impl Config {
    /// 1 kHz and everything else at its default.
    pub fn new(target: SocketAddr) -> Self {
        Self {
            target,
            called_at: None,
            rate_hz: 1000,
            packet_bytes: 128,
            duration: None,
            reach: Duration::from_secs(5),
            drain: Duration::from_secs(2),
            account_timeout: Duration::from_secs(15),
            stream_every: Some(Duration::from_millis(10)),
            connect_every: Some(Duration::from_millis(50)),
            connect_timeout: Duration::from_secs(1),
            max_late: Duration::from_millis(10),
            max_late_reflector: Duration::from_millis(50),
            realtime: true,
            events: None,
            log: false,
        }
    }

    pub(super) fn check(&self) -> Result<(), Error> {
        let complain = |what: String| Err(Error::Config(what));
        if !(1..=MAX_RATE_HZ).contains(&self.rate_hz) {
            return complain(format!(
                "a rate of {} packets a second is not between 1 and {MAX_RATE_HZ}",
                self.rate_hz
            ));
        }
        if !(MIN_PACKET..=MAX_PACKET).contains(&self.packet_bytes) {
            return complain(format!(
                "{} bytes are not between {MIN_PACKET} and {MAX_PACKET}",
                self.packet_bytes
            ));
        }
        if self.target.port() == 0 || self.target.ip().is_unspecified() {
            return complain(format!(
                "{} is not an address that can be reached",
                self.target
            ));
        }
        let called_at = self.called_at.as_ref().map(|callee| callee.address());
        if let Some(at) = called_at
            && (at.ip().is_unspecified() || at.is_ipv4() != self.target.is_ipv4())
        {
            return complain(format!(
                "a reflector at {} cannot be told to call {at}",
                self.target
            ));
        }
        for (name, every) in [
            ("stream", self.stream_every),
            ("connections", self.connect_every),
        ] {
            if every.is_some_and(|every| every < Duration::from_millis(1)) {
                return complain(format!("the period of the {name} is below 1 ms"));
            }
        }
        Ok(())
    }

    pub(super) fn period_ns(&self) -> u64 {
        period_ns(self.rate_hz)
    }
}
