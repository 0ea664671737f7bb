use std::any::Any;
use std::fmt;
use std::marker::PhantomData;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::{broadcast, watch};

use super::table::{AnyTable, IndexKey, TypedTable};
use super::writer::Writer;
use super::{Replica, Shared, Snapshot, SyncState};
use crate::client::Command;
use crate::monitor::{Monitor, MonitoredTable};
use crate::{Client, Condition, Error, Table};

/// How many steps a [`ChangeStream`](super::ChangeStream) may fall behind before it starts over.
const BACKLOG: usize = 1024;

/// Monitors' keys are unique in the process, so that an index is never taken for another replica's.
static NEXT_KEY: AtomicU64 = AtomicU64::new(0);

/// Which tables a replica has, and with which indexes.
#[must_use = "a replica begins with `start`"]
pub struct ReplicaBuilder {
    key: u64,
    database: String,
    tables: Vec<(MonitoredTable, Box<dyn AnyTable>)>,
    mistake: Option<String>,
}

/// Handle of a secondary index: rows `T` by keys `K`, any number of keys per row and rows per key.
pub struct Index<T, K> {
    pub(super) replica: u64,
    pub(super) position: usize,
    types: PhantomData<fn() -> (T, K)>,
}

impl ReplicaBuilder {
    pub(super) fn new(database: String) -> Self {
        Self {
            key: NEXT_KEY.fetch_add(1, Ordering::Relaxed),
            database,
            tables: Vec::new(),
            mistake: None,
        }
    }

    /// Adds all rows of a table.
    pub fn table<T: Table>(self) -> Self {
        self.table_where::<T>([])
    }

    /// Adds the rows of a table that meet *any* of the conditions (in a [`Where`](crate::Where) it
    /// is all of them); without conditions, all rows.
    pub fn table_where<T: Table>(mut self, any: impl IntoIterator<Item = Condition>) -> Self {
        if self.tables.iter().any(|(table, _)| table.name == T::NAME) {
            // The server allows a table twice only with distinct columns.
            self.mistake = Some(format!("table {} was added twice", T::NAME));
        }
        self.tables.push((
            MonitoredTable {
                name: T::NAME,
                columns: T::COLUMNS,
                optional_columns: T::OPTIONAL_COLUMNS,
                conditions: any.into_iter().collect(),
            },
            Box::new(TypedTable::<T>::new()),
        ));
        self
    }

    /// Adds an index over a table added before. `keys` gives a row's keys: `Option`, `Vec`, an array.
    /// It runs in the client's task for every changed row, so it should be quick and must not panic.
    pub fn index<T, K, I>(&mut self, keys: impl Fn(&T) -> I + Send + Sync + 'static) -> Index<T, K>
    where
        T: Table,
        K: IndexKey,
        I: IntoIterator<Item = K>,
    {
        let table = self.tables.iter_mut().find_map(|(_, table)| {
            let table: &mut dyn Any = &mut **table;
            table.downcast_mut::<TypedTable<T>>()
        });
        let position = if let Some(table) = table {
            table.add_index::<K>(Arc::new(move |row| keys(row).into_iter().collect()))
        } else {
            self.mistake = Some(format!(
                "an index over table {}, which was not added before",
                T::NAME
            ));
            0
        };
        Index {
            replica: self.key,
            position,
            types: PhantomData,
        }
    }

    /// Starts the replica and returns at once: see [`Replica::wait_synced`].
    ///
    /// # Errors
    /// [`Error::Replica`] for a table that was added twice, or an index over one that was not added.
    pub fn start(self, client: &Client) -> Result<Replica, Error> {
        if let Some(reason) = self.mistake {
            return Err(Error::Replica {
                database: self.database,
                reason,
            });
        }
        let (monitored, tables): (_, Vec<Arc<dyn AnyTable>>) = self
            .tables
            .into_iter()
            .map(|(monitored, table)| (monitored, table.into()))
            .unzip();
        let (snapshot_sender, snapshot) = watch::channel(Snapshot::first(self.key, tables));
        let (generation_sender, generation) = watch::channel(0);
        let (state_sender, state) = watch::channel(SyncState::Connecting);
        let (changes, _) = broadcast::channel(BACKLOG);
        let shared = Shared {
            key: self.key,
            database: self.database.clone(),
            commands: client.commands().clone(),
            snapshot,
            generation,
            state,
            changes: changes.downgrade(),
        };
        let writer = Writer::new(snapshot_sender, generation_sender, state_sender, changes);
        let monitor = Monitor::new(self.key, self.database, monitored, writer);
        client
            .commands()
            .send(Command::AddMonitor(Box::new(monitor)))
            .map_err(|_| Error::Shutdown)?;
        Ok(Replica {
            shared: Arc::new(shared),
        })
    }
}

impl fmt::Debug for ReplicaBuilder {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("ReplicaBuilder")
            .field("database", &self.database)
            .field(
                "tables",
                &self
                    .tables
                    .iter()
                    .map(|(table, _)| table)
                    .collect::<Vec<_>>(),
            )
            .finish_non_exhaustive()
    }
}

impl<T, K> Clone for Index<T, K> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T, K> Copy for Index<T, K> {}

impl<T: Table, K> fmt::Debug for Index<T, K> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "Index({} #{})", T::NAME, self.position)
    }
}
