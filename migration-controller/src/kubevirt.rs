//! The few fields of KubeVirt's objects that a handover reads.
//!
//! Every field is optional and unknown ones are ignored: KubeVirt's releases add and leave out
//! fields, and a watcher sees objects in every half-filled state. What is of the wrong type is
//! caught per object by [`kube::core::DeserializeGuard`].
//!
//! Source: `staging/src/kubevirt.io/api/core/v1/types.go` of KubeVirt.

use std::collections::BTreeMap;

use jiff::Timestamp;
use kube::CustomResource;
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Labels and annotations of KubeVirt's that a handover reads.
pub mod keys {
    /// Label: what a pod is; `virt-launcher` for the pod that runs a guest.
    pub const APP: &str = "kubevirt.io";
    /// Value of [`APP`] on launcher pods.
    pub const LAUNCHER: &str = "virt-launcher";
    /// Label of a launcher pod: UID of its VirtualMachineInstance.
    pub const CREATED_BY: &str = "kubevirt.io/created-by";
    /// Label of a target pod: UID of its VirtualMachineInstanceMigration.
    pub const MIGRATION_JOB_UID: &str = "kubevirt.io/migrationJobUID";
    /// Annotation of a launcher pod: name of its VirtualMachineInstance, in full (the label
    /// `vm.kubevirt.io/name` is truncated).
    pub const DOMAIN: &str = "kubevirt.io/domain";
    /// Annotation of a target pod once its domain runs. Its value is Go's `Time.String()`: opaque.
    pub const TARGET_READY: &str = "kubevirt.io/migration-target-ready-timestamp";
}

/// `spec` of a VirtualMachineInstance.
#[derive(CustomResource, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[kube(
    group = "kubevirt.io",
    version = "v1",
    kind = "VirtualMachineInstance",
    plural = "virtualmachineinstances",
    shortname = "vmi",
    namespaced,
    derive = "PartialEq",
    status = "VmiStatus",
    schema = "disabled"
)]
#[serde(rename_all = "camelCase")]
pub struct VmiSpec {
    /// The machine.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub domain: Option<Domain>,
    /// What its interfaces are connected to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub networks: Option<Vec<Network>>,
}

/// `spec.domain`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Domain {
    /// The machine's devices.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub devices: Option<Devices>,
}

/// `spec.domain.devices`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Devices {
    /// The network interfaces.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub interfaces: Option<Vec<Interface>>,
}

/// One of `spec.domain.devices.interfaces`. How it is bound is told by which member is present.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Interface {
    /// Its name, which is also its network's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Its MAC address, where it is fixed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac_address: Option<String>,
    /// Bridged: the guest has the pod's address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bridge: Option<Value>,
    /// Behind the pod's address by NAT.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub masquerade: Option<Value>,
    /// A virtual function passed through.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sriov: Option<Value>,
    /// A binding plugin.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub binding: Option<PluginBinding>,
}

/// `binding` of an interface.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PluginBinding {
    /// The plugin as KubeVirt's configuration registers it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
}

/// One of `spec.networks`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Network {
    /// Its name, which is also its interface's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// The pod's own network.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod: Option<Value>,
    /// A secondary network.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub multus: Option<Value>,
}

/// `status` of a VirtualMachineInstance. It has no status subresource.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct VmiStatus {
    /// The node whose virt-handler owns the guest; flips at the end of a migration.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node_name: Option<String>,
    /// `Pending`, `Scheduling`, `Scheduled`, `Running`, `Succeeded`, `Failed`, `Unknown`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub phase: Option<String>,
    /// The current or the last migration. It outlives its migration: compare `migration_uid`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub migration_state: Option<MigrationState>,
    /// Pods of the guest that are running, by UID, with their nodes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub active_pods: Option<BTreeMap<String, String>>,
}

/// `status.migrationState` of a VirtualMachineInstance, and of a finished migration.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct MigrationState {
    /// UID of the migration that it is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub migration_uid: Option<String>,
    /// The node the guest leaves.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source_node: Option<String>,
    /// The pod the guest leaves.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source_pod: Option<String>,
    /// The node the guest goes to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target_node: Option<String>,
    /// The pod the guest goes to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target_pod: Option<String>,
    /// When copying began.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub start_timestamp: Option<Timestamp>,
    /// `PreCopy`, `PostCopy` or `Paused`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mode: Option<String>,
    /// When the target's domain was seen to run; to the second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target_node_domain_ready_timestamp: Option<Timestamp>,
    /// When it was over.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub end_timestamp: Option<Timestamp>,
    /// It is over; well, unless `failed`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub completed: Option<bool>,
    /// It failed or was cancelled.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failed: Option<bool>,
    /// Why.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failure_reason: Option<String>,
    /// Somebody asked for it to be cancelled.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub abort_requested: Option<bool>,
    /// How far the cancellation got.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub abort_status: Option<String>,
}

/// `spec` of a VirtualMachineInstanceMigration.
#[derive(CustomResource, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[kube(
    group = "kubevirt.io",
    version = "v1",
    kind = "VirtualMachineInstanceMigration",
    plural = "virtualmachineinstancemigrations",
    shortname = "vmim",
    namespaced,
    derive = "PartialEq",
    status = "MigrationStatus",
    schema = "disabled"
)]
#[serde(rename_all = "camelCase")]
pub struct MigrationSpec {
    /// The VirtualMachineInstance to migrate, in the same namespace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vmi_name: Option<String>,
    /// Present where the guest leaves for another cluster.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub send_to: Option<Value>,
    /// Present where the guest comes from another cluster.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub receive: Option<Value>,
}

