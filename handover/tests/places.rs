//! Where the guest is, whose request a port bears, and what opens a port that is shut over it: one
//! observation each.

#![allow(clippy::expect_used, reason = "a test asserts by panicking")]

mod single;

use std::time::Duration;

use handover::{
    Binding, Chassis, Epoch, Mark, MigrationUid, Newer, Observed, Original, Outcome, Phase, Port,
    PortName, Side, Signal, SignalKind, SignalSource, SourceWords, Step, Waiting, decide,
    has_moved, source,
};
use single::{START, apply, armed, at_barrier, claim, observed, port};

fn bound(mut port: Port, chassis: Option<&str>, additional: &[&str]) -> Port {
    port.binding = Binding {
        chassis: chassis.map(str::to_owned),
        additional: additional.iter().map(|&name| name.to_owned()).collect(),
    };
    port
}

fn resumed(source: SignalSource) -> Signal {
    Signal {
        kind: SignalKind::ResumedOnTarget,
        source,
        at: START,
    }
}

fn step(world: &Observed) -> Option<Step> {
    decide(world).write.map(|write| write.step)
}

fn strategy(world: &Observed) -> Option<&str> {
    world.ports[0].config.activation_strategy.as_deref()
}

fn succeeded(world: &mut Observed) {
    world.outcome = Outcome::GuestOn(Side::Target);
    world.since.outcome = Some(START);
}

fn mark_of_an_older_one() -> Mark {
    Mark {
        migration: MigrationUid::new("m-0"),
        epoch: Epoch(4),
        source: "n1".to_owned(),
        target: "n2".to_owned(),
        original: Original::default(),
        barrier: None,
        source_released: false,
    }
}

// === Which migration counts ===

#[test]
fn a_migration_that_moved_nothing_takes_nothing_over() {
    let mut running = armed(vec![port("a", None)]);
    let mut failed = observed(running.ports.clone());
    failed.identity.epoch = Epoch(6);
    failed.identity.migration = MigrationUid::new("m-6");
    failed.target = None;
    failed.outcome = Outcome::GuestOn(Side::Source);
    failed.earlier.under_way = true;
    assert!(!has_moved(&failed));
    let decision = decide(&failed);
    assert_eq!((decision.write, decision.phase), (None, Phase::RolledBack));
    running.newer.note(&failed);
    assert!(!decide(&running).superseded);

    failed.outcome = Outcome::GuestOn(Side::Target);
    running.newer.note(&failed);
    assert!(decide(&running).superseded, "that one has the guest");
}

#[test]
fn a_migration_that_is_over_leaves_the_ports_to_the_one_that_has_begun() {
    let mut world = at_barrier();
    world.newer = Newer {
        has_begun: true,
        has_moved: false,
    };
    assert!(!decide(&world).superseded, "news of different ages");
    succeeded(&mut world);
    assert!(decide(&world).superseded);
}

#[test]
fn nothing_is_armed_while_an_earlier_migration_is_not_over_or_left_the_guest_elsewhere() {
    let mut world = observed(vec![port("a", None)]);
    world.earlier.under_way = true;
    let waiting = |world: &Observed| decide(world).waiting;
    assert_eq!(waiting(&world), Some(Waiting::EarlierMigration));
    world.earlier.under_way = false;
    world.earlier.left_guest_on = Some(Chassis::new("n3", ""));
    assert_eq!(waiting(&world), Some(Waiting::EarlierMigration));
    world.is_named = true;
    assert_eq!(step(&world), Some(Step::Arm), "KubeVirt names this one");
}

#[test]
fn a_guest_leaves_from_where_it_is_now_until_something_was_written() {
    let words = SourceWords {
        told: None,
        now: Some("n2"),
        recorded: Some("n3"),
        begun: false,
    };
    assert_eq!(source(words), Some("n2"));
    let begun = SourceWords {
        begun: true,
        ..words
    };
    assert_eq!(source(begun), Some("n3"));
    let told = SourceWords {
        told: Some("n1"),
        ..begun
    };
    assert_eq!(source(told), Some("n1"));
    let gone = SourceWords { now: None, ..words };
    assert_eq!(source(gone), Some("n3"));
}

