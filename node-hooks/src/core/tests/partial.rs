//! Ports that the agent can do nothing for.

use super::*;

/// Two ports with interfaces, of the first of which the MAC is not known.
fn without_a_mac() -> (Bench, Arm) {
    let mut bench = Bench::new();
    bench.does(interfaces(&[
        ("p1", "tap1", Some(7)),
        ("p2", "tap2", Some(8)),
    ]));
    let mut arm = arm(1, agent::Side::Target);
    arm.ports.push(port("p2"));
    arm.ports[0].mac.clear();
    (bench, arm)
}

#[test]
fn a_port_without_a_mac_is_named_and_holds_no_other() {
    let (mut bench, arm) = without_a_mac();
    let armed = bench.does(command(to_agent::Message::Arm(arm)));
    let reports = said(&armed);
    let outcome = &outcomes(&reports)[0];
    assert_eq!(
        (outcome.command, outcome.result()),
        (0, outcome::Result::Done)
    );
    assert!(outcome.reason.contains("MAC of p1 "), "{}", outcome.reason);
    let is_report =
        |message: &&from_agent::Message| matches!(message, from_agent::Message::Port(_));
    assert_eq!(reports.iter().filter(is_report).count(), 2);
    let opened = opened_frames(&bench.does(command(open(1, 3))));
    assert_eq!(*opened[0].1, PacketOuts::opening([(8, MAC)]).unwrap());
    let ticket = opened[0].0.clone();
    let result = Ok(written());
    let outcomes = outcomes(&bench.says(Input::Opened { ticket, result }));
    assert_eq!(outcomes[0].result(), outcome::Result::Done);
    let reason = &outcomes[0].reason;
    assert!(reason.contains("p1") && !reason.contains("p2"), "{reason}");
}

#[test]
fn a_mac_that_becomes_known_is_used() {
    let (mut bench, mut arm) = without_a_mac();
    bench.does(command(to_agent::Message::Arm(arm.clone())));
    arm.ports[0].mac = OTHER_MAC.to_string();
    let out = bench.does(command(to_agent::Message::Arm(arm)));
    assert!(outcomes(&said(&out)).is_empty(), "{out:?}");
    let listen = Output::Listen {
        interface: "tap1".into(),
        mac: OTHER_MAC,
        first_frame: true,
    };
    assert!(out.contains(&listen), "{out:?}");
    let opened = opened_frames(&bench.does(command(open(1, 3))));
    let both = PacketOuts::opening([(7, OTHER_MAC), (8, MAC)]).unwrap();
    assert_eq!(*opened[0].1, both);
}

#[test]
fn without_ports_the_guest_is_observed_and_nothing_is_silent() {
    for side in [agent::Side::Source, agent::Side::Target] {
        let mut bench = Bench::new();
        let mut arm = arm(1, side);
        arm.ports.clear();
        let told = outcomes(&bench.says(command(to_agent::Message::Arm(arm))));
        assert_eq!(told[0].result(), outcome::Result::Done);
        assert!(told[0].reason.contains("no port"), "{}", told[0].reason);
        let sign = match side {
            agent::Side::Source => Sign::Paused,
            _ => Sign::Resumed,
        };
        assert_eq!(signals(&bench.says(libvirt(sign))).len(), 1);
    }
    let mut bench = Bench::new();
    let mut arm = arm(1, agent::Side::Target);
    arm.ports.clear();
    bench.does(command(to_agent::Message::Arm(arm)));
    let out = bench.does(command(open(1, 3)));
    assert!(opened_frames(&out).is_empty(), "{out:?}");
    let outcome = &outcomes(&said(&out))[0];
    assert_eq!(
        (outcome.command, outcome.result()),
        (3, outcome::Result::Failed)
    );
    assert!(outcome.reason.contains("no port"), "{}", outcome.reason);
}
