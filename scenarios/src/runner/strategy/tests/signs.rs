//! What is seen of a migration in a real API, and in what hypervisors say.

use std::time::{Duration, SystemTime};

use anyhow::Result;
use k8s_openapi::api::core::v1::Pod;
use kube::api::{DeleteParams, Patch, PatchParams, PostParams};
use kube::{Api, Client};
use serde_json::json;
use tempfile::TempDir;
use tokio::sync::broadcast;
use tokio::task::JoinSet;

use super::super::*;
use crate::cluster::vmim;
use crate::kubernetes::{Assets, ControlPlane, Port, Settings, here};
use crate::kubevirt::{VirtualMachineInstanceMigration, VmimPhase, names};
use crate::lab::events::{Event, Kind, Lifecycle};
use crate::runner::feeders::Followed;
use crate::runner::place::Placed;

const NAMESPACE: &str = "default";
const OURS: &str = "web-migration-1";

/// A real API, a migration that is followed, and whoever tells of the hypervisors.
struct World {
    plane: ControlPlane,
    events: broadcast::Sender<Event>,
    signs: Signs,
    watches: JoinSet<Result<()>>,
    _directory: TempDir,
}

async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    let done = tokio::time::timeout(Duration::from_secs(30), future).await;
    done.unwrap_or_else(|_| panic!("{what}: it takes too long"))
}

impl World {
    async fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let settings = Settings {
            assets: Assets::find().unwrap_or_else(|error| panic!("{error}")),
            directory: directory.path().join("kubernetes"),
            address: [127, 0, 0, 1].into(),
            port: Port::Free,
        };
        let plane = ControlPlane::start(settings, &here()).await;
        let plane = plane.unwrap_or_else(|error| panic!("{error}"));
        plane.apply_kubevirt_crds().await.unwrap();
        let (events, receiver) = broadcast::channel(16);
        let followed = Followed {
            namespace: NAMESPACE.to_owned(),
            name: OURS.to_owned(),
            domain: "default_web".to_owned(),
            source: "node1".to_owned(),
            target: "node2".to_owned(),
            ports: vec!["web".to_owned()],
            placed: Placed::in_sets(Vec::new()),
        };
        let (signs, watches) = follow(&followed, &plane.client(), receiver);
        Self {
            plane,
            events,
            signs,
            watches,
            _directory: directory,
        }
    }

    fn client(&self) -> Client {
        self.plane.client()
    }

    fn migrations(&self) -> Api<VirtualMachineInstanceMigration> {
        Api::namespaced(self.client(), NAMESPACE)
    }

    fn pods(&self) -> Api<Pod> {
        Api::namespaced(self.client(), NAMESPACE)
    }

    async fn migrate(&self, name: &str) {
        let mut object = vmim(NAMESPACE, name, "web", "node2");
        // Nobody here would take the finalizer away.
        object.metadata.finalizers = None;
        self.migrations()
            .create(&PostParams::default(), &object)
            .await
            .unwrap();
    }

    async fn phase(&self, name: &str, phase: VmimPhase) {
        let status = json!({"status": {"phase": phase}});
        self.migrations()
            .patch_status(name, &PatchParams::default(), &Patch::Merge(status))
            .await
            .unwrap();
    }

    async fn target_pod(&self, name: &str, migration: &str, node: Option<&str>) {
        let pod = json!({
            "metadata": {
                "name": name,
                "labels": {(names::MIGRATION_JOB_UID): "some-uid"},
                "annotations": {(names::MIGRATION_JOB_NAME): migration},
            },
            "spec": {
                "nodeName": node,
                "containers": [{"name": "compute", "image": "none"}],
            },
        });
        let pod = serde_json::from_value(pod).unwrap();
        self.pods()
            .create(&PostParams::default(), &pod)
            .await
            .unwrap();
    }

    async fn annotate(&self, pod: &str) {
        let ready = json!({"metadata": {"annotations": {(names::TARGET_READY_TIMESTAMP): "now"}}});
        self.pods()
            .patch(pod, &PatchParams::default(), &Patch::Merge(ready))
            .await
            .unwrap();
    }

    fn tell(&self, host: &str, domain: &str, kind: Kind) {
        let event = Event {
            host: host.to_owned(),
            domain: domain.to_owned(),
            at: SystemTime::now(),
            received: SystemTime::now(),
            kind,
        };
        self.events.send(event).unwrap();
    }

    async fn until(&mut self, what: &str, holds: impl Fn(&Seen) -> bool) -> Seen {
        soon(what, self.signs.until(holds)).await.unwrap()
    }
}

