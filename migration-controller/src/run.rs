//! The wiring.

use std::io::IsTerminal;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use handover::Mark;
use kube::runtime::events::{Recorder, Reporter};
use kube::{Client, Config};
use ovsdb_rs::{ClientOptions, LockState};
use tokio::runtime::Builder;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing_subscriber::EnvFilter;

use crate::agents::{Certificates, Endpoint, Hub, listen};
use crate::api::phases;
use crate::cli::{Cli, Command, LogFormat, RunArgs};
use crate::cluster::{Cluster, Listener, watch_all};
use crate::crd;
use crate::http::{Probe, Server};
use crate::metrics::{Metrics, Reading};
use crate::ovn::{Databases, LogicalSwitchPort, Writer};
use crate::reconcile::{IN_TRANSIT, Reception, Reconciler, Said, Work};
use crate::routed::Keeper;

/// Who publishes the Events.
const REPORTER: &str = "segue-migration-controller";
/// How long to pause at most between attempts to reach a database: a guest that moves meanwhile has
/// no network until it is back, and there are few controllers to bother a server.
const LONGEST_BACKOFF: Duration = Duration::from_secs(1);
/// How long what is under way may take to finish once the process was asked to stop.
const GRACE: Duration = Duration::from_secs(10);

/// Does what the command line asks for.
///
/// # Errors
///
/// What keeps the controller from starting. Once it runs, it deals with what fails by itself.
pub async fn run(cli: Cli) -> anyhow::Result<()> {
    match (cli.command, cli.run) {
        (Some(Command::Crd), _) => {
            print!("{}", crd::yaml()?);
            Ok(())
        }
        (None, Some(args)) => control(args).await,
        (None, None) => anyhow::bail!("--nb and --sb are required (or SEGUE_NB and SEGUE_SB)"),
    }
}

