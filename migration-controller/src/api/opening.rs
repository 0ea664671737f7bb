use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Moment;

/// How the target's ports were opened when the guest paused, ahead of OVN's own activation.
///
/// The hops are what it took, in microseconds, in their order. A hop between two nodes has those
/// nodes' clocks in it, so it can be negative; absent is what nobody stamped.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct EarlyOpening {
    /// What came of it.
    pub result: OpeningResult,
    /// Why they are not open, where they are not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// When the guest paused, by its hypervisor's stamp.
    pub paused_at: Moment,
    /// From the pause to the source's agent learning of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub paused_to_seen_us: Option<i64>,
    /// From the pause to the controller hearing of it; the hop above is part of this one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub paused_to_heard_us: Option<i64>,
    /// From there to the target's agent having the order to open.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub heard_to_received_us: Option<i64>,
    /// From there to what opens the ports having been written to the switch.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub received_to_sent_us: Option<i64>,
    /// From there to the switch having processed it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sent_to_processed_us: Option<i64>,
}

/// What came of an early opening.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
pub enum OpeningResult {
    /// The target's agent was told to; it has not answered.
    Asked,
    /// The ports are open.
    Opened,
    /// No agent of the target's node was connected, or it was too slow: OVN's own activation does it.
    NoAgent,
    /// The target's agent knows of a newer handover, or heard of the pause when it was long over.
    Stale,
    /// The target's agent was not prepared for this handover.
    NotArmed,
    /// The target's agent tried in vain.
    Failed,
}
