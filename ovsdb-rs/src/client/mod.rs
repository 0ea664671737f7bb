//! The client: what callers see of a session.

mod actor;
mod call;
mod lock;
mod session;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

pub(crate) use call::{Command, Commands};
pub use lock::{Lock, LockState};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde::ser::{SerializeSeq, Serializer};
use serde_json::value::RawValue;
use tokio::sync::{mpsc, oneshot, watch};

use crate::transaction::{Operation, Outcome, read_reply};
use crate::{Cause, DatabaseSchema, Endpoint, Endpoints, Error, Transaction, TransactionReply};
use call::{AbandonOnDrop, Call, CallError, Stage};

/// How a [`Client`] behaves; every field has a sensible default.
///
/// ```
/// use std::time::Duration;
/// use ovsdb_rs::ClientOptions;
///
/// let options = ClientOptions {
///     call_timeout: Duration::from_secs(2),
///     ..ClientOptions::default()
/// };
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientOptions {
    /// How long a call may take, waiting for a connection included. Default: 10 s.
    pub call_timeout: Duration,
    /// How long the server may take over a replica's schema and contents before the connection is
    /// given up. Default: 60 s, since the contents of a large database take seconds to send.
    pub monitor_timeout: Duration,
    /// After how much silence the server is probed with an `echo`; after as much again the connection
    /// is given up. Default: 5 s, which is what `ovsdb-server` uses towards clients.
    pub probe_interval: Duration,
    /// How long one attempt to connect may take, the server's first answer included. Default: 5 s.
    pub connect_timeout: Duration,
    /// The largest message accepted, in bytes. Default: 512 MiB, since the first contents of a large
    /// database come as one message.
    pub max_frame: usize,
    /// The pause between the first two attempts to connect; it doubles from there, with jitter.
    /// Default: 50 ms.
    pub min_backoff: Duration,
    /// The longest pause between attempts, before jitter. Default: 4 s.
    pub max_backoff: Duration,
}

/// A session with a server that reconnects by itself, for as long as a clone of it, a
/// [`Replica`](crate::Replica) or a [`Lock`] of it exists.
///
/// # Guarantees
/// - Every call ends: with an answer, or within its deadline with an error that says whether it can
///   have had an effect. See [`Error::unchanged`].
/// - A transaction is sent at most once. When the connection is lost before its answer, that is
///   [`Error::Indeterminate`], not a silent second attempt.
/// - The server's `echo` requests are answered, and a server that falls silent is probed and left,
///   on Unix sockets as well as on TCP.
///
/// # Caveats
/// - Dropping the future of a call cancels it as far as it can still be cancelled: a transaction may
///   have been committed.
#[derive(Clone, Debug)]
pub struct Client {
    commands: Commands,
    ids: Arc<AtomicU64>,
    call_timeout: Duration,
    state: watch::Receiver<ConnectionState>,
}

/// Whether there is a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ConnectionState {
    /// Attempts are being made.
    Connecting {
        /// What ended the last connection or attempt; `None` before the first.
        last_error: Option<String>,
    },
    /// There is one, and the server has answered on it.
    Connected {
        /// Where the server listens.
        endpoint: Endpoint,
    },
}

/// The parameters of `transact`: the database, then the operations.
struct TransactParams<'a>(&'a str, &'a [Operation]);

impl Default for ClientOptions {
    fn default() -> Self {
        Self {
            call_timeout: Duration::from_secs(10),
            monitor_timeout: Duration::from_mins(1),
            probe_interval: Duration::from_secs(5),
            connect_timeout: Duration::from_secs(5),
            max_frame: 512 << 20,
            min_backoff: Duration::from_millis(50),
            max_backoff: Duration::from_secs(4),
        }
    }
}

