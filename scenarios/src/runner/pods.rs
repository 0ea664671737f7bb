//! VMs whose ports are those of their pods: which ports and port groups a migration has to leave.

use std::collections::{BTreeMap, BTreeSet};

use crate::cni::kube_ovn;
use crate::lab::topology::Subnet;
use crate::report::Check;
use crate::scenario::{PortsOf, Topology};

use super::checks::Checks;
use super::ovn::Ovn;
use super::place::{Placed, misplaced};
use super::vm::RunningVm;

/// Names of the port groups that each port is in.
pub(super) type Groups = BTreeMap<String, BTreeSet<String>>;

/// The port groups of a VM's ports, but those of nodes, which a CNI moves them in and out of.
pub(super) fn groups(ovn: &Ovn, vm: &RunningVm) -> Groups {
    let of = |port: &str| {
        let mut groups = ovn.groups(port);
        groups.retain(|group| vm.layout.cni.is_none() || !kube_ovn::is_of_node(group));
        (port.to_owned(), groups)
    };
    vm.ports().map(of).collect()
}

/// One port is left, on the switch of the node where the guest runs and in the port groups of the
/// one before, and its place is where routes lead and not in segue's sets.
pub(super) fn check(ovn: &Ovn, vm: &RunningVm, node: &str, before: &Groups) -> Vec<Check> {
    let mut checks = Checks::default();
    let key = vm.spec.key();
    let now = groups(ovn, vm);
    checks.that(
        format!("the ports of {key} are in the port groups that they were in"),
        now == *before,
        || format!("{now:?}, before {before:?}"),
    );
    if vm.layout.ports_of == PortsOf::Pod
        && let Some(port) = vm.ports().next()
    {
        let (names, switches) = (ovn.names(port), ovn.switches(port));
        let switch = match vm.layout.topology {
            Topology::Shared => Subnet(0).switch(),
            Topology::Routed => node.to_owned(),
        };
        checks.that(
            format!("one pod's port of {key} is left, on switch {switch}"),
            names.len() == 1 && switches == [switch],
            || format!("{names:?} on {switches:?}"),
        );
        let wrong = misplaced(ovn, &Placed::in_sets(vm.routed()), None);
        checks.that(
            format!("no address of {key} is in a place set"),
            wrong.is_none(),
            || wrong.unwrap_or_default(),
        );
    }
    checks.0
}
