//! What there is to be seen of a migration for somebody who hands its ports over.

use anyhow::{Context as _, Result, bail};
use futures::{StreamExt as _, TryStreamExt as _};
use k8s_openapi::api::core::v1::Pod;
use kube::runtime::{WatchStreamExt as _, watcher};
use kube::{Api, Client, ResourceExt as _};
use tokio::sync::{broadcast, watch};
use tokio::task::JoinSet;

use crate::kubevirt::{VirtualMachineInstanceMigration, VmimPhase, names};
use crate::lab::events::{Event, Kind, Lifecycle};

use super::super::feeders::Followed;
use super::Error;

/// What has been seen of a migration so far. Nothing of it is taken back.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(in super::super) struct Seen {
    /// The migration's phase.
    pub phase: Option<VmimPhase>,
    /// The target pod's name, once it has a node.
    pub target_pod: Option<String>,
    /// The target pod bears KubeVirt's ready annotation.
    pub target_ready: bool,
    /// libvirt on the target said that the guest runs there.
    pub resumed: bool,
    /// libvirt on the source said that the guest has left.
    pub left: bool,
}

/// Follows what has been seen.
#[derive(Clone, Debug)]
pub(in super::super) struct Signs(watch::Receiver<Seen>);

// === impl Seen ===

impl Seen {
    /// The migration is over.
    pub(in super::super) fn is_over(&self) -> bool {
        self.phase.is_some_and(VmimPhase::is_final)
    }

    /// The migration is over, and the guest has moved.
    pub(in super::super) fn succeeded(&self) -> bool {
        self.phase == Some(VmimPhase::Succeeded)
    }

    /// The target's node is known: there is somewhere to hand the ports over to.
    pub(super) fn has_target(&self) -> bool {
        self.target_pod.is_some()
    }
}

// === impl Signs ===

impl Signs {
    pub(super) fn new(seen: watch::Receiver<Seen>) -> Self {
        Self(seen)
    }

    /// Returns once it has been seen, with all that has been seen by then.
    pub(in super::super) async fn until(
        &mut self,
        holds: impl Fn(&Seen) -> bool,
    ) -> Result<Seen, Error> {
        let seen = self.0.wait_for(|seen| holds(seen)).await;
        seen.map(|seen| seen.clone()).map_err(|_| Error::Deaf)
    }

    /// Returns once it has been seen, or the migration is over without it.
    pub(super) async fn until_or_over(
        &mut self,
        holds: impl Fn(&Seen) -> bool,
    ) -> Result<Seen, Error> {
        self.until(|seen| holds(seen) || seen.is_over()).await
    }
}

/// Begins to follow a migration that does not exist yet. The watches end with the set; one that fails leaves its error
/// there.
pub(in super::super) fn follow(
    followed: &Followed,
    client: &Client,
    events: broadcast::Receiver<Event>,
) -> (Signs, JoinSet<Result<()>>) {
    let (seen, signs) = watch::channel(Seen::default());
    let mut watches = JoinSet::new();
    watches.spawn(phases(followed.clone(), client.clone(), seen.clone()));
    watches.spawn(pods(followed.clone(), client.clone(), seen.clone()));
    watches.spawn(hypervisors(followed.clone(), events, seen));
    (Signs::new(signs), watches)
}

async fn phases(followed: Followed, client: Client, seen: watch::Sender<Seen>) -> Result<()> {
    let migrations: Api<VirtualMachineInstanceMigration> =
        Api::namespaced(client, &followed.namespace);
    let config = watcher::Config::default().fields(&format!("metadata.name={}", followed.name));
    let mut stream = watcher(migrations, config).default_backoff().boxed();
    while let Some(event) = stream.try_next().await.context("watch the migration")? {
        let phase = match event {
            watcher::Event::Apply(migration) | watcher::Event::InitApply(migration) => {
                migration.status.and_then(|status| status.phase)
            }
            // One that was cancelled may be gone before its last phase was seen.
            watcher::Event::Delete(_) => Some(VmimPhase::Failed),
            _ => None,
        };
        seen.send_if_modified(|seen| {
            let further = phase > seen.phase && !seen.is_over();
            if further {
                seen.phase = phase;
            }
            further
        });
    }
    bail!("the watch on the migration ended")
}

async fn pods(followed: Followed, client: Client, seen: watch::Sender<Seen>) -> Result<()> {
    let pods: Api<Pod> = Api::namespaced(client, &followed.namespace);
    let config = watcher::Config::default().labels(names::MIGRATION_JOB_UID);
    let mut stream = watcher(pods, config)
        .default_backoff()
        .applied_objects()
        .boxed();
    while let Some(pod) = stream.try_next().await.context("watch the target pod")? {
        let annotations = pod.annotations();
        if annotations.get(names::MIGRATION_JOB_NAME) != Some(&followed.name) {
            continue;
        }
        let bound = pod.spec.as_ref().and_then(|spec| spec.node_name.as_ref());
        let ready = annotations.contains_key(names::TARGET_READY_TIMESTAMP);
        seen.send_modify(|seen| {
            if bound.is_some() {
                seen.target_pod = Some(pod.name_any());
            }
            seen.target_ready |= ready;
        });
    }
    bail!("the watch on the target pod ended")
}

async fn hypervisors(
    followed: Followed,
    mut events: broadcast::Receiver<Event>,
    seen: watch::Sender<Seen>,
) -> Result<()> {
    loop {
        let event = events.recv().await.context("events of the hypervisors")?;
        let lifecycle = match event.kind {
            Kind::Lost(why) => bail!("no more events from {}: {why}", event.host),
            Kind::Lifecycle(lifecycle) if event.domain == followed.domain => lifecycle,
            _ => continue,
        };
        seen.send_modify(|seen| match lifecycle {
            Lifecycle::Resumed { migrated: true } if event.host == followed.target => {
                seen.resumed = true;
            }
            Lifecycle::Stopped { migrated: true } if event.host == followed.source => {
                seen.left = true;
            }
            _ => {}
        });
    }
}
