//! The `Handover` custom resource: one VM's network in one live migration, on the record.

#![allow(
    clippy::duplicated_attributes,
    reason = "kube's derive takes one `printcolumn(…)` per column, each with the same keys"
)]

mod condition;
mod opening;
mod policy;
mod time;

use handover::{Chassis, Epoch, Phase, Signal, SignalKind, SignalSource, Signals};
use kube::CustomResource;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};

pub use condition::{Condition, ConditionStatus, ConditionType};
pub use opening::{EarlyOpening, OpeningResult};
pub use policy::{
    FlipOn, GateTimeout, HandoverPolicy, HandoverPolicySpec, LabelExpression, LabelOperator,
    PolicyDeadlines, PolicyGate, Routing, RoutingMode, VmSelector,
};
pub use time::Moment;

/// Who writes `Handover` objects: the field manager of every server-side apply.
pub const FIELD_MANAGER: &str = "segue-migration-controller";

/// What a handover is about. Written by the controller alone, filled as it becomes known.
#[derive(CustomResource, Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "segue.io",
    version = "v1alpha1",
    kind = "Handover",
    plural = "handovers",
    shortname = "ho",
    category = "segue",
    namespaced,
    derive = "PartialEq",
    status = "HandoverStatus",
    doc = "The network's part of one live migration of a KubeVirt VM: its OVN ports, handed from the \
           node the guest leaves to the node it goes to. Named as its \
           VirtualMachineInstanceMigration and owned by it.",
    printcolumn(
        name = "VM",
        type_ = "string",
        json_path = ".spec.vm.name",
        description = "The VirtualMachineInstance"
    ),
    printcolumn(
        name = "Phase",
        type_ = "string",
        json_path = ".status.phase",
        description = "Where the handover stands"
    ),
    printcolumn(
        name = "From",
        type_ = "string",
        json_path = ".spec.source.node",
        description = "The node the guest leaves"
    ),
    printcolumn(
        name = "To",
        type_ = "string",
        json_path = ".spec.target.node",
        description = "The node the guest goes to"
    ),
    printcolumn(
        name = "Waiting for",
        type_ = "string",
        json_path = ".status.waitingFor",
        description = "What the handover waits for; the whole sentence with -o wide"
    ),
    printcolumn(
        name = "Degraded",
        type_ = "string",
        json_path = ".status.conditions[?(@.type==\"Degraded\")].reason",
        description = "What a person should look at; AsExpected where that is nothing"
    ),
    printcolumn(
        name = "Since",
        type_ = "date",
        json_path = ".status.phaseSince",
        description = "How long it has been in its phase"
    ),
    printcolumn(
        name = "Age",
        type_ = "date",
        json_path = ".metadata.creationTimestamp",
        description = "How long ago it began"
    ),
    printcolumn(
        name = "Ports",
        type_ = "string",
        json_path = ".spec.ports",
        description = "The logical switch ports",
        priority = 1
    ),
    printcolumn(
        name = "Pause ms",
        type_ = "number",
        json_path = ".status.pauseMs",
        description = "How long the hypervisor stopped the guest",
        priority = 1
    ),
    printcolumn(
        name = "Blackout ms",
        type_ = "number",
        json_path = ".status.blackoutMs",
        description = "From its last frame on the source to its first from the target",
        priority = 1
    ),
    printcolumn(
        name = "Policy",
        type_ = "string",
        json_path = ".status.policy",
        description = "The HandoverPolicy that applies",
        priority = 1
    ),
    printcolumn(
        name = "Message",
        type_ = "string",
        json_path = ".status.message",
        description = "What is waited for, or why it failed",
        priority = 1
    )
)]
#[serde(rename_all = "camelCase")]
pub struct HandoverSpec {
    /// The virtual machine.
    pub vm: VmReference,
    /// The migration.
    pub migration: MigrationReference,
    /// Grows with every handover of the VM; a writer with a smaller one is fenced.
    #[schemars(range(min = 0))]
    pub epoch: i64,
    /// Where the guest was when the migration began.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<Place>,
    /// Where it goes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<Place>,
    /// Names of the VM's logical switch ports, in order.
    #[serde(default)]
    pub ports: Vec<String>,
}

