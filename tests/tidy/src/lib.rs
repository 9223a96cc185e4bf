//! What the checks of `tests/tidy` read: the repository's files, its packages, its documents and their commands.
//!
//! A check that cannot read what it needs panics: that is a failed test.

pub mod api;
pub mod documents;
pub mod packages;
pub mod shell;
pub mod telemetry;

use std::path::{Path, PathBuf};

/// Folders that hold what was built, fetched or made, not what we wrote.
const NOT_OURS: [&str; 8] =
    [".git", "target", ".libtorch", ".cache", "out", "__pycache__", ".pytest_cache", ".venv"];

/// The root of the repository.
#[must_use]
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../..")
        .canonicalize()
        .expect("the package lies in tests/tidy")
}

/// The text of a file, by its path from the root.
#[must_use]
pub fn read(path: impl AsRef<Path>) -> String {
    let path = root().join(path);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Our files below a folder that end in one of `extensions`, as sorted paths from the root.
#[must_use]
pub fn files(folder: &str, extensions: &[&str]) -> Vec<PathBuf> {
    let root = root();
    let mut found = Vec::new();
    let mut folders = vec![root.join(folder)];
    while let Some(folder) = folders.pop() {
        let entries = folder.read_dir().unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
        for entry in entries {
            let entry = entry.expect("an entry of a folder of ours");
            let (path, name) = (entry.path(), entry.file_name().to_string_lossy().into_owned());
            let kind = entry.file_type().expect("the kind of a file of ours");
            if kind.is_dir() && !NOT_OURS.contains(&name.as_str()) {
                folders.push(path);
            } else if kind.is_file() && extensions.iter().any(|extension| name.ends_with(extension)) {
                found.push(path.strip_prefix(&root).expect("below the root").to_owned());
            }
        }
    }
    found.sort();
    found
}

/// Panics with all of `problems`, one a line, unless there are none.
pub fn report(what: &str, problems: &[String]) {
    assert!(problems.is_empty(), "{what}:\n  {}", problems.join("\n  "));
}
