//! `WorkerService`: messages into domain types, an order to the device thread, its answer back.

use crate::data::{DataRequest, LocatedSource};
use crate::device_thread::{Command, Perplexity, SessionSetup, Stretch, Taken};
use crate::failure;
use crate::places::Place;
use crate::session::{Session, Starter};
use crate::session_stream::SessionStream;
use checkpoint::ModelFolder;
use engine::{CollectiveBackend, Engine, ExportJob, Rendezvous, Restore, ShardSetup};
use pruning::KeepMask;
use service_kit::{PathRefused, Roots};
use std::fmt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::{Semaphore, mpsc};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};
use tracing::{Instrument, Span, error, info, info_span, warn};
use wire::convert::{data, mask, recipe, run};
use wire::pb::checkpoint_response::Kind;
use wire::pb::worker_service_server::WorkerService;
use wire::status::{Failure, Reason, chain};
use wire::{Violations, limits, pb};

/// Messages of a stream that may wait for a slow reader.
const STREAM_QUEUE: usize = 16;
/// Longest that Abort and shutdown wait for the device thread.
const ABORT_GRACE: Duration = Duration::from_secs(5);
/// What Load allows an earlier session's thread beyond its collectives' timeout.
const DEVICE_GRACE: Duration = Duration::from_secs(30);

/// The worker's service, over any engine.
#[derive(Clone)]
pub struct WorkerRpc {
    inner: Arc<Inner>,
}

struct Inner {
    engine: Arc<dyn Engine>,
    roots: Roots,
    data_host: String,
    collective_timeout: Duration,
    steps_done: Arc<AtomicU64>,
    sessions: Mutex<Sessions>,
    exporting: Arc<Semaphore>,
    /// One snapshot is written at a time; the next waits for it.
    writing: Arc<Semaphore>,
    /// Cancelled when a thread does not come back from the device.
    hung: CancellationToken,
}

struct Sessions {
    current: Option<Arc<Session>>,
    /// Cancelled once the thread of the last session has left the device.
    device_free: CancellationToken,
    shutting_down: bool,
}

impl fmt::Debug for WorkerRpc {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WorkerRpc").field("data_host", &self.inner.data_host).finish_non_exhaustive()
    }
}

impl WorkerRpc {
    /// A worker that computes with `engine`, reads and writes below `roots`, and whose collectives listen on `data_host`.
    #[must_use]
    pub fn new(
        engine: Arc<dyn Engine>,
        roots: Roots,
        data_host: String,
        collective_timeout: Duration,
    ) -> Self {
        let device_free = CancellationToken::new();
        device_free.cancel();
        Self {
            inner: Arc::new(Inner {
                engine,
                roots,
                data_host,
                collective_timeout,
                steps_done: Arc::default(),
                sessions: Mutex::new(Sessions { current: None, device_free, shutting_down: false }),
                exporting: Arc::new(Semaphore::new(1)),
                writing: Arc::new(Semaphore::new(1)),
                hung: CancellationToken::new(),
            }),
        }
    }

    /// Optimizer steps that this process has ended since its start.
    #[must_use]
    pub fn steps_done(&self) -> u64 {
        self.inner.steps_done.load(Ordering::Relaxed)
    }

    /// How far the device thread of the current session is.
    #[must_use]
    pub fn progress(&self) -> pb::WorkerProgress {
        self.sessions().current.as_ref().map(|session| session.advance()).unwrap_or_default()
    }

    /// Memory of the current session, as its last step or mask has left it.
    pub(crate) fn session_memory_bytes(&self) -> Option<u64> {
        self.sessions().current.as_ref().map(|session| session.memory_bytes()).filter(|bytes| *bytes > 0)
    }

    /// Time that the current session has spent in collectives.
    pub(crate) fn collective_time(&self) -> Duration {
        let sessions = self.sessions();
        sessions.current.as_ref().map(|session| session.end.shard().collective_time()).unwrap_or_default()
    }

    pub(crate) fn has_session(&self) -> bool {
        self.sessions().current.as_ref().is_some_and(|session| !session.end.is_over())
    }

    /// Waits until a thread has not come back from the device in time: only another process can go on then.
    pub async fn hung(&self) {
        self.inner.hung.cancelled().await;
    }

