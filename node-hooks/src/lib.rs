//! segue's agent on a node: hears the hypervisor and the guest, opens the port at the pause, and
//! answers KubeVirt's question whether a migration may begin.
//!
//! Removing it costs milliseconds, never correctness: OVN's own activation opens the port without it.

pub mod announce;
mod cli;
pub mod core;
pub mod ear;
pub mod hook;
mod http;
pub mod metrics;
pub mod openflow;
pub mod ovs;
pub mod routes;
mod run;
pub mod signals;
pub mod time;
pub mod wire;

pub(crate) use arp_proxy::chain;
pub use cli::Cli;
pub use run::{Agent, run};
pub use time::Nanos;
