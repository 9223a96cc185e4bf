//! A registry that grants leases as told, and a worker that found it.

use checkpoint::ModelFolder;
use engine::toy::ToyEngine;
use model_spec::ModelSpec;
use pruning::KeepMask;
use service_kit::{GrpcServer, ListenArgs, RootArgs};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tempfile::TempDir;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};
use wire::client::{self, WorkerClient, within};
use wire::convert::{mask, time};
use wire::pb;
use wire::pb::registry_service_server::{RegistryService, RegistryServiceServer};
use wire::status::{Failure, Reason};
use worker::{WorkerConfig, WorkerError};

/// No test waits longer than this for anything.
pub(crate) const DEADLINE: Duration = Duration::from_secs(20);
pub(crate) const SESSION: &str = "s-1";

/// How the registry behaves, and what it has seen.
#[derive(Debug)]
pub(crate) struct RegistryState {
    pub(crate) lease: Duration,
    pub(crate) registered: Mutex<Vec<pb::WorkerInfo>>,
    pub(crate) renewals: AtomicU64,
    pub(crate) steps_done: AtomicU64,
    /// The next renewal answers NOT_FOUND.
    pub(crate) forget: AtomicBool,
    /// Nothing is answered.
    pub(crate) silent: AtomicBool,
    pub(crate) refuse: bool,
    /// A run holds the worker.
    pub(crate) holds: AtomicBool,
    /// The worker has asked for its run to be taken off it.
    pub(crate) draining: AtomicBool,
    pub(crate) deregistered: AtomicBool,
}

#[derive(Clone)]
struct Registry(Arc<RegistryState>);

impl Registry {
    async fn stay_silent_if_told(&self) {
        if self.0.silent.load(Ordering::SeqCst) {
            std::future::pending::<()>().await;
        }
    }
}

#[tonic::async_trait]
impl RegistryService for Registry {
    async fn register(
        &self,
        request: Request<pb::RegisterRequest>,
    ) -> Result<Response<pb::RegisterResponse>, Status> {
        self.stay_silent_if_told().await;
        if self.0.refuse {
            return Err(Failure::invalid_field("info.id", "is taken").into());
        }
        self.0.registered.lock().unwrap().push(request.into_inner().info.unwrap());
        let lease_duration = Some(time::duration_to_pb(self.0.lease));
        Ok(Response::new(pb::RegisterResponse {
            lease_id: "lease".into(),
            lease_duration,
            renew_interval: None,
            pool_workers: 1,
        }))
    }
    async fn renew(&self, request: Request<pb::RenewRequest>) -> Result<Response<pb::RenewResponse>, Status> {
        self.stay_silent_if_told().await;
        if self.0.forget.swap(false, Ordering::SeqCst) {
            return Err(Failure::new(Reason::LeaseNotFound, "the lease has run out").into());
        }
        let pb::RenewRequest { steps_done, draining, .. } = request.into_inner();
        self.0.steps_done.store(steps_done, Ordering::SeqCst);
        self.0.renewals.fetch_add(1, Ordering::SeqCst);
        self.0.draining.fetch_or(draining, Ordering::SeqCst);
        Ok(Response::new(pb::RenewResponse {
            lease_duration: Some(time::duration_to_pb(self.0.lease)),
            idle: !self.0.holds.load(Ordering::SeqCst),
            draining,
            pool_workers: 1,
        }))
    }
    async fn deregister(
        &self,
        _: Request<pb::DeregisterRequest>,
    ) -> Result<Response<pb::DeregisterResponse>, Status> {
        self.0.deregistered.store(true, Ordering::SeqCst);
        Ok(Response::new(pb::DeregisterResponse {}))
    }
    async fn drain_worker(
        &self,
        _: Request<pb::DrainWorkerRequest>,
    ) -> Result<Response<pb::DrainWorkerResponse>, Status> {
        Ok(Response::new(pb::DrainWorkerResponse::default()))
    }
    async fn list_workers(
        &self,
        _: Request<pb::ListWorkersRequest>,
    ) -> Result<Response<pb::ListWorkersResponse>, Status> {
        Ok(Response::new(pb::ListWorkersResponse::default()))
    }
}

