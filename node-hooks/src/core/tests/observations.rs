//! What hypervisors, guests and the switch show.

use rstest::rstest;

use super::*;

#[test]
fn a_pause_on_the_source_is_told_first_of_all() {
    let mut bench = Bench::new();
    bench.does(arm_source(1));
    let out = bench.does(libvirt(Sign::Paused));
    let paused = Signal {
        id: Some(id(1)),
        kind: Kind::Paused.into(),
        source: Source::Libvirt.into(),
        at_ns: 10,
        seen_at_ns: 11,
        port: String::new(),
    };
    let first = Output::Say(from_agent::Message::Signal(paused));
    assert_eq!(out.first(), Some(&first));
    let ask = Output::AskLastFrame {
        vm: Vm {
            namespace: "demo".into(),
            name: "web".into(),
        },
        epoch: 1,
        port: "p1".into(),
        interface: "tap1".into(),
    };
    assert!(out.contains(&ask), "{out:?}");
    assert!(bench.says(libvirt(Sign::Paused)).is_empty(), "once");
    let qmp = bench.says(lifecycle(Sign::Paused, Origin::Qmp));
    assert_eq!(
        signals(&qmp),
        [(Kind::Paused, Source::Qmp)],
        "by every source"
    );
}

#[test]
fn other_domains_and_what_is_not_armed_are_not_told() {
    let mut bench = Bench::new();
    assert!(bench.does(libvirt(Sign::Paused)).is_empty());
    bench.does(arm_source(1));
    let other = Input::Lifecycle(LifecycleEvent {
        domain: "demo_db".into(),
        sign: Sign::Paused,
        origin: Origin::Libvirt,
        at: Nanos(1),
        seen: Nanos(2),
    });
    assert!(bench.does(other).is_empty());
    bench.does(command(disarm(1, true)));
    assert!(bench.does(libvirt(Sign::Paused)).is_empty());
}

#[test]
fn a_domain_may_be_called_otherwise() {
    let mut bench = Bench::new();
    let mut arm = arm(1, agent::Side::Source);
    arm.domain = "machine-7".into();
    bench.does(command(to_agent::Message::Arm(arm)));
    assert!(bench.does(libvirt(Sign::Paused)).is_empty());
    let named = Input::Lifecycle(LifecycleEvent {
        domain: "machine-7".into(),
        sign: Sign::Paused,
        origin: Origin::Libvirt,
        at: Nanos(1),
        seen: Nanos(2),
    });
    assert_eq!(
        signals(&bench.says(named)),
        [(Kind::Paused, Source::Libvirt)]
    );
}

#[rstest]
#[case(Sign::ResumedAfterFailure)]
// libvirt's words for a cancelled migration are those for one that has arrived.
#[case(Sign::Resumed)]
fn a_source_that_goes_on_is_told_after_a_pause_only(#[case] sign: Sign) {
    let mut bench = Bench::new();
    bench.does(arm_source(1));
    assert!(bench.does(libvirt(sign)).is_empty());
    bench.does(libvirt(Sign::Paused));
    let resumed = [(Kind::Resumed, Source::Libvirt)];
    assert_eq!(signals(&bench.says(libvirt(sign))), resumed);
    let paused = [(Kind::Paused, Source::Libvirt)];
    assert_eq!(signals(&bench.says(libvirt(Sign::Paused))), paused, "again");
    let left = [(Kind::Left, Source::Libvirt)];
    assert_eq!(signals(&bench.says(libvirt(Sign::Left))), left);
}

#[test]
fn the_target_tells_of_the_resume_and_of_nothing_else() {
    let mut bench = Bench::new();
    bench.does(arm_target(1));
    assert!(bench.does(libvirt(Sign::Paused)).is_empty());
    assert!(bench.does(libvirt(Sign::Left)).is_empty());
    let resumed = [(Kind::Resumed, Source::Libvirt)];
    assert_eq!(signals(&bench.says(libvirt(Sign::Resumed))), resumed);
}

