pub(crate) mod authority;
mod gate;
mod handover;
mod liars;
mod opening;
mod streams;
mod tls;
mod turns;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use ::handover::{GatePolicy, VmName};
use futures::StreamExt;
use hyper_util::rt::TokioIo;
use node_hooks_api::agent as wire;
use node_hooks_api::agent::agents_client::AgentsClient;
use node_hooks_api::agent::from_agent::Message as Told;
use node_hooks_api::agent::to_agent::Message;
use prometheus_client::encoding::text;
use prometheus_client::registry::Registry;
use tokio::io::DuplexStream;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::{CancellationToken, DropGuard};
use tonic::transport::{Channel, Server};
use tonic::{Status, Streaming};

use super::hub::{Front, Hub};
use super::listen::Identified;
use super::metrics::AgentMetrics;
use super::service::{Peer, Service};
use super::time::Nanos;
use super::{Post, Standing, VmView};

/// The controller's side, with nothing behind it.
struct Lab {
    hub: Arc<Hub>,
    front: Arc<Noted>,
    registry: Arc<Registry>,
    metrics: AgentMetrics,
    door: Door,
    stop: CancellationToken,
    _stopped: DropGuard,
}

/// Where agents come in, over gRPC and HTTP/2 but without TCP and TLS.
pub(crate) struct Door(mpsc::Sender<Identified<DuplexStream>>);

/// What the hub asked of the rest of the controller.
#[derive(Default)]
struct Noted {
    woken: Mutex<Vec<VmName>>,
    policy: Mutex<GatePolicy>,
}

/// An agent that does what the test says.
pub(crate) struct Agent {
    told: mpsc::Sender<wire::FromAgent>,
    heard: Streaming<wire::ToAgent>,
}

impl Front for Noted {
    fn wake(&self, vm: &VmName) {
        self.woken.lock().unwrap().push(vm.clone());
    }

    fn gate(&self, _: &VmName) -> GatePolicy {
        *self.policy.lock().unwrap()
    }
}

// === impl Lab ===

impl Lab {
    /// A controller that leads.
    fn new() -> Self {
        let lab = Self::standing_by();
        lab.hub.lead(true);
        lab
    }

    fn standing_by() -> Self {
        let front = Arc::new(Noted::default());
        let mut registry = Registry::with_prefix("segue");
        let metrics = AgentMetrics::registered(&mut registry);
        let hub = Arc::new(Hub::new(front.clone(), metrics.clone()));
        let stop = CancellationToken::new();
        let door = Door::open(&hub, &metrics, &stop);
        let (gate, token) = (hub.clone(), stop.clone());
        tokio::spawn(async move { gate.watch_gate(&token).await });
        Self {
            hub,
            front,
            registry: Arc::new(registry),
            metrics,
            door,
            _stopped: stop.clone().drop_guard(),
            stop,
        }
    }

    /// A connection whose certificate is this node's.
    async fn connect(&self, node: &str) -> Channel {
        self.door.connect(node).await
    }

    /// An agent of this node, welcome.
    async fn agent(&self, node: &str) -> Agent {
        self.door.agent(node).await
    }

    async fn attach(&self, node: &str, first: Told) -> Result<Agent, Status> {
        attach(self.connect(node).await, first).await
    }

    fn stand(&self, standing: &Standing) {
        let view = VmView::default();
        self.hub
            .stand(&vm(), Some(standing.clone()), Some("n1"), &view);
    }

    /// The handover is over, with the guest on this node.
    fn over(&self, guest_on: &str) {
        self.hub
            .stand(&vm(), None, Some(guest_on), &VmView::default());
    }

    /// Waits until the VM is to be looked at.
    async fn woken(&self) {
        until(|| std::mem::take(&mut *self.front.woken.lock().unwrap()).contains(&vm())).await;
    }

    /// Waits until a metric has this value.
    async fn metric(&self, line: &str) {
        until(|| self.exposes(line)).await;
    }

    fn exposes(&self, line: &str) -> bool {
        let mut text = String::new();
        text::encode(&mut text, &self.registry).unwrap();
        text.lines().any(|found| found == line)
    }
}

// === impl Door ===

impl Door {
    pub(crate) fn open(hub: &Arc<Hub>, metrics: &AgentMetrics, stop: &CancellationToken) -> Self {
        let (connections, accepted) = mpsc::channel(4);
        let service = Service {
            hub: hub.clone(),
            metrics: metrics.clone(),
            stop: stop.clone(),
        };
        let accepted = ReceiverStream::new(accepted).map(Ok::<_, std::io::Error>);
        tokio::spawn(Server::builder().serve_with_incoming(service.server(), accepted));
        Self(connections)
    }

    async fn connect(&self, node: &str) -> Channel {
        let (ours, theirs) = tokio::io::duplex(64 << 10);
        let peer = Peer { node: node.into() };
        let accepted = Identified {
            stream: theirs,
            peer,
        };
        self.0.send(accepted).await.unwrap();
        let ours = Mutex::new(Some(ours));
        let connector = tower::service_fn(move |_| {
            let ours = ours.lock().unwrap().take();
            let ours = ours.map(TokioIo::new);
            async move { ours.ok_or(std::io::Error::from(std::io::ErrorKind::NotConnected)) }
        });
        let endpoint = tonic::transport::Endpoint::from_static("http://controller");
        endpoint.connect_with_connector(connector).await.unwrap()
    }

