//! The wiring.

mod effects;
mod engine;

use std::io::IsTerminal;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::Context;
use arp_proxy::{Gateway, Limits, Patterns, Proxy};
use ovsdb_rs::SyncState;
use tokio::net::TcpListener;
use tokio::runtime::Builder;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing_subscriber::EnvFilter;

use crate::cli::{Cli, ControllerArgs, HypervisorArgs, LogFormat};
use crate::http::{self, Probe};
use crate::metrics::{Metrics, Reading};
use crate::ovs::Ports;
use crate::routes::Routes;
use crate::wire::{Link, Outbox};
use crate::{hook, signals, wire};
use effects::{Effects, Shared};
use engine::{Engine, Inputs};

/// Messages to the controller that may wait. All that a node's agent has to say of a drain is less.
const OUTBOX: usize = 1024;
/// Frames that may wait: announcements of armed guests, at a bounded rate each.
const FRAMES: usize = 1024;
/// Lifecycle events that may wait.
const EVENTS: usize = 256;
/// How long what is under way may take to finish once the process was asked to stop.
const GRACE: Duration = Duration::from_secs(5);
/// As shells report a program that ended by Ctrl-C.
const INTERRUPTED: i32 = 130;

/// Does what the command line asks for, until a signal.
///
/// # Errors
/// What keeps the agent from starting, or that a part of it ended by itself.
pub async fn run(cli: Cli) -> anyhow::Result<()> {
    log(cli.service.log)?;
    let stop = stop_on_signals()?;
    let node = cli.controller.node.as_str();
    tracing::info!(version = env!("CARGO_PKG_VERSION"), node, "starting");
    let agent = Agent::new(cli).await?;
    tracing::info!(address = %agent.address()?, "serving /metrics, /healthz, /readyz");
    agent.run(stop).await?;
    tracing::info!("stopped");
    Ok(())
}

/// An agent that has what it needs of its node, and does nothing yet.
pub struct Agent {
    cli: Cli,
    listener: TcpListener,
    socket: Option<hook::Socket>,
    ports: Ports,
    proxy: Option<Proxy>,
}

impl Agent {
    /// Takes what may be taken: addresses and sockets.
    ///
    /// # Errors
    /// What cannot be had.
    pub async fn new(cli: Cli) -> anyhow::Result<Self> {
        let listener = http::bind(cli.service.listen).await?;
        let socket = cli.hook.socket().map(|path| hook::Socket::bind(path));
        let socket = socket
            .transpose()
            .context("cannot answer the node hook (--hook-socket)")?;
        let ports = Ports::connect(&cli.switch.ovs, &cli.switch.bridge)
            .context("cannot follow the switch's interfaces (--ovs)")?;
        let proxy = arp_proxy(&cli)?;
        Ok(Self {
            cli,
            listener,
            socket,
            ports,
            proxy,
        })
    }

    /// Where it serves metrics and probes.
    ///
    /// # Errors
    /// The system's.
    pub fn address(&self) -> std::io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Works until `stop`.
    ///
    /// # Errors
    /// A part of it ended by itself.
    pub async fn run(self, stop: CancellationToken) -> anyhow::Result<()> {
        let Self {
            cli,
            listener,
            socket,
            ports,
            mut proxy,
        } = self;
        let metrics = Arc::new(Metrics::new());
        let mut tasks = JoinSet::new();
        let (gate, asked) = hook::Gate::new();
        if let Some(socket) = socket {
            let (gate, metrics) = (gate.clone(), metrics.clone());
            tasks.spawn(hook::serve(
                socket,
                gate,
                cli.hook.patience(),
                metrics,
                stop.clone(),
            ));
        }
        let metrics_of_proxy = proxy.as_ref().map(Proxy::metrics);
        let probe = start(&cli, &ports, (gate, asked), metrics, &stop, &mut tasks);
        let probe = Arc::new(State {
            proxy: metrics_of_proxy,
            ..probe
        });
        tasks.spawn(http::serve(listener, probe, stop.clone()));
        let failed = tokio::select! {
            biased;
            () = stop.cancelled() => None,
            failure = first_failure(&mut tasks) => Some(failure),
            () = proxy_failed(proxy.as_mut()) => {
                Some(anyhow::anyhow!("the ARP proxy ended by itself"))
            }
        };
        stop.cancel();
        if let Some(proxy) = proxy {
            proxy.stop().await;
        }
        finish(tasks).await;
        failed.map_or(Ok(()), Err)
    }
}

