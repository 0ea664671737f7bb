//! The virt-launcher pod, as virt-controller renders it.

use std::collections::BTreeMap;

use k8s_openapi::{
    api::core::v1::{Affinity, Container, Pod, PodAffinityTerm, PodAntiAffinity, PodSpec},
    apimachinery::pkg::apis::meta::v1::{LabelSelector, ObjectMeta},
};
use kube::{Resource as _, ResourceExt as _};

use super::{VirtualMachineInstance, VirtualMachineInstanceMigration, names};

/// The image is never pulled; a person who lists pods sees what they would see in a cluster.
const IMAGE: &str = "quay.io/kubevirt/virt-launcher:v1.9.0";
/// KubeVirt adds 15 s twice to the 30 s that a VMI gets unless it says otherwise.
const GRACE_SECONDS: i64 = 60;
/// What virt-controller works out for a guest of this size, in bytes.
const MEMORY_OVERHEAD: &str = "272629760";
const HOSTNAME: &str = "kubernetes.io/hostname";
const LABEL_VALUE_MAX: usize = 63;

/// The pod that a VMI starts in.
pub(super) fn launcher(vmi: &VirtualMachineInstance) -> Pod {
    let name = vmi.name_any();
    let short: String = name.chars().take(LABEL_VALUE_MAX).collect();
    // All labels of the VMI, `kubevirt.io/nodeName` included: on a target that is the source's name.
    let mut labels = vmi.labels().clone();
    labels.extend(
        [
            (names::APP, names::VIRT_LAUNCHER.to_owned()),
            (names::CREATED_BY, vmi.uid().unwrap_or_default()),
            (names::VM_NAME, short.clone()),
            (names::VMI_ID, short),
        ]
        .map(|(label, value)| (label.to_owned(), value)),
    );
    let mut annotations = vmi.annotations().clone();
    annotations.retain(|annotation, _| !annotation.starts_with("kubectl.kubernetes.io"));
    annotations.insert(names::DOMAIN.into(), name.clone());
    annotations.insert(
        "kubectl.kubernetes.io/default-container".into(),
        "compute".into(),
    );
    annotations.insert("kubevirt.io/migrationTransportUnix".into(), "true".into());
    annotations.insert(names::MEMORY_OVERHEAD_BYTES.into(), MEMORY_OVERHEAD.into());

    let mut node_selector = BTreeMap::from([(names::SCHEDULABLE.to_owned(), "true".to_owned())]);
    node_selector.extend(vmi.spec.node_selector.clone());
    Pod {
        metadata: ObjectMeta {
            generate_name: Some(format!("virt-launcher-{name}-")),
            namespace: vmi.namespace(),
            labels: Some(labels),
            annotations: Some(annotations),
            owner_references: vmi.controller_owner_ref(&()).map(|owner| vec![owner]),
            ..ObjectMeta::default()
        },
        spec: Some(PodSpec {
            init_containers: Some(vec![Container {
                restart_policy: Some("Always".into()),
                ..container("guest-console-log")
            }]),
            containers: vec![container("compute")],
            node_selector: Some(node_selector),
            restart_policy: Some("Never".into()),
            termination_grace_period_seconds: Some(GRACE_SECONDS),
            automount_service_account_token: Some(false),
            enable_service_links: Some(false),
            ..PodSpec::default()
        }),
        status: None,
    }
}

/// The second one is a side-car: a container that starts before the others and runs beside them
/// (`pkg/virt-controller/services/serialconsolelog.go`).
fn container(name: &str) -> Container {
    Container {
        name: name.into(),
        image: Some(IMAGE.into()),
        ..Container::default()
    }
}

/// The pod that a migration copies a VMI into.
pub(super) fn target(
    vmi: &VirtualMachineInstance,
    migration: &VirtualMachineInstanceMigration,
) -> Pod {
    let mut pod = launcher(vmi);
    pod.labels_mut().insert(
        names::MIGRATION_JOB_UID.into(),
        migration.uid().unwrap_or_default(),
    );
    pod.annotations_mut()
        .insert(names::MIGRATION_JOB_NAME.into(), migration.name_any());
    if let Some(spec) = &mut pod.spec {
        let mut selector = migration.spec.added_node_selector.clone();
        selector.extend(spec.node_selector.take().unwrap_or_default());
        spec.node_selector = Some(selector);
        spec.affinity = Some(apart_from_the_others_of(vmi));
    }
    pod
}

fn apart_from_the_others_of(vmi: &VirtualMachineInstance) -> Affinity {
    let of_the_vmi = LabelSelector {
        match_labels: Some([(names::CREATED_BY.to_owned(), vmi.uid().unwrap_or_default())].into()),
        ..LabelSelector::default()
    };
    let term = PodAffinityTerm {
        label_selector: Some(of_the_vmi),
        topology_key: HOSTNAME.into(),
        ..PodAffinityTerm::default()
    };
    Affinity {
        pod_anti_affinity: Some(PodAntiAffinity {
            required_during_scheduling_ignored_during_execution: Some(vec![term]),
            ..PodAntiAffinity::default()
        }),
        ..Affinity::default()
    }
}

/// What virt-controller asks of a pod.
pub(super) trait PodState {
    /// It has ended.
    fn is_down(&self) -> bool;
    /// It has ended, or is being deleted.
    fn is_going(&self) -> bool;
    /// Its compute container runs.
    fn is_ready(&self) -> bool;
    fn phase(&self) -> &str;
    fn node(&self) -> Option<&str>;
}

impl PodState for Pod {
    fn is_down(&self) -> bool {
        matches!(self.phase(), "Succeeded" | "Failed")
    }

    fn is_going(&self) -> bool {
        self.is_down() || self.metadata.deletion_timestamp.is_some()
    }

    fn is_ready(&self) -> bool {
        let statuses = self
            .status
            .iter()
            .filter_map(|status| status.container_statuses.as_ref())
            .flatten();
        let running = |state: &k8s_openapi::api::core::v1::ContainerState| state.running.is_some();
        !self.is_going()
            && self.phase() == "Running"
            && statuses
                .into_iter()
                .all(|status| status.state.as_ref().is_some_and(running))
    }

    fn phase(&self) -> &str {
        self.status
            .as_ref()
            .and_then(|status| status.phase.as_deref())
            .unwrap_or_default()
    }

    fn node(&self) -> Option<&str> {
        self.spec.as_ref()?.node_name.as_deref()
    }
}