/// A VirtualMachineInstance in the Handover's namespace.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct VmReference {
    /// `metadata.name`.
    pub name: String,
    /// `metadata.uid`; a VM that is stopped and started again is another instance.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uid: Option<String>,
}

/// A VirtualMachineInstanceMigration in the Handover's namespace.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct MigrationReference {
    /// `metadata.name`.
    pub name: String,
    /// `metadata.uid`.
    pub uid: String,
}

/// One end of the migration.
#[derive(Clone, Debug, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Place {
    /// The Node.
    pub node: String,
    /// The virt-launcher pod, once known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod: Option<String>,
    /// The Southbound `Chassis.name` of the node, once known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub chassis: Option<String>,
    /// The Southbound `Chassis.hostname`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub chassis_hostname: Option<String>,
}

/// Where a handover stands.
#[derive(Clone, Debug, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct HandoverStatus {
    /// Where it stands.
    #[serde(default)]
    #[schemars(schema_with = "phase_schema")]
    pub phase: Phase,
    /// When it entered its phase.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub phase_since: Option<Moment>,
    /// What it waits for, in a word.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub waiting_for: Option<String>,
    /// What it waits for, or what is wrong, in a sentence that says what can be done about it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    /// Why the guest did not end up on the target, or could not be followed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failure_reason: Option<String>,
    /// The HandoverPolicy that applies; the controller's own settings do where there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub policy: Option<String>,
    /// The usual summary for programs.
    #[serde(default)]
    #[schemars(extend(
        "x-kubernetes-list-type" = "map",
        "x-kubernetes-list-map-keys" = ["type"]
    ))]
    pub conditions: Vec<Condition>,
    /// What happened when, earliest first. A step that is taken again moves to the end.
    #[serde(default)]
    pub timeline: Vec<TimelineEntry>,
    /// Signs of where the guest is, earliest first.
    #[serde(default)]
    pub signals: Vec<SignalSeen>,
    /// How long the hypervisor stopped the guest, by the stamps of both ends' hypervisors, in
    /// milliseconds. Needs an agent on either node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pause_ms: Option<f64>,
    /// From the guest's last frame on the source to its first from the target, in milliseconds; of
    /// several ports, the longest. Needs an agent on either node, and a guest that sends.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub blackout_ms: Option<f64>,
    /// How the target's ports were opened when the guest paused; absent where nobody told of the
    /// pause in time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub early_opening: Option<EarlyOpening>,
}

/// A step of a handover.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema,
)]
pub enum TimelineStep {
    /// Both chassis were requested (T1 was committed).
    Armed,
    /// The target had claimed every port, and `nb_cfg` was raised for the barrier.
    BarrierRaised,
    /// The target lost a port again; what was proved of it no longer held.
    BarrierDropped,
    /// The barrier was met.
    Ready,
    /// The guest was first seen to have paused.
    Paused,
    /// The target's ports were opened on the pause, ahead of OVN's own activation.
    Opened,
    /// The guest was first seen to run on the target.
    Resumed,
    /// The activation strategy was taken from the target's ports: the guest ran there, and nothing
    /// else would have opened them.
    StrategyRemoved,
    /// The routes that depend on where the guest is were made to lead there (T2 was committed).
    Flipped,
    /// The migration was first seen to be over.
    MigrationEnded,
    /// The chassis where the guest runs was requested alone (T3 or the roll-back was committed).
    Settled,
    /// The marks were cleared and what was set before was put back.
    Released,
    /// The handover ended with the guest on the target.
    Succeeded,
    /// The handover ended with the guest on the source, or with no guest.
    RolledBack,
    /// The deadline to establish the port where the guest runs passed.
    Failed,
}

/// One step with its time.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct TimelineEntry {
    /// What happened.
    pub step: TimelineStep,
    /// When the controller saw or did it; of what an agent told, when it was there.
    pub at: Moment,
}

/// A sign of where the guest is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct SignalSeen {
    /// What it says.
    #[schemars(schema_with = "signal_kind_schema")]
    pub kind: SignalKind,
    /// Who says it.
    #[schemars(schema_with = "signal_source_schema")]
    pub source: SignalSource,
    /// When the controller first saw it; of what an agent told, the stamp of its source on the node.
    pub at: Moment,
    /// The node whose agent told.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
}

