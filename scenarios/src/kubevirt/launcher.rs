//! virt-launcher: the process in the pod, its domain, and the copy that it makes.
//!
//! It is none of the roles that can be switched off. As in KubeVirt a copy goes on, and what came of it is kept, while
//! virt-handler is away.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use futures::{Stream, StreamExt as _, stream};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use tokio::{
    sync::{broadcast, watch},
    task::JoinSet,
};
use tracing::{info, warn};

use super::{
    Delays, DomainEvent, DomainState, Error, HookCall, Hypervisor, Machine, Migration, Nic,
    Sandbox, api::now,
};

/// virt-launcher gives libvirt this long to abort (`pkg/virt-launcher/virtwrap/live-migration-source.go`).
const ABORT_DEADLINE: Duration = Duration::from_secs(30);
/// Far more than happens while a reader is busy: a call is made once a second at most.
const HOOK_CALLS_KEPT: usize = 256;

/// A pod as its node has it.
#[derive(Clone, Debug)]
pub(super) struct Launcher {
    pub(super) sandbox: Sandbox,
    /// The name that its domain has or will have.
    pub(super) domain_name: String,
    /// What is plugged; `None` before CNI ADD and after CNI DEL.
    pub(super) plugged: Option<Vec<Nic>>,
    /// The process was started.
    pub(super) started: bool,
    pub(super) domain: Option<Domain>,
    /// Where a target listens.
    pub(super) address: Option<String>,
    /// The copy that this pod is the source of.
    pub(super) job: Option<Job>,
    /// When the process ends, or ended.
    pub(super) exit: Option<Instant>,
}

/// The domain of a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Domain {
    pub(super) state: DomainState,
    pub(super) since: Instant,
}

/// A copy, as KubeVirt keeps it in the domain's metadata.
#[derive(Clone, Debug)]
pub(super) struct Job {
    pub(super) migration: Migration,
    pub(super) started: Time,
    pub(super) ended: Option<Ended>,
    pub(super) abort: Option<Abort>,
}

/// How a copy ended.
#[derive(Clone, Debug)]
pub(super) struct Ended {
    pub(super) at: Instant,
    pub(super) timestamp: Time,
    pub(super) failure: Option<String>,
}

/// How far an abort is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Abort {
    InProgress,
    Succeeded,
    Failed,
}

/// Every virt-launcher of the lab.
pub(super) struct Launchers<H> {
    hypervisor: H,
    delays: Delays,
    /// By the UID of the pod.
    all: Mutex<HashMap<String, Launcher>>,
    changes: watch::Sender<u64>,
    hook_calls: broadcast::Sender<HookCall>,
    tasks: Mutex<JoinSet<()>>,
}

impl<H: Hypervisor> Launchers<H> {
    pub(super) fn new(hypervisor: H, delays: Delays) -> Arc<Self> {
        let events = hypervisor.events();
        let launchers = Arc::new(Self {
            hypervisor,
            delays,
            all: Mutex::default(),
            changes: watch::Sender::new(0),
            hook_calls: broadcast::Sender::new(HOOK_CALLS_KEPT),
            tasks: Mutex::default(),
        });
        // Weak: the task would otherwise keep its own owner alive.
        let listener = Arc::downgrade(&launchers);
        launchers.spawn(async move {
            let mut events = events;
            while let Some(event) = events.next().await {
                let Some(launchers) = listener.upgrade() else {
                    return;
                };
                launchers.observe(&event);
            }
        });
        launchers
    }

    pub(super) fn delays(&self) -> &Delays {
        &self.delays
    }

    pub(super) fn hypervisor(&self) -> &H {
        &self.hypervisor
    }

