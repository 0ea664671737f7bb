//! Agents that say what is not theirs to say, or what makes no sense.

use tonic::Code;
use wire::outcome::Result as Came;
use wire::signal::{Kind, Source};

use super::*;

/// The agents of n1, n2 and a bystander, all of them armed for a handover that is ready.
async fn agents(lab: &Lab) -> [Agent; 3] {
    lab.stand(&standing(true));
    let mut agents = Vec::new();
    for node in ["n1", "n2", "n3"] {
        let mut agent = lab.agent(node).await;
        agent.all_said().await;
        agents.push(agent);
    }
    agents.try_into().ok().unwrap()
}

fn nothing_learned(lab: &Lab) -> bool {
    lab.hub.learned(&vm(), "m-1") == super::super::Learned::default()
}

#[tokio::test]
async fn a_pause_counts_only_from_the_source_and_of_the_present_epoch() {
    let lab = Lab::new();
    let [mut source, mut target, mut bystander] = agents(&lab).await;
    for agent in [&mut target, &mut bystander] {
        agent.say(paused()).await;
        assert!(agent.all_said().await.is_empty());
    }
    let wrong: [fn(&mut wire::HandoverId); 5] = [
        |id| id.epoch = 6,
        |id| id.epoch = 8,
        |id| id.migration_uid = "m-0".into(),
        |id| id.vm = "w1".into(),
        |id| id.namespace = String::new(),
    ];
    for spoil in wrong {
        let mut signal = signal(Kind::Paused, Source::Libvirt);
        spoil(signal.id.as_mut().unwrap());
        source.say(Told::Signal(signal)).await;
    }
    let nameless = wire::Signal {
        id: None,
        ..signal(Kind::Paused, Source::Libvirt)
    };
    source.say(Told::Signal(nameless)).await;
    source.all_said().await;
    assert!(target.all_said().await.is_empty());
    assert!(nothing_learned(&lab));
    let line = "segue_told_signals_total{kind=\"PAUSED\",source=\"LIBVIRT\",taken=\"Refused\"} 8";
    lab.metric(line).await;
}

#[tokio::test]
async fn what_an_end_cannot_know_is_refused() {
    let lab = Lab::new();
    let [mut source, mut target, _] = agents(&lab).await;
    let frame = |kind, port: &str| wire::Signal {
        port: port.into(),
        ..signal(kind, Source::Frame)
    };
    for lie in [
        // It runs there all the time, and did not pause to leave.
        signal(Kind::Resumed, Source::Libvirt),
        signal(Kind::Left, Source::Libvirt),
        signal(Kind::Left, Source::Qmp),
        // A guest can send these whenever it likes.
        signal(Kind::Resumed, Source::Rarp),
        signal(Kind::Resumed, Source::Garp),
        signal(Kind::Paused, Source::Rarp),
        signal(Kind::Left, Source::NeighbourAdvertisement),
        signal(Kind::Paused, Source::Unspecified),
        signal(Kind::Unspecified, Source::Libvirt),
        frame(Kind::FirstFrame, "w0.tenant"),
        frame(Kind::LastFrame, "another"),
    ] {
        source.say(Told::Signal(lie)).await;
    }
    for lie in [
        signal(Kind::Left, Source::Libvirt),
        signal(Kind::Resumed, Source::Frame),
        frame(Kind::LastFrame, "w0.tenant"),
    ] {
        target.say(Told::Signal(lie)).await;
    }
    source.all_said().await;
    assert!(target.all_said().await.is_empty());
    assert!(nothing_learned(&lab));
}

#[tokio::test]
async fn stamps_from_nowhere_are_not_measured_with() {
    let lab = Lab::new();
    let [mut source, mut target, _] = agents(&lab).await;
    let hour = 3_600_000_000_000;
    for at_ns in [0, Nanos::now().0 + hour, u64::MAX] {
        let frame = wire::Signal {
            at_ns,
            port: "w0.tenant".into(),
            ..signal(Kind::LastFrame, Source::Frame)
        };
        source.say(Told::Signal(frame)).await;
    }
    let pause = wire::Signal {
        at_ns: Nanos::now().0 + hour,
        seen_at_ns: u64::MAX,
        ..signal(Kind::Paused, Source::Libvirt)
    };
    source.say(Told::Signal(pause)).await;
    assert_eq!(target.open().await.paused_at_ns, 0);
    target.say(resumed()).await;
    target.all_said().await;
    source.all_said().await;
    let learned = lab.hub.learned(&vm(), "m-1");
    assert_eq!((learned.pause_ms, learned.blackout_ms), (None, None));
    let opening = learned.opening.unwrap();
    assert_eq!(opening.paused_to_seen_us, None);
    assert_eq!(opening.paused_to_heard_us, None);
    for seen in learned.signals {
        let now = Nanos::now().moment();
        assert!(now.seconds_since(seen.at).abs() < 10.0, "{seen:?}");
    }
}

