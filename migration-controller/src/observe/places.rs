//! Where the guest comes from and goes to.

use handover::{SourceWords, source};

use super::{Inputs, pods};
use crate::api::{HandoverSpec, Place};
use crate::kubevirt::{MigrationState, VirtualMachineInstanceMigration};

/// Brings the record's places up to date. `begun`: something was written for the handover.
pub(super) fn update(
    inputs: &Inputs<'_>,
    state: Option<&MigrationState>,
    begun: bool,
    spec: &mut HandoverSpec,
) {
    if inputs
        .migration
        .is_some_and(VirtualMachineInstanceMigration::is_between_clusters)
    {
        return;
    }
    if let Some(node) = source_node(inputs, state, begun, spec) {
        let pod = state.and_then(|state| named(state.source_pod.as_ref()));
        let place = move_to(spec.source.take(), node, pod);
        spec.source = Some(located(inputs, place));
        name_source_pod(inputs, spec);
    }
    if let Some((node, pod)) = target_node(inputs, state, &spec.migration.uid) {
        let place = move_to(spec.target.take(), node, pod);
        spec.target = Some(located(inputs, place));
    } else if let Some(known) = spec.target.take() {
        spec.target = Some(located(inputs, known));
    }
    let same = spec.source.as_ref().zip(spec.target.as_ref());
    if same.is_some_and(|(source, target)| source.node == target.node) {
        // News of different ages. The pod's node is a fact; where the guest is can be old news.
        spec.source = None;
    }
}

/// The node the guest leaves.
fn source_node(
    inputs: &Inputs<'_>,
    state: Option<&MigrationState>,
    begun: bool,
    spec: &HandoverSpec,
) -> Option<String> {
    let told = state.and_then(|state| named(state.source_node.as_ref()));
    let recorded = spec.source.as_ref().map(|source| source.node.clone());
    let under_way = inputs
        .migration
        .is_some_and(|migration| migration.end().is_none());
    let vmi = inputs.objects.vmi.as_ref().filter(|_| under_way);
    let now = vmi.and_then(|vmi| vmi.node_name()).map(str::to_owned);
    source(SourceWords {
        told,
        now,
        recorded,
        begun,
    })
}

/// The node the guest goes to: the target pod's, which is known long before KubeVirt says so.
fn target_node(
    inputs: &Inputs<'_>,
    state: Option<&MigrationState>,
    migration: &str,
) -> Option<(String, Option<String>)> {
    let pod = pods::newest_target(inputs, migration);
    let placed = pod.and_then(|pod| Some((named(pod.node.as_ref())?, Some(pod.name().to_owned()))));
    placed.or_else(|| {
        let state = state?;
        let node = named(state.target_node.as_ref())?;
        Some((node, named(state.target_pod.as_ref())))
    })
}

/// The pod on the source, where nobody has said which it is.
fn name_source_pod(inputs: &Inputs<'_>, spec: &mut HandoverSpec) {
    let found = pods::on_source(inputs, spec)
        .last()
        .map(|pod| pod.name().to_owned());
    if let Some(source) = &mut spec.source
        && source.pod.is_none()
    {
        source.pod = found;
    }
}

/// The known place, or a new one where the node is another.
fn move_to(known: Option<Place>, node: String, pod: Option<String>) -> Place {
    let known = known.filter(|known| known.node == node);
    let mut place = known.unwrap_or_else(|| Place {
        node,
        ..Place::default()
    });
    place.pod = pod.or(place.pod);
    place
}

/// The place with its chassis as it is now, or as it was last known.
fn located(inputs: &Inputs<'_>, mut place: Place) -> Place {
    if let Some(chassis) = (inputs.chassis_of)(&place.node) {
        place.chassis_hostname = Some(chassis.hostname).filter(|hostname| !hostname.is_empty());
        place.chassis = Some(chassis.name);
    }
    place
}

fn named(text: Option<&String>) -> Option<String> {
    text.filter(|text| !text.is_empty()).cloned()
}
