//! A coordinator and workers in one process, talking over loopback as they do in a cluster, with the toy engine.

use coordinator::CoordinatorConfig;
use engine::Engine;
use engine::toy::ToyEngine;
use service_kit::{ListenArgs, RootArgs};
use std::future::Future;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tempfile::TempDir;
use tokio::runtime::Runtime;
use tokio::task::JoinHandle;
use tokio_stream::StreamExt;
use tokio_util::sync::CancellationToken;
use wire::client::{RegistryClient, RunClient, lazy_channel, registry_client, run_client};
use wire::pb;
use worker::WorkerConfig;

/// Longest that any single wait of a test may take.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Lease of the workers.
pub const LEASE_SECONDS: u64 = 2;

/// A coordinator with its folders, and the workers that were added.
pub struct Cluster {
    /// A root that models, data and outputs may lie below.
    pub root: TempDir,
    address: SocketAddr,
    config: CoordinatorConfig,
    coordinator: Option<Process>,
    workers: Vec<Worker>,
}

/// A coordinator on a runtime of its own, so that it can die like a process.
struct Process {
    runtime: Runtime,
    shutdown: CancellationToken,
    serving: JoinHandle<Result<(), String>>,
}

/// A worker on a runtime of its own, so that it can die like a process.
struct Worker {
    id: String,
    runtime: Option<Runtime>,
    stop: CancellationToken,
}

/// The repository's test files.
#[must_use]
pub fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures").canonicalize().expect("the fixtures are there")
}

/// The toy engine for the model of [`Cluster::spec`].
#[must_use]
pub fn toy() -> ToyEngine {
    let folder = checkpoint::ModelFolder::open(&fixtures().join("models/gqa")).expect("a good model folder");
    ToyEngine::new(folder.spec().clone())
}

/// Waits for `outcome`, but not for ever.
pub async fn in_time<T>(what: &str, outcome: impl Future<Output = T>) -> T {
    match tokio::time::timeout(PATIENCE, outcome).await {
        Ok(outcome) => outcome,
        Err(_) => panic!("{what} took longer than {PATIENCE:?}"),
    }
}

impl Cluster {
    /// A coordinator without workers.
    pub async fn start() -> Self {
        Self::start_with(|_| {}).await
    }

    /// A coordinator without workers, its configuration changed.
    pub async fn start_with(change: impl FnOnce(&mut CoordinatorConfig)) -> Self {
        let root = tempfile::tempdir().expect("a temporary folder");
        let loopback = SocketAddr::from(([127, 0, 0, 1], 0));
        let listener = ListenArgs::default().bind(loopback).await.expect("a free port");
        let address = listener.address();
        let roots = RootArgs { roots: vec![root.path().to_owned(), fixtures()] };
        let mut config = CoordinatorConfig {
            lease_seconds: LEASE_SECONDS,
            step_deadline_seconds: 30,
            ..CoordinatorConfig::new(roots, root.path().join("data"))
        };
        change(&mut config);
        drop(listener);
        let mut cluster = Self { root, address, config, coordinator: None, workers: Vec::new() };
        cluster.start_coordinator().await;
        cluster
    }

    /// Starts a coordinator over the same folders, at the same address, in place of the one before, which must have ended.
    pub async fn start_coordinator(&mut self) {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .expect("a runtime");
        let (shutdown, config, address) = (CancellationToken::new(), self.config.clone(), self.address);
        let stop = shutdown.clone();
        let serving = runtime.spawn(async move {
            let listen = ListenArgs { listen: Some(address), ..ListenArgs::default() };
            let listener = loop {
                match listen.bind(address).await {
                    Ok(listener) => break listener,
                    Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
                }
            };
            coordinator::serve(config, listener, stop).await.map_err(|error| format!("{error:#}"))
        });
        self.coordinator = Some(Process { runtime, shutdown, serving });
        in_time("the coordinator to answer", async {
            let request = || pb::ListWorkersRequest {};
            while self.registry().list_workers(request()).await.is_err() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        })
        .await;
    }

