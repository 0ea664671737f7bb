//! The watches, the queue and the databases around the decisions.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow};
use futures::StreamExt as _;
use futures::stream::BoxStream;
use k8s_openapi::api::core::v1::Pod;
use kube::api::{DynamicObject, ListParams, Patch, PatchParams};
use kube::runtime::{WatchStreamExt as _, watcher};
use kube::{Api, Client, Resource, ResourceExt as _};
use ovsdb_rs::{ClientOptions, Endpoints, Replica};
use serde_json::json;
use tokio::sync::mpsc;
use tokio::time::{MissedTickBehavior, interval, sleep, timeout};
use tracing::{debug, warn};

use super::cache::{Cache, Group, Port};
use super::migrations::{self, Outcome};
use super::pods::{self, Owner, State, Writes};
use super::write::Write;
use super::{Settings, groups};
use crate::kubevirt::{
    VirtualMachineInstance, VirtualMachineInstanceMigration, VmimPhase, names, virtual_machine,
};

const DATABASE: &str = "OVN_Northbound";
/// Of `--nodepg-probe-time`.
const PROBE_INTERVAL: Duration = Duration::from_mins(1);
/// What the queues wait before a second try, and double (client-go's `DefaultTypedControllerRateLimiter`).
const FIRST_RETRY: Duration = Duration::from_millis(5);
/// So that it is 20 s at most: the lab has no use for the 1,000 s of client-go.
const MOST_DOUBLINGS: u32 = 12;
/// The database tells of a write of one's own within milliseconds.
const OWN_WRITE_DEADLINE: Duration = Duration::from_secs(5);

/// `<namespace>/<name>`, of whatever it is the key.
type Key = (String, String);

/// Something in the queue.
#[derive(Clone, Debug)]
enum Work {
    /// A pod came or changed.
    Pod(Key),
    /// A pod went.
    DeletedPod(Box<Pod>),
    /// A migration came, or its phase changed.
    Migration(Key),
    /// A VirtualMachine went.
    DeletedVm(Key),
}

/// Something in the queue, and how often it was tried.
struct Item {
    work: Work,
    tries: u32,
}

/// The controller: its memory and its connections.
pub(super) struct Worker {
    settings: Settings,
    client: Client,
    north: ovsdb_rs::Client,
    replica: Replica,
    pods: BTreeMap<Key, Pod>,
    phases: HashMap<Key, Option<VmimPhase>>,
    queue: mpsc::UnboundedSender<Item>,
    queued: mpsc::UnboundedReceiver<Item>,
}

impl Worker {
    /// Connects, remembers what is there, and sets the port groups right, as a controller that starts does.
    pub(super) async fn start(settings: Settings, client: Client) -> Result<Self> {
        let endpoint = &settings.northbound;
        let endpoints: Endpoints = endpoint.parse().context("the Northbound's endpoint")?;
        let north = ovsdb_rs::Client::connect(endpoints, ClientOptions::default());
        let north = north
            .await
            .with_context(|| format!("connect to {endpoint}"))?;
        let replica = Replica::builder(DATABASE)
            .table::<Port>()
            .table::<Group>()
            .start(&north)?;
        replica.wait_synced().await.context("the Northbound")?;
        let pods: Api<Pod> = Api::all(client.clone());
        let pods = pods.list(&ListParams::default().labels(&launchers())).await;
        let pods = pods.context("list pods")?.items;
        let (queue, queued) = mpsc::unbounded_channel();
        let worker = Self {
            settings,
            client,
            north,
            replica,
            pods: pods.into_iter().map(|pod| (key(&pod), pod)).collect(),
            phases: HashMap::new(),
            queue,
            queued,
        };
        let Settings { nodes, subnets, .. } = &worker.settings;
        worker
            .write(&groups::create(&worker.cache(), nodes, subnets))
            .await?;
        let moves = groups::reconcile_subnets(&worker.cache(), subnets, nodes, &worker.pods());
        worker.write(&moves).await?;
        Ok(worker)
    }

    /// Works until it is dropped.
    pub(super) async fn run(mut self) {
        let pods = watcher::Config::default().labels(&launchers());
        let mut pods = watch(Api::<Pod>::all(self.client.clone()), pods);
        let migrations = Api::<VirtualMachineInstanceMigration>::all(self.client.clone());
        let mut migrations = if self.settings.optimize {
            watch(migrations, watcher::Config::default())
        } else {
            futures::stream::pending().boxed()
        };
        let vms = Api::<DynamicObject>::all_with(self.client.clone(), &virtual_machine());
        let mut vms = watch(vms, watcher::Config::default());
        let mut probe = interval(PROBE_INTERVAL);
        probe.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut is_synced = false;
        loop {
            tokio::select! {
                Some(item) = self.queued.recv() => self.work(item).await,
                Some(event) = pods.next() => {
                    is_synced |= matches!(event, watcher::Event::InitDone);
                    self.pod_event(event, is_synced);
                }
                Some(event) = migrations.next() => self.migration_event(event),
                Some(event) = vms.next() => {
                    if let watcher::Event::Delete(vm) = event {
                        self.enqueue(Work::DeletedVm(key(&vm)));
                    }
                }
                _ = probe.tick() => {
                    let writes = groups::probe(&self.cache(), &self.settings.nodes, &self.pods());
                    if let Err(error) = self.write(&writes).await {
                        warn!("the nodes' port groups: {error:#}");
                    }
                }
            }
        }
    }

