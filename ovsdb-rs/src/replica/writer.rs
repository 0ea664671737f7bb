//! The writing end of a replica: turns updates into snapshots and change sets.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use tokio::sync::{broadcast, watch};
use uuid::Uuid;

use super::table::AnyTable;
use super::{Change, ChangeSet, Origin, Snapshot, SyncState};
use crate::Datum;
use crate::monitor::Columns;
use crate::monitor::update::{RowUpdate, TableUpdates};

/// Owned by the session's task; readers see whole steps only.
pub(crate) struct Writer {
    /// The rows as the server has them, per table, since differences apply to those.
    raw: Vec<HashMap<Uuid, RawRow>>,
    snapshot: watch::Sender<Snapshot>,
    generation: watch::Sender<u64>,
    state: watch::Sender<SyncState>,
    changes: broadcast::Sender<Arc<ChangeSet>>,
}

type RowUpdates = BTreeMap<Uuid, RowUpdate>;

/// One datum per monitored column, in the order of [`Columns`].
type RawRow = Box<[Datum]>;

impl Writer {
    pub(crate) fn new(
        snapshot: watch::Sender<Snapshot>,
        generation: watch::Sender<u64>,
        state: watch::Sender<SyncState>,
        changes: broadcast::Sender<Arc<ChangeSet>>,
    ) -> Self {
        Self {
            raw: Vec::new(),
            snapshot,
            generation,
            state,
            changes,
        }
    }

    /// The server is no longer followed.
    pub(crate) fn lost(&self) {
        self.state.send_if_modified(|state| {
            let synced = *state == SyncState::Synced;
            if synced {
                *state = SyncState::Stale;
            }
            synced
        });
    }

    /// The server is followed.
    pub(crate) fn followed(&self) {
        self.set_state(SyncState::Synced);
    }

    pub(crate) fn set_state(&self, state: SyncState) {
        self.state.send_if_modified(|current| {
            let differs = *current != state;
            *current = state;
            differs
        });
    }

    /// Applies changes. After an error nothing of them is visible, and only
    /// [`replace`](Self::replace) may follow.
    pub(crate) fn apply(
        &mut self,
        columns: &[Columns],
        updates: TableUpdates,
        transaction: Uuid,
        origin: Origin,
    ) -> Result<(), String> {
        let mut tables = self.snapshot.borrow().tables().to_vec();
        let mut changes = Vec::new();
        for (position, updates) in by_position(&tables, updates)? {
            let (columns, rows) = (&columns[position], &mut self.raw[position]);
            let mut table = tables[position].boxed_clone();
            for (uuid, update) in updates {
                let row = apply_row(columns, rows, uuid, update)
                    .map_err(|reason| format!("row {uuid} of {}: {reason}", table.name()))?;
                let named = row.map(|row| named(columns, row));
                changes.extend(table.set(uuid, named.as_deref()));
            }
            tables[position] = table.into();
        }
        self.publish(tables, changes, transaction, origin);
        Ok(())
    }

    /// Makes `updates`, which must be first contents, all there is; what differs is what changed.
    pub(crate) fn replace(
        &mut self,
        columns: &[Columns],
        updates: TableUpdates,
        transaction: Uuid,
    ) -> Result<(), String> {
        let mut tables = self.snapshot.borrow().tables().to_vec();
        let mut changes = Vec::new();
        self.raw = tables.iter().map(|_| HashMap::new()).collect();
        let mut contents = by_position(&tables, updates)?;
        for (position, table) in tables.iter_mut().enumerate() {
            let (columns, rows) = (&columns[position], &mut self.raw[position]);
            let mut replaced = table.boxed_clone();
            for (uuid, update) in contents.remove(&position).unwrap_or_default() {
                apply_row(columns, rows, uuid, update)
                    .map_err(|reason| format!("row {uuid} of {}: {reason}", table.name()))?;
            }
            for uuid in table.uuids() {
                if !rows.contains_key(&uuid) {
                    changes.extend(replaced.set(uuid, None));
                }
            }
            for (uuid, row) in rows {
                changes.extend(replaced.set(*uuid, Some(&named(columns, row))));
            }
            *table = replaced.into();
        }
        self.publish(tables, changes, transaction, Origin::Resync);
        Ok(())
    }

    fn publish(
        &self,
        tables: Vec<Arc<dyn AnyTable>>,
        changes: Vec<Change>,
        transaction: Uuid,
        origin: Origin,
    ) {
        let mut generation = 0;
        self.snapshot.send_modify(|snapshot| {
            generation = snapshot.generation() + 1;
            *snapshot = snapshot.next(tables, transaction);
        });
        self.generation.send_replace(generation);
        // Nobody need be subscribed.
        let _ = self.changes.send(Arc::new(ChangeSet {
            generation,
            origin,
            changes,
        }));
    }
}

/// The updates by the position of their table.
fn by_position(
    tables: &[Arc<dyn AnyTable>],
    updates: TableUpdates,
) -> Result<BTreeMap<usize, RowUpdates>, String> {
    updates
        .into_iter()
        .map(|(name, updates)| {
            tables
                .iter()
                .position(|table| table.name() == name)
                .map(|position| (position, updates))
                .ok_or_else(|| format!("rows of table {name:?}, which is not monitored"))
        })
        .collect()
}

fn named<'a>(columns: &'a Columns, row: &'a RawRow) -> Vec<(&'a str, &'a Datum)> {
    columns
        .iter()
        .map(|(name, _)| *name)
        .zip(row.iter())
        .collect()
}

/// Applies one row's update; the row after it, if it is still there.
fn apply_row<'a>(
    columns: &Columns,
    rows: &'a mut HashMap<Uuid, RawRow>,
    uuid: Uuid,
    update: RowUpdate,
) -> Result<Option<&'a RawRow>, String> {
    match update {
        RowUpdate::Initial(row) | RowUpdate::Insert(row) => {
            let mut raw: RawRow = columns
                .iter()
                .map(|(_, column)| column.default_datum())
                .collect();
            for (name, datum) in row {
                let (position, datum) = conform(columns, &name, datum)?;
                raw[position] = datum;
            }
            if rows.contains_key(&uuid) {
                return Err("inserted, but it is there already".into());
            }
            Ok(Some(rows.entry(uuid).or_insert(raw)))
        }
        RowUpdate::Modify(difference) => {
            let raw = rows
                .get_mut(&uuid)
                .ok_or("modified, but there is no such row")?;
            for (name, datum) in difference {
                let (position, datum) = conform(columns, &name, datum)?;
                columns[position].1.apply(&mut raw[position], datum);
            }
            Ok(Some(raw))
        }
        RowUpdate::Delete(_) => match rows.remove(&uuid) {
            Some(_) => Ok(None),
            None => Err("deleted, but there is no such row".into()),
        },
    }
}

fn conform(columns: &Columns, name: &str, datum: Datum) -> Result<(usize, Datum), String> {
    let position = columns
        .iter()
        .position(|(column, _)| *column == name)
        .ok_or_else(|| format!("column {name:?} is not monitored"))?;
    let datum = columns[position]
        .1
        .conform(datum)
        .map_err(|reason| format!("column {name}: {reason}"))?;
    Ok((position, datum))
}