/// Starts the parts around the state machine, and it.
fn start(
    cli: &Cli,
    ports: &Ports,
    (gate, asked): (hook::Gate, mpsc::UnboundedReceiver<hook::Event>),
    metrics: Arc<Metrics>,
    stop: &CancellationToken,
    tasks: &mut JoinSet<()>,
) -> State {
    let shared = Arc::new(Shared::default());
    let counts = Arc::new(signals::Counts::default());
    let outbox = Outbox::new(OUTBOX);
    let (busy, is_busy) = watch::channel(false);
    let (link, said, link_state) = Link::new(
        link_config(&cli.controller),
        outbox.clone(),
        is_busy,
        metrics.clone(),
        stop.clone(),
    );
    let (events, lifecycle) = mpsc::channel(EVENTS);
    let (frames, heard) = mpsc::channel(FRAMES);
    let (mut effects, done) = Effects::new(
        outbox.clone(),
        metrics.clone(),
        frames,
        cli.switch.bridge_socket(),
        gate,
        shared.clone(),
    );
    if cli.host.host_routes {
        effects = effects.with_routes(Routes::new(), tasks);
    }
    let inputs = Inputs {
        lifecycle,
        said,
        done,
        heard,
        asked,
        interfaces: ports.interfaces(),
    };
    let hypervisors = hypervisors(&cli.hypervisors, counts.clone());
    let watching = signals::watch(hypervisors, events, stop.clone());
    let engine = Engine::new(effects, inputs, busy, stop.clone());
    let passing = pass_pauses(watching, link.run(), engine.run(), stop.clone());
    tasks.spawn(apart(passing));
    State {
        metrics,
        shared,
        counts,
        outbox,
        ovs: ports.state(),
        link: link_state,
        proxy: None,
    }
}

fn arp_proxy(cli: &Cli) -> anyhow::Result<Option<Proxy>> {
    let interfaces = cli.host.arp_proxy_interfaces();
    if interfaces.is_empty() {
        return Ok(None);
    }
    let config = arp_proxy::Config {
        gateway: Gateway::default(),
        interfaces: interfaces.into_iter().collect(),
        iface_ids: Patterns::default(),
        // Asked for those only.
        ovsdb: PathBuf::new(),
        limits: Limits::default(),
    };
    let proxy = Proxy::start(config);
    proxy
        .map(Some)
        .context("cannot be the guests' gateway (--arp-proxy-interfaces)")
}

async fn proxy_failed(proxy: Option<&mut Proxy>) {
    match proxy {
        Some(proxy) => proxy.failed().await,
        None => std::future::pending().await,
    }
}

fn link_config(args: &ControllerArgs) -> wire::Config {
    wire::Config {
        node: args.node.clone(),
        controllers: args.controller.clone(),
        controller_name: args.controller_name.clone(),
        tls_dir: args.tls_dir.clone(),
    }
}

fn hypervisors(args: &HypervisorArgs, counts: Arc<signals::Counts>) -> signals::Config {
    signals::Config {
        sockets: args.libvirt_sockets(),
        connect_uris: args.libvirt_uri.clone(),
        qmp: args.qmp_sockets(),
        virsh: args.virsh.clone(),
        read_only: args.libvirt_read_only,
        counts,
    }
}

/// What a pause passes through. The first part to end ends it; if all were asked to, each takes its time to end.
async fn pass_pauses(
    watching: impl Future<Output = ()> + Send + 'static,
    link: impl Future<Output = ()> + Send + 'static,
    engine: impl Future<Output = ()> + Send + 'static,
    stop: CancellationToken,
) {
    let mut parts = JoinSet::new();
    parts.spawn(watching);
    parts.spawn(link);
    parts.spawn(engine);
    if let Some(Err(error)) = parts.join_next().await {
        tracing::error!(%error, "a part of the agent failed");
    }
    if stop.is_cancelled() {
        while parts.join_next().await.is_some() {}
    }
}

/// Runs what a pause passes through, from the hypervisor's word to the switch, on a thread of its own.
///
/// It has half a millisecond in all. Among the other tasks it would wait for a launcher's JSON or a page of metrics, and
/// for one thread to wake another at every step; here it is never handed on.
async fn apart(parts: impl Future<Output = ()> + Send + 'static) {
    let (done, ended) = oneshot::channel();
    let thread = std::thread::Builder::new().name("pause".to_owned());
    let started = thread.spawn(move || {
        match Builder::new_current_thread().enable_all().build() {
            Ok(runtime) => {
                runtime.block_on(parts);
                // Nobody waits for it where everything ends.
                let _ = done.send(());
                // Not for a name that is still being resolved.
                runtime.shutdown_background();
            }
            Err(error) => tracing::error!(%error, "pauses cannot be heard"),
        }
    });
    if let Err(error) = started {
        tracing::error!(%error, "pauses cannot be heard");
    }
    // It is also ended by a panic there, which drops the sender.
    let _ = ended.await;
}

