//! The link against a controller that is real but for its mind: TCP, TLS, HTTP/2 and gRPC.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use node_hooks_api::REVISION;
use node_hooks_api::agent::{GateAnswer, Heartbeat, Welcome, from_agent, to_agent};
use rustls::pki_types::ServerName;
use tempfile::TempDir;
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tonic::Status;

use super::test_controller::{Controller, SOON};
use super::test_pki::{CONTROLLER, Pki};
use super::{Config, Event, Link, Metrics, NoController, Outbox, SocketAddr, State};

/// An agent's link, running.
struct Agent {
    outbox: Outbox,
    events: mpsc::Receiver<Event>,
    state: watch::Receiver<State>,
    busy: watch::Sender<bool>,
    running: tokio::task::JoinHandle<()>,
    stop: CancellationToken,
}

impl Agent {
    fn start(directory: &TempDir, controllers: &[SocketAddr]) -> Self {
        let outbox = Outbox::new(64);
        let (busy, is_busy) = watch::channel(false);
        let stop = CancellationToken::new();
        let config = Config {
            node: "node1".into(),
            controllers: controllers
                .iter()
                .map(|address| address.to_string().parse().unwrap())
                .collect(),
            controller_name: ServerName::try_from(CONTROLLER).unwrap(),
            tls_dir: directory.path().to_owned(),
        };
        let metrics = Arc::new(Metrics::new());
        let (link, events, state) =
            Link::new(config, outbox.clone(), is_busy, metrics, stop.clone());
        Self {
            outbox,
            events,
            state,
            busy,
            running: tokio::spawn(link.run()),
            stop,
        }
    }

    async fn event(&mut self) -> Event {
        timeout(SOON, self.events.recv()).await.unwrap().unwrap()
    }

    async fn stop(self) {
        self.stop.cancel();
        timeout(SOON, self.running).await.unwrap().unwrap();
    }
}

fn heartbeat(number: u64, answer: bool) -> Heartbeat {
    Heartbeat { number, answer }
}

fn gate_answer() -> to_agent::Message {
    to_agent::Message::GateAnswer(GateAnswer {
        question: 5,
        ..GateAnswer::default()
    })
}

#[tokio::test]
async fn it_says_who_it_is_and_passes_on_what_is_said() {
    let pki = Pki::new();
    let mut controller = Controller::start(pki.server(CONTROLLER), true).await;
    let directory = pki.agent("node1");
    let mut agent = Agent::start(&directory, &[controller.address]);
    let (mut attachment, hello) = controller.welcome(1000).await;
    assert_eq!((hello.revision, hello.node.as_str()), (REVISION, "node1"));
    assert_eq!(agent.event().await, Event::Up);
    let connected = State::Connected {
        address: controller.address,
        version: "9.9.9".into(),
    };
    assert_eq!(*agent.state.borrow(), connected);

    attachment.say(gate_answer()).await;
    let Event::Said { message, received } = agent.event().await else {
        panic!("the controller has said something");
    };
    assert_eq!(message, gate_answer());
    assert!(received.0 > 0);
    let forgery = from_agent::Message::Forgery(node_hooks_api::agent::Forgery::default());
    agent.outbox.push(forgery.clone());
    assert_eq!(attachment.next_word().await, Some(forgery));
    agent.stop().await;
}

#[tokio::test]
async fn of_two_controllers_the_one_that_leads_is_found_and_found_again() {
    let pki = Pki::new();
    let mut first = Controller::start(pki.server(CONTROLLER), false).await;
    let mut second = Controller::start(pki.server(CONTROLLER), true).await;
    let directory = pki.agent("node1");
    let mut agent = Agent::start(&directory, &[first.address, second.address]);
    let (attachment, _) = second.welcome(1000).await;
    assert_eq!(agent.event().await, Event::Up);
    // The lead falls to the other.
    second.leads.store(false, Ordering::SeqCst);
    first.leads.store(true, Ordering::SeqCst);
    let over = Err(Status::unavailable("does not lead any more"));
    attachment.outbound.send(over).await.unwrap();
    assert_eq!(agent.event().await, Event::Down);
    first.welcome(1000).await;
    assert_eq!(agent.event().await, Event::Up);
    agent.stop().await;
}

#[tokio::test]
async fn a_heartbeat_is_answered_and_a_silent_controller_given_up() {
    let pki = Pki::new();
    let mut controller = Controller::start(pki.server(CONTROLLER), true).await;
    let directory = pki.agent("node1");
    let mut agent = Agent::start(&directory, &[controller.address]);
    let (mut attachment, _) = controller.welcome(500).await;
    assert_eq!(agent.event().await, Event::Up);
    let ours = to_agent::Message::Heartbeat(heartbeat(77, false));
    attachment.say(ours).await;
    let answered = from_agent::Message::Heartbeat(heartbeat(77, true));
    loop {
        match attachment.next().await.unwrap() {
            message if message == answered => break,
            from_agent::Message::Heartbeat(beat) if !beat.answer => {}
            other => panic!("{other:?}"),
        }
    }
    // From here on this controller says nothing: the stream is given up, and another made.
    assert_eq!(agent.event().await, Event::Down);
    controller.welcome(1000).await;
    assert_eq!(agent.event().await, Event::Up);
    agent.stop().await;
}

