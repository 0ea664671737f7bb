//! Transactions: the operations of RFC 7047, section 5.2, built one by one.

mod condition;
mod reply;

use std::time::Duration;

pub use condition::{Condition, Function, Mutation, Mutator, Where};
pub use reply::TransactionReply;
pub(crate) use reply::{Outcome, read as read_reply};
use serde::Serialize;
use uuid::Uuid;

use crate::{Atom, Datum, Row};

/// Operations that a server executes together or not at all.
///
/// Each method adds one operation; those with a result return a handle, with which
/// [`TransactionReply`] gives the result in its type.
///
/// ```
/// use ovsdb_rs::{Condition, Mutation, Row, Transaction};
///
/// let mut tx = Transaction::new();
/// let port = tx.insert("Logical_Switch_Port", Row::new().set("name", "vm0"));
/// let switch = [Condition::eq("name", "node1")];
/// let switches = tx.mutate(
///     "Logical_Switch",
///     switch,
///     [Mutation::insert("ports", &port)],
/// );
/// // After `let reply = client.transact("OVN_Northbound", tx).await?`:
/// // `reply.uuid(port)?`, and `reply.count(switches)?` should be 1.
/// # let _ = switches;
/// ```
///
/// # Guarantees
/// - Every insert carries a `uuid-name` of its own, so later *and earlier* operations can refer to
///   the row by its handle.
///
/// # Caveats
/// - Operations that match no row are no error: check [`TransactionReply::count`], or guard with
///   [`expect`](Self::expect).
#[derive(Clone, Debug, Default)]
#[must_use = "a transaction does nothing until it is given to `Client::transact`"]
pub struct Transaction {
    pub(crate) operations: Vec<Operation>,
}

/// Handle of an insert. Stands for the new row's UUID in the values of the same transaction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InsertOp(usize);

/// Handle of an operation that counts the rows it changed: update, mutate, delete.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CountOp(usize);

/// Handle of a select.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SelectOp(usize);

/// When a [`wait`](Transaction::wait) is satisfied.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum WaitOp {
    /// Once the selected rows are those given.
    #[serde(rename = "==")]
    Equal,
    /// Once the selected rows differ from those given.
    #[serde(rename = "!=")]
    NotEqual,
}

/// One operation, as the wire has it.
#[derive(Clone, Debug, Serialize)]
#[serde(tag = "op", rename_all = "lowercase")]
pub(crate) enum Operation {
    Insert {
        table: String,
        row: Row,
        #[serde(rename = "uuid-name")]
        uuid_name: String,
        #[serde(skip_serializing_if = "Option::is_none")]
        uuid: Option<Uuid>,
    },
    Select {
        table: String,
        r#where: Where,
        #[serde(skip_serializing_if = "Vec::is_empty")]
        columns: Vec<String>,
    },
    Update {
        table: String,
        r#where: Where,
        row: Row,
    },
    Mutate {
        table: String,
        r#where: Where,
        mutations: Vec<Mutation>,
    },
    Delete {
        table: String,
        r#where: Where,
    },
    Wait {
        table: String,
        r#where: Where,
        columns: Vec<String>,
        until: WaitOp,
        rows: Vec<Row>,
        /// In milliseconds.
        #[serde(skip_serializing_if = "Option::is_none")]
        timeout: Option<u64>,
    },
    Commit {
        durable: bool,
    },
    Abort,
    Comment {
        comment: String,
    },
    Assert {
        lock: String,
    },
}

impl Transaction {
    /// A transaction without operations.
    pub fn new() -> Self {
        Self::default()
    }

    /// Inserts a row; columns not named take their defaults.
    pub fn insert(&mut self, table: impl Into<String>, row: Row) -> InsertOp {
        self.push_insert(table.into(), row, None)
    }

    /// Inserts a row with a UUID of the caller's choice (Open vSwitch 2.13 and later).
    ///
    /// Makes the insert idempotent: made again after an
    /// [`Error::Indeterminate`](crate::Error::Indeterminate) it fails with
    /// [`ErrorKind::DuplicateUuid`](crate::ErrorKind::DuplicateUuid) if the first was committed.
    pub fn insert_with_uuid(&mut self, table: impl Into<String>, uuid: Uuid, row: Row) -> InsertOp {
        self.push_insert(table.into(), row, Some(uuid))
    }

    fn push_insert(&mut self, table: String, row: Row, uuid: Option<Uuid>) -> InsertOp {
        let handle = InsertOp(self.operations.len());
        self.operations.push(Operation::Insert {
            table,
            row,
            uuid_name: handle.uuid_name(),
            uuid,
        });
        handle
    }