impl Client {
    /// Connects, and returns once there is a connection.
    ///
    /// # Errors
    /// [`Error::NotSent`] with what the last attempt failed with, after
    /// [`call_timeout`](ClientOptions::call_timeout).
    pub async fn connect(
        endpoints: impl Into<Endpoints>,
        options: ClientOptions,
    ) -> Result<Self, Error> {
        let client = Self::spawn(endpoints, options);
        let mut state = client.connection_state();
        let connected = state.wait_for(|state| matches!(state, ConnectionState::Connected { .. }));
        match tokio::time::timeout(client.call_timeout, connected).await {
            Ok(Ok(_)) => {}
            Ok(Err(_)) => return Err(Error::Shutdown),
            Err(_) => {
                return Err(Error::NotSent {
                    method: "connect",
                    cause: client.not_connected(client.call_timeout),
                });
            }
        }
        Ok(client)
    }

    /// Starts connecting and returns at once; calls wait for the connection, within their deadline.
    ///
    /// # Panics
    /// Outside of a tokio runtime.
    pub fn spawn(endpoints: impl Into<Endpoints>, options: ClientOptions) -> Self {
        let (commands, receiver) = mpsc::unbounded_channel();
        let (sender, state) = watch::channel(ConnectionState::Connecting { last_error: None });
        let ids = Arc::new(AtomicU64::new(1));
        let call_timeout = options.call_timeout;
        let actor = actor::Actor::new(endpoints.into(), options, ids.clone(), receiver, sender);
        tokio::spawn(actor.run());
        Self {
            commands,
            ids,
            call_timeout,
            state,
        }
    }

    /// Executes a transaction: all of it, or nothing.
    ///
    /// # Errors
    /// - [`Error::Transaction`]: refused, at an operation or at the commit; nothing was changed.
    ///   [`Error::is_guard_failure`] tells a `wait` that was not met.
    /// - [`Error::NotSent`]: the server never saw it.
    /// - [`Error::Indeterminate`]: the server may or may not have committed it.
    /// - [`Error::NoReply`]: no answer to a transaction that writes nothing.
    /// - [`Error::Rpc`]: refused as a request, for instance for an unknown database.
    pub async fn transact(
        &self,
        database: &str,
        transaction: Transaction,
    ) -> Result<TransactionReply, Error> {
        const METHOD: &str = "transact";
        let operations = &transaction.operations;
        let harmless = transaction.is_read_only();
        let params = TransactParams(database, operations);
        let limit = self.call_timeout.saturating_add(transaction.waits());
        let unanswered = |cause| {
            if harmless {
                Error::NoReply {
                    method: METHOD,
                    cause,
                }
            } else {
                Error::Indeterminate { cause }
            }
        };
        let result = match self.call(METHOD, &params, harmless, limit).await {
            Ok(result) => result,
            Err(Error::NoReply { cause, .. }) => return Err(unanswered(cause)),
            Err(error) => return Err(error),
        };
        match read_reply(database, operations, &result) {
            Outcome::Committed(reply) => Ok(reply),
            Outcome::Refused(error) => Err(Error::Transaction(error)),
            Outcome::Nonsense(reason) => Err(unanswered(Cause::Nonsense(reason))),
        }
    }

    /// The names of the server's databases.
    ///
    /// # Errors
    /// [`Error::NotSent`], [`Error::NoReply`], [`Error::Protocol`].
    pub async fn list_dbs(&self) -> Result<Vec<String>, Error> {
        self.get("list_dbs", &[(); 0]).await
    }

    /// The schema of a database.
    ///
    /// # Errors
    /// [`Error::Rpc`] for an unknown database, [`Error::NotSent`], [`Error::NoReply`],
    /// [`Error::Protocol`].
    pub async fn get_schema(&self, database: &str) -> Result<DatabaseSchema, Error> {
        self.get("get_schema", &[database]).await
    }

    /// Queues for a lock, which the server gives to one client at a time, in order. Returns once the
    /// server has answered: see [`Lock::state`] for whether the lock is held.
    ///
    /// # Errors
    /// [`Error::LockInUse`], or [`Error::Rpc`] when the server refuses the name.
    pub async fn lock(&self, name: &str) -> Result<Lock, Error> {
        lock::request(self, name, false).await
    }

