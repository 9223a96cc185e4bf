//! The processes of one seed: a coordinator, workers, and a proxy in each direction between them.

use crate::object_store::ObjectStore;
use crate::proxy::{Link, Proxy};
use crate::script::{Script, WORKERS};
use processes_tests::{Finished, Running, Tool, fixture, free_port};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tempfile::TempDir;

/// Shorter than the defaults of 10 and 8, so that a suite of many runs does not mostly wait.
const LEASE_SECONDS: &str = "3";
const STALL_SECONDS: &str = "3";
/// Longest that a process may take to end once told.
const END_DEADLINE: Duration = Duration::from_secs(40);
/// A worker's way of asking to be started anew: EX_SOFTWARE.
const RESTART: i32 = 70;

/// Where a process of ours stands.
enum Process {
    Running(Running),
    /// A fault has ended it and will start it again.
    Down,
}

struct Worker {
    id: String,
    port: u16,
    process: Mutex<Process>,
    /// The way of its registration.
    to_coordinator: Proxy,
    /// The way of the coordinator's orders.
    to_worker: Proxy,
}

pub(crate) struct Cluster {
    folder: TempDir,
    /// Where checkpoints and the result go, if not into the folder.
    store: Option<ObjectStore>,
    default_patience: bool,
    address: String,
    coordinator: Mutex<Process>,
    workers: Vec<Worker>,
    /// Name and end of every process that has ended.
    ended: Mutex<Vec<(String, Finished)>>,
    complaints: Mutex<Vec<String>>,
}

