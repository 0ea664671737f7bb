//! Whoever can tell what happens in a migration, telling its [`Moments`].

use std::time::SystemTime;

use anyhow::{Context as _, Result, bail};
use futures::{StreamExt as _, TryStreamExt as _};
use k8s_openapi::api::core::v1::Pod;
use kube::runtime::{WatchStreamExt as _, watcher};
use kube::{Api, Client, ResourceExt as _};
use migration_controller::api::Handover;
use tokio::sync::broadcast;
use tokio::task::JoinSet;

use crate::kubevirt::{HookCall, HookResult, VirtualMachineInstanceMigration, VmimPhase, names};
use crate::lab::events::{Event, Kind};
use crate::scenario::Moment;

use super::moments::Moments;
use super::ovn::{Ovn, PortView};
use super::place::{self, Placed};

/// Which migration to follow.
#[derive(Clone, Debug)]
pub(super) struct Followed {
    /// Namespace of its objects.
    pub namespace: String,
    /// Name of the migration object.
    pub name: String,
    /// The domain.
    pub domain: String,
    /// Where the guest is.
    pub source: String,
    /// Where it goes.
    pub target: String,
    /// Its logical switch ports.
    pub ports: Vec<String>,
    /// What is to follow it.
    pub placed: Placed,
}

/// Starts the feeders. They end with the set; one that fails leaves its error there.
pub(super) fn start(
    followed: &Followed,
    moments: &Moments,
    client: &Client,
    ovn: &Ovn,
    events: broadcast::Receiver<Event>,
    hook_calls: broadcast::Receiver<HookCall>,
) -> JoinSet<Result<()>> {
    let mut feeders = JoinSet::new();
    feeders.spawn(from_hooks(followed.clone(), moments.clone(), hook_calls));
    feeders.spawn(from_ovn(followed.clone(), moments.clone(), ovn.clone()));
    feeders.spawn(from_hypervisors(followed.clone(), moments.clone(), events));
    feeders.spawn(from_migration(
        followed.clone(),
        moments.clone(),
        client.clone(),
    ));
    feeders.spawn(from_pods(followed.clone(), moments.clone(), client.clone()));
    feeders.spawn(from_handover(
        followed.clone(),
        moments.clone(),
        client.clone(),
    ));
    feeders
}

async fn from_ovn(followed: Followed, moments: Moments, ovn: Ovn) -> Result<()> {
    let mut changed = ovn.changed();
    let mut went_on = moments.changed();
    loop {
        look(&ovn, &followed, &moments);
        tokio::select! {
            () = changed.next() => {}
            // What the places mean depends on what has happened. The board outlives its feeders.
            _ = went_on.changed() => {}
        }
    }
}

/// Notes the moments that the databases show.
pub(super) fn look(ovn: &Ovn, followed: &Followed, moments: &Moments) {
    let now = SystemTime::now();
    let views: Option<Vec<_>> = followed.ports.iter().map(|port| ovn.port(port)).collect();
    for moment in views
        .iter()
        .flat_map(|views| seen_in(views, followed, moments))
    {
        moments.note(moment, now);
    }
    if let Some(moment) = place_seen(ovn, followed, moments) {
        moments.note(moment, now);
    }
}

/// The moment that the places of the VM's addresses show: all of them must.
fn place_seen(ovn: &Ovn, followed: &Followed, moments: &Moments) -> Option<Moment> {
    let places = followed.placed.places(ovn);
    if place::all_in(&places, &followed.target) {
        Some(Moment::Flipped)
    } else if moments.at(Moment::Ended).is_some() && place::all_in(&places, &followed.source) {
        Some(Moment::Kept)
    } else {
        None
    }
}

/// The moments that the VM's ports show: all ports must.
fn seen_in(views: &[PortView], followed: &Followed, moments: &Moments) -> Vec<Moment> {
    let target = &followed.target;
    let all = |holds: &dyn Fn(&PortView) -> bool| views.iter().all(holds);
    let mut seen = Vec::new();
    if all(&|view| view.requested.len() > 1 && view.requested.contains(target)) {
        seen.push(Moment::Armed);
    }
    if all(&|view| view.additional.contains(target)) {
        seen.push(Moment::Claimed);
    }
    if all(&|view| view.marks.contains_key("segue.io/barrier")) {
        seen.push(Moment::BarrierRaised);
    }
    if all(&|view| view.activated.contains(target)) {
        seen.push(Moment::Activated);
    }
    // What comes after arming looks like what was before it.
    if moments.at(Moment::Armed).is_some() {
        if all(&|view| view.requested.len() < 2) {
            seen.push(Moment::Settled);
        }
        if all(&|view| view.marks.is_empty()) {
            seen.push(Moment::Released);
        }
    }
    seen
}