pub(crate) async fn start_registry(
    lease: Duration,
    refuse: bool,
) -> (String, Arc<RegistryState>, CancellationToken) {
    let state = Arc::new(RegistryState {
        lease,
        refuse,
        registered: Mutex::default(),
        renewals: AtomicU64::new(0),
        steps_done: AtomicU64::new(0),
        forget: AtomicBool::new(false),
        silent: AtomicBool::new(false),
        holds: AtomicBool::new(false),
        draining: AtomicBool::new(false),
        deregistered: AtomicBool::new(false),
    });
    let listener = ListenArgs::default().bind(([127, 0, 0, 1], 0).into()).await.unwrap();
    let url = format!("http://{}", listener.address());
    let stop = CancellationToken::new();
    let service = RegistryServiceServer::new(Registry(Arc::clone(&state)));
    let server = GrpcServer::new(pb::DESCRIPTORS).unwrap().with_service(service);
    tokio::spawn(server.serve(listener, stop.clone(), Duration::ZERO));
    (url, state, stop)
}

/// A running worker and its folders.
pub(crate) struct Harness {
    pub(crate) client: WorkerClient,
    pub(crate) registry: Arc<RegistryState>,
    pub(crate) stop: CancellationToken,
    pub(crate) ended: JoinHandle<Result<(), WorkerError>>,
    /// A folder below a root.
    pub(crate) scratch: PathBuf,
    pub(crate) spec: ModelSpec,
    registry_stop: CancellationToken,
    _folder: TempDir,
}

impl Drop for Harness {
    fn drop(&mut self) {
        self.stop.cancel();
        self.registry_stop.cancel();
    }
}

pub(crate) fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures").canonicalize().unwrap()
}

pub(crate) fn toy() -> ToyEngine {
    ToyEngine::new(ModelFolder::open(&fixtures().join("models/gqa")).unwrap().spec().clone())
}

pub(crate) fn config(coordinator: &str, scratch: &Path) -> WorkerConfig {
    WorkerConfig {
        listen: ListenArgs::default(),
        coordinator: Some(coordinator.to_owned()),
        advertise: None,
        data_host: None,
        id: "worker-a".into(),
        pool: String::new(),
        group_size: 1,
        peak_flops: None,
        device: "cpu".into(),
        device_memory_bytes: None,
        threads: 1,
        roots: RootArgs { roots: vec![scratch.to_owned(), fixtures()] },
        collective_timeout: Duration::from_secs(2),
        register_timeout: Duration::from_secs(5),
        drain: Duration::from_secs(5),
    }
}

pub(crate) async fn start(engine: ToyEngine) -> Harness {
    start_with_lease(engine, Duration::from_secs(10)).await
}

pub(crate) async fn start_with_lease(engine: ToyEngine, lease: Duration) -> Harness {
    let (url, registry, registry_stop) = start_registry(lease, false).await;
    let folder = tempfile::tempdir().unwrap();
    let scratch = folder.path().canonicalize().unwrap();
    let stop = CancellationToken::new();
    let spec = ModelFolder::open(&fixtures().join("models/gqa")).unwrap().spec().clone();
    let ended = tokio::spawn(worker::run(config(&url, &scratch), Arc::new(engine), stop.clone()));
    eventually("the worker registers", || !registry.registered.lock().unwrap().is_empty()).await;
    let endpoint = registry.registered.lock().unwrap()[0].endpoint.clone();
    let client = client::worker_client(client::connected_channel(&endpoint).await.unwrap());
    Harness { client, registry, stop, ended, scratch, spec, registry_stop, _folder: folder }
}

/// A checkpoint of the session, once it is written.
pub(crate) async fn checkpoint(
    client: &mut WorkerClient,
    session_id: &str,
    url: &str,
) -> Result<pb::CheckpointShard, Status> {
    use pb::checkpoint_response::Kind;
    let message = pb::CheckpointRequest { session_id: session_id.into(), url: url.into(), with_logits: true };
    let mut stream = client.checkpoint(request(message)).await?.into_inner();
    let first = stream.message().await?.and_then(|message| message.kind);
    assert!(matches!(first, Some(Kind::Snapshot(_))), "the snapshot is told of first");
    match stream.message().await?.and_then(|message| message.kind) {
        Some(Kind::Shard(shard)) => Ok(shard),
        other => panic!("a file was expected, not {other:?}"),
    }
}

