//! When routes follow the guest, one observation each.

#![allow(clippy::expect_used, reason = "a test asserts by panicking")]

mod single;

use std::collections::BTreeSet;
use std::time::Duration;

use handover::{
    Binding, FlipPolicy, FlipTiming, Observed, Outcome, Phase, Route, RouteKey, Side, Signal,
    SignalKind, SignalSource, Step, Waiting, decide,
};
use single::{START, apply, armed, at_barrier, observed, port, signal};

const KEEP: Duration = Duration::from_mins(1);

fn names(names: &[&str]) -> BTreeSet<String> {
    names.iter().map(|&name| name.to_owned()).collect()
}

/// Two families, both at the source; the source and the target have gateways.
fn routed(mut world: Observed) -> Observed {
    world.routes = ["10.0.0.1", "fd00::1"]
        .map(|key| Route {
            key: RouteKey::new(key),
            leads_to: names(&["n1"]),
        })
        .into();
    world.gateways = names(&["n1", "n2"]);
    world
}

fn keeping(world: Observed) -> Observed {
    let mut world = routed(world);
    world.flip.keep_egress = KEEP;
    world
}

fn lead_to(world: &Observed, chassis: &str) -> bool {
    let there = names(&[chassis]);
    world.routes.iter().all(|route| route.leads_to == there)
}

/// The migration succeeded, the source let go, and the port is on the target.
fn ended(world: &mut Observed) {
    world.outcome = Outcome::GuestOn(Side::Target);
    world.since.outcome = Some(START);
    for port in &mut world.ports {
        port.binding = Binding {
            chassis: Some("n2".to_owned()),
            additional: Vec::new(),
        };
    }
}

#[test]
fn all_routes_follow_in_one_write_once_the_guest_runs_on_the_target() {
    let mut world = routed(at_barrier());
    world.signals.note(signal(SignalKind::Paused, 1));
    assert_eq!(decide(&world).write, None, "on resume, not on pause");
    world.signals.note(signal(SignalKind::ResumedOnTarget, 2));
    let decision = decide(&world);
    let write = decision.write.as_ref().expect("the flip");
    assert_eq!((write.routes.len(), write.ports.len()), (2, 1));
    assert_eq!(apply(&mut world, &decision), Step::Flip);
    assert!(lead_to(&world, "n2"));
    assert_eq!(decide(&world).write, None);
    assert_eq!(decide(&world).phase, Phase::Switched);
}

#[test]
fn a_flip_does_not_go_before_the_port_is_armed() {
    let mut world = routed(observed(vec![port("a", None)]));
    world.signals.note(signal(SignalKind::ResumedOnTarget, 2));
    let decision = decide(&world);
    assert_eq!(apply(&mut world, &decision), Step::Arm);
    let decision = decide(&world);
    assert_eq!(apply(&mut world, &decision), Step::Flip);
}

#[test]
fn ahead_of_the_resume_where_the_policy_says_so_and_back_if_the_source_resumes() {
    let mut world = routed(at_barrier());
    world.flip = FlipPolicy {
        timing: FlipTiming::OnPause,
        ..FlipPolicy::default()
    };
    assert_eq!(decide(&world).write, None);
    world.signals.note(signal(SignalKind::Paused, 1));
    let decision = decide(&world);
    assert_eq!(apply(&mut world, &decision), Step::Flip);
    assert!(lead_to(&world, "n2"));
    world.signals.note(signal(SignalKind::ResumedOnSource, 2));
    let decision = decide(&world);
    assert_eq!(apply(&mut world, &decision), Step::Flip);
    assert!(lead_to(&world, "n1"));
    assert_eq!(decide(&world).phase, Phase::RollingBack);
}

#[test]
fn a_handover_is_not_over_before_the_routes_have_followed() {
    let mut world = routed(at_barrier());
    ended(&mut world);
    let steps: Vec<_> = std::iter::from_fn(|| {
        let decision = decide(&world);
        decision.write.as_ref()?;
        Some(apply(&mut world, &decision))
    })
    .collect();
    assert_eq!(steps, [Step::Flip, Step::Settle, Step::Release]);
    assert_eq!(decide(&world).phase, Phase::Succeeded);
}

#[test]
fn kept_egress_moves_when_its_time_is_over_and_holds_up_nothing_but_the_end() {
    let mut world = keeping(at_barrier());
    world.now = START.after(Duration::from_secs(1));
    world
        .signals
        .note(signal(SignalKind::ResumedOnTarget, START.0));
    let until = START.after(KEEP);
    let decision = decide(&world);
    assert_eq!((decision.write, decision.phase), (None, Phase::Switched));
    ended(&mut world);
    let decision = decide(&world);
    assert_eq!(apply(&mut world, &decision), Step::Settle);
    let waiting = decide(&world);
    assert_eq!(
        (waiting.phase, waiting.wake_at),
        (Phase::Finalising, Some(until))
    );
    let gateways = vec!["n1".to_owned()];
    assert_eq!(waiting.waiting, Some(Waiting::KeptEgress { gateways }));
    world.now = until;
    for step in [Step::Flip, Step::Release] {
        let decision = decide(&world);
        assert_eq!(apply(&mut world, &decision), step);
    }
    assert!(lead_to(&world, "n2"));
    assert_eq!(decide(&world).phase, Phase::Succeeded);
}

