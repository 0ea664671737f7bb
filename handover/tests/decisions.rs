//! Single decisions, one observation each: the corners that the convergence tests pass through
//! without naming them.

#![allow(clippy::expect_used, reason = "a test asserts by panicking")]

mod single;

use std::time::Duration;

use handover::{
    Binding, Chassis, Decision, Epoch, Expected, Mark, MigrationUid, Original, Outcome, Phase,
    PortConfig, PortName, PortWrite, Refusal, Side, Sighting, Signal, SignalKind, SignalSource,
    Signals, Step, Timestamp, Waiting, decide,
};
use proptest::prelude::*;
use single::{START, apply, armed, at_barrier, claim, observed, port, signal};

#[test]
fn arming_takes_all_ports_in_one_write_and_keeps_what_they_had() {
    let ports = vec![port("a", Some("n1.example")), port("b", None)];
    let decision = decide(&observed(ports));
    let write = decision.write.expect("unarmed ports are armed");
    assert_eq!((write.step, write.ports.len()), (Step::Arm, 2));
    for (change, original) in write.ports.iter().zip([Some("n1.example"), None]) {
        assert_eq!(change.config.requested_chassis.as_deref(), Some("n1,n2"));
        assert_eq!(change.config.activation_strategy.as_deref(), Some("rarp"));
        let mark = change
            .config
            .mark
            .as_ref()
            .expect("an armed port is marked");
        assert_eq!(mark.original.requested_chassis.as_deref(), original);
    }
}

#[test]
fn nobodys_choice_is_overwritten() {
    for foreign in ["n9", "n1,n9", "n2"] {
        let decision = decide(&observed(vec![
            port("a", Some("n1")),
            port("b", Some(foreign)),
        ]));
        assert_eq!(decision.write, None, "{foreign}");
        assert!(
            matches!(&decision.waiting, Some(Waiting::ForeignRequest { port, requested })
                if port.as_str() == "b" && requested == foreign),
            "{decision:?}"
        );
    }
}

#[test]
fn no_barrier_before_every_port_is_claimed() {
    let mut world = armed(vec![port("a", None), port("b", None)]);
    claim(&mut world, 0);
    let decision = decide(&world);
    assert_eq!(decision.write, None);
    assert!(matches!(decision.waiting, Some(Waiting::Claim { port, .. }) if port.as_str() == "b"));
    claim(&mut world, 1);
    let decision = decide(&world);
    assert_eq!(apply(&mut world, &decision), Step::RaiseBarrier);
    assert_eq!(
        decision.write.and_then(|write| write.raise_nb_cfg_from),
        Some(10)
    );
}

#[test]
fn ready_only_when_the_chassis_followed_and_a_dead_peer_only_delays() {
    let mut world = at_barrier();
    let peers = world.deadlines.peers;
    let waiting = decide(&world);
    assert_eq!(waiting.phase, Phase::Preparing);
    assert!(
        matches!(&waiting.waiting, Some(Waiting::Barrier { lagging }) if *lagging == ["n1", "n2"]),
        "{waiting:?}"
    );
    world.barrier.applied.insert("n1".into(), 11);
    world.barrier.applied.insert("n2".into(), 11);
    let waiting = decide(&world);
    assert_eq!(waiting.phase, Phase::Preparing);
    assert_eq!(waiting.waiting, Some(Waiting::Peers));
    assert_eq!(waiting.wake_at, Some(START.after(peers)));
    world.now = START.after(peers);
    assert_eq!(decide(&world).phase, Phase::Ready, "n3 had its time");
    world.barrier.applied.insert("n2".into(), 10);
    assert_eq!(
        decide(&world).phase,
        Phase::Preparing,
        "the target never is passed over"
    );
    world.now = START;
    world.barrier.applied.insert("n2".into(), 11);
    world.barrier.applied.insert("n3".into(), 11);
    assert_eq!(decide(&world).phase, Phase::Ready);
}

#[test]
fn a_target_that_lets_go_has_to_prove_itself_again() {
    let mut world = at_barrier();
    world.ports[0].binding.additional.clear();
    let decision = decide(&world);
    assert_eq!(apply(&mut world, &decision), Step::DropBarrier);
    assert!(matches!(
        decide(&world).waiting,
        Some(Waiting::Claim { .. })
    ));
    claim(&mut world, 0);
    assert_eq!(
        decide(&world).write.map(|write| write.step),
        Some(Step::RaiseBarrier)
    );
}

