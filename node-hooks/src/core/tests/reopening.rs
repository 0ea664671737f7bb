//! Ports that OVN blocks although they are to be open.

use node_hooks_api::agent::reopened::Reason;
use node_hooks_api::agent::{PortReport, Reopened};
use rstest::rstest;

use super::*;

const MILLISECOND: Duration = Duration::from_millis(1);

fn blocked(ports: impl IntoIterator<Item = u16>) -> Input {
    Input::Blocked {
        ports: ports.into_iter().collect(),
        at: Nanos(55),
    }
}

/// What is opened without a command, and why.
fn reopened(out: &[Output]) -> Option<(Ticket, Arc<PacketOuts>, Again)> {
    out.iter().find_map(|output| match output {
        Output::Open {
            ticket,
            frames,
            again: Some(again),
            ..
        } => Some((ticket.clone(), frames.clone(), *again)),
        _ => None,
    })
}

/// The ports of which it was said last that they are to be open.
fn expected_open(out: &[Output]) -> Option<BTreeSet<u16>> {
    let mut expected = out.iter().filter_map(|output| match output {
        Output::ExpectOpen(ports) => Some(ports.clone()),
        _ => None,
    });
    expected.next_back()
}

fn reports(out: &[Output]) -> Vec<PortReport> {
    let said = said(out).into_iter();
    let reports = said.filter_map(|message| match message {
        from_agent::Message::Port(report) => Some(report),
        _ => None,
    });
    reports.collect()
}

fn done(ticket: Ticket) -> Input {
    let result = Ok(written());
    Input::Opened { ticket, result }
}

/// A target whose port was opened on command, and what came of that.
fn opened() -> (Bench, Vec<Output>) {
    let mut bench = Bench::new();
    bench.does(arm_target(1));
    let mut out = bench.does(command(open(1, 1)));
    let (ticket, _) = opened_frames(&out)[0].clone();
    assert!(reopened(&bench.does(blocked([7]))).is_none(), "under way");
    out.extend(bench.does(done(ticket)));
    (bench, out)
}

/// The end of a pod's cable in place of the tap.
fn cable() -> Input {
    let Input::Interfaces(taps) = interfaces(&[("p1", "tap1", Some(7))]) else {
        unreachable!();
    };
    let mut cables = (*taps).clone();
    for interface in cables.values_mut() {
        interface.is_tap = false;
    }
    Input::Interfaces(Arc::new(cables))
}

#[test]
fn an_opening_that_is_undone_is_done_again_and_told() {
    let (mut bench, out) = opened();
    assert_eq!(expected_open(&out), Some([7].into()));
    let out = bench.does(blocked([7, 9]));
    let (ticket, frames, again) = reopened(&out).unwrap();
    assert_eq!(again, Again::Undone);
    assert_eq!(*frames, PacketOuts::opening([(7, MAC)]).unwrap());
    assert!(
        reopened(&bench.does(blocked([7]))).is_none(),
        "once at a time"
    );
    let out = bench.does(done(ticket));
    assert!(out.contains(&Output::Count(Counted::Reopened(Again::Undone))));
    assert!(outcomes(&said(&out)).is_empty(), "nobody asked: {out:?}");
    let told = Reopened {
        times: 1,
        at_ns: 70,
        reason: Reason::Undone.into(),
    };
    assert_eq!(reports(&out)[0].reopened, Some(told));
    // A controller that comes later learns of it, and of the first opening as it was.
    bench.does(Input::Unlinked);
    bench.does(Input::Linked);
    let out = bench.does(arm_target(1));
    assert_eq!(reports(&out)[0].reopened, Some(told));
    let hops = outcomes(&said(&out))[0].hops.unwrap();
    assert_eq!((hops.received_at_ns, hops.processed_at_ns), (50, 70));
}

#[test]
fn what_is_blocked_again_and_again_is_opened_at_growing_intervals() {
    let (mut bench, _) = opened();
    let start = bench.now;
    let mut times = Vec::new();
    while bench.now < start + 5 * SECOND {
        if let Some((ticket, ..)) = reopened(&bench.does(blocked([7]))) {
            times.push(bench.now - start);
            bench.does(done(ticket));
        }
        bench.now += 50 * MILLISECOND;
    }
    let first = [0, 100, 300, 700, 1500, 2300].map(Duration::from_millis);
    assert_eq!(times[..6], first);
}