#[test]
fn a_vm_that_stops_while_egress_is_kept_stays_pinned_where_it_went() {
    for (before, after) in [
        (None, None),
        (Some("n1"), Some("n2")),
        (Some("n1.example"), Some("n2.example")),
    ] {
        let mut world = keeping(armed(vec![port("a", before)]));
        world
            .signals
            .note(signal(SignalKind::ResumedOnTarget, START.0));
        ended(&mut world);
        let decision = decide(&world);
        assert_eq!(apply(&mut world, &decision), Step::Settle);
        assert_eq!(decide(&world).write, None, "egress is kept");
        world.outcome = Outcome::GuestGone;
        let decision = decide(&world);
        assert_eq!(apply(&mut world, &decision), Step::Release);
        let config = &world.ports[0].config;
        assert_eq!(config.requested_chassis.as_deref(), after);
        assert_eq!(config.mark, None);
        assert_eq!(decide(&world).write, None);
    }
}

#[test]
fn a_deadline_that_comes_sooner_than_the_barriers_is_not_slept_through() {
    let mut world = keeping(at_barrier());
    world.flip.keep_egress = Duration::from_millis(10);
    world
        .signals
        .note(signal(SignalKind::ResumedOnTarget, START.0));
    let waiting = decide(&world);
    assert_eq!(
        waiting.wake_at,
        Some(START.after(Duration::from_millis(10)))
    );
}

#[test]
fn nothing_is_kept_on_a_gateway_that_is_gone() {
    let mut world = keeping(at_barrier());
    world
        .signals
        .note(signal(SignalKind::ResumedOnTarget, START.0));
    assert_eq!(decide(&world).write, None);
    world.gateways = names(&["n2"]);
    let decision = decide(&world);
    assert_eq!(apply(&mut world, &decision), Step::Flip);
}

#[test]
fn a_target_without_a_gateway_leaves_the_routes_where_they_work() {
    let mut world = routed(at_barrier());
    world.gateways = names(&["n1"]);
    world.signals.note(signal(SignalKind::ResumedOnTarget, 2));
    assert_eq!(decide(&world).write, None);
    ended(&mut world);
    for step in [Step::Settle, Step::Release] {
        let decision = decide(&world);
        assert_eq!(apply(&mut world, &decision), step);
    }
    assert_eq!(decide(&world).phase, Phase::Succeeded);
    assert!(lead_to(&world, "n1"));
}

#[test]
fn a_route_without_a_place_gets_the_sources_and_a_doubled_one_is_mended() {
    let mut world = routed(armed(vec![port("a", None)]));
    world.routes[0].leads_to.clear();
    let decision = decide(&world);
    assert_eq!(apply(&mut world, &decision), Step::Flip);
    assert!(lead_to(&world, "n1"));
    world.routes[1].leads_to = names(&["n1", "n2"]);
    world.signals.note(signal(SignalKind::ResumedOnTarget, 2));
    let decision = decide(&world);
    assert_eq!(apply(&mut world, &decision), Step::Flip);
    assert!(lead_to(&world, "n2"));
}

#[test]
fn a_controller_that_was_away_for_a_whole_migration_flips_without_a_mark() {
    let mut world = routed(observed(vec![port("a", None)]));
    ended(&mut world);
    let decision = decide(&world);
    assert_eq!(apply(&mut world, &decision), Step::Flip);
    assert_eq!(decide(&world).phase, Phase::Succeeded);
}

#[test]
fn egress_is_kept_from_the_arrival_on_that_was_not_refuted() {
    use SignalKind::{Paused, ResumedOnSource, ResumedOnTarget};
    use SignalSource::{Activation, Libvirt, Qmp};
    let after = |seconds| START.after(Duration::from_secs(seconds));
    let told = [
        (Paused, Qmp, 0),
        (ResumedOnTarget, Activation, 1),
        (ResumedOnSource, Qmp, 2),
        (Paused, Libvirt, 600),
        (ResumedOnTarget, Qmp, 601),
    ];
    let told = told.map(|(kind, source, seconds)| Signal {
        kind,
        source,
        at: after(seconds),
    });
    let mut world = keeping(at_barrier());
    world.ports[0].activated.insert("n2".to_owned());
    world.signals = told.into_iter().collect();
    world.now = after(602);
    let decision = decide(&world);
    let until = after(601).after(KEEP);
    assert_eq!((decision.write, decision.wake_at), (None, Some(until)));
}