#[test]
fn a_guest_that_has_announced_itself_is_not_waited_for() {
    let strategy = |decision: Decision| {
        let write = decision.write.expect("an unarmed port is armed");
        assert_eq!(write.step, Step::Arm);
        write.ports[0].config.activation_strategy.clone()
    };
    let mut world = observed(vec![port("a", None)]);
    world.signals = [signal(SignalKind::Paused, 5)].into_iter().collect();
    assert_eq!(strategy(decide(&world)).as_deref(), Some("rarp"));

    world.signals.note(signal(SignalKind::ResumedOnTarget, 9));
    let decision = decide(&world);
    assert_eq!(strategy(decision.clone()), None);
    apply(&mut world, &decision);
    assert_eq!(decide(&world).write, None);

    let mut in_time = armed(vec![port("a", None)]);
    in_time.signals = world.signals.clone();
    assert_eq!(decide(&in_time).write, None, "it opened by itself");
}

#[test]
fn a_target_that_moves_on_is_the_one_the_mark_names() {
    let mut world = at_barrier();
    world.target = Some(Chassis::new("n3", "n3.example"));
    let decision = decide(&world);
    assert_eq!(apply(&mut world, &decision), Step::Arm);
    let config = &world.ports[0].config;
    assert_eq!(config.requested_chassis.as_deref(), Some("n1,n3"));
    let mark = config.mark.as_ref().expect("an armed port is marked");
    assert_eq!((mark.source.as_str(), mark.target.as_str()), ("n1", "n3"));
    assert_eq!(mark.barrier, None, "n3 has proved nothing yet");
    let decision = decide(&world);
    assert_eq!(decision.write, None);
    assert!(matches!(decision.waiting, Some(Waiting::Claim { .. })));
}

#[test]
fn a_source_that_resumes_wins_over_signs_of_the_target() {
    let mut world = at_barrier();
    for (kind, phase) in [
        (SignalKind::Paused, Phase::Switching),
        (SignalKind::ResumedOnTarget, Phase::Switched),
        (SignalKind::ResumedOnSource, Phase::RollingBack),
    ] {
        world.signals.note(signal(kind, 1));
        assert_eq!(decide(&world).phase, phase);
    }
    let decision = decide(&world);
    assert_eq!(apply(&mut world, &decision), Step::Settle);
    assert_eq!(
        world.ports[0].config.requested_chassis.as_deref(),
        Some("n1")
    );
}

#[test]
fn an_agents_word_that_the_source_resumed_takes_no_chassis_from_a_port() {
    let by = |kind, source| Signal {
        kind,
        source,
        at: START,
    };
    let mut world = at_barrier();
    for source in [SignalSource::Libvirt, SignalSource::Qmp] {
        world.signals.note(by(SignalKind::ResumedOnSource, source));
    }
    world
        .signals
        .note(by(SignalKind::ResumedOnTarget, SignalSource::Rarp));
    let decision = decide(&world);
    assert_eq!(
        (decision.phase, decision.write, decision.waiting),
        (Phase::RollingBack, None, Some(Waiting::Outcome))
    );

    let mut wrong = world.clone();
    let ready = by(SignalKind::ResumedOnTarget, SignalSource::DomainReady);
    wrong.signals.note(ready);
    assert_eq!(
        decide(&wrong).phase,
        Phase::Switched,
        "KubeVirt knows better"
    );

    let mut confirmed = world.clone();
    let ended = by(SignalKind::ResumedOnSource, SignalSource::MigrationEnd);
    confirmed.signals.note(ended);
    confirmed
        .signals
        .note(by(SignalKind::ResumedOnTarget, SignalSource::DomainReady));
    let decision = decide(&confirmed);
    assert_eq!(apply(&mut confirmed, &decision), Step::Settle);

    world.outcome = Outcome::GuestOn(Side::Source);
    let decision = decide(&world);
    assert_eq!(apply(&mut world, &decision), Step::Settle);
}

