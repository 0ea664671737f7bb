//! One VM's handovers, observed, decided, written and recorded.

mod agents;
mod hindrance;
mod news;
mod plan;
mod queue;
mod record;
mod rest;
mod said;
mod save;

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use handover::{Decision, Phase, VmName, decide};
use kube::Client;
use kube::runtime::events::Recorder;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::agents::Hub;
use crate::api::{HandoverSpec, Moment, RoutingMode};
use crate::cluster::{Cluster, Kind, Listener, VmObjects};
use crate::metrics::Metrics;
use crate::observe::{Inputs, Observation, observe, preflight};
use crate::ovn::{
    Basis, Databases, Mismatch, Owners, Target, View, Writer, Written, obstacle, shown,
};
use crate::policy::{Policy, Settings};
use crate::routed::Alarms;

use news::News;
use queue::Queue;
use record::Record;
use rest::{Rest, rest};

pub(crate) use agents::Reception;
pub(crate) use said::Said;

/// How many writes one look at a VM may lead to before others get their turn. A handover needs five.
const MAX_WRITES: usize = 8;
/// For how long after the pause a record may wait to be stored: what the resume leads to must not wait
/// for the API server. Guests are paused for less.
pub(crate) const IN_TRANSIT: Duration = Duration::from_millis(500);

/// What reconciling needs.
pub(crate) struct Reconciler {
    pub(crate) cluster: Arc<Cluster>,
    pub(crate) databases: Arc<Databases>,
    pub(crate) writer: Arc<Writer>,
    pub(crate) client: Client,
    pub(crate) recorder: Recorder,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) work: Arc<Work>,
    /// The nodes' agents.
    pub(crate) hub: Arc<Hub>,
    /// How handovers are done where no policy says otherwise.
    pub(crate) settings: Settings,
    /// After the last container of a finished pod: how long its interface may linger.
    pub(crate) pod_gone_grace: Duration,
    /// How long the record of a guest that is between its hosts may wait to be stored.
    pub(crate) in_transit: Duration,
    /// Records that the API server does not have yet, by the migration's UID.
    pub(crate) unsaved: Mutex<BTreeMap<String, Record>>,
    /// What the log has already.
    pub(crate) said: Said,
}

/// Which VMs need a look, fed by the watches and the replicas.
pub(crate) struct Work {
    queue: Queue<VmName>,
    /// VMs with an open handover: what changes the world concerns them.
    active: Mutex<HashSet<VmName>>,
    /// VMs whose node has no chassis yet.
    unmapped: Mutex<HashSet<VmName>>,
    cluster: Arc<Cluster>,
    metrics: Arc<Metrics>,
    databases: std::sync::OnceLock<Arc<Databases>>,
    alarms: Arc<Alarms>,
}

/// One handover, observed.
struct Looked {
    /// The phase on record.
    before: Phase,
    record: Record,
    seen: Observation,
}

/// One handover, decided.
struct Case {
    record: Record,
    seen: Observation,
    decision: Decision,
}

/// When to look again.
#[derive(Default)]
struct Again {
    /// At this moment, even if nothing changes.
    at: Option<Moment>,
    /// Soon: something went wrong.
    retry: bool,
    /// Handovers are open.
    open: bool,
    /// The guest's node has no chassis yet.
    unmapped: bool,
    /// A guest is between its hosts, at most until then: records are stored when it has arrived.
    in_transit: Option<Moment>,
}

// === impl Work ===

impl Work {
    pub(crate) fn new(cluster: Arc<Cluster>, metrics: Arc<Metrics>) -> Self {
        Self {
            queue: Queue::default(),
            active: Mutex::default(),
            unmapped: Mutex::default(),
            cluster,
            metrics,
            databases: std::sync::OnceLock::new(),
            alarms: Arc::default(),
        }
    }

    /// Where marks of vanished migrations are looked for.
    pub(crate) fn attach(&self, databases: Arc<Databases>) {
        // A second database is none: the first call counts.
        let _ = self.databases.set(databases);
    }

    /// What the keeper of the routed topology's rows is woken by.
    pub(crate) fn alarms(&self) -> Arc<Alarms> {
        self.alarms.clone()
    }