    /// Ends the session, whichever it is, and waits a while for its thread.
    pub async fn drop_session(&self, why: Failure) {
        self.end_session(None, why).await;
    }

    /// Ends the session, if it is `only` or nothing is asked, and waits a while for its thread.
    async fn end_session(&self, only: Option<&str>, why: Failure) {
        let (ended, device_free) = {
            let mut sessions = self.sessions();
            let ended = sessions.current.take_if(|session| only.is_none_or(|only| session.id == only));
            if ended.is_none() && only.is_some() {
                return;
            }
            (ended, sessions.device_free.clone())
        };
        if let Some(session) = &ended {
            info!(session_id = session.id, why = %why, "session ends");
            session.end.end(why);
        }
        if tokio::time::timeout(ABORT_GRACE, device_free.cancelled()).await.is_err() {
            warn!(
                seconds = ABORT_GRACE.as_secs(),
                "the device thread still works; it ends by itself, at the latest at its collective's timeout"
            );
            let (hung, patience) = (self.inner.hung.clone(), self.inner.collective_timeout + DEVICE_GRACE);
            tokio::spawn(async move {
                if tokio::time::timeout(patience, device_free.cancelled()).await.is_err() {
                    error!(
                        seconds = patience.as_secs(),
                        "the device thread does not come back; the worker must end"
                    );
                    hung.cancel();
                }
            });
        }
    }

    /// Refuses new sessions and ends the current one.
    pub(crate) async fn shut_down(&self) {
        self.sessions().shutting_down = true;
        self.drop_session(Failure::new(Reason::ShuttingDown, "the worker is shutting down")).await;
    }

    fn sessions(&self) -> std::sync::MutexGuard<'_, Sessions> {
        // Whoever panicked while holding it had changed nothing halfway: every change is one assignment.
        self.inner.sessions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The current session, if it is `id` and has not ended.
    fn session(&self, id: &str) -> Result<Arc<Session>, Failure> {
        let current = self.sessions().current.clone();
        match current {
            Some(session) if session.id == id && session.end.is_over() => Err(Failure::new(
                Reason::SessionFailed,
                format!("session `{id}` has ended and must be loaded anew: {}", session.end.why().message),
            )),
            Some(session) if session.id == id => Ok(session),
            Some(session) => Err(Failure::new(
                Reason::WrongSession,
                format!("session `{id}` is not the current one, which is `{}`", session.id),
            )),
            None => Err(Failure::new(
                Reason::WrongSession,
                format!("session `{id}` is not current: there is none"),
            )),
        }
    }

    /// Makes a new session current and ends the one before.
    fn replace_session(&self, id: String) -> Result<(Arc<Session>, Starter, CancellationToken), Failure> {
        let (session, starter) = Session::new(id);
        let mut sessions = self.sessions();
        if sessions.shutting_down {
            return Err(Failure::new(Reason::ShuttingDown, "the worker is shutting down"));
        }
        let before = sessions.current.replace(Arc::clone(&session));
        let device_free = std::mem::replace(&mut sessions.device_free, session.thread_gone.clone());
        drop(sessions);
        if let Some(before) = before {
            info!(session_id = before.id, "session ends: another is loaded");
            before.end.end(Failure::new(Reason::Aborted, format!("session `{}` took its place", session.id)));
        }
        Ok((session, starter, device_free))
    }

    /// Starts the session's thread once the one before has left the device.
    fn start_when_free(
        &self,
        starter: Starter,
        setup: SessionSetup,
        device_free: CancellationToken,
    ) -> LoadAnswer {
        let patience = self.inner.collective_timeout + DEVICE_GRACE;
        let starting = async move {
            tokio::select! {
                () = device_free.cancelled() => {}
                () = tokio::time::sleep(patience) => {
                    let message = format!(
                        "the session before has not left the device within {} s; restart the worker",
                        patience.as_secs()
                    );
                    let failure = Failure::new(Reason::DeviceFailed, message);
                    // The place in the queue for the device is kept without keeping the caller.
                    tokio::spawn(starter.give_up(failure.clone(), device_free));
                    return Err(failure);
                }
            }
            if starter.end().is_over() {
                let why = starter.end().why();
                starter.give_up(why.clone(), device_free).await;
                return Err(why);
            }
            starter.start(setup).await.unwrap_or_else(|_| {
                Err(Failure::new(Reason::Internal, "the device thread ended before it had loaded"))
            })
        };
        // On its own, so that a caller who goes away leaves nothing half done.
        tokio::spawn(starting.instrument(Span::current()))
    }
}

