//! From every state that crashes, delays, failures and other writers can lead to, the decisions end
//! with the port bound where the guest runs and nowhere else, and with nothing left behind; and on
//! the way the guest has its network.

use std::time::Duration;

use proptest::prelude::*;
use proptest::test_runner::FileFailurePersistence;

use super::{Event, Foreign, Routing, Start, World};
use crate::{FlipPolicy, FlipTiming, Phase, Waiting};

pub(super) fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        8 => Just(Event::Migrate),
        2 => Just(Event::CleanUp),
        1 => Just(Event::Fail),
        3 => (0..3usize).prop_map(|target| Event::Create { target }),
        1 => Just(Event::FailPending),
        1 => Just(Event::DeletePending),
        5 => Just(Event::Northd),
        9 => (0..3usize).prop_map(Event::OvnController),
        1 => (0..3usize).prop_map(Event::OvnControllerDies),
        2 => (0..3usize).prop_map(Event::OvnControllerStarts),
        4 => Just(Event::SeeInstance),
        5 => Just(Event::SeeMigrations),
        6 => Just(Event::SeeOvn),
        10 => Just(Event::Act),
        2 => Just(Event::ActWithoutEffect),
        2 => Just(Event::Restart),
        2 => Just(Event::TimePasses),
    ]
}

/// The same, among others that write to the ports.
pub(super) fn event_beside_others() -> impl Strategy<Value = Event> {
    let others = prop_oneof![
        Just(Foreign::Ids),
        Just(Foreign::Strip),
        Just(Foreign::List),
        Just(Foreign::Reduce),
    ];
    prop_oneof![12 => event(), 1 => others.prop_map(Event::Foreign)]
}

fn config() -> ProptestConfig {
    ProptestConfig {
        cases: 1_500,
        failure_persistence: Some(Box::new(FileFailurePersistence::WithSource("regressions"))),
        ..ProptestConfig::default()
    }
}

fn requested() -> impl Strategy<Value = Option<&'static str>> {
    prop_oneof![Just(None), Just(Some("n0")), Just(Some("n0.example"))]
}

fn routing() -> impl Strategy<Value = Routing> {
    let gateways = prop_oneof![
        3 => Just(vec![0, 1, 2]),
        1 => prop::sample::subsequence(vec![0, 1, 2], 0..=2),
    ];
    let timing = prop_oneof![Just(FlipTiming::OnResume), Just(FlipTiming::OnPause)];
    let keep = prop_oneof![2 => Just(0), 1 => 1..100_000u64].prop_map(Duration::from_millis);
    (0..=3usize, gateways, timing, keep).prop_map(|(routes, gateways, timing, keep_egress)| {
        Routing {
            routes,
            gateways: gateways.into_iter().collect(),
            flip: FlipPolicy {
                timing,
                keep_egress,
            },
        }
    })
}

pub(super) fn start() -> impl Strategy<Value = Start> {
    let silent = prop::bool::weighted(0.2);
    let parts = (1..=3usize, requested(), routing(), any::<bool>(), silent);
    parts.prop_map(|(ports, requested, routing, agents, silent)| Start {
        ports,
        requested,
        routing,
        agents,
        silent,
    })
}

/// A list that was left over, with the guest on its second chassis or on none of it.
pub(super) fn leftover() -> impl Strategy<Value = Start> {
    (
        start(),
        prop_oneof![Just("n1,n0"), Just("n2,n0"), Just("n0,n1")],
    )
        .prop_map(|(start, requested)| Start {
            requested: Some(requested),
            ..start
        })
}

fn world(start: &Start, events: &[Event]) -> World {
    let mut world = World::new(start);
    for event in events {
        world.happen(event);
    }
    world
}

/// Whatever the ports ask for lets the guest be where it is, and they are bound there alone.
fn is_bound_to_the_guest_alone(world: &World) -> Result<(), TestCaseError> {
    let Some(guest) = world.guest() else {
        return Ok(());
    };
    for (name, binding) in &world.south.bindings {
        prop_assert!(
            binding.is_only_on(guest),
            "{} is bound to {:?}, the guest runs on {}",
            name,
            binding,
            guest
        );
    }
    Ok(())
}

fn no_mark_is_left(world: &World) -> Result<(), TestCaseError> {
    for (name, config) in &world.north.ports {
        prop_assert_eq!(&config.mark, &None, "{} still bears a mark", name);
    }
    Ok(())
}

/// Whenever everything else has caught up, the guest has its network.
pub(super) fn has_its_network(start: &Start, events: &[Event]) -> Result<(), TestCaseError> {
    world(start, events).guest_is_reachable()
}

