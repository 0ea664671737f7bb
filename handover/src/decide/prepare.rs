//! Before the outcome is known: T1, the barrier, and the flip on the guest's own word.

use super::{Decision, change, deadline, original, own_mark};
use crate::{
    ACTIVATION_STRATEGY, Chassis, GuestPlace, Mark, Observed, Phase, Port, PortConfig, PortWrite,
    Step, Waiting, Write, flip,
};

pub(super) fn prepare(observed: &Observed) -> Decision {
    let phase = phase_in_flight(observed, Phase::Preparing);
    let (Some(source), Some(target)) = (&observed.source, &observed.target) else {
        let missing = if observed.source.is_none() {
            Waiting::Source
        } else {
            Waiting::Target
        };
        return Decision::wait(Phase::Pending, missing);
    };
    if observed.ports.is_empty() {
        return Decision::wait(Phase::Pending, Waiting::Ports);
    }
    if let Some(waiting) = foreign_request(observed, source) {
        return Decision::wait(Phase::Pending, waiting);
    }
    let unarmed: Vec<_> = observed
        .ports
        .iter()
        .filter_map(|port| arm(observed, port, source, target))
        .collect();
    if !unarmed.is_empty() {
        return Decision::write(phase, Step::Arm, unarmed);
    }
    let routes = flip::in_flight(observed, source, target);
    if !routes.is_empty() {
        return Decision::flip(phase, observed, routes);
    }
    let moved = observed.signals.guest() == GuestPlace::Target;
    let kept_until = flip::kept_until(observed).filter(|_| moved);
    pass_barrier(observed, source, target).until(kept_until)
}

/// The phase of a handover whose migration runs: what the guest was last seen to do, else
/// `prepared`.
fn phase_in_flight(observed: &Observed, prepared: Phase) -> Phase {
    match observed.signals.guest() {
        GuestPlace::Source => prepared,
        GuestPlace::InTransit => Phase::Switching,
        GuestPlace::Target => Phase::Switched,
        GuestPlace::BackOnSource => Phase::RollingBack,
    }
}

/// A request that is neither segue's nor names the source is somebody's choice, to be left alone.
fn foreign_request(observed: &Observed, source: &Chassis) -> Option<Waiting> {
    observed
        .ports
        .iter()
        .filter(|port| port.config.mark.is_none())
        .find_map(|port| {
            let requested = port.config.requested_chassis.as_deref()?;
            let left_behind = || {
                observed
                    .former
                    .iter()
                    .any(|chassis| chassis.is_named_by(requested))
            };
            let ours = requested.is_empty() || source.is_named_by(requested) || left_behind();
            (!ours).then(|| Waiting::ForeignRequest {
                port: port.name.clone(),
                requested: requested.to_owned(),
            })
        })
}

fn arm(observed: &Observed, port: &Port, source: &Chassis, target: &Chassis) -> Option<PortWrite> {
    let mark = match own_mark(observed, port) {
        // The target's pod can be made again elsewhere: what was proved of the first is nothing to it.
        Some(mark) => Mark {
            source: source.name.clone(),
            target: target.name.clone(),
            barrier: mark.barrier.filter(|_| mark.target == target.name),
            ..mark.clone()
        },
        None => Mark {
            migration: observed.identity.migration.clone(),
            epoch: observed.identity.epoch,
            source: source.name.clone(),
            target: target.name.clone(),
            original: original(port, source),
            barrier: None,
            source_released: false,
        },
    };
    let config = PortConfig {
        requested_chassis: Some(format!("{},{}", source.name, target.name)),
        activation_strategy: strategy(observed, port),
        mark: Some(mark),
    };
    change(port, config)
}

/// The strategy to arm a port with: none once the guest runs on the target. Its announcement is over
/// by then, and a target that waited for one would stay closed until the migration ends. A port that
/// was armed in time keeps what it has.
fn strategy(observed: &Observed, port: &Port) -> Option<String> {
    if observed.signals.guest() != GuestPlace::Target {
        Some(ACTIVATION_STRATEGY.to_owned())
    } else if own_mark(observed, port).is_some() {
        port.config.activation_strategy.clone()
    } else {
        None
    }
}

fn pass_barrier(observed: &Observed, source: &Chassis, target: &Chassis) -> Decision {
    let preparing = phase_in_flight(observed, Phase::Preparing);
    let unclaimed = observed
        .ports
        .iter()
        .find(|port| !port.binding.is_claimed_by(target));
    if let Some(port) = unclaimed {
        let dropped = with_barrier(observed, None);
        if !dropped.is_empty() {
            return Decision::write(preparing, Step::DropBarrier, dropped);
        }
        return Decision::wait(
            preparing,
            Waiting::Claim {
                port: port.name.clone(),
                target: target.clone(),
            },
        );
    }
    let Some(barrier) = common_barrier(observed) else {
        return raise_barrier(observed, preparing);
    };
    let lagging: Vec<_> = observed
        .barrier
        .applied
        .iter()
        .filter(|&(_, applied)| *applied < barrier)
        .map(|(name, _)| name.clone())
        .collect();
    let (ends, peers): (Vec<_>, Vec<_>) = lagging
        .into_iter()
        .partition(|name| *name == source.name || *name == target.name);
    let deadline = deadline(observed.since.barrier, observed.deadlines.peers);
    let deadline_to_come = deadline.filter(|deadline| *deadline > observed.now);
    if !ends.is_empty() {
        let wait = Decision::wait(preparing, Waiting::Barrier { lagging: ends });
        return wait.until(deadline_to_come);
    }
    let peers_had_their_time = deadline.is_some() && deadline_to_come.is_none();
    if !peers.is_empty() && !peers_had_their_time {
        return Decision::wait(preparing, Waiting::Peers).until(deadline_to_come);
    }
    let phase = phase_in_flight(observed, Phase::Ready);
    let waiting = if phase == Phase::Ready {
        Waiting::Guest
    } else {
        Waiting::MigrationEnd
    };
    Decision::wait(phase, waiting)
}

/// The barrier that every port bears; `None` while one of them has none or another.
fn common_barrier(observed: &Observed) -> Option<i64> {
    let mut barriers = observed
        .ports
        .iter()
        .map(|port| own_mark(observed, port).and_then(|mark| mark.barrier));
    let first = barriers.next()??;
    barriers.all(|other| other == Some(first)).then_some(first)
}

fn raise_barrier(observed: &Observed, phase: Phase) -> Decision {
    let from = observed.barrier.nb_cfg;
    let ports = with_barrier(observed, Some(from.saturating_add(1)));
    Decision {
        write: Some(Write {
            step: Step::RaiseBarrier,
            ports,
            routes: Vec::new(),
            raise_nb_cfg_from: Some(from),
        }),
        ..Decision::at(phase)
    }
}

fn with_barrier(observed: &Observed, barrier: Option<i64>) -> Vec<PortWrite> {
    observed
        .ports
        .iter()
        .filter_map(|port| {
            let mark = Mark {
                barrier,
                ..own_mark(observed, port)?.clone()
            };
            change(
                port,
                PortConfig {
                    mark: Some(mark),
                    ..port.config.clone()
                },
            )
        })
        .collect()
}