#[tokio::test]
async fn an_outcome_counts_from_the_target_for_what_it_was_told() {
    let lab = Lab::new();
    let [mut source, mut target, _] = agents(&lab).await;
    source.say(paused()).await;
    let open = target.open().await;
    let outcome = |command| {
        Told::Outcome(wire::Outcome {
            id: open.id.clone(),
            command,
            result: wire::outcome::Result::Done.into(),
            ..wire::Outcome::default()
        })
    };
    source.say(outcome(open.command)).await;
    source.all_said().await;
    target.say(outcome(open.command + 1)).await;
    target.all_said().await;
    let result = lab.hub.learned(&vm(), "m-1").opening.unwrap().result;
    assert_eq!(result, crate::api::OpeningResult::Asked);
}

#[tokio::test]
async fn a_command_that_an_agent_refuses_is_counted_whatever_it_was() {
    let lab = Lab::new();
    let [mut source, mut target, _] = agents(&lab).await;
    let outcome = |id, command, result: Came| {
        Told::Outcome(wire::Outcome {
            id,
            command,
            result: result.into(),
            reason: "a port's name of 0 bytes".into(),
            ..wire::Outcome::default()
        })
    };
    // An Arm has no number; nor need what is refused be armed here.
    source.say(outcome(Some(id()), 0, Came::Failed)).await;
    source.say(outcome(None, 0, Came::Stale)).await;
    source.say(outcome(Some(id()), 0, Came::Done)).await;
    source.say(paused()).await;
    let open = target.open().await;
    // This one is in the record.
    let refused = outcome(open.id.clone(), open.command, Came::Stale);
    target.say(refused).await;
    target.all_said().await;
    source.all_said().await;
    lab.metric("segue_told_refusals_total{result=\"FAILED\"} 1")
        .await;
    assert!(lab.exposes("segue_told_refusals_total{result=\"STALE\"} 1"));
    assert!(!lab.exposes("segue_told_refusals_total{result=\"DONE\"} 1"));
    for _ in 0..200 {
        source.say(outcome(Some(id()), 0, Came::Failed)).await;
    }
    source.all_said().await;
    lab.metric("segue_told_refusals_total{result=\"FAILED\"} 201")
        .await;
}

#[tokio::test]
async fn saying_it_over_and_over_costs_the_agent_alone() {
    let lab = Lab::new();
    let [mut source, mut target, _] = agents(&lab).await;
    for _ in 0..2_000 {
        source.say(paused()).await;
        let forgery = wire::Forgery::default();
        source.say(Told::Forgery(forgery)).await;
    }
    assert_eq!(
        counted(&target.all_said().await),
        BTreeMap::from([("open", 1)])
    );
    source.all_said().await;
    assert_eq!(lab.hub.learned(&vm(), "m-1").signals.len(), 1);
    let woken = lab.front.woken.lock().unwrap().len();
    assert_eq!(woken, 1, "what is known is no news");
    lab.metric("segue_told_forgeries_total 2000").await;
}

#[tokio::test]
async fn a_second_hello_and_messages_that_are_too_long_end_the_stream() {
    let lab = Lab::new();
    let mut agent = lab.agent("n1").await;
    agent.say(hello("n2")).await;
    assert_eq!(agent.end().await.code(), Code::InvalidArgument);
    let mut agent = lab.agent("n1").await;
    let long = wire::Forgery {
        reason: "x".repeat(1 << 20),
        ..wire::Forgery::default()
    };
    agent.say(Told::Forgery(long)).await;
    agent.end().await;
    lab.metric("segue_agents_connected 0").await;
}

#[tokio::test]
async fn an_empty_message_is_a_newer_agents_and_skipped() {
    let lab = Lab::new();
    let mut agent = lab.agent("n1").await;
    let unknown = wire::FromAgent { message: None };
    agent.told.send(unknown).await.unwrap();
    assert!(agent.all_said().await.is_empty());
}
