//! The decision function: what is observed, to what is written next.

use std::time::Duration;

use crate::{
    ACTIVATION_STRATEGY, Chassis, Expected, GuestPlace, Mark, Observed, Original, Outcome, Phase,
    Port, PortConfig, PortWrite, Side, Step, Timestamp, Waiting, Write,
};

/// What to do now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decision {
    /// Where the handover stands, before the write.
    pub phase: Phase,
    /// The next write; `None` where there is nothing to write now.
    pub write: Option<Write>,
    /// What the handover waits for when nothing is to be written.
    pub waiting: Option<Waiting>,
    /// Decide again then, even if nothing changes: a deadline runs out.
    pub wake_at: Option<Timestamp>,
    /// A newer handover has taken the ports over: whatever this one had to do, that one does.
    pub superseded: bool,
}

impl Decision {
    fn at(phase: Phase) -> Self {
        Self {
            phase,
            write: None,
            waiting: None,
            wake_at: None,
            superseded: false,
        }
    }

    fn write(phase: Phase, step: Step, ports: Vec<PortWrite>) -> Self {
        Self {
            write: Some(Write {
                step,
                ports,
                raise_nb_cfg_from: None,
            }),
            ..Self::at(phase)
        }
    }

    fn wait(phase: Phase, waiting: Waiting) -> Self {
        Self {
            waiting: Some(waiting),
            ..Self::at(phase)
        }
    }

    fn until(mut self, deadline: Option<Timestamp>) -> Self {
        self.wake_at = deadline;
        self
    }
}

/// Decides what a handover does next.
///
/// The result depends on `observed` alone. All ports of the VM move as one: a step is taken for all
/// of them in one [`Write`], and no port takes a step before every port can.
pub fn decide(observed: &Observed) -> Decision {
    if is_superseded(observed) {
        return Decision {
            superseded: true,
            ..Decision::at(phase_when_superseded(observed))
        };
    }
    match settlement(observed) {
        None => prepare(observed),
        Some(Settlement::On(side)) => settle(observed, side),
        Some(Settlement::Nowhere) => forget(observed),
    }
}

/// Where the port must end up, once that is known.
enum Settlement {
    On(Side),
    Nowhere,
}

fn settlement(observed: &Observed) -> Option<Settlement> {
    match observed.outcome {
        Outcome::GuestOn(side) => Some(Settlement::On(side)),
        Outcome::GuestGone => Some(Settlement::Nowhere),
        Outcome::Running if observed.signals.guest() == GuestPlace::BackOnSource => {
            Some(Settlement::On(Side::Source))
        }
        Outcome::Running => None,
    }
}

/// A migration that is not the VM's newest writes nothing, not even to ports that it left half done:
/// its idea of where the guest runs is history.
fn is_superseded(observed: &Observed) -> bool {
    let newer_mark = |port: &Port| {
        let mark = port.config.mark.as_ref();
        mark.is_some_and(|mark| mark.epoch > observed.identity.epoch)
    };
    observed.newer_migration || observed.ports.iter().any(newer_mark)
}

fn phase_when_superseded(observed: &Observed) -> Phase {
    match settlement(observed) {
        Some(Settlement::On(Side::Target)) => Phase::Succeeded,
        // The newer migration can only have begun once this one was over, so one that has not
        // heard of its own end did not see the guest move.
        Some(Settlement::On(Side::Source) | Settlement::Nowhere) | None => Phase::RolledBack,
    }
}

/// The port's mark, if it is of this very handover.
fn own_mark<'a>(observed: &Observed, port: &'a Port) -> Option<&'a Mark> {
    port.config.mark.as_ref().filter(|mark| {
        mark.migration == observed.identity.migration && mark.epoch == observed.identity.epoch
    })
}

// === Before the outcome is known: T1 and the barrier ===

fn prepare(observed: &Observed) -> Decision {
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
    pass_barrier(observed, source, target)
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
        Some(mark) => mark.clone(),
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

/// What to put back when the handover is over.
fn original(port: &Port, source: &Chassis) -> Original {
    match &port.config.mark {
        // A port taken over from an older handover that has not let go yet: what stood there before
        // *that* one is what its user chose; only the place has changed since.
        Some(older) => Original {
            requested_chassis: older
                .original
                .requested_chassis
                .as_ref()
                .map(|_| source.name.clone()),
            activation_strategy: older.original.activation_strategy.clone(),
        },
        None => Original {
            requested_chassis: port.config.requested_chassis.clone(),
            activation_strategy: port.config.activation_strategy.clone(),
        },
    }
}

/// A write that makes `port` look like `config`; `None` where it does already.
fn change(port: &Port, config: PortConfig) -> Option<PortWrite> {
    (port.config != config).then(|| PortWrite {
        port: port.name.clone(),
        expected: Expected::of(&port.config),
        config,
    })
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

fn deadline(since: Option<Timestamp>, wait: Duration) -> Option<Timestamp> {
    since.map(|since| since.after(wait))
}

// === Once the outcome is known: T3, or the roll-back ===

fn settle(observed: &Observed, side: Side) -> Decision {
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
    if side == Side::Target
        && let Some(waiting) = source_release(observed)
    {
        let deadline = deadline(observed.since.outcome, observed.deadlines.release);
        if deadline.is_none_or(|deadline| observed.now < deadline) {
            return Decision::wait(phase, waiting).until(deadline);
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
        return overdue(observed, Decision::wait(phase, waiting));
    }
    release(observed, side, (here, there.as_ref()), (phase, done))
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

/// The guest is gone: the ports, where they still exist, get back what they had.
fn forget(observed: &Observed) -> Decision {
    let ports: Vec<_> = observed
        .ports
        .iter()
        .filter_map(|port| {
            let mark = own_mark(observed, port)?;
            change(
                port,
                PortConfig {
                    requested_chassis: mark.original.requested_chassis.clone(),
                    activation_strategy: mark.original.activation_strategy.clone(),
                    mark: None,
                },
            )
        })
        .collect();
    if ports.is_empty() {
        Decision::at(Phase::RolledBack)
    } else {
        Decision::write(Phase::RollingBack, Step::Release, ports)
    }
}
