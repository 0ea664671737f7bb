//! Opening a port that the guest runs behind, where nothing else will.

use std::time::Duration;

use super::change;
use super::request::held;
use crate::mend::Mend;
use crate::{Chassis, GuestPlace, Observed, Outcome, Port, PortConfig, PortWrite, Side, Timestamp};

/// How long after an agent saw the guest run on the target OVN may take to open the port by itself.
/// Its ovn-controller needs one turn of its main loop, which takes milliseconds. KubeVirt's own word
/// comes so late that nothing more is waited for.
const OPENS_WITHIN: Duration = Duration::from_millis(500);

/// What opens the ports that are shut although nothing else will open them: their activation
/// strategy goes.
pub(super) fn shut(observed: &Observed, source: &Chassis, target: &Chassis) -> Vec<PortWrite> {
    let write = |port: &Port| {
        let config = PortConfig {
            activation_strategy: None,
            ..port.config.clone()
        };
        change(port, config)
    };
    held(observed)
        .filter(|port| wants_opening(observed, port, source, target))
        .filter_map(write)
        .collect()
}

/// When [`shut`] may have something to open that it leaves alone now.
pub(super) fn due(observed: &Observed, target: &Chassis) -> Option<Timestamp> {
    let waits = |port: &Port| port.config.activation_strategy.is_some() && !is_open(port, target);
    let since = observed.signals.arrival().filter(|_| moved(observed))?;
    let since = Some(since).filter(|signal| signal.is_agents())?;
    let due = since.at.after(OPENS_WITHIN);
    let waits = held(observed).any(waits);
    (waits && Mend::ShutThoughHeard.holds() && due > observed.now).then_some(due)
}

/// Whether a port is not to wait for an announcement: it will not come through this port, it is over,
/// or the target is the only chassis that has the port at all.
pub(super) fn wants_opening(
    observed: &Observed,
    port: &Port,
    source: &Chassis,
    target: &Chassis,
) -> bool {
    let alone = port.binding.is_claimed_by(target) && !port.binding.is_claimed_by(source);
    let needed = alone || !port.announces || announcement_is_over(observed);
    needed && !is_open(port, target)
}

/// Whether OVN has opened the port on the target, or has it there as on any chassis.
fn is_open(port: &Port, target: &Chassis) -> bool {
    port.binding.chassis.as_ref() == Some(&target.name) || port.activated.contains(&target.name)
}

/// Whether the guest has run on the target for long enough for OVN to have seen that.
fn announcement_is_over(observed: &Observed) -> bool {
    let by_kubevirt = observed.signals.is_arrival_kubevirts()
        || observed.outcome == Outcome::GuestOn(Side::Target);
    let heard = || {
        let since = observed
            .signals
            .arrival()
            .filter(|signal| signal.is_agents());
        since.is_some_and(|signal| signal.at.after(OPENS_WITHIN) <= observed.now)
    };
    moved(observed)
        && (by_kubevirt && Mend::ShutThoughKubevirtSays.holds()
            || heard() && Mend::ShutThoughHeard.holds())
}

fn moved(observed: &Observed) -> bool {
    match observed.outcome {
        Outcome::GuestOn(side) => side == Side::Target,
        Outcome::Running => observed.signals.guest() == GuestPlace::Target,
        Outcome::GuestGone => false,
    }
}

/// Whether a handover is to arm this port with a strategy: only where the Southbound agrees that the
/// guest is on the source. A port that the target has already would be shut over a running guest,
/// should what KubeVirt says be old.
pub(super) fn is_to_be_shut(
    observed: &Observed,
    port: &Port,
    source: &Chassis,
    target: &Chassis,
) -> bool {
    let is_on_target = port.binding.chassis.as_ref() == Some(&target.name);
    let is_on_source = port.binding.is_claimed_by(source) && !is_on_target;
    let moved = observed.signals.guest() == GuestPlace::Target;
    port.announces && is_on_source && !moved
}
