//! The decision function: what is observed, to what is written next.

mod open;
mod prepare;
mod request;
mod settle;

use std::time::Duration;

use crate::mend::Mend;
use crate::{
    Expected, GuestPlace, Mark, Observed, Outcome, Phase, Port, PortConfig, PortName, PortWrite,
    RouteWrite, Side, Step, Timestamp, Waiting, Write, flip,
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
    /// Ports that take no part, because no chassis has an interface of them.
    pub left_out: Vec<PortName>,
}

impl Decision {
    fn at(phase: Phase) -> Self {
        Self {
            phase,
            write: None,
            waiting: None,
            wake_at: None,
            superseded: false,
            left_out: Vec::new(),
        }
    }

    fn write(phase: Phase, step: Step, ports: Vec<PortWrite>) -> Self {
        Self {
            write: Some(Write {
                step,
                ports,
                routes: Vec::new(),
                raise_nb_cfg_from: None,
            }),
            ..Self::at(phase)
        }
    }

    fn flip(phase: Phase, observed: &Observed, routes: Vec<RouteWrite>) -> Self {
        Self {
            write: Some(Write {
                step: Step::Flip,
                ports: flip::guards(observed),
                routes,
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
        self.wake_at = self.wake_at.into_iter().chain(deadline).min();
        self
    }
}

/// Decides what a handover does next.
///
/// The result depends on `observed` alone. All ports of the VM move as one: a step is taken for all
/// of them in one [`Write`], and no port takes a step before every port can. A port that nobody has
/// an interface of holds up none of the others.
pub fn decide(observed: &Observed) -> Decision {
    if is_superseded(observed) {
        return Decision {
            superseded: true,
            ..Decision::at(phase_when_superseded(observed))
        };
    }
    match settlement(observed) {
        None => prepare::prepare(observed),
        Some(Settlement::On(Side::Source)) if has_ended_unmoved(observed) => settle::stay(observed),
        Some(Settlement::On(side)) => settle::settle(observed, side),
        Some(Settlement::Nowhere) => settle::forget(observed),
    }
}

/// Whether a migration has moved something: its guest, or a port, which was prepared for it. Only
/// from then on the VM's earlier migrations are history. Until then its guest is where those left it,
/// and they may still be moving it.
pub fn has_moved(observed: &Observed) -> bool {
    if !Mend::MovedNothing.holds() {
        let knows_both = observed.source.is_some() && observed.target.is_some();
        return observed.outcome != Outcome::Running || knows_both;
    }
    let moved = match observed.outcome {
        Outcome::Running => observed.signals.guest() == GuestPlace::Target,
        Outcome::GuestOn(side) => side == Side::Target,
        Outcome::GuestGone => false,
    };
    moved || request::held(observed).next().is_some()
}

fn has_ended_unmoved(observed: &Observed) -> bool {
    observed.outcome != Outcome::Running && !has_moved(observed)
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

/// A migration that is history writes nothing, not even to ports that it left half done: its idea of
/// where the guest runs is history. It is that once a newer one has moved something; one that is over
/// itself, once a newer one has begun.
fn is_superseded(observed: &Observed) -> bool {
    let newer_mark = |port: &Port| {
        let mark = port.config.mark.as_ref();
        mark.is_some_and(|mark| mark.epoch > observed.identity.epoch)
    };
    let newer = observed.newer;
    let over = observed.outcome != Outcome::Running;
    newer.has_moved || (over && newer.has_begun) || observed.ports.iter().any(newer_mark)
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

/// A write that makes `port` look like `config`; `None` where it does already.
fn change(port: &Port, config: PortConfig) -> Option<PortWrite> {
    (port.config != config).then(|| PortWrite {
        port: port.name.clone(),
        expected: Expected::of(&port.config),
        config,
    })
}

fn deadline(since: Option<Timestamp>, wait: Duration) -> Option<Timestamp> {
    since.map(|since| since.after(wait))
}
