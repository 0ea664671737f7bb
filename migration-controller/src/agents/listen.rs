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
use tokio::sync::{Semaphore, mpsc};
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
/// How many handshakes may be under way: strangers can begin them.
const HANDSHAKES: usize = 256;

/// Where agents connect to.
pub(crate) struct Endpoint {
    listener: TcpListener,
    certificates: Arc<Certificates>,
}

/// A connection with the name of who is at its other end.
pub(super) struct Identified<S> {
    pub(super) stream: S,
    pub(super) peer: Peer,
}

impl Endpoint {
    /// Takes the address.
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
        })
    }

    pub(crate) fn address(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
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
    let accepting = accept(endpoint, identified, metrics, stop.clone());
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

async fn accept(
    endpoint: Endpoint,
    identified: mpsc::Sender<Identified<TlsStream<TcpStream>>>,
    metrics: AgentMetrics,
    stop: CancellationToken,
) {
    let slots = Arc::new(Semaphore::new(HANDSHAKES));
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
        let config = match endpoint.certificates.config() {
            Ok(config) => config,
            Err(error) => {
                metrics.refused(Refusal::NoCertificate);
                if !std::mem::replace(&mut said, true) {
                    let error = &error as &dyn std::error::Error;
                    tracing::warn!(error, "no agent is let in until there is a certificate");
                }
                continue;
            }
        };
        let (identified, metrics) = (identified.clone(), metrics.clone());
        let stop = stop.clone();
        tokio::spawn(async move {
            let greeting = tokio::time::timeout(HANDSHAKE, identify(stream, config));
            match stop.run_until_cancelled(greeting).await {
                Some(Ok(Ok(connection))) => drop(identified.send(connection).await),
                Some(Ok(Err(reason))) => {
                    metrics.refused(reason);
                    tracing::debug!(%address, ?reason, "connection refused");
                }
                Some(Err(_)) => metrics.refused(Refusal::Handshake),
                None => {}
            }
            drop(slot);
        });
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
