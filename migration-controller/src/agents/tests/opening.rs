//! The pause, and what it opens.

use ::handover::{SignalKind, SignalSource};

use wire::signal::{Kind, Source};

use super::*;
use crate::api::OpeningResult;

/// Both ends' agents, armed.
async fn ends(lab: &Lab, prepared: bool) -> (Agent, Agent) {
    let mut source = lab.agent("n1").await;
    let mut target = lab.agent("n2").await;
    lab.stand(&standing(prepared));
    for agent in [&mut source, &mut target] {
        assert!(matches!(agent.next().await, Message::Arm(_)));
    }
    (source, target)
}

fn done(open: &wire::Open) -> Told {
    let received = Nanos::now().0;
    Told::Outcome(wire::Outcome {
        id: open.id.clone(),
        command: open.command,
        result: wire::outcome::Result::Done.into(),
        reason: String::new(),
        hops: Some(wire::Hops {
            received_at_ns: received,
            sent_at_ns: received + 30_000,
            processed_at_ns: received + 430_000,
        }),
    })
}

fn signals(lab: &Lab) -> Vec<(SignalKind, SignalSource, Option<String>)> {
    let learned = lab.hub.learned(&vm(), "m-1");
    let signals = learned.signals.into_iter();
    signals
        .map(|seen| (seen.kind, seen.source, seen.node))
        .collect()
}

fn result(lab: &Lab) -> Option<OpeningResult> {
    let learned = lab.hub.learned(&vm(), "m-1");
    learned.opening.map(|opening| opening.result)
}

#[tokio::test]
async fn the_pause_opens_the_target_and_every_hop_is_recorded() {
    let lab = Lab::new();
    let (source, mut target) = ends(&lab, true).await;
    let told = paused();
    let Told::Signal(signal) = &told else {
        unreachable!()
    };
    let at = signal.at_ns;
    source.say(told).await;
    let open = target.open().await;
    assert_eq!((open.id.clone(), open.paused_at_ns), (Some(id()), at));
    assert!(open.heard_at_ns > at);
    lab.woken().await;
    let learned = lab.hub.learned(&vm(), "m-1");
    assert_eq!(learned.opening.unwrap().result, OpeningResult::Asked);

    target.say(done(&open)).await;
    lab.woken().await;
    let learned = lab.hub.learned(&vm(), "m-1");
    let opening = learned.opening.unwrap();
    assert_eq!(opening.result, OpeningResult::Opened);
    assert_eq!(opening.paused_at, Nanos(at).moment());
    assert_eq!(opening.received_to_sent_us, Some(30));
    assert_eq!(opening.sent_to_processed_us, Some(400));
    assert!(opening.paused_to_heard_us.unwrap() >= opening.paused_to_seen_us.unwrap());
    assert!(opening.heard_to_received_us.unwrap() >= 0);
    assert!(learned.opened_at.unwrap() > opening.paused_at);
    let by_libvirt = (SignalKind::Paused, SignalSource::Libvirt, Some("n1".into()));
    assert_eq!(signals(&lab), [by_libvirt]);
}

#[tokio::test]
async fn it_opens_once_however_many_tell_of_the_pause() {
    let lab = Lab::new();
    let (mut source, mut target) = ends(&lab, true).await;
    source.say(paused()).await;
    source
        .say(Told::Signal(signal(Kind::Paused, Source::Qmp)))
        .await;
    source.say(paused()).await;
    source.all_said().await;
    let said = target.all_said().await;
    assert_eq!(counted(&said), BTreeMap::from([("open", 1)]));
    assert_eq!(signals(&lab).len(), 2);
    let Message::Open(open) = &said[0] else {
        unreachable!()
    };
    target.say(done(open)).await;
    target.say(done(open)).await;
    target.all_said().await;
    source.say(paused()).await;
    source.all_said().await;
    assert!(target.all_said().await.is_empty());
}

#[tokio::test]
async fn a_pause_before_the_handover_is_ready_opens_nothing_then_or_later() {
    let lab = Lab::new();
    let (mut source, mut target) = ends(&lab, false).await;
    source.say(paused()).await;
    source.all_said().await;
    assert!(target.all_said().await.is_empty());
    assert_eq!(signals(&lab).len(), 1, "it paused all the same");
    lab.stand(&standing(true));
    source.say(paused()).await;
    source.all_said().await;
    assert!(target.all_said().await.is_empty());
    assert_eq!(result(&lab), None);
}

