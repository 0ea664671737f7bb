//! A real API, the stand-in and a VM, for one test.

use std::{future::Future, pin::pin, time::Duration};

use futures::StreamExt as _;
use k8s_openapi::{
    NamespaceResourceScope,
    api::{
        core::v1::{Node, Pod},
        events::v1::Event,
    },
};
use kube::{
    Api, Resource, ResourceExt as _,
    api::{DeleteParams, ListParams, PostParams},
    runtime::{WatchStreamExt as _, wait::Condition, watcher},
};
use scenarios::{
    kubernetes::{Assets, ControlPlane, Port, Settings as Server, here},
    kubevirt::{
        Delays, KubeVirt, Limits, NodeSpec, Role, Settings, VirtualMachineInstance,
        VirtualMachineInstanceMigration, VmiPhase, VmimPhase, names,
    },
};
use serde::de::DeserializeOwned;
use serde_json::json;
use tempfile::TempDir;
use tokio::{sync::oneshot, time::timeout};

use crate::fake::Fake;

pub(crate) const NAMESPACE: &str = "default";
/// Only hung code takes that long.
const DEADLINE: Duration = Duration::from_secs(30);

pub(crate) struct Cluster {
    pub(crate) plane: ControlPlane,
    pub(crate) kubevirt: KubeVirt<Fake>,
    pub(crate) fake: Fake,
    _directory: TempDir,
}

impl Cluster {
    pub(crate) async fn start(nodes: &[&str]) -> Self {
        Self::with(nodes, Limits::default(), Delays::NONE).await
    }

