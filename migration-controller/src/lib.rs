//! Hands the OVN ports of a KubeVirt virtual machine over to the node it migrates to.
//!
//! What to write next is [`handover`]'s business; this crate watches Kubernetes and OVN, puts what
//! it sees in front of [`handover::decide`], executes the write and keeps the record: the
//! [`Handover`](api::Handover) objects, Events, metrics.
//!
//! The binary is `migration-controller`; [`api`] and [`kubevirt`] are for other crates too.

mod agents;
pub mod api;
mod cli;
mod cluster;
pub mod crd;
mod http;
pub mod kubevirt;
mod metrics;
mod observe;
mod ovn;
mod policy;
mod reconcile;
mod routed;
mod run;

pub use cli::Cli;
pub use run::run;
