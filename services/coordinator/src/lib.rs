//! The coordinator: admits workers, drives runs, decides one global mask and broadcasts it. It holds no tensor.
//!
//! ```text
//! rpc ─▶ admission ─▶ run_book ◀─ driver ─▶ calls ─▶ workers
//!                         ▲         │  └───▶ stores ─▶ run store, blob store
//!                      resume       pruning_run::transition
//! ```

mod admission;
mod audit_log;
mod calls;
mod config;
mod context;
mod deadlines;
mod driver;
mod exported;
mod messages;
mod metrics;
mod one_worker;
mod records;
mod registry;
mod resume;
mod rpc;
mod run_book;
mod run_filter;
mod serve;
mod stores;
mod sync;
mod watch;

pub use config::CoordinatorConfig;
pub use serve::serve;