// === The Southbound's word ===

#[test]
fn nothing_is_armed_or_settled_where_the_southbound_has_the_port_elsewhere() {
    let elsewhere = bound(port("a", None), Some("n9"), &[]);
    let mut world = observed(vec![port("b", None), elsewhere]);
    for outcome in [Outcome::Running, Outcome::GuestOn(Side::Target)] {
        world.outcome = outcome;
        world.since.outcome = Some(START);
        let decision = decide(&world);
        assert_eq!(decision.write, None);
        let chassis = vec!["n9".to_owned()];
        let port = PortName::new("a");
        let named = Waiting::BoundElsewhere { port, chassis };
        assert_eq!(decision.waiting, Some(named));
    }
    world.now = START.after(world.deadlines.establish);
    assert_eq!(decide(&world).phase, Phase::Failed);
}

#[test]
fn a_port_that_the_target_has_alone_is_armed_open() {
    let mut world = observed(vec![bound(port("a", None), Some("n2"), &[])]);
    let decision = decide(&world);
    assert_eq!(apply(&mut world, &decision), Step::Arm);
    assert_eq!(strategy(&world), None, "its guest may run there");
}

#[test]
fn a_port_without_an_interface_holds_up_none_of_the_others() {
    let nobodys = bound(port("b", None), None, &[]);
    let mut world = armed(vec![port("a", None), nobodys]);
    let left_out = vec![PortName::new("b")];
    assert_eq!(world.ports[1].config.mark, None);
    claim(&mut world, 0);
    let decision = decide(&world);
    assert_eq!(decision.left_out, left_out);
    assert_eq!(apply(&mut world, &decision), Step::RaiseBarrier);
    world.barrier.applied.values_mut().for_each(|at| *at = 11);
    let decision = decide(&world);
    assert_eq!(
        (decision.phase, &decision.left_out),
        (Phase::Ready, &left_out)
    );

    succeeded(&mut world);
    world.ports[0].binding.chassis = None;
    world.ports[0].binding.additional = vec!["n2".to_owned()];
    let decision = decide(&world);
    assert_eq!(apply(&mut world, &decision), Step::Settle);
    world.ports[0] = bound(world.ports[0].clone(), Some("n2"), &[]);
    world.target_pod_gone = true;
    let waiting = decide(&world);
    assert_eq!(waiting.write, None, "it may be about to claim it");
    let patience = START.after(world.deadlines.peers);
    assert_eq!(waiting.wake_at, Some(patience));
    world.now = START.after(world.deadlines.peers);
    let decision = decide(&world);
    assert_eq!(apply(&mut world, &decision), Step::Release);
    let decision = decide(&world);
    assert_eq!(
        (decision.phase, decision.left_out),
        (Phase::Succeeded, left_out)
    );
}

#[test]
fn a_vm_without_any_interface_is_not_prepared() {
    let world = observed(vec![bound(port("a", None), None, &[])]);
    assert_eq!(decide(&world).waiting, Some(Waiting::Interface));
}

#[test]
fn an_interface_that_only_the_target_has_is_open_from_the_start() {
    let pinned = bound(port("b", Some("n1")), None, &[]);
    let mut world = armed(vec![port("a", None), pinned]);
    let config = &world.ports[1].config;
    assert_eq!(config.requested_chassis.as_deref(), Some("n1,n2"));
    assert_eq!(config.activation_strategy, None);
    claim(&mut world, 0);
    assert_eq!(
        step(&world),
        Some(Step::RaiseBarrier),
        "it is not waited for"
    );
}

// === Opening ===