    /// How many VMs wait for a worker.
    pub(crate) fn depth(&self) -> usize {
        self.queue.depth()
    }

    fn active(&self) -> MutexGuard<'_, HashSet<VmName>> {
        self.active.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn unmapped(&self) -> MutexGuard<'_, HashSet<VmName>> {
        self.unmapped.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Listener for Work {
    fn vms_changed(&self, vms: BTreeSet<VmName>) {
        for vm in vms {
            self.queue.push(vm);
        }
    }

    fn world_changed(&self) {
        let active: Vec<_> = self.active().iter().cloned().collect();
        for vm in active {
            self.queue.push(vm);
        }
    }

    fn nodes_changed(&self) {
        let mut vms: BTreeSet<_> = self.active().iter().cloned().collect();
        vms.extend(self.unmapped().iter().cloned());
        self.vms_changed(vms);
    }

    fn everything_changed(&self) {
        let mut all = self.cluster.vms_to_handle();
        if let Some(databases) = self.databases.get() {
            all.extend(databases.marked_vms(&*self.cluster));
            if databases.cluster_router().is_some() {
                // A guest at rest has a place too.
                all.extend(self.cluster.instances());
            }
        }
        self.vms_changed(all);
        self.layout_changed();
        self.addresses_left();
    }

    fn layout_changed(&self) {
        self.alarms.layout();
    }

    fn addresses_left(&self) {
        self.alarms.stray();
    }

    fn malformed(&self, kind: Kind) {
        self.metrics.malformed(kind);
    }
}

impl Owners for Cluster {
    fn knows(&self, vm: &VmName) -> bool {
        Cluster::knows(self, vm)
    }

    fn chassis_of(&self, node: &str) -> Option<String> {
        self.chassis_annotation(node)
    }
}

// === impl Reconciler ===

impl Reconciler {
    /// Starts the workers; they finish what they have in hand when `stop` is cancelled.
    pub(crate) fn start(
        self: &Arc<Self>,
        workers: usize,
        stop: &CancellationToken,
        tasks: &mut JoinSet<()>,
    ) {
        for _ in 0..workers {
            let (this, stop) = (self.clone(), stop.clone());
            tasks.spawn(async move {
                while let Some(vm) = stop.run_until_cancelled(this.work.queue.next()).await {
                    this.work_on(&vm).await;
                    this.work.queue.done(&vm);
                }
            });
        }
    }

    async fn work_on(&self, vm: &VmName) {
        // Before anything is looked at: what changes the world meanwhile must come back to this VM.
        self.work.active().insert(vm.clone());
        let begin = Instant::now();
        let again = self.reconcile(vm).await;
        self.metrics.reconciled(begin.elapsed());
        // Before it leaves the active ones: a node's news in between must find it in one of both.
        if again.unmapped {
            self.work.unmapped().insert(vm.clone());
        } else {
            self.work.unmapped().remove(vm);
        }
        if !again.open && !again.retry {
            self.work.active().remove(vm);
        }
        if again.retry {
            self.work.queue.retry(vm.clone());
            return;
        }
        self.work.queue.forgive(vm);
        if let Some(at) = again.at {
            let delay = at.seconds_since(Moment::now()).max(0.0);
            self.work
                .queue
                .push_after(vm.clone(), Duration::from_secs_f64(delay));
        }
    }

    /// Whether there is a reason to do nothing: somebody else writes, or not all is known.
    fn is_blind(&self) -> bool {
        !(self.writer.is_leader() && self.cluster.is_synced() && self.databases.is_synced())
    }