#[test]
fn announcements_on_the_target_tell_of_the_resume_once_each() {
    let mut bench = Bench::new();
    bench.does(arm_target(1));
    let rarp = bench.says(frame("tap1", Heard::Rarp, MAC));
    assert_eq!(
        signals(&rarp),
        [(Kind::Resumed, Source::Rarp)],
        "QEMU's: no frame of the guest's"
    );
    assert!(bench.does(frame("tap1", Heard::Rarp, MAC)).is_empty());
    let garp = bench.says(frame("tap1", Heard::Garp, MAC));
    let first = [
        (Kind::Resumed, Source::Garp),
        (Kind::FirstFrame, Source::Frame),
    ];
    assert_eq!(signals(&garp), first);
    let advertised = bench.says(frame("tap1", Heard::NeighbourAdvertisement, MAC));
    let advertised = signals(&advertised);
    assert_eq!(
        advertised,
        [(Kind::Resumed, Source::NeighbourAdvertisement)]
    );
    assert!(bench.does(frame("tap1", Heard::Frame, MAC)).is_empty());
}

#[test]
fn the_first_plain_frame_on_the_target_is_told_and_opens_nothing() {
    let mut bench = Bench::new();
    bench.does(arm_target(1));
    let first = bench.does(frame("tap1", Heard::Frame, MAC));
    assert_eq!(signals(&said(&first)), [(Kind::FirstFrame, Source::Frame)]);
    assert!(opened_frames(&first).is_empty());
}

#[rstest]
#[case::on_the_source(Some(arm_source(1)), MAC, Forged::OnSource)]
#[case::anothers_on_the_source(Some(arm_source(1)), OTHER_MAC, Forged::AnothersAddress)]
#[case::anothers_on_the_target(Some(arm_target(1)), OTHER_MAC, Forged::AnothersAddress)]
#[case::while_nothing_moves(None, MAC, Forged::NothingMoves)]
fn forged_announcements_open_nothing_and_are_counted(
    #[case] armed: Option<Input>,
    #[case] mac: Mac,
    #[case] forged: Forged,
    #[values(Heard::Rarp, Heard::Garp, Heard::NeighbourAdvertisement)] heard: Heard,
) {
    let mut bench = Bench::new();
    if let Some(armed) = armed {
        bench.does(armed);
    }
    let out = bench.does(frame("tap1", heard, mac));
    let [
        Output::Count(counted),
        Output::Say(from_agent::Message::Forgery(told)),
    ] = out.as_slice()
    else {
        panic!("{out:?}");
    };
    assert_eq!(*counted, Counted::Forgery(forged));
    assert_eq!((told.port.as_str(), &told.mac), ("p1", &mac.to_string()));
    assert_eq!(told.reason, forged.reason());
    // A guest can do that all day: every one counts, few are told.
    let again = bench.does(frame("tap1", heard, mac));
    assert_eq!(again, [Output::Count(Counted::Forgery(forged))]);
    bench.now += SECOND;
    assert_eq!(bench.says(frame("tap1", heard, mac)).len(), 1);
    assert!(
        bench
            .does(frame("tap1", Heard::Frame, OTHER_MAC))
            .is_empty()
    );
}

#[test]
fn the_last_frame_is_told_of_the_handover_that_asked() {
    let mut bench = Bench::new();
    bench.does(arm_source(2));
    bench.does(libvirt(Sign::Paused));
    let last = |epoch| Input::LastFrame {
        vm: Vm {
            namespace: "demo".into(),
            name: "web".into(),
        },
        epoch,
        port: "p1".into(),
        at: Nanos(9),
        seen: Nanos(12),
    };
    assert!(bench.does(last(1)).is_empty());
    let told = bench.says(last(2));
    let [from_agent::Message::Signal(signal)] = told.as_slice() else {
        panic!("{told:?}");
    };
    assert_eq!((signal.kind(), signal.at_ns), (Kind::LastFrame, 9));
    assert_eq!(signal.port, "p1");
}

