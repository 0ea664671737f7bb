//! What the controller writes when the phase of a migration changes (`pkg/controller/kubevirt.go`,
//! `handleAddOrUpdateVMIMigration`). Only with `--enable-live-migration-optimize`.

use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt as _;
use uuid::Uuid;

use super::cache::{Cache, Port};
use super::pods;
use super::write::Write;
use super::{REQUESTED, STRATEGY};
use crate::kubevirt::{VirtualMachineInstance, VirtualMachineInstanceMigration, VmimPhase, names};

/// What a look at a migration comes to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// These writes, or none.
    Done(Vec<Write>),
    /// The target's node is not known yet: it looks again, with a back-off.
    Deferred,
}

/// Decides by what the API says of the migration and of its VMI now, and by the pods that are remembered.
pub(super) fn decide(
    cache: &Cache,
    migration: &VirtualMachineInstanceMigration,
    vmi: &VirtualMachineInstance,
    pods: &[&Pod],
) -> Outcome {
    let status = migration.status.as_ref();
    if status.is_none_or(|status| status.migration_state.is_none()) {
        return Outcome::Done(Vec::new());
    }
    let key = format!("{}/{}", vmi.namespace().unwrap_or_default(), vmi.name_any());
    let ports = cache.ports_of(&key);
    // The VMI's state may be another migration's, and is the last one's until the hand-over of the next.
    let state = vmi.migration_state();
    let state = state.filter(|state| state.migration_uid == migration.uid());
    let source = state.and_then(|state| state.source_node.as_deref());
    match migration.phase() {
        Some(VmimPhase::Scheduling) => {
            let status = vmi.status.as_ref();
            let home = status.and_then(|status| status.node_name.as_deref());
            let target = pods.iter().find(|pod| is_target(pod, migration));
            target.map_or(Outcome::Done(Vec::new()), |pod| {
                scheduling(ports, source.or(home), pods::node(pod))
            })
        }
        Some(VmimPhase::Succeeded) => {
            let target = state.and_then(|state| state.target_node.as_deref());
            Outcome::Done(over(ports, target))
        }
        Some(VmimPhase::Failed) => Outcome::Done(over(ports, source)),
        _ => Outcome::Done(Vec::new()),
    }
}

fn is_target(pod: &Pod, migration: &VirtualMachineInstanceMigration) -> bool {
    let uid = pod.labels().get(names::MIGRATION_JOB_UID);
    uid.is_some() && uid == migration.uid().as_ref() && pod.namespace() == migration.namespace()
}

fn scheduling<'c>(
    ports: impl Iterator<Item = (Uuid, &'c Port)>,
    source: Option<&str>,
    target: Option<&String>,
) -> Outcome {
    let (Some(source), Some(target)) = (source, target) else {
        return Outcome::Deferred;
    };
    if source == target {
        return Outcome::Done(Vec::new());
    }
    let armed = ports.filter_map(|(port, row)| {
        let options = armed(row, source, target)?;
        Some(Write::Options { port, options })
    });
    Outcome::Done(armed.collect())
}

/// Where the node is not known nothing is written.
fn over<'c>(ports: impl Iterator<Item = (Uuid, &'c Port)>, place: Option<&str>) -> Vec<Write> {
    let Some(place) = place else {
        return Vec::new();
    };
    let reset = ports.filter_map(|(port, row)| {
        let options = reset(row, place)?;
        Some(Write::Options { port, options })
    });
    reset.collect()
}

type Options = std::collections::BTreeMap<String, String>;

/// `SetLogicalSwitchPortMigrateOptions`: names are compared as texts, and the strategy is not looked at.
fn armed(port: &Port, source: &str, target: &str) -> Option<Options> {
    let both = format!("{source},{target}");
    if port.options.get(REQUESTED) == Some(&both) {
        return None;
    }
    let mut options = port.options.clone();
    options.insert(REQUESTED.to_owned(), both);
    options.insert(STRATEGY.to_owned(), "rarp".to_owned());
    Some(options)
}

/// `ResetLogicalSwitchPortMigrateOptions`: whatever is requested, unless it is nothing.
fn reset(port: &Port, place: &str) -> Option<Options> {
    let mut options = port.options.clone();
    let requested = options.get_mut(REQUESTED)?;
    place.clone_into(requested);
    options.remove(STRATEGY);
    Some(options)
}
