//! KubeVirt's objects, as far as a migration touches them. What is not named here survives a round trip.

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use kube::api::{ApiResource, GroupVersionKind};
use kube::{CustomResource, Resource as _, ResourceExt as _};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// Labels, annotations and finalizers, by the names that KubeVirt's API package gives them.
pub mod names {
    /// Label of a pod: `virt-launcher`.
    pub const APP: &str = "kubevirt.io";
    /// Value of [`APP`] on the pods of VMIs.
    pub const VIRT_LAUNCHER: &str = "virt-launcher";
    /// Label of a pod: the UID of its VMI.
    pub const CREATED_BY: &str = "kubevirt.io/created-by";
    /// Label of a target pod: the UID of its migration.
    pub const MIGRATION_JOB_UID: &str = "kubevirt.io/migrationJobUID";
    /// Annotation of a target pod: the name of its migration.
    pub const MIGRATION_JOB_NAME: &str = "kubevirt.io/migrationJobName";
    /// Label of a VMI: its node. Copied to every pod of the VMI when that is made, and kept current on one of them
    /// only: on a target pod it names the *source* until the migration is over.
    pub const NODE_NAME: &str = "kubevirt.io/nodeName";
    /// Label of a VMI: the node whose virt-handler prepares the target.
    pub const MIGRATION_TARGET_NODE_NAME: &str = "kubevirt.io/migrationTargetNodeName";
    /// Label of a migration: the name of its VMI.
    pub const VMI_NAME: &str = "kubevirt.io/vmi-name";
    /// Label of a pod: its VMI's name, cut to what a label takes.
    pub const VMI_ID: &str = "vmi.kubevirt.io/id";
    /// Label of a pod: its VMI's host name.
    pub const VM_NAME: &str = "vm.kubevirt.io/name";
    /// Label of a node that takes VMs.
    pub const SCHEDULABLE: &str = "kubevirt.io/schedulable";
    /// Annotation of a pod: the name of its VMI.
    pub const DOMAIN: &str = "kubevirt.io/domain";
    /// Annotation of a target pod, once its domain runs: when that was seen.
    pub const TARGET_READY_TIMESTAMP: &str = "kubevirt.io/migration-target-ready-timestamp";
    /// Annotation of a pod: how much memory it has beyond the guest's.
    pub const MEMORY_OVERHEAD_BYTES: &str = "kubevirt.io/memory-overhead-bytes";
    /// Annotation of a VMI that may migrate with a bridge on the pod network.
    pub const ALLOW_POD_BRIDGE_MIGRATION: &str =
        "kubevirt.io/allow-pod-bridge-network-live-migration";
    /// Finalizer of a migration.
    pub const MIGRATION_FINALIZER: &str = "kubevirt.io/migrationJobFinalize";
    /// Finalizer of a VMI.
    pub const VMI_FINALIZER: &str = "kubevirt.io/foregroundDeleteVirtualMachine";
}

/// Fields that are kept without being understood.
pub type Unknown = Map<String, Value>;

/// What a VMI is to be.
#[derive(CustomResource, Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[kube(
    group = "kubevirt.io",
    version = "v1",
    kind = "VirtualMachineInstance",
    namespaced,
    derive = "PartialEq",
    status = "VmiStatus",
    schema = "disabled"
)]
#[serde(rename_all = "camelCase")]
pub struct VmiSpec {
    /// The machine.
    #[serde(default)]
    pub domain: DomainSpec,
    /// What its interfaces are connected to.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub networks: Vec<Network>,
    /// The labels that its node has to have.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub node_selector: BTreeMap<String, String>,
    /// Everything else.
    #[serde(flatten)]
    pub unknown: Unknown,
}

/// `spec.domain` of a VMI.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
pub struct DomainSpec {
    /// Its devices.
    #[serde(default)]
    pub devices: Devices,
    /// Everything else.
    #[serde(flatten)]
    pub unknown: Unknown,
}

