//! One process with a deadline, and a search for what it left running.

use std::ffi::OsString;
use std::io::Read;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Every process that a test starts, and all that those start, carry this variable with a value of the test's own.
const MARK: &str = "PROCESSES_TEST_MARK";
const POLL: Duration = Duration::from_millis(20);
/// How long children may take to notice that they are alone.
const ORPHAN_GRACE: Duration = Duration::from_secs(10);

/// A command line about to be run.
pub struct Tool {
    binary: PathBuf,
    arguments: Vec<OsString>,
    environment: Vec<(OsString, OsString)>,
    mark: String,
}

impl Tool {
    /// One of our binaries, in a clean environment.
    #[must_use]
    pub fn new(name: &str) -> Self {
        Self {
            binary: crate::binary(name),
            arguments: Vec::new(),
            environment: Vec::new(),
            mark: uuid::Uuid::new_v4().to_string(),
        }
    }

    /// `espalier` with words separated by spaces.
    #[must_use]
    pub fn espalier(words: &str) -> Self {
        Self::new("espalier").args(words.split_whitespace())
    }

    #[must_use]
    pub fn args<A: Into<OsString>>(mut self, arguments: impl IntoIterator<Item = A>) -> Self {
        self.arguments.extend(arguments.into_iter().map(Into::into));
        self
    }

    /// A flag and its value.
    #[must_use]
    pub fn flag(self, name: &str, value: impl Into<OsString>) -> Self {
        self.args([OsString::from(name), value.into()])
    }

    #[must_use]
    pub fn env(mut self, name: &str, value: impl Into<OsString>) -> Self {
        self.environment.push((name.into(), value.into()));
        self
    }

    /// Starts it.
    ///
    /// # Panics
    /// When it cannot be started.
    #[must_use]
    pub fn start(self) -> Running {
        let mut command = Command::new(&self.binary);
        command.args(&self.arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        for (name, _) in
            std::env::vars_os().filter(|(name, _)| name.as_encoded_bytes().starts_with(b"ESPALIER_"))
        {
            command.env_remove(name);
        }
        command.env_remove("RUST_LOG").env(MARK, &self.mark).envs(self.environment);
        let mut child = command.spawn().unwrap_or_else(|error| panic!("{}: {error}", self.binary.display()));
        let stdout = collect(child.stdout.take());
        let stderr = collect(child.stderr.take());
        Running { child, mark: self.mark, started: Instant::now(), stdout, stderr }
    }

    /// Runs it to its end, or kills it after `deadline`.
    #[must_use]
    pub fn run(self, deadline: Duration) -> Finished {
        self.start().finish(deadline)
    }
}

fn collect(pipe: Option<impl Read + Send + 'static>) -> JoinHandle<String> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut pipe) = pipe {
            // A broken pipe ends the text; what came before it counts.
            let _ = pipe.read_to_end(&mut bytes);
        }
        String::from_utf8_lossy(&bytes).into_owned()
    })
}

/// A process of a test, killed when dropped.
pub struct Running {
    child: Child,
    mark: String,
    started: Instant,
    stdout: JoinHandle<String>,
    stderr: JoinHandle<String>,
}

impl Running {
    #[must_use]
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Sends a signal.
    pub fn signal(&self, signal: i32) {
        let id = i32::try_from(self.child.id()).expect("process ids fit");
        // SAFETY: `kill` only sends a signal, to a child that has not been waited for.
        unsafe { libc::kill(id, signal) };
    }

    /// Ids of living processes that this one started, directly or not.
    #[must_use]
    pub fn descendants(&self) -> Vec<u32> {
        marked(&self.mark).into_iter().filter(|id| *id != self.child.id()).collect()
    }

    /// Waits until `ready` gives something, at most until `deadline` has passed or the process has ended.
    pub fn wait_for<T>(&mut self, deadline: Duration, mut ready: impl FnMut() -> Option<T>) -> Option<T> {
        let end = Instant::now() + deadline;
        loop {
            if let Some(value) = ready() {
                return Some(value);
            }
            if Instant::now() >= end || self.child.try_wait().ok().flatten().is_some() {
                return None;
            }
            std::thread::sleep(POLL);
        }
    }

