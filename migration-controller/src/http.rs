//! `/metrics`, `/healthz` and `/readyz`.

use std::convert::Infallible;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;

use anyhow::Context;
use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::CONTENT_TYPE;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

/// Where the answers come from.
pub(crate) trait Probe: Send + Sync + 'static {
    /// The exposition of the metrics.
    fn metrics(&self) -> Result<String, String>;

    /// What the controller is, if it is ready; what keeps it from being ready, if not.
    fn readiness(&self) -> Result<String, String>;
}

/// A server that is bound, and not serving yet.
pub(crate) struct Server {
    listener: TcpListener,
}

impl Server {
    pub(crate) async fn bind(address: SocketAddr) -> anyhow::Result<Self> {
        let listener = bind(address).await;
        let listener =
            listener.with_context(|| format!("cannot serve metrics and probes on {address}"))?;
        Ok(Self { listener })
    }

    pub(crate) fn address(&self) -> std::io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Serves until `stop`.
    pub(crate) async fn serve(self, probe: Arc<impl Probe>, stop: CancellationToken) {
        while let Some(accepted) = stop.run_until_cancelled(self.listener.accept()).await {
            let stream = match accepted {
                Ok((stream, _)) => stream,
                Err(error) => {
                    tracing::warn!(%error, "connection not accepted");
                    // Out of descriptors, most likely: without a pause the loop would spin.
                    tokio::time::sleep(std::time::Duration::from_millis(100)).await;
                    continue;
                }
            };
            let probe = probe.clone();
            let service = service_fn(move |request| {
                let response = answer(probe.as_ref(), &request);
                async move { Ok::<_, Infallible>(response) }
            });
            let connection = http1::Builder::new()
                .timer(TokioTimer::new())
                .serve_connection(TokioIo::new(stream), service);
            let stop = stop.clone();
            tokio::spawn(async move {
                if let Some(Err(error)) = stop.run_until_cancelled(connection).await {
                    tracing::debug!(%error, "connection ended badly");
                }
            });
        }
    }
}

/// Listens on an address. `[::]` means every address there is; where the kernel has no IPv6, that is
/// IPv4's.
///
/// # Errors
///
/// It cannot be had.
pub(crate) async fn bind(address: SocketAddr) -> std::io::Result<TcpListener> {
    match TcpListener::bind(address).await {
        Err(error) if has_no_ipv6(address, &error) => {
            TcpListener::bind((Ipv4Addr::UNSPECIFIED, address.port())).await
        }
        bound => bound,
    }
}

fn has_no_ipv6(address: SocketAddr, error: &std::io::Error) -> bool {
    let unspecified = address.is_ipv6() && address.ip().is_unspecified();
    unspecified
        && (error.raw_os_error() == Some(libc::EAFNOSUPPORT)
            || error.kind() == std::io::ErrorKind::AddrNotAvailable)
}

fn answer(probe: &impl Probe, request: &Request<Incoming>) -> Response<Full<Bytes>> {
    if request.method() != Method::GET {
        return text(StatusCode::METHOD_NOT_ALLOWED, "only GET\n".to_owned());
    }
    match request.uri().path() {
        "/healthz" => text(StatusCode::OK, "alive\n".to_owned()),
        "/readyz" => match probe.readiness() {
            Ok(role) => text(StatusCode::OK, format!("ready: {role}\n")),
            Err(reason) => text(
                StatusCode::SERVICE_UNAVAILABLE,
                format!("not ready: {reason}\n"),
            ),
        },
        "/metrics" => match probe.metrics() {
            Ok(metrics) => {
                let mut response = text(StatusCode::OK, metrics);
                let format = "application/openmetrics-text; version=1.0.0; charset=utf-8";
                response.headers_mut().insert(
                    CONTENT_TYPE,
                    hyper::header::HeaderValue::from_static(format),
                );
                response
            }
            Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")),
        },
        _ => text(
            StatusCode::NOT_FOUND,
            "try /metrics, /healthz or /readyz\n".to_owned(),
        ),
    }
}

fn text(status: StatusCode, body: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    response
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpStream;

    use super::*;

    struct Fixed(Result<String, String>);

    impl Probe for Fixed {
        fn metrics(&self) -> Result<String, String> {
            Ok("# EOF\n".to_owned())
        }

        fn readiness(&self) -> Result<String, String> {
            self.0.clone()
        }
    }

    async fn ask(probe: Fixed, request: &str) -> String {
        let server = Server::bind(SocketAddr::from(([127, 0, 0, 1], 0)))
            .await
            .unwrap();
        let (address, stop) = (server.address().unwrap(), CancellationToken::new());
        let serving = tokio::spawn(server.serve(Arc::new(probe), stop.clone()));
        let mut stream = TcpStream::connect(address).await.unwrap();
        let request = format!("{request} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        stop.cancel();
        serving.await.unwrap();
        answer
    }

    #[tokio::test]
    async fn readiness_says_what_is_missing() {
        let ready = ask(Fixed(Ok("leading".into())), "GET /readyz").await;
        assert!(
            ready.starts_with("HTTP/1.1 200") && ready.ends_with("ready: leading\n"),
            "{ready}"
        );
        let missing = ask(Fixed(Err("Pod: not listed yet".into())), "GET /readyz").await;
        assert!(missing.starts_with("HTTP/1.1 503"), "{missing}");
        assert!(
            missing.ends_with("not ready: Pod: not listed yet\n"),
            "{missing}"
        );
    }

    #[tokio::test]
    async fn being_unready_is_not_being_dead() {
        let alive = ask(Fixed(Err("Pod: not listed yet".into())), "GET /healthz").await;
        assert!(alive.starts_with("HTTP/1.1 200"), "{alive}");
    }

    #[tokio::test]
    async fn metrics_come_as_openmetrics() {
        let metrics = ask(Fixed(Ok(String::new())), "GET /metrics").await;
        assert!(
            metrics.contains("content-type: application/openmetrics-text"),
            "{metrics}"
        );
        assert!(metrics.ends_with("# EOF\n"), "{metrics}");
    }

    #[tokio::test]
    async fn other_requests_are_told_what_there_is() {
        let unknown = ask(Fixed(Ok(String::new())), "GET /").await;
        assert!(
            unknown.starts_with("HTTP/1.1 404") && unknown.contains("/metrics"),
            "{unknown}"
        );
        let posted = ask(Fixed(Ok(String::new())), "POST /metrics").await;
        assert!(posted.starts_with("HTTP/1.1 405"), "{posted}");
    }
}