/// Waits until `holds`, within the deadline.
pub(crate) async fn eventually(what: &str, holds: impl Fn() -> bool) {
    let waiting = async {
        while !holds() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(DEADLINE, waiting)
        .await
        .unwrap_or_else(|_| panic!("{what}: not within {DEADLINE:?}"));
}

pub(crate) fn request<T>(message: T) -> Request<T> {
    within(DEADLINE, message)
}

pub(crate) fn source(name: &str) -> pb::TextSource {
    pb::TextSource { path: fixtures().join("text").join(name).display().to_string(), ..Default::default() }
}

pub(crate) fn task_file(name: &str) -> String {
    fixtures().join(format!("tasks/{name}.jsonl")).display().to_string()
}

pub(crate) fn tasks(files: &[&str]) -> pb::TaskSpec {
    let files = files.iter().map(|file| (*file).to_owned()).collect();
    pb::TaskSpec { files, log_likelihoods: true, ..Default::default() }
}

/// Rank 0 of 1 on the tiny model, 12 steps, pruned from the second on.
pub(crate) fn load_request() -> pb::LoadRequest {
    pb::LoadRequest {
        session_id: SESSION.into(),
        model: fixtures().join("models/gqa").display().to_string(),
        recipe: Some(pb::Recipe {
            seed: 7,
            steps: Some(12),
            batch: Some(pb::Batch { window_tokens: Some(32), rows: Some(2), micro_batches: Some(2) }),
            pruning: Some(published()),
            ..Default::default()
        }),
        tp_rank: 0,
        tp_degree: 1,
        training_data: vec![source("tiny.txt")],
        evaluation: Some(pb::EvaluationSpec {
            sources: vec![source("held_out.txt")],
            window_tokens: Some(64),
            ..Default::default()
        }),
        tasks: None,
        restore: None,
    }
}

/// LoRAPrune as published: a decision every ten steps.
pub(crate) fn published() -> pb::Pruning {
    pb::Pruning {
        criterion: Some(pb::Criterion::LorapruneCode.into()),
        ramp: Some(pb::Ramp { warmup: Some(0.1), cooldown: Some(0.1), ..Default::default() }),
        compensation: Some(pb::pruning::Compensation::NoCompensation(pb::NoCompensation {})),
        ..Default::default()
    }
}

/// What a stretch of training streamed.
#[derive(Debug, Default)]
pub(crate) struct Trained {
    pub(crate) chunks: Vec<pb::ScoreChunk>,
    pub(crate) reports: Vec<pb::StepReport>,
    pub(crate) teaching: Vec<pb::TeachingProgress>,
}

impl Harness {
    pub(crate) async fn load(&mut self) -> pb::LoadResponse {
        self.client.load(request(load_request())).await.unwrap().into_inner()
    }

    pub(crate) async fn describe(&mut self) -> pb::DescribeResponse {
        self.client.describe(request(pb::DescribeRequest {})).await.unwrap().into_inner()
    }

    pub(crate) fn train_request(
        &self,
        first_step: u64,
        end_step: u64,
        generation: u64,
    ) -> Request<pb::TrainRequest> {
        request(pb::TrainRequest { session_id: SESSION.into(), first_step, end_step, generation })
    }

    pub(crate) async fn train(
        &mut self,
        first_step: u64,
        end_step: u64,
        generation: u64,
    ) -> Result<Trained, Status> {
        let request = self.train_request(first_step, end_step, generation);
        let mut stream = self.client.train(request).await?.into_inner();
        let mut trained = Trained::default();
        while let Some(message) =
            tokio::time::timeout(DEADLINE, stream.message()).await.expect("a silent stream")?
        {
            match message.kind.unwrap() {
                pb::train_response::Kind::Scores(chunk) => trained.chunks.push(chunk),
                pb::train_response::Kind::Report(report) => trained.reports.push(report),
                pb::train_response::Kind::Teaching(progress) => trained.teaching.push(progress),
            }
        }
        Ok(trained)
    }

    pub(crate) async fn apply_mask(
        &mut self,
        generation: u64,
        keep_mask: &KeepMask,
    ) -> Result<pb::ApplyMaskResponse, Status> {
        let message = pb::ApplyMaskRequest {
            session_id: SESSION.into(),
            generation,
            keep_mask: Some(mask::to_pb(keep_mask)),
        };
        Ok(self.client.apply_mask(request(message)).await?.into_inner())
    }

    /// Without the last key/value head, its query heads, and every odd channel.
    pub(crate) fn smaller_mask(&self) -> KeepMask {
        let mut keep_mask = KeepMask::full(&self.spec);
        for (keep, widths) in keep_mask.layers.iter_mut().zip(&self.spec.layers) {
            let last = widths.kv_head_count - 1;
            keep.kv_heads.retain(|head| *head != last);
            keep.query_heads.retain(|head| widths.kv_head_of(*head) != last);
            keep.channels.retain(|channel| channel % 2 == 0);
        }
        keep_mask
    }
}
