//! Arm, disarm, open, announce; and the gate.

use node_hooks_api::agent::GateAnswer;
use node_hooks_api::agent::outcome::Result as Came;
use rstest::rstest;

use super::*;
use crate::announce::through_switch;

#[test]
fn arming_listens_warms_up_and_reports() {
    let mut bench = Bench::new();
    let out = bench.does(arm_target(1));
    let listen = Output::Listen {
        interface: "tap1".into(),
        mac: MAC,
        first_frame: true,
    };
    assert!(out.contains(&listen), "{out:?}");
    assert!(out.contains(&Output::KeepSwitch(true)), "{out:?}");
    let reports = said(&out);
    let [from_agent::Message::Port(report)] = reports.as_slice() else {
        panic!("{reports:?}");
    };
    assert!(report.present && report.ovn_installed && report.port == "p1");
    assert!(bench.core.is_busy());
    // The same again reports again, since a controller asks; it listens no second time.
    let again = bench.does(arm_target(1));
    assert!(
        !again.contains(&listen) && said(&again) == reports,
        "{again:?}"
    );
}

#[test]
fn the_source_needs_no_switch() {
    let mut bench = Bench::new();
    let out = bench.does(arm_source(1));
    assert!(!out.contains(&Output::KeepSwitch(true)), "{out:?}");
}

/// The ports of which it has been said last that they are to be opened.
fn expected(out: &[Output]) -> Option<BTreeSet<u16>> {
    let mut expected = out.iter().filter_map(|output| match output {
        Output::ExpectToOpen(ports) => Some(ports.clone()),
        _ => None,
    });
    expected.next_back()
}

#[test]
fn the_targets_ports_are_expected_to_be_opened_until_it_is_disarmed() {
    let mut bench = Bench::new();
    let out = bench.does(arm_target(1));
    let place = |wanted: &Output| out.iter().position(|output| output == wanted);
    let keeps = place(&Output::KeepSwitch(true)).unwrap();
    let expects = place(&Output::ExpectToOpen([7].into())).unwrap();
    assert!(keeps < expects, "there is nobody to be told: {out:?}");
    assert_eq!(expected(&bench.does(arm_target(1))), None, "once");
    let opened = opened_frames(&bench.does(command(open(1, 1))));
    let (ticket, _) = opened.first().unwrap().clone();
    let result = Ok(written());
    let out = bench.does(Input::Opened { ticket, result });
    assert_eq!(expected(&out), None, "{out:?}");
    let out = bench.does(command(disarm(1, true)));
    assert_eq!(expected(&out), Some(BTreeSet::new()), "{out:?}");
    // Anew with the next.
    let out = bench.does(arm_target(2));
    assert_eq!(expected(&out), Some([7].into()), "{out:?}");
}

#[test]
fn the_sources_ports_are_not_expected_to_be_opened() {
    let mut bench = Bench::new();
    assert_eq!(expected(&bench.does(arm_source(1))), None);
    // Nor those of a target that has become a source.
    bench.does(arm_target(2));
    let out = bench.does(arm_source(3));
    assert_eq!(expected(&out), Some(BTreeSet::new()), "{out:?}");
}

#[test]
fn ports_are_expected_by_the_numbers_that_they_have() {
    let mut bench = Bench::new();
    bench.does(interfaces(&[("p1", "tap1", None)]));
    assert_eq!(expected(&bench.does(arm_target(1))), None, "it has none");
    // What no port is numbered with, and what the switch has for others.
    let out = bench.does(interfaces(&[
        ("p1", "tap1", Some(0x1_0007)),
        ("p2", "tap2", Some(8)),
    ]));
    assert_eq!(expected(&out), None, "{out:?}");
    let out = bench.does(interfaces(&[("p1", "tap1", Some(7))]));
    assert_eq!(expected(&out), Some([7].into()), "{out:?}");
    let out = bench.does(interfaces(&[("p1", "tap9", Some(12))]));
    assert_eq!(expected(&out), Some([12].into()), "{out:?}");
    let out = bench.does(interfaces(&[]));
    assert_eq!(expected(&out), Some(BTreeSet::new()), "{out:?}");
}