/// `spec.domain.devices` of a VMI.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
pub struct Devices {
    /// Its network cards.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub interfaces: Vec<Interface>,
    /// Everything else.
    #[serde(flatten)]
    pub unknown: Unknown,
}

/// A network card. The binding (`bridge: {}`) is among [`Interface::unknown`].
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Interface {
    /// The name of the network that it is connected to.
    pub name: String,
    /// Its MAC address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac_address: Option<String>,
    /// Everything else.
    #[serde(flatten)]
    pub unknown: Unknown,
}

/// Something to connect to: the pod network, or one that Multus knows.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
pub struct Network {
    /// Its name within the VMI.
    pub name: String,
    /// Not the pod network.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub multus: Option<Multus>,
    /// Everything else.
    #[serde(flatten)]
    pub unknown: Unknown,
}

/// A network that Multus knows.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Multus {
    /// `[<namespace>/]<name>` of its NetworkAttachmentDefinition.
    pub network_name: String,
    /// Everything else.
    #[serde(flatten)]
    pub unknown: Unknown,
}

/// What a VMI is. Not a subresource: it is written with the rest of the object.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct VmiStatus {
    /// Where in its life it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub phase: Option<VmiPhase>,
    /// Where it runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node_name: Option<String>,
    /// UIDs of its pods, those that have ended included, with their nodes.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub active_pods: BTreeMap<String, String>,
    /// `Ready`, `LiveMigratable`, …
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub conditions: Vec<Condition>,
    /// The network cards as they are.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub interfaces: Vec<Value>,
    /// The SELinux context of its launcher; `none` where SELinux is absent. Unset, virt-controller makes no target pod.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub selinux_context: Option<String>,
    /// The current migration, or the last one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub migration_state: Option<MigrationState>,
    /// Everything else.
    #[serde(flatten)]
    pub unknown: Unknown,
}

/// Where in its life a VMI is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[expect(missing_docs, reason = "KubeVirt's own words")]
pub enum VmiPhase {
    Pending,
    Scheduling,
    Scheduled,
    Running,
    Succeeded,
    Failed,
    /// One that this stand-in never sets.
    #[serde(other)]
    Unknown,
}

/// The state of a migration, in the status of the VMI and, when all is over, in that of the migration.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
#[expect(clippy::struct_excessive_bools, reason = "KubeVirt's own fields")]
#[expect(missing_docs, reason = "KubeVirt's own words")]
pub struct MigrationState {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub start_timestamp: Option<Time>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub end_timestamp: Option<Time>,
    /// When virt-handler saw the domain run on the target; to the second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target_node_domain_ready_timestamp: Option<Time>,
    /// The domain exists on the target. It does not run yet.
    #[serde(default, skip_serializing_if = "is_false")]
    pub target_node_domain_detected: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target_node_address: Option<String>,
    #[serde(
        default,
        rename = "targetDirectMigrationNodePorts",
        skip_serializing_if = "BTreeMap::is_empty"
    )]
    pub target_direct_migration_node_ports: BTreeMap<String, i32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target_node: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target_pod: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source_node: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source_pod: Option<String>,
    #[serde(default, skip_serializing_if = "is_false")]
    pub completed: bool,
    #[serde(default, skip_serializing_if = "is_false")]
    pub failed: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failure_reason: Option<String>,
    #[serde(default, skip_serializing_if = "is_false")]
    pub abort_requested: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub abort_status: Option<String>,
    /// The UID of the migration. The state outlives it: compare before believing anything else in here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub migration_uid: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mode: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub migration_configuration: Option<Value>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target_memory_overhead: Option<String>,
    /// Everything else.
    #[serde(flatten)]
    pub unknown: Unknown,
}

/// A condition of a VMI or a migration.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
#[expect(missing_docs, reason = "KubeVirt's own words")]
pub struct Condition {
    #[serde(rename = "type")]
    pub type_: String,
    pub status: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_probe_time: Option<Time>,
    /// Never left out: Go writes null where nothing is known, and virt-controller's patches test the whole status.
    #[serde(default)]
    pub last_transition_time: Option<Time>,
    #[serde(flatten)]
    pub unknown: Unknown,
}

