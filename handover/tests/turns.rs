//! A guest that is paused and resumed on its source while its migration goes on, and then leaves.

mod single;

use handover::{GuestPlace, Phase, Signal, SignalKind, SignalSource, Signals, Timestamp, decide};
use proptest::prelude::*;

use SignalKind::{Paused, ResumedOnSource, ResumedOnTarget};
use SignalSource::{Activation, DomainReady, Libvirt, MigrationEnd, Qmp, Rarp};
use single::at_barrier;

fn seen(kind: SignalKind, source: SignalSource, at: u64) -> Signal {
    Signal {
        kind,
        source,
        at: Timestamp(at),
    }
}

/// A person paused it, and resumed it three seconds later; both of the hypervisor's ears told.
fn resumed() -> Signals {
    let told = [
        seen(Paused, Qmp, 1_000),
        seen(Paused, Libvirt, 1_002),
        seen(ResumedOnSource, Qmp, 4_000),
        seen(ResumedOnSource, Libvirt, 4_002),
    ];
    told.into_iter().collect()
}

fn place(mut signals: Signals, more: &[Signal]) -> GuestPlace {
    for signal in more {
        signals.note(*signal);
    }
    signals.guest()
}

#[test]
fn a_later_pause_ends_what_an_agent_said_of_the_source() {
    assert_eq!(resumed().guest(), GuestPlace::BackOnSource);
    for source in [Qmp, Libvirt] {
        let again = seen(Paused, source, 9_000);
        assert_eq!(place(resumed(), &[again]), GuestPlace::InTransit);
        let arrived = seen(ResumedOnTarget, Rarp, 9_050);
        assert_eq!(place(resumed(), &[again, arrived]), GuestPlace::Target);
        let back = seen(ResumedOnSource, source, 9_100);
        assert_eq!(
            place(resumed(), &[again, arrived, back]),
            GuestPlace::BackOnSource
        );
        let third = seen(Paused, source, 20_000);
        assert_eq!(
            place(resumed(), &[again, arrived, back, third]),
            GuestPlace::InTransit,
            "and so on"
        );
    }
    let mut world = at_barrier();
    world.signals = resumed();
    assert_eq!(decide(&world).phase, Phase::RollingBack);
    world.signals.note(seen(Paused, Libvirt, 9_000));
    assert_eq!(decide(&world).phase, Phase::Switching);
    world.signals.note(seen(ResumedOnTarget, Qmp, 9_050));
    assert_eq!(decide(&world).phase, Phase::Switched);
}

#[test]
fn what_is_told_of_the_same_pause_or_of_an_earlier_one_ends_nothing() {
    for told in [
        seen(Paused, Qmp, 1_000),
        seen(Paused, Libvirt, 500),
        seen(Paused, Libvirt, 3_999),
        seen(Paused, Qmp, 4_000),
    ] {
        assert_eq!(
            place(resumed(), &[told]),
            GuestPlace::BackOnSource,
            "{told:?}"
        );
    }
    // libvirt tells of the pause when the guest runs again already.
    let short = || {
        let told = [seen(Paused, Qmp, 1_000), seen(ResumedOnSource, Qmp, 1_050)];
        told.into_iter().collect::<Signals>()
    };
    let late = seen(Paused, Libvirt, 1_400);
    assert_eq!(place(short(), &[late]), GuestPlace::BackOnSource);
    let another = seen(Paused, Libvirt, 2_100);
    assert_eq!(place(short(), &[another]), GuestPlace::InTransit);
}

#[test]
fn only_an_agent_ends_an_agents_word_and_no_other() {
    let ended = seen(ResumedOnSource, MigrationEnd, 5_000);
    let again = seen(Paused, Libvirt, 9_000);
    assert_eq!(
        place(resumed(), &[ended, again]),
        GuestPlace::BackOnSource,
        "KubeVirt says that it is over"
    );
    let forged = seen(Paused, Rarp, 9_000);
    assert_eq!(place(resumed(), &[forged]), GuestPlace::BackOnSource);
}

#[test]
fn signs_of_the_target_from_before_it_ran_on_the_source_are_refuted_but_for_kubevirts() {
    let stale = seen(ResumedOnTarget, Activation, 1_300);
    let again = seen(Paused, Libvirt, 9_000);
    assert_eq!(place(resumed(), &[stale, again]), GuestPlace::InTransit);
    let arrived = seen(ResumedOnTarget, Qmp, 9_040);
    assert_eq!(
        place(resumed(), &[stale, again, arrived]),
        GuestPlace::Target
    );
    let ready = seen(ResumedOnTarget, DomainReady, 1_300);
    assert_eq!(place(resumed(), &[ready, again]), GuestPlace::Target);
}

proptest! {
    /// Whatever is told in whatever order and however often, the first and the last of it are kept.
    #[test]
    fn turns_are_a_set(told in prop::collection::vec((0..3usize, 0..3usize, 0..50u64), 0..16)) {
        let kinds = [Paused, ResumedOnTarget, ResumedOnSource];
        let sources = [Libvirt, Qmp, Activation];
        let told: Vec<_> = told
            .into_iter()
            .map(|(kind, source, at)| seen(kinds[kind], sources[source], at))
            .collect();
        let forward: Signals = told.iter().copied().collect();
        let backward: Signals = told.iter().rev().chain(&told).copied().collect();
        prop_assert_eq!(&forward, &backward);
        prop_assert!(forward.iter().is_sorted_by_key(|signal| signal.at));
        for signal in &told {
            let same = |other: &&Signal| (other.kind, other.source) == (signal.kind, signal.source);
            let times = told.iter().filter(same).map(|other| other.at);
            let kept: Vec<_> = forward.iter().filter(same).map(|other| other.at).collect();
            let mut expected = vec![times.clone().min().unwrap()];
            if signal.is_turn() {
                expected.extend(times.max());
                expected.dedup();
            }
            prop_assert_eq!(kept, expected);
        }
    }

    /// A pause that is not later than what an agent said last of the source changes nothing.
    #[test]
    fn old_pauses_never_end_it(told in prop::collection::vec((prop::bool::ANY, 0..=4_000u64), 0..8)) {
        let told: Vec<_> = told
            .into_iter()
            .map(|(by_qmp, at)| seen(Paused, if by_qmp { Qmp } else { Libvirt }, at))
            .collect();
        prop_assert_eq!(place(resumed(), &told), GuestPlace::BackOnSource);
    }
}