    fn pods(&self) -> Vec<&Pod> {
        self.pods.values().collect()
    }

    fn cache(&self) -> Cache {
        Cache::of(&self.replica.snapshot())
    }

    fn enqueue(&self, work: Work) {
        // The other end is this worker's own.
        _ = self.queue.send(Item { work, tries: 0 });
    }

    /// `enqueueAddPod`, `enqueueUpdatePod`, `enqueueDeletePod`.
    fn pod_event(&mut self, event: watcher::Event<Pod>, is_synced: bool) {
        match event {
            watcher::Event::InitApply(pod) | watcher::Event::Apply(pod) => {
                let key = key(&pod);
                let known = self.pods.insert(key.clone(), pod.clone());
                let works = match known.filter(|_| is_synced) {
                    None => pods::is_alive(&pod) && pods::needs_sync(&pod),
                    Some(known) => known.resource_version() != pod.resource_version(),
                };
                if works {
                    self.enqueue(Work::Pod(key));
                }
            }
            watcher::Event::Delete(pod) => {
                self.pods.remove(&key(&pod));
                self.enqueue(Work::DeletedPod(Box::new(pod)));
            }
            watcher::Event::Init | watcher::Event::InitDone => {}
        }
    }

    /// `enqueueAddVMIMigration`, `enqueueUpdateVMIMigration`: every migration at the start, and then every change of a
    /// phase.
    fn migration_event(&mut self, event: watcher::Event<VirtualMachineInstanceMigration>) {
        match event {
            watcher::Event::InitApply(migration) | watcher::Event::Apply(migration) => {
                let key = key(&migration);
                let before = self.phases.insert(key.clone(), migration.phase());
                let is_deleting = migration.metadata.deletion_timestamp.is_some();
                if before != Some(migration.phase()) || is_deleting {
                    self.enqueue(Work::Migration(key));
                }
            }
            watcher::Event::Delete(migration) => {
                self.phases.remove(&key(&migration));
            }
            watcher::Event::Init | watcher::Event::InitDone => {}
        }
    }

    /// Works on an item, and puts it back for later where that does not come to an end.
    async fn work(&mut self, Item { work, tries }: Item) {
        let done = match &work {
            Work::Pod(key) => self.pod(key).await.map(|()| true),
            Work::DeletedPod(pod) => self.deleted_pod(pod).await.map(|()| true),
            Work::Migration(key) => self.migration(key).await,
            Work::DeletedVm((namespace, name)) => {
                let (cache, vm) = (self.cache(), format!("{namespace}/{name}"));
                let ports = cache.ports_of(&vm);
                let deletes: Vec<_> = ports.map(|(port, _)| Write::Delete { port }).collect();
                self.write(&deletes).await.map(|()| true)
            }
        };
        match done {
            Ok(true) => return,
            Ok(false) => {}
            Err(error) => warn!("trying again: {error:#}"),
        }
        let queue = self.queue.clone();
        tokio::spawn(async move {
            sleep(FIRST_RETRY * 2_u32.pow(tries.min(MOST_DOUBLINGS))).await;
            // The worker may have been dropped meanwhile.
            _ = queue.send(Item {
                work,
                tries: tries + 1,
            });
        });
    }

    /// `handleAddOrUpdatePod`.
    async fn pod(&mut self, key: &Key) -> Result<()> {
        let Some(pod) = self.pods.get(key).cloned() else {
            return Ok(());
        };
        if self.owner(&pod).await?.is_some_and(Owner::is_going) {
            return Ok(());
        }
        let writes = pods::allocate(&self.cache(), &pod);
        let writes = writes.map_err(|annotation| {
            let (namespace, name) = key;
            anyhow!("pod {namespace}/{name} asks for no address: it has no annotation {annotation}")
        })?;
        let Some(pod) = self.carry_out(pod, writes).await? else {
            return Ok(());
        };
        let writes = pods::route(&self.cache(), &pod);
        self.carry_out(pod, writes).await.map(drop)
    }

