//! Connections of agents, and who they are.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use anyhow::Context as _;
use futures::StreamExt;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Handle;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::Server;
use tonic::transport::server::Connected;

use super::hub::Hub;
use super::metrics::{AgentMetrics, Refusal};
use super::service::{Peer, Service};
use super::tls::{Certificates, node_of};
use crate::http;

/// How long a handshake may take.
const HANDSHAKE: Duration = Duration::from_secs(5);
/// How often a connection is asked whether it is alive, and how long it has to answer.
const KEEPALIVE: Duration = Duration::from_secs(10);
/// How many handshakes may be under way. Strangers can begin them, and each costs this controller a signature before it
/// knows who is there; agents that all come at once take a few milliseconds each.
const HANDSHAKES: usize = 16;

/// Where agents connect to.
pub(crate) struct Endpoint {
    listener: TcpListener,
    certificates: Arc<Certificates>,
    /// Where certificates are read and hands are shaken: not on the thread that serves agents, where a pause would wait
    /// for whatever strangers have begun.
    aside: Handle,
}

/// The way in, for those who have shaken hands.
#[derive(Clone)]
struct Entrance {
    identified: mpsc::Sender<Identified<TlsStream<TcpStream>>>,
    metrics: AgentMetrics,
    stop: CancellationToken,
}

/// A connection with the name of who is at its other end.
pub(super) struct Identified<S> {
    pub(super) stream: S,
    pub(super) peer: Peer,
}

impl Endpoint {
    /// Takes the address. Hands are shaken in the runtime that this is called in.
    ///
    /// # Errors
    ///
    /// It cannot be had.
    pub(crate) async fn bind(
        address: SocketAddr,
        certificates: Certificates,
    ) -> anyhow::Result<Self> {
        let listener = http::bind(address)
            .await
            .with_context(|| format!("cannot listen for agents on {address} (--agents)"))?;
        Ok(Self {
            listener,
            certificates: Arc::new(certificates),
            aside: Handle::current(),
        })
    }

    pub(crate) fn address(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// What to shake hands with now.
    async fn config(&self) -> anyhow::Result<Arc<rustls::ServerConfig>> {
        let certificates = self.certificates.clone();
        let reading = self.aside.spawn_blocking(move || certificates.config());
        Ok(reading.await??)
    }
}

impl Entrance {
    /// Shakes hands with who is at the other end, and lets in whom it may.
    async fn enter(
        self,
        stream: TcpStream,
        address: SocketAddr,
        config: Arc<rustls::ServerConfig>,
        slot: Option<OwnedSemaphorePermit>,
    ) {
        let greeting = tokio::time::timeout(HANDSHAKE, identify(stream, config));
        match self.stop.run_until_cancelled(greeting).await {
            Some(Ok(Ok(connection))) => drop(self.identified.send(connection).await),
            Some(Ok(Err(reason))) => {
                self.metrics.refused(reason);
                tracing::debug!(%address, ?reason, "connection refused");
            }
            Some(Err(_)) => self.metrics.refused(Refusal::Handshake),
            None => {}
        }
        drop(slot);
    }
}

/// Serves agents until `stop`.
pub(crate) async fn listen(
    endpoint: Endpoint,
    hub: Arc<Hub>,
    metrics: AgentMetrics,
    stop: CancellationToken,
) {
    let (identified, connections) = mpsc::channel(16);
    let service = Service {
        hub,
        metrics: metrics.clone(),
        stop: stop.clone(),
    };
    let entrance = Entrance {
        identified,
        metrics,
        stop: stop.clone(),
    };
    let accepting = accept(endpoint, entrance);
    let serving = Server::builder()
        .max_concurrent_streams(4)
        // For connections without a stream: those with one have heartbeats.
        .http2_keepalive_interval(Some(KEEPALIVE))
        .http2_keepalive_timeout(Some(KEEPALIVE))
        .serve_with_incoming_shutdown(
            service.server(),
            ReceiverStream::new(connections).map(Ok::<_, io::Error>),
            stop.cancelled_owned(),
        );
    let (served, ()) = tokio::join!(serving, accepting);
    if let Err(error) = served {
        let error = &error as &dyn std::error::Error;
        tracing::warn!(error, "agents' connections ended badly");
    }
}

async fn accept(endpoint: Endpoint, entrance: Entrance) {
    let slots = Arc::new(Semaphore::new(HANDSHAKES));
    let stop = entrance.stop.clone();
    let mut said = false;
    loop {
        let next = async {
            // Closed it is never.
            let slot = slots.clone().acquire_owned().await.ok();
            (slot, endpoint.listener.accept().await)
        };
        let Some((slot, accepted)) = stop.run_until_cancelled(next).await else {
            return;
        };
        let (stream, address) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "agent's connection not accepted");
                // Out of descriptors, most likely: without a pause the loop would spin.
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let Some(config) = stop.run_until_cancelled(endpoint.config()).await else {
            return;
        };
        let config = match config {
            Ok(config) => config,
            Err(error) => {
                entrance.metrics.refused(Refusal::NoCertificate);
                if !std::mem::replace(&mut said, true) {
                    let error = error.as_ref() as &dyn std::error::Error;
                    tracing::warn!(error, "no agent is let in until there is a certificate");
                }
                continue;
            }
        };
        let entering = entrance.clone().enter(stream, address, config, slot);
        endpoint.aside.spawn(entering);
    }
}

/// Shakes hands, and finds out who it is.
async fn identify(
    stream: TcpStream,
    config: Arc<rustls::ServerConfig>,
) -> Result<Identified<TlsStream<TcpStream>>, Refusal> {
    // What is said here is short, and in a hurry.
    let nodelay = stream.set_nodelay(true);
    nodelay.map_err(|_| Refusal::Handshake)?;
    let acceptor = TlsAcceptor::from(config);
    let stream = acceptor.accept(stream).await;
    let stream = stream.map_err(|_| Refusal::Handshake)?;
    let (_, session) = stream.get_ref();
    let own = session.peer_certificates().and_then(<[_]>::first);
    let node = own.and_then(node_of).ok_or(Refusal::NoNode)?;
    Ok(Identified {
        stream,
        peer: Peer { node: node.into() },
    })
}

// === impl Identified ===

impl<S> Connected for Identified<S> {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        self.peer.clone()
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Identified<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Identified<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