#[test]
fn what_is_seen_without_a_controller_is_told_to_the_next() {
    let mut bench = Bench::new();
    bench.does(arm_source(1));
    bench.does(Input::Unlinked);
    let unheard = bench.does(libvirt(Sign::Paused));
    assert!(said(&unheard).is_empty());
    let counted = Counted::Signal(Kind::Paused, Source::Libvirt);
    assert!(
        unheard.contains(&Output::Count(counted)),
        "it is counted when it is seen"
    );
    assert!(said(&bench.does(libvirt(Sign::Left))).is_empty());
    assert!(
        bench.says(Input::Linked).is_empty(),
        "the controller has not asked"
    );
    let told = bench.does(arm_source(1));
    let seen = [
        (Kind::Paused, Source::Libvirt),
        (Kind::Left, Source::Libvirt),
    ];
    assert_eq!(signals(&said(&told)), seen);
    assert!(!told.contains(&Output::Count(counted)), "{told:?}");
    assert!(
        signals(&bench.says(arm_source(1))).is_empty(),
        "once on a stream"
    );
}

#[test]
fn a_new_controller_learns_that_the_ports_are_open() {
    let mut bench = Bench::new();
    bench.does(arm_target(1));
    let opened = opened_frames(&bench.does(command(open(1, 4))));
    bench.does(Input::Unlinked);
    let (ticket, _) = opened.first().unwrap().clone();
    let result = Ok(written());
    assert!(bench.says(Input::Opened { ticket, result }).is_empty());
    bench.does(Input::Linked);
    let told = outcomes(&bench.says(arm_target(1)));
    assert_eq!(
        (told[0].command, told[0].result()),
        (4, outcome::Result::Done)
    );
}

#[test]
fn what_no_controller_speaks_of_is_let_go_after_a_while() {
    let mut bench = Bench::new();
    bench.does(arm_target(1));
    bench.passes(10 * EXPIRY);
    assert!(bench.core.is_busy(), "the controller is there");
    bench.does(Input::Unlinked);
    bench.passes(EXPIRY / 2);
    assert!(bench.core.is_busy());
    // Another controller is there, and does not speak of it.
    bench.does(Input::Linked);
    let out = bench.passes(EXPIRY / 2);
    assert!(out.contains(&Output::Count(Counted::Expired)), "{out:?}");
    assert!(!bench.core.is_busy());
}

#[test]
fn ports_are_reported_when_they_change() {
    let mut bench = Bench::new();
    bench.does(arm_target(1));
    let same = interfaces(&[("p1", "tap1", Some(7))]);
    assert!(bench.does(same).is_empty());
    let gone = bench.does(interfaces(&[]));
    let interface = "tap1".to_owned();
    assert!(gone.contains(&Output::Deafen { interface }), "{gone:?}");
    let reports = said(&gone);
    let [from_agent::Message::Port(report)] = reports.as_slice() else {
        panic!("{reports:?}");
    };
    assert!(!report.present && !report.ovn_installed);
}

#[test]
fn an_interface_that_cannot_be_heard_is_tried_again() {
    let mut bench = Bench::new();
    let armed = bench.does(arm_target(1));
    let listens = |out: &[Output]| {
        let listen = |output: &&Output| matches!(output, Output::Listen { .. });
        out.iter().filter(listen).count()
    };
    assert_eq!(listens(&armed), 1);
    let interface = "tap1".to_owned();
    assert!(bench.does(Input::Deaf { interface }).is_empty());
    assert_eq!(listens(&bench.passes(SECOND)), 1);
    assert_eq!(listens(&bench.passes(SECOND)), 0);
}

#[test]
fn a_later_handover_waits_for_a_first_frame_of_its_own() {
    let mut bench = Bench::new();
    bench.does(arm_target(1));
    bench.does(frame("tap1", Heard::Frame, MAC));
    let out = bench.does(arm_target(2));
    let listen = Output::Listen {
        interface: "tap1".into(),
        mac: MAC,
        first_frame: true,
    };
    assert!(out.contains(&listen), "{out:?}");
    let interface = "tap1".to_owned();
    assert!(!out.contains(&Output::Deafen { interface }), "{out:?}");
    let first = bench.says(frame("tap1", Heard::Frame, MAC));
    assert_eq!(signals(&first), [(Kind::FirstFrame, Source::Frame)]);
}
