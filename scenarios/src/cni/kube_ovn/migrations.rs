//! What the controller writes when the phase of a migration changes (`pkg/controller/kubevirt.go`,
//! `handleAddOrUpdateVMIMigration`). Only with `--enable-live-migration-optimize`.

use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt as _;

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
    let nothing = Outcome::Done(Vec::new());
    let status = migration.status.as_ref();
    if status.is_none_or(|status| status.migration_state.is_none()) {
        return nothing;
    }
    // The VMI's state may be another migration's, and is the last one's until the hand-over of the next.
    let state = vmi
        .migration_state()
        .filter(|state| state.migration_uid == migration.uid());
    let node = |node: Option<&String>| node.filter(|node| !node.is_empty()).cloned();
    let source = node(state.and_then(|state| state.source_node.as_ref()));
    let target = node(state.and_then(|state| state.target_node.as_ref()));
    let key = format!("{}/{}", vmi.namespace().unwrap_or_default(), vmi.name_any());
    let ports = cache.ports_of(&key);
    match migration.phase() {
        Some(VmimPhase::Scheduling) => {
            let is_target = |pod: &&&Pod| {
                let uid = pod.labels().get(names::MIGRATION_JOB_UID);
                uid.is_some()
                    && uid == migration.uid().as_ref()
                    && pod.namespace() == migration.namespace()
            };
            let Some(pod) = pods.iter().find(is_target) else {
                return nothing;
            };
            let home = vmi
                .status
                .as_ref()
                .and_then(|status| status.node_name.as_ref());
            match (source.or_else(|| node(home)), pods::node(pod)) {
                (Some(source), Some(target)) if source == *target => nothing,
                (Some(source), Some(target)) => {
                    let armed = ports.filter_map(|(port, row)| {
                        let options = armed(row, &source, target)?;
                        Some(Write::Options { port, options })
                    });
                    Outcome::Done(armed.collect())
                }
                _ => Outcome::Deferred,
            }
        }
        Some(phase @ (VmimPhase::Succeeded | VmimPhase::Failed)) => {
            let place = if phase == VmimPhase::Failed {
                source
            } else {
                target
            };
            let Some(place) = place.filter(|_| state.is_some()) else {
                return nothing;
            };
            let reset = ports.filter_map(|(port, row)| {
                let options = reset(row, &place)?;
                Some(Write::Options { port, options })
            });
            Outcome::Done(reset.collect())
        }
        _ => nothing,
    }
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
