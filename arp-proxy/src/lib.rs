//! Answers ARP requests, neighbour solicitations and, if told to, router solicitations for a gateway that no host has,
//! and announces it.
//!
//! A machine with an address and nothing else (a /32, a /128) has its gateway at 169.254.1.1 and fe80::1, on a link
//! where nobody has these addresses. Somebody must say that they are at 0a:58:a9:fe:01:01, wherever the machine runs.
//!
//! - [`answer`] is the core: a frame in, an answer or the reason for none out.
//! - [`Proxy`] watches interfaces as they come and go, and answers on them.
//! - [`socket`] is the way to an interface's frames, for others who listen too.
//! - [`announce_once`] tells a link where the gateway is, when a machine has just come there, and [`announce_host`] where
//!   a machine is.
//! - [`ovs`] follows Open vSwitch's database.
//!
//! Linux only.

pub mod answer;
mod gateway;
mod limiter;
mod links;
mod metrics;
pub mod ovs;
mod port;
mod proxy;
mod select;
pub mod socket;

use std::error::Error;

pub use gateway::{Gateway, GatewayError, Prefix, PrefixError, Router};
/// A shell pattern, as in `tap*`.
pub use glob::Pattern;
pub use limiter::{Limiter, Limits};
pub use metrics::Metrics;
pub use ovs::Error as OvsError;
/// An Ethernet address.
pub use pnet_base::MacAddr as Mac;
pub use proxy::{
    AnnounceError, Announcer, Config, HostError, Proxy, StartError, State, announce_host,
    announce_once,
};
pub use select::Patterns;

/// An error with its causes, in a line.
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}
