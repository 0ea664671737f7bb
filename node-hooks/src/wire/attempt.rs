//! One attempt to reach a controller at one address.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use node_hooks_api::OLDEST;
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use thiserror::Error;
use tokio::net::{TcpStream, lookup_host};
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tonic::{Code, Status};

use super::Controller;

/// How long a name may take.
const RESOLVE: Duration = Duration::from_secs(2);
/// How long TCP may take, and TLS after it: a second is a long way within a cluster, and while one
/// address is tried the leader may be at the next.
const CONNECT: Duration = Duration::from_secs(1);
/// How long a controller may take for its welcome.
pub(super) const WELCOME: Duration = Duration::from_secs(3);

/// Why a controller cannot be had.
#[derive(Debug, Error)]
pub(super) enum AttemptError {
    #[error("the name of {controller} cannot be resolved: is the Service there?")]
    Resolve {
        controller: Controller,
        source: io::Error,
    },
    #[error("no connection")]
    Connect(#[source] io::Error),
    #[error("no TLS: is the certificate by the same authority, and still valid?")]
    Tls(#[source] io::Error),
    #[error("no HTTP/2")]
    Http(#[source] tonic::transport::Error),
    #[error("{what} took longer than {after:?}")]
    TooSlow { what: &'static str, after: Duration },
    #[error("does not lead")]
    NotLeading,
    #[error(
        "speaks revision {theirs} of the protocol, and this agent {OLDEST} or later: upgrade the controller"
    )]
    Revision { theirs: u32 },
    #[error("refuses this agent ({code:?}): {message}")]
    Refused { code: Code, message: String },
    #[error("said something else than a welcome first")]
    NoWelcome,
}

impl From<Status> for AttemptError {
    fn from(status: Status) -> Self {
        match (status.code(), std::error::Error::source(&status)) {
            // What broke on this side has a source, what the controller says has none.
            (code, Some(source)) => Self::Refused {
                code,
                message: crate::chain(source),
            },
            (Code::Unavailable, None) => Self::NotLeading,
            (code, None) => Self::Refused {
                code,
                message: status.message().to_owned(),
            },
        }
    }
}

/// The addresses of a controller, or of several under one name.
pub(super) async fn resolve(controller: &Controller) -> Result<Vec<SocketAddr>, AttemptError> {
    let failed = |source| AttemptError::Resolve {
        controller: controller.clone(),
        source,
    };
    let found = timeout(
        RESOLVE,
        lookup_host((controller.host.as_str(), controller.port)),
    )
    .await;
    let found = found.map_err(|_| failed(io::ErrorKind::TimedOut.into()))?;
    let addresses: Vec<_> = found.map_err(failed)?.collect();
    if addresses.is_empty() {
        return Err(failed(io::ErrorKind::NotFound.into()));
    }
    Ok(addresses)
}

/// A TLS connection to whoever proves to have `name`.
pub(super) async fn connect(
    address: SocketAddr,
    tls: Arc<ClientConfig>,
    name: ServerName<'static>,
) -> Result<TlsStream<TcpStream>, AttemptError> {
    let slow = |what| {
        move |_| AttemptError::TooSlow {
            what,
            after: CONNECT,
        }
    };
    let tcp = timeout(CONNECT, TcpStream::connect(address))
        .await
        .map_err(slow("to connect"))?
        .map_err(AttemptError::Connect)?;
    // A pause is one small packet: it must not wait for the answer to the one before.
    tcp.set_nodelay(true).map_err(AttemptError::Connect)?;
    timeout(CONNECT, TlsConnector::from(tls).connect(name, tcp))
        .await
        .map_err(slow("TLS"))?
        .map_err(AttemptError::Tls)
}
