#![doc = include_str!("../README.md")]

mod client;
mod endpoint;
mod error;
mod monitor;
mod replica;
mod schema;
mod table;
mod transaction;
mod value;
mod wire;

pub use client::{Client, ClientOptions, ConnectionState, Lock, LockState};
pub use endpoint::{Endpoint, Endpoints};
pub use error::{Cause, Error, ErrorKind, TransactionError};
pub use replica::{
    Change, ChangeSet, ChangeStream, Event, Index, IndexKey, Malformed, Origin, Replica,
    ReplicaBuilder, Snapshot, SyncState, TypedChange,
};
pub use schema::{AtomicType, ColumnSchema, DatabaseSchema, TableSchema};
pub use table::Table;
pub use transaction::{
    Condition, CountOp, Function, InsertOp, Mutation, Mutator, SelectOp, Transaction,
    TransactionReply, WaitOp, Where,
};
pub use value::{Atom, AtomMap, AtomSet, Datum, Row};
pub use wire::{FrameDecoder, FrameError};

/// What the [`table!`] macro expands to needs these paths; not part of the API.
#[doc(hidden)]
pub mod __private {
    pub use serde;

    pub use crate::table::column_name;
}
