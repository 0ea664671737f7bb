//! From what Kubernetes and OVN say to what a decision is made on. No I/O.

mod announce;
mod outcome;
mod places;
mod pods;
mod preflight;
mod signals;

use std::collections::BTreeSet;
use std::time::Duration;

use handover::{
    Barrier, Chassis, Deadlines, Earlier, FlipPolicy, Identity, Mark, MarkError, MigrationUid,
    Newer, Observed, Outcome, Port, PortConfig, PortName, Route, Side, Since,
};

use crate::agents::Learned;
use crate::api::{HandoverSpec, HandoverStatus, Moment, TimelineStep};
use crate::cluster::VmObjects;
use crate::kubevirt::{MigrationState, VirtualMachineInstanceMigration};
use crate::ovn::{PortRow, read_config};

pub(crate) use outcome::Ending;
pub(crate) use preflight::{Incompatible, preflight};

/// What an observation is made from.
pub(crate) struct Inputs<'a> {
    /// When.
    pub(crate) now: Moment,
    /// The VM's objects.
    pub(crate) objects: &'a VmObjects,
    /// The migration, while it exists.
    pub(crate) migration: Option<&'a VirtualMachineInstanceMigration>,
    /// The chassis that earlier migrations of the VM left.
    pub(crate) former: &'a [Chassis],
    /// The VM's ports.
    pub(crate) ports: &'a [PortRow],
    /// Its routes, and the chassis that they can lead to.
    pub(crate) routes: (&'a [Route], &'a BTreeSet<String>),
    /// When they follow the guest.
    pub(crate) flip: FlipPolicy,
    /// How far the chassis have followed.
    pub(crate) barrier: Barrier,
    /// The chassis of a node.
    pub(crate) chassis_of: &'a dyn Fn(&str) -> Option<Chassis>,
    /// How long to wait for what.
    pub(crate) patience: Patience,
    /// What the nodes' agents have told. No older than `ports`: an agent can have activated them.
    pub(crate) learned: &'a Learned,
}

/// How long to wait for what may never come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Patience {
    /// The domain core's deadlines.
    pub(crate) deadlines: Deadlines,
    /// After the last container of a finished pod: how long its interface may linger.
    pub(crate) pod_gone_grace: Duration,
}

/// What was seen, with what it could not be made of.
#[derive(Debug)]
pub(crate) struct Observation {
    /// What to decide on.
    pub(crate) observed: Observed,
    /// How the migration stands, in more detail than the decision needs.
    pub(crate) ending: Ending,
    /// Why the migration did not succeed, in KubeVirt's words.
    pub(crate) failure: Option<String>,
    /// Ports whose marks cannot be read. They are left alone.
    pub(crate) damaged: Vec<(PortName, MarkError)>,
    /// Why an end of the migration is no chassis.
    pub(crate) unmapped: Option<String>,
    /// Why routes cannot follow the guest, where there are some that should.
    pub(crate) hindrance: Option<String>,
    /// Why what is decided cannot be carried out.
    pub(crate) obstacle: Option<String>,
    /// Look again then, even if nothing changes.
    pub(crate) recheck: Option<Moment>,
}