/// Why a task ended that was to go on until the end: better to start anew than to do half the work.
async fn first_failure(tasks: &mut JoinSet<()>) -> anyhow::Error {
    match tasks.join_next().await {
        Some(Err(error)) => anyhow::Error::new(error).context("a part of the agent failed"),
        Some(Ok(())) | None => anyhow::anyhow!("a part of the agent ended by itself"),
    }
}

async fn finish(mut tasks: JoinSet<()>) {
    let all = async { while tasks.join_next().await.is_some() {} };
    if tokio::time::timeout(GRACE, all).await.is_err() {
        tracing::warn!("some work did not finish in {GRACE:?} and was left");
    }
}

fn log(format: LogFormat) -> anyhow::Result<()> {
    // What these say of an overrun or a database that is away is said here, once.
    let default = "info,netlink_proto=error,ovsdb_rs=warn";
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

/// What the probes look at.
struct State {
    metrics: Arc<Metrics>,
    shared: Arc<Shared>,
    counts: Arc<signals::Counts>,
    outbox: Outbox,
    ovs: watch::Receiver<SyncState>,
    link: watch::Receiver<wire::State>,
    proxy: Option<Arc<arp_proxy::Metrics>>,
}

impl Probe for State {
    fn metrics(&self) -> Result<String, String> {
        let reading = Reading {
            armed: self.shared.armed.load(Ordering::Relaxed),
            hypervisors: self.counts.connected.load(Ordering::Relaxed),
            monitors: self.counts.monitors.load(Ordering::Relaxed),
            connections: self.counts.connections.load(Ordering::Relaxed),
            malformed: self.counts.malformed.load(Ordering::Relaxed),
            disbelieved: self.counts.disbelieved.load(Ordering::Relaxed),
            missed: self.shared.missed.load(Ordering::Relaxed),
            ovs_synced: *self.ovs.borrow() == SyncState::Synced,
            switch_warm: self.shared.is_switch_warm(),
            dropped: self.outbox.dropped(),
        };
        let said = |error: std::fmt::Error| error.to_string();
        let own = self.metrics.expose(&reading).map_err(said)?;
        let Some(proxy) = &self.proxy else {
            return Ok(own);
        };
        // One exposition has one end.
        let own = own.trim_end_matches("# EOF\n");
        let proxy = proxy.expose().map_err(said)?;
        Ok(format!("{own}{proxy}"))
    }

    /// The controller's absence is no reason: there is nothing that another agent could do instead.
    fn readiness(&self) -> Result<String, String> {
        match &*self.ovs.borrow() {
            SyncState::Synced => {}
            SyncState::Refused(why) => return Err(format!("Open vSwitch's database: {why}")),
            _ => {
                return Err("Open vSwitch's database is not followed".to_owned());
            }
        }
        Ok(match &*self.link.borrow() {
            wire::State::Connected { address, version } => {
                format!("controller {version} at {address}")
            }
            wire::State::Connecting { last_error: None } => "no controller yet".to_owned(),
            wire::State::Connecting {
                last_error: Some(error),
            } => format!("no controller: {error}"),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_parts_count_is_exposed() {
        let counts = Arc::<signals::Counts>::default();
        let shared = Arc::<Shared>::default();
        let state = State {
            metrics: Arc::default(),
            shared: shared.clone(),
            counts: counts.clone(),
            outbox: Outbox::new(1),
            ovs: watch::channel(SyncState::Synced).1,
            link: watch::channel(wire::State::Connecting { last_error: None }).1,
            proxy: None,
        };
        for (number, (counted, name)) in [
            (&counts.connections, "hypervisor_connections"),
            (&counts.malformed, "hypervisor_lines_malformed"),
            (&counts.disbelieved, "hypervisor_events_disbelieved"),
            (&*shared.missed, "announcements_missed"),
        ]
        .into_iter()
        .enumerate()
        {
            let line = |count| format!("segue_agent_{name}_total {count}\n");
            let none = state.metrics().unwrap();
            assert!(none.contains(&line(0)), "{none}");
            counted.store(number as u64 + 1, Ordering::Relaxed);
            let text = state.metrics().unwrap();
            assert!(text.contains(&line(number as u64 + 1)), "{text}");
        }
    }

    #[tokio::test]
    async fn a_panic_in_the_thread_of_pauses_ends_what_waits_for_it() {
        let panicking = apart(async { panic!("as it is to be") });
        tokio::time::timeout(GRACE, panicking)
            .await
            .expect("it ends");
    }
}
