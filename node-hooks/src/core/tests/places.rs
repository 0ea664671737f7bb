//! Where the guest is: its return to the source, and what the controller knows of it.

use super::*;

fn announced(out: &[Output]) -> Option<&Arc<PacketOuts>> {
    out.iter().find_map(|output| match output {
        Output::Announce {
            command: None,
            packets,
            ..
        } => Some(packets),
        _ => None,
    })
}

fn at(sign: Sign, at: u64) -> Input {
    Input::Lifecycle(LifecycleEvent {
        domain: "demo_web".into(),
        sign,
        origin: Origin::Libvirt,
        at: Nanos(at),
        seen: Nanos(at),
    })
}

#[test]
fn a_guest_that_goes_on_at_the_source_is_announced_there_at_once() {
    let mut bench = Bench::new();
    let mut arm = arm(1, agent::Side::Source);
    // As on a port that OVN knows by its MAC alone.
    arm.ports[0].addresses.clear();
    bench.does(command(to_agent::Message::Arm(arm)));
    assert!(announced(&bench.does(at(Sign::Paused, 10))).is_none());
    let out = bench.does(at(Sign::ResumedAfterFailure, 20));
    let rarp = PacketOuts::opening([(7, MAC)]).unwrap();
    assert_eq!(announced(&out).map(|packets| &**packets), Some(&rarp));
    // It is nobody's command.
    let result = Ok(());
    let (id, command) = (id(1), None);
    let told = Input::Announced {
        id,
        command,
        result,
    };
    assert!(bench.does(told).is_empty());
    // A launcher can make that up without end.
    bench.does(at(Sign::Paused, 30));
    assert!(announced(&bench.does(at(Sign::Resumed, 40))).is_none());
    bench.now += SECOND;
    bench.does(at(Sign::Paused, 50));
    assert!(announced(&bench.does(at(Sign::Resumed, 60))).is_some());
    // Of one that has left for good that is not believed.
    bench.now += SECOND;
    bench.does(at(Sign::Paused, 70));
    bench.does(at(Sign::Left, 80));
    assert!(announced(&bench.does(at(Sign::Resumed, 90))).is_none());
}

#[test]
fn a_guest_that_arrives_announces_itself() {
    let mut bench = Bench::new();
    bench.does(arm_target(1));
    assert!(announced(&bench.does(libvirt(Sign::Resumed))).is_none());
}

fn with_routes(side: agent::Side, guest_here: Option<bool>) -> Input {
    let mut arm = arm(1, side);
    arm.routes = Some(HostRoutes { wanted: true });
    arm.guest_here = guest_here;
    command(to_agent::Message::Arm(arm))
}

fn put() -> Output {
    Output::PutRoutes {
        addresses: vec!["10.0.0.1".parse().unwrap()],
        interface: "tap1".into(),
    }
}

fn remove() -> Output {
    Output::RemoveRoutes {
        addresses: vec!["10.0.0.1".parse().unwrap()],
    }
}

#[test]
fn an_agent_that_starts_after_the_guest_has_moved_believes_the_controller() {
    let mut source = Bench::new();
    let out = source.does(with_routes(agent::Side::Source, Some(false)));
    assert!(!out.contains(&put()) && out.contains(&remove()), "{out:?}");
    let out = source.does(with_routes(agent::Side::Source, None));
    assert!(
        !out.contains(&put()),
        "an Arm that does not say changes nothing: {out:?}"
    );
    let mut target = Bench::new();
    let out = target.does(with_routes(agent::Side::Target, Some(true)));
    assert!(out.contains(&put()), "{out:?}");
}

#[test]
fn what_the_agent_has_seen_itself_outweighs_what_the_controller_knew() {
    let mut source = Bench::new();
    assert!(
        source
            .does(with_routes(agent::Side::Source, Some(true)))
            .contains(&put())
    );
    source.does(at(Sign::Paused, 10));
    assert!(source.does(at(Sign::Left, 20)).contains(&remove()));
    let out = source.does(with_routes(agent::Side::Source, Some(true)));
    assert!(!out.contains(&put()), "{out:?}");
    let mut target = Bench::new();
    target.does(with_routes(agent::Side::Target, Some(false)));
    assert!(target.does(at(Sign::Resumed, 30)).contains(&put()));
    let out = target.does(with_routes(agent::Side::Target, Some(false)));
    assert!(!out.contains(&remove()), "{out:?}");
}