    /// An agent of this node, welcome.
    pub(crate) async fn agent(&self, node: &str) -> Agent {
        let channel = self.connect(node).await;
        let mut agent = attach(channel, hello(node)).await.unwrap();
        let welcome = agent.next().await;
        assert!(matches!(welcome, Message::Welcome(_)), "{welcome:?}");
        agent
    }
}

/// Waits for a condition.
async fn until(mut condition: impl FnMut() -> bool) {
    let begin = std::time::Instant::now();
    while !condition() {
        assert!(
            begin.elapsed() < Duration::from_secs(10),
            "it never happens"
        );
        tokio::task::yield_now().await;
    }
}

async fn attach(channel: Channel, first: Told) -> Result<Agent, Status> {
    let (told, queue) = mpsc::channel(16);
    told.send(from_agent(first)).await.unwrap();
    let mut client = AgentsClient::new(channel);
    let heard = client.attach(ReceiverStream::new(queue)).await?;
    Ok(Agent {
        told,
        heard: heard.into_inner(),
    })
}

// === impl Agent ===

impl Agent {
    pub(crate) async fn say(&self, told: Told) {
        self.told.send(from_agent(told)).await.unwrap();
    }

    /// The next that is no heartbeat of the controller's; those are answered.
    pub(crate) async fn next(&mut self) -> Message {
        loop {
            match self.receive().await.unwrap() {
                Message::Heartbeat(beat) if !beat.answer => {
                    let answer = wire::Heartbeat {
                        answer: true,
                        ..beat
                    };
                    self.say(Told::Heartbeat(answer)).await;
                }
                message => return message,
            }
        }
    }

    async fn receive(&mut self) -> Result<Message, Status> {
        let patience = Duration::from_mins(5);
        let next = tokio::time::timeout(patience, self.heard.message()).await;
        let message = next.expect("the controller says nothing")?;
        let message = message.ok_or_else(|| Status::ok("ended"))?;
        Ok(message.message.expect("an empty message"))
    }

    /// The status that ends the stream.
    async fn end(&mut self) -> Status {
        loop {
            if let Err(status) = self.receive().await {
                return status;
            }
        }
    }

    /// All that the controller had to say by the time it had taken in what was said so far.
    pub(crate) async fn all_said(&mut self) -> Vec<Message> {
        let question = wire::Heartbeat {
            number: 4_711,
            answer: false,
        };
        self.say(Told::Heartbeat(question)).await;
        let mut said = Vec::new();
        loop {
            match self.next().await {
                Message::Heartbeat(beat) if beat.number == 4_711 => return said,
                message => said.push(message),
            }
        }
    }

    /// The next, which is an order to open.
    async fn open(&mut self) -> wire::Open {
        match self.next().await {
            Message::Open(open) => open,
            other => panic!("no Open but {other:?}"),
        }
    }
}

// === What is said ===

fn from_agent(message: Told) -> wire::FromAgent {
    wire::FromAgent {
        message: Some(message),
    }
}

fn hello(node: &str) -> Told {
    Told::Hello(wire::Hello {
        revision: node_hooks_api::REVISION,
        version: "test".into(),
        node: node.into(),
    })
}

fn signal(kind: wire::signal::Kind, source: wire::signal::Source) -> wire::Signal {
    wire::Signal {
        id: Some(id()),
        kind: kind.into(),
        source: source.into(),
        at_ns: Nanos::now().0 - 200_000,
        seen_at_ns: Nanos::now().0 - 100_000,
        port: String::new(),
    }
}

fn paused() -> Told {
    use wire::signal::{Kind, Source};
    Told::Signal(signal(Kind::Paused, Source::Libvirt))
}

fn resumed() -> Told {
    use wire::signal::{Kind, Source};
    Told::Signal(signal(Kind::Resumed, Source::Libvirt))
}

// === What is armed ===

fn vm() -> VmName {
    VmName::new("tenant", "w0")
}

fn id() -> wire::HandoverId {
    wire::HandoverId {
        namespace: "tenant".into(),
        vm: "w0".into(),
        migration_uid: "m-1".into(),
        epoch: 7,
    }
}

fn ports() -> Vec<wire::Port> {
    vec![wire::Port {
        name: "w0.tenant".into(),
        mac: "0a:00:00:00:00:01".into(),
        addresses: vec!["10.0.0.1".into()],
    }]
}

/// The handover of w0 from n1 to n2.
fn standing(prepared: bool) -> Standing {
    let post = |node: &str| Post {
        node: node.into(),
        ports: ports(),
    };
    Standing {
        vm: vm(),
        migration: "m-1".into(),
        epoch: 7,
        source: post("n1"),
        target: post("n2"),
        prepared,
        paused: false,
    }
}

/// By kind, how often each was said.
fn counted(said: &[Message]) -> BTreeMap<&'static str, usize> {
    let mut counts = BTreeMap::new();
    for message in said {
        let kind = match message {
            Message::Welcome(_) => "welcome",
            Message::Heartbeat(_) => "heartbeat",
            Message::Arm(_) => "arm",
            Message::Disarm(_) => "disarm",
            Message::Open(_) => "open",
            Message::Announce(_) => "announce",
            Message::GateAnswer(_) => "answer",
        };
        *counts.entry(kind).or_default() += 1;
    }
    counts
}
