//! OpenFlow over a bridge's management socket, as far as opening a port takes it: hello, echo, packet-out, barrier,
//! and to find and remove the flows that shut it.
//!
//! - [`Switch`] is a connection, [`Keeper`] one that is kept.
//! - [`PacketOuts`] are frames that the switch is to take as if they had come in by a port, prepared ahead.
//! - [`Block`] is a flow that shuts a port until OVN activates it.
//! - [`rarp`] is the frame that opens a port in OVN.
//!
//! The source for the protocol are the OpenFlow Switch Specifications 1.0.0 to 1.5.1; for Open vSwitch's own ways its
//! ofproto/connmgr.c, vswitchd/bridge.c and lib/rconn.c. A bridge's `.mgmt` socket takes any version that the bridge's
//! `protocols` allow (by default 1.0 to 1.5), is always out of band, and sends nothing that was not asked for: a
//! connection to it gets no packet-ins or port statuses until it sets a miss length, which this one never does. After a
//! minute without a word it asks for an echo, and hangs up after another.

mod blocks;
mod keeper;
mod message;
mod packets;
mod refusal;
mod switch;
mod version;

use std::io;
use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;

pub use blocks::Block;
pub use keeper::{Keeper, State};
pub use packets::{PacketOuts, rarp};
pub use refusal::Refusal;
pub use switch::{Sent, Switch};
pub use version::{Version, Versions};

/// What goes wrong between here and a switch.
#[derive(Clone, Debug, Error)]
pub enum Error {
    /// There is no connection.
    #[error("cannot connect to {socket}: is the bridge there, and does ovs-vswitchd run?")]
    Connect {
        /// The socket.
        socket: String,
        /// Why not.
        source: Arc<io::Error>,
    },
    /// The switch says no hello.
    #[error(
        "{socket} takes connections and says nothing for {after:?}: ovs-vswitchd hangs, or it is no switch"
    )]
    NoHello {
        /// The socket.
        socket: String,
        /// How long it had.
        after: Duration,
    },
    /// Something else than a hello came first.
    #[error("{socket} is no OpenFlow switch: it begins with a message of type {kind}")]
    NoSwitch {
        /// The socket.
        socket: String,
        /// `OFPT_*`.
        kind: u8,
    },
    /// There is no version that both speak.
    #[error(
        "the switch speaks OpenFlow {theirs}, and this agent {}: allow one of these in the bridge's `protocols`",
        Versions::OURS
    )]
    Versions {
        /// What the switch offers.
        theirs: Versions,
    },
    /// The switch refuses the connection.
    #[error("the switch refuses the connection: {0}")]
    RefusedConnection(Refusal),
    /// The switch refuses a packet-out.
    #[error("the switch refuses a packet-out with in_port {in_port}: {refusal}")]
    RefusedPacketOut {
        /// The port that it was to come in by.
        in_port: u16,
        /// What the switch says.
        refusal: Refusal,
    },
    /// The switch refuses a barrier.
    #[error("the switch refuses a barrier: {0}")]
    RefusedBarrier(Refusal),
    /// The switch refuses a question.
    #[error("the switch refuses to tell about flows: {0}")]
    RefusedQuestion(Refusal),
    /// A port that no frame can come in by.
    #[error("{0} is no port's number: those of a switch's ports are 1 to {last}", last = packets::LAST_PORT)]
    Port(u32),
    /// A frame that does not fit.
    #[error("a frame of {0} bytes fits in no packet-out: {longest} are the most", longest = packets::LONGEST_FRAME)]
    Frame(usize),
    /// What comes from the switch is not OpenFlow.
    #[error("what the switch sends is not OpenFlow: {0}")]
    Protocol(String),
    /// The connection broke.
    #[error("the connection to the switch broke")]
    Lost(#[source] Arc<io::Error>),
    /// The switch hung up.
    #[error("the switch has closed the connection: ovs-vswitchd ended, or the bridge is gone")]
    Closed,
    /// The switch answers no more.
    #[error("the switch has not answered for {0:?}: ovs-vswitchd hangs")]
    Silent(Duration),
    /// The switch takes nothing, or answers nothing, of very much.
    #[error("the switch does not take or answer what it is sent: {0}")]
    Stuck(&'static str),
    /// A keeper has no connection at this moment.
    #[error("there is no connection to the switch{}", match .0 { Some(error) => format!(": {error}"), None => " yet".to_owned() })]
    Cold(Option<Arc<Error>>),
}
