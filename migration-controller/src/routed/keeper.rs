//! Keeps segue's rows of the routed topology as they should be.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use ovsdb_rs::Snapshot;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use super::standing::{Desired, Present};
use super::{Topology, sweep};
use crate::cluster::Listener;
use crate::metrics::Metrics;
use crate::ovn::{Databases, Writer, Written};

/// How long news are gathered before the rows are compared: whoever lays a network out writes in
/// many transactions.
const DEBOUNCE: Duration = Duration::from_millis(50);
/// How long to wait before what could not be written is tried again.
const RETRY: Duration = Duration::from_secs(1);
/// For how long an address must belong to no port before it is taken out of its set: a port that is
/// made anew has its address back by then.
const STRAY: Duration = Duration::from_secs(10);

/// How long news of addresses are gathered before all of them are looked through: many go at a time,
/// and each has to be gone for [`STRAY`] anyway.
const GATHER: Duration = Duration::from_secs(1);
/// For how long a gateway must be gone before the rows about it are removed: whoever lays a network
/// out, and starts anew, may make its routers anew, and its guests' places are in those rows.
pub(super) const GONE: Duration = Duration::from_secs(10);

/// What may have to be looked at.
#[derive(Default)]
pub(crate) struct Alarms {
    /// The topology or segue's rows changed.
    layout: Notify,
    /// An address may belong to no port any more.
    stray: Notify,
}

/// Makes the rows so, one controller at a time.
pub(crate) struct Keeper<L> {
    databases: Arc<Databases>,
    writer: Arc<Writer>,
    metrics: Arc<Metrics>,
    alarms: Arc<Alarms>,
    /// Whoever must look at VMs when their topology changes.
    listener: Arc<L>,
    /// What was last found.
    last: Mutex<Found>,
    /// Sets that nothing asks for any more, by name, with when that was first seen.
    gone: Mutex<BTreeMap<String, Instant>>,
}

/// What a look for the topology came to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
enum Found {
    /// There was none yet.
    #[default]
    NotSought,
    /// There is no cluster router.
    Nothing,
    /// This.
    Topology(Arc<Topology>),
}

// === impl Alarms ===

impl Alarms {
    /// The topology or segue's rows changed.
    pub(crate) fn layout(&self) {
        self.layout.notify_one();
    }

    /// An address may belong to no port any more.
    pub(crate) fn stray(&self) {
        self.stray.notify_one();
    }
}

// === impl Keeper ===

impl<L: Listener> Keeper<L> {
    pub(crate) fn new(
        databases: Arc<Databases>,
        writer: Arc<Writer>,
        metrics: Arc<Metrics>,
        alarms: Arc<Alarms>,
        listener: Arc<L>,
    ) -> Self {
        Self {
            databases,
            writer,
            metrics,
            alarms,
            listener,
            last: Mutex::default(),
            gone: Mutex::default(),
        }
    }

    /// Keeps the rows until `stop`.
    pub(crate) async fn run(&self, stop: &CancellationToken) {
        tokio::join!(
            stop.run_until_cancelled(self.keep()),
            stop.run_until_cancelled(self.sweep()),
        );
    }

    async fn keep(&self) {
        loop {
            tokio::select! {
                () = self.alarms.layout.notified() => {}
                () = self.grace_over() => {}
            }
            tokio::time::sleep(DEBOUNCE).await;
            if !self.keep_once(Instant::now()).await {
                tokio::time::sleep(RETRY).await;
                self.alarms.layout();
            }
        }
    }

    /// Whether there is a reason to do nothing; its end raises every alarm.
    fn is_blind(&self) -> bool {
        !(self.writer.is_leader() && self.databases.is_synced())
    }

    /// Returns once a set has not been asked for in [`GONE`].
    async fn grace_over(&self) {
        let first = self.gone().values().min().copied();
        match first {
            Some(first) => tokio::time::sleep_until((first + GONE).into()).await,
            None => std::future::pending().await,
        }
    }

    fn gone(&self) -> MutexGuard<'_, BTreeMap<String, Instant>> {
        self.gone.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The sets that nothing asks for, but not for long enough.
    fn spared(&self, desired: &Desired, present: &Present, now: Instant) -> BTreeSet<String> {
        let mut gone = self.gone();
        let mut unasked = BTreeMap::new();
        for name in desired.unasked(present) {
            let since = gone.get(name).copied().unwrap_or(now);
            unasked.insert(name.to_owned(), since);
        }
        // Those whose time is over are removed now; if that fails, they are found again.
        unasked.retain(|_, since| now < *since + GONE);
        gone.clone_from(&unasked);
        unasked.into_keys().collect()
    }

