//! How a decision's write becomes a transaction.
//!
//! Every port's row is found by its `_uuid` (a row deleted and made again under the same name is
//! another row) and guarded by a `wait` with timeout 0 on its whole `options` and `external_ids`.
//! That is stricter than the values the decision was made on: OVSDB cannot express "the map has no
//! such key" (`excludes` compares pairs, so it needs a value), and most guards need just that. The
//! price is a refusal when somebody else's key of the same row changes in the same millisecond; the
//! next observation repeats the write.
//!
//! What is written is mutated key by key, so a key of somebody else's could not be lost even
//! without the guard.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use handover::{Expected, Mark, PortConfig, PortName, PortWrite, RouteKey, Write};
use ovsdb_rs::{Client, Datum, Error, ErrorKind, Lock, LockState, Mutation, Row, Transaction};
use thiserror::Error as ThisError;
use tokio::sync::watch;

use super::tables::NORTHBOUND;
use super::{PortRow, View};

/// The lock that the one controller that writes holds on the Northbound.
///
/// Every transaction asserts it, so the database itself turns away a controller that has lost it
/// without noticing. The name is what RFC 7047, section 3.1, allows as an `<id>`: no dot, no slash.
///
/// # Caveats
///
/// Locks are each server's own (ovsdb-server(7)): in a clustered Northbound all controllers must be
/// connected to the leader for the lock to part them. The guards on the rows hold regardless.
pub(crate) const WRITER_LOCK: &str = "segue_writer";

const REQUESTED_CHASSIS: &str = "requested-chassis";
const ACTIVATION_STRATEGY: &str = "activation-strategy";

/// Writes to the Northbound.
pub(crate) struct Writer {
    client: Client,
    lock: Mutex<Option<Lock>>,
    leadership: watch::Receiver<LockState>,
}

/// What became of a write.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Written {
    /// It is in effect, and in the replica.
    Committed,
    /// A guard refused it: what it was decided on is no longer so. Nothing was changed.
    Refused(String),
    /// This controller does not hold the lock any more. Nothing was changed.
    NotLeader,
    /// The connection was lost with the answer outstanding; the replica will tell once it is synced.
    Indeterminate(String),
    /// The database could not be asked, or will not take the write. Nothing was changed.
    Failed(String),
}

/// A write that does not fit the view it is to be made on.
#[derive(Clone, Debug, PartialEq, Eq, ThisError)]
pub(crate) enum Mismatch {
    /// The port is not in the view.
    #[error("port {0} is not among the VM's ports")]
    Port(PortName),
    /// `NB_Global` has no row.
    #[error("NB_Global has no row: is this an initialised Northbound?")]
    Global,
    /// The route cannot lead there.
    #[error(
        "chassis {chassis} has no address set that could hold {route}: its gateway router is gone"
    )]
    Place {
        /// The route.
        route: RouteKey,
        /// `Chassis.name`.
        chassis: String,
    },
}

// === impl Writer ===

impl Writer {
    /// Queues for the lock and returns once the database has answered.
    pub(crate) async fn start(client: Client) -> Result<Self, Error> {
        let lock = client.lock(WRITER_LOCK).await?;
        Ok(Self {
            client,
            leadership: lock.state(),
            lock: Mutex::new(Some(lock)),
        })
    }

    /// Whether this controller holds the lock, now and as it changes.
    pub(crate) fn leadership(&self) -> watch::Receiver<LockState> {
        self.leadership.clone()
    }

    /// Whether this controller holds the lock, as far as it knows.
    pub(crate) fn is_leader(&self) -> bool {
        *self.leadership.borrow() == LockState::Held
    }

    /// Makes a write, decided on `view`.
    pub(crate) async fn write(&self, write: &Write, view: &View, comment: &str) -> Written {
        match transaction(write, view, comment) {
            Ok(transaction) => self.transact(transaction).await,
            Err(mismatch) => Written::Refused(mismatch.to_string()),
        }
    }

    /// Makes a transaction, which must assert [`WRITER_LOCK`].
    pub(crate) async fn transact(&self, transaction: Transaction) -> Written {
        match self.client.transact(NORTHBOUND, transaction).await {
            Ok(_) => Written::Committed,
            Err(error) => classify(&error),
        }
    }

    /// Gives the lock up, so that a standby need not wait for the connection to be missed.
    pub(crate) async fn stop(&self) {
        let lock = self
            .lock
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if let Some(lock) = lock
            && let Err(error) = lock.unlock().await
        {
            tracing::debug!(%error, "lock not given up; the server will notice");
        }
    }
}

