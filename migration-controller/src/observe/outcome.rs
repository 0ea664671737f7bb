//! How a migration stands, fused from the objects that tell.

use handover::Side;

use super::{Inputs, pods};
use crate::api::{HandoverSpec, Place};
use crate::kubevirt::{
    MigrationEnd, MigrationState, VirtualMachineInstance, VirtualMachineInstanceMigration,
};

/// How a migration stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Ending {
    /// It may still go either way.
    Running,
    /// It is over and the guest runs on this side.
    On(Side),
    /// It is over and the guest is on a third node.
    Elsewhere {
        /// Which.
        node: String,
        /// This migration had moved something, or its guest: what it left behind follows.
        followed: bool,
    },
    /// There is no guest any more.
    Gone,
}

pub(super) fn ending(
    inputs: &Inputs<'_>,
    state: Option<&MigrationState>,
    held: bool,
    spec: &HandoverSpec,
) -> Ending {
    let migration = inputs.migration;
    let migration_end = migration.and_then(VirtualMachineInstanceMigration::end);
    let Some(vmi) = &inputs.objects.vmi else {
        // The watches are independent: a migration can be seen before its VM. One that is under way
        // and whose VM was never seen is not one whose VM is gone.
        let never_seen = spec.vm.uid.is_none() && migration.is_some() && migration_end.is_none();
        return if never_seen {
            Ending::Running
        } else {
            Ending::Gone
        };
    };
    if vmi.is_final() || is_another(vmi, spec) {
        return Ending::Gone;
    }
    let ends = [state.and_then(MigrationState::end), migration_end];
    if ends.contains(&Some(MigrationEnd::Succeeded)) {
        // The VM's node may be older news than the success, so only a third node outweighs it.
        return match whereabouts(vmi, spec, true) {
            elsewhere @ Ending::Elsewhere { .. } => elsewhere,
            _ => Ending::On(Side::Target),
        };
    }
    let begun = held || state.is_some();
    if ends.contains(&Some(MigrationEnd::Failed)) {
        return whereabouts(vmi, spec, begun);
    }
    if migration.is_some() {
        return Ending::Running;
    }
    // The migration object is gone without a word about its end: somebody removed its finalizer, or
    // the VM's news is late. As long as the guest may still be moving, it is moving.
    let may_move = state.is_some() && !pods::gone(inputs, pods::of_target(inputs, spec)).gone;
    if may_move {
        Ending::Running
    } else {
        whereabouts(vmi, spec, begun)
    }
}

/// Whether the VM of that name is another instance than the one that migrated.
fn is_another(vmi: &VirtualMachineInstance, spec: &HandoverSpec) -> bool {
    let uids = spec.vm.uid.as_ref().zip(vmi.metadata.uid.as_ref());
    uids.is_some_and(|(ours, theirs)| ours != theirs)
}

/// Where the VM says that its guest is. Only of a migration that has `begun` that can be its doing:
/// before, what is known of the VM can be from before an earlier one moved the guest.
fn whereabouts(vmi: &VirtualMachineInstance, spec: &HandoverSpec, begun: bool) -> Ending {
    let is_at = |place: &Option<Place>, here: &str| {
        let place = place.as_ref();
        place.is_some_and(|place| place.node == here)
    };
    match vmi.node_name() {
        Some(here) if begun && is_at(&spec.target, here) => Ending::On(Side::Target),
        Some(here) if spec.source.is_some() && !is_at(&spec.source, here) => Ending::Elsewhere {
            node: here.to_owned(),
            followed: begun,
        },
        _ => Ending::On(Side::Source),
    }
}