#[tokio::test]
async fn a_pause_that_is_told_again_later_is_recorded_and_opens_nothing() {
    for (ago_ms, opens) in [(200, true), (1_500, false), (60_000, false)] {
        let lab = Lab::new();
        let (mut source, mut target) = ends(&lab, true).await;
        let pause = wire::Signal {
            at_ns: Nanos::now().0 - ago_ms * 1_000_000,
            ..signal(Kind::Paused, Source::Libvirt)
        };
        source.say(Told::Signal(pause)).await;
        source.all_said().await;
        let opened = counted(&target.all_said().await).contains_key("open");
        assert_eq!(opened, opens, "{ago_ms} ms ago");
        assert_eq!(signals(&lab).len(), 1, "it paused all the same");
        // A target's agent that comes later opens it no more than one that was there.
        let mut target = lab.agent("n2").await;
        let opened = counted(&target.all_said().await).contains_key("open");
        assert!(!opened, "{ago_ms} ms ago");
    }
}

#[tokio::test]
async fn a_source_that_resumes_is_a_contradiction_and_says_where_the_guest_is() {
    let lab = Lab::new();
    let (mut source, mut target) = ends(&lab, true).await;
    source.say(paused()).await;
    let open = target.open().await;
    target.say(done(&open)).await;
    lab.woken().await;
    source.say(resumed()).await;
    lab.woken().await;
    let (kind, ..) = signals(&lab).pop().unwrap();
    assert_eq!(kind, SignalKind::ResumedOnSource);
    let said = source.all_said().await;
    assert_eq!(counted(&said), BTreeMap::from([("announce", 1)]));
    source.say(paused()).await;
    source.all_said().await;
    assert!(target.all_said().await.is_empty());
}

#[tokio::test]
async fn the_pause_and_the_blackout_are_measured_across_the_ends() {
    let lab = Lab::new();
    let (mut source, mut target) = ends(&lab, true).await;
    let begin = Nanos::now().0 - 100_000_000;
    let at = |kind, source, millis: u64| {
        Told::Signal(wire::Signal {
            at_ns: begin + millis * 1_000_000,
            port: "w0.tenant".into(),
            ..signal(kind, source)
        })
    };
    source.say(at(Kind::Paused, Source::Libvirt, 2)).await;
    source.say(at(Kind::LastFrame, Source::Frame, 1)).await;
    source.all_said().await;
    target.say(at(Kind::Resumed, Source::Rarp, 30)).await;
    target.say(at(Kind::FirstFrame, Source::Frame, 30)).await;
    target.say(at(Kind::FirstFrame, Source::Frame, 44)).await;
    target.all_said().await;
    let learned = lab.hub.learned(&vm(), "m-1");
    assert_eq!(
        learned.pause_ms, None,
        "a frame is no word of the hypervisor's"
    );
    assert_eq!(learned.blackout_ms, Some(29.0));
    target.say(at(Kind::Resumed, Source::Libvirt, 34)).await;
    source.say(at(Kind::Left, Source::Libvirt, 36)).await;
    target.all_said().await;
    source.all_said().await;
    let learned = lab.hub.learned(&vm(), "m-1");
    assert_eq!(learned.pause_ms, Some(32.0));
    let other = lab.hub.learned(&vm(), "m-2");
    assert_eq!(other, super::super::Learned::default());
}

// === Agents that are not there ===

#[tokio::test]
async fn without_an_agent_on_the_target_nothing_is_opened_until_one_comes() {
    let lab = Lab::new();
    let source = lab.agent("n1").await;
    lab.stand(&standing(true));
    source.say(paused()).await;
    lab.woken().await;
    assert_eq!(result(&lab), Some(OpeningResult::NoAgent));
    // One that comes while the guest is still between its hosts opens after all.
    let mut target = lab.agent("n2").await;
    assert!(matches!(target.next().await, Message::Arm(_)));
    target.open().await;
    assert_eq!(result(&lab), Some(OpeningResult::Asked));
}

#[tokio::test]
async fn an_agent_that_comes_after_the_resume_opens_nothing() {
    let lab = Lab::new();
    let (source, target) = ends(&lab, true).await;
    drop(target);
    lab.metric("segue_agents_connected 1").await;
    source.say(paused()).await;
    lab.woken().await;
    source
        .say(Told::Signal(signal(Kind::Left, Source::Libvirt)))
        .await;
    lab.woken().await;
    let mut target = lab.agent("n2").await;
    let said = target.all_said().await;
    assert_eq!(counted(&said), BTreeMap::from([("arm", 1)]));
}

#[tokio::test]
async fn a_target_that_cannot_open_is_recorded_with_its_reason() {
    let lab = Lab::new();
    let (source, mut target) = ends(&lab, true).await;
    source.say(paused()).await;
    let open = target.open().await;
    let Told::Outcome(outcome) = done(&open) else {
        unreachable!()
    };
    let failed = wire::Outcome {
        result: wire::outcome::Result::Failed.into(),
        reason: "br-int does not answer".into(),
        hops: None,
        ..outcome
    };
    target.say(Told::Outcome(failed)).await;
    until(|| result(&lab) == Some(OpeningResult::Failed)).await;
    let learned = lab.hub.learned(&vm(), "m-1");
    let reason = learned.opening.unwrap().reason;
    assert_eq!(reason.as_deref(), Some("br-int does not answer"));
}
