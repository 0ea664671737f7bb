//! Who is let in, and for how long.

use tonic::Code;

use super::*;

fn refused(attached: Result<Agent, Status>) -> Status {
    attached.err().expect("it is let in")
}

#[tokio::test]
async fn only_the_leader_welcomes() {
    let lab = Lab::standing_by();
    let status = refused(lab.attach("n1", hello("n1")).await);
    assert_eq!(status.code(), Code::Unavailable);
    lab.hub.lead(true);
    let mut agent = lab.agent("n1").await;
    lab.stand(&standing(true));
    assert!(matches!(agent.next().await, Message::Arm(_)));
    lab.hub.lead(false);
    assert_eq!(agent.end().await.code(), Code::Unavailable);
    lab.metric("segue_agent_streams_ended_total{reason=\"NotLeading\"} 1")
        .await;
    lab.hub.lead(true);
    let mut agent = lab.agent("n1").await;
    assert!(
        agent.all_said().await.is_empty(),
        "who led before knows nothing any more"
    );
}

#[tokio::test]
async fn an_agent_is_the_node_that_its_certificate_names() {
    let lab = Lab::new();
    let status = refused(lab.attach("n1", hello("n2")).await);
    assert_eq!(status.code(), Code::PermissionDenied);
    lab.metric("segue_agent_streams_refused_total{reason=\"OtherNode\"} 1")
        .await;
}

#[tokio::test]
async fn a_revision_that_is_too_old_is_refused_and_a_newer_one_is_not() {
    let lab = Lab::new();
    let with = |revision| {
        Told::Hello(wire::Hello {
            revision,
            version: String::new(),
            node: "n1".into(),
        })
    };
    let status = refused(lab.attach("n1", with(0)).await);
    assert_eq!(status.code(), Code::FailedPrecondition);
    let newer = with(node_hooks_api::REVISION + 1);
    let mut agent = lab.attach("n1", newer).await.unwrap();
    let Message::Welcome(welcome) = agent.next().await else {
        panic!("no welcome");
    };
    assert_eq!(welcome.revision, node_hooks_api::REVISION);
    assert!(welcome.heartbeat_ms > 0);
}

#[tokio::test(start_paused = true)]
async fn a_hello_comes_first_and_soon() {
    let lab = Lab::new();
    let status = refused(lab.attach("n1", paused()).await);
    assert_eq!(status.code(), Code::InvalidArgument);
    let (silent, queue) = mpsc::channel::<wire::FromAgent>(1);
    let mut client = AgentsClient::new(lab.connect("n1").await);
    let status = client.attach(ReceiverStream::new(queue)).await.unwrap_err();
    assert_eq!(status.code(), Code::DeadlineExceeded);
    drop(silent);
}

#[tokio::test]
async fn a_newer_stream_takes_the_older_ones_place() {
    let lab = Lab::new();
    let mut older = lab.agent("n1").await;
    let mut newer = lab.agent("n1").await;
    assert_eq!(older.end().await.code(), Code::Aborted);
    lab.stand(&standing(true));
    assert!(matches!(newer.next().await, Message::Arm(_)));
    lab.metric("segue_agents_connected 1").await;
    // What the older one's end leads to is not the newer one's.
    drop(older);
    assert!(newer.all_said().await.is_empty());
    lab.metric("segue_agents_connected 1").await;
}

#[tokio::test(start_paused = true)]
async fn an_agent_that_froze_is_given_up_and_one_that_answers_is_not() {
    let lab = Lab::new();
    let mut frozen = lab.agent("n1").await;
    let mut lively = lab.agent("n2").await;
    let answering = tokio::spawn(async move {
        let mut answered = 0;
        while answered < 20 {
            if let Message::Heartbeat(beat) = lively.receive().await.unwrap() {
                assert!(!beat.answer);
                let answer = wire::Heartbeat {
                    answer: true,
                    ..beat
                };
                lively.say(Told::Heartbeat(answer)).await;
                answered += 1;
            }
        }
    });
    assert_eq!(frozen.end().await.code(), Code::DeadlineExceeded);
    answering.await.unwrap();
    lab.metric("segue_agent_streams_ended_total{reason=\"Silent\"} 1")
        .await;
}

#[tokio::test(start_paused = true)]
async fn an_agent_that_takes_nothing_is_dropped_and_holds_up_nobody() {
    let lab = Lab::new();
    let slow = lab.agent("n2").await;
    let mut source = lab.agent("n1").await;
    lab.stand(&standing(true));
    assert!(matches!(source.next().await, Message::Arm(_)));
    // The windows and the pipe take so much, then its queue does; then it is enough.
    let slow_ones = "segue_agent_streams_ended_total{reason=\"Slow\"} 1";
    let mut rounds = 0..500;
    while !lab.exposes(slow_ones) {
        let round = rounds.next().expect("it is never enough");
        for change in 0..100 {
            let mut standing = standing(true);
            let address = format!("10.{}.{change}.1", round % 250);
            standing.target.ports[0].addresses = vec![address; 50];
            lab.stand(&standing);
        }
        tokio::task::yield_now().await;
    }
    lab.stand(&standing(true));
    source.say(paused()).await;
    lab.woken().await;
    let opening = lab.hub.learned(&vm(), "m-1").opening.unwrap();
    assert_eq!(opening.result, crate::api::OpeningResult::NoAgent);
    drop(slow);
}
