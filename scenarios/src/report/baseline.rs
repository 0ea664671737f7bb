//! What the first guest of a lab carries without a migration.

use serde::{Deserialize, Serialize};

use super::NewConnections;

/// The rate that the guest carries at ease, and that run's own figures: what they are without a migration.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Baseline {
    /// Packets a second, each way, over all flows of a VM together.
    pub rate_hz: u32,
    /// Processor time of the guest's processors, as a share of the time: 0 to 1 for each.
    pub guest_busy: f64,
    /// The longest gap towards the VM.
    pub to_vm_gap_ms: Option<f64>,
    /// The longest gap from the VM.
    pub from_vm_gap_ms: Option<f64>,
    /// The longest time without data on the long TCP stream, less one period.
    pub longest_tcp_stall_ms: f64,
    /// New TCP connections.
    pub new_connections: NewConnections,
    /// Why this rate was not carried at ease either; empty unless it is the lowest there is.
    #[serde(default)]
    pub not_at_ease: Vec<String>,
    /// Higher rates that were not carried at ease.
    #[serde(default)]
    pub refused: Vec<Refused>,
}

/// A rate that was not carried at ease.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refused {
    /// Packets a second, each way.
    pub rate_hz: u32,
    /// Why not.
    pub why: Vec<String>,
}
