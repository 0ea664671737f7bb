//! One monitor of one database, across connections: which request comes next, and what the answers
//! and notifications make of the replica. No I/O here.

pub(crate) mod update;

use std::collections::BTreeMap;

use serde::Serialize;
use serde_json::value::RawValue;
use tracing::{info, warn};
use uuid::Uuid;

use crate::replica::writer::Writer;
use crate::wire::message::RpcError;
use crate::{ColumnSchema, Condition, DatabaseSchema, ErrorKind, Origin, SyncState, TableSchema};
use update::TableUpdates;

/// Follows tables of a database and keeps a [`Writer`]'s replica equal to them.
pub(crate) struct Monitor {
    /// The `<json-value>` that its notifications carry; unique in its client.
    key: u64,
    database: String,
    tables: Vec<MonitoredTable>,
    /// As of the last connection.
    columns: Vec<Columns>,
    phase: Phase,
    /// The last transaction in the replica; nil when there is none, or its rows are not to be
    /// trusted, so that the server sends everything.
    last_transaction: Uuid,
    writer: Writer,
}

/// What is to be monitored of a table.
#[derive(Clone, Debug)]
pub(crate) struct MonitoredTable {
    pub(crate) name: &'static str,
    pub(crate) columns: &'static [&'static str],
    pub(crate) optional_columns: &'static [&'static str],
    pub(crate) conditions: Vec<Condition>,
}

/// The monitored columns that the server's schema has.
pub(crate) type Columns = Vec<(&'static str, ColumnSchema)>;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Idle,
    AwaitingSchema,
    /// `monitor_cond_since` was sent.
    AwaitingSince,
    /// `monitor_cond` was sent, the server being older than Open vSwitch 2.12.
    AwaitingCond,
    Live,
}

/// What a monitor wants next.
pub(crate) enum Step {
    Request {
        method: &'static str,
        params: Box<RawValue>,
    },
    Live,
    /// The server refuses; to be started again later.
    Refused,
}

#[derive(Serialize)]
struct MonitorRequest<'a> {
    columns: Vec<&'static str>,
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    r#where: &'a [Condition],
}

impl Monitor {
    pub(crate) fn new(
        key: u64,
        database: String,
        tables: Vec<MonitoredTable>,
        writer: Writer,
    ) -> Self {
        Self {
            key,
            database,
            tables,
            columns: Vec::new(),
            phase: Phase::Idle,
            last_transaction: Uuid::nil(),
            writer,
        }
    }

    pub(crate) fn key(&self) -> u64 {
        self.key
    }

    /// Begins on a connection that is ready.
    ///
    /// The schema comes first, each time: what left the server may be older or newer than what
    /// comes back, and updates cannot be read without the types.
    pub(crate) fn start(&mut self) -> Step {
        self.phase = Phase::AwaitingSchema;
        request("get_schema", &[&self.database])
    }

    pub(crate) fn disconnected(&mut self) {
        self.phase = Phase::Idle;
        self.writer.lost();
    }

    /// Forgets how far the replica is, so that the next contents are transferred in full: the server
    /// sent something that cannot be, and part of it may be in the writer's rows.
    pub(crate) fn distrust(&mut self) {
        self.last_transaction = Uuid::nil();
    }

    /// Takes the answer to the request under way. An error means that the server cannot be trusted.
    pub(crate) fn answered(
        &mut self,
        outcome: Result<Box<RawValue>, RpcError>,
    ) -> Result<Step, String> {
        match (self.phase, outcome) {
            (Phase::AwaitingSchema, Ok(result)) => {
                let schema: DatabaseSchema = read("get_schema", &result)?;
                Ok(self.request_since(&schema))
            }
            (Phase::AwaitingSince, Ok(result)) => {
                let (found, transaction, updates): (bool, Uuid, TableUpdates) =
                    read("monitor_cond_since", &result)?;
                if found && self.last_transaction.is_nil() {
                    return Err("changes since a transaction that was not asked for".into());
                }
                self.resynced(found, transaction, updates)
            }
            (Phase::AwaitingCond, Ok(result)) => {
                let updates = read("monitor_cond", &result)?;
                self.resynced(false, Uuid::nil(), updates)
            }
            (Phase::AwaitingSince, Err(error))
                if ErrorKind::from(error.name.as_str()) == ErrorKind::UnknownMethod =>
            {
                info!(
                    database = self.database,
                    "the server has no monitor_cond_since: reconnections transfer everything"
                );
                self.phase = Phase::AwaitingCond;
                Ok(request(
                    "monitor_cond",
                    &(&self.database, self.key, self.monitor_requests()),
                ))
            }
            (Phase::Idle | Phase::Live, _) => Err("an answer that no monitor asked for".into()),
            (_, Err(RpcError { name, details })) => Ok(self.refused(&match details {
                Some(details) => format!("{name}: {details}"),
                None => name,
            })),
        }
    }

