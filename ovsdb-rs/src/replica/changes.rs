use std::any::Any;
use std::fmt;
use std::sync::Arc;

use tokio::sync::broadcast;
use uuid::Uuid;

use super::{Replica, Snapshot};
use crate::Table;

/// What [`ChangeStream::next`] returns.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Event {
    /// One step's changes.
    Changes(Arc<ChangeSet>),
    /// The subscriber was too slow and changes were dropped: go on from this snapshot, after which
    /// the stream is complete again.
    Reset(Snapshot),
}

/// What brought a change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Origin {
    /// The server notified of it.
    Update,
    /// The difference to the server after a reconnection, or the first contents.
    Resync,
}

/// The rows that one step changed. Empty when the step changed nothing that was asked for.
#[derive(Clone, Debug)]
pub struct ChangeSet {
    /// The number of the step: that of the [`Snapshot`] after it.
    pub generation: u64,
    /// What brought it.
    pub origin: Origin,
    /// Each changed row once.
    pub changes: Vec<Change>,
}

/// A change of one row: [`of`](Self::of) gives it its type.
#[derive(Clone)]
pub struct Change {
    /// The table.
    pub table: &'static str,
    /// The row.
    pub uuid: Uuid,
    old: Option<AnyRow>,
    new: Option<AnyRow>,
}

type AnyRow = Arc<dyn Any + Send + Sync>;

/// A [`Change`] with its row's type.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TypedChange<T> {
    /// The row.
    pub uuid: Uuid,
    /// Before; `None` for a row that is new.
    pub old: Option<Arc<T>>,
    /// After; `None` for a row that is gone.
    pub new: Option<Arc<T>>,
}

/// The changes of a replica from some snapshot on.
///
/// # Guarantees
/// - Applying the changes, in order, to the snapshot that came with the stream gives every later
///   snapshot exactly. Each generation comes once, none is left out, across reconnections too; after
///   an [`Event::Reset`] the same holds from its snapshot on.
///
/// # Caveats
/// - A row that stops to fit its struct is reported as gone: see [`Snapshot::malformed`].
#[derive(Debug)]
pub struct ChangeStream {
    replica: Replica,
    /// The generation that the subscriber knows.
    seen: u64,
    /// `None` when the client ended before.
    receiver: Option<broadcast::Receiver<Arc<ChangeSet>>>,
}

impl Change {
    pub(super) fn new<T: Table>(
        table: &'static str,
        uuid: Uuid,
        old: Option<Arc<T>>,
        new: Option<Arc<T>>,
    ) -> Self {
        Self {
            table,
            uuid,
            old: old.map(|row| row as AnyRow),
            new: new.map(|row| row as AnyRow),
        }
    }

    /// The change as one of a row of `T`; `None` when it is another table's.
    pub fn of<T: Table>(&self) -> Option<TypedChange<T>> {
        let typed = |row: &Option<AnyRow>| match row {
            None => Some(None),
            Some(row) => Some(Some(Arc::downcast(Arc::clone(row)).ok()?)),
        };
        if self.table != T::NAME {
            return None;
        }
        Some(TypedChange {
            uuid: self.uuid,
            old: typed(&self.old)?,
            new: typed(&self.new)?,
        })
    }
}

impl ChangeSet {
    /// The changes of rows of `T`.
    pub fn of<T: Table>(&self) -> impl Iterator<Item = TypedChange<T>> {
        self.changes.iter().filter_map(Change::of)
    }
}

impl ChangeStream {
    pub(super) fn new(replica: Replica) -> (Snapshot, Self) {
        // In this order, so that no step falls between; those of both are skipped in `next`.
        let receiver = replica
            .shared
            .changes
            .upgrade()
            .map(|sender| sender.subscribe());
        let snapshot = replica.snapshot();
        let stream = Self {
            replica,
            seen: snapshot.generation(),
            receiver,
        };
        (snapshot, stream)
    }

    /// The next event; `None` once the client ended. Cancel safe.
    pub async fn next(&mut self) -> Option<Event> {
        let receiver = self.receiver.as_mut()?;
        loop {
            match receiver.recv().await {
                Ok(set) if set.generation <= self.seen => {}
                Ok(set) => {
                    self.seen = set.generation;
                    return Some(Event::Changes(set));
                }
                Err(broadcast::error::RecvError::Lagged(_)) => {
                    // Not from the oldest that is left, which the very next step would drop.
                    *receiver = receiver.resubscribe();
                    let snapshot = self.replica.snapshot();
                    self.seen = snapshot.generation();
                    return Some(Event::Reset(snapshot));
                }
                Err(broadcast::error::RecvError::Closed) => return None,
            }
        }
    }
}

impl fmt::Debug for Change {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = match (&self.old, &self.new) {
            (None, _) => "inserted",
            (_, None) => "deleted",
            _ => "modified",
        };
        write!(formatter, "{} {} {what}", self.table, self.uuid)
    }
}
