use std::fmt;
use std::time::Duration;

/// What can go wrong, from a caller's point of view.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An endpoint's notation is wrong.
    #[error("endpoint {text:?}: {reason}")]
    Endpoint {
        /// What was given.
        text: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// The call never reached a server, so nothing was changed and it can be made again.
    #[error("{method}: not sent: {cause}")]
    NotSent {
        /// The JSON-RPC method.
        method: &'static str,
        /// What prevented it.
        cause: Cause,
    },
    /// A call that changes nothing was sent, and its answer did not come.
    #[error("{method}: {cause}")]
    NoReply {
        /// The JSON-RPC method.
        method: &'static str,
        /// What prevented the answer.
        cause: Cause,
    },
    /// A transaction was sent, and whether the server committed it is unknown.
    ///
    /// Read the rows (a [`Replica`](crate::Replica) that is synced again will do) before deciding
    /// what to write. Transactions made idempotent and guarded by
    /// [`wait`](crate::Transaction::wait) can just be made again.
    #[error("the transaction may or may not have been committed: {cause}")]
    Indeterminate {
        /// What prevented the answer.
        cause: Cause,
    },
    /// The server refused the transaction as a whole, or one of its operations; nothing was committed.
    #[error(transparent)]
    Transaction(#[from] TransactionError),
    /// The server answered a request with a JSON-RPC error.
    #[error("{method}: the server answers {kind}{}", colon(details.as_deref()))]
    Rpc {
        /// The JSON-RPC method.
        method: &'static str,
        /// The error's name.
        kind: ErrorKind,
        /// What the server says about it.
        details: Option<String>,
    },
    /// The server answered with something that the protocol does not allow here.
    #[error("{method}: answer not understood: {reason}")]
    Protocol {
        /// The JSON-RPC method.
        method: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// A row does not fit the type that was asked for.
    #[error("row does not fit: {0}")]
    Row(String),
    /// An operation's handle was used with the reply to another transaction.
    #[error("the reply has no {wanted} result for operation {operation}")]
    WrongOperation {
        /// The operation's index.
        operation: usize,
        /// The kind of result asked for.
        wanted: &'static str,
    },
    /// A replica's tables contradict each other or the server's schema.
    #[error("replica of {database}: {reason}")]
    Replica {
        /// The database.
        database: String,
        /// What is wrong, and what would help.
        reason: String,
    },
    /// This client holds the lock, or queues for it, already.
    #[error("this client holds the lock, or queues for it, already")]
    LockInUse,
    /// The client was shut down.
    #[error("the client was shut down")]
    Shutdown,
}

/// Why there is no answer.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Cause {
    /// The call's deadline passed.
    Deadline(Duration),
    /// There was no connection; with what the last attempt failed.
    NotConnected(String),
    /// The connection ended while the call was under way.
    Disconnected(String),
    /// The answer made no sense.
    Nonsense(String),
}

/// A transaction that the server refused. Nothing of it was committed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}: {kind}{}", self.place(), colon(details.as_deref()))]
pub struct TransactionError {
    /// The database.
    pub database: String,
    /// The operation that failed: its index and a short description. `None` when every operation
    /// succeeded and the commit failed: references and indexes are checked at the end (RFC 7047,
    /// section 4.1.3).
    pub operation: Option<(usize, String)>,
    /// The error's name.
    pub kind: ErrorKind,
    /// What the server says about it.
    pub details: Option<String>,
}

macro_rules! error_kinds {
    ($($(#[$doc:meta])* $variant:ident = $text:literal,)*) => {
        /// The names of errors in RFC 7047, sections 3.1 and 5.2, and in ovsdb-server(7).
        #[derive(Clone, Debug, PartialEq, Eq, Hash)]
        #[non_exhaustive]
        pub enum ErrorKind {
            $($(#[$doc])* $variant,)*
            /// Any other name.
            Other(String),
        }

        impl From<&str> for ErrorKind {
            fn from(name: &str) -> Self {
                match name {
                    $($text => Self::$variant,)*
                    other => Self::Other(other.to_owned()),
                }
            }
        }

        impl fmt::Display for ErrorKind {
            fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str(match self {
                    $(Self::$variant => $text,)*
                    Self::Other(name) => name,
                })
            }
        }
    };
}

error_kinds! {
    /// A strong reference would dangle. Reported at commit.
    ReferentialIntegrityViolation = "referential integrity violation",
    /// A value breaks a column's constraint, or rows a table's index or row limit.
    ConstraintViolation = "constraint violation",
    /// The server ran out of something.
    ResourcesExhausted = "resources exhausted",
    /// The server could not write its database.
    IoError = "I/O error",
    /// Two inserts of a transaction have the same `uuid-name`.
    DuplicateUuidName = "duplicate uuid-name",
    /// A row with the UUID given to an insert exists already.
    DuplicateUuid = "duplicate uuid",
    /// A mutation has no result: division by zero.
    DomainError = "domain error",
    /// A mutation's result is out of range.
    RangeError = "range error",
    /// A `wait` was not satisfied in time: the guarded rows are not as expected.
    TimedOut = "timed out",
    /// The operation is not supported, such as a durable commit by a server that cannot.
    NotSupported = "not supported",
    /// The transaction's own `abort`.
    Aborted = "aborted",
    /// An `assert` of a lock that this session does not hold.
    NotOwner = "not owner",
    /// A request was cancelled.
    Canceled = "canceled",
    /// There is no such database.
    UnknownDatabase = "unknown database",
    /// The server does not know the method.
    UnknownMethod = "unknown method",
    /// A table, column or notation that the schema or the protocol does not know.
    SyntaxError = "syntax error",
    /// There is no such table.
    UnknownTable = "unknown table",
    /// There is no such column.
    UnknownColumn = "unknown column",
    /// The cluster could not commit it, for instance because its leader changed.
    ClusterError = "cluster error",
    /// The server has a bug.
    InternalError = "internal error",
    /// Role-based access control forbids it.
    PermissionError = "permission error",
    /// The database does not accept changes.
    NotAllowed = "not allowed",
}

impl Error {
    /// Whether nothing was changed for certain, so that making the call again cannot repeat an effect.
    ///
    /// False for [`Error::Indeterminate`] alone.
    pub fn unchanged(&self) -> bool {
        !matches!(self, Self::Indeterminate { .. })
    }

    /// The refusal, if the error is one.
    pub fn as_transaction(&self) -> Option<&TransactionError> {
        match self {
            Self::Transaction(error) => Some(error),
            _ => None,
        }
    }

    /// Whether a `wait` of the transaction was not satisfied: somebody else changed the guarded rows.
    pub fn is_guard_failure(&self) -> bool {
        self.as_transaction()
            .is_some_and(|error| error.kind == ErrorKind::TimedOut)
    }
}

impl TransactionError {
    fn place(&self) -> String {
        match &self.operation {
            Some((index, description)) => {
                format!("{}: operation {index} ({description})", self.database)
            }
            None => format!("{}: commit", self.database),
        }
    }
}

fn colon(details: Option<&str>) -> String {
    details.map_or_else(String::new, |details| format!(": {details}"))
}

impl fmt::Display for Cause {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Deadline(limit) => write!(formatter, "no answer within {limit:?}"),
            Self::NotConnected(reason) => write!(formatter, "no connection: {reason}"),
            Self::Disconnected(reason) => write!(formatter, "connection lost: {reason}"),
            Self::Nonsense(reason) => write!(formatter, "answer not understood: {reason}"),
        }
    }
}