#[test]
fn the_ports_of_all_targets_are_expected_and_those_of_one_forgotten_alone() {
    let mut bench = Bench::new();
    bench.does(interfaces(&[
        ("p1", "tap1", Some(7)),
        ("p2", "tap2", Some(8)),
        ("p3", "tap3", Some(9)),
    ]));
    bench.does(arm_target(1));
    let mut other = arm(1, agent::Side::Target);
    other.id = Some(HandoverId {
        vm: "db".into(),
        ..id(1)
    });
    other.ports = vec![port("p2"), port("p3")];
    let out = bench.does(command(to_agent::Message::Arm(other)));
    assert_eq!(expected(&out), Some([7, 8, 9].into()), "{out:?}");
    let out = bench.does(command(disarm(1, true)));
    assert_eq!(expected(&out), Some([8, 9].into()), "{out:?}");
    // And what nobody has spoken of for long.
    bench.does(Input::Unlinked);
    let out = bench.passes(EXPIRY);
    assert_eq!(expected(&out), Some(BTreeSet::new()), "{out:?}");
}

#[test]
fn an_older_epoch_and_another_migration_of_the_same_are_refused() {
    let mut bench = Bench::new();
    bench.does(arm_target(2));
    let mut same_epoch = arm(2, agent::Side::Target);
    same_epoch.id = Some(HandoverId {
        migration_uid: "m-x".into(),
        ..id(2)
    });
    let stale = [
        to_agent::Message::Arm(arm(1, agent::Side::Target)),
        to_agent::Message::Arm(same_epoch),
        disarm(1, false),
        open(1, 5),
        announce(1, 6),
    ];
    for message in stale {
        assert_eq!(
            bench.result(message.clone()),
            Some(Came::Stale),
            "{message:?}"
        );
    }
    assert!(bench.core.is_busy());
    assert!(
        bench.result(open(3, 7)) == Some(Came::Unknown),
        "never armed"
    );
}

#[test]
fn a_disarmed_handover_stays_over() {
    let mut bench = Bench::new();
    bench.does(arm_target(2));
    let out = bench.does(command(disarm(2, true)));
    let interface = "tap1".to_owned();
    assert!(out.contains(&Output::Deafen { interface }), "{out:?}");
    assert!(out.contains(&Output::KeepSwitch(false)), "{out:?}");
    assert!(!bench.core.is_busy());
    assert_eq!(bench.result(open(2, 5)), Some(Came::Unknown));
    let older = to_agent::Message::Arm(arm(1, agent::Side::Target));
    assert_eq!(bench.result(older), Some(Came::Stale));
    // The number is forgotten after a while, too: what is kept is bounded.
    bench.passes(EXPIRY);
    assert!(bench.core.vms.is_empty());
}

#[test]
fn an_open_that_lay_about_while_this_process_was_frozen_opens_nothing() {
    let mut bench = Bench::new();
    bench.does(arm_target(1));
    let (pause, second) = (1_788_000_000_000_000_000, 1_000_000_000);
    let open = |received| Input::Command {
        message: to_agent::Message::Open(Open {
            id: Some(id(1)),
            command: 5,
            paused_at_ns: pause,
            heard_at_ns: pause,
        }),
        received: Nanos(received),
    };
    let late = bench.does(open(pause + 16 * second));
    assert!(opened_frames(&late).is_empty(), "{late:?}");
    let outcome = outcomes(&said(&late));
    assert_eq!(outcome[0].result(), Came::Stale);
    assert!(outcome[0].reason.contains("16s ago"), "{outcome:?}");
    // Within what the clocks of two nodes may differ.
    for received in [pause + 14 * second, pause - 5 * second] {
        let mut bench = Bench::new();
        bench.does(arm_target(1));
        assert_eq!(opened_frames(&bench.does(open(received))).len(), 1);
    }
}

