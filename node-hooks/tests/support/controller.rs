//! A controller that is real but for its mind: TCP, TLS, HTTP/2 and gRPC, and what a test says.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use hyper::server::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::service::TowerToHyperService;
use node_hooks_api::REVISION;
use node_hooks_api::agent::agents_server::{Agents, AgentsServer};
use node_hooks_api::agent::{FromAgent, Hello, ToAgent, Welcome, from_agent, to_agent};
use rustls::ServerConfig;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::{CancellationToken, DropGuard};
use tonic::{Request, Response, Status, Streaming};

/// Nothing here takes long; a test that hangs is to fail.
pub(crate) const SOON: Duration = Duration::from_secs(20);

/// A controller that does what a test says.
pub(crate) struct Controller {
    pub(crate) address: SocketAddr,
    pub(crate) leads: Arc<AtomicBool>,
    pub(crate) streams: mpsc::Receiver<Attachment>,
    pub(crate) connections: watch::Receiver<usize>,
    _running: DropGuard,
}

/// A stream as the controller has it.
pub(crate) struct Attachment {
    inbound: Streaming<FromAgent>,
    pub(crate) outbound: mpsc::Sender<Result<ToAgent, Status>>,
}

struct Service {
    leads: Arc<AtomicBool>,
    streams: mpsc::Sender<Attachment>,
}

#[tonic::async_trait]
impl Agents for Service {
    type AttachStream = ReceiverStream<Result<ToAgent, Status>>;

    async fn attach(
        &self,
        request: Request<Streaming<FromAgent>>,
    ) -> Result<Response<Self::AttachStream>, Status> {
        if !self.leads.load(Ordering::SeqCst) {
            return Err(Status::unavailable("does not lead"));
        }
        let (outbound, receiver) = mpsc::channel(16);
        let inbound = request.into_inner();
        let attachment = Attachment { inbound, outbound };
        let sent = self.streams.send(attachment).await;
        sent.map_err(|_| Status::unavailable("the test is over"))?;
        Ok(Response::new(ReceiverStream::new(receiver)))
    }
}

impl Controller {
    pub(crate) async fn start(tls: Arc<ServerConfig>, leads: bool) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let leads = Arc::new(AtomicBool::new(leads));
        let (sender, streams) = mpsc::channel(16);
        let (count, connections) = watch::channel(0);
        let service = AgentsServer::new(Service {
            leads: leads.clone(),
            streams: sender,
        });
        let stop = CancellationToken::new();
        let running = stop.clone().drop_guard();
        tokio::spawn(async move {
            let mut served = JoinSet::new();
            while let Some(Ok((tcp, _))) = stop.run_until_cancelled(listener.accept()).await {
                count.send_modify(|count| *count += 1);
                let acceptor = TlsAcceptor::from(tls.clone());
                let service = TowerToHyperService::new(service.clone());
                served.spawn(async move {
                    let Ok(tls) = acceptor.accept(tcp).await else {
                        return;
                    };
                    let serving = http2::Builder::new(TokioExecutor::new())
                        .serve_connection(TokioIo::new(tls), service);
                    let _ = serving.await;
                });
            }
        });
        Self {
            address,
            leads,
            streams,
            connections,
            _running: running,
        }
    }

    pub(crate) async fn attachment(&mut self) -> Attachment {
        timeout(SOON, self.streams.recv()).await.unwrap().unwrap()
    }

    /// Takes the next agent's stream and welcomes it.
    pub(crate) async fn welcome(&mut self, heartbeat_ms: u32) -> (Attachment, Hello) {
        let mut attachment = self.attachment().await;
        let from_agent::Message::Hello(hello) = attachment.next().await.unwrap() else {
            panic!("an agent's first message is its hello");
        };
        let welcome = Welcome {
            revision: REVISION,
            version: "9.9.9".into(),
            heartbeat_ms,
        };
        attachment.say(to_agent::Message::Welcome(welcome)).await;
        (attachment, hello)
    }
}

impl Attachment {
    pub(crate) async fn next(&mut self) -> Option<from_agent::Message> {
        let next = timeout(SOON, self.inbound.message()).await.unwrap();
        next.ok().flatten()?.message
    }

    /// The next message that is no heartbeat.
    pub(crate) async fn next_word(&mut self) -> Option<from_agent::Message> {
        loop {
            match self.next().await {
                Some(from_agent::Message::Heartbeat(_)) => {}
                other => return other,
            }
        }
    }

    pub(crate) async fn say(&self, message: to_agent::Message) {
        let message = Some(message);
        self.outbound.send(Ok(ToAgent { message })).await.unwrap();
    }
}