    /// Reads `columns` of the matching rows; no columns means all of them. `_uuid` always comes too.
    pub fn select<'a>(
        &mut self,
        table: impl Into<String>,
        rows: impl Into<Where>,
        columns: impl IntoIterator<Item = &'a str>,
    ) -> SelectOp {
        let mut columns: Vec<String> = columns.into_iter().map(Into::into).collect();
        if !columns.is_empty() && !columns.iter().any(|column| column == "_uuid") {
            columns.push("_uuid".into());
        }
        SelectOp(self.push(Operation::Select {
            table: table.into(),
            r#where: rows.into(),
            columns,
        }))
    }

    /// Sets the columns named in `row`, in every matching row.
    pub fn update(
        &mut self,
        table: impl Into<String>,
        rows: impl Into<Where>,
        row: Row,
    ) -> CountOp {
        CountOp(self.push(Operation::Update {
            table: table.into(),
            r#where: rows.into(),
            row,
        }))
    }

    /// Changes columns of every matching row relative to what they hold, in the order given.
    pub fn mutate(
        &mut self,
        table: impl Into<String>,
        rows: impl Into<Where>,
        mutations: impl IntoIterator<Item = Mutation>,
    ) -> CountOp {
        CountOp(self.push(Operation::Mutate {
            table: table.into(),
            r#where: rows.into(),
            mutations: mutations.into_iter().collect(),
        }))
    }

    /// Deletes every matching row.
    pub fn delete(&mut self, table: impl Into<String>, rows: impl Into<Where>) -> CountOp {
        CountOp(self.push(Operation::Delete {
            table: table.into(),
            r#where: rows.into(),
        }))
    }

    /// Goes on only once `columns` of the matching rows are (or are not) `rows`, compared as a set of
    /// rows; fails with [`ErrorKind::TimedOut`](crate::ErrorKind::TimedOut) otherwise.
    ///
    /// `timeout` in whole milliseconds; `None` waits for as long as the call may take. The call's
    /// deadline is extended by the timeout.
    pub fn wait<'a>(
        &mut self,
        table: impl Into<String>,
        rows: impl Into<Where>,
        columns: impl IntoIterator<Item = &'a str>,
        until: WaitOp,
        expected: impl IntoIterator<Item = Row>,
        timeout: Option<Duration>,
    ) {
        self.push(Operation::Wait {
            table: table.into(),
            r#where: rows.into(),
            columns: columns.into_iter().map(Into::into).collect(),
            until,
            rows: expected.into_iter().collect(),
            timeout: timeout.map(|timeout| u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX)),
        });
    }

    /// Guards the transaction: it fails at once, with
    /// [`Error::is_guard_failure`](crate::Error::is_guard_failure), unless `rows` matches rows that
    /// all have exactly the values of `expected` in the columns that `expected` names.
    ///
    /// # Caveats
    /// - A row that does not exist fails the guard.
    /// - For a map, the whole map is compared. To guard one key of it, put
    ///   [`Condition::includes`] in `rows` and any column that identifies the row in `expected`.
    pub fn expect(&mut self, table: impl Into<String>, rows: impl Into<Where>, expected: Row) {
        let columns: Vec<String> = expected.iter().map(|(name, _)| name.to_owned()).collect();
        self.push(Operation::Wait {
            table: table.into(),
            r#where: rows.into(),
            columns,
            until: WaitOp::Equal,
            rows: vec![expected],
            timeout: Some(0),
        });
    }

    /// Asks, when `durable`, that the reply be sent only once the transaction is on disk.
    pub fn commit(&mut self, durable: bool) {
        self.push(Operation::Commit { durable });
    }

    /// Makes the transaction fail with [`ErrorKind::Aborted`](crate::ErrorKind::Aborted).
    pub fn abort(&mut self) {
        self.push(Operation::Abort);
    }

    /// Leaves `comment` in the server's log of transactions.
    pub fn comment(&mut self, comment: impl Into<String>) {
        self.push(Operation::Comment {
            comment: comment.into(),
        });
    }

    /// Fails with [`ErrorKind::NotOwner`](crate::ErrorKind::NotOwner) unless this client's connection
    /// holds `lock` (see [`Client::lock`](crate::Client::lock)).
    pub fn assert_lock(&mut self, lock: impl Into<String>) {
        self.push(Operation::Assert { lock: lock.into() });
    }

    /// How many operations there are.
    pub fn len(&self) -> usize {
        self.operations.len()
    }

    /// Whether there is no operation.
    pub fn is_empty(&self) -> bool {
        self.operations.is_empty()
    }

    fn push(&mut self, operation: Operation) -> usize {
        self.operations.push(operation);
        self.operations.len() - 1
    }

    /// Whether executing it twice is as good as once, whatever happens in between.
    pub(crate) fn is_read_only(&self) -> bool {
        self.operations.iter().all(|operation| {
            matches!(
                operation,
                Operation::Select { .. } | Operation::Wait { .. } | Operation::Abort
            )
        })
    }

    /// How long the server may take over it on purpose.
    pub(crate) fn waits(&self) -> Duration {
        self.operations
            .iter()
            .filter_map(|operation| match operation {
                Operation::Wait { timeout, .. } => timeout.map(Duration::from_millis),
                _ => None,
            })
            .max()
            .unwrap_or_default()
    }
}

impl InsertOp {
    /// The new row in values of the same transaction. `From` does the same where a value is taken.
    pub fn reference(self) -> Atom {
        Atom::NamedUuid(self.uuid_name())
    }

    fn uuid_name(self) -> String {
        format!("row{}", self.0)
    }
}

impl From<InsertOp> for Atom {
    fn from(handle: InsertOp) -> Self {
        handle.reference()
    }
}

impl From<&InsertOp> for Atom {
    fn from(handle: &InsertOp) -> Self {
        handle.reference()
    }
}

impl From<InsertOp> for Datum {
    fn from(handle: InsertOp) -> Self {
        handle.reference().into()
    }
}

impl From<&InsertOp> for Datum {
    fn from(handle: &InsertOp) -> Self {
        handle.reference().into()
    }
}

impl Operation {
    /// What it does, for error messages.
    pub(crate) fn describe(&self) -> String {
        match self {
            Self::Insert { table, .. } => format!("insert into {table}"),
            Self::Select { table, .. } => format!("select from {table}"),
            Self::Update { table, .. } => format!("update {table}"),
            Self::Mutate { table, .. } => format!("mutate {table}"),
            Self::Delete { table, .. } => format!("delete from {table}"),
            Self::Wait { table, columns, .. } => {
                format!("wait for {} of {table}", columns.join(", "))
            }
            Self::Commit { .. } => "commit".into(),
            Self::Abort => "abort".into(),
            Self::Comment { .. } => "comment".into(),
            Self::Assert { lock } => format!("assert lock {lock:?}"),
        }
    }
}
