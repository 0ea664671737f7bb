//! What Kubernetes says, kept by watches and found by VM.

mod store;
mod watch;

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use handover::{Phase, VmName};
use k8s_openapi::api::core::v1::{Node, Pod};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::jiff::Timestamp;
use kube::ResourceExt;

use crate::api::Handover;
use crate::kubevirt::{VirtualMachineInstance, VirtualMachineInstanceMigration, keys};
use crate::policy::Policy;

pub(crate) use store::{Key, Seen, Store, Stored};
pub(crate) use watch::{Kind, Listener, watch_all};

/// The objects that handovers depend on.
#[derive(Default)]
pub(crate) struct Cluster {
    state: RwLock<State>,
}

#[derive(Default)]
pub(crate) struct State {
    vmis: Store<VirtualMachineInstance>,
    migrations: Store<VirtualMachineInstanceMigration>,
    handovers: Store<Handover>,
    pods: Store<LauncherPod>,
    nodes: Store<NodeChassis>,
    policies: Store<Policy>,
    synced: BTreeSet<Kind>,
}

/// What a handover reads of a virt-launcher pod.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct LauncherPod {
    /// Name, namespace, labels, annotations.
    pub(crate) meta: ObjectMeta,
    /// Its node, once it has one.
    pub(crate) node: Option<String>,
    /// Whether it is over, and since when.
    pub(crate) life: PodLife,
}

/// Whether a pod may still hold network interfaces.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum PodLife {
    /// It runs or may run, or one of its containers does.
    #[default]
    Alive,
    /// All of its containers are finished, the last of them then; `None` where nobody says when.
    Over(Option<Timestamp>),
}

/// What a handover reads of a Node.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct NodeChassis {
    meta: ObjectMeta,
    /// `k8s.ovn.org/node-chassis-id`.
    pub(crate) chassis: Option<String>,
}

/// Everything Kubernetes says about one VM at one moment.
#[derive(Clone, Debug, Default)]
pub(crate) struct VmObjects {
    /// The VM's instance.
    pub(crate) vmi: Option<Arc<VirtualMachineInstance>>,
    /// Its migrations, oldest first.
    pub(crate) migrations: Vec<Arc<VirtualMachineInstanceMigration>>,
    /// Its handovers.
    pub(crate) handovers: Vec<Arc<Handover>>,
    /// Its pods.
    pub(crate) pods: Vec<Arc<LauncherPod>>,
    /// Objects that could not be read, with why: nothing may be concluded from their absence.
    pub(crate) malformed: Vec<String>,
}

// === impl LauncherPod ===

impl From<Pod> for LauncherPod {
    fn from(pod: Pod) -> Self {
        let status = pod.status.unwrap_or_default();
        let terminal = matches!(status.phase.as_deref(), Some("Succeeded" | "Failed"));
        let ends: Option<Vec<_>> = status
            .container_statuses
            .unwrap_or_default()
            .into_iter()
            .map(|container| container.state?.terminated)
            .collect();
        let life = match ends {
            Some(ends) if terminal => {
                let finished = ends.into_iter().filter_map(|end| end.finished_at);
                PodLife::Over(finished.map(|time| time.0).max())
            }
            _ => PodLife::Alive,
        };
        Self {
            meta: pod.metadata,
            node: pod.spec.and_then(|spec| spec.node_name),
            life,
        }
    }
}

impl LauncherPod {
    /// The pod's name.
    pub(crate) fn name(&self) -> &str {
        self.meta.name.as_deref().unwrap_or_default()
    }

    /// UID of the migration that the pod was made for, if it was.
    pub(crate) fn migration(&self) -> Option<&str> {
        let labels = self.meta.labels.as_ref()?;
        labels.get(keys::MIGRATION_JOB_UID).map(String::as_str)
    }

    /// Whether the guest's domain was seen to run in it after a migration.
    pub(crate) fn says_target_ready(&self) -> bool {
        let annotations = self.meta.annotations.as_ref();
        annotations.is_some_and(|annotations| annotations.contains_key(keys::TARGET_READY))
    }
}

// === impl NodeChassis ===

impl From<Node> for NodeChassis {
    fn from(node: Node) -> Self {
        let chassis = node.annotations().get("k8s.ovn.org/node-chassis-id");
        Self {
            chassis: chassis.filter(|id| !id.is_empty()).cloned(),
            meta: node.metadata,
        }
    }
}

// === impl Stored ===

fn vm_of(meta: &ObjectMeta, name: Option<&str>) -> Option<Key> {
    let namespace = meta.namespace.clone().unwrap_or_default();
    name.map(|name| Key::Vm(VmName::new(namespace, name)))
}

impl Stored for VirtualMachineInstance {
    fn meta(&self) -> &ObjectMeta {
        &self.metadata
    }

    fn keys(&self) -> Vec<Key> {
        let vm = vm_of(&self.metadata, self.metadata.name.as_deref());
        let uid = self.metadata.uid.clone().map(Key::Vmi);
        vm.into_iter().chain(uid).collect()
    }
}