type LoadAnswer = tokio::task::JoinHandle<Result<crate::device_thread::Loaded, Failure>>;

/// The real path of something a request names; what is wrong goes to `found`.
fn located(
    checked: Result<PathBuf, PathRefused>,
    field: impl Into<String>,
    found: &mut Violations,
) -> PathBuf {
    checked.unwrap_or_else(|refused| {
        found.reject(field, chain(&refused));
        PathBuf::new()
    })
}

fn located_sources(
    roots: &Roots,
    sources: Vec<wire::TextSource>,
    field: &str,
    found: &mut Violations,
) -> Vec<LocatedSource> {
    sources
        .into_iter()
        .enumerate()
        .map(|(place, source)| {
            let real_path = if source.path.is_empty() {
                PathBuf::new()
            } else {
                located(roots.input(&source.path), format!("{field}[{place}].path"), found)
            };
            LocatedSource { source, real_path }
        })
        .collect()
}

/// A checked LoadRequest.
struct Load {
    session_id: String,
    /// Its files are still to be fetched; only absent from one that is refused.
    model: Option<Place>,
    /// Its checkpoint is still to be fetched.
    shard: ShardSetup,
    data: DataRequest,
    restore: Option<RestoreFrom>,
}

/// A checkpoint that is to be read.
struct RestoreFrom {
    place: Place,
    /// Names and digests by rank.
    files: Vec<(String, String)>,
    generation: u64,
    next_step: u64,
    keep_mask: KeepMask,
}

impl RestoreFrom {
    fn checked(message: pb::Restore, roots: &Roots, found: &mut Violations) -> Option<Self> {
        let files = checked_shards(message.shards, "restore.shards", found);
        let keep_mask = mask::from_pb(message.keep_mask, "restore.keep_mask", found);
        let place =
            Place::input(roots, &message.url).map_err(|problem| found.reject("restore.url", problem)).ok()?;
        let (generation, next_step) = (message.generation, message.next_step);
        Some(Self { place, files, generation, next_step, keep_mask })
    }

    /// Brings the files to this machine.
    async fn fetch(&self) -> Result<Restore, Failure> {
        let mut shards = Vec::with_capacity(self.files.len());
        for (file, sha256) in &self.files {
            shards.push((self.place.fetch(file).await?, sha256.clone()));
        }
        let Self { generation, next_step, keep_mask, .. } = self;
        let (generation, next_step) = (*generation, *next_step);
        Ok(Restore { shards, generation, next_step, keep_mask: keep_mask.clone() })
    }
}

/// Plain file names with digests.
fn checked_shards(
    shards: Vec<pb::CheckpointShard>,
    field: &str,
    found: &mut Violations,
) -> Vec<(String, String)> {
    if shards.is_empty() {
        found.reject(field, "must name each rank's file");
    }
    let mut checked = Vec::new();
    for (rank, shard) in shards.into_iter().enumerate() {
        let plain =
            !shard.file.is_empty() && !shard.file.contains('/') && shard.file != "." && shard.file != "..";
        if !plain {
            found.reject(format!("{field}[{rank}].file"), "must be a plain file name");
        }
        if shard.sha256.len() != 64 || !shard.sha256.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            found.reject(format!("{field}[{rank}].sha256"), "must be 64 hexadecimal digits");
        }
        checked.push((shard.file, shard.sha256));
    }
    checked
}

