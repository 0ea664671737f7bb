//! From every state that crashes, delays and failures can lead to, the decisions end with the port
//! bound where the guest runs and nowhere else, and with nothing left behind.

mod model;

use std::time::Duration;

use handover::{FlipPolicy, FlipTiming, Phase, Waiting};
use model::{Event, Routing, World};
use proptest::prelude::*;
use proptest::test_runner::FileFailurePersistence;

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        6 => Just(Event::Migrate),
        1 => Just(Event::Fail),
        2 => (0..3usize).prop_map(|target| Event::NextMigration { target }),
        5 => Just(Event::Northd),
        9 => (0..3usize).prop_map(Event::OvnController),
        5 => Just(Event::SeeKubernetes),
        6 => Just(Event::SeeOvn),
        10 => Just(Event::Act),
        2 => Just(Event::ActWithoutEffect),
        2 => Just(Event::Restart),
        2 => Just(Event::TimePasses),
    ]
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

proptest! {
    #![proptest_config(config())]

    /// Idempotence, fencing and reach are asserted by the model at every step on the way.
    #[test]
    fn ends_where_the_guest_runs(
        ports in 1..=3usize,
        requested in requested(),
        routing in routing(),
        events in prop::collection::vec(event(), 0..120),
    ) {
        let mut world = World::new(ports, requested, &routing);
        for event in &events {
            world.happen(event);
        }
        let decisions = world.come_to_rest(false);

        let guest = world.guest().clone();
        for (name, config) in &world.north.ports {
            prop_assert_eq!(&config.mark, &None, "{} still bears a mark", name);
            prop_assert_eq!(&config.activation_strategy, &None);
            match (requested, config.requested_chassis.as_deref()) {
                (None, now) => prop_assert_eq!(now, None, "what was unset is unset again"),
                (Some(_), Some(now)) => prop_assert!(guest.is_named_by(now), "{} on {}", now, guest),
                (Some(before), None) => prop_assert!(false, "{} is gone", before),
            }
            prop_assert!(
                world.south.bindings[name].is_only_on(&guest),
                "{} is bound to {:?}, the guest runs on {}", name, world.south.bindings[name], guest
            );
        }
        world.routes_follow()?;
        for (decision, migration) in decisions.iter().zip(&world.migrations) {
            let expected = if migration.fails { Phase::RolledBack } else { Phase::Succeeded };
            prop_assert_eq!(decision.phase, expected, "migration {}", migration.number);
        }
    }

    /// The pod that the guest left never goes away: the port is bound right all the same, and is
    /// held by an explicit request for as long as two chassis could compete for it.
    #[test]
    fn a_lingering_pod_does_not_hold_the_binding_up(
        ports in 1..=2usize,
        requested in requested(),
        routing in routing(),
        events in prop::collection::vec(event(), 0..80),
    ) {
        let mut world = World::new(ports, requested, &routing);
        for event in &events {
            world.happen(event);
        }
        let decisions = world.come_to_rest(true);

        let guest = world.guest().clone();
        for (name, binding) in &world.south.bindings {
            prop_assert!(
                binding.is_only_on(&guest),
                "{} is bound to {:?}, the guest runs on {}", name, binding, guest
            );
        }
        world.routes_follow()?;
        let held = world.north.ports.values().any(|config| config.mark.is_some());
        let last = decisions.last().expect("there is always a first migration");
        prop_assert_eq!(held, !last.phase.is_final());
        if held {
            prop_assert!(matches!(last.waiting, Some(Waiting::OtherPod { .. })), "{:?}", last);
            prop_assert_eq!(requested, None);
        }
    }
}
