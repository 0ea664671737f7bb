//! `/metrics`, `/healthz` and `/readyz`.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;

const OPENMETRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
/// The pause of a loop that cannot accept: without descriptors it would spin.
const PAUSE: Duration = Duration::from_millis(100);

/// Where the answers come from.
pub(crate) trait Probe: Send + Sync + 'static {
    /// The exposition of the metrics.
    fn metrics(&self) -> Result<String, String>;

    /// How the agent stands, if it is ready; what keeps it from being ready, if not.
    fn readiness(&self) -> Result<String, String>;
}

pub(crate) async fn bind(address: SocketAddr) -> anyhow::Result<TcpListener> {
    let listener = TcpListener::bind(address).await;
    listener.with_context(|| {
        format!("cannot serve metrics and probes on {address}: give another --listen")
    })
}

/// Serves until `stop`.
pub(crate) async fn serve(listener: TcpListener, probe: Arc<impl Probe>, stop: CancellationToken) {
    while let Some(accepted) = stop.run_until_cancelled(listener.accept()).await {
        match accepted {
            Ok((stream, _)) => drop(tokio::spawn(connection(
                stream,
                probe.clone(),
                stop.clone(),
            ))),
            Err(error) => {
                tracing::warn!(%error, "connection not accepted");
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}

async fn connection(stream: TcpStream, probe: Arc<impl Probe>, stop: CancellationToken) {
    let service = service_fn(move |request| {
        let response = answer(probe.as_ref(), &request);
        async move { Ok::<_, Infallible>(response) }
    });
    let serving = http1::Builder::new()
        .timer(TokioTimer::new())
        .serve_connection(TokioIo::new(stream), service);
    if let Some(Err(error)) = stop.run_until_cancelled(serving).await {
        tracing::debug!(%error, "connection ended badly");
    }
}

fn answer(probe: &impl Probe, request: &Request<Incoming>) -> Response<Full<Bytes>> {
    if request.method() != Method::GET {
        return text(StatusCode::METHOD_NOT_ALLOWED, "only GET\n".to_owned());
    }
    match request.uri().path() {
        "/healthz" => text(StatusCode::OK, "alive\n".to_owned()),
        "/readyz" => match probe.readiness() {
            Ok(state) => text(StatusCode::OK, format!("ready: {state}\n")),
            Err(why) => text(
                StatusCode::SERVICE_UNAVAILABLE,
                format!("not ready: {why}\n"),
            ),
        },
        "/metrics" => match probe.metrics() {
            Ok(metrics) => {
                let mut response = text(StatusCode::OK, metrics);
                let format = HeaderValue::from_static(OPENMETRICS);
                response.headers_mut().insert(CONTENT_TYPE, format);
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
        let listener = bind(([127, 0, 0, 1], 0).into()).await.unwrap();
        let (address, stop) = (listener.local_addr().unwrap(), CancellationToken::new());
        let serving = tokio::spawn(serve(listener, Arc::new(probe), stop.clone()));
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
    async fn readiness_says_what_is_missing_and_is_not_life() {
        let ready = ask(Fixed(Ok("no controller".into())), "GET /readyz").await;
        assert!(ready.starts_with("HTTP/1.1 200"), "{ready}");
        assert!(ready.ends_with("ready: no controller\n"), "{ready}");
        let missing = || Fixed(Err("no Open vSwitch".into()));
        let unready = ask(missing(), "GET /readyz").await;
        assert!(unready.starts_with("HTTP/1.1 503"), "{unready}");
        assert!(
            unready.ends_with("not ready: no Open vSwitch\n"),
            "{unready}"
        );
        let alive = ask(missing(), "GET /healthz").await;
        assert!(alive.starts_with("HTTP/1.1 200"), "{alive}");
    }

    #[tokio::test]
    async fn metrics_come_as_openmetrics_and_the_rest_is_told() {
        let metrics = ask(Fixed(Ok(String::new())), "GET /metrics").await;
        assert!(
            metrics.contains("content-type: application/openmetrics-text"),
            "{metrics}"
        );
        let unknown = ask(Fixed(Ok(String::new())), "GET /").await;
        assert!(unknown.starts_with("HTTP/1.1 404"), "{unknown}");
        let posted = ask(Fixed(Ok(String::new())), "POST /metrics").await;
        assert!(posted.starts_with("HTTP/1.1 405"), "{posted}");
    }
}
