//! The real binaries, started and judged from outside: exit code, words, time, and what they leave running.
//!
//! The binaries are those beside the test executable: `cargo build --workspace --bins` makes them, as `make test` does.

mod broken;
mod command;
mod services;

pub use broken::{broken_model, copy_model, damaged, parquet_file, with_config};
pub use command::{Finished, Running, Tool};
pub use services::{Coordinator, WorkerProcess, free_port};

use std::path::{Path, PathBuf};

/// One of our binaries.
///
/// # Panics
/// When it has not been built.
#[must_use]
pub fn binary(name: &str) -> PathBuf {
    let own = std::env::current_exe().expect("the test executable has a path");
    // target/<profile>/deps/<test>-<hash>
    let path = own.parent().and_then(Path::parent).expect("tests lie in target/<profile>/deps").join(name);
    assert!(path.is_file(), "`{}` is missing: run `cargo build --workspace --bins` first", path.display());
    path
}

/// A file or folder of `tests/fixtures`.
///
/// # Panics
/// When it is not there.
#[must_use]
pub fn fixture(name: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures").join(name);
    path.canonicalize().unwrap_or_else(|error| panic!("`{}`: {error}", path.display()))
}