    pub(crate) async fn with(nodes: &[&str], limits: Limits, delays: Delays) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let server = Server {
            assets: Assets::find().unwrap_or_else(|error| panic!("{error}")),
            directory: directory.path().join("kubernetes"),
            address: [127, 0, 0, 1].into(),
            port: Port::Free,
        };
        let plane = ControlPlane::start(server, &here())
            .await
            .unwrap_or_else(|error| panic!("{error}"));
        plane.apply_kubevirt_crds().await.unwrap();
        let fake = Fake::new();
        let nodes = nodes
            .iter()
            .map(|name| NodeSpec::new(*name).with_chassis(format!("chassis-{name}")))
            .collect();
        let settings = Settings {
            nodes,
            delays,
            limits,
        };
        let mut kubevirt = KubeVirt::new(settings, fake.clone());
        for role in Role::ALL {
            kubevirt.switch_on(role, plane.client());
        }
        Self {
            plane,
            kubevirt,
            fake,
            _directory: directory,
        }
    }

    pub(crate) async fn stop(self) {
        self.kubevirt.stop().await;
        self.plane.stop().await.unwrap();
    }

    pub(crate) fn switch_on(&mut self, role: Role) {
        self.kubevirt.switch_on(role, self.plane.client());
    }

    pub(crate) fn api<K: Resource<Scope = NamespaceResourceScope, DynamicType = ()>>(
        &self,
    ) -> Api<K> {
        Api::namespaced(self.plane.client(), NAMESPACE)
    }

    pub(crate) fn nodes(&self) -> Api<Node> {
        Api::all(self.plane.client())
    }

    /// Makes a VM with one port and waits until it runs.
    pub(crate) async fn run_vm(&self, name: &str) -> VirtualMachineInstance {
        let spec = serde_json::from_value(json!({
            "domain": {"devices": {"interfaces": [
                {"name": "default", "macAddress": "02:00:00:00:00:01", "bridge": {}},
            ]}},
            "networks": [{"name": "default", "pod": {}}],
        }))
        .unwrap();
        let vmi = VirtualMachineInstance::admitted(NAMESPACE, name, spec);
        self.api()
            .create(&PostParams::default(), &vmi)
            .await
            .unwrap();
        self.wait_vmi(name, |vmi| {
            vmi.status.as_ref().unwrap().phase == Some(VmiPhase::Running)
        })
        .await
    }

    pub(crate) async fn migrate(&self, name: &str, vmi: &str) -> VirtualMachineInstanceMigration {
        let migration = VirtualMachineInstanceMigration::admitted(NAMESPACE, name, vmi);
        self.api()
            .create(&PostParams::default(), &migration)
            .await
            .unwrap()
    }

    pub(crate) async fn cancel(&self, name: &str) {
        let api = self.api::<VirtualMachineInstanceMigration>();
        api.delete(name, &DeleteParams::default()).await.unwrap();
    }

    /// Waits for a VMI that has a status.
    pub(crate) async fn wait_vmi(
        &self,
        name: &str,
        wanted: impl Fn(&VirtualMachineInstance) -> bool,
    ) -> VirtualMachineInstance {
        let wanted = |vmi: Option<&VirtualMachineInstance>| {
            vmi.is_some_and(|it| it.status.is_some() && wanted(it))
        };
        self.wait(name, wanted).await.unwrap()
    }

    pub(crate) async fn wait_phase(
        &self,
        name: &str,
        phase: VmimPhase,
    ) -> VirtualMachineInstanceMigration {
        let wanted = |migration: Option<&VirtualMachineInstanceMigration>| {
            migration.and_then(|it| it.status.as_ref()?.phase) == Some(phase)
        };
        self.wait(name, wanted).await.unwrap()
    }

    /// Waits for a final migration that virt-controller is done with.
    pub(crate) async fn wait_final(&self, name: &str) -> VirtualMachineInstanceMigration {
        let wanted = |migration: Option<&VirtualMachineInstanceMigration>| {
            migration.is_some_and(|it| it.finalizers().is_empty())
        };
        self.wait(name, wanted).await.unwrap()
    }

    pub(crate) async fn wait_gone<K>(&self, name: &str)
    where
        K: Resource<Scope = NamespaceResourceScope, DynamicType = ()>
            + Clone
            + DeserializeOwned
            + std::fmt::Debug,
        K: Send + 'static,
    {
        self.wait(name, |object: Option<&K>| object.is_none()).await;
    }

    pub(crate) async fn wait_pod(&self, name: &str, wanted: impl Fn(&Pod) -> bool) -> Pod {
        self.wait(name, |pod: Option<&Pod>| pod.is_some_and(&wanted))
            .await
            .unwrap()
    }

    async fn wait<K>(&self, name: &str, wanted: impl Condition<K>) -> Option<K>
    where
        K: Resource<Scope = NamespaceResourceScope, DynamicType = ()>
            + Clone
            + DeserializeOwned
            + std::fmt::Debug,
        K: Send + 'static,
    {
        let met = kube::runtime::wait::await_condition(self.api::<K>(), name, wanted);
        within(&format!("{} {name}", K::kind(&())), Box::pin(met))
            .await
            .unwrap()
    }

    /// Waits until the fake has exactly these ports.
    pub(crate) async fn wait_ports(&self, wanted: &[&str]) {
        within(&format!("ports {wanted:?}"), async {
            while self.fake.ports() != wanted {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        })
        .await;
    }

    pub(crate) async fn target_pod(&self, migration: &VirtualMachineInstanceMigration) -> Pod {
        let selector = format!("{}={}", names::MIGRATION_JOB_UID, migration.uid().unwrap());
        let pods = self
            .api::<Pod>()
            .list(&ListParams::default().labels(&selector))
            .await
            .unwrap();
        pods.items.into_iter().next().unwrap()
    }

    /// The reasons of the Events on an object.
    pub(crate) async fn events_on(&self, uid: &str) -> Vec<String> {
        let events = self
            .api::<Event>()
            .list(&ListParams::default())
            .await
            .unwrap();
        events
            .into_iter()
            .filter(|event| {
                event
                    .regarding
                    .as_ref()
                    .and_then(|object| object.uid.as_deref())
                    == Some(uid)
            })
            .filter_map(|event| event.reason)
            .collect()
    }

    /// Every state of a VMI from now on, until `last`.
    pub(crate) async fn record(
        &self,
        name: &str,
        last: impl Fn(&VirtualMachineInstance) -> bool + Send + 'static,
    ) -> tokio::task::JoinHandle<Vec<VirtualMachineInstance>> {
        let api = self.api::<VirtualMachineInstance>();
        let only = watcher::Config::default().fields(&format!("metadata.name={name}"));
        let (started, first) = oneshot::channel();
        let recorded = tokio::spawn(async move {
            let (mut states, mut started) = (Vec::new(), Some(started));
            let mut seen = pin!(watcher(api, only).applied_objects());
            while let Some(state) = seen.next().await {
                let state = state.unwrap();
                let is_last = last(&state);
                states.push(state);
                if let Some(started) = started.take() {
                    started.send(()).unwrap();
                }
                if is_last {
                    break;
                }
            }
            states
        });
        within("the first state of a VMI", first).await.unwrap();
        recorded
    }
}

pub(crate) async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    timeout(DEADLINE, future)
        .await
        .unwrap_or_else(|_| panic!("{what}: not within {DEADLINE:?}"))
}
