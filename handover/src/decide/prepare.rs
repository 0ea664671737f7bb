//! Before the outcome is known: T1, the barrier, and the flip on the guest's own word.

use super::request::{
    Request, contradiction, held, is_old_news, names_exactly, original, request, theirs,
};
use super::{Decision, change, deadline, open, own_mark};
use crate::{
    ACTIVATION_STRATEGY, Chassis, GuestPlace, Mark, Observed, Phase, Port, PortConfig, PortName,
    PortWrite, Step, Waiting, Write, flip,
};

pub(super) fn prepare(observed: &Observed) -> Decision {
    let (Some(source), Some(target)) = (&observed.source, &observed.target) else {
        let missing = if observed.source.is_none() {
            Waiting::Source
        } else {
            Waiting::Target
        };
        return Decision::wait(Phase::Pending, missing);
    };
    if let Some(waiting) = blocked(observed, source, target) {
        let begun = held(observed).next().is_some();
        let phase = if begun {
            Phase::Preparing
        } else {
            Phase::Pending
        };
        return Decision::wait(phase_in_flight(observed, phase), waiting);
    }
    let phase = phase_in_flight(observed, Phase::Preparing);
    let unarmed = unarmed(observed, source, target);
    let left_out = left_out(observed, source, target);
    let decision = if unarmed.is_empty() {
        follow(observed, phase, source, target)
    } else {
        Decision::write(phase, Step::Arm, unarmed)
    };
    Decision {
        left_out,
        ..decision
    }
}

/// What arms the ports that are not.
pub(super) fn unarmed(observed: &Observed, source: &Chassis, target: &Chassis) -> Vec<PortWrite> {
    participants(observed, source, target)
        .filter_map(|port| arm(observed, port, source, target))
        .collect()
}

/// All ports are armed: what is next.
fn follow(observed: &Observed, phase: Phase, source: &Chassis, target: &Chassis) -> Decision {
    let shut = open::shut(observed, source, target);
    if !shut.is_empty() {
        return Decision::write(phase, Step::Open, shut);
    }
    let routes = flip::in_flight(observed, source, target);
    if !routes.is_empty() {
        return Decision::flip(phase, observed, routes);
    }
    let moved = observed.signals.guest() == GuestPlace::Target;
    let kept_until = flip::kept_until(observed).filter(|_| moved);
    pass_barrier(observed, source, target)
        .until(kept_until)
        .until(open::due(observed, target))
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

/// What keeps the handover from writing anything.
fn blocked(observed: &Observed, source: &Chassis, target: &Chassis) -> Option<Waiting> {
    if observed.ports.is_empty() {
        return Some(Waiting::Ports);
    }
    if is_old_news(observed, source) {
        return Some(Waiting::EarlierMigration);
    }
    contradiction(observed, [source, target], |_| true)
        .or_else(|| foreign_request(observed, source, target))
        .or_else(|| {
            let none = participants(observed, source, target).next().is_none();
            none.then_some(Waiting::Interface)
        })
}

/// The choice of somebody else's that keeps a port with an interface from this handover.
fn foreign_request(observed: &Observed, source: &Chassis, target: &Chassis) -> Option<Waiting> {
    let mut ports = observed.ports.iter();
    let is_theirs = |port: &&Port| {
        let is_used = port.binding.is_claimed_by(source) || port.binding.is_claimed_by(target);
        let is_used = is_used || own_mark(observed, port).is_some();
        is_used
            && request(observed, port) == Request::Theirs
            && !is_taken_over(observed, port, target)
    };
    ports.find(is_theirs).map(theirs)
}

/// Whether somebody else has ended the handover of this port, with the target as its only chassis:
/// nothing is left to prepare.
fn is_taken_over(observed: &Observed, port: &Port, target: &Chassis) -> bool {
    let moved = observed.signals.guest() == GuestPlace::Target;
    let begun = own_mark(observed, port).is_some() || moved;
    begun && names_exactly(port, &[target]) && port.binding.is_claimed_by(target)
}

/// The ports that this handover moves. One that no chassis has claimed may have an interface on the
/// target all the same, where its request is what keeps the target from claiming it.
fn participants<'a>(
    observed: &'a Observed,
    source: &'a Chassis,
    target: &'a Chassis,
) -> impl Iterator<Item = &'a Port> {
    let takes_part = move |port: &&Port| {
        let is_used = port.binding.is_claimed_by(source) || port.binding.is_claimed_by(target);
        match request(observed, port) {
            Request::Theirs => false,
            Request::Unset => is_used || own_mark(observed, port).is_some(),
            Request::Pinned | Request::Handover | Request::Leftover => {
                is_used || port.is_unclaimed() || own_mark(observed, port).is_some()
            }
        }
    };
    observed.ports.iter().filter(takes_part)
}