#[test]
fn a_sighting_is_believed_of_whoever_can_know() {
    use Sighting::{Left, Runs, Stopped};
    use SignalKind::{Paused, ResumedOnSource, ResumedOnTarget};
    let hypervisors = [SignalSource::Libvirt, SignalSource::Qmp];
    let frames = [
        SignalSource::Rarp,
        SignalSource::Garp,
        SignalSource::NeighbourAdvertisement,
    ];
    for paused in [false, true] {
        for source in hypervisors {
            let says = |what: Sighting, on| what.says(on, source, paused);
            assert_eq!(says(Stopped, Side::Source), Some(Paused));
            assert_eq!(says(Stopped, Side::Target), None);
            let left = paused.then_some(ResumedOnTarget);
            assert_eq!(says(Left, Side::Source), left);
            assert_eq!(says(Left, Side::Target), None);
            assert_eq!(says(Runs, Side::Target), Some(ResumedOnTarget));
            let back = paused.then_some(ResumedOnSource);
            assert_eq!(says(Runs, Side::Source), back);
        }
        for source in frames {
            let says = |what: Sighting, on| what.says(on, source, paused);
            assert_eq!(says(Runs, Side::Target), Some(ResumedOnTarget));
            for (what, on) in [
                (Runs, Side::Source),
                (Stopped, Side::Source),
                (Stopped, Side::Target),
                (Left, Side::Source),
            ] {
                assert_eq!(says(what, on), None, "{what:?} {on:?} by {source}");
            }
        }
        let by_kubevirt = Runs.says(Side::Target, SignalSource::DomainReady, paused);
        assert_eq!(by_kubevirt, None, "no agent speaks for KubeVirt");
    }
}

#[test]
fn the_list_is_reduced_once_the_source_let_go_or_its_time_is_up() {
    let mut world = at_barrier();
    world.ports[0].activated.insert("n2".to_owned());
    world.outcome = Outcome::GuestOn(Side::Target);
    world.since.outcome = Some(START);
    let deadline = START.after(world.deadlines.release);
    let waiting = decide(&world);
    assert_eq!(
        (waiting.write.is_some(), waiting.wake_at),
        (false, Some(deadline))
    );
    assert!(matches!(
        waiting.waiting,
        Some(Waiting::SourceRelease { .. })
    ));

    let mut released = world.clone();
    released.ports[0].binding.chassis = None;
    let mut late = world;
    late.now = deadline;
    for (mut world, source_released) in [(released, true), (late, false)] {
        let decision = decide(&world);
        assert_eq!(apply(&mut world, &decision), Step::Settle);
        let config = &world.ports[0].config;
        assert_eq!(config.requested_chassis.as_deref(), Some("n2"));
        assert_eq!(config.activation_strategy, None);
        let mark = config
            .mark
            .as_ref()
            .expect("the mark stays until the binding is seen");
        assert_eq!(mark.source_released, source_released);
    }
}

#[test]
fn what_stood_there_comes_back_in_the_form_it_had() {
    for (before, after) in [
        (None, None),
        (Some("n1"), Some("n2")),
        (Some("n1.example"), Some("n2.example")),
    ] {
        let mut lsp = port("a", before);
        lsp.config.activation_strategy = Some("garp".to_owned());
        let mut world = armed(vec![lsp]);
        world.outcome = Outcome::GuestOn(Side::Target);
        world.ports[0].binding = Binding {
            chassis: None,
            additional: vec!["n2".to_owned()],
        };
        let decision = decide(&world);
        assert_eq!(apply(&mut world, &decision), Step::Settle);
        world.ports[0].binding = Binding {
            chassis: Some("n2".to_owned()),
            additional: Vec::new(),
        };
        let decision = decide(&world);
        assert_eq!(apply(&mut world, &decision), Step::Release);
        let config = &world.ports[0].config;
        assert_eq!(config.requested_chassis.as_deref(), after);
        assert_eq!(config.activation_strategy.as_deref(), Some("garp"));
        assert_eq!(config.mark, None);
        assert_eq!(decide(&world).phase, Phase::Succeeded);
    }
}