    /// Takes a lock at once, from whoever holds it. After a reconnection it is queued for.
    ///
    /// # Errors
    /// Like [`lock`](Self::lock).
    pub async fn steal(&self, name: &str) -> Result<Lock, Error> {
        lock::request(self, name, true).await
    }

    /// Whether there is a connection, and as it changes from now on.
    pub fn connection_state(&self) -> watch::Receiver<ConnectionState> {
        from_now(&self.state)
    }

    pub(crate) fn commands(&self) -> &Commands {
        &self.commands
    }

    // === calls ===

    async fn get<T: DeserializeOwned>(
        &self,
        method: &'static str,
        params: &impl Serialize,
    ) -> Result<T, Error> {
        let result = self.call(method, params, true, self.call_timeout).await?;
        serde_json::from_str(result.get()).map_err(|error| Error::Protocol {
            method,
            reason: error.to_string(),
        })
    }

    /// Makes a call. [`Error::NoReply`] when it was sent and its fate is unknown.
    async fn call(
        &self,
        method: &'static str,
        params: &impl Serialize,
        idempotent: bool,
        limit: Duration,
    ) -> Result<Box<RawValue>, Error> {
        let id = self.ids.fetch_add(1, Ordering::Relaxed);
        let params = serde_json::value::to_raw_value(params).map_err(|error| Error::Protocol {
            method,
            reason: error.to_string(),
        })?;
        let (reply, answer) = oneshot::channel();
        let stage = Stage::default();
        let call = Call {
            id,
            method,
            params,
            idempotent,
            stage: stage.clone(),
            reply,
        };
        self.commands
            .send(Command::Call(call))
            .map_err(|_| Error::Shutdown)?;
        let mut guard = AbandonOnDrop {
            commands: &self.commands,
            id,
            answered: false,
        };
        let Ok(answer) = tokio::time::timeout(limit, answer).await else {
            return Err(if stage.abandon() {
                Error::NotSent {
                    method,
                    cause: self.not_connected(limit),
                }
            } else {
                Error::NoReply {
                    method,
                    cause: Cause::Deadline(limit),
                }
            });
        };
        guard.answered = true;
        match answer {
            Ok(answer) => answer.map_err(|error| error.into_error(method)),
            // The session ended. Only what it had not sent is certain.
            Err(_) if stage.abandon() => Err(Error::Shutdown),
            Err(_) => Err(Error::NoReply {
                method,
                cause: Cause::Disconnected("the client was shut down".into()),
            }),
        }
    }

    /// Why a call could not be sent within `limit`.
    fn not_connected(&self, limit: Duration) -> Cause {
        match &*self.state.borrow() {
            ConnectionState::Connecting {
                last_error: Some(error),
            } => Cause::NotConnected(error.clone()),
            _ => Cause::Deadline(limit),
        }
    }
}

impl CallError {
    fn into_error(self, method: &'static str) -> Error {
        match self {
            Self::Rpc(error) => Error::Rpc {
                method,
                kind: error.name.as_str().into(),
                details: error.details,
            },
            Self::LockInUse => Error::LockInUse,
            Self::Lost(reason) => Error::NoReply {
                method,
                cause: Cause::Disconnected(reason),
            },
        }
    }
}

impl Serialize for TransactParams<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let Self(database, operations) = self;
        let mut seq = serializer.serialize_seq(Some(1 + operations.len()))?;
        seq.serialize_element(database)?;
        for operation in *operations {
            seq.serialize_element(operation)?;
        }
        seq.end()
    }
}

/// A receiver whose `changed` means a change after this moment.
pub(crate) fn from_now<T>(receiver: &watch::Receiver<T>) -> watch::Receiver<T> {
    let mut receiver = receiver.clone();
    receiver.mark_unchanged();
    receiver
}