fn log(format: LogFormat) -> anyhow::Result<()> {
    // The client's own words on a failed request repeat what the watches say about it.
    let default = "info,kube_client::client=off";
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

async fn control(args: RunArgs) -> anyhow::Result<()> {
    log(args.log_format)?;
    tracing::info!(version = env!("CARGO_PKG_VERSION"), nb = %args.nb, sb = %args.sb, "starting");
    let stop = stop_on_signals()?;
    let server = Server::bind(args.metrics_address).await?;
    tracing::info!(address = %server.address()?, "serving /metrics, /healthz, /readyz");
    let agents = agents_endpoint(&args).await?;

    let config = Config::infer()
        .await
        .context("no way to Kubernetes: run in a pod with a service account, or set KUBECONFIG")?;
    let client = Client::try_from(config).context("the Kubernetes configuration cannot be used")?;
    let options = ClientOptions {
        max_backoff: LONGEST_BACKOFF,
        ..ClientOptions::default()
    };
    let nb = ovsdb_rs::Client::spawn(args.nb.clone(), options.clone());
    let sb = ovsdb_rs::Client::spawn(args.sb.clone(), options);
    let databases = Arc::new(Databases::start(&nb, &sb, args.cluster_router())?);
    let cluster = Arc::new(Cluster::default());
    let metrics = Arc::new(Metrics::new());
    let work = Arc::new(Work::new(cluster.clone(), metrics.clone()));
    work.attach(databases.clone());
    let state = Arc::new(State {
        cluster: cluster.clone(),
        databases: databases.clone(),
        metrics: metrics.clone(),
        work: work.clone(),
        writer: std::sync::OnceLock::new(),
    });

    let mut tasks = JoinSet::new();
    tasks.spawn(server.serve(state.clone(), stop.clone()));
    watch_all(&client, &cluster, &work, &stop, &mut tasks);
    follow(&databases, &cluster, &work, &stop, &mut tasks);
    let reception = Reception {
        work: work.clone(),
        cluster: cluster.clone(),
        settings: args.settings(),
    };
    let hub = Arc::new(Hub::new(Arc::new(reception), metrics.agents.clone()));
    serve_agents(&hub, agents, &metrics, &stop, &mut tasks);
    // In order: a task that ends because of `stop` is no failure.
    let queued = tokio::select! {
        biased;
        queued = stop.run_until_cancelled(queue_for_lock(&nb)) => queued,
        failure = first_failure(&mut tasks) => return Err(failure),
    };
    let mut failed = None;
    if let Some(writer) = queued {
        let _ = state.writer.set(writer.clone());
        let reconciler = Arc::new(Reconciler {
            cluster,
            databases: databases.clone(),
            writer: writer.clone(),
            recorder: Recorder::new(client.clone(), Reporter::from(REPORTER)),
            client,
            metrics: metrics.clone(),
            work: work.clone(),
            hub: hub.clone(),
            settings: args.settings(),
            pod_gone_grace: args.pod_gone_grace,
            in_transit: IN_TRANSIT,
            unsaved: std::sync::Mutex::default(),
            said: Said::default(),
        });
        reconciler.start(usize::from(args.concurrency), &stop, &mut tasks);
        if databases.cluster_router().is_some() {
            let alarms = work.alarms();
            let keeper = Keeper::new(databases, writer.clone(), metrics, alarms, work.clone());
            let stop = stop.clone();
            tasks.spawn(async move { keeper.run(&stop).await });
        }
        tasks.spawn(lead(writer, reconciler, hub, work, stop.clone()));
        tokio::select! {
            biased;
            () = stop.cancelled() => {}
            failure = first_failure(&mut tasks) => failed = Some(failure),
        }
    }
    stop.cancel();
    finish(tasks).await;
    if let Some(writer) = state.writer.get() {
        // At once rather than when the server misses this process: a standby is waiting.
        let _ = tokio::time::timeout(Duration::from_secs(1), writer.stop()).await;
    }
    tracing::info!("stopped");
    failed.map_or(Ok(()), Err)
}

/// Where agents connect to, if they are to.
async fn agents_endpoint(args: &RunArgs) -> anyhow::Result<Option<Endpoint>> {
    let Some(address) = args.agents.0 else {
        return Ok(None);
    };
    let Some(dir) = &args.agents_tls_dir else {
        tracing::info!(
            "no --agents-tls-dir (SEGUE_AGENTS_TLS_DIR): nodes' agents are not listened to, and \
             handovers go on without them"
        );
        return Ok(None);
    };
    let certificates = Certificates::new(dir.clone());
    let endpoint = Endpoint::bind(address, certificates).await?;
    tracing::info!(address = %endpoint.address()?, dir = %dir.display(), "listening for agents");
    Ok(Some(endpoint))
}

fn serve_agents(
    hub: &Arc<Hub>,
    endpoint: Option<Endpoint>,
    metrics: &Arc<Metrics>,
    stop: &CancellationToken,
    tasks: &mut JoinSet<()>,
) {
    let (gate, token) = (hub.clone(), stop.clone());
    tasks.spawn(async move { gate.watch_gate(&token).await });
    if let Some(endpoint) = endpoint {
        let listening = listen(endpoint, hub.clone(), metrics.agents.clone(), stop.clone());
        tasks.spawn(apart(listening));
    }
}

/// Runs what agents' streams take on a thread of its own.
///
/// Half a millisecond is all that a pause has from one node's agent to the other's. Among the reconciler's tasks it would
/// wait for whatever runs, and for one thread to wake another at every step; here it is never handed on.
async fn apart(listening: impl Future<Output = ()> + Send + 'static) {
    let (done, ended) = oneshot::channel();
    let thread = std::thread::Builder::new().name("agents".to_owned());
    let started = thread.spawn(move || {
        let runtime = Builder::new_current_thread().enable_all().build();
        match runtime {
            Ok(runtime) => runtime.block_on(listening),
            Err(error) => tracing::error!(%error, "agents cannot be listened to"),
        }
        // Nobody waits for it where everything ends.
        let _ = done.send(());
    });
    if let Err(error) = started {
        tracing::error!(%error, "agents cannot be listened to");
    }
    // It is also ended by a panic there, which drops the sender.
    let _ = ended.await;
}

/// Why a task ended that was to go on until the end. Without it the others would look alive and do
/// half the work: better to give up the lock and start anew.
async fn first_failure(tasks: &mut JoinSet<()>) -> anyhow::Error {
    match tasks.join_next().await {
        Some(Err(error)) => anyhow::Error::new(error).context("a part of the controller failed"),
        Some(Ok(())) | None => anyhow::anyhow!("a part of the controller ended by itself"),
    }
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
                tracing::warn!("asked twice to stop: leaving what is under way");
                std::process::exit(130);
            }
            tracing::info!("stopping; once more to stop at once");
            token.cancel();
        }
    });
    Ok(stop)
}

