//! Tables of a database, held here: what readers see of them.

mod builder;
mod changes;
mod table;
pub(crate) mod writer;

use std::any::Any;
use std::borrow::Borrow;
use std::fmt;
use std::sync::Arc;

pub use builder::{Index, ReplicaBuilder};
pub use changes::{Change, ChangeSet, ChangeStream, Event, Origin, TypedChange};
pub use table::IndexKey;
use table::{AnyTable, TypedTable};
use tokio::sync::{broadcast, watch};
use uuid::Uuid;

use crate::client::{Command, Commands, from_now};
use crate::{Error, Table};

/// Tables of one database, kept equal to the server's for as long as a clone of it, or a
/// [`ChangeStream`] from it, exists.
///
/// ```no_run
/// # use std::collections::BTreeMap;
/// use ovsdb_rs::{Client, ClientOptions, Endpoints, Replica};
///
/// ovsdb_rs::table! {
///     pub struct LogicalSwitchPort in "Logical_Switch_Port" {
///         pub name: String,
///         pub external_ids: BTreeMap<String, String>,
///     }
/// }
///
/// # async fn example() -> Result<(), ovsdb_rs::Error> {
/// let endpoints: Endpoints = "unix:/run/ovn/ovnnb_db.sock".parse()?;
/// let client = Client::spawn(endpoints, ClientOptions::default());
/// let mut builder = Replica::builder("OVN_Northbound").table::<LogicalSwitchPort>();
/// let by_vm = builder.index(|port: &LogicalSwitchPort| port.external_ids.get("vm").cloned());
/// let replica = builder.start(&client)?;
/// let snapshot = replica.wait_synced().await?;
/// for (uuid, port) in snapshot.lookup(&by_vm, "default/vm0") {
///     println!("{uuid} {}", port.name);
/// }
/// # Ok(()) }
/// ```
///
/// # Guarantees
/// - A [`Snapshot`] is the database as of one moment: transactions are in it whole or not at all,
///   across all of its tables.
/// - A transaction committed through the same [`Client`](crate::Client) is in the replica by the time
///   [`Client::transact`](crate::Client::transact) returns, as long as the replica [`is_synced`](Self::is_synced)
///   (ovsdb-server(7), section 4.1.5).
/// - After a reconnection the replica equals the server's tables again before it is
///   [`SyncState::Synced`]: what came and went in between is accounted for, and only differences
///   are reported as changes. Where the server has the history (clustered databases keep some, never
///   more than the database's own size) only those are transferred.
///
/// # Caveats
/// - Between the loss of a connection and its detection (immediate when the server dies, up to twice
///   [`probe_interval`](crate::ClientOptions::probe_interval) when it freezes or the network
///   swallows everything) the replica is `Synced` and out of date. Guard writes with
///   [`Transaction::expect`](crate::Transaction::expect).
/// - With several endpoints of a cluster, a server that lags behind the last one takes the replica
///   back in time.
/// - Several transactions may come as one step when the server is faster than this client reads.
/// - A row that does not fit its struct is left out and listed by [`Snapshot::malformed`].
#[derive(Clone)]
pub struct Replica {
    shared: Arc<Shared>,
}

struct Shared {
    /// The monitor's key.
    key: u64,
    database: String,
    commands: Commands,
    snapshot: watch::Receiver<Snapshot>,
    generation: watch::Receiver<u64>,
    state: watch::Receiver<SyncState>,
    /// Weak, so that streams end with the session's writer.
    changes: broadcast::WeakSender<Arc<ChangeSet>>,
}

/// A replica at one moment: all tables as of the same transaction. A clone costs nothing, and
/// holding one delays nobody.
#[derive(Clone)]
pub struct Snapshot {
    /// The replica's monitor key, by which an index knows its own.
    key: u64,
    generation: u64,
    transaction: Uuid,
    tables: Arc<[Arc<dyn AnyTable>]>,
}

/// How a replica stands to the server.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum SyncState {
    /// It has never been equal to the server; its tables are empty.
    Connecting,
    /// It follows the server.
    Synced,
    /// There is no connection, or it is being brought up to date: its contents are those of the
    /// last moment at which it was synced.
    Stale,
    /// The server has no such database, table or column, and says why; it is asked again every second.
    Refused(Arc<str>),
}

/// A row that does not fit its struct, and is therefore missing from the snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Malformed {
    /// The table.
    pub table: &'static str,
    /// The row.
    pub uuid: Uuid,
    /// Which column, and why.
    pub reason: String,
}

impl Replica {
    /// Starts describing a replica of `database`.
    pub fn builder(database: impl Into<String>) -> ReplicaBuilder {
        ReplicaBuilder::new(database.into())
    }

    /// All tables as of the last transaction. Cheap.
    pub fn snapshot(&self) -> Snapshot {
        self.shared.snapshot.borrow().clone()
    }

    /// Row `uuid` of the latest snapshot.
    pub fn get<T: Table>(&self, uuid: &Uuid) -> Option<Arc<T>> {
        self.snapshot().get(uuid)
    }

    /// All rows of the latest snapshot, in the order of their UUIDs.
    pub fn rows<T: Table>(&self) -> Vec<(Uuid, Arc<T>)> {
        self.snapshot().rows()
    }

