//! Once the outcome is known: the flip if it is still due, T3, or the roll-back.

use std::collections::BTreeSet;

use super::request::{
    Request, allows, contradiction, is_old_news, is_several, names_exactly, original, request,
    theirs,
};
use super::{Decision, change, deadline, open, own_mark, prepare};
use crate::mend::Mend;
use crate::{
    ACTIVATION_STRATEGY, Chassis, Mark, Observed, Outcome, Phase, Port, PortConfig, PortName,
    PortWrite, RouteWrite, Side, Step, Timestamp, Waiting, flip,
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
    let ends = || [Some(here), there.as_ref()].into_iter().flatten();
    if let Some(waiting) = contradiction(observed, ends(), is_evidence) {
        return overdue(observed, Decision::wait(phase, waiting));
    }
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
        let unarmed = there
            .as_ref()
            .map(|there| prepare::unarmed(observed, here, there));
        return match unarmed {
            Some(unarmed) if !unarmed.is_empty() => Decision::write(phase, Step::Arm, unarmed),
            _ => Decision::wait(phase, Waiting::Outcome),
        };
    }
    if side == Side::Target
        && let Some(held_up) = await_release(observed, phase, here)
    {
        return held_up.until(kept_until);
    }
    let unsettled: Vec<_> = observed
        .ports
        .iter()
        .filter_map(|port| request_only(observed, port, here, side))
        .collect();
    if !unsettled.is_empty() {
        return Decision::write(phase, Step::Settle, unsettled);
    }
    if let Some(waiting) = unbound(observed, here, side) {
        let wait = overdue(observed, Decision::wait(phase, waiting));
        let to_come = patience(observed).filter(|until| *until > observed.now);
        return wait.until(kept_until).until(to_come);
    }
    if !astray.is_empty() {
        return Decision::wait(phase, kept_egress(&astray)).until(kept_until);
    }
    Decision {
        left_out: without_interface(observed, here),
        ..release(observed, side, (here, there.as_ref()), (phase, done))
    }
}

/// The migration is over, and moved nothing: its guest is where it was before. Its ports are whoever's
/// they were before, but for those that nobody has let go of since the guest left.
pub(super) fn stay(observed: &Observed) -> Decision {
    let done = Decision::at(Phase::RolledBack);
    let Some(here) = &observed.source else {
        return done;
    };
    let ends = [Some(here), observed.target.as_ref()].into_iter().flatten();
    if is_old_news(observed, here) || contradiction(observed, ends, is_evidence).is_some() {
        return done;
    }
    let lost = observed.ports.iter();
    let ports: Vec<_> = lost
        .filter(|port| is_lost(observed, port, here))
        .filter_map(|port| take(observed, port, here))
        .collect();
    if !ports.is_empty() {
        return Decision::write(Phase::RollingBack, Step::Settle, ports);
    }
    let mut ports = observed.ports.iter();
    let agreed = ports.all(|port| port.config.mark.is_none() && port.binding.is_only_on(here));
    let routes = flip::to(observed, here);
    if agreed && !routes.is_empty() {
        return Decision::flip(Phase::RollingBack, observed, routes);
    }
    done
}

/// Whether a port of a guest that stayed `here` is not here: the pod that the guest did not go to has
/// taken it, or a request keeps it away that nobody makes any more.
fn is_lost(observed: &Observed, port: &Port, here: &Chassis) -> bool {
    let there = observed.target.as_ref();
    let is_there = there.is_some_and(|there| port.binding.chassis.as_ref() == Some(&there.name));
    let is_taken = is_there && !port.binding.is_claimed_by(here);
    let is_marked = port.config.mark.is_some();
    match request(observed, port) {
        Request::Pinned | Request::Leftover => !is_marked && !allows(port, here),
        Request::Unset => is_taken,
        Request::Handover => !is_marked || is_taken,
        Request::Theirs => false,
    }
}

