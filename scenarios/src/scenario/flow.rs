//! What is watched while something happens.

use serde::{Deserialize, Serialize};

/// How a VM's peer on the same network sees it: the primary flow.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Probe {
    /// Most packets a second in each direction. All flows of a VM together get what its guest carries at ease on the machine,
    /// in proportion to this.
    pub rate_hz: u32,
    /// Address family. With both, IPv4 is the primary flow and IPv6 one more, at the rate of those.
    pub family: Family,
}

impl Default for Probe {
    fn default() -> Self {
        Self {
            rate_hz: 1_000,
            family: Family::Ipv4,
        }
    }
}

/// One more flow: packets both ways, a long TCP stream, new connections; all between the same two.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Flow {
    /// Its name, as in the report; of both families, `<name>-ipv4` and `<name>-ipv6`.
    pub name: String,
    /// Who is at its other end.
    #[serde(default)]
    pub peer: Peer,
    /// Who opens it: sends the first packet, and connects.
    #[serde(default)]
    pub opened_by: Opener,
    /// Which of the VM's ports it is with, from 0: the second is on a network that has the client only.
    #[serde(default)]
    pub port: u8,
    /// The node whose gateway's load balancer it goes through, like a NodePort, instead of to the
    /// VM's own address.
    #[serde(default)]
    pub through: Option<String>,
    /// Address family.
    #[serde(default)]
    pub family: Family,
    /// Most packets a second in each direction.
    #[serde(default = "rate_hz")]
    pub rate_hz: u32,
    /// It must never pass: packets, and attempts to connect, to a port that the VM's ACLs shut.
    #[serde(default)]
    pub forbidden: bool,
}

/// Enough to see an interruption to within 10 ms; emulated guests have the primary flow to carry.
fn rate_hz() -> u32 {
    100
}

/// Who is at the other end of a flow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Peer {
    /// The client on the VM's own network, or on that of another node: east-west.
    #[default]
    Client,
    /// A host that is not OVN's, behind the gateways: north-south.
    Outside,
}

impl Peer {
    /// The lab's host.
    pub fn host(self) -> &'static str {
        match self {
            Self::Client => "client",
            Self::Outside => "outside",
        }
    }
}

/// Who opens a flow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Opener {
    /// The peer.
    #[default]
    Peer,
    /// The VM.
    Vm,
}

/// Address family of a flow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Family {
    /// IPv4.
    #[default]
    Ipv4,
    /// IPv6.
    Ipv6,
    /// Both at once, each measured on its own.
    Dual,
}

impl Family {
    /// The families one by one.
    pub fn each(self) -> &'static [Self] {
        match self {
            Self::Ipv4 => &[Self::Ipv4],
            Self::Ipv6 => &[Self::Ipv6],
            Self::Dual => &[Self::Ipv4, Self::Ipv6],
        }
    }

    /// As in the names of flows.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ipv4 => "ipv4",
            Self::Ipv6 => "ipv6",
            Self::Dual => "dual",
        }
    }
}
