//! Runs on the real binaries that are killed, frozen, cut off and starved at seeded points, and a checker of what they
//! have left: nothing acknowledged is lost, and the result is that of a run that nobody disturbed.
//!
//! The binaries are those beside the test executable: `cargo build --workspace --bins` makes them, as `make test` does.

mod cluster;
mod figures;
mod history;
mod object_store;
mod proxy;
mod random;
mod script;
mod seed;
mod stuck;
mod watcher;

pub use figures::Figures;
pub use history::Outcome;
pub use script::Script;
pub use seed::{Failure, Report, play, undisturbed};
