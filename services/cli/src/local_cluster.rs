//! A coordinator in this process and workers as children: the same services over the same gRPC as on a cluster.

use crate::children::{Worker, log_tail, log_warnings, worker_binary};
use crate::failure::{Failure, OrBadInput, from_status};
use anyhow::Context;
use coordinator::CoordinatorConfig;
use service_kit::RootArgs;
use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::process::Command;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;
use wire::client::{RunClient, connected_channel, lazy_channel, registry_client, run_client, within};
use wire::{limits, pb};

/// How long workers may take to load their libraries and register.
const REGISTER_DEADLINE: Duration = Duration::from_secs(120);
/// A busy machine may keep a process from its turn for a while.
const LEASE_SECONDS: u64 = 30;
/// A step of a large model on few cores takes minutes.
const STEP_DEADLINE_SECONDS: u64 = 3600;
const POLL: Duration = Duration::from_millis(50);
const COORDINATOR_STOP_DEADLINE: Duration = Duration::from_secs(10);
const TAIL_LINES: usize = 8;
const LOOPBACK: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 0);

/// What a cluster on this machine needs to know.
#[derive(Debug, Clone)]
pub(crate) struct ClusterOptions {
    pub worker_count: u32,
    /// Compute threads of each worker; nothing: cores / workers.
    pub threads: Option<u32>,
    /// `cpu`, `cuda` or `cuda:N`.
    pub device: String,
    /// Folders that the run may read from and write to.
    pub roots: BTreeSet<PathBuf>,
    /// Where the workers' logs go.
    pub logs: PathBuf,
    /// Where the coordinator keeps its runs, and the workers their checkpoints; below a root.
    pub state: PathBuf,
}

/// Running services. Nothing of them is left after [`LocalCluster::stop`], or after a drop.
#[derive(Debug)]
pub(crate) struct LocalCluster {
    pub client: RunClient,
    url: String,
    workers: Vec<Worker>,
    coordinator: JoinHandle<anyhow::Result<()>>,
    shutdown: CancellationToken,
}

impl LocalCluster {
    /// Starts the coordinator alone: enough to check a run.
    ///
    /// # Errors
    /// When it cannot be started.
    pub(crate) async fn start(options: &ClusterOptions) -> Result<Self, Failure> {
        let shutdown = CancellationToken::new();
        let listener =
            service_kit::ListenArgs::default().bind(LOOPBACK).await.context("failed to open a local port")?;
        let url = format!("http://{}", listener.address());
        let coordinator = tokio::spawn(coordinator::serve(config(options), listener, shutdown.clone()));
        let mut cluster =
            Self { client: run_client(lazy_channel(&url)?), url, workers: Vec::new(), coordinator, shutdown };
        cluster.wait_until_it_answers().await?;
        Ok(cluster)
    }

    async fn wait_until_it_answers(&mut self) -> Result<(), Failure> {
        if let Err(error) = connected_channel(&self.url).await {
            // It has ended at once: its own words are better.
            if self.coordinator.is_finished()
                && let Ok(Err(cause)) = (&mut self.coordinator).await
            {
                return Err(cause.context("the coordinator of this command cannot start").into());
            }
            return Err(anyhow::Error::new(error)
                .context("the coordinator of this command does not answer")
                .into());
        }
        Ok(())
    }

    /// Starts the workers and waits until all have registered.
    ///
    /// # Errors
    /// When there is no worker binary, or a worker ends or does not register in time: with the end of its log.
    pub(crate) async fn start_workers(&mut self, options: &ClusterOptions) -> Result<(), Failure> {
        let binary = worker_binary().or_bad_input()?;
        for index in 0..options.worker_count {
            let id = format!("worker-{index}");
            let log = options.logs.join(format!("{id}.log"));
            let command = worker_command(&binary, index, &self.url, options);
            self.workers.push(Worker::start(id, command, log)?);
        }
        let mut registry = registry_client(lazy_channel(&self.url)?);
        let deadline = Instant::now() + REGISTER_DEADLINE;
        loop {
            if let Some(failure) = ended_worker(&mut self.workers) {
                return Err(failure);
            }
            let request = within(limits::QUICK_CALL, pb::ListWorkersRequest {});
            let listed = registry.list_workers(request).await.map_err(|status| {
                from_status("failed to ask the local coordinator for its workers", &status)
            })?;
            if listed.into_inner().workers.len() >= self.workers.len() {
                return Ok(());
            }
            if Instant::now() >= deadline {
                let message =
                    format!("the workers did not register within {} s", REGISTER_DEADLINE.as_secs());
                return Err(Failure::failed(message).with_note(&self.log_tails()));
            }
            sleep(POLL).await;
        }
    }

    /// Returns when a worker process has ended, with how.
    pub(crate) async fn worker_ended(&mut self) -> Failure {
        loop {
            if let Some(failure) = ended_worker(&mut self.workers) {
                return failure;
            }
            sleep(POLL).await;
        }
    }

