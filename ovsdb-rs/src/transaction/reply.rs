//! The results of a transaction (RFC 7047, section 4.1.3).

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::value::RawValue;
use uuid::Uuid;

use super::{CountOp, InsertOp, Operation, SelectOp};
use crate::{Error, Row, TransactionError};

/// The results of a transaction that was committed.
#[derive(Clone, Debug)]
pub struct TransactionReply {
    results: Vec<OperationResult>,
}

#[derive(Clone, Debug)]
enum OperationResult {
    Uuid(Uuid),
    Count(u64),
    Rows(Vec<Row>),
    Nothing,
}

impl TransactionReply {
    /// The identity of the row that the operation inserted.
    ///
    /// # Errors
    /// [`Error::WrongOperation`] for a handle of another transaction.
    pub fn uuid(&self, operation: InsertOp) -> Result<Uuid, Error> {
        match self.results.get(operation.0) {
            Some(OperationResult::Uuid(uuid)) => Ok(*uuid),
            _ => Err(wrong(operation.0, "insert")),
        }
    }

    /// How many rows the operation matched.
    ///
    /// # Errors
    /// [`Error::WrongOperation`] for a handle of another transaction.
    pub fn count(&self, operation: CountOp) -> Result<u64, Error> {
        match self.results.get(operation.0) {
            Some(OperationResult::Count(count)) => Ok(*count),
            _ => Err(wrong(operation.0, "count")),
        }
    }

    /// The rows that the operation read, as `T`, in the server's order.
    ///
    /// # Errors
    /// [`Error::Row`] for a row that does not fit `T`, [`Error::WrongOperation`] for a handle of
    /// another transaction.
    pub fn rows<T: DeserializeOwned>(&self, operation: SelectOp) -> Result<Vec<(Uuid, T)>, Error> {
        self.raw_rows(operation)?
            .iter()
            .map(|row| {
                let identity = row.get("_uuid").and_then(|datum| datum.scalar());
                let Some(crate::Atom::Uuid(uuid)) = identity else {
                    return Err(Error::Row("it has no _uuid".into()));
                };
                Ok((*uuid, row.to()?))
            })
            .collect()
    }

    /// The rows that the operation read, column by column.
    ///
    /// # Errors
    /// [`Error::WrongOperation`] for a handle of another transaction.
    pub fn raw_rows(&self, operation: SelectOp) -> Result<&[Row], Error> {
        match self.results.get(operation.0) {
            Some(OperationResult::Rows(rows)) => Ok(rows),
            _ => Err(wrong(operation.0, "select")),
        }
    }
}

fn wrong(operation: usize, wanted: &'static str) -> Error {
    Error::WrongOperation { operation, wanted }
}

// === the wire's notation ===

/// What the array of results holds per operation; `error` and the others exclude each other.
#[derive(Deserialize)]
struct WireResult {
    uuid: Option<crate::Atom>,
    count: Option<u64>,
    rows: Option<Vec<Row>>,
    error: Option<String>,
    details: Option<String>,
}

/// What became of a transaction.
pub(crate) enum Outcome {
    Committed(TransactionReply),
    Refused(TransactionError),
    /// The answer is no answer to this transaction.
    Nonsense(String),
}

/// Reads the `result` of the reply to a transaction of `operations`.
///
/// The array has one element per operation: a result, an error for the one that failed, `null` for
/// those after it. When every operation succeeded and the commit failed, an error follows them.
pub(crate) fn read(database: &str, operations: &[Operation], result: &RawValue) -> Outcome {
    let wire: Vec<Option<WireResult>> = match serde_json::from_str(result.get()) {
        Ok(wire) => wire,
        Err(error) => return Outcome::Nonsense(error.to_string()),
    };
    let failed = wire.iter().enumerate().find_map(|(index, result)| {
        let result = result.as_ref()?;
        Some((index, result.error.as_deref()?, result.details.clone()))
    });
    if let Some((index, name, details)) = failed {
        return Outcome::Refused(TransactionError {
            database: database.to_owned(),
            operation: operations.get(index).map(|op| (index, op.describe())),
            kind: name.into(),
            details,
        });
    }
    if wire.len() != operations.len() {
        return Outcome::Nonsense(format!(
            "{} results for {} operations",
            wire.len(),
            operations.len()
        ));
    }
    let results: Result<_, _> = operations
        .iter()
        .zip(wire)
        .enumerate()
        .map(|(index, (operation, result))| {
            result
                .and_then(|result| result.for_operation(operation))
                .ok_or_else(|| {
                    format!("no result for operation {index} ({})", operation.describe())
                })
        })
        .collect();
    match results {
        Ok(results) => Outcome::Committed(TransactionReply { results }),
        Err(reason) => Outcome::Nonsense(reason),
    }
}

impl WireResult {
    fn for_operation(self, operation: &Operation) -> Option<OperationResult> {
        match operation {
            Operation::Insert { .. } => match self.uuid? {
                crate::Atom::Uuid(uuid) => Some(OperationResult::Uuid(uuid)),
                _ => None,
            },
            Operation::Select { .. } => self.rows.map(OperationResult::Rows),
            Operation::Update { .. } | Operation::Mutate { .. } | Operation::Delete { .. } => {
                self.count.map(OperationResult::Count)
            }
            Operation::Wait { .. }
            | Operation::Commit { .. }
            | Operation::Abort
            | Operation::Comment { .. }
            | Operation::Assert { .. } => Some(OperationResult::Nothing),
        }
    }
}