fn classify(error: &Error) -> Written {
    match error {
        error if error.is_guard_failure() => Written::Refused(error.to_string()),
        Error::Transaction(refusal) if refusal.kind == ErrorKind::NotOwner => Written::NotLeader,
        Error::Indeterminate { .. } => Written::Indeterminate(error.to_string()),
        error => Written::Failed(error.to_string()),
    }
}

// === The transaction ===

/// The transaction that makes a write decided on `view`, with its guards.
fn transaction(write: &Write, view: &View, comment: &str) -> Result<Transaction, Mismatch> {
    let mut transaction = Transaction::new();
    transaction.assert_lock(WRITER_LOCK);
    let mut changes = Vec::new();
    for port in &write.ports {
        let row = view
            .ports
            .iter()
            .find(|row| row.name == port.port)
            .ok_or_else(|| Mismatch::Port(port.port.clone()))?;
        let mut guard = Row::new()
            .set("options", map(&row.options))
            .set("external_ids", map(&row.external_ids));
        if !write.routes.is_empty() {
            let addresses = row.addresses.iter().map(String::as_str);
            guard = guard.set("addresses", Datum::set(addresses));
        }
        transaction.expect("Logical_Switch_Port", row.uuid, guard);
        changes.push((row.uuid, mutations(row, &port.config)));
    }
    if let Some(from) = write.raise_nb_cfg_from {
        let (uuid, _) = view.nb_global.ok_or(Mismatch::Global)?;
        transaction.expect("NB_Global", uuid, Row::new().set("nb_cfg", from));
        let raised = Row::new().set("nb_cfg", from.saturating_add(1));
        transaction.update("NB_Global", uuid, raised);
    }
    for (uuid, mutations) in changes {
        if !mutations.is_empty() {
            transaction.mutate("Logical_Switch_Port", uuid, mutations);
        }
    }
    view.places.change(&write.routes, &mut transaction)?;
    transaction.comment(comment);
    Ok(transaction)
}

/// What turns a row's own keys of segue's into `config`.
pub(super) fn mutations(row: &PortRow, config: &PortConfig) -> Vec<Mutation> {
    let options = BTreeMap::from([
        (REQUESTED_CHASSIS, config.requested_chassis.clone()),
        (ACTIVATION_STRATEGY, config.activation_strategy.clone()),
    ]);
    let mark = config
        .mark
        .as_ref()
        .map(Mark::to_external_ids)
        .unwrap_or_default();
    let marks = Mark::KEYS
        .into_iter()
        .map(|key| (key, mark.get(key).cloned()))
        .collect();
    let options = column("options", &row.options, options);
    let marks = column("external_ids", &row.external_ids, marks);
    options.into_iter().chain(marks).collect()
}

/// What turns `keys` of a map column into the values wanted: the keys that go or change are deleted,
/// then those that come or change inserted (an insert alone leaves a key that is there as it is).
fn column(
    name: &'static str,
    now: &BTreeMap<String, String>,
    keys: BTreeMap<&'static str, Option<String>>,
) -> Vec<Mutation> {
    let changed = keys
        .into_iter()
        .filter(|(key, wanted)| now.get(*key) != wanted.as_ref());
    let (mut gone, mut come) = (Vec::new(), Vec::new());
    for (key, wanted) in changed {
        if now.contains_key(key) {
            gone.push(key);
        }
        come.extend(wanted.map(|wanted| (key, wanted)));
    }
    let delete = (!gone.is_empty()).then(|| Mutation::delete_keys(name, gone));
    let insert = (!come.is_empty()).then(|| Mutation::insert(name, Datum::map(come)));
    delete.into_iter().chain(insert).collect()
}

fn map(values: &BTreeMap<String, String>) -> Datum {
    Datum::map(
        values
            .iter()
            .map(|(key, value)| (key.as_str(), value.as_str())),
    )
}

/// Segue's part of a row, with the mark or why it cannot be read.
pub(crate) fn read_config(row: &PortRow) -> Result<PortConfig, handover::MarkError> {
    Ok(PortConfig {
        requested_chassis: row.options.get(REQUESTED_CHASSIS).cloned(),
        activation_strategy: row.options.get(ACTIVATION_STRATEGY).cloned(),
        mark: Mark::from_external_ids(&row.external_ids)?,
    })
}

/// Writes that change nothing: these ports as guards. Nothing where a mark cannot be read.
pub(crate) fn guards(rows: &[PortRow]) -> Result<Vec<PortWrite>, handover::MarkError> {
    let guard = |row: &PortRow| {
        let config = read_config(row)?;
        Ok(PortWrite {
            port: row.name.clone(),
            expected: Expected::of(&config),
            config,
        })
    };
    rows.iter().map(guard).collect()
}