impl Load {
    /// Looks at the file system.
    fn checked(
        message: pb::LoadRequest,
        roots: &Roots,
        collective_timeout: Duration,
    ) -> Result<Self, Failure> {
        let mut found = Violations::default();
        check_session_id(&message.session_id, &mut found);
        let recipe = recipe::from_pb(message.recipe, "recipe", &mut found);
        let model =
            Place::input(roots, &message.model).map_err(|problem| found.reject("model", problem)).ok();
        let model_folder = model.as_ref().map(|place| place.local().to_owned()).unwrap_or_default();
        if !(1..=limits::MAX_TP_DEGREE).contains(&message.tp_degree) {
            let most = limits::MAX_TP_DEGREE;
            found.reject("tp_degree", format!("must lie in 1..={most}; got {}", message.tp_degree));
        } else if message.tp_rank >= message.tp_degree {
            found.reject(
                "tp_rank",
                format!("must be below `tp_degree` {}; got {}", message.tp_degree, message.tp_rank),
            );
        }
        let training = data::sources_from_pb(message.training_data, "training_data", &mut found);
        let training = located_sources(roots, training, "training_data", &mut found);
        if training.is_empty() && recipe.steps > 0 {
            found.reject("training_data", "must name at least one file unless `recipe.steps` is 0");
        }
        let evaluation = message.evaluation.map(|evaluation| {
            let spec = data::evaluation_from_pb(evaluation, "evaluation", &mut found);
            let sources = located_sources(roots, spec.sources.clone(), "evaluation.sources", &mut found);
            (spec, sources)
        });
        let tasks = message.tasks.map(|tasks| {
            let spec = data::tasks_from_pb(tasks, "tasks", &mut found);
            let files = spec.files.iter().enumerate().filter(|(_, file)| !file.is_empty());
            let files = files
                .map(|(place, file)| located(roots.input(file), format!("tasks.files[{place}]"), &mut found))
                .collect();
            (spec, files)
        });
        let shard = ShardSetup {
            model: model_folder.clone(),
            recipe,
            tp_rank: message.tp_rank as usize,
            tp_degree: message.tp_degree as usize,
            collective_timeout,
            restore: None,
            progress: Arc::default(),
        };
        let restore = message.restore.and_then(|restore| RestoreFrom::checked(restore, roots, &mut found));
        let data = DataRequest { model: model_folder, training, evaluation, tasks };
        Ok(found.finish(Self { session_id: message.session_id, model, shard, data, restore })?)
    }
}

fn check_session_id(id: &str, found: &mut Violations) {
    if id.is_empty() || id.len() > 256 {
        found.reject("session_id", "must be 1 to 256 bytes long");
    }
}

/// An export whose checkpoint is still to be fetched.
struct Export {
    job: ExportJob,
    checkpoint: Place,
    out: Place,
    files: Vec<(String, String)>,
    /// What an interrupted export of the same run has left goes first.
    replace: bool,
}

/// Looks at the file system.
fn checked_export(message: pb::ExportRequest, roots: &Roots) -> Result<Export, Failure> {
    let mut found = Violations::default();
    let recipe = recipe::from_pb(message.recipe, "recipe", &mut found);
    let model = located(roots.input_folder(&message.model), "model", &mut found);
    let checkpoint =
        Place::input(roots, &message.checkpoint).map_err(|problem| found.reject("checkpoint", problem));
    let keep_mask = mask::from_pb(message.keep_mask, "keep_mask", &mut found);
    let spec = run::export_from_pb(message.export.unwrap_or_default(), "export", &mut found);
    let out = if spec.path.is_empty() {
        // Noted when the message was read.
        Err(())
    } else {
        Place::output(roots, &spec.path).map_err(|problem| found.reject("export.path", problem))
    };
    let files = checked_shards(message.shards, "shards", &mut found);
    let dtype = match spec.dtype {
        wire::ExportDtype::Source => engine::ExportDtype::Source,
        wire::ExportDtype::Bf16 => engine::ExportDtype::Bf16,
        wire::ExportDtype::F16 => engine::ExportDtype::F16,
        wire::ExportDtype::F32 => engine::ExportDtype::F32,
    };
    let out_folder = out.as_ref().map(|place| place.local().to_owned()).unwrap_or_default();
    let job = found.finish(ExportJob {
        model,
        recipe,
        shards: Vec::new(),
        keep_mask,
        out: out_folder,
        dtype,
        max_shard_bytes: spec.max_shard_bytes,
        run_id: message.run_id,
    })?;
    let model = ModelFolder::open(&job.model).map_err(|error| failure::of_model(&error))?;
    mask::check_fits(&job.keep_mask, model.spec(), "keep_mask")?;
    match (checkpoint, out) {
        (Ok(checkpoint), Ok(out)) => Ok(Export { job, checkpoint, out, files, replace: message.replace }),
        (Err(()), _) | (_, Err(())) => {
            Err(Failure::new(Reason::Internal, "a refused folder was let through"))
        }
    }
}