    /// Waits until the coordinator ends by itself, and returns its error.
    pub async fn coordinator_gives_up(&mut self) -> String {
        let Process { runtime, serving, .. } = self.coordinator.take().expect("a living coordinator");
        let ended = in_time("the coordinator to end by itself", serving).await.expect("it does not panic");
        runtime.shutdown_background();
        ended.expect_err("it should have failed")
    }

    /// Kills the coordinator without a word.
    pub fn kill_coordinator(&mut self) {
        self.coordinator.take().expect("a living coordinator").runtime.shutdown_background();
    }

    /// Starts workers `w0`, `w1`, … with one engine and waits until all are registered.
    pub async fn add_workers(&mut self, count: usize, engine: &Arc<dyn Engine>) {
        for _ in 0..count {
            let id = format!("w{}", self.workers.len());
            self.add_worker(&id, engine.clone()).await;
        }
    }

    /// Starts a worker and waits until it is registered.
    pub async fn add_worker(&mut self, id: &str, engine: Arc<dyn Engine>) {
        self.add_worker_of(id, engine, "", 1).await;
    }

    /// The same, of a pool whose workers are ready once `group_size` of them are there.
    pub async fn add_worker_of(&mut self, id: &str, engine: Arc<dyn Engine>, pool: &str, group_size: u32) {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .expect("a runtime");
        let stop = CancellationToken::new();
        let config = WorkerConfig {
            listen: ListenArgs::default(),
            coordinator: Some(self.endpoint()),
            advertise: None,
            data_host: None,
            id: id.to_owned(),
            pool: pool.to_owned(),
            group_size,
            peak_flops: None,
            device: "cpu".to_owned(),
            device_memory_bytes: None,
            threads: 1,
            roots: RootArgs { roots: vec![self.root.path().to_owned(), fixtures()] },
            collective_timeout: Duration::from_secs(20),
            register_timeout: Duration::from_secs(20),
            drain: Duration::from_secs(10),
        };
        runtime.spawn(worker::run(config, engine, stop.clone()));
        self.workers.push(Worker { id: id.to_owned(), runtime: Some(runtime), stop });
        self.until_workers(&format!("worker {id} to register"), |workers| {
            workers.iter().any(|worker| worker.info.as_ref().is_some_and(|info| info.id == id))
        })
        .await;
    }

    /// Kills a worker without a word: its sockets close, its tasks vanish.
    pub fn kill(&mut self, id: &str) {
        let worker = self.workers.iter_mut().find(|worker| worker.id == id).expect("a worker of that id");
        worker.runtime.take().expect("a living worker").shutdown_background();
    }

    /// Tells a worker to stop, as SIGTERM does.
    pub fn stop(&self, id: &str) {
        self.workers.iter().find(|worker| worker.id == id).expect("a worker of that id").stop.cancel();
    }

    /// URL of the coordinator.
    #[must_use]
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    #[must_use]
    pub fn runs(&self) -> RunClient {
        run_client(lazy_channel(&self.endpoint()).expect("a good URL"))
    }

    #[must_use]
    pub fn registry(&self) -> RegistryClient {
        registry_client(lazy_channel(&self.endpoint()).expect("a good URL"))
    }

