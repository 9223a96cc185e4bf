//! What the fuzz targets share: a place for files, and the panics that a crate catches itself.

use std::fs;
use std::panic;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// A folder for the files of one process, in memory where the system has such a place.
#[derive(Debug)]
pub struct Folder(TempDir);

impl Folder {
    /// # Panics
    /// When no folder can be made.
    #[must_use]
    pub fn new() -> Self {
        let memory = Path::new("/dev/shm");
        let made = if memory.is_dir() { TempDir::new_in(memory) } else { TempDir::new() };
        Self(made.expect("a folder for temporary files can be made"))
    }

    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Writes a file anew.
    ///
    /// # Panics
    /// When the file cannot be written.
    pub fn write(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.path(name);
        fs::write(&path, bytes).expect("a temporary file can be written");
        path
    }

    #[must_use]
    pub fn root(&self) -> &Path {
        self.0.path()
    }
}

impl Default for Folder {
    fn default() -> Self {
        Self::new()
    }
}

/// Lets panics unwind in silence: what the crate under test catches is no finding. One that it does not catch still ends
/// the process, since the fuzzer's own frame aborts on it, and is then shown by running the input in a test.
pub fn allow_caught_panics() {
    panic::set_hook(Box::new(|_| {}));
}