/// Writes a snapshot to where it belongs.
async fn written(
    folder: Place,
    file: String,
    snapshot: Box<dyn engine::Snapshot>,
) -> Result<pb::CheckpointShard, Failure> {
    let place = folder.local().join(&file);
    let (sha256, size_bytes) = blocking(move || {
        let sha256 = snapshot.write(&place).map_err(|error| failure::of_engine(&error))?;
        let size_bytes = std::fs::metadata(&place).map_or(0, |metadata| metadata.len());
        Ok((sha256, size_bytes))
    })
    .await?;
    folder.deliver(&file).await?;
    info!(file, sha256, size_bytes, "checkpoint written");
    Ok(pb::CheckpointShard { file, sha256, size_bytes })
}

/// Runs what blocks on the file system or computes for long off the async threads.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Failure> + Send + 'static,
) -> Result<T, Failure> {
    let span = Span::current();
    match tokio::task::spawn_blocking(move || span.in_scope(work)).await {
        Ok(done) => done,
        Err(error) if error.is_panic() => Err(failure::of_panic(error.into_panic().as_ref(), "the call")),
        Err(_) => Err(Failure::new(Reason::ShuttingDown, "the worker is shutting down")),
    }
}

fn backend(number: i32) -> Result<CollectiveBackend, Failure> {
    match pb::CollectiveBackend::try_from(number) {
        Ok(pb::CollectiveBackend::Gloo) => Ok(CollectiveBackend::Gloo),
        Ok(pb::CollectiveBackend::Nccl) => Ok(CollectiveBackend::Nccl),
        Ok(pb::CollectiveBackend::Unspecified) | Err(_) => Err(Failure::invalid_field(
            "backend",
            format!("has no usable member {number}; use COLLECTIVE_BACKEND_GLOO or COLLECTIVE_BACKEND_NCCL"),
        )),
    }
}

#[tonic::async_trait]
impl WorkerService for WorkerRpc {
    type TrainStream = SessionStream<pb::TrainResponse>;
    type CalibrateStream = SessionStream<pb::CalibrateResponse>;
    type EvaluateTaskStream = SessionStream<pb::EvaluateTaskResponse>;
    type CheckpointStream = SessionStream<pb::CheckpointResponse>;

    async fn describe(
        &self,
        _: Request<pb::DescribeRequest>,
    ) -> Result<Response<pb::DescribeResponse>, Status> {
        let current = self.sessions().current.clone().filter(|session| !session.end.is_over());
        let idle =
            || pb::DescribeResponse { memory_bytes: crate::memory::resident_bytes(), ..Default::default() };
        Ok(Response::new(current.map_or_else(idle, |session| pb::DescribeResponse {
            session_id: session.id.clone(),
            generation: session.generation(),
            next_step: session.next_step(),
            memory_bytes: match session.memory_bytes() {
                0 => crate::memory::resident_bytes(),
                bytes => bytes,
            },
        })))
    }

    async fn load(&self, request: Request<pb::LoadRequest>) -> Result<Response<pb::LoadResponse>, Status> {
        let (inner, message) = (Arc::clone(&self.inner), request.into_inner());
        let load = blocking(move || Load::checked(message, &inner.roots, inner.collective_timeout)).await?;
        let Load { session_id, model, mut shard, data, restore } = load;
        let (session, starter, device_free) = self.replace_session(session_id)?;
        shard.progress = Arc::clone(session.end.shard());
        let fetching = async {
            if let Some(model) = &model {
                model.fetch_all().await?;
            }
            match &restore {
                Some(restore) => restore.fetch().await.map(Some),
                None => Ok(None),
            }
        };
        // What is fetched lies where `model` and `restore` say until all of it is loaded.
        match fetching.await {
            Ok(fetched) => shard.restore = fetched,
            Err(failure) => {
                tokio::spawn(starter.give_up(failure.clone(), device_free));
                return Err(failure.into());
            }
        }
        info!(session_id = session.id, model = %shard.model.display(), tp_rank = shard.tp_rank, "session begins");
        let setup = SessionSetup {
            engine: Arc::clone(&self.inner.engine),
            shard,
            data,
            data_host: self.inner.data_host.clone(),
            steps_done: Arc::clone(&self.inner.steps_done),
        };
        let loading = self.start_when_free(starter, setup, device_free);
        let loaded = tokio::select! {
            biased;
            loaded = loading => loaded.unwrap_or_else(|_| {
                Err(Failure::new(Reason::Internal, "the loading task ended without an answer"))
            })?,
            () = session.end.over() => return Err(session.end.why().into()),
        };
        Ok(Response::new(pb::LoadResponse {
            data_sha256: loaded.data_sha256,
            window_count: loaded.window_count,
            memory_bytes: loaded.memory_bytes,
        }))
    }