#[test]
fn one_that_fails_is_tried_again_and_not_told() {
    let (mut bench, _) = opened();
    let (ticket, ..) = reopened(&bench.does(blocked([7]))).unwrap();
    let result = Err("no connection".to_owned());
    assert!(bench.does(Input::Opened { ticket, result }).is_empty());
    bench.now += 100 * MILLISECOND;
    let (ticket, ..) = reopened(&bench.does(blocked([7]))).unwrap();
    let out = bench.does(done(ticket));
    assert_eq!(
        reports(&out)[0].reopened.map(|reopened| reopened.times),
        Some(1)
    );
}

#[rstest]
fn a_guest_that_sends_from_a_blocked_port_is_let_out(
    #[values(Heard::Rarp, Heard::Garp, Heard::NeighbourAdvertisement, Heard::Frame)] heard: Heard,
) {
    let mut bench = Bench::new();
    bench.does(arm_target(1));
    assert!(
        bench.does(blocked([7])).is_empty(),
        "nothing says that it runs here"
    );
    let out = bench.does(frame("tap1", heard, MAC));
    assert_eq!(expected_open(&out), Some([7].into()));
    let (ticket, frames, again) = reopened(&bench.does(blocked([7]))).unwrap();
    assert_eq!(again, Again::GuestRuns);
    assert_eq!(*frames, PacketOuts::opening([(7, MAC)]).unwrap());
    let told = reports(&bench.does(done(ticket)))[0].reopened.unwrap();
    assert_eq!(told.reason(), Reason::GuestRuns);
    // The controller's word comes later, and is carried out like any.
    let (ticket, _) = opened_frames(&bench.does(command(open(1, 5))))[0].clone();
    let outcomes = outcomes(&bench.says(done(ticket)));
    assert_eq!(
        (outcomes[0].command, outcomes[0].result()),
        (5, outcome::Result::Done)
    );
}

#[test]
fn on_the_source_nothing_is_opened_whatever_is_forged() {
    let mut bench = Bench::new();
    bench.does(arm_source(1));
    let forged = [
        frame("tap1", Heard::Rarp, MAC),
        libvirt(Sign::Paused),
        frame("tap1", Heard::Rarp, MAC),
        frame("tap1", Heard::Garp, MAC),
        libvirt(Sign::Resumed),
        frame("tap1", Heard::Frame, MAC),
        command(open(1, 1)),
        blocked([7]),
    ];
    for input in forged {
        let out = bench.does(input);
        assert!(
            opened_frames(&out).is_empty() && expected_open(&out).is_none(),
            "{out:?}"
        );
    }
}

#[test]
fn a_hypervisors_word_alone_and_anothers_frames_open_nothing() {
    let mut bench = Bench::new();
    bench.does(arm_target(1));
    let others = [
        libvirt(Sign::Resumed),
        frame("tap1", Heard::Rarp, OTHER_MAC),
        frame("tap1", Heard::Garp, OTHER_MAC),
        frame("tap2", Heard::Rarp, MAC),
    ];
    for input in others {
        let out = bench.does(input);
        assert!(expected_open(&out).is_none(), "{out:?}");
        assert!(bench.does(blocked([7])).is_empty());
    }
}

#[rstest]
fn what_a_pod_sends_before_its_guest_runs_is_not_the_guests(
    #[values(Heard::Garp, Heard::NeighbourAdvertisement, Heard::Frame)] heard: Heard,
) {
    let mut bench = Bench::new();
    bench.does(cable());
    bench.does(arm_target(1));
    let out = bench.does(frame("tap1", heard, MAC));
    assert!(
        signals(&said(&out)).is_empty() && expected_open(&out).is_none(),
        "{out:?}"
    );
    let forged = Output::Count(Counted::Forgery(Forged::BeforeTheGuest));
    assert_eq!(out.contains(&forged), heard != Heard::Frame);
}

