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
use std::net::IpAddr;
use std::sync::{Mutex, PoisonError};

use handover::{Expected, Mark, PortConfig, PortName, PortWrite, RouteKey, Write};
use ovsdb_rs::{
    Client, Condition, Datum, Error, ErrorKind, Lock, LockState, Mutation, Row, Transaction,
};
use thiserror::Error as ThisError;
use tokio::sync::watch;
use uuid::Uuid;

use super::pair::{Original, Present};
use super::tables::NORTHBOUND;
use super::{Pairs, PortRow, Target, View};
use crate::routed::port_addresses;

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

pub(super) const REQUESTED_CHASSIS: &str = "requested-chassis";
pub(super) const ACTIVATION_STRATEGY: &str = "activation-strategy";

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
    /// Nothing says what the port of the target's pod is called.
    #[error(
        "what the port for the target's pod is called does not follow from the name of port {0}: \
         it does not hold the source pod's name; say it with external_ids:segue.io/target-port"
    )]
    Counterpart(PortName),
    /// A port that is called like the target's cannot be that.
    #[error(
        "port {other}, which is called as the target's port for {port} is to be, is another: {why}; \
         rename or remove it, or say another name with external_ids:segue.io/target-port of {port}"
    )]
    Other {
        /// The source's port.
        port: PortName,
        /// The port of that name.
        other: PortName,
        /// What speaks against it.
        why: &'static str,
    },
    /// Routes would go on leading to where the port was.
    #[error(
        "port {port} stays where it is: there are several static routes to {addresses:?}, or other \
         VMs have it as well, so its route cannot follow; leave one route and one holder"
    )]
    Stuck {
        /// The source's port.
        port: PortName,
        /// Its addresses whose routes cannot follow.
        addresses: Vec<IpAddr>,
    },
    /// `NB_Global` has no row.
    #[error("NB_Global has no row: is this an initialised Northbound?")]
    Global,
    /// The route cannot lead there.
    #[error(
        "nothing is there to make {route} lead to chassis {chassis}: its gateway router, or its \
         node's switch, is gone"
    )]
    Place {
        /// The route.
        route: RouteKey,
        /// `Chassis.name`.
        chassis: String,
    },
}

/// What a write was decided on, and how it is to be made.
#[derive(Clone, Copy)]
pub(crate) struct Basis<'a> {
    /// What was seen.
    pub(crate) view: &'a View,
    /// The routes are the static ones of others, not places.
    pub(crate) static_routes: bool,
    /// Where ports that are not on the target's node yet get their counterparts; nothing where they
    /// need none.
    pub(crate) target: Option<&'a Target>,
}