/// What a VMI may belong to: the lab needs no more of it than that it is there.
pub fn virtual_machine() -> ApiResource {
    let kind = GroupVersionKind::gvk("kubevirt.io", "v1", "VirtualMachine");
    ApiResource::from_gvk(&kind)
}

/// The wish to migrate a VMI.
#[derive(CustomResource, Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[kube(
    group = "kubevirt.io",
    version = "v1",
    kind = "VirtualMachineInstanceMigration",
    namespaced,
    derive = "PartialEq",
    status = "VmimStatus",
    schema = "disabled"
)]
#[serde(rename_all = "camelCase")]
pub struct VmimSpec {
    /// The VMI, in the same namespace.
    #[serde(default)]
    pub vmi_name: String,
    /// More labels that the target has to have; those of the VMI take precedence.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub added_node_selector: BTreeMap<String, String>,
    /// Everything else.
    #[serde(flatten)]
    pub unknown: Unknown,
}

/// How far a migration is.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct VmimStatus {
    /// Unset until virt-controller has seen it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub phase: Option<VmimPhase>,
    /// When each phase was entered first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub phase_transition_timestamps: Vec<PhaseTransition>,
    /// `migrationAbortRequested`, …
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub conditions: Vec<Condition>,
    /// The source pod only, until the migration is over; then what the VMI's status had.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub migration_state: Option<MigrationState>,
    /// Everything else.
    #[serde(flatten)]
    pub unknown: Unknown,
}

/// When a phase was entered.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
#[expect(missing_docs, reason = "KubeVirt's own words")]
pub struct PhaseTransition {
    pub phase: VmimPhase,
    pub phase_transition_timestamp: Time,
}

/// How far a migration is, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Deserialize, Serialize)]
#[expect(missing_docs, reason = "KubeVirt's own words")]
pub enum VmimPhase {
    Pending,
    Scheduling,
    Scheduled,
    PreparingTarget,
    TargetReady,
    Running,
    Succeeded,
    Failed,
}

impl VmimPhase {
    /// Nothing comes after.
    pub fn is_final(self) -> bool {
        matches!(self, Self::Succeeded | Self::Failed)
    }
}

impl VirtualMachineInstance {
    /// A VMI as it is after admission by virt-api: with its finalizer.
    pub fn admitted(namespace: &str, name: &str, spec: VmiSpec) -> Self {
        let mut vmi = Self::new(name, spec);
        vmi.metadata.namespace = Some(namespace.into());
        vmi.metadata.finalizers = Some(vec![names::VMI_FINALIZER.into()]);
        vmi
    }

    pub(super) fn phase(&self) -> Option<VmiPhase> {
        self.status.as_ref().and_then(|status| status.phase)
    }

    pub(super) fn node(&self) -> Option<&str> {
        self.status.as_ref()?.node_name.as_deref()
    }

    /// The state of its latest migration.
    pub fn migration_state(&self) -> Option<&MigrationState> {
        self.status.as_ref()?.migration_state.as_ref()
    }

    /// The migration state, if it is that of `migration`.
    pub(super) fn migration_state_of(
        &self,
        migration: &VirtualMachineInstanceMigration,
    ) -> Option<&MigrationState> {
        self.migration_state()
            .filter(|state| state.migration_uid.is_some() && state.migration_uid == migration.uid())
    }
}

impl MigrationState {
    /// As virt-handler sees it: the time is there, and the verdict.
    pub(super) fn is_done(&self) -> bool {
        self.end_timestamp.is_some() && (self.completed || self.failed)
    }

    pub(super) fn is_target(&self, node: &str) -> bool {
        self.target_node.as_deref() == Some(node)
    }
}