fn lifecycle(lifecycle: Lifecycle) -> Kind {
    Kind::Lifecycle(lifecycle)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_concerns_the_migration_is_seen_and_nothing_else() {
    let mut world = World::start().await;
    world.migrate("web-migration-0").await;
    world.phase("web-migration-0", VmimPhase::Succeeded).await;
    let other = "virt-launcher-web-other";
    world
        .target_pod(other, "web-migration-0", Some("node2"))
        .await;
    world.annotate(other).await;
    let resumed = Lifecycle::Resumed { migrated: true };
    let stopped = Lifecycle::Stopped { migrated: true };
    world.tell("node2", "default_db", lifecycle(resumed));
    world.tell("node1", "default_web", lifecycle(resumed));
    world.tell("node2", "default_web", lifecycle(stopped));
    let by_a_person = Lifecycle::Resumed { migrated: false };
    world.tell("node2", "default_web", lifecycle(by_a_person));

    world.migrate(OURS).await;
    world.phase(OURS, VmimPhase::Scheduling).await;
    let seen = world.until("Scheduling", |seen| seen.phase.is_some()).await;
    let only_the_phase = Seen {
        phase: Some(VmimPhase::Scheduling),
        ..Seen::default()
    };
    assert_eq!(seen, only_the_phase);

    world
        .target_pod("virt-launcher-web-b", OURS, Some("node2"))
        .await;
    let seen = world.until("the target pod", Seen::has_target).await;
    assert_eq!(seen.target_pod.as_deref(), Some("virt-launcher-web-b"));
    assert!(!seen.target_ready);
    world.phase(OURS, VmimPhase::Running).await;
    world.tell("node2", "default_web", lifecycle(resumed));
    let seen = world.until("the resume", |seen| seen.resumed).await;
    assert!(!seen.left);
    world.tell("node1", "default_web", lifecycle(stopped));
    world.until("that it left", |seen| seen.left).await;
    world.annotate("virt-launcher-web-b").await;
    world
        .until("that it is ready", |seen| seen.target_ready)
        .await;
    world.phase(OURS, VmimPhase::Succeeded).await;
    let seen = world.until("the end", Seen::is_over).await;
    assert!(seen.succeeded());

    // An object that goes when all is over takes nothing back.
    world
        .migrations()
        .delete(OURS, &DeleteParams::default())
        .await
        .unwrap();
    world.tell("node1", "", Kind::Lost("gone".to_owned()));
    let lost = soon("the lost hypervisor", world.watches.join_next()).await;
    let lost = lost.unwrap().unwrap().unwrap_err();
    assert_eq!(lost.to_string(), "no more events from node1: gone");
    assert!(world.signs.until(Seen::is_over).await.unwrap().succeeded());
    world.plane.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pod_without_a_node_is_no_target_and_a_migration_that_is_gone_has_failed() {
    let mut world = World::start().await;
    world.migrate(OURS).await;
    world.target_pod("virt-launcher-web-b", OURS, None).await;
    world.phase(OURS, VmimPhase::Scheduling).await;
    world.until("Scheduling", |seen| seen.phase.is_some()).await;
    world.annotate("virt-launcher-web-b").await;
    let seen = world
        .until("the annotation", |seen| seen.target_ready)
        .await;
    assert!(!seen.has_target());
    world
        .migrations()
        .delete(OURS, &DeleteParams::default())
        .await
        .unwrap();
    let seen = world.until("the end", Seen::is_over).await;
    assert!(!seen.succeeded());
    world.plane.stop().await.unwrap();
}