    async fn reconcile(&self, vm: &VmName) -> Again {
        let mut again = Again::default();
        let mut records = BTreeMap::new();
        for _ in 0..MAX_WRITES {
            if self.is_blind() {
                // What ends the blindness looks at everything again.
                return again;
            }
            let objects = self.cluster.vm(vm);
            if !objects.malformed.is_empty() {
                again.retry = !self.hold(vm, &objects).await;
                again.open = true;
                return again;
            }
            let policy = objects
                .vmi
                .as_ref()
                .and_then(|vmi| self.cluster.policy(vmi));
            if let Some(policy) = policy.as_deref() {
                self.mention(policy);
            }
            let (view, cases) = self.look(vm, &objects, policy.as_deref(), &mut records);
            again = summary(&cases, self.in_transit);
            let Some(case) = cases.iter().find(|case| case.decision.write.is_some()) else {
                if !again.open {
                    self.place(vm, &objects, &view, policy.as_deref(), &mut again)
                        .await;
                }
                break;
            };
            match self.write(vm, case, &view, policy.as_deref()).await {
                Written::Committed => {
                    if let (Some(record), Some(write)) =
                        (records.get_mut(case.record.uid()), &case.decision.write)
                    {
                        record.stepped(write, Moment::now());
                    }
                }
                // The row's news is on its way and brings this VM back; a pause in case it is not.
                Written::Refused(_) | Written::Indeterminate(_) => {
                    again.retry = true;
                    break;
                }
                Written::Failed(why) => {
                    if let (Some(record), Some(write)) =
                        (records.get_mut(case.record.uid()), &case.decision.write)
                    {
                        record.not_written(write.step, &why, Moment::now());
                    }
                    again.retry = true;
                    break;
                }
                Written::NotLeader => return again,
            }
        }
        self.record_gate(vm, &mut records);
        // Of what is no longer worked on there is nothing left to store: its migration is gone, and its
        // namespace may be.
        self.unsaved()
            .retain(|uid, record| !record.is_of(vm) || records.contains_key(uid));
        if let Some(until) = again.in_transit.filter(|_| !again.retry) {
            self.unsaved().extend(records);
            again.at = again.at.into_iter().chain([until]).min();
            return again;
        }
        if !self.save_all(records).await {
            again.retry = true;
        }
        again
    }

    /// Puts on record what was answered at the gate.
    fn record_gate(&self, vm: &VmName, records: &mut BTreeMap<String, Record>) {
        for word in self.hub.decided(vm) {
            let newest = records.values().max_by_key(|record| record.spec.epoch);
            let newest = newest.map(|record| record.uid().to_owned());
            let record = word
                .migration
                .or(newest)
                .and_then(|uid| records.get_mut(&uid));
            // Of a guest that is elsewhere nobody on this node asks.
            let asks = |record: &&mut Record| {
                let source = record.spec.source.as_ref();
                source.is_none_or(|source| source.node == word.node)
            };
            if let Some(record) = record.filter(asks) {
                record.news.push(News::gate(&word.answer));
            }
        }
    }

    /// Observes and decides every handover of the VM, the newest first. `records` carries what was
    /// learned from one look to the next.
    fn look(
        &self,
        vm: &VmName,
        objects: &VmObjects,
        policy: Option<&Policy>,
        records: &mut BTreeMap<String, Record>,
    ) -> (View, Vec<Case>) {
        let now = Moment::now();
        let view = self
            .databases
            .view(vm, &plan::migrations(objects, records), &*self.cluster);
        let settings = self.settings(policy).held_to(&view);
        let chassis_of = |node: &str| self.chassis_of(&view, node);
        let unsaved = self.unsaved().clone();
        plan::load(vm, objects, &view.ports, &unsaved, &chassis_of, records);
        let mut order: Vec<_> = records.values().cloned().collect();
        order.sort_by_key(|record| std::cmp::Reverse(record.spec.epoch));
        let barrier = view.barrier();
        let ports = shown(&view.ports);
        let router = self.databases.cluster_router();
        let mut looked = Vec::new();
        for mut record in order {
            let before = record.clone();
            let learned = self.hub.learned(vm, before.uid());
            let inputs = Inputs {
                now,
                objects,
                migration: before.migration.as_deref(),
                former: &plan::former(&record, objects, &chassis_of),
                ports: &ports,
                routes: settings.routes(&view),
                flip: settings.flip,
                barrier: barrier.clone(),
                chassis_of: &chassis_of,
                patience: settings.patience(self.pod_gone_grace),
                learned: &learned,
            };
            let mut seen = observe(&inputs, &mut record.spec, &mut record.status);
            seen.unmapped = self.unmapped(&view, &record.spec);
            seen.hindrance = hindrance::hindrance(&seen, &view.places, settings.mode, router);
            looked.push(Looked {
                before: before.status.phase,
                record,
                seen,
            });
        }
        plan::order(&mut looked);
        let mut cases: Vec<Case> = Vec::new();
        for (position, looked) in looked.into_iter().enumerate() {
            if looked.before.is_final() && !plan::reopens(&looked, position == 0) {
                continue;
            }
            let Looked {
                mut record,
                mut seen,
                ..
            } = looked;
            let mut decision = decide(&seen.observed);
            if !plan::is_worth_it(&record, &decision) {
                records.remove(record.uid());
                continue;
            }
            if let Some(vmi) = &objects.vmi {
                record.preflight(vmi, preflight(vmi), now);
                record.status.policy = policy.map(|policy| policy.name().to_owned());
            }
            if let Some(obstacle) = obstacle_to(vm, &record, &decision, &view, settings.mode) {
                seen.obstacle = Some(obstacle.to_string());
                decision.write = None;
            }
            record.reflect(&decision, &seen, now);
            records.insert(record.uid().to_owned(), record.clone());
            cases.push(Case {
                record,
                seen,
                decision,
            });
        }
        let standing = agents::standing(vm, &cases, &view.ports);
        let guest_on = agents::guest_on(&cases, objects);
        let asked = agents::view(objects, &cases);
        self.hub.stand(vm, standing, guest_on.as_deref(), &asked);
        (view, cases)
    }

