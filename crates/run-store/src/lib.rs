//! The coordinator's durable record: runs, their events, decisions, checkpoints and the audit, in SQLite or PostgreSQL.
//!
//! What is stored is opaque here: the coordinator encodes it. Whatever a call has returned `Ok` for is there after any
//! crash. A store belongs to whoever opened it last: each opening raises its epoch, and writes of an earlier opener are
//! refused, so that two coordinators never drive the same run.

mod error;
mod schema;
mod store;
mod store_url;

pub use error::StoreError;
pub use store::{
    AuditEntry, Created, NewRun, RunStore, StoreOptions, StoredCheckpoint, StoredDecision, StoredPayload,
    StoredRunRow,
};
pub use store_url::{InvalidStoreUrl, StoreUrl};