impl Stored for VirtualMachineInstanceMigration {
    fn meta(&self) -> &ObjectMeta {
        &self.metadata
    }

    fn keys(&self) -> Vec<Key> {
        let vm = vm_of(&self.metadata, self.spec.vmi_name.as_deref());
        let uid = self.metadata.uid.clone().map(Key::Migration);
        vm.into_iter().chain(uid).collect()
    }
}

impl Stored for Handover {
    fn meta(&self) -> &ObjectMeta {
        &self.metadata
    }

    fn keys(&self) -> Vec<Key> {
        let vm = vm_of(&self.metadata, Some(&self.spec.vm.name));
        let uid = Key::Migration(self.spec.migration.uid.clone());
        vm.into_iter().chain([uid]).collect()
    }
}

impl Stored for LauncherPod {
    fn meta(&self) -> &ObjectMeta {
        &self.meta
    }

    fn keys(&self) -> Vec<Key> {
        Self::keys_of(&self.meta)
    }

    fn keys_of(meta: &ObjectMeta) -> Vec<Key> {
        let label = |key: &str| meta.labels.as_ref()?.get(key).cloned();
        let annotations = meta.annotations.as_ref();
        let domain = annotations.and_then(|annotations| annotations.get(keys::DOMAIN));
        let vm = vm_of(meta, domain.map(String::as_str));
        vm.into_iter()
            .chain(label(keys::CREATED_BY).map(Key::Vmi))
            .chain(label(keys::MIGRATION_JOB_UID).map(Key::Migration))
            .collect()
    }
}

impl Stored for NodeChassis {
    fn meta(&self) -> &ObjectMeta {
        &self.meta
    }

    fn keys(&self) -> Vec<Key> {
        Vec::new()
    }
}

impl Stored for Policy {
    fn meta(&self) -> &ObjectMeta {
        Policy::meta(self)
    }

    fn keys(&self) -> Vec<Key> {
        Vec::new()
    }
}

// === impl Cluster ===

impl Cluster {
    fn read(&self) -> RwLockReadGuard<'_, State> {
        // No writer panics half-way through a change that matters: the stores are level-triggered.
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, State> {
        self.state.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether every kind has been listed in full.
    pub(crate) fn is_synced(&self) -> bool {
        self.read().synced.len() == Kind::ALL.len()
    }

    /// The kinds that have not been listed yet.
    pub(crate) fn unsynced(&self) -> Vec<Kind> {
        let state = self.read();
        let missing = |kind: &Kind| !state.synced.contains(kind);
        Kind::ALL.into_iter().filter(missing).collect()
    }

    /// The annotation `k8s.ovn.org/node-chassis-id` of a node.
    pub(crate) fn chassis_annotation(&self, node: &str) -> Option<String> {
        match self.read().nodes.get(&(String::new(), node.to_owned()))? {
            Seen::Valid(node) => node.chassis.clone(),
            Seen::Malformed { .. } => None,
        }
    }

    /// Every VM that has a migration or a handover.
    pub(crate) fn vms_to_handle(&self) -> BTreeSet<VmName> {
        let state = self.read();
        let keys = state.migrations.keys().chain(state.handovers.keys());
        keys.filter_map(|key| match key {
            Key::Vm(vm) => Some(vm.clone()),
            _ => None,
        })
        .collect()
    }

    /// Every VM that has an instance.
    pub(crate) fn instances(&self) -> BTreeSet<VmName> {
        let state = self.read();
        let keys = state.vmis.keys();
        keys.filter_map(|key| match key {
            Key::Vm(vm) => Some(vm.clone()),
            _ => None,
        })
        .collect()
    }

    /// The policy that applies to an instance. One that cannot be read applies to none.
    pub(crate) fn policy(&self, vmi: &VirtualMachineInstance) -> Option<Arc<Policy>> {
        let namespace = vmi.metadata.namespace.as_deref().unwrap_or_default();
        let none = std::collections::BTreeMap::new();
        let labels = vmi.metadata.labels.as_ref().unwrap_or(&none);
        let state = self.read();
        let valid = state.policies.all().filter_map(|seen| match seen {
            Seen::Valid(policy) => Some(policy),
            Seen::Malformed { .. } => None,
        });
        valid
            .filter(|policy| policy.selects(namespace, labels))
            .max_by(|a, b| a.precedence().cmp(&b.precedence()))
            .cloned()
    }

    /// Whether Kubernetes knows the VM: an instance, a migration or a handover of it.
    pub(crate) fn knows(&self, vm: &VmName) -> bool {
        let state = self.read();
        let key = Key::Vm(vm.clone());
        let name = (vm.namespace.clone(), vm.name.clone());
        state.vmis.get(&name).is_some()
            || state.migrations.find(&key).next().is_some()
            || state.handovers.find(&key).next().is_some()
    }

    /// How many Handovers there are in each phase.
    pub(crate) fn count_handovers(&self) -> HashMap<Phase, i64> {
        let mut counts = HashMap::new();
        for seen in self.read().handovers.all() {
            if let Seen::Valid(handover) = seen {
                let phase = handover.status.as_ref().map(|status| status.phase);
                *counts.entry(phase.unwrap_or_default()).or_default() += 1;
            }
        }
        counts
    }

    /// Everything about one VM.
    pub(crate) fn vm(&self, vm: &VmName) -> VmObjects {
        self.read().vm(vm)
    }

    /// Takes in a Handover as the API server answered it, ahead of the watch.
    pub(crate) fn take_handover(&self, handover: Handover) {
        let seen = Seen::Valid(Arc::new(handover));
        self.write().handovers.apply(seen);
    }

    /// Forgets a Handover that the API server does not have, unless a newer one is known.
    pub(crate) fn drop_handover(&self, handover: &Arc<Handover>) {
        let seen = Seen::Valid(handover.clone());
        self.write().handovers.delete(&seen);
    }
}

// === impl State ===

impl State {
    /// The VMs that keys stand for.
    fn vms(&self, keys: &[Key]) -> BTreeSet<VmName> {
        keys.iter().filter_map(|key| self.resolve(key)).collect()
    }

