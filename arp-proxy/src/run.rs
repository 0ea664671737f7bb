//! The wiring.

use std::io::IsTerminal;

use anyhow::Context;
use arp_proxy::Proxy;
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing_subscriber::EnvFilter;

use crate::cli::{Cli, LogFormat};
use crate::http::{self, Control, Service};

/// As shells report a program that ended by Ctrl-C.
const INTERRUPTED: i32 = 130;

/// Does what the command line asks for, until a signal.
pub(crate) async fn run(cli: Cli) -> anyhow::Result<()> {
    log(cli.service.log_format)?;
    let config = cli.config()?;
    let gateway = &config.gateway;
    tracing::info!(version = env!("CARGO_PKG_VERSION"), mac = %gateway.mac(), ipv4 = ?gateway.ipv4(), ipv6 = ?gateway.ipv6(), "starting");
    let stop = stop_on_signals()?;
    // What may be taken is taken before anything is answered.
    let tcp = match cli.service.metrics_address {
        Some(address) => Some(http::bind_tcp(address).await?),
        None => None,
    };
    let control = cli
        .service
        .control
        .as_deref()
        .map(Control::bind)
        .transpose()?;
    let mut proxy = Proxy::start(config)?;
    let service = Service {
        metrics: proxy.metrics(),
        state: proxy.state(),
        announcer: None,
    };
    let mut servers = JoinSet::new();
    if let Some(listener) = tcp {
        tracing::info!(address = %listener.local_addr()?, "serving /metrics, /healthz, /readyz");
        servers.spawn(http::serve_tcp(listener, service.clone(), stop.clone()));
    }
    if let Some(control) = control {
        let service = Service {
            announcer: Some(proxy.announcer()),
            ..service
        };
        servers.spawn(control.serve(service, stop.clone()));
    }
    let failed = tokio::select! {
        biased;
        () = stop.cancelled() => false,
        () = proxy.failed() => true,
    };
    stop.cancel();
    proxy.stop().await;
    while servers.join_next().await.is_some() {}
    anyhow::ensure!(!failed, "a part of the proxy ended by itself");
    tracing::info!("stopped");
    Ok(())
}

fn log(format: LogFormat) -> anyhow::Result<()> {
    // The netlink crates' words on an overrun repeat what is said about it here.
    let default = "info,netlink_proto=error";
    let filter = match std::env::var("RUST_LOG") {
        Ok(chosen) if !chosen.is_empty() => EnvFilter::try_new(chosen),
        _ => EnvFilter::try_new(default),
    };
    let filter = filter.context("RUST_LOG cannot be understood")?;
    let subscriber = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr);
    match format {
        LogFormat::Text => subscriber.init(),
        LogFormat::Json => subscriber.json().flatten_event(true).init(),
    }
    Ok(())
}

/// Stops on the first SIGTERM or SIGINT; the second ends the process at once.
fn stop_on_signals() -> anyhow::Result<CancellationToken> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let stop = CancellationToken::new();
    let token = stop.clone();
    tokio::spawn(async move {
        loop {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            if token.is_cancelled() {
                std::process::exit(INTERRUPTED);
            }
            tracing::info!("stopping; once more to stop at once");
            token.cancel();
        }
    });
    Ok(stop)
}