#[test]
fn a_newer_handover_takes_the_place_of_an_older() {
    let mut bench = Bench::new();
    bench.does(arm_target(1));
    let out = bench.does(arm_source(2));
    assert!(out.contains(&Output::KeepSwitch(false)), "{out:?}");
    assert_eq!(bench.result(open(1, 5)), Some(Came::Stale));
    assert_eq!(
        bench.result(open(2, 6)),
        Some(Came::Unknown),
        "it is the source"
    );
    // A newer one's Disarm ends the older, too.
    bench.does(command(disarm(3, true)));
    assert!(!bench.core.is_busy());
}

#[test]
fn opening_writes_what_was_prepared_and_tells_when() {
    let mut bench = Bench::new();
    bench.does(arm_target(1));
    let out = bench.does(command(open(1, 9)));
    let opened = opened_frames(&out);
    let [(ticket, frames)] = opened.as_slice() else {
        panic!("{out:?}");
    };
    assert_eq!(**frames, PacketOuts::opening([(7, MAC)]).unwrap());
    let ticket = ticket.clone();
    let result = Ok(written());
    let said = bench.says(Input::Opened { ticket, result });
    let outcomes = outcomes(&said);
    let [outcome] = outcomes.as_slice() else {
        panic!("{outcomes:?}");
    };
    assert_eq!((outcome.result(), outcome.command), (Came::Done, 9));
    let hops = outcome.hops.unwrap();
    let stamps = (hops.received_at_ns, hops.sent_at_ns, hops.processed_at_ns);
    assert_eq!(stamps, (50, 60, 70));
}

#[test]
fn several_commands_to_open_are_one() {
    let mut bench = Bench::new();
    bench.does(arm_target(1));
    let opened = opened_frames(&bench.does(command(open(1, 1))));
    assert!(opened_frames(&bench.does(command(open(1, 2)))).is_empty());
    let (ticket, _) = opened.first().unwrap().clone();
    let result = Ok(written());
    let both = outcomes(&bench.says(Input::Opened { ticket, result }));
    let commands: Vec<u64> = both.iter().map(|outcome| outcome.command).collect();
    assert_eq!(commands, [1, 2]);
    let out = bench.does(command(open(1, 3)));
    assert!(opened_frames(&out).is_empty(), "{out:?}");
    let later = outcomes(&said(&out));
    assert_eq!((later[0].command, later[0].hops), (3, both[0].hops));
}

#[test]
fn an_opening_that_failed_is_tried_again() {
    let mut bench = Bench::new();
    bench.does(arm_target(1));
    let opened = opened_frames(&bench.does(command(open(1, 1))));
    let (ticket, _) = opened.first().unwrap().clone();
    let result = Err("no connection".to_owned());
    let failed = outcomes(&bench.says(Input::Opened { ticket, result }));
    assert_eq!(failed[0].result(), Came::Failed);
    assert!(failed[0].reason.contains("no connection"));
    assert_eq!(opened_frames(&bench.does(command(open(1, 2)))).len(), 1);
}

#[test]
fn without_an_interface_nothing_is_opened_and_the_port_is_named() {
    let mut bench = Bench::new();
    bench.does(interfaces(&[("p1", "tap1", None)]));
    bench.does(arm_target(1));
    let out = bench.does(command(open(1, 1)));
    assert!(opened_frames(&out).is_empty(), "{out:?}");
    let outcome = &outcomes(&said(&out))[0];
    assert_eq!(outcome.result(), Came::Failed);
    assert!(outcome.reason.contains("p1"), "{}", outcome.reason);
    bench.does(interfaces(&[("p1", "tap1", Some(8))]));
    assert_eq!(opened_frames(&bench.does(command(open(1, 2)))).len(), 1);
}

#[test]
fn all_ports_are_opened_as_one() {
    let mut bench = Bench::new();
    let mut two = arm(1, agent::Side::Target);
    two.ports.push(port("p2"));
    let two = command(to_agent::Message::Arm(two));
    bench.does(two.clone());
    assert_eq!(
        bench.result(open(1, 1)),
        Some(Came::Failed),
        "one is missing"
    );
    bench.does(interfaces(&[
        ("p1", "tap1", Some(7)),
        ("p2", "tap2", Some(8)),
    ]));
    let opened = opened_frames(&bench.does(command(open(1, 2))));
    let both = PacketOuts::opening([(7, MAC), (8, MAC)]).unwrap();
    assert_eq!(*opened[0].1, both);
}