#[rstest]
#[case::qemus_announcement(frame("tap1", Heard::Rarp, MAC), 1)]
#[case::the_hypervisors_word(libvirt(Sign::Resumed), 1)]
#[case::the_pause(command(open(1, 1)), 0)]
fn what_comes_from_a_pod_whose_guest_is_to_run_is_the_guests(
    #[case] expects: Input,
    #[case] resumes: usize,
) {
    let mut bench = Bench::new();
    bench.does(cable());
    bench.does(arm_target(1));
    bench.does(frame("tap1", Heard::Frame, MAC));
    let out = bench.does(expects);
    assert_eq!(signals(&said(&out)).len(), resumes);
    let listen = Output::Listen {
        interface: "tap1".into(),
        mac: MAC,
        first_frame: true,
    };
    assert!(
        out.contains(&listen),
        "the pod's frame was not the first: {out:?}"
    );
    let out = bench.does(frame("tap1", Heard::Garp, MAC));
    let told = [
        (Kind::Resumed, Source::Garp),
        (Kind::FirstFrame, Source::Frame),
    ];
    assert_eq!(signals(&said(&out)), told);
    bench.now += SECOND;
    let opened = opened_frames(&bench.does(blocked([7])));
    // An opening on command that is under way is enough.
    assert_eq!(opened.len(), resumes);
}

#[test]
fn the_controllers_word_that_the_guest_is_here_is_enough() {
    let mut bench = Bench::new();
    let mut here = arm(1, agent::Side::Target);
    here.guest_here = Some(true);
    let out = bench.does(command(to_agent::Message::Arm(here)));
    assert_eq!(expected_open(&out), Some([7].into()));
    assert!(reopened(&bench.does(blocked([7]))).is_some());
    // Of the source it says nothing of a port.
    let mut bench = Bench::new();
    let mut here = arm(1, agent::Side::Source);
    here.guest_here = Some(true);
    let out = bench.does(command(to_agent::Message::Arm(here)));
    assert_eq!(expected_open(&out), None);
    assert!(reopened(&bench.does(blocked([7]))).is_none());
}

#[test]
fn it_ends_with_the_handover() {
    let (mut bench, _) = opened();
    bench.does(frame("tap1", Heard::Rarp, MAC));
    let (ticket, ..) = reopened(&bench.does(blocked([7]))).unwrap();
    let out = bench.does(command(disarm(1, true)));
    assert_eq!(expected_open(&out), Some(BTreeSet::new()));
    assert!(bench.does(done(ticket)).is_empty());
    assert!(bench.does(blocked([7])).is_empty());
    // The next one has to be proved anew.
    bench.does(arm_target(2));
    assert!(bench.does(blocked([7])).is_empty());
}

#[test]
fn a_pause_after_which_nobody_came_keeps_a_port_open_for_seconds_only() {
    let (mut bench, _) = opened();
    let out = bench.passes(14 * SECOND);
    assert_eq!(expected_open(&out), None);
    assert!(reopened(&bench.does(blocked([7]))).is_some());
    let (mut bench, _) = opened();
    let out = bench.passes(15 * SECOND);
    assert_eq!(expected_open(&out), Some(BTreeSet::new()));
    assert!(reopened(&bench.does(blocked([7]))).is_none());
    // A guest that came keeps it open.
    let (mut bench, _) = opened();
    bench.does(frame("tap1", Heard::Frame, MAC));
    assert_eq!(expected_open(&bench.passes(60 * SECOND)), None);
    assert!(reopened(&bench.does(blocked([7]))).is_some());
}

#[test]
fn a_port_that_is_made_anew_is_not_the_one_that_was_opened() {
    let (mut bench, _) = opened();
    let out = bench.does(interfaces(&[("p1", "tap9", Some(12))]));
    assert_eq!(expected_open(&out), Some(BTreeSet::new()));
    assert!(bench.does(blocked([7, 12])).is_empty());
}

#[test]
fn only_what_is_blocked_is_opened_and_a_port_that_is_missing_holds_none() {
    let mut bench = Bench::new();
    bench.does(interfaces(&[
        ("p1", "tap1", Some(7)),
        ("p2", "tap2", Some(8)),
    ]));
    let mut three = arm(1, agent::Side::Target);
    three.ports.extend([port("p2"), port("p3")]);
    bench.does(command(to_agent::Message::Arm(three)));
    let out = bench.does(frame("tap2", Heard::Rarp, MAC));
    assert_eq!(expected_open(&out), Some([7, 8].into()), "they move as one");
    let (ticket, frames, _) = reopened(&bench.does(blocked([8]))).unwrap();
    assert_eq!(*frames, PacketOuts::opening([(8, MAC)]).unwrap());
    let told = reports(&bench.does(done(ticket)));
    let told: Vec<_> = told.iter().map(|report| report.port.as_str()).collect();
    assert_eq!(told, ["p2"]);
}