/// The migration succeeded, and the source still has the port. Reducing the list before it has given
/// it up sends the port through a Southbound state without any chassis in two of three cases. The
/// target is open meanwhile.
fn await_release(observed: &Observed, phase: Phase, target: &Chassis) -> Option<Decision> {
    let source = observed.source.as_ref()?;
    let waiting = source_release(observed, source, target)?;
    let shut = open::shut(observed, source, target);
    if !shut.is_empty() {
        return Some(Decision::write(phase, Step::Open, shut));
    }
    let deadline = deadline(observed.since.outcome, observed.deadlines.release);
    let waits = deadline.is_none_or(|deadline| observed.now < deadline);
    waits.then(|| Decision::wait(phase, waiting).until(deadline))
}

fn kept_egress(kept: &[RouteWrite]) -> Waiting {
    let gateways: BTreeSet<_> = kept.iter().flat_map(|route| &route.from).collect();
    Waiting::KeptEgress {
        gateways: gateways.into_iter().cloned().collect(),
    }
}

/// Whether a port's binding tells where the guest is. Where an earlier handover's request is what holds
/// it on its chassis, that says nothing.
fn is_evidence(port: &Port) -> bool {
    let mark = port.config.mark.as_ref();
    !mark.is_some_and(|mark| {
        let mut claimed = port.binding.claimed();
        claimed.all(|name| [&mark.source, &mark.target].contains(&name))
    })
}

/// The guest runs on a side whose chassis is not known. Nothing can be requested there, and nothing
/// tells whether the ports are there.
fn settle_nowhere_known(observed: &Observed, side: Side, phase: Phase, done: Phase) -> Decision {
    if observed.ports.is_empty() {
        return Decision::at(done);
    }
    let waiting = match side {
        Side::Source => Waiting::Source,
        Side::Target => Waiting::Target,
    };
    overdue(observed, Decision::wait(phase, waiting))
}

/// A port of a handover's that the source has not given up.
fn source_release(observed: &Observed, source: &Chassis, target: &Chassis) -> Option<Waiting> {
    // Where the target has not claimed it the guest has nothing meanwhile.
    let can_wait =
        |port: &&Port| own_mark(observed, port).is_some() && port.binding.is_claimed_by(target);
    let mut ports = observed.ports.iter().filter(can_wait);
    let kept = ports.find(|port| port.binding.chassis.as_ref() == Some(&source.name))?;
    Some(Waiting::SourceRelease {
        port: kept.name.clone(),
    })
}

/// The write that requests `here` alone, for a port that segue holds or that would keep the guest off
/// the network.
fn request_only(observed: &Observed, port: &Port, here: &Chassis, side: Side) -> Option<PortWrite> {
    if own_mark(observed, port).is_none() {
        let taken = must_be_taken(observed, port, here, side);
        return taken.then(|| take(observed, port, here)).flatten();
    }
    let done = is_settled(port, here) || request(observed, port) == Request::Theirs;
    (!done).then(|| take(observed, port, here)).flatten()
}

