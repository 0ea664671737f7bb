//! virt-handler asks, through an agent, whether a migration may begin.

use ::handover::{Network, OnTimeout};
use wire::gate_answer::Verdict;

use super::super::gate::MigrationView;
use super::*;

fn question(number: u64) -> Told {
    Told::GateQuestion(wire::GateQuestion {
        question: number,
        namespace: "tenant".into(),
        vm: "w0".into(),
        vmi_uid: "v-1".into(),
        migration_uid: "m-1".into(),
    })
}

fn view(network: Network) -> VmView {
    VmView {
        uid: Some("v-1".into()),
        migrations: vec![MigrationView {
            uid: "m-1".into(),
            over: false,
            network,
        }],
    }
}

fn preparing() -> Network {
    Network::Preparing {
        waiting: "no claim yet".into(),
    }
}

async fn answer(agent: &mut Agent) -> (u64, Verdict, String) {
    match agent.next().await {
        Message::GateAnswer(answer) => (answer.question, answer.verdict(), answer.reason),
        other => panic!("no answer but {other:?}"),
    }
}

#[tokio::test]
async fn a_migration_waits_for_its_network_and_no_longer() {
    let lab = Lab::new();
    let mut agent = lab.agent("n1").await;
    agent.say(question(1)).await;
    lab.woken().await;
    lab.hub.stand(&vm(), None, None, &view(preparing()));
    assert!(agent.all_said().await.is_empty());
    lab.hub.stand(&vm(), None, None, &view(Network::Prepared));
    let (number, verdict, _) = answer(&mut agent).await;
    assert_eq!((number, verdict), (1, Verdict::Go));
    assert!(lab.hub.decided(&vm()).is_empty());
    lab.metric("segue_gate_answers_total{verdict=\"Go\"} 1")
        .await;
}

#[tokio::test]
async fn where_none_is_wanted_it_goes_and_where_it_failed_it_does_not() {
    let lab = Lab::new();
    let mut agent = lab.agent("n1").await;
    let why = || "no port".to_owned();
    for (number, network, expected) in [
        (1, Network::NotWanted { why: why() }, Verdict::Go),
        (2, Network::Failed { why: why() }, Verdict::Fail),
    ] {
        agent.say(question(number)).await;
        lab.woken().await;
        lab.hub.stand(&vm(), None, None, &view(network));
        let (answered, verdict, reason) = answer(&mut agent).await;
        assert_eq!((answered, verdict), (number, expected));
        assert!(reason.contains("no port"), "{reason}");
    }
    let decided = lab.hub.decided(&vm());
    assert_eq!(decided.len(), 1, "{decided:?}");
    assert_eq!(decided[0].node, "n1");
}

#[tokio::test(start_paused = true)]
async fn at_the_deadline_it_goes_or_fails_as_the_policy_says() {
    for (on_timeout, expected) in [
        (OnTimeout::Ignore, Verdict::GoUnprepared),
        (OnTimeout::Fail, Verdict::Fail),
    ] {
        let lab = Lab::new();
        *lab.front.policy.lock().unwrap() = GatePolicy {
            deadline: Duration::from_secs(2),
            on_timeout,
        };
        let mut agent = lab.agent("n1").await;
        let begin = tokio::time::Instant::now();
        agent.say(question(1)).await;
        lab.woken().await;
        lab.hub.stand(&vm(), None, None, &view(preparing()));
        let (number, verdict, reason) = answer(&mut agent).await;
        assert_eq!((number, verdict), (1, expected));
        assert!(reason.contains("no claim yet"), "{reason}");
        let waited = begin.elapsed();
        let millis = waited.as_millis();
        assert!((2_000..2_200).contains(&millis), "{waited:?}");
        lab.woken().await;
        assert_eq!(lab.hub.decided(&vm()).len(), 1);
        assert!(lab.hub.decided(&vm()).is_empty());
    }
}

#[tokio::test(start_paused = true)]
async fn what_nothing_is_known_of_has_the_deadline_too() {
    let lab = Lab::new();
    let mut agent = lab.agent("n1").await;
    agent.say(question(1)).await;
    let (_, verdict, _) = answer(&mut agent).await;
    assert_eq!(verdict, Verdict::GoUnprepared);
}

#[tokio::test]
async fn a_question_that_is_withdrawn_gets_no_answer_and_one_asked_again_gets_the_same() {
    let lab = Lab::new();
    let mut agent = lab.agent("n1").await;
    agent.say(question(1)).await;
    lab.woken().await;
    let withdrawn = wire::GateWithdrawn { question: 1 };
    agent.say(Told::GateWithdrawn(withdrawn)).await;
    agent.all_said().await;
    lab.hub.stand(&vm(), None, None, &view(Network::Prepared));
    assert!(agent.all_said().await.is_empty());
    for _ in 0..2 {
        agent.say(question(2)).await;
        lab.woken().await;
        lab.hub.stand(&vm(), None, None, &view(Network::Prepared));
        let (number, verdict, _) = answer(&mut agent).await;
        assert_eq!((number, verdict), (2, Verdict::Go));
    }
}

#[tokio::test]
async fn an_agent_that_asks_without_end_is_sent_away() {
    let lab = Lab::new();
    let mut agent = lab.agent("n1").await;
    for number in 0..300 {
        // It is sent away in the middle of it.
        let _ = agent.told.send(from_agent(question(number))).await;
    }
    assert_eq!(agent.end().await.code(), tonic::Code::ResourceExhausted);
}
