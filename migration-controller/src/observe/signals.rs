//! Signs of where the guest is, as they are seen.

use handover::{GuestPlace, Identity, Side, SignalKind, SignalSource};

use super::{Ending, Inputs, is_own, pods};
use crate::agents::Learned;
use crate::api::{HandoverSpec, HandoverStatus, OpeningResult, SignalSeen, TimelineStep};
use crate::kubevirt::MigrationState;
use crate::ovn::{PortRow, read_config};

/// Records the signals that are there and have not been recorded.
pub(super) fn note(
    inputs: &Inputs<'_>,
    state: Option<&MigrationState>,
    spec: &HandoverSpec,
    ending: &Ending,
    identity: &Identity,
    status: &mut HandoverStatus,
) {
    hear(inputs.learned, status);
    let target = spec.target.as_ref();
    let activated = |row: &PortRow| {
        let chassis = target.and_then(|target| target.chassis.as_ref());
        chassis.is_some_and(|chassis| is_activated(inputs, row, chassis, identity))
    };
    let activated = !is_opened(status) && inputs.ports.iter().any(activated);
    let ready = state.is_some_and(|state| state.target_node_domain_ready_timestamp.is_some());
    let annotated = pods::of_target(inputs, spec)
        .iter()
        .any(|pod| pod.says_target_ready());
    let node = inputs.objects.vmi.as_ref().and_then(|vmi| vmi.node_name());
    let arrived = state.is_some() && target.is_some_and(|target| node == Some(&target.node));
    let ended = *ending == Ending::On(Side::Target);
    let seen = [
        (activated, SignalSource::Activation),
        (ready, SignalSource::DomainReady),
        (annotated, SignalSource::PodAnnotation),
        (arrived || ended, SignalSource::MigrationEnd),
    ];
    let seen_now = |kind, source| SignalSeen {
        kind,
        source,
        at: inputs.now,
        node: None,
    };
    for (_, source) in seen.into_iter().filter(|(seen, _)| *seen) {
        status.note_signal(seen_now(SignalKind::ResumedOnTarget, source));
    }
    // A guest that never left has not come back.
    let left = status.signals().guest() != GuestPlace::Source;
    if *ending == Ending::On(Side::Source) && left {
        status.note_signal(seen_now(
            SignalKind::ResumedOnSource,
            SignalSource::MigrationEnd,
        ));
    }
    let signals = status.signals.clone();
    for (kind, step) in [
        (SignalKind::Paused, TimelineStep::Paused),
        (SignalKind::ResumedOnTarget, TimelineStep::Resumed),
    ] {
        let first = signals.iter().find(|seen| seen.kind == kind);
        // An agent's stamp can be earlier than what was seen before it came.
        if let Some(first) = first.filter(|first| status.step(step) != Some(first.at)) {
            status.take_step(step, first.at);
        }
    }
}

/// Records what the agents told.
fn hear(learned: &Learned, status: &mut HandoverStatus) {
    for signal in &learned.signals {
        // What an agent tells again has the time of now where its stamp is of long ago: it is not to seem a later pause than
        // the one from which the guest came back.
        let is_dated = learned.turns.contains(signal);
        let mut known = status.signals.iter();
        let is_back = known.any(|seen| seen.kind == SignalKind::ResumedOnSource);
        if signal.kind == SignalKind::Paused && !is_dated && is_back {
            continue;
        }
        status.note_signal(signal.clone());
    }
    for turn in &learned.turns {
        status.note_turn(turn.clone());
    }
}

/// Whether an agent opened the port, or may have: then OVN's activation of it is the agent's own doing,
/// and says nothing of the guest, however long ago that was. A guest can be paused for as long as
/// somebody likes.
fn is_opened(status: &HandoverStatus) -> bool {
    let opening = status.early_opening.as_ref();
    opening.is_some_and(|opening| {
        matches!(opening.result, OpeningResult::Opened | OpeningResult::Asked)
    })
}

/// Records what the agents measured. What they told before this controller led stays.
pub(super) fn measure(learned: &Learned, status: &mut HandoverStatus) {
    if let Some(opening) = &learned.opening {
        status.early_opening = Some(opening.clone());
    }
    if let Some(at) = learned.opened_at {
        status.take_step_once(TimelineStep::Opened, at);
    }
    status.pause_ms = learned.pause_ms.or(status.pause_ms);
    status.blackout_ms = learned.blackout_ms.or(status.blackout_ms);
}

/// Whether the target's ovn-controller has opened the port for this handover.
///
/// The option outlives the migration it was set in until the port is claimed again, so it counts
/// only where this handover holds the port, the target has it as an additional chassis, and has made
/// of the Northbound what was written for this handover: what the Southbound said before can be old.
fn is_activated(inputs: &Inputs<'_>, row: &PortRow, chassis: &str, identity: &Identity) -> bool {
    let mark = read_config(row).ok().and_then(|config| config.mark);
    let mark = mark.filter(|mark| is_own(mark, identity));
    let barrier = mark.and_then(|mark| mark.barrier);
    let applied = inputs.barrier.applied.get(chassis);
    row.activated.contains(chassis)
        && row.binding.additional.iter().any(|name| name == chassis)
        && barrier.is_some_and(|barrier| applied >= Some(&barrier))
}