#[test]
fn an_interface_that_comes_anew_has_still_to_be_opened() {
    let mut bench = Bench::new();
    bench.does(arm_target(1));
    let opened = opened_frames(&bench.does(command(open(1, 1))));
    let (ticket, _) = opened.first().unwrap().clone();
    let result = Ok(written());
    bench.does(Input::Opened { ticket, result });
    // The target's pod was made again.
    bench.does(interfaces(&[("p1", "tap9", Some(12))]));
    let again = opened_frames(&bench.does(command(open(1, 2))));
    assert_eq!(*again[0].1, PacketOuts::opening([(12, MAC)]).unwrap());
}

#[test]
fn an_interface_that_comes_anew_during_an_opening_has_still_to_be_opened() {
    let other = [("p1", "tap9", Some(12))];
    let gone = [];
    let back = [("p1", "tap1", Some(7))];
    for changes in [&[&other[..]][..], &[&gone], &[&gone, &back]] {
        let mut bench = Bench::new();
        bench.does(arm_target(1));
        let opened = opened_frames(&bench.does(command(open(1, 1))));
        let (ticket, _) = opened.first().unwrap().clone();
        for now in changes {
            bench.does(interfaces(now));
        }
        bench.does(command(open(1, 2)));
        let result = Ok(written());
        let said = outcomes(&bench.says(Input::Opened { ticket, result }));
        let said: Vec<_> = said.iter().map(|it| (it.command, it.result())).collect();
        assert_eq!(said, [(1, Came::Failed), (2, Came::Failed)], "{changes:?}");
        bench.does(interfaces(&other));
        let again = opened_frames(&bench.does(command(open(1, 3))));
        assert_eq!(*again[0].1, PacketOuts::opening([(12, MAC)]).unwrap());
    }
}

#[test]
fn what_the_switch_has_for_others_changes_no_opening() {
    let mut bench = Bench::new();
    bench.does(arm_target(1));
    let opened = opened_frames(&bench.does(command(open(1, 1))));
    let (ticket, _) = opened.first().unwrap().clone();
    bench.does(interfaces(&[
        ("p1", "tap1", Some(7)),
        ("p2", "tap2", Some(8)),
    ]));
    let result = Ok(written());
    let said = outcomes(&bench.says(Input::Opened { ticket, result }));
    assert_eq!(said[0].result(), Came::Done);
}

#[test]
fn who_waits_for_the_opening_of_ports_that_become_others_is_answered() {
    let mut bench = Bench::new();
    bench.does(arm_target(1));
    let opened = opened_frames(&bench.does(command(open(1, 1))));
    let (ticket, _) = opened.first().unwrap().clone();
    bench.does(command(open(1, 2)));
    let mut other = arm(1, agent::Side::Target);
    other.ports[0].mac = OTHER_MAC.to_string();
    let said = outcomes(&bench.says(command(to_agent::Message::Arm(other))));
    let said: Vec<_> = said.iter().map(|it| (it.command, it.result())).collect();
    assert_eq!(said, [(1, Came::Failed), (2, Came::Failed)]);
    let again = opened_frames(&bench.does(command(open(1, 3))));
    assert_eq!(*again[0].1, PacketOuts::opening([(7, OTHER_MAC)]).unwrap());
    // Nobody waits for the first any more.
    let result = Ok(written());
    assert!(bench.does(Input::Opened { ticket, result }).is_empty());
}

#[test]
fn what_was_written_for_a_handover_that_is_over_is_nobodys() {
    let mut bench = Bench::new();
    bench.does(arm_target(1));
    let opened = opened_frames(&bench.does(command(open(1, 1))));
    let (ticket, _) = opened.first().unwrap().clone();
    bench.does(command(disarm(1, false)));
    bench.does(arm_target(2));
    let result = Ok(written());
    assert!(bench.does(Input::Opened { ticket, result }).is_empty());
    assert_eq!(opened_frames(&bench.does(command(open(2, 2)))).len(), 1);
}