// === impl HandoverSpec ===

impl HandoverSpec {
    /// The epoch as the domain core has it.
    pub fn epoch(&self) -> Epoch {
        Epoch(u64::try_from(self.epoch).unwrap_or_default())
    }
}

// === impl Place ===

impl Place {
    /// The chassis, once known.
    pub fn chassis(&self) -> Option<Chassis> {
        let hostname = self.chassis_hostname.clone().unwrap_or_default();
        Some(Chassis::new(self.chassis.clone()?, hostname))
    }
}

// === impl HandoverStatus ===

impl HandoverStatus {
    /// When a step was last taken.
    pub fn step(&self, step: TimelineStep) -> Option<Moment> {
        let entry = self.timeline.iter().find(|entry| entry.step == step)?;
        Some(entry.at)
    }

    /// Records that a step is taken; an earlier time of the same step gives way.
    pub fn take_step(&mut self, step: TimelineStep, at: Moment) {
        self.timeline.retain(|entry| entry.step != step);
        self.timeline.push(TimelineEntry { step, at });
        self.timeline.sort_by_key(|entry| entry.at);
    }

    /// Records a step unless it has been taken already.
    pub fn take_step_once(&mut self, step: TimelineStep, at: Moment) {
        if self.step(step).is_none() {
            self.take_step(step, at);
        }
    }

    /// The signals as the domain core has them.
    pub fn signals(&self) -> Signals {
        self.signals
            .iter()
            .map(|seen| Signal {
                kind: seen.kind,
                source: seen.source,
                at: seen.at.into(),
            })
            .collect()
    }

    /// Records a signal, if nothing of its kind from its source is on record. Says whether it was
    /// news.
    pub fn note_signal(&mut self, signal: SignalSeen) -> bool {
        let known = |seen: &SignalSeen| (seen.kind, seen.source) == (signal.kind, signal.source);
        if self.signals.iter().any(known) {
            return false;
        }
        self.add_signal(signal);
        true
    }

    /// Records what can happen again and is on record: the latest stays beside the first, and a later one takes its place.
    pub fn note_turn(&mut self, signal: SignalSeen) {
        let known = |seen: &SignalSeen| (seen.kind, seen.source) == (signal.kind, signal.source);
        let times = self.signals.iter().filter(|seen| known(seen));
        let times: Vec<_> = times.map(|seen| seen.at).collect();
        let (Some(first), Some(last)) = (times.iter().min(), times.iter().max()) else {
            return self.add_signal(signal);
        };
        if signal.at > *last {
            self.signals
                .retain(|seen| !known(seen) || seen.at == *first);
            self.add_signal(signal);
        }
    }

    fn add_signal(&mut self, signal: SignalSeen) {
        self.signals.push(signal);
        self.signals
            .sort_by_key(|seen| (seen.at, seen.kind, seen.source));
    }
}

// === Schemas of the domain core's words, which know nothing of JSON Schema ===

const PHASES: [Phase; 10] = [
    Phase::Pending,
    Phase::Preparing,
    Phase::Ready,
    Phase::Switching,
    Phase::Switched,
    Phase::Finalising,
    Phase::Succeeded,
    Phase::RollingBack,
    Phase::RolledBack,
    Phase::Failed,
];

/// Every phase, in the usual order.
pub fn phases() -> &'static [Phase] {
    &PHASES
}

fn phase_schema(_: &mut SchemaGenerator) -> Schema {
    words(&PHASES)
}

fn signal_kind_schema(_: &mut SchemaGenerator) -> Schema {
    words(&[
        SignalKind::Paused,
        SignalKind::ResumedOnTarget,
        SignalKind::ResumedOnSource,
    ])
}

fn signal_source_schema(_: &mut SchemaGenerator) -> Schema {
    // Open on purpose: sources are added by later versions, and an older CRD must not reject them.
    json_schema!({ "type": "string" })
}

fn words<W: Serialize>(words: &[W]) -> Schema {
    json_schema!({ "type": "string", "enum": words })
}

#[cfg(test)]
mod tests;