fn follow(
    databases: &Arc<Databases>,
    cluster: &Arc<Cluster>,
    work: &Arc<Work>,
    stop: &CancellationToken,
    tasks: &mut JoinSet<()>,
) {
    let (db, owners, listener, token) = (
        databases.clone(),
        cluster.clone(),
        work.clone(),
        stop.clone(),
    );
    tasks.spawn(async move { db.follow_northbound(&*listener, &*owners, &token).await });
    let (db, owners, listener, token) = (
        databases.clone(),
        cluster.clone(),
        work.clone(),
        stop.clone(),
    );
    tasks.spawn(async move { db.follow_southbound(&*listener, &*owners, &token).await });
    for (database, replica) in databases.replicas() {
        let (mut state, listener, token) = (replica.sync_state(), work.clone(), stop.clone());
        tasks.spawn(async move {
            loop {
                let now = state.borrow_and_update().clone();
                if now == ovsdb_rs::SyncState::Synced {
                    tracing::info!(database, "synced");
                    listener.everything_changed();
                } else {
                    tracing::info!(database, state = ?now, "not synced");
                }
                if !matches!(
                    token.run_until_cancelled(state.changed()).await,
                    Some(Ok(()))
                ) {
                    return;
                }
            }
        });
    }
}

/// Queues for the lock, for as long as it takes to reach the database.
async fn queue_for_lock(nb: &ovsdb_rs::Client) -> Arc<Writer> {
    loop {
        match Writer::start(nb.clone()).await {
            Ok(writer) => return Arc::new(writer),
            Err(error) => {
                tracing::warn!(%error, "cannot queue for the writer's lock; trying again");
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        }
    }
}

/// Looks at everything whenever this controller becomes the one that writes.
async fn lead(
    writer: Arc<Writer>,
    reconciler: Arc<Reconciler>,
    hub: Arc<Hub>,
    work: Arc<Work>,
    stop: CancellationToken,
) {
    let mut state = writer.leadership();
    loop {
        let now = *state.borrow_and_update();
        hub.lead(now == LockState::Held);
        if now == LockState::Held {
            tracing::info!("holding the writer's lock: leading");
            // What was not stored while leading before may have been overtaken by another leader.
            reconciler.forget();
            work.everything_changed();
        } else {
            tracing::info!(lock = ?now, "not leading");
        }
        if !matches!(
            stop.run_until_cancelled(state.changed()).await,
            Some(Ok(()))
        ) {
            return;
        }
    }
}

async fn finish(mut tasks: JoinSet<()>) {
    let all = async { while tasks.join_next().await.is_some() {} };
    if tokio::time::timeout(GRACE, all).await.is_err() {
        tracing::warn!("some work did not finish in {GRACE:?} and was left");
    }
}

/// What the probes look at.
struct State {
    cluster: Arc<Cluster>,
    databases: Arc<Databases>,
    metrics: Arc<Metrics>,
    work: Arc<Work>,
    writer: std::sync::OnceLock<Arc<Writer>>,
}

impl State {
    fn is_leader(&self) -> bool {
        self.writer.get().is_some_and(|writer| writer.is_leader())
    }

    fn damaged_marks(&self) -> i64 {
        let [(_, nb), _] = self.databases.replicas();
        let rows = nb.rows::<LogicalSwitchPort>();
        let damaged = rows
            .iter()
            .filter(|(_, port)| Mark::from_external_ids(&port.external_ids).is_err());
        i64::try_from(damaged.count()).unwrap_or(i64::MAX)
    }
}

impl Probe for State {
    fn metrics(&self) -> Result<String, String> {
        let counts = self.cluster.count_handovers();
        let reading = Reading {
            handovers: phases()
                .iter()
                .map(|phase| (*phase, counts.get(phase).copied().unwrap_or_default()))
                .collect(),
            replicas: self
                .databases
                .replicas()
                .map(|(database, replica)| (database, replica.is_synced()))
                .to_vec(),
            leader: self.is_leader(),
            damaged_marks: self.damaged_marks(),
            queue_depth: i64::try_from(self.work.depth()).unwrap_or(i64::MAX),
        };
        self.metrics
            .expose(&reading)
            .map_err(|error| error.to_string())
    }

    fn readiness(&self) -> Result<String, String> {
        let kinds = self.cluster.unsynced();
        let kinds = kinds.iter().map(|kind| format!("{kind}: not listed yet"));
        let lock = self
            .writer
            .get()
            .is_none()
            .then(|| "not in the queue for the writer's lock".to_owned());
        let troubles: Vec<_> = kinds.chain(self.databases.troubles()).chain(lock).collect();
        if !troubles.is_empty() {
            return Err(troubles.join("; "));
        }
        let role = if self.is_leader() {
            "leading"
        } else {
            "standing by"
        };
        Ok(role.to_owned())
    }
}
