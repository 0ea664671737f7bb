//! What must come of a migration.

use std::collections::BTreeMap;

use serde::Deserialize;

/// What must come of a migration. What holds for every migration is not said here but checked
/// always: the guest answers where it runs, the port is bound there alone, the request and the
/// strategy are what they were, no mark is left, the handover is final, the target's port was shut
/// until the guest announced itself (unless the controller was killed, or the VM went before its
/// handover was ready); in the routed topology, the
/// VM's addresses are in the set of that chassis and in no other, and the guest's entry for its
/// gateway is what it was.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Expect {
    /// How the handover ends.
    pub outcome: Outcome,
    /// The long TCP stream lives, or does not; null where it may do either: cut off for seconds, it goes on when its sender
    /// next tries (RFC 6298, section 5.5), which may be after the measurement.
    pub tcp_survives: Option<bool>,
    /// For how long packets towards the VM may be lost, in milliseconds: their number at the flow's rate, and one at least
    /// where it is not 0.
    pub to_vm_max_lost_ms: Option<u32>,
    /// For how long packets from the VM may be lost.
    pub from_vm_max_lost_ms: Option<u32>,
    /// Most packets that may arrive twice, both directions together.
    pub max_duplicated: Option<u64>,
    /// For how much longer than the hypervisor's pause packets towards the VM may be lost, in milliseconds.
    pub max_lost_beyond_pause_ms: Option<u32>,
    /// For how much longer than from the guest's last packet before the pause to the open port packets towards the VM may
    /// be lost, in milliseconds. The target's agent must have opened it.
    pub lost_until_open_ms: Option<u32>,
    /// Least that the flip comes after the guest resumed on the target, in milliseconds: where the
    /// policy keeps its egress for a while.
    pub min_flip_ms: Option<f64>,
    /// Most that the flip comes after the guest resumed on the target, in milliseconds; null for
    /// whenever it comes. Of migrations in the routed topology that succeed under one controller.
    pub max_flip_ms: Option<f64>,
    /// `kubectl get handovers` and the Events of `kubectl describe vmim` tell of it; what they print is
    /// kept in `kubectl.txt` beside the report.
    pub shown_by_kubectl: bool,
    /// Who opens the target's port.
    pub opened_by: Option<OpenedBy>,
    /// Whether the copy waits until the handover is ready, or must have begun before.
    pub copy_after_ready: Option<bool>,
    /// Least time for which the gate holds the migration back, from the first question to the copy, in milliseconds.
    pub held_at_least_ms: Option<f64>,
    /// What the source's agent must count of what the guest announced falsely.
    pub forgeries: Option<Forgeries>,
    /// What must come of the other flows, by name; of those not named, what holds by default.
    pub flows: BTreeMap<String, FlowExpect>,
}

/// A controller that has the activation to go by flips within 15 ms of the resume, and one that waits
/// for KubeVirt's word after 225 ms: what lies between is for a busy machine.
const MAX_FLIP_MS: f64 = 150.0;
/// Who opens the target's port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OpenedBy {
    /// The target's agent, once the guest has paused on the source and before it resumes on the target.
    Agent,
    /// OVN, when the guest announces itself there.
    Announcement,
}

/// Announcements of which nothing must come, by the reason that the agent gives.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Forgeries {
    /// At least so many of the guest's own address where it leaves.
    pub on_source: u64,
    /// At least so many of another's.
    pub anothers_address: u64,
}

impl Default for Expect {
    fn default() -> Self {
        Self {
            outcome: Outcome::Succeeded,
            tcp_survives: Some(true),
            to_vm_max_lost_ms: None,
            from_vm_max_lost_ms: None,
            max_duplicated: Some(0),
            max_lost_beyond_pause_ms: None,
            lost_until_open_ms: None,
            min_flip_ms: None,
            max_flip_ms: Some(MAX_FLIP_MS),
            shown_by_kubectl: false,
            opened_by: None,
            copy_after_ready: None,
            held_at_least_ms: None,
            forgeries: None,
            flows: BTreeMap::new(),
        }
    }
}

/// What must come of a flow.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct FlowExpect {
    /// The long TCP stream lives. Where it must not, it must have broken.
    pub tcp_survives: bool,
    /// The long TCP stream carried data for at least this long after the guest resumed, in
    /// milliseconds, also where it breaks in the end.
    pub tcp_lives_ms: Option<f64>,
    /// For how long packets towards the VM may be lost, in milliseconds: their number at the flow's rate, and one at least
    /// where it is not 0.
    pub to_vm_max_lost_ms: Option<u32>,
    /// For how long packets from the VM may be lost.
    pub from_vm_max_lost_ms: Option<u32>,
    /// Most packets that may arrive twice, both directions together.
    pub max_duplicated: Option<u64>,
    /// Nodes whose gateway's addresses the peer hears the VM from, in the order they appear: where
    /// the gateways translate, or an empty list where the VM must be heard under its own address only.
    pub heard_from: Option<Vec<String>>,
}

impl Default for FlowExpect {
    fn default() -> Self {
        Self {
            tcp_survives: true,
            tcp_lives_ms: None,
            to_vm_max_lost_ms: None,
            from_vm_max_lost_ms: None,
            max_duplicated: Some(0),
            heard_from: None,
        }
    }
}

/// How a handover ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, serde::Serialize)]
pub enum Outcome {
    /// The guest runs on the target and the port is bound there alone.
    Succeeded,
    /// The guest runs on the source and the port is bound there alone.
    RolledBack,
    /// Neither could be established in time.
    Failed,
}