#[test]
fn an_end_that_cannot_be_established_is_said_and_mended_later() {
    let mut world = at_barrier();
    world.outcome = Outcome::GuestOn(Side::Source);
    world.since.outcome = Some(START);
    world.ports[0].binding.chassis = None;
    let decision = decide(&world);
    apply(&mut world, &decision);
    world.now = START.after(world.deadlines.establish);
    assert_eq!(decide(&world).phase, Phase::Failed);
    world.ports[0].binding = Binding {
        chassis: Some("n1".to_owned()),
        additional: Vec::new(),
    };
    world.target_pod_gone = true;
    let decision = decide(&world);
    assert_eq!(apply(&mut world, &decision), Step::Release);
    assert_eq!(decide(&world).phase, Phase::RolledBack);
}

#[test]
fn an_unchanged_world_causes_no_write() {
    for outcome in [Outcome::GuestOn(Side::Source), Outcome::GuestGone] {
        let mut world = observed(vec![port("a", Some("n1")), port("b", None)]);
        world.outcome = outcome;
        assert_eq!(decide(&world).write, None);
        assert!(decide(&world).phase.is_final());
    }
}

#[test]
fn a_vm_that_vanished_leaves_its_ports_as_they_were() {
    let mut world = armed(vec![port("a", Some("n1")), port("b", None)]);
    world.outcome = Outcome::GuestGone;
    let decision = decide(&world);
    assert_eq!(apply(&mut world, &decision), Step::Release);
    let restored: Vec<_> = world.ports.iter().map(|port| port.config.clone()).collect();
    let before = observed(vec![port("a", Some("n1")), port("b", None)]);
    let before: Vec<_> = before.ports.into_iter().map(|port| port.config).collect();
    assert_eq!(restored, before);
}

#[test]
fn an_epoch_grows_whatever_the_clock_does() {
    assert_eq!(Epoch::next(100, []), Epoch(100));
    assert_eq!(Epoch::next(100, [Epoch(7)]), Epoch(100));
    assert_eq!(Epoch::next(100, [Epoch(150), Epoch(7)]), Epoch(151));
}

#[test]
fn deadlines_do_not_overflow() {
    assert_eq!(Timestamp(1).after(Duration::MAX), Timestamp(u64::MAX));
}

fn mark(epoch: u64) -> Mark {
    Mark {
        migration: MigrationUid::new(format!("m-{epoch}")),
        epoch: Epoch(epoch),
        source: "n1".into(),
        target: "n2".into(),
        original: Original::default(),
        barrier: None,
        source_released: false,
    }
}

proptest! {
    /// Whatever else a row says: once it belongs to a newer epoch, no older decision is taken.
    #[test]
    fn an_older_epoch_is_refused(
        ours in 0..100u64,
        ahead in 1..100u64,
        expects in prop::option::of(0..200u64),
        clears in any::<bool>(),
        requested in prop::option::of("n[0-9](,n[0-9])?"),
    ) {
        let expected_mark = expects.map(|epoch| mark(epoch.min(ours)));
        let decided_on = PortConfig {
            requested_chassis: requested,
            activation_strategy: None,
            mark: if clears { Some(mark(ours)) } else { expected_mark },
        };
        let write = PortWrite {
            port: PortName::new("a"),
            expected: Expected::of(&decided_on),
            config: PortConfig { mark: (!clears).then(|| mark(ours)), ..decided_on.clone() },
        };
        prop_assert_eq!(write.check(&decided_on), Ok(()));
        let taken_over = PortConfig { mark: Some(mark(ours + ahead)), ..decided_on };
        let refused = matches!(write.check(&taken_over), Err(Refusal::Fenced { .. }));
        prop_assert!(refused);
    }

    /// The order and number of reports make no difference.
    #[test]
    fn signals_are_a_set(seed in prop::collection::vec((0..3usize, 0..50u64), 0..12)) {
        let kinds = [SignalKind::Paused, SignalKind::ResumedOnTarget, SignalKind::ResumedOnSource];
        let forward: Signals = seed.iter().map(|&(kind, at)| signal(kinds[kind], at)).collect();
        let backward: Signals = seed.iter().rev().map(|&(kind, at)| signal(kinds[kind], at)).collect();
        prop_assert_eq!(&forward, &backward);
        let times: Vec<_> = forward.iter().map(|signal| signal.at).collect();
        prop_assert!(times.is_sorted());
    }
}