    /// Writes to the Northbound, and then the pod's annotations. Returns the pod as it is then, unless it is gone.
    async fn carry_out(&self, pod: Pod, writes: Writes) -> Result<Option<Pod>> {
        self.write(&writes.north).await?;
        let is_there = |(key, value): (&String, &String)| pod.annotations().get(key) == Some(value);
        if writes.annotations.iter().all(is_there) {
            return Ok(Some(pod));
        }
        let (namespace, name) = key(&pod);
        let patch = Patch::Merge(json!({"metadata": {"annotations": writes.annotations}}));
        let pods: Api<Pod> = Api::namespaced(self.client.clone(), &namespace);
        match pods.patch(&name, &PatchParams::default(), &patch).await {
            Ok(pod) => Ok(Some(pod)),
            Err(kube::Error::Api(status)) if status.is_not_found() => Ok(None),
            Err(error) => Err(error).with_context(|| format!("annotate pod {namespace}/{name}")),
        }
    }

    /// `handleDeletePod`.
    async fn deleted_pod(&self, pod: &Pod) -> Result<()> {
        let Some(owner) = self.owner(pod).await? else {
            return Ok(());
        };
        let writes = pods::delete(&self.cache(), pod, owner, &self.pods());
        self.write(&writes).await
    }

    /// `handleAddOrUpdateVMIMigration`. Returns whether it came to an end.
    async fn migration(&self, (namespace, name): &Key) -> Result<bool> {
        let migrations: Api<VirtualMachineInstanceMigration> =
            Api::namespaced(self.client.clone(), namespace);
        let vmis: Api<VirtualMachineInstance> = Api::namespaced(self.client.clone(), namespace);
        let context = || format!("read migration {namespace}/{name} and its VMI");
        // The controller itself tries again for ever where they are gone.
        let Some(migration) = migrations.get_opt(name).await.with_context(context)? else {
            return Ok(true);
        };
        let vmi = vmis.get_opt(&migration.spec.vmi_name).await;
        let Some(vmi) = vmi.with_context(context)? else {
            return Ok(true);
        };
        match migrations::decide(&self.cache(), &migration, &vmi, &self.pods()) {
            Outcome::Done(writes) => self.write(&writes).await.map(|()| true),
            Outcome::Deferred => Ok(false),
        }
    }

    /// What there is of the VM whose pod it is; none of a pod that is nobody's.
    async fn owner(&self, pod: &Pod) -> Result<Option<Owner>> {
        let (Some(name), Some(namespace)) = (pods::vm(pod), pod.namespace()) else {
            return Ok(None);
        };
        let context = || format!("read VM {namespace}/{name}");
        let vmis: Api<VirtualMachineInstance> = Api::namespaced(self.client.clone(), &namespace);
        let machines = Api::namespaced_with(self.client.clone(), &namespace, &virtual_machine());
        let vmi = vmis.get_opt(name).await.with_context(context)?;
        let vm: Option<DynamicObject> = machines.get_opt(name).await.with_context(context)?;
        let mut owners = vmi.iter().flat_map(kube::ResourceExt::owner_references);
        Ok(Some(Owner {
            is_owned: owners.any(|owner| owner.kind == "VirtualMachine"),
            vmi: state(vmi.as_ref()),
            vm: state(vm.as_ref()),
        }))
    }

    async fn write(&self, writes: &[Write]) -> Result<()> {
        for write in writes {
            let transaction = write.transaction();
            if transaction.is_empty() {
                continue;
            }
            let written = self.north.transact(DATABASE, transaction).await;
            written.with_context(|| format!("{write:?}"))?;
            debug!("{write:?}");
            if let Write::Create { columns, .. } = write {
                self.remembers(&columns.name).await?;
            }
        }
        Ok(())
    }

    /// Returns once a port that was made is remembered.
    async fn remembers(&self, port: &str) -> Result<()> {
        let mut changed = self.replica.changed();
        let remembered = async {
            while self.cache().port(port).is_none() {
                changed.changed().await.context("the Northbound is gone")?;
            }
            Ok(())
        };
        let remembered = timeout(OWN_WRITE_DEADLINE, remembered).await;
        remembered.with_context(|| format!("port {port} was made and is not told of"))?
    }
}

fn launchers() -> String {
    format!("{}={}", names::APP, names::VIRT_LAUNCHER)
}

/// Follows objects for ever: a watch that breaks off is begun anew.
fn watch<K>(api: Api<K>, config: watcher::Config) -> BoxStream<'static, watcher::Event<K>>
where
    K: Resource + Clone + serde::de::DeserializeOwned + std::fmt::Debug + Send + 'static,
{
    let events = watcher(api, config).default_backoff();
    let told = events.filter_map(async |event| {
        let broken = |error: &watcher::Error| warn!(%error, "a watch broke off");
        event.inspect_err(broken).ok()
    });
    told.boxed()
}

fn key(object: &impl kube::ResourceExt) -> Key {
    (object.namespace().unwrap_or_default(), object.name_any())
}

fn state<K: kube::ResourceExt>(object: Option<&K>) -> State {
    match object.map(|object| object.meta().deletion_timestamp.is_some()) {
        None => State::Absent,
        Some(true) => State::Deleting,
        Some(false) => State::Present,
    }
}