fn left_out(observed: &Observed, source: &Chassis, target: &Chassis) -> Vec<PortName> {
    let is_waited_for = |port: &Port| is_waited_for(observed, port, source);
    let ports = observed.ports.iter();
    ports
        .filter(|port| !is_waited_for(port) && !port.binding.is_claimed_by(target))
        .map(|port| port.name.clone())
        .collect()
}

/// Whether the target must claim the port before the handover is ready: it has, or had, an interface
/// on the source.
fn is_waited_for(observed: &Observed, port: &Port, source: &Chassis) -> bool {
    let armed_with_interface =
        own_mark(observed, port).is_some() && port.config.activation_strategy.is_some();
    armed_with_interface || port.binding.is_claimed_by(source)
}

fn arm(observed: &Observed, port: &Port, source: &Chassis, target: &Chassis) -> Option<PortWrite> {
    if is_taken_over(observed, port, target) {
        return None;
    }
    let is_listed = names_exactly(port, &[source, target]);
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
            original: original(observed, port, source),
            barrier: None,
            source_released: false,
        },
    };
    let both = || format!("{},{}", source.name, target.name);
    // Once armed, a strategy only ever goes: what has been opened is not shut again.
    let strategy = if is_listed && own_mark(observed, port).is_some() {
        port.config.activation_strategy.clone()
    } else {
        let shut = open::is_to_be_shut(observed, port, source, target);
        shut.then(|| ACTIVATION_STRATEGY.to_owned())
    };
    let config = PortConfig {
        // Whoever calls the two chassis by their other names has asked for the same.
        requested_chassis: port
            .config
            .requested_chassis
            .clone()
            .filter(|_| is_listed)
            .or_else(|| Some(both())),
        activation_strategy: strategy,
        mark: Some(mark),
    };
    change(port, config)
}

fn pass_barrier(observed: &Observed, source: &Chassis, target: &Chassis) -> Decision {
    let preparing = phase_in_flight(observed, Phase::Preparing);
    if let Some(port) = unclaimed(observed, source, target) {
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
    if held(observed).next().is_none() {
        // Somebody else has moved all of them.
        return Decision::wait(preparing, Waiting::MigrationEnd);
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

/// A port that the target has yet to claim; any of them, while it has claimed none.
fn unclaimed<'a>(observed: &'a Observed, source: &Chassis, target: &Chassis) -> Option<&'a Port> {
    let is_claimed = |port: &&Port| port.binding.is_claimed_by(target);
    let mut ports = observed.ports.iter();
    let awaited = |port: &&Port| is_waited_for(observed, port, source) && !is_claimed(port);
    let any = || {
        held(observed)
            .next()
            .filter(|_| !held(observed).any(|port| is_claimed(&port)))
    };
    ports.find(awaited).or_else(any)
}

/// The barrier that every port that is held bears; `None` while one of them has none or another.
fn common_barrier(observed: &Observed) -> Option<i64> {
    let mut barriers =
        held(observed).map(|port| own_mark(observed, port).and_then(|mark| mark.barrier));
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