    /// Takes a notification. An error means that the server cannot be trusted.
    pub(crate) fn update(
        &mut self,
        transaction: Option<Uuid>,
        updates: TableUpdates,
    ) -> Result<(), String> {
        if self.phase != Phase::Live {
            return Err(format!(
                "an update of {} before its first contents",
                self.database
            ));
        }
        let transaction = transaction.unwrap_or_default();
        let applied = self
            .writer
            .apply(&self.columns, updates, transaction, Origin::Update);
        self.accept(transaction, applied)
    }

    fn request_since(&mut self, schema: &DatabaseSchema) -> Step {
        let columns = match self.resolve(schema) {
            Ok(columns) => columns,
            Err(reason) => return self.refused(&reason),
        };
        if columns != self.columns {
            // Changes could not be told from the difference between two sets of columns.
            self.last_transaction = Uuid::nil();
            self.columns = columns;
        }
        self.phase = Phase::AwaitingSince;
        request(
            "monitor_cond_since",
            &(
                &self.database,
                self.key,
                self.monitor_requests(),
                self.last_transaction,
            ),
        )
    }

    fn monitor_requests(&self) -> BTreeMap<&'static str, [MonitorRequest<'_>; 1]> {
        self.tables
            .iter()
            .zip(&self.columns)
            .map(|(table, columns)| {
                let request = MonitorRequest {
                    columns: columns.iter().map(|(name, _)| *name).collect(),
                    r#where: &table.conditions,
                };
                (table.name, [request])
            })
            .collect()
    }

    /// The server is followed from here on.
    fn resynced(
        &mut self,
        changes_only: bool,
        transaction: Uuid,
        updates: TableUpdates,
    ) -> Result<Step, String> {
        let applied = if changes_only {
            self.writer
                .apply(&self.columns, updates, transaction, Origin::Resync)
        } else {
            self.writer.replace(&self.columns, updates, transaction)
        };
        self.accept(transaction, applied)?;
        self.phase = Phase::Live;
        self.writer.followed();
        Ok(Step::Live)
    }

    fn accept(&mut self, transaction: Uuid, applied: Result<(), String>) -> Result<(), String> {
        applied.map_err(|reason| format!("update of {}: {reason}", self.database))?;
        self.last_transaction = transaction;
        Ok(())
    }

    fn refused(&mut self, reason: &str) -> Step {
        self.phase = Phase::Idle;
        warn!(database = self.database, reason, "replica refused");
        self.writer.set_state(SyncState::Refused(reason.into()));
        Step::Refused
    }

    // === schema ===

    fn resolve(&self, schema: &DatabaseSchema) -> Result<Vec<Columns>, String> {
        self.tables
            .iter()
            .map(|table| {
                let found = schema.tables.get(table.name).ok_or_else(|| {
                    format!(
                        "schema {} {} has no table {}: is the server too old?",
                        schema.name, schema.version, table.name
                    )
                })?;
                table.resolve(schema, found)
            })
            .collect()
    }
}

impl MonitoredTable {
    fn resolve(&self, schema: &DatabaseSchema, found: &TableSchema) -> Result<Columns, String> {
        let mut columns = Columns::new();
        for &name in self.columns {
            match found.columns.get(name) {
                Some(column) => columns.push((name, column.clone())),
                None if self.optional_columns.contains(&name) => {}
                None => {
                    return Err(format!(
                        "table {} of schema {} {} has no column {name}: is the server too old? \
                         A column that may be missing belongs in Table::OPTIONAL_COLUMNS",
                        self.name, schema.name, schema.version
                    ));
                }
            }
        }
        Ok(columns)
    }
}

fn request<P: Serialize>(method: &'static str, params: &P) -> Step {
    match serde_json::value::to_raw_value(params) {
        Ok(params) => Step::Request { method, params },
        Err(error) => {
            warn!(method, %error, "request has no JSON form");
            Step::Refused
        }
    }
}

fn read<'a, T: serde::Deserialize<'a>>(method: &str, result: &'a RawValue) -> Result<T, String> {
    serde_json::from_str(result.get()).map_err(|error| format!("answer to {method}: {error}"))
}
