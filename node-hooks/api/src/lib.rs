//! What segue's node agent and its controller say to each other over gRPC, and the service that
//! KubeVirt's virt-handler calls on a node.
//!
//! # Guarantees
//! - Agent and controller may differ by one [`REVISION`]: each says its own in its first message, a
//!   side knows what it must not ask of an older one, and what neither knows is skipped as protobuf
//!   does with unknown fields.

#[allow(
    missing_docs,
    unreachable_pub,
    clippy::all,
    clippy::pedantic,
    clippy::allow_attributes_without_reason,
    reason = "tonic generates it: documented in the .proto files, and not written to our lints"
)]
mod generated {
    pub mod agent {
        tonic::include_proto!("segue.agent.v1");
    }
    pub mod kubevirt {
        tonic::include_proto!("kubevirt.hooks.plugins.v1alpha1");
    }
}

pub use generated::{agent, kubevirt};

/// The revision of the agent's protocol that this code speaks.
pub const REVISION: u32 = 1;
/// The oldest revision of the other side that this code gets on with.
pub const OLDEST: u32 = 1;
