//! What can be asked and told over HTTP: metrics and probes, and on the control socket announcements.

use std::borrow::Cow;
use std::convert::Infallible;
use std::fs::{self, Permissions};
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use arp_proxy::answer::Tag;
use arp_proxy::{AnnounceError, Announcer, Metrics, State};
use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener, UnixStream};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

const OPENMETRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
/// Connections accepted, out of which a loop that cannot accept pauses: without descriptors it would spin.
const PAUSE: Duration = Duration::from_millis(100);

/// Where the answers come from.
#[derive(Clone)]
pub(crate) struct Service {
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) state: watch::Receiver<State>,
    /// None where only reading is allowed.
    pub(crate) announcer: Option<Announcer>,
}

/// A Unix socket in the file system, until it is dropped.
pub(crate) struct Control {
    listener: UnixListener,
    path: PathBuf,
}

/// Serves over TCP until `stop`.
pub(crate) async fn serve_tcp(listener: TcpListener, service: Service, stop: CancellationToken) {
    while let Some(accepted) = stop.run_until_cancelled(listener.accept()).await {
        connection(accepted.map(|(stream, _)| stream), &service, &stop).await;
    }
}

pub(crate) async fn bind_tcp(address: SocketAddr) -> anyhow::Result<TcpListener> {
    TcpListener::bind(address)
        .await
        .with_context(|| format!("cannot serve metrics on {address}"))
}

impl Control {
    /// Makes the socket, in place of one that a process that is gone has left.
    pub(crate) fn bind(path: &Path) -> anyhow::Result<Self> {
        let name = || format!("cannot serve on the control socket {}", path.display());
        let listener = match UnixListener::bind(path) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse && is_left_over(path) => {
                fs::remove_file(path).with_context(name)?;
                UnixListener::bind(path)
            }
            bound => bound,
        };
        let listener = listener.with_context(name)?;
        let path = path.to_owned();
        let control = Self { listener, path };
        // Announcing speaks in the gateway's name. Who connects before this line is turned away by `serve`.
        fs::set_permissions(&control.path, Permissions::from_mode(0o600)).with_context(name)?;
        Ok(control)
    }

    /// Serves until `stop`.
    pub(crate) async fn serve(self, service: Service, stop: CancellationToken) {
        while let Some(accepted) = stop.run_until_cancelled(self.listener.accept()).await {
            let accepted = accepted.and_then(|(stream, _)| self.admit(stream));
            connection(accepted, &service, &stop).await;
        }
    }

    /// Turns away who is neither the socket's owner nor root.
    fn admit(&self, stream: UnixStream) -> io::Result<UnixStream> {
        let (peer, owner) = (stream.peer_cred()?.uid(), fs::metadata(&self.path)?.uid());
        if peer == owner || peer == 0 {
            return Ok(stream);
        }
        let message = format!("user {peer} has no business on {}", self.path.display());
        Err(io::Error::new(io::ErrorKind::PermissionDenied, message))
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        // Gone already is as good.
        let _ = fs::remove_file(&self.path);
    }
}

/// A socket that nobody serves any more, as opposed to another process's, or a file.
fn is_left_over(path: &Path) -> bool {
    // A file that is no socket refuses connections too.
    let is_socket = fs::symlink_metadata(path).is_ok_and(|found| found.file_type().is_socket());
    is_socket
        && std::os::unix::net::UnixStream::connect(path)
            .is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused)
}

async fn connection<S>(accepted: io::Result<S>, service: &Service, stop: &CancellationToken)
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let stream = match accepted {
        Ok(stream) => stream,
        Err(error) => {
            tracing::warn!(%error, "connection not accepted");
            tokio::time::sleep(PAUSE).await;
            return;
        }
    };
    let service = service.clone();
    let service = service_fn(move |request| {
        let service = service.clone();
        async move { Ok::<_, Infallible>(service.answer(&request).await) }
    });
    let serving = http1::Builder::new()
        .timer(TokioTimer::new())
        .serve_connection(TokioIo::new(stream), service);
    let stop = stop.clone();
    tokio::spawn(async move {
        if let Some(Err(error)) = stop.run_until_cancelled(serving).await {
            tracing::debug!(%error, "connection ended badly");
        }
    });
}

impl Service {
    async fn answer(&self, request: &Request<Incoming>) -> Response<Full<Bytes>> {
        let query = request.uri().query().unwrap_or_default();
        match (request.method(), request.uri().path()) {
            (&Method::GET, "/healthz") => text(StatusCode::OK, "alive\n"),
            (&Method::GET, "/readyz") => self.readiness(),
            (&Method::GET, "/metrics") => self.metrics(),
            (&Method::POST, "/announce") => match &self.announcer {
                Some(announcer) => announce(announcer, query).await,
                None => text(StatusCode::FORBIDDEN, "only on the control socket\n"),
            },
            (_, "/healthz" | "/readyz" | "/metrics") => {
                text(StatusCode::METHOD_NOT_ALLOWED, "only GET\n")
            }
            (_, "/announce") => text(StatusCode::METHOD_NOT_ALLOWED, "only POST\n"),
            _ => text(
                StatusCode::NOT_FOUND,
                "try GET /metrics, /healthz, /readyz or POST /announce?interface=NAME\n",
            ),
        }
    }