async fn from_hypervisors(
    followed: Followed,
    moments: Moments,
    mut events: broadcast::Receiver<Event>,
) -> Result<()> {
    loop {
        let event = events.recv().await.context("events of the hypervisors")?;
        if let Kind::Lost(why) = &event.kind {
            bail!("no more events from {}: {why}", event.host);
        }
        if event.domain != followed.domain {
            continue;
        }
        if event.host == followed.source && event.migration_status() == Some("active") {
            moments.note(Moment::Copying, event.at);
        } else if event.host == followed.source && event.is_monitor("STOP") {
            moments.note(Moment::Paused, event.at);
        } else if event.is_monitor("RESUME") && moments.at(Moment::Paused).is_some() {
            // On the target, or back on the source: the pause is over either way.
            moments.note(Moment::Resumed, event.at);
        }
    }
}

async fn from_hooks(
    followed: Followed,
    moments: Moments,
    mut calls: broadcast::Receiver<HookCall>,
) -> Result<()> {
    loop {
        let call = calls.recv().await.context("calls of node hooks")?;
        let vmi = call.vmi.replacen('/', "_", 1);
        if vmi != followed.domain || call.node != followed.source {
            continue;
        }
        let moment = match call.result {
            HookResult::Asked => Moment::Asked,
            HookResult::Failed(_) => Moment::Refused,
            HookResult::Agreed | HookResult::Ignored(_) => Moment::Allowed,
        };
        moments.note(moment, call.at);
    }
}

async fn from_migration(followed: Followed, moments: Moments, client: Client) -> Result<()> {
    let migrations: Api<VirtualMachineInstanceMigration> =
        Api::namespaced(client, &followed.namespace);
    let config = watcher::Config::default().fields(&format!("metadata.name={}", followed.name));
    let mut stream = watcher(migrations, config).default_backoff().boxed();
    while let Some(event) = stream.try_next().await.context("watch the migration")? {
        let migration = match event {
            watcher::Event::Apply(migration) | watcher::Event::InitApply(migration) => migration,
            // A cancelled migration may be gone before its last phase was seen.
            watcher::Event::Delete(_) => {
                moments.note(Moment::Ended, SystemTime::now());
                continue;
            }
            _ => continue,
        };
        moments.note(Moment::Created, SystemTime::now());
        let phase = migration.status.as_ref().and_then(|status| status.phase);
        if matches!(phase, Some(VmimPhase::Succeeded | VmimPhase::Failed)) {
            moments.note(Moment::Ended, SystemTime::now());
        }
    }
    Ok(())
}

async fn from_pods(followed: Followed, moments: Moments, client: Client) -> Result<()> {
    let pods: Api<Pod> = Api::namespaced(client, &followed.namespace);
    let config = watcher::Config::default().labels(names::MIGRATION_JOB_UID);
    let mut stream = watcher(pods, config)
        .default_backoff()
        .applied_objects()
        .boxed();
    while let Some(pod) = stream.try_next().await.context("watch the target pod")? {
        let of_this = pod.annotations().get(names::MIGRATION_JOB_NAME) == Some(&followed.name);
        let bound = pod.spec.as_ref().and_then(|spec| spec.node_name.as_ref());
        if of_this && bound.is_some() {
            moments.note(Moment::Scheduled, SystemTime::now());
        }
    }
    Ok(())
}

async fn from_handover(followed: Followed, moments: Moments, client: Client) -> Result<()> {
    let handovers: Api<Handover> = Api::namespaced(client, &followed.namespace);
    let config = watcher::Config::default().fields(&format!("metadata.name={}", followed.name));
    let mut stream = watcher(handovers, config)
        .default_backoff()
        .applied_objects()
        .boxed();
    while let Some(object) = stream.try_next().await.context("watch the handover")? {
        let phase = object.status.map(|status| status.phase);
        if phase == Some(handover::Phase::Ready) {
            moments.note(Moment::Ready, SystemTime::now());
        }
    }
    Ok(())
}
