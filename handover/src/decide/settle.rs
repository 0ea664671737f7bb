//! Once the outcome is known: the flip if it is still due, T3, or the roll-back.

use std::collections::BTreeSet;

use super::{Decision, change, deadline, original, own_mark};
use crate::{
    Chassis, Mark, Observed, Outcome, Phase, Port, PortConfig, PortWrite, RouteWrite, Side, Step,
    Waiting, flip,
};

pub(super) fn settle(observed: &Observed, side: Side) -> Decision {
    let (phase, done) = match side {
        Side::Target => (Phase::Finalising, Phase::Succeeded),
        Side::Source => (Phase::RollingBack, Phase::RolledBack),
    };
    let (here, there) = match side {
        Side::Target => (&observed.target, &observed.source),
        Side::Source => (&observed.source, &observed.target),
    };
    let Some(here) = here else {
        return settle_nowhere_known(observed, side, phase, done);
    };
    let astray = flip::to(observed, here);
    // Only towards the target: a guest that stays where it was left no gateway.
    let kept_until = flip::kept_until(observed).filter(|_| side == Side::Target);
    if !astray.is_empty() && kept_until.is_none() {
        return Decision::flip(phase, observed, astray);
    }
    if observed.outcome == Outcome::Running && observed.signals.is_back_by_agents_alone() {
        // What an agent says opens ports and moves routes; it takes no chassis from a port. While
        // both have it the guest has its network on either, so nothing is lost by waiting for
        // KubeVirt's word, and all of it could be by believing a wrong one.
        return Decision::wait(phase, Waiting::Outcome);
    }
    if side == Side::Target
        && let Some(waiting) = source_release(observed)
    {
        let deadline = deadline(observed.since.outcome, observed.deadlines.release);
        if deadline.is_none_or(|deadline| observed.now < deadline) {
            return Decision::wait(phase, waiting)
                .until(deadline)
                .until(kept_until);
        }
    }
    let unsettled: Vec<_> = observed
        .ports
        .iter()
        .filter_map(|port| request_only(observed, port, here, there.as_ref()))
        .collect();
    if !unsettled.is_empty() {
        return Decision::write(phase, Step::Settle, unsettled);
    }
    if let Some(waiting) = unbound(observed, here) {
        return overdue(observed, Decision::wait(phase, waiting)).until(kept_until);
    }
    if !astray.is_empty() {
        return Decision::wait(phase, kept_egress(&astray)).until(kept_until);
    }
    release(observed, side, (here, there.as_ref()), (phase, done))
}

fn kept_egress(kept: &[RouteWrite]) -> Waiting {
    let gateways: BTreeSet<_> = kept.iter().flat_map(|route| &route.from).collect();
    Waiting::KeptEgress {
        gateways: gateways.into_iter().cloned().collect(),
    }
}

/// The guest runs on a side whose chassis is not known. Nothing can be requested there, so nothing
/// is: a port that is not segue's is left alone, one that is waits for the chassis to appear.
fn settle_nowhere_known(observed: &Observed, side: Side, phase: Phase, done: Phase) -> Decision {
    if observed.ports.iter().all(|port| port.config.mark.is_none()) {
        return Decision::at(done);
    }
    let waiting = match side {
        Side::Source => Waiting::Source,
        Side::Target => Waiting::Target,
    };
    overdue(observed, Decision::wait(phase, waiting))
}

/// A marked port whose source has not given it up. Reducing the list before it has sends the port
/// through a Southbound state without any chassis in two of three cases.
fn source_release(observed: &Observed) -> Option<Waiting> {
    let source = observed.source.as_ref()?;
    observed
        .ports
        .iter()
        .find(|port| {
            own_mark(observed, port).is_some()
                && port.binding.chassis.as_ref() == Some(&source.name)
        })
        .map(|port| Waiting::SourceRelease {
            port: port.name.clone(),
        })
}

/// The write that requests `here` alone, for a port that segue holds or that is pinned `there`.
fn request_only(
    observed: &Observed,
    port: &Port,
    here: &Chassis,
    there: Option<&Chassis>,
) -> Option<PortWrite> {
    let source = observed.source.as_ref();
    let mark = match own_mark(observed, port) {
        Some(mark) => mark.clone(),
        None if must_be_taken(observed, port, here, there) => Mark {
            migration: observed.identity.migration.clone(),
            epoch: observed.identity.epoch,
            source: source.map_or_else(String::new, |source| source.name.clone()),
            target: observed
                .target
                .as_ref()
                .map_or_else(String::new, |target| target.name.clone()),
            original: original(port, here),
            barrier: None,
            source_released: false,
        },
        None => return None,
    };
    if is_settled(port, here) && own_mark(observed, port).is_some() {
        return None;
    }
    let released = source.is_some_and(|source| !port.binding.is_claimed_by(source));
    let config = PortConfig {
        requested_chassis: Some(here.name.clone()),
        activation_strategy: None,
        mark: Some(Mark {
            source_released: released,
            ..mark
        }),
    };
    change(port, config)
}