    async fn open_rendezvous(
        &self,
        request: Request<pb::OpenRendezvousRequest>,
    ) -> Result<Response<pb::OpenRendezvousResponse>, Status> {
        let message = request.into_inner();
        let backend = backend(message.backend)?;
        let session = self.session(&message.session_id)?;
        let rendezvous = session.call(|reply| Command::OpenRendezvous { backend, reply }).await?;
        Ok(Response::new(pb::OpenRendezvousResponse { rendezvous: rendezvous.0.into() }))
    }

    async fn join_group(
        &self,
        request: Request<pb::JoinGroupRequest>,
    ) -> Result<Response<pb::JoinGroupResponse>, Status> {
        let message = request.into_inner();
        let backend = backend(message.backend)?;
        let session = self.session(&message.session_id)?;
        let rendezvous = Rendezvous(message.rendezvous.to_vec());
        session.call(|reply| Command::JoinGroup { backend, rendezvous, reply }).await?;
        Ok(Response::new(pb::JoinGroupResponse {}))
    }

    async fn train(&self, request: Request<pb::TrainRequest>) -> Result<Response<Self::TrainStream>, Status> {
        let message = request.into_inner();
        let session = self.session(&message.session_id)?;
        let stretch = Stretch {
            first_step: message.first_step,
            end_step: message.end_step,
            generation: message.generation,
        };
        let (sink, items) = mpsc::channel(STREAM_QUEUE);
        session.call(|accepted| Command::Train { stretch, accepted, sink }).await?;
        Ok(Response::new(SessionStream::new(items, session.end.clone())))
    }

    async fn calibrate(
        &self,
        request: Request<pb::CalibrateRequest>,
    ) -> Result<Response<Self::CalibrateStream>, Status> {
        let pb::CalibrateRequest { session_id, generation } = request.into_inner();
        let session = self.session(&session_id)?;
        let (sink, items) = mpsc::channel(STREAM_QUEUE);
        session.call(|accepted| Command::Calibrate { generation, accepted, sink }).await?;
        Ok(Response::new(SessionStream::new(items, session.end.clone())))
    }

    async fn apply_mask(
        &self,
        request: Request<pb::ApplyMaskRequest>,
    ) -> Result<Response<pb::ApplyMaskResponse>, Status> {
        let message = request.into_inner();
        let session = self.session(&message.session_id)?;
        let generation = message.generation;
        let keep_mask = mask::checked(message.keep_mask, "keep_mask")?;
        let (applied, memory_bytes) =
            session.call(|reply| Command::ApplyMask { generation, keep_mask, reply }).await?;
        Ok(Response::new(pb::ApplyMaskResponse { memory_bytes, received_groups: applied.received_groups }))
    }

    async fn evaluate(
        &self,
        request: Request<pb::EvaluateRequest>,
    ) -> Result<Response<pb::EvaluateResponse>, Status> {
        let pb::EvaluateRequest { session_id, window_index } = request.into_inner();
        let session = self.session(&session_id)?;
        let window_index = window_index as usize;
        let Perplexity { sum, window_tokens } =
            session.call(|reply| Command::Evaluate { window_index, reply }).await?;
        Ok(Response::new(pb::EvaluateResponse {
            negative_log_likelihood: sum.negative_log_likelihood,
            predicted_tokens: sum.predicted,
            window_tokens: u32::try_from(window_tokens).unwrap_or(u32::MAX),
        }))
    }