#[test]
fn announcing_is_for_what_is_armed_and_here() {
    let mut bench = Bench::new();
    assert_eq!(bench.result(announce(1, 3)), Some(Came::Unknown));
    bench.does(arm_target(1));
    let out = bench.does(command(announce(1, 3)));
    let [
        Output::Announce {
            command: Some(3),
            packets,
            ..
        },
    ] = out.as_slice()
    else {
        panic!("{out:?}");
    };
    // A RARP, for switches; gratuitous ARP, request and reply, for hosts.
    let mut expected = PacketOuts::opening([(7, MAC)]).unwrap();
    let addresses = ["10.0.0.1".parse().unwrap()];
    through_switch(&mut expected, 7, MAC, &addresses).unwrap();
    assert_eq!(**packets, expected);
    let done = bench.says(Input::Announced {
        id: id(1),
        command: Some(3),
        result: Ok(()),
    });
    assert_eq!(outcomes(&done)[0].result(), Came::Done);
    bench.does(interfaces(&[]));
    assert_eq!(bench.result(announce(1, 4)), Some(Came::Failed));
}

#[rstest]
#[case::no_handover(|arm: &mut Arm| arm.id = None)]
#[case::no_vm(|arm: &mut Arm| arm.id.as_mut().unwrap().vm.clear())]
#[case::no_uid(|arm: &mut Arm| arm.id.as_mut().unwrap().migration_uid.clear())]
#[case::no_side(|arm: &mut Arm| arm.side = 77)]
#[case::no_name(|arm: &mut Arm| arm.ports[0].name.clear())]
#[case::no_mac(|arm: &mut Arm| arm.ports[0].mac = "52:54".into())]
#[case::a_groups_mac(|arm: &mut Arm| arm.ports[0].mac = "ff:ff:ff:ff:ff:ff".into())]
#[case::no_address(|arm: &mut Arm| arm.ports[0].addresses[0] = "10.0.0.1/24".into())]
#[case::the_hosts_address(|arm: &mut Arm| arm.ports[0].addresses[0] = "127.0.0.1".into())]
#[case::twice(|arm: &mut Arm| arm.ports.push(port("p1")))]
#[case::too_many(|arm: &mut Arm| {
    arm.ports = (0..1000).map(|number| port(&format!("p{number}"))).collect();
})]
#[case::a_long_domain(|arm: &mut Arm| arm.domain = "x".repeat(100_000))]
fn nonsense_is_not_armed(#[case] spoil: fn(&mut Arm)) {
    let mut bench = Bench::new();
    let mut arm = arm(1, agent::Side::Target);
    spoil(&mut arm);
    let message = to_agent::Message::Arm(arm);
    assert_eq!(bench.result(message), Some(Came::Failed));
    assert!(!bench.core.is_busy() && bench.core.vms.is_empty());
}

#[test]
fn another_vms_port_and_domain_are_not_to_be_had() {
    let mut bench = Bench::new();
    bench.does(arm_target(1));
    let mut other = arm(1, agent::Side::Target);
    other.id = Some(HandoverId {
        vm: "db".into(),
        ..id(1)
    });
    let message = to_agent::Message::Arm(other.clone());
    assert_eq!(bench.result(message), Some(Came::Failed), "its port");
    other.ports = vec![port("p2")];
    other.domain = "demo_web".into();
    let message = to_agent::Message::Arm(other.clone());
    assert_eq!(bench.result(message), Some(Came::Failed), "its domain");
    other.domain.clear();
    assert_eq!(bench.result(to_agent::Message::Arm(other)), None);
}

