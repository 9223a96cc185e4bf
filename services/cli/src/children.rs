//! Worker processes of our own, which never outlive us.

use anyhow::Context;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;
use tokio::process::{Child, Command};
use tokio::time::timeout;

/// Names another worker binary than the one beside ours.
const WORKER_BIN: &str = "ESPALIER_WORKER_BIN";
/// How long a worker may take to end after SIGTERM.
const STOP_DEADLINE: Duration = Duration::from_secs(10);
const TAIL_BYTES: u64 = 16 << 10;

/// The worker binary: `$ESPALIER_WORKER_BIN`, else `worker` beside our own executable.
///
/// # Errors
/// When there is none, with where it was looked for and what to do.
pub(crate) fn worker_binary() -> anyhow::Result<PathBuf> {
    if let Some(path) = std::env::var_os(WORKER_BIN).map(PathBuf::from) {
        anyhow::ensure!(path.is_file(), "{WORKER_BIN} names `{}`, which is not a file", path.display());
        return Ok(path);
    }
    let own = std::env::current_exe().context("failed to find our own executable")?;
    let beside = own.with_file_name("worker");
    anyhow::ensure!(
        beside.is_file(),
        "there is no worker binary at `{}`: build it (cargo build -p worker), or name one in {WORKER_BIN}",
        beside.display()
    );
    Ok(beside)
}

/// A worker process with its log file. Killed when dropped.
#[derive(Debug)]
pub(crate) struct Worker {
    pub id: String,
    pub log: PathBuf,
    child: Child,
}

impl Worker {
    /// Starts `command` with both outputs in the file `log`.
    ///
    /// Call it on the main thread: the kernel's "end with the parent" follows the thread that started the process.
    ///
    /// # Errors
    /// When the log cannot be created or the process not started.
    pub(crate) fn start(id: String, mut command: Command, log: PathBuf) -> anyhow::Result<Self> {
        let file =
            std::fs::File::create(&log).with_context(|| format!("failed to create `{}`", log.display()))?;
        let same = file.try_clone().with_context(|| format!("failed to share `{}`", log.display()))?;
        let child = command
            .stdin(Stdio::null())
            .stdout(file)
            .stderr(same)
            // Ctrl-C in a terminal goes to its whole process group: the workers must hear of it from us.
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .with_context(|| {
                format!("failed to start `{}`", command.as_std().get_program().to_string_lossy())
            })?;
        Ok(Self { id, log, child })
    }

    /// How the process ended, if it has.
    pub(crate) fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().ok().flatten()
    }

    /// Asks the process to end, and ends it when it does not.
    pub(crate) async fn stop(&mut self) {
        if self.ended().is_some() {
            return;
        }
        if let Some(pid) = self.child.id().and_then(|pid| i32::try_from(pid).ok()) {
            // SAFETY: `kill` only sends a signal; the process is ours and not yet waited for, so its id is not reused.
            unsafe { libc::kill(pid, libc::SIGTERM) };
        }
        if timeout(STOP_DEADLINE, self.child.wait()).await.is_err() {
            self.kill().await;
        }
    }

    /// Ends the process at once.
    pub(crate) async fn kill(&mut self) {
        // It fails only for a process that has ended.
        let _ = self.child.kill().await;
    }
}

/// The last `lines` lines of a log, indented below its name; empty when there are none.
#[must_use]
pub(crate) fn log_tail(log: &Path, lines: usize) -> String {
    quoted_tail(log, lines, |_| true)
}

/// As [`log_tail`], of warnings and errors alone.
#[must_use]
pub(crate) fn log_warnings(log: &Path, lines: usize) -> String {
    quoted_tail(log, lines, |line| line.contains(" WARN ") || line.contains("ERROR "))
}

fn quoted_tail(log: &Path, lines: usize, keep: impl Fn(&str) -> bool) -> String {
    let text = read_tail(log).unwrap_or_default();
    let all: Vec<&str> = text.lines().filter(|line| keep(line)).collect();
    let last = &all[all.len().saturating_sub(lines)..];
    if last.is_empty() {
        return String::new();
    }
    let quoted: Vec<String> = last.iter().map(|line| format!("  | {line}")).collect();
    format!("the end of {}:\n{}", log.display(), quoted.join("\n"))
}

fn read_tail(log: &Path) -> std::io::Result<String> {
    let mut file = std::fs::File::open(log)?;
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(TAIL_BYTES)))?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_is_quoted_from_its_end() {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("x.log");
        assert_eq!(log_tail(&log, 3), "");
        std::fs::write(&log, "a\nb\nc\nd\n").unwrap();
        assert!(log_tail(&log, 2).ends_with("x.log:\n  | c\n  | d"));
        std::fs::write(&log, "1 INFO a\n2 WARN b\n3 INFO c\n").unwrap();
        assert!(log_warnings(&log, 9).ends_with("x.log:\n  | 2 WARN b"));
    }

    #[tokio::test]
    async fn a_child_that_will_not_end_is_killed() {
        let folder = tempfile::tempdir().unwrap();
        let mut command = Command::new("sleep");
        command.arg("600");
        let mut worker = Worker::start("w".into(), command, folder.path().join("w.log")).unwrap();
        assert!(worker.ended().is_none());
        worker.kill().await;
        assert!(worker.ended().is_some());
    }

    #[tokio::test]
    async fn a_child_ends_when_asked() {
        let folder = tempfile::tempdir().unwrap();
        let mut command = Command::new("sleep");
        command.arg("600");
        let mut worker = Worker::start("w".into(), command, folder.path().join("w.log")).unwrap();
        worker.stop().await;
        assert!(worker.ended().is_some());
    }
}