    fn settings(&self, policy: Option<&Policy>) -> Settings {
        policy.map_or(self.settings, |policy| policy.apply(self.settings))
    }

    fn chassis_of(&self, view: &View, node: &str) -> Option<handover::Chassis> {
        view.chassis_of(node, &*self.cluster).ok()
    }

    /// Why an end of the migration is no chassis.
    fn unmapped(&self, view: &View, spec: &HandoverSpec) -> Option<String> {
        let ends = [("source", &spec.source), ("target", &spec.target)];
        ends.into_iter().find_map(|(end, place)| {
            let place = place.as_ref().filter(|place| place.chassis.is_none())?;
            let why = view.chassis_of(&place.node, &*self.cluster).err()?;
            Some(format!("{end} node {} is no chassis: {why}", place.node))
        })
    }

    /// Sees to it that the routes of a guest that no migration moves lead to where it is.
    async fn place(
        &self,
        vm: &VmName,
        objects: &VmObjects,
        view: &View,
        policy: Option<&Policy>,
        again: &mut Again,
    ) {
        self.mention_placeless(vm, view);
        let mode = self.settings(policy).mode;
        let write = match rest(objects, &view.ports, &view.places, mode, &|node| {
            self.chassis_of(view, node)
        }) {
            Rest::Settled => return,
            Rest::Unmapped => {
                again.unmapped = true;
                return;
            }
            Rest::Place(write) => write,
        };
        let begin = Instant::now();
        let comment = format!("segue: the place of {vm}");
        let written = self.writer.write(&write, view.into(), &comment).await;
        let took = begin.elapsed();
        self.metrics.placed(&written, took);
        match &written {
            Written::Committed => {
                let routes = write.routes.iter().map(|route| route.route.as_str());
                let routes: Vec<_> = routes.collect();
                let to = write.routes.first().and_then(|route| route.to.as_ref());
                tracing::info!(%vm, ?routes, ?to, ?took, "placed");
            }
            Written::NotLeader => {}
            Written::Refused(why) => tracing::debug!(%vm, why, "not placed; looking again"),
            Written::Indeterminate(why) | Written::Failed(why) => {
                tracing::warn!(%vm, why, "not placed; trying again");
            }
        }
        again.retry = !matches!(written, Written::Committed | Written::NotLeader);
    }