#[tokio::test]
async fn nobody_else_is_believed_to_be_the_controller() {
    let (pki, other) = (Pki::new(), Pki::new());
    let mut impostor = Controller::start(other.server(CONTROLLER), true).await;
    let mut misnamed = Controller::start(pki.server("somebody.else"), true).await;
    let directory = pki.agent("node1");
    let mut agent = Agent::start(&directory, &[impostor.address, misnamed.address]);
    let failed = agent.state.wait_for(|state| {
        matches!(state, State::Connecting { last_error: Some(error) }
            if error.contains(&impostor.address.to_string())
                && error.contains(&misnamed.address.to_string()))
    });
    drop(timeout(SOON, failed).await.unwrap().unwrap());
    assert!(impostor.streams.try_recv().is_err());
    assert!(misnamed.streams.try_recv().is_err());
    agent.stop().await;
}

#[tokio::test]
async fn a_controller_that_is_too_old_or_says_no_welcome_is_left() {
    let pki = Pki::new();
    let mut controller = Controller::start(pki.server(CONTROLLER), true).await;
    let directory = pki.agent("node1");
    let mut agent = Agent::start(&directory, &[controller.address]);
    let old = to_agent::Message::Welcome(Welcome::default());
    for (message, named) in [(old, "revision 0"), (gate_answer(), "welcome")] {
        let attachment = controller.attachment().await;
        attachment.say(message).await;
        let failed = agent.state.wait_for(|state| {
            matches!(state, State::Connecting { last_error: Some(error) } if error.contains(named))
        });
        drop(timeout(SOON, failed).await.unwrap().unwrap());
    }
    controller.welcome(1000).await;
    assert_eq!(agent.event().await, Event::Up);
    agent.stop().await;
}

#[tokio::test]
async fn a_new_certificate_is_used_when_nothing_is_armed() {
    let pki = Pki::new();
    let mut controller = Controller::start(pki.server(CONTROLLER), true).await;
    let directory = pki.agent("node1");
    let mut agent = Agent::start(&directory, &[controller.address]);
    agent.busy.send_replace(true);
    let (mut attachment, _) = controller.welcome(60_000).await;
    assert_eq!(agent.event().await, Event::Up);
    assert_eq!(*controller.connections.borrow(), 1);
    pki.renew(&directory, "node1");
    // Not in the middle of a handover.
    tokio::time::pause();
    tokio::time::advance(Duration::from_secs(30)).await;
    tokio::time::resume();
    attachment.say(gate_answer()).await;
    assert!(matches!(agent.event().await, Event::Said { .. }));
    agent.busy.send_replace(false);
    assert_eq!(agent.event().await, Event::Down);
    while attachment.next().await.is_some() {}
    controller.welcome(1000).await;
    assert_eq!(agent.event().await, Event::Up);
    assert_eq!(*controller.connections.borrow(), 2);
    agent.stop().await;
}

#[tokio::test]
async fn without_certificates_it_says_which_file_is_missing() {
    let directory = tempfile::tempdir().unwrap();
    let nowhere = "127.0.0.1:1".parse().unwrap();
    let mut agent = Agent::start(&directory, &[nowhere]);
    let failed = agent.state.wait_for(|state| {
        matches!(state, State::Connecting { last_error: Some(error) } if error.contains("tls.crt"))
    });
    drop(timeout(SOON, failed).await.unwrap().unwrap());
    agent.stop().await;
}

#[rstest::rstest]
#[case(
    "controller.segue-system.svc:9464",
    "controller.segue-system.svc",
    9464
)]
#[case("[fd00::1]:9464", "fd00::1", 9464)]
#[case("10.0.0.1:1", "10.0.0.1", 1)]
fn a_controller_is_a_host_and_a_port(#[case] text: &str, #[case] host: &str, #[case] port: u16) {
    let controller: super::Controller = text.parse().unwrap();
    assert_eq!((controller.host.as_str(), controller.port), (host, port));
    assert_eq!(controller.to_string(), text);
}

#[rstest::rstest]
#[case("controller")]
#[case(":9464")]
#[case("controller:0")]
#[case("controller:x")]
#[case("fd00::1:9464")]
#[case("[fd00::1:9464")]
fn anything_else_is_none(#[case] text: &str) {
    assert_eq!(text.parse::<super::Controller>(), Err(NoController));
}