/// The write that makes a port this handover's, and requests `here` alone.
fn take(observed: &Observed, port: &Port, here: &Chassis) -> Option<PortWrite> {
    let own = own_mark(observed, port);
    let name = |chassis: &Option<Chassis>| {
        let chassis = chassis.as_ref();
        chassis.map_or_else(String::new, |chassis| chassis.name.clone())
    };
    let source = observed.source.as_ref();
    let released = source.is_some_and(|source| !port.binding.is_claimed_by(source));
    let mark = own.cloned().unwrap_or_else(|| Mark {
        migration: observed.identity.migration.clone(),
        epoch: observed.identity.epoch,
        source: name(&observed.source),
        target: name(&observed.target),
        original: original(observed, port, here),
        barrier: None,
        source_released: false,
    });
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

/// Whether a port that this handover does not hold would leave the guest cut off: an earlier handover
/// has not let go of it, it is requested where the guest is not, or bound where it was.
fn must_be_taken(observed: &Observed, port: &Port, here: &Chassis, side: Side) -> bool {
    let is_list = matches!(
        request(observed, port),
        Request::Handover | Request::Leftover
    );
    let is_left = request(observed, port) == Request::Pinned && !allows(port, here);
    let is_source = |name: &String| {
        let source = observed.source.as_ref();
        source.is_some_and(|source| source.name == *name && source.name != here.name)
    };
    let left_behind = side == Side::Target
        && port.config.mark.is_none()
        && request(observed, port) != Request::Theirs
        && port.binding.chassis.as_ref().is_some_and(is_source);
    // Nobody hands anything over any more, so a list that keeps the port from being here is none.
    let is_spent = side == Side::Target && is_several(port) && !port.binding.is_only_on(here);
    let is_earlier = port.config.mark.is_some() && request(observed, port) != Request::Theirs;
    is_earlier || is_list || is_left || left_behind || is_spent
}

fn is_settled(port: &Port, here: &Chassis) -> bool {
    names_exactly(port, &[here]) && port.config.activation_strategy.is_none()
}

/// A port that is not bound `here` alone yet. Of a guest that moved that is every port that has an
/// interface, whoever's it is: it is what the record's success says. A guest that stayed has what it
/// had on ports that this handover does not hold.
fn unbound(observed: &Observed, here: &Chassis, side: Side) -> Option<Waiting> {
    let counts = |port: &&Port| side == Side::Target || own_mark(observed, port).is_some();
    let astray = |port: &&Port| !port.binding.is_only_on(here);
    let mut ports = observed.ports.iter().filter(counts).filter(astray);
    let port = ports.find(|port| !has_no_interface(observed, port, here))?;
    Some(if request(observed, port) == Request::Theirs {
        theirs(port)
    } else {
        Waiting::Binding {
            port: port.name.clone(),
            chassis: here.clone(),
        }
    })
}

/// Whether nothing but the absence of an interface can keep `here` from claiming a port: no request
/// does, and it has had time to. Where it has claimed none at all, of the ports that are held, its
/// ovn-controller may be away.
fn has_no_interface(observed: &Observed, port: &Port, here: &Chassis) -> bool {
    let is_held = own_mark(observed, port).is_some();
    let mut ports = observed.ports.iter();
    let is_alive = !is_held || ports.any(|other| other.binding.is_only_on(here));
    let had_time = patience(observed).is_some_and(|until| until <= observed.now);
    port.is_unclaimed() && allows(port, here) && is_alive && had_time
}

/// Until when a chassis may be about to claim a port that it has an interface of.
fn patience(observed: &Observed) -> Option<Timestamp> {
    deadline(observed.since.outcome, observed.deadlines.peers)
}

fn without_interface(observed: &Observed, here: &Chassis) -> Vec<PortName> {
    let ports = observed.ports.iter();
    ports
        .filter(|port| has_no_interface(observed, port, here))
        .map(|port| port.name.clone())
        .collect()
}

fn release(
    observed: &Observed,
    side: Side,
    (here, there): (&Chassis, Option<&Chassis>),
    (phase, done): (Phase, Phase),
) -> Decision {
    let is_to_go = |port: &&Port| {
        own_mark(observed, port).is_some() || request(observed, port) == Request::Theirs
    };
    let ports = observed.ports.iter().filter(is_to_go);
    let held: Vec<_> = ports
        .filter_map(|port| Some((port, port.config.mark.as_ref()?)))
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
        .filter_map(|(port, mark)| change(port, restored(observed, (*port, *mark), here, there)))
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
/// named in the form (name or hostname) that stood there. What its owner chose since stays.
fn restored(
    observed: &Observed,
    (port, mark): (&Port, &Mark),
    here: &Chassis,
    there: Option<&Chassis>,
) -> PortConfig {
    if !is_still_ours(observed, port) {
        return let_go(port, mark);
    }
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

/// Whether the request is what a handover wrote: only that is taken back.
fn is_still_ours(observed: &Observed, port: &Port) -> bool {
    request(observed, port) == Request::Handover || !Mend::NewerChoice.holds()
}

/// The port without its mark, and without a strategy that only a handover needs.
fn let_go(port: &Port, mark: &Mark) -> PortConfig {
    let strategy = port.config.activation_strategy.clone();
    let ours = strategy.as_deref() == Some(ACTIVATION_STRATEGY);
    PortConfig {
        requested_chassis: port.config.requested_chassis.clone(),
        activation_strategy: if ours {
            mark.original.activation_strategy.clone()
        } else {
            strategy
        },
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
        _ if !is_still_ours(observed, port) => let_go(port, mark),
        Some(target) if is_settled(port, target) => {
            restored(observed, (port, mark), target, observed.source.as_ref())
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
