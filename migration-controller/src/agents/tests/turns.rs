//! A guest that is paused and resumed on its source, and paused again to leave.

use ::handover::{SignalKind, SignalSource};
use wire::signal::{Kind, Source};

use super::*;
use crate::agents::Learned;

/// Long enough ago for its pause to be no news, and not so long that it could not be compared.
const BEGIN_MS: u64 = 2_000;

/// What is stamped so many milliseconds after a moment two seconds ago.
struct Clock(Nanos);

impl Clock {
    fn start() -> Self {
        Self(Nanos(Nanos::now().0 - BEGIN_MS * 1_000_000))
    }

    fn at(&self, kind: Kind, source: Source, millis: u64) -> Told {
        Told::Signal(wire::Signal {
            at_ns: self.0.after(Duration::from_millis(millis)).0,
            ..signal(kind, source)
        })
    }

    /// What is known of the turns, by the same clock.
    fn turns(&self, lab: &Lab) -> Vec<(SignalKind, SignalSource, i64)> {
        let since = |seen: &crate::api::SignalSeen| {
            let seconds = seen.at.seconds_since(self.0.moment());
            Duration::from_secs_f64(seconds.max(0.0)).as_millis()
        };
        let millis = |seen| i64::try_from(since(seen)).unwrap();
        let learned = learned(lab);
        let turns = learned.turns.iter();
        turns
            .map(|seen| (seen.kind, seen.source, millis(seen)))
            .collect()
    }
}

fn learned(lab: &Lab) -> Learned {
    lab.hub.learned(&vm(), "m-1")
}

async fn ends(lab: &Lab) -> (Agent, Agent) {
    let mut source = lab.agent("n1").await;
    let mut target = lab.agent("n2").await;
    lab.stand(&standing(true));
    source.all_said().await;
    target.all_said().await;
    (source, target)
}

async fn tell(agent: &mut Agent, told: impl IntoIterator<Item = Told>) {
    for told in told {
        agent.say(told).await;
    }
    agent.all_said().await;
}

#[tokio::test]
async fn a_source_that_tells_of_a_second_pause_is_heard_and_of_the_first_again_is_not() {
    use SignalKind::{Paused, ResumedOnSource};
    let lab = Lab::new();
    let (mut source, mut target) = ends(&lab).await;
    let clock = Clock::start();
    let first = || {
        [
            clock.at(Kind::Paused, Source::Qmp, 0),
            clock.at(Kind::Resumed, Source::Qmp, 500),
        ]
    };
    tell(&mut source, first()).await;
    let before = learned(&lab);
    assert_eq!(before.turns.len(), 2);
    for known in [
        clock.at(Kind::Paused, Source::Qmp, 0),
        clock.at(Kind::Paused, Source::Qmp, 3),
        clock.at(Kind::Paused, Source::Qmp, 500),
        clock.at(Kind::Resumed, Source::Qmp, 900),
        // From too far away to be compared.
        clock.at(Kind::Paused, Source::Qmp, 60_000),
    ] {
        tell(&mut source, [known]).await;
        assert_eq!(learned(&lab), before);
    }

    lab.front.woken.lock().unwrap().clear();
    tell(&mut source, [clock.at(Kind::Paused, Source::Qmp, 2_000)]).await;
    lab.woken().await;
    let turns = vec![
        (Paused, SignalSource::Qmp, 0),
        (ResumedOnSource, SignalSource::Qmp, 500),
        (Paused, SignalSource::Qmp, 2_000),
    ];
    assert_eq!(clock.turns(&lab), turns);
    let said = target.all_said().await;
    assert!(!counted(&said).contains_key("open"), "{said:?}");

    // The same again, by an agent that connects anew.
    let before = learned(&lab);
    drop(source);
    let mut source = lab.agent("n1").await;
    tell(&mut source, first()).await;
    tell(&mut source, [clock.at(Kind::Paused, Source::Qmp, 2_000)]).await;
    assert_eq!(learned(&lab), before);

    // Of what happens again and again the first and the last are kept.
    tell(
        &mut source,
        [
            clock.at(Kind::Resumed, Source::Qmp, 2_500),
            clock.at(Kind::Paused, Source::Qmp, 3_000),
        ],
    )
    .await;
    let mut turns = turns;
    turns[2] = (ResumedOnSource, SignalSource::Qmp, 2_500);
    turns.push((Paused, SignalSource::Qmp, 3_000));
    assert_eq!(clock.turns(&lab), turns);
}

#[tokio::test]
async fn an_agent_that_makes_up_pauses_without_end_is_not_heard_without_end() {
    let lab = Lab::new();
    let (mut source, _target) = ends(&lab).await;
    let clock = Clock::start();
    lab.front.woken.lock().unwrap().clear();
    for turn in 0..200 {
        let paused = clock.at(Kind::Paused, Source::Qmp, 2 * turn);
        let resumed = clock.at(Kind::Resumed, Source::Qmp, 2 * turn + 1);
        tell(&mut source, [paused, resumed]).await;
    }
    assert_eq!(learned(&lab).turns.len(), 4);
    let woken = lab.front.woken.lock().unwrap().len();
    assert!(woken < 50, "{woken}");
}

#[tokio::test]
async fn the_pause_that_is_measured_is_the_one_in_which_it_left() {
    let lab = Lab::new();
    let (mut source, mut target) = ends(&lab).await;
    let clock = Clock::start();
    // QEMU's own monitor tells of no pause after a person's; libvirt does.
    let told = [
        clock.at(Kind::Paused, Source::Qmp, 0),
        clock.at(Kind::Resumed, Source::Qmp, 500),
        clock.at(Kind::Paused, Source::Libvirt, 3_000),
    ];
    tell(&mut source, told).await;
    tell(&mut target, [clock.at(Kind::Resumed, Source::Qmp, 3_060)]).await;
    assert_eq!(learned(&lab).pause_ms, None);
    let arrived = clock.at(Kind::Resumed, Source::Libvirt, 3_064);
    tell(&mut target, [arrived]).await;
    assert_eq!(learned(&lab).pause_ms, Some(64.0));
}
