//! Values read from files that others swap: certificates, keys, tokens.

use crate::status::chain;
use std::error::Error;
use std::fmt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tracing::{info, warn};

/// Pause between two tries to read files that are broken.
const RETRY: Duration = Duration::from_secs(5);

type Read<T> = dyn Fn() -> Result<T, Box<dyn Error + Send + Sync>> + Send + Sync;

/// What files hold, read anew at the first use after they changed. A change that cannot be read is warned of and leaves
/// the last good value in force, so that half a rotation closes no door.
pub struct Reloading<T> {
    paths: Vec<PathBuf>,
    read: Box<Read<T>>,
    state: Mutex<State<T>>,
}

struct State<T> {
    /// Of the files, before the last reading.
    stamps: Vec<Option<Stamp>>,
    /// When the last reading failed.
    failed: Option<Instant>,
    value: Arc<T>,
}

/// What changes when a file is written or swapped, links followed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stamp {
    device: u64,
    inode: u64,
    bytes: u64,
    modified: (i64, i64),
}

impl<T> Reloading<T> {
    /// Reads for the first time.
    ///
    /// # Errors
    /// When the files cannot be read now.
    pub fn new<E: Error + Send + Sync + 'static>(
        paths: Vec<PathBuf>,
        read: impl Fn() -> Result<T, E> + Send + Sync + 'static,
    ) -> Result<Self, E> {
        let stamps = stamps(&paths);
        let value = Arc::new(read()?);
        let state = Mutex::new(State { stamps, failed: None, value });
        Ok(Self { paths, read: Box::new(move || read().map_err(Into::into)), state })
    }

    /// The value of the files as they are, else the last good one. Looks at the files, which are small and local.
    pub fn current(&self) -> Arc<T> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let now = stamps(&self.paths);
        let retry = state.failed.is_some_and(|failed| failed.elapsed() >= RETRY);
        if now == state.stamps && !retry {
            return state.value.clone();
        }
        state.stamps = now;
        match (self.read)() {
            Ok(value) => {
                info!(files = ?self.paths, "files changed and were read anew");
                state.value = Arc::new(value);
                state.failed = None;
            }
            Err(error) => {
                let error = chain(&*error);
                warn!(files = ?self.paths, error, "changed files cannot be used; what they held before stays in force");
                state.failed = Some(Instant::now());
            }
        }
        state.value.clone()
    }
}

/// Names the files alone: the value may be secret.
impl<T> fmt::Debug for Reloading<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Reloading").field(&self.paths).finish()
    }
}

fn stamps(paths: &[PathBuf]) -> Vec<Option<Stamp>> {
    paths.iter().map(|path| stamp(path)).collect()
}

fn stamp(path: &Path) -> Option<Stamp> {
    let metadata = path.metadata().ok()?;
    Some(Stamp {
        device: metadata.dev(),
        inode: metadata.ino(),
        bytes: metadata.size(),
        modified: (metadata.mtime(), metadata.mtime_nsec()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::symlink;

    #[test]
    fn a_swapped_link_is_followed_and_a_broken_file_changes_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        for (name, text) in [("one", "1"), ("two", "2"), ("bad", "x")] {
            fs::write(at(name), text).unwrap();
        }
        let link = |name: &str| {
            symlink(at(name), at("new")).unwrap();
            fs::rename(at("new"), at("link")).unwrap();
        };
        link("one");
        let path = at("link");
        let number = Reloading::new(vec![path.clone()], move || {
            fs::read_to_string(&path)
                .map_err(|error| error.to_string())
                .and_then(|text| text.parse::<u32>().map_err(|error| error.to_string()))
                .map_err(std::io::Error::other)
        })
        .unwrap();
        for (name, expected) in [("one", 1), ("two", 2), ("bad", 2), ("gone", 2), ("one", 1)] {
            link(name);
            assert_eq!(*number.current(), expected, "{name}");
        }
    }
}