    /// Waits for the end, at most for `deadline` from now; then it is killed.
    ///
    /// # Panics
    /// When the operating system loses the process.
    #[must_use]
    pub fn finish(mut self, deadline: Duration) -> Finished {
        let end = Instant::now() + deadline;
        let mut in_time = true;
        let status = loop {
            if let Some(status) = self.child.try_wait().expect("a child can be waited for") {
                break status;
            }
            if Instant::now() >= end {
                in_time = false;
                let _ = self.child.kill();
            }
            std::thread::sleep(POLL);
        };
        let took = self.started.elapsed();
        let orphan_end = Instant::now() + ORPHAN_GRACE;
        while !marked(&self.mark).is_empty() && Instant::now() < orphan_end {
            std::thread::sleep(POLL);
        }
        let left_running = marked(&self.mark);
        for id in &left_running {
            // SAFETY: `kill` only sends a signal; the id was read a moment ago and carries this test's mark.
            unsafe { libc::kill(i32::try_from(*id).expect("process ids fit"), libc::SIGKILL) };
        }
        let text = |reader: &mut JoinHandle<String>| {
            std::mem::replace(reader, std::thread::spawn(String::new)).join().unwrap_or_default()
        };
        Finished {
            code: status.code(),
            in_time,
            took,
            stdout: text(&mut self.stdout),
            stderr: text(&mut self.stderr),
            left_running: left_running.len(),
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What a process did.
#[derive(Debug)]
pub struct Finished {
    /// Exit code; absent when a signal ended it.
    pub code: Option<i32>,
    /// Whether it ended by itself before its deadline.
    pub in_time: bool,
    pub took: Duration,
    pub stdout: String,
    pub stderr: String,
    /// Processes that it started and that lived on after it.
    pub left_running: usize,
}

impl Finished {
    /// What is wrong with how it ended; nothing when all is as it should be.
    #[must_use]
    pub fn complaints(&self, code: i32, words: &[&str]) -> Vec<String> {
        let mut complaints = Vec::new();
        if !self.in_time {
            complaints.push(format!("was not done after {:?}", self.took));
        }
        if self.code != Some(code) {
            complaints.push(format!("ended with {:?} instead of {code}", self.code));
        }
        for word in words.iter().filter(|word| !self.stderr.contains(**word)) {
            complaints.push(format!("says nothing of {word:?}"));
        }
        if self.left_running > 0 {
            complaints.push(format!("left {} processes running", self.left_running));
        }
        if self.stderr.contains("panicked at") {
            complaints.push("panicked".to_owned());
        }
        if !complaints.is_empty() {
            complaints.push(format!("its words:\n{}\n{}", self.stdout, self.stderr));
        }
        complaints
    }

    /// # Panics
    /// When it did not end with code 0 and leave nothing running.
    pub fn expect_success(self) -> Self {
        let complaints = self.complaints(0, &[]);
        assert!(complaints.is_empty(), "{}", complaints.join("; "));
        self
    }
}

/// Living processes whose environment carries the mark; a process that cannot be read is not ours.
fn marked(mark: &str) -> Vec<u32> {
    let needle = format!("{MARK}={mark}");
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    entries
        .filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok())
        .filter(|id| {
            let environment = std::fs::read(format!("/proc/{id}/environ")).unwrap_or_default();
            environment.split(|byte| *byte == 0).any(|variable| variable == needle.as_bytes())
                && !is_zombie(*id)
        })
        .collect()
}

fn is_zombie(id: u32) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{id}/stat")).unwrap_or_default();
    // The state follows the name, which ends with the last parenthesis.
    status.rsplit(')').next().is_none_or(|rest| rest.trim_start().starts_with('Z'))
}