    async fn evaluate_task(
        &self,
        request: Request<pb::EvaluateTaskRequest>,
    ) -> Result<Response<Self::EvaluateTaskStream>, Status> {
        let pb::EvaluateTaskRequest { session_id, task_index } = request.into_inner();
        let session = self.session(&session_id)?;
        let task_index = task_index as usize;
        let (sink, items) = mpsc::channel(STREAM_QUEUE);
        session.call(|accepted| Command::EvaluateTask { task_index, accepted, sink }).await?;
        Ok(Response::new(SessionStream::new(items, session.end.clone())))
    }

    async fn checkpoint(
        &self,
        request: Request<pb::CheckpointRequest>,
    ) -> Result<Response<Self::CheckpointStream>, Status> {
        let pb::CheckpointRequest { session_id, url, with_logits } = request.into_inner();
        let session = self.session(&session_id)?;
        let inner = Arc::clone(&self.inner);
        let folder = blocking(move || {
            let folder =
                Place::output(&inner.roots, &url).and_then(|folder| folder.create().map(|()| folder));
            folder.map_err(|problem| Failure::invalid_field("url", problem))
        })
        .await?;
        let permit = Arc::clone(&self.inner.writing).acquire_owned().await;
        let permit = permit.map_err(|_| Failure::new(Reason::ShuttingDown, "the worker is shutting down"))?;
        let Taken { file, snapshot } = session.call(|reply| Command::Snapshot { with_logits, reply }).await?;
        let (sink, items) = mpsc::channel(2);
        let size_bytes = snapshot.size_bytes();
        let response = |kind| pb::CheckpointResponse { kind: Some(kind) };
        let taken = Kind::Snapshot(pb::CheckpointSnapshot { size_bytes });
        // There is room for both messages.
        let _ = sink.try_send(Ok(response(taken)));
        let writing = async move {
            let _permit = permit;
            let span = info_span!("checkpoint", file);
            let written = written(folder, file, snapshot).instrument(span).await;
            if let Err(failure) = &written {
                warn!(error = %failure, "checkpoint not written");
            }
            let _ = sink.send(written.map(|shard| response(Kind::Shard(shard))).map_err(Status::from)).await;
        };
        tokio::spawn(writing.in_current_span());
        Ok(Response::new(SessionStream::new(items, session.end.clone())))
    }

    async fn export(
        &self,
        request: Request<pb::ExportRequest>,
    ) -> Result<Response<pb::ExportResponse>, Status> {
        let message = request.into_inner();
        let permit = Arc::clone(&self.inner.exporting).try_acquire_owned().map_err(|_| {
            Failure::new(Reason::NoIdleWorker, "this worker is writing another model already")
        })?;
        let inner = Arc::clone(&self.inner);
        let path = message.export.as_ref().map(|export| export.path.clone()).unwrap_or_default();
        let checked = Arc::clone(&self.inner);
        let Export { mut job, checkpoint, out, files, replace } =
            blocking(move || checked_export(message, &checked.roots)).await?;
        out.make_room(replace).await?;
        for (file, sha256) in files {
            job.shards.push((checkpoint.fetch(&file).await?, sha256));
        }
        info!(run_id = job.run_id, path, "export begins");
        let held = (checkpoint, out.clone());
        let (written, _permit) = blocking(move || {
            let _held = held;
            let written = inner.engine.export(&job).map_err(|error| failure::of_engine(&error))?;
            Ok((written, permit))
        })
        .await?;
        out.deliver_all().await?;
        info!(
            path,
            parameters = written.parameters,
            max_logit_difference = written.max_logit_difference,
            "exported"
        );
        Ok(Response::new(pb::ExportResponse {
            result: Some(pb::ExportResult {
                path,
                parameters: written.parameters,
                weight_bytes: written.weight_bytes,
                model_type: written.model_type,
                manifest_sha256: written.manifest_sha256,
                max_logit_difference: written.max_logit_difference,
                max_logit: written.max_logit,
                top_token_agreement: written.top_token_agreement,
                mean_kl: written.mean_kl,
            }),
        }))
    }

    async fn abort(&self, request: Request<pb::AbortRequest>) -> Result<Response<pb::AbortResponse>, Status> {
        let id = request.into_inner().session_id;
        // A session that is not current has ended already: nothing to do.
        let only = (!id.is_empty()).then_some(id.as_str());
        self.end_session(only, Failure::new(Reason::Aborted, "the session was aborted")).await;
        Ok(Response::new(pb::AbortResponse {}))
    }
}