    fn resolve(&self, key: &Key) -> Option<VmName> {
        let vm = |meta: &ObjectMeta, name: &str| {
            VmName::new(meta.namespace.clone().unwrap_or_default(), name)
        };
        match key {
            Key::Vm(vm) => Some(vm.clone()),
            Key::Vmi(_) => {
                let meta = self.vmis.find(key).next()?.meta();
                Some(vm(meta, meta.name.as_deref()?))
            }
            Key::Migration(_) => {
                let migration = self.migrations.find(key).find_map(|seen| match seen {
                    Seen::Valid(migration) => {
                        Some(vm(seen.meta(), migration.spec.vmi_name.as_deref()?))
                    }
                    Seen::Malformed { .. } => None,
                });
                let handover = || {
                    self.handovers.find(key).find_map(|seen| match seen {
                        Seen::Valid(handover) => Some(vm(seen.meta(), &handover.spec.vm.name)),
                        Seen::Malformed { .. } => None,
                    })
                };
                migration.or_else(handover)
            }
        }
    }

    fn vm(&self, vm: &VmName) -> VmObjects {
        let mut objects = VmObjects::default();
        let key = Key::Vm(vm.clone());
        let name = (vm.namespace.clone(), vm.name.clone());
        let vmi = self.vmis.get(&name);
        objects.vmi = sift(vmi, "VirtualMachineInstance", &mut objects.malformed).pop();
        let migrations = self.migrations.find(&key);
        objects.migrations = sift(
            migrations,
            "VirtualMachineInstanceMigration",
            &mut objects.malformed,
        );
        objects.migrations.sort_by_key(|migration| {
            let meta = &migration.metadata;
            let created = meta.creation_timestamp.as_ref().map(|time| time.0);
            (created, meta.name.clone())
        });
        objects.handovers = sift(
            self.handovers.find(&key),
            "Handover",
            &mut objects.malformed,
        );
        let pods = self.pods(vm, &objects);
        objects.pods = sift(pods, "Pod", &mut objects.malformed);
        objects
    }

    fn pods(&self, vm: &VmName, objects: &VmObjects) -> Vec<&Seen<LauncherPod>> {
        let vmi = objects
            .vmi
            .as_ref()
            .and_then(|vmi| vmi.metadata.uid.clone());
        let migrations = objects.migrations.iter();
        let keys = [Key::Vm(vm.clone())]
            .into_iter()
            .chain(vmi.map(Key::Vmi))
            .chain(
                migrations
                    .filter_map(|migration| migration.metadata.uid.clone())
                    .map(Key::Migration),
            );
        let mut pods: Vec<_> = keys
            .flat_map(|key| self.pods.find(&key))
            .filter(|pod| pod.meta().namespace.as_deref() == Some(&vm.namespace))
            .collect();
        pods.sort_by(|a, b| a.meta().name.cmp(&b.meta().name));
        pods.dedup_by(|a, b| a.meta().name == b.meta().name);
        pods
    }
}

/// Parts what can be read from what cannot.
fn sift<'a, T: Stored>(
    seen: impl IntoIterator<Item = &'a Seen<T>>,
    kind: &str,
    malformed: &mut Vec<String>,
) -> Vec<Arc<T>> {
    let mut valid = Vec::new();
    for seen in seen {
        match seen {
            Seen::Valid(object) => valid.push(object.clone()),
            Seen::Malformed { meta, error } => {
                let name = meta.name.as_deref().unwrap_or_default();
                malformed.push(format!("{kind} {name} cannot be read: {error}"));
            }
        }
    }
    valid
}

#[cfg(test)]
mod tests;