/// The same, and at the end.
pub(super) fn is_taken_over(start: &Start, events: &[Event]) -> Result<(), TestCaseError> {
    let mut world = world(start, events);
    world.guest_is_reachable()?;
    world.come_to_rest(false);
    world.guest_is_reachable()
}

/// The VM is deleted, and what its owner asked for meanwhile is what stays.
pub(super) fn keeps_the_choice(
    start: &Start,
    events: &[Event],
    more: &[Event],
) -> Result<(), TestCaseError> {
    let mut world = world(start, events);
    world.vanish("n9");
    for event in more {
        world.happen(event);
    }
    world.come_to_rest(false);
    no_mark_is_left(&world)?;
    for config in world.north.ports.values() {
        prop_assert_eq!(config.requested_chassis.as_deref(), Some("n9"));
    }
    Ok(())
}

proptest! {
    #![proptest_config(config())]

    /// Idempotence, fencing and reach are asserted by the model at every step on the way.
    #[test]
    fn ends_where_the_guest_runs(
        start in start(),
        events in prop::collection::vec(event(), 0..120),
    ) {
        let mut world = world(&start, &events);
        let decisions = world.come_to_rest(false);

        let guest = world.guest().expect("nobody deleted it").clone();
        no_mark_is_left(&world)?;
        is_bound_to_the_guest_alone(&world)?;
        for (name, config) in &world.north.ports {
            prop_assert_eq!(&config.activation_strategy, &None);
            match (start.requested, config.requested_chassis.as_deref()) {
                (None, now) => prop_assert_eq!(now, None, "what was unset is unset again"),
                (Some(_), Some(now)) => prop_assert!(guest.is_named_by(now), "{} on {}", now, guest),
                (Some(before), None) => prop_assert!(false, "{} of {} is gone", before, name),
            }
        }
        world.routes_follow()?;
        for (decision, migration) in decisions.iter().zip(&world.migrations) {
            // One that failed may find the guest on its target: a later one took it there.
            let there = migration.fails && world.is_on_target_of(migration);
            let expected = if migration.fails { Phase::RolledBack } else { Phase::Succeeded };
            prop_assert!(
                there || decision.phase == expected,
                "migration {}: {:?}", migration.number, decision
            );
        }
    }

    /// Whenever everything else has caught up, the guest has its network, however far its migration
    /// is.
    #[test]
    fn the_guest_has_its_network_on_the_way(
        start in start(),
        events in prop::collection::vec(event(), 0..80),
    ) {
        has_its_network(&start, &events)?;
    }

    /// The same beside writers who replace whole columns, without a guard.
    #[test]
    fn others_do_not_keep_the_guest_off_the_network(
        start in start(),
        events in prop::collection::vec(event_beside_others(), 0..80),
    ) {
        let mut world = world(&start, &events);
        world.guest_is_reachable()?;
        world.come_to_rest(false);
        no_mark_is_left(&world)?;
        is_bound_to_the_guest_alone(&world)?;
    }

    /// A list that somebody left behind keeps nobody off the network.
    #[test]
    fn a_list_that_was_left_over_is_taken_over(
        start in leftover(),
        events in prop::collection::vec(event(), 0..60),
    ) {
        is_taken_over(&start, &events)?;
    }

    /// The pod that the guest left never goes away: the port is bound right all the same, and is
    /// held by an explicit request for as long as two chassis could compete for it.
    #[test]
    fn a_lingering_pod_does_not_hold_the_binding_up(
        start in start(),
        events in prop::collection::vec(event(), 0..80),
    ) {
        let mut world = world(&start, &events);
        let decisions = world.come_to_rest(true);

        is_bound_to_the_guest_alone(&world)?;
        world.routes_follow()?;
        let held = world.north.ports.values().any(|config| config.mark.is_some());
        let mut open = decisions.iter().filter(|decision| !decision.phase.is_final());
        let last = open.next_back();
        prop_assert_eq!(held, last.is_some());
        if let Some(last) = last {
            prop_assert!(matches!(last.waiting, Some(Waiting::OtherPod { .. })), "{:?}", last);
            prop_assert_eq!(start.requested, None);
        }
    }

    /// What the VM's owner asked for while its network was handed over is what stays when it is gone.
    #[test]
    fn a_newer_choice_outlives_the_guest(
        start in start(),
        events in prop::collection::vec(event(), 0..60),
        more in prop::collection::vec(event(), 0..20),
    ) {
        keeps_the_choice(&start, &events, &more)?;
    }
}