#[test]
fn a_port_that_is_shut_though_its_guest_runs_there_is_opened() {
    for (source, after) in [
        (SignalSource::DomainReady, Duration::ZERO),
        (SignalSource::PodAnnotation, Duration::ZERO),
        (SignalSource::Rarp, Duration::from_millis(500)),
        (SignalSource::Libvirt, Duration::from_millis(500)),
    ] {
        let mut world = at_barrier();
        world.signals.note(resumed(source));
        if !after.is_zero() {
            assert_eq!(step(&world), None, "OVN may be about to");
            assert_eq!(decide(&world).wake_at, Some(START.after(after)));
        }
        world.now = START.after(after);
        let mut open = world.clone();
        open.ports[0].activated.insert("n2".to_owned());
        assert_eq!(step(&open), None, "{source}: OVN has opened it");
        let decision = decide(&world);
        assert_eq!(apply(&mut world, &decision), Step::Open);
        assert_eq!(strategy(&world), None);
        assert_eq!(step(&world), None, "and it stays open");
    }
}

#[test]
fn the_target_is_open_while_the_source_is_waited_for() {
    let mut world = at_barrier();
    succeeded(&mut world);
    let decision = decide(&world);
    assert_eq!(apply(&mut world, &decision), Step::Open);
    let waiting = decide(&world).waiting;
    assert!(matches!(waiting, Some(Waiting::SourceRelease { .. })));
}

#[test]
fn a_port_that_carries_no_announcement_is_never_shut() {
    let mut masquerade = port("a", None);
    masquerade.announces = false;
    let world = armed(vec![masquerade]);
    assert_eq!(strategy(&world), None);
    let mut listed = port("a", Some("n1,n2"));
    listed.config.activation_strategy = Some("rarp".to_owned());
    listed.announces = false;
    assert_eq!(strategy(&armed(vec![listed])), None, "somebody else's too");
}

#[test]
fn a_port_that_nobody_else_has_is_not_shut() {
    let mut world = at_barrier();
    world.ports[0].binding.chassis = None;
    let decision = decide(&world);
    assert_eq!(apply(&mut world, &decision), Step::Open);
}

// === Others' requests ===

#[test]
fn a_list_of_both_ends_is_this_handover_whatever_they_are_called_by() {
    for list in ["n1,n2", "n1.example,n2.example", "n1,n2.example"] {
        let mut theirs = port("a", Some(list));
        theirs.config.activation_strategy = Some("rarp".to_owned());
        let mut world = observed(vec![theirs]);
        let decision = decide(&world);
        assert_eq!(apply(&mut world, &decision), Step::Arm);
        let config = &world.ports[0].config;
        assert_eq!(config.requested_chassis.as_deref(), Some(list));
        let mark = config.mark.as_ref().expect("it is held");
        assert_eq!(mark.original, Original::default(), "nothing to put back");
        assert_eq!(step(&world), None);

        succeeded(&mut world);
        world.ports[0] = bound(world.ports[0].clone(), None, &["n2"]);
        let decision = decide(&world);
        assert_eq!(apply(&mut world, &decision), Step::Settle);
        world.ports[0] = bound(world.ports[0].clone(), Some("n2"), &[]);
        let decision = decide(&world);
        assert_eq!(apply(&mut world, &decision), Step::Release);
        let config = &world.ports[0].config;
        assert_eq!((&config.requested_chassis, &config.mark), (&None, &None));
    }
    let mut turned = observed(vec![port("a", Some("n2.example,n1.example"))]);
    let decision = decide(&turned);
    assert_eq!(apply(&mut turned, &decision), Step::Arm);
    let requested = turned.ports[0].config.requested_chassis.as_deref();
    assert_eq!(requested, Some("n1,n2"), "the source comes first");
}