    /// The ends of the workers' logs.
    fn log_tails(&self) -> String {
        self.logs(|log| log_tail(log, TAIL_LINES))
    }

    /// The last warnings and errors in the workers' logs.
    #[must_use]
    pub(crate) fn log_warnings(&self) -> String {
        self.logs(|log| log_warnings(log, TAIL_LINES))
    }

    fn logs(&self, quote: impl Fn(&Path) -> String) -> String {
        let quoted = self.workers.iter().map(|worker| quote(&worker.log)).filter(|text| !text.is_empty());
        quoted.collect::<Vec<_>>().join("\n")
    }

    /// Ends workers and coordinator, by force where they do not end when asked.
    pub(crate) async fn stop(mut self) {
        let mut workers = std::mem::take(&mut self.workers);
        let stopping: Vec<_> =
            workers.drain(..).map(|mut worker| tokio::spawn(async move { worker.stop().await })).collect();
        for stopping in stopping {
            // A worker's task has no reason to fail, and a worker that it dropped is dead as well.
            let _ = stopping.await;
        }
        self.shutdown.cancel();
        match timeout(COORDINATOR_STOP_DEADLINE, &mut self.coordinator).await {
            Ok(Ok(Ok(()))) => {}
            Ok(Ok(Err(error))) => tracing::warn!(error = format!("{error:#}"), "the coordinator ended badly"),
            Ok(Err(error)) => tracing::warn!(%error, "the coordinator's task failed"),
            Err(_) => self.coordinator.abort(),
        }
    }

    /// Ends everything at once.
    pub(crate) async fn kill(mut self) {
        for worker in &mut self.workers {
            worker.kill().await;
        }
        self.coordinator.abort();
    }
}

impl Drop for LocalCluster {
    fn drop(&mut self) {
        self.shutdown.cancel();
    }
}

fn ended_worker(workers: &mut [Worker]) -> Option<Failure> {
    workers.iter_mut().find_map(|worker| {
        let status = worker.ended()?;
        let message = format!("{} ended unexpectedly ({status})", worker.id);
        Some(Failure::failed(message).with_note(&log_tail(&worker.log, TAIL_LINES)))
    })
}

fn config(options: &ClusterOptions) -> CoordinatorConfig {
    let roots = RootArgs { roots: options.roots.iter().cloned().collect() };
    CoordinatorConfig {
        lease_seconds: LEASE_SECONDS,
        step_deadline_seconds: STEP_DEADLINE_SECONDS,
        ..CoordinatorConfig::new(roots, options.state.clone())
    }
}

fn worker_command(binary: &Path, index: u32, coordinator_url: &str, options: &ClusterOptions) -> Command {
    let threads = options.threads.unwrap_or_else(|| default_threads(options.worker_count));
    let mut command = Command::new(binary);
    command.args([
        "--listen",
        "127.0.0.1:0",
        "--coordinator",
        coordinator_url,
        "--id",
        &format!("worker-{index}"),
    ]);
    command.args(device_arguments(&options.device, index, options.worker_count));
    command.args(["--threads", &threads.to_string(), "--log-format", "text"]);
    command.arg(format!("--exit-with-parent={}", std::process::id()));
    // What a worker of a cluster may be told by its environment does not hold for ours.
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.as_encoded_bytes().starts_with(b"ESPALIER_"))
    {
        command.env_remove(name);
    }
    for root in &options.roots {
        command.arg("--root").arg(root);
    }
    command
}

/// Workers that share a GPU cannot use NCCL, which takes one rank a device.
fn device_arguments(device: &str, index: u32, worker_count: u32) -> Vec<String> {
    let mut arguments = vec!["--device".to_owned()];
    match device {
        "cuda" => arguments.push(format!("cuda:{index}")),
        device => arguments.push(device.to_owned()),
    }
    if device.starts_with("cuda:") && worker_count > 1 {
        arguments.extend(["--collectives".to_owned(), "gloo".to_owned()]);
    }
    arguments
}

/// The machine's cores dealt out evenly, at least one to each worker.
fn default_threads(worker_count: u32) -> u32 {
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    (u32::try_from(cores).unwrap_or(u32::MAX) / worker_count.max(1)).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn workers_get_a_gpu_each_or_share_one_without_nccl() {
        for (device, index, workers, expected) in [
            ("cpu", 1, 2, "--device cpu"),
            ("cuda", 0, 1, "--device cuda:0"),
            ("cuda", 1, 2, "--device cuda:1"),
            ("cuda:3", 0, 1, "--device cuda:3"),
            ("cuda:3", 1, 2, "--device cuda:3 --collectives gloo"),
        ] {
            assert_eq!(device_arguments(device, index, workers).join(" "), expected);
        }
    }
}