    /// An item whenever something about a launcher has changed.
    pub(super) fn changes(&self) -> impl Stream<Item = ()> + Send + 'static {
        stream::unfold(self.changes.subscribe(), |mut changes| async move {
            changes.changed().await.ok().map(|()| ((), changes))
        })
    }

    /// What happens to calls of plugins' hooks from now on.
    pub(super) fn hook_calls(&self) -> broadcast::Receiver<HookCall> {
        self.hook_calls.subscribe()
    }

    pub(super) fn tell_hook_call(&self, call: HookCall) {
        tracing::debug!(?call, "node hook");
        // Nobody listening is no error.
        _ = self.hook_calls.send(call);
    }

    pub(super) fn by_uid(&self, pod_uid: &str) -> Option<Launcher> {
        self.lock().get(pod_uid).cloned()
    }

    /// The pod's launcher, unless its process has ended.
    pub(super) fn by_pod(&self, node: &str, namespace: &str, pod: &str) -> Option<Launcher> {
        self.find(|launcher| {
            let sandbox = &launcher.sandbox;
            (&*sandbox.node, &*sandbox.namespace, &*sandbox.pod) == (node, namespace, pod)
        })
    }

    /// The launcher that has, or is to have, the domain on the node.
    pub(super) fn by_domain(&self, node: &str, domain: &str) -> Option<Launcher> {
        self.find(|launcher| launcher.sandbox.node == node && launcher.domain_name == domain)
    }

    /// The copy of a migration, running or over.
    pub(super) fn job(&self, migration_uid: &str) -> Option<Job> {
        let all = self.lock();
        let mut jobs = all.values().filter_map(|launcher| launcher.job.as_ref());
        jobs.find(|job| job.migration.uid == migration_uid).cloned()
    }

    fn find(&self, wanted: impl Fn(&Launcher) -> bool) -> Option<Launcher> {
        self.lock()
            .values()
            .find(|launcher| launcher.exit.is_none() && wanted(launcher))
            .cloned()
    }

    /// CNI ADD.
    pub(super) async fn plug(
        &self,
        sandbox: &Sandbox,
        domain_name: String,
        nics: Vec<Nic>,
    ) -> Result<(), Error> {
        if self.by_uid(&sandbox.uid).is_some() {
            return Ok(());
        }
        self.hypervisor
            .plug(sandbox, &nics)
            .await
            .map_err(Error::hypervisor(format!(
                "plugging pod {} on {}",
                sandbox.pod, sandbox.node
            )))?;
        let launcher = Launcher {
            sandbox: sandbox.clone(),
            domain_name,
            plugged: Some(nics),
            started: false,
            domain: None,
            address: None,
            job: None,
            exit: None,
        };
        self.lock().insert(sandbox.uid.clone(), launcher);
        self.changed();
        Ok(())
    }

    /// CNI DEL. What was plugged is remembered: the VMI may be gone.
    pub(super) async fn unplug(&self, pod_uid: &str) -> Result<(), Error> {
        let Some(Launcher {
            sandbox,
            plugged: Some(nics),
            ..
        }) = self.by_uid(pod_uid)
        else {
            return Ok(());
        };
        self.hypervisor
            .unplug(&sandbox, &nics)
            .await
            .map_err(Error::hypervisor(format!(
                "unplugging pod {} on {}",
                sandbox.pod, sandbox.node
            )))?;
        self.update(pod_uid, |launcher| launcher.plugged = None);
        Ok(())
    }

    /// The containers run.
    pub(super) fn run(&self, pod_uid: &str) {
        self.update(pod_uid, |launcher| launcher.started = true);
    }

    /// Forgets a pod that is gone.
    pub(super) fn forget(&self, pod_uid: &str) {
        self.lock().remove(pod_uid);
        self.changed();
    }

    pub(super) async fn start(&self, launcher: &Launcher, machine: &Machine) -> Result<(), Error> {
        if launcher.domain.is_some() {
            return Ok(());
        }
        let sandbox = &launcher.sandbox;
        self.hypervisor
            .start(sandbox, machine)
            .await
            .map_err(Error::hypervisor(format!(
                "starting {} on {}",
                launcher.domain_name, sandbox.node
            )))?;
        self.set_domain(&sandbox.uid, DomainState::Running, Instant::now());
        Ok(())
    }

    pub(super) async fn prepare(
        &self,
        launcher: &Launcher,
        machine: &Machine,
    ) -> Result<String, Error> {
        if let Some(address) = &launcher.address {
            return Ok(address.clone());
        }
        let sandbox = &launcher.sandbox;
        let address = self
            .hypervisor
            .prepare_target(sandbox, machine)
            .await
            .map_err(Error::hypervisor(format!(
                "preparing {} to receive {}",
                sandbox.node, launcher.domain_name
            )))?;
        self.update(&sandbox.uid, |launcher| {
            launcher.address = Some(address.clone());
        });
        Ok(address)
    }

    /// Starts the copy. Like a pod a copy is made once: its UID is not taken again.
    pub(super) fn migrate(self: &Arc<Self>, migration: Migration) {
        let source = migration.source.uid.clone();
        let begun = self.update(&source, |launcher| {
            if launcher
                .job
                .as_ref()
                .is_some_and(|job| job.migration.uid == migration.uid)
            {
                return false;
            }
            launcher.job = Some(Job {
                migration: migration.clone(),
                started: now(),
                ended: None,
                abort: None,
            });
            true
        });
        if begun != Some(true) {
            return;
        }
        info!(
            domain = migration.machine.domain(),
            to = migration.target.node,
            "the copy starts"
        );
        let launchers = Arc::clone(self);
        self.spawn(async move {
            let failure = launchers.hypervisor.migrate(&migration).await.err();
            launchers
                .finish(&migration, failure.map(|error| error.to_string()))
                .await;
        });
    }

    async fn finish(&self, migration: &Migration, failure: Option<String>) {
        let (source, target, at) = (&migration.source.uid, &migration.target.uid, Instant::now());
        let failure = match failure {
            Some(_) if self.was_aborted(source).await => {
                Some("Live migration has been aborted".to_owned())
            }
            failure => failure,
        };
        // What the events have not told.
        let deduced = if failure.is_none() {
            [
                (target, DomainState::Running),
                (source, DomainState::Shutoff),
            ]
        } else {
            [
                (target, DomainState::Shutoff),
                (source, DomainState::Running),
            ]
        };
        for (pod_uid, state) in deduced {
            if self
                .by_uid(pod_uid)
                .and_then(|launcher| launcher.domain)
                .is_none_or(|domain| domain.state != state)
            {
                self.set_domain(pod_uid, state, at);
            }
        }
        match &failure {
            None => info!(
                domain = migration.machine.domain(),
                on = migration.target.node,
                "the copy succeeded"
            ),
            Some(reason) => info!(
                domain = migration.machine.domain(),
                reason, "the copy failed"
            ),
        }
        self.update(source, |launcher| {
            if let Some(job) = &mut launcher.job {
                job.ended = Some(Ended {
                    at,
                    timestamp: now(),
                    failure,
                });
            }
            if launcher
                .domain
                .is_some_and(|domain| domain.state == DomainState::Shutoff)
            {
                launcher.exit = Some(Instant::now() + self.delays.launcher_exit);
            }
        });
    }

    /// Waits for a running abort to have a result, as the reason of the failure depends on it.
    async fn was_aborted(&self, source: &str) -> bool {
        let mut changes = self.changes.subscribe();
        let settled = async {
            loop {
                match self
                    .by_uid(source)
                    .and_then(|launcher| launcher.job)
                    .and_then(|job| job.abort)
                {
                    Some(Abort::InProgress) => changes.changed().await.ok()?,
                    settled => return settled,
                }
            }
        };
        matches!(
            tokio::time::timeout(ABORT_DEADLINE, settled).await,
            Ok(Some(Abort::Succeeded))
        )
    }

    /// Aborts the copy, if one runs and no abort is under way.
    pub(super) fn abort(self: &Arc<Self>, pod_uid: &str) -> bool {
        let migration = self.update(pod_uid, |launcher| {
            let job = launcher.job.as_mut().filter(|job| job.ended.is_none())?;
            if matches!(job.abort, Some(Abort::InProgress | Abort::Succeeded)) {
                return None;
            }
            job.abort = Some(Abort::InProgress);
            Some(job.migration.clone())
        });
        let Some(migration) = migration.flatten() else {
            return false;
        };
        let launchers = Arc::clone(self);
        self.spawn(async move {
            let aborted =
                tokio::time::timeout(ABORT_DEADLINE, launchers.hypervisor.abort(&migration)).await;
            let abort = if let Ok(Ok(())) = aborted {
                Abort::Succeeded
            } else {
                warn!(
                    domain = migration.machine.domain(),
                    ?aborted,
                    "the copy cannot be aborted"
                );
                Abort::Failed
            };
            launchers.update(&migration.source.uid, |launcher| {
                if let Some(job) = &mut launcher.job {
                    job.abort = Some(abort);
                }
            });
        });
        true
    }

    /// Ends the domain, if there is one, and then the process: a deleted pod, or the target of a failed migration.
    pub(super) async fn terminate(&self, pod_uid: &str) -> Result<(), Error> {
        let Some(launcher) = self.by_uid(pod_uid) else {
            return Ok(());
        };
        if launcher.exit.is_some() {
            return Ok(());
        }
        let (domain, node) = (&launcher.domain_name, &launcher.sandbox.node);
        self.hypervisor
            .destroy(&launcher.sandbox, domain)
            .await
            .map_err(Error::hypervisor(format!("destroying {domain} on {node}")))?;
        self.update(pod_uid, |launcher| {
            launcher.domain = launcher.domain.map(|_| Domain {
                state: DomainState::Shutoff,
                since: Instant::now(),
            });
            launcher.exit = Some(Instant::now() + self.delays.launcher_exit);
        });
        Ok(())
    }

    fn observe(&self, event: &DomainEvent) {
        let Some(launcher) = self.by_domain(&event.node, &event.domain) else {
            return;
        };
        self.set_domain(&launcher.sandbox.uid, event.state, event.at);
        // The guest powered off. What is sent or received ends by the verdict on the copy instead.
        if event.state == DomainState::Shutoff
            && launcher.job.is_none()
            && launcher.address.is_none()
        {
            let exit = Some(event.at + self.delays.launcher_exit);
            self.update(&launcher.sandbox.uid, |launcher| launcher.exit = exit);
        }
    }

    /// Stops watching domains and waiting for copies. The domains go on.
    pub(super) async fn shut_down(&self) {
        let mut tasks =
            std::mem::take(&mut *self.tasks.lock().unwrap_or_else(PoisonError::into_inner));
        tasks.shutdown().await;
    }

    fn set_domain(&self, pod_uid: &str, state: DomainState, since: Instant) {
        self.update(pod_uid, |launcher| {
            launcher.domain = Some(Domain { state, since });
        });
    }

    fn update<R>(&self, pod_uid: &str, change: impl FnOnce(&mut Launcher) -> R) -> Option<R> {
        let changed = self.lock().get_mut(pod_uid).map(change);
        self.changed();
        changed
    }

    fn changed(&self) {
        self.changes
            .send_modify(|count| *count = count.wrapping_add(1));
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Launcher>> {
        // Every change is made whole before it can panic.
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let mut tasks = self.tasks.lock().unwrap_or_else(PoisonError::into_inner);
        while tasks.try_join_next().is_some() {}
        tasks.spawn(task);
    }
}

/// Time left until something that happened at `since` is known, or `None` when it is.
pub(super) fn left(since: Instant, delay: Duration) -> Option<Duration> {
    let left = (since + delay).saturating_duration_since(Instant::now());
    (!left.is_zero()).then_some(left)
}