impl<'a> From<&'a View> for Basis<'a> {
    fn from(view: &'a View) -> Self {
        Self {
            view,
            static_routes: false,
            target: None,
        }
    }
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

    /// Makes a write.
    pub(crate) async fn write(&self, write: &Write, basis: Basis<'_>, comment: &str) -> Written {
        let originals = match self.originals(write, basis).await {
            Ok(originals) => originals,
            Err(error) => return Written::Failed(error.to_string()),
        };
        match transaction(write, basis, &originals, comment) {
            Ok(transaction) => self.transact(transaction).await,
            Err(
                mismatch @ (Mismatch::Counterpart(_)
                | Mismatch::Other { .. }
                | Mismatch::Stuck { .. }),
            ) => Written::Failed(mismatch.to_string()),
            Err(mismatch) => Written::Refused(mismatch.to_string()),
        }
    }

    /// Reads the ports that counterparts are to be made of: too much to keep of every port.
    async fn originals(
        &self,
        write: &Write,
        basis: Basis<'_>,
    ) -> Result<BTreeMap<PortName, Original>, Error> {
        let mut originals = BTreeMap::new();
        let Some(target) = basis.target else {
            return Ok(originals);
        };
        let pairs = Pairs::of(&basis.view.ports);
        let switch_of = |uuid: &Uuid| basis.view.switch_of(uuid);
        for port in &write.ports {
            let pair = pairs.get(&port.port);
            let making = pair.and_then(|pair| pair.to_make(&port.config, target, &switch_of));
            let Some(making) = making else { continue };
            let original = self.original(making.source, target, &switch_of).await?;
            if let Some(original) = original {
                originals.insert(port.port.clone(), original);
            }
        }
        Ok(originals)
    }

    async fn original(
        &self,
        source: &PortRow,
        target: &Target,
        switch_of: &(impl Fn(&Uuid) -> Option<Uuid> + Sync),
    ) -> Result<Option<Original>, Error> {
        let mut tx = Transaction::new();
        let row = tx.select("Logical_Switch_Port", source.uuid, []);
        let includes = Condition::includes("ports", Datum::set([source.uuid]));
        let groups = tx.select("Port_Group", includes, ["name"]);
        let name = target.port_name(source).unwrap_or_default();
        let same = Condition::eq("name", name);
        let present = tx.select(
            "Logical_Switch_Port",
            same,
            ["addresses", "options", "external_ids"],
        );
        let reply = self.client.transact(NORTHBOUND, tx).await?;
        let present: Vec<(Uuid, Maps)> = reply.rows(present)?;
        let groups: Vec<(Uuid, Named)> = reply.rows(groups)?;
        Ok(reply.raw_rows(row)?.first().map(|row| Original {
            row: row.clone(),
            groups: groups
                .into_iter()
                .map(|(uuid, group)| (uuid, group.name))
                .collect(),
            present: present.into_iter().next().map(|(uuid, row)| Present {
                uuid,
                switch: switch_of(&uuid),
                addresses: row.addresses,
                options: row.options,
                external_ids: row.external_ids,
            }),
        }))
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

#[derive(serde::Deserialize)]
struct Named {
    name: String,
}

#[derive(serde::Deserialize)]
struct Maps {
    addresses: Vec<String>,
    options: BTreeMap<String, String>,
    external_ids: BTreeMap<String, String>,
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

/// The transaction that makes a write, with its guards.
fn transaction(
    write: &Write,
    basis: Basis<'_>,
    originals: &BTreeMap<PortName, Original>,
    comment: &str,
) -> Result<Transaction, Mismatch> {
    let view = basis.view;
    let mut transaction = Transaction::new();
    transaction.assert_lock(WRITER_LOCK);
    if let Some(from) = write.raise_nb_cfg_from {
        let (uuid, _) = view.nb_global.ok_or(Mismatch::Global)?;
        transaction.expect("NB_Global", uuid, Row::new().set("nb_cfg", from));
        let raised = Row::new().set("nb_cfg", from.saturating_add(1));
        transaction.update("NB_Global", uuid, raised);
    }
    let pairs = Pairs::of(&view.ports);
    for port in &write.ports {
        let missing = || Mismatch::Port(port.port.clone());
        let pair = pairs.get(&port.port).ok_or_else(missing)?;
        let (tx, config) = (&mut transaction, &port.config);
        let switch_of = |uuid: &Uuid| view.switch_of(uuid);
        let target = basis.target;
        let making = target.and_then(|target| pair.to_make(config, target, &switch_of));
        match (making, target) {
            (Some(making), Some(target)) => {
                movable(view, making.source)?;
                let original = originals.get(&port.port).ok_or_else(missing)?;
                target.make((pair, making), config, original, &switch_of, tx)?;
            }
            _ => pair.change(config, target, &switch_of, tx)?,
        }
    }
    if basis.static_routes {
        view.statics.change(&write.routes, &mut transaction)?;
    } else {
        view.places.change(&write.routes, &mut transaction)?;
    }
    transaction.comment(comment);
    Ok(transaction)
}

fn movable(view: &View, source: &PortRow) -> Result<(), Mismatch> {
    let addresses = view.statics.stuck(port_addresses(&source.addresses));
    if addresses.is_empty() {
        return Ok(());
    }
    Err(Mismatch::Stuck {
        port: source.name.clone(),
        addresses,
    })
}

/// Why a write that asks for counterparts cannot be made, as far as the view tells.
pub(crate) fn obstacle(write: &Write, basis: Basis<'_>) -> Option<Mismatch> {
    let target = basis.target?;
    let pairs = Pairs::of(&basis.view.ports);
    let switch_of = |uuid: &Uuid| basis.view.switch_of(uuid);
    let mut ports = write.ports.iter();
    ports.find_map(|port| {
        let pair = pairs.get(&port.port)?;
        let making = pair.to_make(&port.config, target, &switch_of)?;
        let movable = movable(basis.view, making.source);
        movable.and_then(|()| target.port_name(making.source)).err()
    })
}

/// The columns that a write to a port is guarded by.
pub(super) fn guard(row: &PortRow) -> Row {
    let addresses = row.addresses.iter().map(String::as_str);
    Row::new()
        .set("options", map(&row.options))
        .set("external_ids", map(&row.external_ids))
        .set("addresses", Datum::set(addresses))
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

pub(super) fn map(values: &BTreeMap<String, String>) -> Datum {
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