    fn readiness(&self) -> Response<Full<Bytes>> {
        let state = self.state.borrow().clone();
        if !state.listed {
            text(
                StatusCode::SERVICE_UNAVAILABLE,
                "not ready: the interfaces are not listed yet\n",
            )
        } else if !state.ovs_known {
            text(
                StatusCode::SERVICE_UNAVAILABLE,
                "not ready: Open vSwitch has not told its interfaces yet\n",
            )
        } else {
            let interfaces: Vec<String> = state.watched.into_iter().collect();
            text(
                StatusCode::OK,
                format!("ready: watching {}\n", interfaces.join(" ")),
            )
        }
    }

    fn metrics(&self) -> Response<Full<Bytes>> {
        match self.metrics.expose() {
            Ok(metrics) => {
                let mut response = text(StatusCode::OK, metrics);
                response
                    .headers_mut()
                    .insert(CONTENT_TYPE, HeaderValue::from_static(OPENMETRICS));
                response
            }
            Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")),
        }
    }
}

async fn announce(announcer: &Announcer, query: &str) -> Response<Full<Bytes>> {
    let (interface, tag) = match parse(query) {
        Ok(parsed) => parsed,
        Err(wrong) => return text(StatusCode::BAD_REQUEST, wrong),
    };
    match announcer.announce(interface, tag).await {
        Ok(()) => text(StatusCode::OK, format!("announced on {interface}\n")),
        Err(error) => {
            let status = match error {
                AnnounceError::NotWatched(_) => StatusCode::NOT_FOUND,
                AnnounceError::Send { down: true, .. } => StatusCode::CONFLICT,
                AnnounceError::Send { .. } => StatusCode::INTERNAL_SERVER_ERROR,
                AnnounceError::Stopped => StatusCode::SERVICE_UNAVAILABLE,
            };
            let error = anyhow::Error::new(error);
            text(status, format!("{error:#}\n"))
        }
    }
}

/// `interface=NAME` and perhaps `vlan=ID`, as they are: no name that a shell takes without quotes needs escaping.
fn parse(query: &str) -> Result<(&str, Option<Tag>), String> {
    let (mut interface, mut tag) = (None, None);
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        match pair.split_once('=') {
            Some(("interface", name)) if !name.is_empty() => interface = Some(name),
            Some(("vlan", id)) => {
                let id = id.parse().ok().and_then(Tag::vlan);
                tag =
                    Some(id.ok_or_else(|| format!("{pair}: a VLAN is a number from 1 to 4094\n"))?);
            }
            _ => {
                return Err(format!(
                    "{pair}: only interface=NAME and vlan=ID are known\n"
                ));
            }
        }
    }
    let interface = interface.ok_or("which interface? /announce?interface=NAME\n")?;
    Ok((interface, tag))
}

fn text(status: StatusCode, body: impl Into<Cow<'static, str>>) -> Response<Full<Bytes>> {
    let body = match body.into() {
        Cow::Borrowed(body) => Bytes::from_static(body.as_bytes()),
        Cow::Owned(body) => Bytes::from(body),
    };
    let mut response = Response::new(Full::new(body));
    *response.status_mut() = status;
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn announcements_are_asked_for_by_interface_and_vlan() {
        let tagged = Tag::vlan(100);
        assert_eq!(parse("interface=tap0"), Ok(("tap0", None)));
        assert_eq!(parse("interface=tap0&vlan=100"), Ok(("tap0", tagged)));
        assert_eq!(parse("vlan=100&interface=tap0"), Ok(("tap0", tagged)));
        for wrong in [
            "",
            "interface=",
            "vlan=1",
            "interface=tap0&vlan=0",
            "interface=tap0&vlan=4095",
            "interface=tap0&vlan=x",
            "interface=tap0&all",
        ] {
            assert!(parse(wrong).is_err(), "{wrong:?}");
        }
    }

    #[tokio::test]
    async fn a_control_socket_is_private_and_leaves_no_trace() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("control");
        let control = Control::bind(&path).unwrap();
        let mode = fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        drop(control);
        assert!(!path.exists());
    }

    #[tokio::test]
    async fn a_control_socket_replaces_a_dead_one_only() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("control");
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        let living = Control::bind(&path).unwrap();
        assert!(Control::bind(&path).is_err());
        drop(living);
        fs::write(&path, "precious").unwrap();
        assert!(Control::bind(&path).is_err());
        assert_eq!(fs::read_to_string(&path).unwrap(), "precious");
    }
}