    /// The latest snapshot's rows under `key`, in the order of their UUIDs.
    pub fn lookup<T, K, Q>(&self, index: &Index<T, K>, key: &Q) -> Vec<(Uuid, Arc<T>)>
    where
        T: Table,
        K: IndexKey + Borrow<Q>,
        Q: Ord + ?Sized,
    {
        self.snapshot().lookup(index, key)
    }

    /// A snapshot, and every change after it.
    pub fn subscribe(&self) -> (Snapshot, ChangeStream) {
        ChangeStream::new(self.clone())
    }

    /// The generation of the latest snapshot, and as it changes from now on.
    pub fn changed(&self) -> watch::Receiver<u64> {
        from_now(&self.shared.generation)
    }

    /// How the replica stands to the server, and as it changes from now on.
    pub fn sync_state(&self) -> watch::Receiver<SyncState> {
        from_now(&self.shared.state)
    }

    /// Whether the replica follows the server at this moment.
    pub fn is_synced(&self) -> bool {
        *self.shared.state.borrow() == SyncState::Synced
    }

    /// Waits until the replica follows the server.
    ///
    /// # Errors
    /// [`Error::Replica`] when the server refuses; [`Error::Shutdown`].
    pub async fn wait_synced(&self) -> Result<Snapshot, Error> {
        let mut state = self.sync_state();
        let settled = state
            .wait_for(|state| matches!(state, SyncState::Synced | SyncState::Refused(_)))
            .await
            .map_err(|_| Error::Shutdown)?
            .clone();
        match settled {
            SyncState::Refused(reason) => Err(Error::Replica {
                database: self.shared.database.clone(),
                reason: reason.to_string(),
            }),
            _ => Ok(self.snapshot()),
        }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // Without a session there is no monitor left to cancel.
        let _ = self.commands.send(Command::RemoveMonitor(self.key));
    }
}

impl Snapshot {
    fn first(key: u64, tables: Vec<Arc<dyn AnyTable>>) -> Self {
        Self {
            key,
            generation: 0,
            transaction: Uuid::nil(),
            tables: tables.into(),
        }
    }

    fn next(&self, tables: Vec<Arc<dyn AnyTable>>, transaction: Uuid) -> Self {
        Self {
            key: self.key,
            generation: self.generation + 1,
            transaction,
            tables: tables.into(),
        }
    }

    fn tables(&self) -> &[Arc<dyn AnyTable>] {
        &self.tables
    }

    /// How many steps led to it, from 0 for the empty one before the first contents.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// The server's identifier of the last transaction in it. Only clustered servers have one.
    pub fn transaction_id(&self) -> Option<Uuid> {
        (!self.transaction.is_nil()).then_some(self.transaction)
    }

    /// Row `uuid`.
    pub fn get<T: Table>(&self, uuid: &Uuid) -> Option<Arc<T>> {
        self.table::<T>()?.get(uuid).cloned()
    }

    /// All rows, in the order of their UUIDs.
    pub fn rows<T: Table>(&self) -> Vec<(Uuid, Arc<T>)> {
        self.iter()
            .map(|(uuid, row)| (*uuid, Arc::clone(row)))
            .collect()
    }

    /// All rows, in the order of their UUIDs.
    pub fn iter<T: Table>(&self) -> impl Iterator<Item = (&Uuid, &Arc<T>)> {
        self.table::<T>().into_iter().flat_map(TypedTable::iter)
    }

    /// The rows under `key`, in the order of their UUIDs.
    pub fn lookup<T, K, Q>(&self, index: &Index<T, K>, key: &Q) -> Vec<(Uuid, Arc<T>)>
    where
        T: Table,
        K: IndexKey + Borrow<Q>,
        Q: Ord + ?Sized,
    {
        debug_assert_eq!(
            index.replica, self.key,
            "an index of another replica was used"
        );
        self.table::<T>()
            .and_then(|table| table.lookup::<K, Q>(index.position, key))
            .unwrap_or_default()
    }

    /// The rows that do not fit their structs.
    pub fn malformed(&self) -> Vec<Malformed> {
        self.tables
            .iter()
            .flat_map(|table| {
                let name = table.name();
                table
                    .malformed()
                    .into_iter()
                    .map(move |(uuid, reason)| Malformed {
                        table: name,
                        uuid,
                        reason,
                    })
            })
            .collect()
    }

    fn table<T: Table>(&self) -> Option<&TypedTable<T>> {
        let table = self.tables.iter().find_map(|table| {
            let table: &dyn Any = &**table;
            table.downcast_ref::<TypedTable<T>>()
        });
        debug_assert!(
            table.is_some(),
            "table {} is not part of the replica",
            T::NAME
        );
        table
    }
}

impl fmt::Debug for Replica {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("Replica")
            .field("database", &self.shared.database)
            .field("state", &*self.shared.state.borrow())
            .field("snapshot", &*self.shared.snapshot.borrow())
            .finish()
    }
}

impl fmt::Debug for Snapshot {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("Snapshot")
            .field("generation", &self.generation)
            .field("transaction", &self.transaction)
            .finish_non_exhaustive()
    }
}