/// `status` of a VirtualMachineInstanceMigration.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct MigrationStatus {
    /// How far it is; phases can be skipped and be seen late.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub phase: Option<String>,
    /// The migration's state; in full only once it is over.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub migration_state: Option<MigrationState>,
}

/// What the phase of a migration means for its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum MigrationEnd {
    /// `Succeeded`.
    Succeeded,
    /// `Failed`, which a cancelled migration is too.
    Failed,
}

// === impl VirtualMachineInstance ===

impl VirtualMachineInstance {
    /// The migration state, if it is about this migration.
    pub fn migration_state(&self, migration_uid: &str) -> Option<&MigrationState> {
        let state = self.status.as_ref()?.migration_state.as_ref()?;
        (state.migration_uid.as_deref() == Some(migration_uid)).then_some(state)
    }

    /// The node whose virt-handler owns the guest.
    pub fn node_name(&self) -> Option<&str> {
        let node = self.status.as_ref()?.node_name.as_deref()?;
        (!node.is_empty()).then_some(node)
    }

    /// Whether the guest stopped for good.
    pub fn is_final(&self) -> bool {
        let phase = self
            .status
            .as_ref()
            .and_then(|status| status.phase.as_deref());
        matches!(phase, Some("Succeeded" | "Failed"))
    }

    /// Its network interfaces.
    pub fn interfaces(&self) -> &[Interface] {
        let devices = self
            .spec
            .domain
            .as_ref()
            .and_then(|domain| domain.devices.as_ref());
        devices
            .and_then(|devices| devices.interfaces.as_deref())
            .unwrap_or_default()
    }
}

// === impl VirtualMachineInstanceMigration ===

impl VirtualMachineInstanceMigration {
    /// How it ended, once it did.
    pub fn end(&self) -> Option<MigrationEnd> {
        match self.status.as_ref()?.phase.as_deref()? {
            "Succeeded" => Some(MigrationEnd::Succeeded),
            "Failed" => Some(MigrationEnd::Failed),
            _ => None,
        }
    }

    /// Whether its two ends are in different clusters.
    pub fn is_between_clusters(&self) -> bool {
        self.spec.send_to.is_some() || self.spec.receive.is_some()
    }
}

// === impl MigrationState ===

impl MigrationState {
    /// How it ended, once it did.
    pub fn end(&self) -> Option<MigrationEnd> {
        if self.failed == Some(true) {
            Some(MigrationEnd::Failed)
        } else if self.completed == Some(true) {
            Some(MigrationEnd::Succeeded)
        } else {
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use kube::core::DeserializeGuard;
    use serde_json::json;

    use super::*;

    fn vmi(status: &Value) -> VirtualMachineInstance {
        serde_json::from_value(json!({
            "apiVersion": "kubevirt.io/v1",
            "kind": "VirtualMachineInstance",
            "metadata": { "name": "w0", "namespace": "tenant" },
            "spec": { "domain": { "devices": { "interfaces": [
                { "name": "default", "masquerade": {} },
                { "name": "blue", "bridge": {}, "macAddress": "0a:00:00:00:00:01" },
            ] }, "cpu": { "cores": 2 } } },
            "status": status,
        }))
        .unwrap()
    }

    #[test]
    fn the_state_of_another_migration_is_not_this_ones() {
        let vmi = vmi(&json!({
            "nodeName": "n2",
            "migrationState": { "migrationUid": "m-1", "completed": true, "novel": { "x": 1 } },
        }));
        assert!(vmi.migration_state("m-2").is_none());
        let state = vmi.migration_state("m-1").unwrap();
        assert_eq!(state.end(), Some(MigrationEnd::Succeeded));
    }

    #[test]
    fn failed_wins_over_completed() {
        // KubeVirt sets both on a cancelled migration.
        let state: MigrationState = serde_json::from_value(json!({
            "failed": true, "completed": true, "abortStatus": "Succeeded",
        }))
        .unwrap();
        assert_eq!(state.end(), Some(MigrationEnd::Failed));
    }

    #[test]
    fn a_binding_is_told_by_its_member() {
        let vmi = vmi(&json!({}));
        let [pod, blue] = vmi.interfaces() else {
            panic!("{:?}", vmi.interfaces());
        };
        assert!(pod.masquerade.is_some() && pod.bridge.is_none());
        assert!(blue.masquerade.is_none() && blue.bridge.is_some());
        assert_eq!(vmi.node_name(), None);
    }

    #[test]
    fn one_malformed_object_does_not_spoil_the_others() {
        let malformed = json!({
            "metadata": { "name": "w0", "namespace": "tenant" },
            "spec": {},
            "status": { "migrationState": "soon" },
        });
        let DeserializeGuard(result) =
            serde_json::from_value::<DeserializeGuard<VirtualMachineInstance>>(malformed).unwrap();
        let invalid = result.unwrap_err();
        assert_eq!(invalid.metadata.name.as_deref(), Some("w0"));
        assert!(invalid.error.contains("soon"), "{}", invalid.error);
    }
}
