//! A run's events as JSON lines on disk.

use pruning_run::RunEvent;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// The file that a run's events are appended to, one a line, each whole before the next.
#[derive(Debug)]
pub(crate) struct Journal {
    path: PathBuf,
    file: File,
}

/// Why an event was not written down.
#[derive(Debug, thiserror::Error)]
pub(crate) enum JournalError {
    #[error("failed to open the event log `{path}`")]
    Open {
        path: PathBuf,
        #[source]
        cause: io::Error,
    },
    #[error("failed to write to the event log `{path}`")]
    Write {
        path: PathBuf,
        #[source]
        cause: io::Error,
    },
}

impl Journal {
    /// Opens `data_dir/runs/<run_id>/events.jsonl`.
    pub(crate) fn open(data_dir: &Path, run_id: &str) -> Result<Self, JournalError> {
        let folder = data_dir.join("runs").join(run_id);
        let path = folder.join("events.jsonl");
        let opened = std::fs::create_dir_all(&folder)
            .and_then(|()| OpenOptions::new().create(true).append(true).open(&path));
        match opened {
            Ok(file) => Ok(Self { path, file }),
            Err(cause) => Err(JournalError::Open { path, cause }),
        }
    }

    /// Appends one event. A line is at most a few megabytes and goes to the page cache, so this hardly blocks.
    pub(crate) fn append(&mut self, event: &RunEvent) -> Result<(), JournalError> {
        let write = |cause| JournalError::Write { path: self.path.clone(), cause };
        let mut line = serde_json::to_vec(event).map_err(|error| write(error.into()))?;
        line.push(b'\n');
        (&self.file).write_all(&line).map_err(write)
    }
}