    /// Compares what is with what should be, and writes the difference. Says whether that went well.
    pub(super) async fn keep_once(&self, now: Instant) -> bool {
        if self.is_blind() {
            self.gone().clear();
            return true;
        }
        let found = self.databases.topology();
        self.note(found.as_ref().map(|(_, topology)| topology));
        let Some((nb, topology)) = found else {
            self.gone().clear();
            return true;
        };
        let present = present(&nb);
        let desired = Desired::of(&topology);
        let spared = self.spared(&desired, &present, now);
        let changes = desired.changes(&present, &spared);
        if changes.is_empty() {
            return true;
        }
        let [come, change, go] = changes.counts();
        let begin = Instant::now();
        let written = self
            .writer
            .transact(changes.transaction(&present.routers))
            .await;
        let took = begin.elapsed();
        self.metrics.kept_rows(&written, took);
        match written {
            Written::Committed => {
                let gateways = topology.gateways.len();
                tracing::info!(
                    gateways,
                    come,
                    change,
                    go,
                    ?took,
                    "rows of the routed topology written"
                );
                return true;
            }
            Written::NotLeader => return true,
            Written::Refused(why) => {
                tracing::debug!(why, "rows of the routed topology refused; looking again");
            }
            Written::Indeterminate(why) | Written::Failed(why) => {
                tracing::error!(why, "rows of the routed topology not written; trying again");
            }
        }
        false
    }

    /// Says what was found, once, and has every VM looked at when it is another topology.
    fn note(&self, found: Option<&Arc<Topology>>) {
        self.metrics
            .gateways(found.map_or(0, |topology| topology.gateways.len()));
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        let found_now = found.cloned().map_or(Found::Nothing, Found::Topology);
        if *last == found_now {
            return;
        }
        let before = std::mem::replace(&mut *last, found_now);
        drop(last);
        if let Some(topology) = found {
            tracing::info!(
                gateways = ?topology.gateways.keys(), switches = topology.switches.len(),
                "routed topology found"
            );
            for why in &topology.rejected {
                tracing::warn!("{why}");
            }
        } else {
            let router = self.databases.cluster_router().unwrap_or_default();
            let what = "no such router: the routed topology's rows stay as they are";
            // A cluster without a routed network, or one that is not laid out yet.
            if before == Found::NotSought {
                tracing::info!(router, "{what}");
            } else {
                tracing::warn!(router, "{what}");
            }
        }
        self.listener.everything_changed();
    }

    async fn sweep(&self) {
        loop {
            self.alarms.stray.notified().await;
            tokio::time::sleep(GATHER).await;
            let suspects = sweep::strays(&self.databases);
            if suspects.is_empty() {
                continue;
            }
            tokio::time::sleep(STRAY).await;
            if !self.sweep_once(&suspects).await {
                tokio::time::sleep(RETRY).await;
            }
            // What was seen meanwhile has not had its time yet.
            self.alarms.stray();
        }
    }

    /// Takes those of the suspects that still belong to no port out of their sets. Says whether that
    /// went well.
    pub(super) async fn sweep_once(&self, suspects: &sweep::Strays) -> bool {
        if self.is_blind() {
            return true;
        }
        let strays = sweep::strays(&self.databases).still(suspects);
        let Some(transaction) = strays.transaction() else {
            return true;
        };
        let written = self.writer.transact(transaction).await;
        match &written {
            Written::Committed => {
                self.metrics.swept(strays.count());
                tracing::info!(addresses = %strays, "taken out of their place sets: no port has them");
            }
            Written::NotLeader => {}
            Written::Refused(why) | Written::Indeterminate(why) | Written::Failed(why) => {
                tracing::warn!(why, addresses = %strays, "not taken out of their place sets");
            }
        }
        matches!(written, Written::Committed | Written::NotLeader)
    }
}

fn present(nb: &Snapshot) -> Present {
    Present {
        sets: nb.rows(),
        policies: nb.rows(),
        routers: nb.rows(),
    }
}