/// Whether a port that this handover never armed would leave the guest cut off: it bears an older
/// handover's mark, or it is requested or bound on a chassis that the guest left (the controller was
/// away for a whole migration).
fn must_be_taken(
    observed: &Observed,
    port: &Port,
    here: &Chassis,
    there: Option<&Chassis>,
) -> bool {
    let is_left = |name: &String| {
        let mut left = observed.former.iter().chain(there);
        !here.is_named_by(name) && left.any(|chassis| chassis.is_named_by(name))
    };
    port.config.mark.is_some()
        || port.config.requested_chassis.as_ref().is_some_and(is_left)
        || port.binding.chassis.as_ref().is_some_and(is_left)
}

fn is_settled(port: &Port, here: &Chassis) -> bool {
    port.config.requested_chassis.as_ref() == Some(&here.name)
        && port.config.activation_strategy.is_none()
}

/// A port that is not bound `here` alone yet. Only ports that segue holds are waited for: the
/// binding of the others was never its doing.
fn unbound(observed: &Observed, here: &Chassis) -> Option<Waiting> {
    observed
        .ports
        .iter()
        .find(|port| own_mark(observed, port).is_some() && !port.binding.is_only_on(here))
        .map(|port| Waiting::Binding {
            port: port.name.clone(),
            chassis: here.clone(),
        })
}

fn release(
    observed: &Observed,
    side: Side,
    (here, there): (&Chassis, Option<&Chassis>),
    (phase, done): (Phase, Phase),
) -> Decision {
    let held: Vec<_> = observed
        .ports
        .iter()
        .filter_map(|port| Some((port, own_mark(observed, port)?)))
        .collect();
    if held.is_empty() {
        return Decision::at(done);
    }
    let competing = held
        .iter()
        .find(|(_, mark)| may_be_competed_for(observed, mark, side));
    if let Some((port, _)) = competing {
        return Decision::wait(
            phase,
            Waiting::OtherPod {
                port: port.name.clone(),
            },
        );
    }
    let ports = held
        .iter()
        .filter_map(|(port, mark)| change(port, restored(mark, here, there)))
        .collect();
    Decision::write(phase, Step::Release, ports)
}

/// Whether dropping the request would let the other side claim the port back: with no request, every
/// chassis that has the interface tries.
fn may_be_competed_for(observed: &Observed, mark: &Mark, side: Side) -> bool {
    let other_interface_gone = match side {
        Side::Target => mark.source_released || observed.source_pod_gone,
        Side::Source => observed.target_pod_gone,
    };
    mark.original.requested_chassis.is_none() && !other_interface_gone
}

/// What the port looks like once it is let go: as before, with the place brought up to date and
/// named in the form (name or hostname) that stood there.
fn restored(mark: &Mark, here: &Chassis, there: Option<&Chassis>) -> PortConfig {
    let by_hostname = |original: &String| {
        there.is_some_and(|there| *original == there.hostname && *original != there.name)
    };
    let requested_chassis = mark.original.requested_chassis.as_ref().map(|original| {
        if original.is_empty() || here.is_named_by(original) {
            original.clone()
        } else if by_hostname(original) && !here.hostname.is_empty() {
            here.hostname.clone()
        } else {
            here.name.clone()
        }
    });
    PortConfig {
        requested_chassis,
        activation_strategy: mark.original.activation_strategy.clone(),
        mark: None,
    }
}

/// Calls a wait [failed](Phase::Failed) once the deadline for the outcome to be established is over.
fn overdue(observed: &Observed, waiting: Decision) -> Decision {
    let deadline = deadline(observed.since.outcome, observed.deadlines.establish);
    if deadline.is_some_and(|deadline| deadline <= observed.now) {
        Decision {
            phase: Phase::Failed,
            ..waiting
        }
    } else {
        waiting.until(deadline)
    }
}

/// The guest is gone: the ports, where they still exist, get back what they had. One that had been
/// settled on the target already, and that only kept egress held, gets back its pin with the place
/// brought up to date: the source is history.
pub(super) fn forget(observed: &Observed) -> Decision {
    let restore = |port: &Port, mark: &Mark| match &observed.target {
        Some(target) if is_settled(port, target) => {
            restored(mark, target, observed.source.as_ref())
        }
        _ => PortConfig {
            requested_chassis: mark.original.requested_chassis.clone(),
            activation_strategy: mark.original.activation_strategy.clone(),
            mark: None,
        },
    };
    let ports: Vec<_> = observed
        .ports
        .iter()
        .filter_map(|port| change(port, restore(port, own_mark(observed, port)?)))
        .collect();
    if ports.is_empty() {
        Decision::at(Phase::RolledBack)
    } else {
        Decision::write(Phase::RollingBack, Step::Release, ports)
    }
}