#[test]
fn what_is_armed_and_remembered_is_bounded() {
    let mut bench = Bench::new();
    let vm = |number: usize| HandoverId {
        vm: format!("vm{number}"),
        ..id(1)
    };
    let arm_vm = |number: usize| {
        let mut arm = arm(1, agent::Side::Target);
        arm.id = Some(vm(number));
        arm.ports = vec![port(&format!("p{number}"))];
        to_agent::Message::Arm(arm)
    };
    for number in 0..MOST_ARMED {
        assert_eq!(bench.result(arm_vm(number)), None);
    }
    assert_eq!(bench.result(arm_vm(MOST_ARMED)), Some(Came::Failed));
    for number in 0..2 * MOST_KNOWN {
        let stays = false;
        let id = Some(vm(10_000 + number));
        bench.does(command(to_agent::Message::Disarm(Disarm { id, stays })));
    }
    assert_eq!(bench.core.vms.len(), MOST_KNOWN);
    assert_eq!(bench.core.armed().count(), MOST_ARMED);
}

#[test]
fn routes_are_where_the_guest_is() {
    let wanted = |side, epoch| {
        let mut arm = arm(epoch, side);
        arm.routes = Some(HostRoutes { wanted: true });
        command(to_agent::Message::Arm(arm))
    };
    let addresses = || vec!["10.0.0.1".parse().unwrap()];
    let put = Output::PutRoutes {
        addresses: addresses(),
        interface: "tap1".into(),
    };
    let remove = Output::RemoveRoutes {
        addresses: addresses(),
    };
    // The target: from the resume on.
    let mut target = Bench::new();
    assert!(!target.does(wanted(agent::Side::Target, 1)).contains(&put));
    assert!(target.does(libvirt(Sign::Resumed)).contains(&put));
    let kept = target.does(command(disarm(1, true)));
    assert!(!kept.contains(&put) && !kept.contains(&remove), "{kept:?}");
    // The source: until it has left.
    let mut source = Bench::new();
    assert!(source.does(wanted(agent::Side::Source, 1)).contains(&put));
    source.does(libvirt(Sign::Paused));
    assert!(source.does(libvirt(Sign::Left)).contains(&remove));
    // A target that got nobody takes away what an agent before it may have made.
    let mut failed = Bench::new();
    failed.does(wanted(agent::Side::Target, 1));
    assert!(failed.does(command(disarm(1, false))).contains(&remove));
    // A target that heard no hypervisor learns at the end that the guest stays.
    let mut deaf = Bench::new();
    deaf.does(wanted(agent::Side::Target, 1));
    assert!(deaf.does(command(disarm(1, true))).contains(&put));
}

#[test]
fn the_gate_asks_once_and_again_after_a_reconnection() {
    let mut bench = Bench::new();
    let about = Instance {
        namespace: "demo".into(),
        name: "web".into(),
        uid: "u".into(),
        migration_uid: "m".into(),
    };
    let asked = |call| Input::Asked {
        call: Call(call),
        about: about.clone(),
    };
    let question = bench.says(asked(1));
    assert_eq!(question.len(), 1);
    assert!(bench.says(asked(2)).is_empty(), "it is asked already");
    bench.does(Input::Unlinked);
    assert_eq!(bench.says(Input::Linked), question);
    let answer = |verdict: Verdict| {
        command(to_agent::Message::GateAnswer(GateAnswer {
            question: 1,
            verdict: verdict.into(),
            reason: "ready".into(),
        }))
    };
    assert!(bench.does(answer(Verdict::Unspecified)).is_empty());
    let answered = Output::Answer {
        calls: BTreeSet::from([Call(1), Call(2)]),
        verdict: Verdict::Go,
        reason: "ready".into(),
    };
    assert_eq!(bench.does(answer(Verdict::Go)), [answered]);
    assert!(bench.does(answer(Verdict::Go)).is_empty(), "once");
    assert!(bench.does(Input::Withdrawn { call: Call(1) }).is_empty());
}

#[test]
fn a_question_that_nobody_waits_for_is_withdrawn() {
    let mut bench = Bench::new();
    let about = Instance::default();
    bench.does(Input::Asked {
        call: Call(1),
        about,
    });
    let withdrawn = bench.says(Input::Withdrawn { call: Call(1) });
    assert!(matches!(
        withdrawn.as_slice(),
        [from_agent::Message::GateWithdrawn(_)]
    ));
    bench.does(Input::Unlinked);
    assert!(bench.says(Input::Linked).is_empty());
}