#[test]
fn a_marked_list_of_another_migration_is_taken_over() {
    let mut lsp = port("a", Some("n9,n8"));
    lsp.config.mark = Some(mark_of_an_older_one());
    let mut world = observed(vec![lsp]);
    let decision = decide(&world);
    assert_eq!(apply(&mut world, &decision), Step::Arm);
}

#[test]
fn a_list_that_was_left_over_is_taken_over() {
    let leftover = |list, chassis, additional: &[&str]| {
        let mut lsp = bound(port("a", Some(list)), chassis, additional);
        lsp.config.activation_strategy = Some("rarp".to_owned());
        observed(vec![lsp])
    };
    // Its first chassis is not there; the guest has left the first; it is on none of them.
    let dead = leftover("n7,n1", None, &["n1"]);
    let mut left = leftover("n7,n1", Some("n1"), &[]);
    left.former = vec![Chassis::new("n7", "")];
    let none = leftover("n7,n8", None, &[]);
    for mut world in [dead, left, none] {
        let decision = decide(&world);
        assert_eq!(apply(&mut world, &decision), Step::Arm);
        let mark = world.ports[0].config.mark.as_ref();
        assert_eq!(mark.map(|mark| &mark.original), Some(&Original::default()));
    }
    let theirs = leftover("n1,n7", Some("n1"), &[]);
    assert_eq!(step(&theirs), None, "somebody may be about to use it");
    let mut moved = theirs;
    moved.signals.note(resumed(SignalSource::DomainReady));
    assert_eq!(step(&moved), Some(Step::Arm), "the guest has left it");
    succeeded(&mut moved);
    assert_eq!(step(&moved), Some(Step::Settle));
}

#[test]
fn whoever_ends_the_handover_first_is_followed() {
    for theirs in ["n2", "n2.example"] {
        let mut world = at_barrier();
        world.ports[0] = bound(world.ports[0].clone(), Some("n2"), &[]);
        let config = &mut world.ports[0].config;
        config.requested_chassis = Some(theirs.to_owned());
        config.activation_strategy = None;
        world.signals.note(resumed(SignalSource::DomainReady));
        assert_eq!(step(&world), None);
        succeeded(&mut world);
        world.source_pod_gone = true;
        assert_eq!(step(&world), Some(Step::Release));
    }
}

#[test]
fn a_success_that_cannot_be_brought_about_is_none() {
    // A pin that keeps the guest's port from where it is, on a port that is not segue's.
    let theirs = bound(port("a", Some("n7")), None, &[]);
    let mut world = observed(vec![theirs]);
    succeeded(&mut world);
    let decision = decide(&world);
    assert_eq!(decision.phase, Phase::Finalising);
    assert!(matches!(
        decision.waiting,
        Some(Waiting::ForeignRequest { .. })
    ));
    world.now = START.after(world.deadlines.establish);
    let failed = decide(&world);
    assert_eq!((failed.phase, failed.wake_at), (Phase::Failed, None));

    // The target's chassis is not known.
    let mut world = observed(vec![port("a", Some("n1"))]);
    world.target = None;
    succeeded(&mut world);
    assert_eq!(decide(&world).waiting, Some(Waiting::Target));
    world.now = START.after(world.deadlines.establish);
    assert_eq!(decide(&world).phase, Phase::Failed);
}

#[test]
fn only_what_is_still_a_handovers_is_taken_back() {
    for outcome in [Outcome::GuestGone, Outcome::GuestOn(Side::Source)] {
        let mut world = armed(vec![port("a", Some("n1"))]);
        world.ports[0].config.requested_chassis = Some("n9".to_owned());
        world.outcome = outcome;
        world.since.outcome = Some(START);
        world.target_pod_gone = true;
        let decision = decide(&world);
        assert_eq!(apply(&mut world, &decision), Step::Release, "{outcome:?}");
        let config = &world.ports[0].config;
        assert_eq!(config.requested_chassis.as_deref(), Some("n9"));
        assert_eq!((&config.activation_strategy, &config.mark), (&None, &None));
    }
}
