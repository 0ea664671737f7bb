//! The flows of a migration or a measurement, each on its own.

use std::net::{IpAddr, SocketAddr};

use serde::{Deserialize, Serialize};

use super::{Direction, NewConnections, Tcp};
use crate::scenario::{Family, Opener, Peer};

/// One flow between a VM and a peer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Flow {
    /// Its name; `east-west` is the primary flow, whose figures the migration bears as well.
    pub name: String,
    /// Who is at its other end.
    pub peer: Peer,
    /// Who opens it.
    pub opened_by: Opener,
    /// Where it is opened to: the VM, a gateway's load balancer, or the peer that the VM calls.
    pub target: SocketAddr,
    /// Address family.
    pub family: Family,
    /// Packets towards the VM.
    pub to_vm: Direction,
    /// Packets from the VM.
    pub from_vm: Direction,
    /// The long TCP stream.
    pub tcp: Tcp,
    /// From when the guest resumed to the last data of a stream that broke, in milliseconds: below
    /// zero if it did not outlive the pause. Null where it survived, or nothing resumed.
    pub tcp_lived_ms: Option<f64>,
    /// New TCP connections.
    pub new_connections: NewConnections,
    /// Where the VM opens the flow: the addresses that its peer heard it from, in the order in which
    /// they appeared.
    pub heard_from: Vec<IpAddr>,
    /// Why the figures are not the network's: the guest or the client did not keep up. Empty when valid.
    pub invalid: Vec<String>,
}

/// A flow that must never pass.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Forbidden {
    /// Its name.
    pub name: String,
    /// Who tries.
    pub peer: Peer,
    /// Where to.
    pub target: SocketAddr,
    /// While the VM's ACLs forbade it.
    pub tried: Tried,
    /// The same before there were any: that the probe would see it if it passed.
    pub proof: Tried,
}

/// What was tried, and what came through.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tried {
    /// UDP packets sent.
    pub sent: u64,
    /// TCP connections attempted.
    pub attempted: u64,
    /// Packets of either kind that came to the guest's taps.
    pub reached: u64,
    /// UDP packets and TCP connections that were answered, be it by a refusal.
    pub answered: u64,
}

/// The guest's entry for its gateway.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GatewayEntry {
    /// The gateway's address.
    pub address: IpAddr,
    /// Its Ethernet address before the migration; null where the guest had none.
    pub before: Option<String>,
    /// Its Ethernet address after.
    pub after: Option<String>,
}