/// How a process should have ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Expected {
    Code(i32),
    Killed,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Cluster {
    /// # Errors
    /// When a folder, a port or a process is not to be had.
    pub(crate) async fn start(script: &Script) -> std::io::Result<Arc<Self>> {
        let folder = tempfile::tempdir()?;
        let address = format!("127.0.0.1:{}", free_port());
        let mut workers = Vec::new();
        for index in 0..WORKERS {
            let port = free_port();
            workers.push(Worker {
                id: format!("w{index}"),
                port,
                process: Mutex::new(Process::Down),
                to_coordinator: Proxy::start(address.clone()).await?,
                to_worker: Proxy::start(format!("127.0.0.1:{port}")).await?,
            });
        }
        let store = if script.in_object_store { Some(ObjectStore::start().await?) } else { None };
        let cluster = Arc::new(Self {
            folder,
            store,
            default_patience: script.default_patience,
            address,
            coordinator: Mutex::new(Process::Down),
            workers,
            ended: Mutex::default(),
            complaints: Mutex::default(),
        });
        cluster.start_coordinator();
        (0..WORKERS).for_each(|index| cluster.start_worker(index));
        Ok(cluster)
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Path or URL of the exported model.
    pub(crate) fn out(&self) -> String {
        match &self.store {
            Some(store) => format!("{}/out", store.url()),
            None => self.root().join("out").to_string_lossy().into_owned(),
        }
    }

    pub(crate) fn set_store_link(&self, link: Link) {
        if let Some(store) = &self.store {
            store.set(link);
        }
    }

    /// What both kinds of process need to reach the object store.
    fn with_store(&self, tool: Tool) -> Tool {
        let Some(store) = &self.store else { return tool };
        let tool = tool.flag("--root", store.url());
        store.variables().into_iter().fold(tool, |tool, (name, value)| tool.env(name, value))
    }

    fn root(&self) -> &Path {
        self.folder.path()
    }

    pub(crate) fn complain(&self, complaint: String) {
        lock(&self.complaints).push(complaint);
    }

    pub(crate) fn take_complaints(&self) -> Vec<String> {
        std::mem::take(&mut lock(&self.complaints))
    }

    pub(crate) fn start_coordinator(&self) {
        let mut tool = Tool::new("coordinator")
            .flag("--listen", &self.address)
            .flag("--root", self.root())
            .flag("--root", fixture("."))
            .flag("--data-dir", self.root().join("state"));
        if !self.default_patience {
            tool = tool.flag("--lease-seconds", LEASE_SECONDS).flag("--stall-seconds", STALL_SECONDS);
        }
        if let Some(store) = &self.store {
            tool = tool.flag("--checkpoint-dir", format!("{}/checkpoints", store.url()));
        }
        *lock(&self.coordinator) = Process::Running(self.with_store(tool).start());
    }

    pub(crate) fn start_worker(&self, index: usize) {
        let worker = &self.workers[index];
        let tool = Tool::new("worker")
            .flag("--listen", format!("127.0.0.1:{}", worker.port))
            .flag("--coordinator", worker.to_coordinator.url())
            .flag("--advertise", worker.to_worker.url())
            .flag("--id", &worker.id)
            .flag("--threads", "1")
            .flag("--root", self.root())
            .flag("--root", fixture("."));
        *lock(&worker.process) = Process::Running(self.with_store(tool).start());
    }

    pub(crate) fn set_links(&self, index: usize, link: Link) {
        self.workers[index].to_coordinator.set(link);
        self.workers[index].to_worker.set(link);
    }

    /// Absent when it is down.
    pub(crate) fn worker_process(&self, index: usize) -> Option<u32> {
        id_of(&self.workers[index].process)
    }

    /// Absent when it is down.
    pub(crate) fn coordinator_process(&self) -> Option<u32> {
        id_of(&self.coordinator)
    }

    /// Kills it and waits for its end. False when it is down already.
    pub(crate) async fn kill_worker(self: &Arc<Self>, index: usize) -> bool {
        let worker = &self.workers[index];
        self.end(&worker.id, take(&worker.process), libc::SIGKILL, Expected::Killed).await
    }

    pub(crate) async fn kill_coordinator(self: &Arc<Self>) -> bool {
        self.end("coordinator", take(&self.coordinator), libc::SIGKILL, Expected::Killed).await
    }

    /// Tells it to end, and waits for that. False when it is down already.
    pub(crate) async fn stop_worker(self: &Arc<Self>, index: usize) -> bool {
        let worker = &self.workers[index];
        self.end(&worker.id, take(&worker.process), libc::SIGTERM, Expected::Code(0)).await
    }

    pub(crate) async fn stop_coordinator(self: &Arc<Self>) -> bool {
        self.end("coordinator", take(&self.coordinator), libc::SIGTERM, Expected::Code(0)).await
    }

    /// Starts workers again that asked for it by ending, as Kubernetes would, and says whether another process has ended by
    /// itself.
    pub(crate) async fn supervise(self: &Arc<Self>) -> bool {
        let gone = |process: &Mutex<Process>| id_of(process).is_some_and(|id| !is_alive(id));
        for (index, worker) in self.workers.iter().enumerate() {
            if gone(&worker.process)
                && self.end(&worker.id, take(&worker.process), 0, Expected::Code(RESTART)).await
            {
                self.start_worker(index);
            }
        }
        if gone(&self.coordinator) {
            self.end("coordinator", take(&self.coordinator), 0, Expected::Code(0)).await;
            self.complain("the coordinator ended by itself".to_owned());
            return true;
        }
        false
    }

    /// Tells all to end, the workers first, and complains of whatever does not.
    pub(crate) async fn stop_all(self: &Arc<Self>) {
        let workers = (0..WORKERS).map(|index| {
            let cluster = self.clone();
            tokio::spawn(async move { cluster.stop_worker(index).await })
        });
        for stopping in workers.collect::<Vec<_>>() {
            if let Err(error) = stopping.await {
                self.complain(format!("a worker was not stopped: {error}"));
            }
        }
        self.stop_coordinator().await;
    }

    /// The last lines that each process has written, in the order of their ends.
    pub(crate) fn logs(&self, lines: usize) -> String {
        let mut text = String::new();
        for (name, finished) in lock(&self.ended).iter() {
            let all: Vec<&str> = finished.stdout.lines().chain(finished.stderr.lines()).collect();
            text.push_str(&format!("--- {name}, ended with {:?}\n", finished.code));
            for line in &all[all.len().saturating_sub(lines)..] {
                text.push_str(line);
                text.push('\n');
            }
        }
        text
    }

    async fn end(
        self: &Arc<Self>,
        name: &str,
        running: Option<Running>,
        signal: i32,
        expected: Expected,
    ) -> bool {
        let Some(running) = running else { return false };
        let finishing = tokio::task::spawn_blocking(move || {
            if signal != 0 {
                running.signal(signal);
            }
            running.finish(END_DEADLINE)
        });
        let finished = match finishing.await {
            Ok(finished) => finished,
            Err(error) => {
                self.complain(format!("{name} was lost: {error}"));
                return true;
            }
        };
        let as_expected = match expected {
            Expected::Code(code) => {
                // Told to end in its first moments, before it listens for signals, it ends by that one.
                let unborn = signal != 0 && finished.stdout.is_empty() && finished.stderr.is_empty();
                finished.code == Some(code) || finished.code.is_none() && unborn
            }
            // It may have come to its end just before.
            Expected::Killed => finished.code.is_none() || finished.code == Some(RESTART),
        };
        if !finished.in_time {
            self.complain(format!("{name} did not end within {END_DEADLINE:?}"));
        } else if !as_expected {
            self.complain(format!("{name} ended with {:?}, not as {expected:?}", finished.code));
        }
        if finished.left_running > 0 {
            self.complain(format!("{name} left {} processes running", finished.left_running));
        }
        if finished.stderr.contains("panicked at") {
            self.complain(format!("{name} panicked"));
        }
        lock(&self.ended).push((name.to_owned(), finished));
        true
    }
}

fn take(process: &Mutex<Process>) -> Option<Running> {
    match std::mem::replace(&mut *lock(process), Process::Down) {
        Process::Running(running) => Some(running),
        Process::Down => None,
    }
}

fn id_of(process: &Mutex<Process>) -> Option<u32> {
    match &*lock(process) {
        Process::Running(running) => Some(running.id()),
        Process::Down => None,
    }
}

/// Whether a child of ours runs, and is not only waited for.
fn is_alive(id: u32) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{id}/stat")).unwrap_or_default();
    // The state follows the name, which ends with the last parenthesis.
    status.rsplit(')').next().is_some_and(|rest| !rest.trim_start().starts_with('Z') && !rest.is_empty())
}