    /// Waits until the list of workers is as wanted.
    pub async fn until_workers(&self, what: &str, wanted: impl Fn(&[pb::Worker]) -> bool) {
        let mut registry = self.registry();
        in_time(what, async {
            loop {
                let listed = registry.list_workers(pb::ListWorkersRequest {}).await;
                if listed.is_ok_and(|listed| wanted(&listed.get_ref().workers)) {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        })
        .await;
    }

    /// A run over the fixture model `gqa`: 8 steps, decisions after steps 2, 4 and 6, measured and exported to `out`.
    #[must_use]
    pub fn spec(&self, tp_degree: u32, out: &str) -> pb::RunSpec {
        let text = |name: &str| pb::TextSource {
            path: fixtures().join("text").join(name).to_string_lossy().into_owned(),
            ..Default::default()
        };
        pb::RunSpec {
            model: fixtures().join("models/gqa").to_string_lossy().into_owned(),
            training_data: vec![text("tiny.txt")],
            recipe: Some(pb::Recipe {
                steps: Some(8),
                batch: Some(pb::Batch { window_tokens: Some(16), rows: Some(2), micro_batches: Some(1) }),
                pruning: Some(pb::Pruning {
                    criterion: Some(pb::Criterion::LorapruneCode.into()),
                    ramp: Some(pb::Ramp {
                        warmup: Some(0.1),
                        cooldown: Some(0.2),
                        every: Some(2),
                        shape: None,
                    }),
                    compensation: Some(pb::pruning::Compensation::NoCompensation(pb::NoCompensation {})),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            tp_degree: Some(tp_degree),
            evaluation: Some(pb::EvaluationSpec {
                sources: vec![text("held_out.txt")],
                window_tokens: Some(32),
                ..Default::default()
            }),
            export: Some(pb::ExportSpec { path: self.path(out), ..Default::default() }),
            durability: Some(pb::DurabilitySpec { max_restarts: Some(0), ..Default::default() }),
            ..Default::default()
        }
    }

    /// A path below the root.
    #[must_use]
    pub fn path(&self, name: &str) -> String {
        self.root.path().join(name).to_string_lossy().into_owned()
    }

    /// Creates a run, which must be accepted.
    pub async fn create(&self, spec: pb::RunSpec) -> pb::Run {
        let request = pb::CreateRunRequest { spec: Some(spec), ..Default::default() };
        match in_time("CreateRun", self.runs().create_run(request)).await {
            Ok(created) => created.into_inner().run.expect("a run"),
            Err(status) => panic!("{}", wire::status::describe(&status)),
        }
    }

    pub async fn get(&self, id: &str) -> pb::Run {
        let got = in_time("GetRun", self.runs().get_run(pb::GetRunRequest { id: id.to_owned() })).await;
        got.expect("a run of that id").into_inner().run.expect("a run")
    }

    /// All events past `after_revision` up to the run's end.
    pub async fn watch(&self, id: &str, after_revision: u64) -> Vec<pb::RunEvent> {
        let request = pb::WatchRunRequest { id: id.to_owned(), after_revision };
        let events = self.runs().watch_run(request).await.expect("a run of that id").into_inner();
        let all = events.map(|event| event.expect("an unbroken stream").event.expect("an event")).collect();
        in_time("the run", all).await
    }

    /// The run once it has ended.
    pub async fn ended(&self, id: &str) -> pb::Run {
        self.watch(id, 0).await;
        self.get(id).await
    }

    /// Waits until a run shows what is wanted.
    pub async fn until(&self, id: &str, what: &str, wanted: impl Fn(&pb::Run) -> bool) -> pb::Run {
        let since = std::time::Instant::now();
        loop {
            let run = self.get(id).await;
            if wanted(&run) {
                return run;
            }
            let (state, message) = (run.state(), &run.status_message);
            assert!(
                since.elapsed() < PATIENCE,
                "{what} took longer than {PATIENCE:?}; the run is {state:?}: {message}"
            );
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Tells the coordinator to stop, as SIGTERM does, and waits for its end.
    pub async fn shut_down(mut self) -> Result<(), String> {
        self.stop_coordinator().await
    }

    /// The same, but a coordinator can be started again.
    pub async fn stop_coordinator(&mut self) -> Result<(), String> {
        let Process { runtime, shutdown, serving } = self.coordinator.take().expect("a living coordinator");
        shutdown.cancel();
        let ended = tokio::time::timeout(PATIENCE, serving).await;
        runtime.shutdown_background();
        ended.map_err(|_| "the coordinator did not end".to_owned())?.map_err(|error| error.to_string())?
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if let Some(coordinator) = self.coordinator.take() {
            coordinator.shutdown.cancel();
            coordinator.runtime.shutdown_background();
        }
        for worker in &mut self.workers {
            worker.stop.cancel();
            if let Some(runtime) = worker.runtime.take() {
                runtime.shutdown_background();
            }
        }
    }
}

/// What a run came to, to hold two runs against each other.
#[derive(Debug, Clone, PartialEq)]
pub struct Outcome {
    /// Bits of the loss of each step, the last time that it was taken.
    pub losses: Vec<u64>,
    /// Step and mask of each decision.
    pub decisions: Vec<(u64, pb::KeepMask)>,
    /// Label and perplexity, as bits.
    pub perplexities: Vec<(String, u64)>,
}

impl Cluster {
    /// What a run has come to; its events must be gapless and in order.
    pub async fn outcome(&self, id: &str) -> Outcome {
        let events = self.watch(id, 0).await;
        let revisions: Vec<u64> = events.iter().map(|event| event.revision).collect();
        assert_eq!(revisions, (1..=events.len() as u64).collect::<Vec<_>>(), "no event is lost or doubled");
        let mut losses = std::collections::BTreeMap::new();
        let (mut decisions, mut perplexities) = (Vec::new(), Vec::new());
        for event in events {
            use pb::run_event::Kind;
            match event.kind.expect("an event has a kind") {
                Kind::Step(step) => {
                    losses.insert(step.step, step.loss.to_bits());
                }
                Kind::Decision(decision) => {
                    let generation = Some(decision.generation);
                    let request = pb::GetKeepMaskRequest { id: id.to_owned(), generation };
                    let mask = self.runs().get_keep_mask(request).await.expect("a mask").into_inner();
                    decisions.push((decision.step, mask.keep_mask.expect("a mask")));
                }
                Kind::Evaluation(measured) => {
                    perplexities.push((measured.label, measured.perplexity.to_bits()))
                }
                Kind::StateChange(_)
                | Kind::Task(_)
                | Kind::Export(_)
                | Kind::Checkpoint(_)
                | Kind::Restart(_)
                | Kind::Guard(_)
                | Kind::Calibration(_) => {}
            }
        }
        Outcome { losses: losses.into_values().collect(), decisions, perplexities }
    }

    /// A run of 40 steps with a decision after every fourth, a checkpoint after every third, and three restarts.
    #[must_use]
    pub fn durable_spec(&self, tp_degree: u32, out: &str) -> pb::RunSpec {
        let mut spec = self.spec(tp_degree, out);
        let recipe = spec.recipe.as_mut().expect("a recipe");
        recipe.steps = Some(40);
        let ramp = recipe.pruning.as_mut().and_then(|pruning| pruning.ramp.as_mut()).expect("a ramp");
        ramp.every = Some(4);
        spec.durability = Some(pb::DurabilitySpec {
            checkpoint_every_steps: Some(3),
            max_restarts: Some(3),
            ..Default::default()
        });
        spec
    }

    /// What the same run comes to when nothing breaks.
    pub async fn undisturbed(tp_degree: u32, change: impl FnOnce(&mut pb::RunSpec)) -> Outcome {
        let mut cluster = Self::start().await;
        let engine: Arc<dyn Engine> = Arc::new(toy());
        cluster.add_workers(tp_degree as usize, &engine).await;
        let mut spec = cluster.durable_spec(tp_degree, "undisturbed");
        change(&mut spec);
        let run = cluster.create(spec).await;
        let run = cluster.ended(&run.id).await;
        assert_eq!(run.state(), pb::RunState::Succeeded, "{}", run.status_message);
        cluster.outcome(&run.id).await
    }
}