impl VirtualMachineInstanceMigration {
    /// A migration as it is after admission by virt-api: with its label and finalizer.
    pub fn admitted(namespace: &str, name: &str, vmi: &str) -> Self {
        let mut migration = Self::new(
            name,
            VmimSpec {
                vmi_name: vmi.into(),
                ..VmimSpec::default()
            },
        );
        migration.metadata.namespace = Some(namespace.into());
        admit(&mut migration.metadata, vmi);
        migration
    }

    /// How far it is; none before anybody has looked at it.
    pub fn phase(&self) -> Option<VmimPhase> {
        self.status.as_ref().and_then(|status| status.phase)
    }

    pub(super) fn is_final(&self) -> bool {
        self.phase().is_some_and(VmimPhase::is_final)
    }

    pub(super) fn is_deleting(&self) -> bool {
        self.meta().deletion_timestamp.is_some()
    }

    /// It has its finalizer: it is not over, or its end has not been seen to.
    pub(super) fn is_guarded(&self) -> bool {
        let finalizers = self.meta().finalizers.iter().flatten();
        finalizers
            .into_iter()
            .any(|finalizer| finalizer == names::MIGRATION_FINALIZER)
    }

    pub(super) fn is_abort_requested(&self) -> bool {
        let conditions = self.status.iter().flat_map(|status| &status.conditions);
        conditions
            .into_iter()
            .any(|condition| condition.type_ == ABORT_REQUESTED)
    }
}

/// The type of the condition of a migration that was deleted before it was over.
pub(super) const ABORT_REQUESTED: &str = "migrationAbortRequested";

/// What virt-api's mutating webhook adds to a migration. True when something was missing.
pub(super) fn admit(metadata: &mut ObjectMeta, vmi: &str) -> bool {
    let labels = metadata.labels.get_or_insert_default();
    let labelled = labels.contains_key(names::VMI_NAME);
    if !labelled {
        labels.insert(names::VMI_NAME.into(), vmi.into());
    }
    let finalizers = metadata.finalizers.get_or_insert_default();
    let guarded = finalizers
        .iter()
        .any(|finalizer| finalizer == names::MIGRATION_FINALIZER);
    if !guarded {
        finalizers.push(names::MIGRATION_FINALIZER.into());
    }
    !(labelled && guarded)
}

/// Now, as `metav1.Time` has it: to the second.
pub(super) fn now() -> Time {
    let now = k8s_openapi::jiff::Timestamp::now();
    Time(
        now.round(
            k8s_openapi::jiff::TimestampRound::new()
                .smallest(k8s_openapi::jiff::Unit::Second)
                .mode(k8s_openapi::jiff::RoundMode::Trunc),
        )
        .unwrap_or(now),
    )
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde's signature")]
fn is_false(value: &bool) -> bool {
    !value
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_condition_says_that_it_does_not_know_when_it_changed() {
        let condition = serde_json::to_value(Condition::default()).unwrap();
        assert_eq!(condition.get("lastTransitionTime"), Some(&Value::Null));
    }

    #[test]
    fn what_is_not_understood_survives_a_round_trip() {
        let vmi = json!({
            "apiVersion": "kubevirt.io/v1", "kind": "VirtualMachineInstance", "metadata": {"name": "vm0"},
            "spec": {
                "domain": {
                    "memory": {"guest": "128Mi"},
                    "devices": {
                        "interfaces": [{"name": "default", "macAddress": "02:00:00:00:00:01", "bridge": {}}],
                        "rng": {},
                    },
                },
                "networks": [{"name": "default", "pod": {}}],
                "evictionStrategy": "LiveMigrate",
            },
            "status": {"phase": "WaitingForSync", "migrationState": {"migrationUid": "m", "sourceState": {"pod": "p"}}, "qosClass": "Burstable"},
        });
        let parsed: VirtualMachineInstance = serde_json::from_value(vmi.clone()).unwrap();
        let mut back = serde_json::to_value(&parsed).unwrap();
        assert_eq!(parsed.phase(), Some(VmiPhase::Unknown));
        back["status"]["phase"] = json!("WaitingForSync");
        assert_eq!(back, vmi);
    }
}