/// Observes one handover, and brings its record up to date with what was learned: places and ports
/// in `spec`, signals and the end of the migration in `status`.
///
/// What the record holds is used where the world has forgotten it: the source once the VM's node has
/// flipped, a chassis once its node is gone, the time of a signal once it has been seen.
pub(crate) fn observe(
    inputs: &Inputs<'_>,
    spec: &mut HandoverSpec,
    status: &mut HandoverStatus,
) -> Observation {
    let state = migration_state(inputs, &spec.migration.uid);
    let (ports, damaged) = read_ports(inputs, spec);
    let identity = Identity {
        migration: MigrationUid::new(&spec.migration.uid),
        epoch: spec.epoch(),
    };
    let held = ports.iter().any(|port| own_mark(port, &identity).is_some());
    let begun = held || status.step(TimelineStep::Armed).is_some();
    places::update(inputs, state, begun, spec);
    if !ports.is_empty() {
        spec.ports = ports.iter().map(|port| port.name.to_string()).collect();
    }
    let ending = outcome::ending(inputs, state, held, spec);
    if ending != Ending::Running {
        status.take_step_once(TimelineStep::MigrationEnded, inputs.now);
    }
    // First: what opened the port says what its being open means.
    signals::measure(inputs.learned, status);
    signals::note(inputs, state, spec, &ending, &identity, status);
    find_steps(inputs.now, &ports, &identity, status);
    let source_pod = pods::gone(inputs, pods::on_source(inputs, spec));
    let target_pod = pods::gone(inputs, pods::of_target(inputs, spec));
    let chassis = |place: &Option<_>| place.as_ref().and_then(crate::api::Place::chassis);
    let ends = (chassis(&spec.source), chassis(&spec.target));
    let (outcome, (source, target)) = match &ending {
        Ending::Running => (Outcome::Running, ends),
        Ending::On(side) => (Outcome::GuestOn(*side), ends),
        // The guest has moved on since: wherever it is now is the only place its ports may go.
        Ending::Elsewhere { node, followed } => {
            let here = (inputs.chassis_of)(node);
            if *followed {
                (Outcome::GuestOn(Side::Target), (ends.0, here))
            } else {
                (Outcome::GuestOn(Side::Source), (here, None))
            }
        }
        Ending::Gone => (Outcome::GuestGone, ends),
    };
    let named = inputs.objects.vmi.as_ref();
    let named = named.and_then(|vmi| vmi.migration_state(&spec.migration.uid));
    let observed = Observed {
        now: inputs.now.into(),
        identity,
        newer: Newer::default(),
        earlier: Earlier::default(),
        is_named: named.is_some(),
        former: inputs.former.to_vec(),
        outcome,
        source,
        target,
        source_pod_gone: source_pod.gone,
        target_pod_gone: target_pod.gone,
        signals: status.signals(),
        ports,
        routes: inputs.routes.0.to_vec(),
        gateways: inputs.routes.1.clone(),
        flip: inputs.flip,
        barrier: inputs.barrier.clone(),
        since: Since {
            barrier: status.step(TimelineStep::BarrierRaised).map(Into::into),
            outcome: status.step(TimelineStep::MigrationEnded).map(Into::into),
        },
        deadlines: inputs.patience.deadlines,
    };
    let recheck = source_pod.recheck.into_iter().chain(target_pod.recheck);
    Observation {
        observed,
        ending,
        failure: state.and_then(failure),
        damaged,
        unmapped: None,
        hindrance: None,
        obstacle: None,
        recheck: recheck.min(),
    }
}

/// Records the steps whose traces are on the ports, where a crash kept them from the record.
fn find_steps(now: Moment, ports: &[Port], identity: &Identity, status: &mut HandoverStatus) {
    for port in ports {
        let Some(mark) = own_mark(port, identity) else {
            continue;
        };
        let requested = port.config.requested_chassis.as_deref().unwrap_or_default();
        if requested.contains(',') {
            status.take_step_once(TimelineStep::Armed, now);
        } else if requested == mark.source || requested == mark.target {
            status.take_step_once(TimelineStep::Settled, now);
        }
        if mark.barrier.is_some() {
            status.take_step_once(TimelineStep::BarrierRaised, now);
        }
    }
}

/// What KubeVirt says about this very migration: in the VM's state, else in the migration's own copy.
fn migration_state<'a>(inputs: &Inputs<'a>, uid: &str) -> Option<&'a MigrationState> {
    let of_vmi = inputs
        .objects
        .vmi
        .as_ref()
        .and_then(|vmi| vmi.migration_state(uid));
    of_vmi.or_else(|| {
        let state = inputs
            .migration?
            .status
            .as_ref()?
            .migration_state
            .as_ref()?;
        (state.migration_uid.as_deref() == Some(uid)).then_some(state)
    })
}

fn failure(state: &MigrationState) -> Option<String> {
    let told = state
        .failure_reason
        .clone()
        .filter(|reason| !reason.is_empty());
    let cancelled =
        || (state.abort_requested == Some(true)).then(|| "the migration was cancelled".into());
    told.or_else(cancelled)
}

/// The ports, and those whose marks cannot be read. A guest that leaves for another cluster, or comes
/// from one, takes none along.
fn read_ports(inputs: &Inputs<'_>, spec: &HandoverSpec) -> (Vec<Port>, Vec<(PortName, MarkError)>) {
    let (mut ports, mut damaged) = (Vec::new(), Vec::new());
    let migration = inputs.migration;
    let is_between = migration.is_some_and(VirtualMachineInstanceMigration::is_between_clusters);
    for row in inputs.ports.iter().filter(|_| !is_between) {
        match read_config(row) {
            Ok(config) => ports.push(port(inputs, spec, row, config)),
            Err(error) => damaged.push((row.name.clone(), error)),
        }
    }
    (ports, damaged)
}

fn port(inputs: &Inputs<'_>, spec: &HandoverSpec, row: &PortRow, config: PortConfig) -> Port {
    Port {
        name: row.name.clone(),
        config,
        binding: row.binding.clone(),
        activated: row.activated.clone(),
        announces: announce::announces(inputs, spec, row),
    }
}

/// The mark of this very handover on a port.
fn own_mark<'a>(port: &'a Port, identity: &Identity) -> Option<&'a Mark> {
    let mark = port.config.mark.as_ref()?;
    is_own(mark, identity).then_some(mark)
}

fn is_own(mark: &Mark, identity: &Identity) -> bool {
    mark.migration == identity.migration && mark.epoch == identity.epoch
}

#[cfg(test)]
mod tests;
