//! The coordinator: admits workers, drives runs, decides one global mask and broadcasts it. It holds no tensor.
//!
//! ```text
//! rpc ─▶ admission ─▶ run_book ◀─ driver ─▶ calls ─▶ workers
//!                                   │
//!                        pruning_run::transition
//! ```

mod admission;
mod calls;
mod config;
mod context;
mod deadlines;
mod driver;
mod journal;
mod messages;
mod one_worker;
mod registry;
mod rpc;
mod run_book;
mod serve;
mod sync;
mod watch;

pub use config::CoordinatorConfig;
pub use serve::serve;