    async fn write(
        &self,
        vm: &VmName,
        case: &Case,
        view: &View,
        policy: Option<&Policy>,
    ) -> Written {
        let Some(write) = &case.decision.write else {
            return Written::Committed;
        };
        let step = write.step;
        let migration = case.record.uid();
        let comment = format!("segue: {step} for migration {migration} of {vm}");
        let begin = Instant::now();
        let mode = self.settings(policy).held_to(view).mode;
        let target = counterpart(vm, &case.record, view, mode);
        let basis = basis(view, mode, target.as_ref());
        let written = self.writer.write(write, basis, &comment).await;
        let took = begin.elapsed();
        self.metrics.wrote(step, &written, took);
        let name = &case.record.name;
        match &written {
            Written::Committed => tracing::info!(%vm, migration = name, %step, ?took, "written"),
            Written::Refused(why) => {
                tracing::debug!(%vm, migration = name, %step, why, "refused; looking again");
            }
            Written::NotLeader => tracing::warn!(%vm, migration = name, %step, "the lock is lost"),
            Written::Indeterminate(why) => {
                tracing::warn!(%vm, migration = name, %step, why, "may be written; looking again");
            }
            Written::Failed(why) => {
                tracing::error!(%vm, migration = name, %step, why, "not written; trying again");
            }
        }
        written
    }

    /// Nothing is concluded from objects that cannot be read; the open records say so. Says whether
    /// they could.
    async fn hold(&self, vm: &VmName, objects: &VmObjects) -> bool {
        let message = objects.malformed.join("; ");
        tracing::warn!(%vm, why = message, "handovers wait");
        let mut records = BTreeMap::new();
        plan::refresh(objects, &self.unsaved(), &mut records);
        records.retain(|_, record| !record.status.phase.is_final());
        for record in records.values_mut() {
            record.degrade(Some(("MalformedObject", message.clone())), Moment::now());
        }
        self.save_all(records).await
    }

    /// Forgets what only this process knows.
    pub(crate) fn forget(&self) {
        self.unsaved().clear();
    }

    fn unsaved(&self) -> MutexGuard<'_, BTreeMap<String, Record>> {
        self.unsaved.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Where a VM whose network has a port for every pod gets its target's.
fn counterpart(vm: &VmName, record: &Record, view: &View, mode: RoutingMode) -> Option<Target> {
    let spec = Some(&record.spec).filter(|_| mode == RoutingMode::StaticRoutes)?;
    let (source, target) = (spec.source.as_ref()?, spec.target.as_ref()?);
    let pod = |place: &crate::api::Place| place.pod.clone().unwrap_or_default();
    Some(Target {
        vm: vm.clone(),
        pods: (pod(source), pod(target)),
        switch: view.statics.switch_for(target.chassis.as_deref()?)?,
    })
}

fn basis<'a>(view: &'a View, mode: RoutingMode, target: Option<&'a Target>) -> Basis<'a> {
    Basis {
        view,
        static_routes: mode == RoutingMode::StaticRoutes,
        target,
    }
}

/// Why a decision is not to be carried out.
fn obstacle_to(
    vm: &VmName,
    record: &Record,
    decision: &Decision,
    view: &View,
    mode: RoutingMode,
) -> Option<Mismatch> {
    let target = counterpart(vm, record, view, mode);
    obstacle(decision.write.as_ref()?, basis(view, mode, target.as_ref()))
}

fn summary(cases: &[Case], in_transit: Duration) -> Again {
    let deadlines = cases.iter().flat_map(|case| {
        let wake = case.decision.wake_at.and_then(|at| {
            let millis = i64::try_from(at.0).ok()?;
            jiff::Timestamp::from_millisecond(millis)
                .ok()
                .map(Moment::from_jiff)
        });
        [wake, case.seen.recheck]
    });
    let now = Moment::now();
    let in_transit = in_transit.as_secs_f64();
    let in_transit = cases.iter().filter_map(|case| {
        let status = &case.record.status;
        let since = status
            .phase_since
            .filter(|_| status.phase == Phase::Switching)?;
        let until = since.after_seconds(in_transit);
        (now < until).then_some(until)
    });
    Again {
        at: deadlines.flatten().min(),
        retry: false,
        unmapped: false,
        in_transit: in_transit.max(),
        open: cases
            .iter()
            .any(|case| !case.record.status.phase.is_final()),
    }
}

#[cfg(test)]
mod tests;
