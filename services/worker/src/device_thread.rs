//! The one thread of a session that touches the engine's shard: it loads, obeys orders one after the other, and ends.

use crate::data::{self, DataRequest, SessionData};
use crate::failure;
use crate::session::{Progress, SessionEnd};
use checkpoint::ModelFolder;
use engine::{
    CollectiveBackend, Engine, EngineError, MaskApplied, NllSum, Rendezvous, ShardEngine, ShardSetup,
    Snapshot,
};
use model_spec::ModelSpec;
use pruning::KeepMask;
use recipe::Compute;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;
use tokio::runtime::Handle;
use tokio::sync::{mpsc, oneshot};
use tonic::Status;
use tracing::{Span, debug, info, info_span, warn};
use wire::convert::scores::{ScorePlace, ScoreWidth, chunks};
use wire::convert::{mask, time};
use wire::pb;
use wire::status::{Failure, Reason};

mod calibration;
mod task;

/// What a session is made of.
pub(crate) struct SessionSetup {
    pub(crate) engine: Arc<dyn Engine>,
    pub(crate) shard: ShardSetup,
    pub(crate) data: DataRequest,
    /// Address of this rank's collectives.
    pub(crate) data_host: String,
    /// Counts the optimizer steps of the process.
    pub(crate) steps_done: Arc<AtomicU64>,
}

/// What the thread shares with the async side.
pub(crate) struct Context {
    pub(crate) end: SessionEnd,
    pub(crate) progress: Arc<Progress>,
    pub(crate) runtime: Handle,
}

/// What loading found.
#[derive(Debug)]
pub(crate) struct Loaded {
    pub(crate) data_sha256: String,
    pub(crate) window_count: u64,
    pub(crate) memory_bytes: u64,
}

/// A rank's state apart from its shard, and the name of its file.
pub(crate) struct Taken {
    pub(crate) file: String,
    pub(crate) snapshot: Box<dyn Snapshot>,
}

/// What Evaluate measured.
#[derive(Debug)]
pub(crate) struct Perplexity {
    pub(crate) sum: NllSum,
    pub(crate) window_tokens: usize,
}

/// Steps `first_step .. end_step` under a mask.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Stretch {
    pub(crate) first_step: u64,
    pub(crate) end_step: u64,
    pub(crate) generation: u64,
}

type Reply<T> = oneshot::Sender<Result<T, Failure>>;
pub(crate) type TrainItem = Result<pb::TrainResponse, Status>;
pub(crate) type CalibrationItem = Result<pb::CalibrateResponse, Status>;
pub(crate) type TaskItem = Result<pb::EvaluateTaskResponse, Status>;

pub(crate) enum Command {
    OpenRendezvous {
        backend: CollectiveBackend,
        reply: Reply<Rendezvous>,
    },
    JoinGroup {
        backend: CollectiveBackend,
        rendezvous: Rendezvous,
        reply: Reply<()>,
    },
    /// `accepted` is answered before the first step; then reports and scores go to `sink`.
    Train {
        stretch: Stretch,
        accepted: Reply<()>,
        sink: mpsc::Sender<TrainItem>,
    },
    /// `accepted` is answered before the first pass; then signs of life and what was found go to `sink`.
    Calibrate {
        generation: u64,
        accepted: Reply<()>,
        sink: mpsc::Sender<CalibrationItem>,
    },
    ApplyMask {
        generation: u64,
        keep_mask: KeepMask,
        reply: Reply<(MaskApplied, u64)>,
    },
    Evaluate {
        window_index: usize,
        reply: Reply<Perplexity>,
    },
    /// `accepted` is answered before the first pass; then signs of life and the score go to `sink`.
    EvaluateTask {
        task_index: usize,
        accepted: Reply<()>,
        sink: mpsc::Sender<TaskItem>,
    },
    Snapshot {
        with_logits: bool,
        reply: Reply<Taken>,
    },
}

/// A command and the span of the call that gave it.
pub(crate) struct Order {
    pub(crate) span: Span,
    pub(crate) command: Command,
}

/// Why a command failed, and whether the shard is lost with it.
struct Fault {
    failure: Failure,
    ends_session: bool,
}

impl From<Failure> for Fault {
    fn from(failure: Failure) -> Self {
        Self { failure, ends_session: false }
    }
}

impl From<EngineError> for Fault {
    fn from(error: EngineError) -> Self {
        Self { failure: failure::of_engine(&error), ends_session: failure::ends_session(&error) }
    }
}

/// Runs `work`; a panic in it loses the shard, not the process.
fn guarded<T>(what: &str, work: impl FnOnce() -> Result<T, Fault>) -> Result<T, Fault> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|payload| {
        Err(Fault { failure: failure::of_panic(payload.as_ref(), what), ends_session: true })
    })
}

/// The life of the thread: load, obey until the session's end, free the shard.
pub(crate) fn run(
    setup: SessionSetup,
    context: &Context,
    loading: Span,
    mut orders: mpsc::Receiver<Order>,
    ready: oneshot::Sender<Result<Loaded, Failure>>,
) {
    let works = |works: bool| context.progress.working.store(works, Ordering::Relaxed);
    works(true);
    let loaded = loading.in_scope(|| guarded("loading", || Shard::load(setup, context)));
    drop(loading);
    works(false);
    let mut shard = match loaded {
        Ok((shard, loaded)) => {
            // Nobody waits any more when the caller went away; the session stays for its next call.
            let _ = ready.send(Ok(loaded));
            shard
        }
        Err(fault) => {
            warn!(error = %fault.failure, "load failed");
            // Over before it is told, so that nobody who has heard of it finds the session still there.
            context.end.end(fault.failure.clone());
            let _ = ready.send(Err(fault.failure));
            return;
        }
    };
    while let Some(Order { span, command }) = next_order(context, &mut orders) {
        works(true);
        span.in_scope(|| shard.obey(command));
        works(false);
    }
    works(true);
    if guarded("freeing the shard", || {
        drop(shard);
        Ok(())
    })
    .is_err()
    {
        warn!("the engine panicked when it was freed");
    }
    debug!("device thread ends");
}

/// The next order, or nothing once the session is over.
fn next_order(context: &Context, orders: &mut mpsc::Receiver<Order>) -> Option<Order> {
    context.runtime.block_on(async {
        tokio::select! {
            biased;
            () = context.end.over() => None,
            order = orders.recv() => order,
        }
    })
}

struct Shard<'a> {
    context: &'a Context,
    engine: Box<dyn ShardEngine>,
    setup: ShardSetup,
    data: SessionData,
    data_host: String,
    dense: ModelSpec,
    keep_mask: KeepMask,
    generation: u64,
    last_applied: MaskApplied,
    next_step: u64,
    joined: bool,
    /// The unpruned model has read the windows of the run.
    taught: bool,
    steps_done: Arc<AtomicU64>,
}

impl<'a> Shard<'a> {
    fn load(setup: SessionSetup, context: &'a Context) -> Result<(Self, Loaded), Fault> {
        let SessionSetup { engine, shard: setup, data: request, data_host, steps_done } = setup;
        let started = Instant::now();
        let folder = ModelFolder::open(&setup.model).map_err(|error| failure::of_model(&error))?;
        let data = SessionData::load(&request, &folder, &setup.recipe)?;
        if context.end.is_over() {
            return Err(context.end.why().into());
        }
        if let Some(restore) = &setup.restore {
            mask::check_fits(&restore.keep_mask, folder.spec(), "restore.keep_mask")
                .map_err(Failure::from)?;
        }
        let engine = engine.load(setup.clone())?;
        let (data_sha256, window_count) = data.training_digest();
        let restore = setup.restore.clone();
        let shard = Self {
            generation: restore.as_ref().map_or(0, |restore| restore.generation),
            next_step: restore.as_ref().map_or(0, |restore| restore.next_step),
            // What the unpruned model has said is part of the checkpoint.
            taught: restore.as_ref().is_some_and(|restore| restore.next_step > 0),
            keep_mask: restore.map_or_else(|| KeepMask::full(folder.spec()), |restore| restore.keep_mask),
            dense: folder.spec().clone(),
            joined: setup.tp_degree == 1,
            last_applied: MaskApplied { received_groups: 0 },
            context,
            engine,
            setup,
            data,
            data_host,
            steps_done,
        };
        let memory_bytes = shard.note_progress();
        info!(
            tp_rank = shard.setup.tp_rank,
            tp_degree = shard.setup.tp_degree,
            window_count,
            memory_bytes,
            seconds = started.elapsed().as_secs_f64(),
            "shard loaded"
        );
        Ok((shard, Loaded { data_sha256, window_count, memory_bytes }))
    }

    /// Does what it is told and answers. A fault that costs the shard ends the session.
    fn obey(&mut self, command: Command) {
        let end = self.context.end.clone();
        match command {
            Command::OpenRendezvous { backend, reply } => {
                answer(reply, &end, "opening the rendezvous", || self.open_rendezvous(backend));
            }
            Command::JoinGroup { backend, rendezvous, reply } => {
                answer(reply, &end, "joining the group", || self.join_group(backend, &rendezvous));
            }
            Command::Train { stretch, accepted, sink } => self.train(stretch, accepted, &sink),
            Command::ApplyMask { generation, keep_mask, reply } => {
                answer(reply, &end, "applying the mask", || self.apply_mask(generation, keep_mask));
            }
            Command::Evaluate { window_index, reply } => {
                answer(reply, &end, "evaluating", || self.evaluate(window_index));
            }
            Command::Calibrate { generation, accepted, sink } => {
                self.calibrate(generation, accepted, &sink);
            }
            Command::EvaluateTask { task_index, accepted, sink } => {
                self.evaluate_task(task_index, accepted, &sink);
            }
            Command::Snapshot { with_logits, reply } => {
                answer(reply, &end, "taking a snapshot", || self.snapshot(with_logits));
            }
        }
    }

    fn open_rendezvous(&mut self, backend: CollectiveBackend) -> Result<Rendezvous, Fault> {
        if self.setup.tp_rank != 0 {
            let message = format!("only rank 0 opens the rendezvous; this is rank {}", self.setup.tp_rank);
            return Err(Failure::new(Reason::Refused, message).into());
        }
        self.engine.choose_backend(backend)?;
        Ok(self.engine.open_rendezvous(&self.data_host)?)
    }

    fn join_group(&mut self, backend: CollectiveBackend, rendezvous: &Rendezvous) -> Result<(), Fault> {
        if self.joined && self.setup.tp_degree > 1 {
            let message = "the session has joined its group already; load it anew to form another";
            return Err(Failure::new(Reason::Refused, message).into());
        }
        self.engine.choose_backend(backend)?;
        let joined = self.engine.join_group(rendezvous, &self.data_host);
        // Half a group is no group: nothing can be done with this shard any more.
        joined.map_err(|error| Fault { failure: failure::of_engine(&error), ends_session: true })?;
        self.joined = true;
        Ok(())
    }

    fn train(&mut self, stretch: Stretch, accepted: Reply<()>, sink: &mpsc::Sender<TrainItem>) {
        if let Err(refused) = self.check_stretch(stretch) {
            let _ = accepted.send(Err(refused));
            return;
        }
        // A caller that is gone already is noticed at the first report.
        let _ = accepted.send(Ok(()));
        match guarded("teaching", || self.teach(stretch.first_step, sink)) {
            Ok(true) => {}
            Ok(false) => return info!("teaching stops: nobody listens any more"),
            Err(fault) => return self.stop(stretch.first_step, fault, sink),
        }
        for step in stretch.first_step..stretch.end_step {
            if self.context.end.is_over() {
                return;
            }
            let messages = match guarded("a step", || self.step(step)) {
                Ok(messages) => messages,
                Err(fault) => return self.stop(step, fault, sink),
            };
            for message in messages {
                if self.send(sink, Ok(message)).is_err() {
                    info!(step, "training stops: nobody listens any more");
                    return;
                }
            }
        }
    }

    /// Ends a training stream with the reason.
    fn stop(&self, step: u64, fault: Fault, sink: &mpsc::Sender<TrainItem>) {
        let Fault { failure, ends_session } = fault;
        if ends_session {
            // The stream ends with the reason of the session's end.
            return lose(&self.context.end, failure);
        }
        warn!(step, error = %failure, "step failed");
        let _ = self.send(sink, Err(failure.into()));
    }

    /// Where the recipe distils: has the unpruned model read every window from `first_step` on, a pass at a time, each told
    /// of. False when the caller is gone or the session over.
    fn teach(&mut self, first_step: u64, sink: &mpsc::Sender<TrainItem>) -> Result<bool, Fault> {
        let recipe = &self.setup.recipe;
        if recipe.distillation.is_none() || self.taught {
            return Ok(true);
        }
        let started = Instant::now();
        let windows = self.data.windows_of(first_step..recipe.steps);
        let (total, mut done) = (windows.len(), 0);
        for rows in windows.chunks(recipe.batch.rows) {
            self.engine.teach(rows)?;
            let tenths = |windows: usize| 10 * windows / total;
            if tenths(done) < tenths(done + rows.len()) {
                info!(
                    windows = done + rows.len(),
                    of = total,
                    "the unpruned model reads the windows of the run"
                );
            }
            done += rows.len();
            let progress = pb::TeachingProgress { windows: done as u64, total_windows: total as u64 };
            let kind = pb::train_response::Kind::Teaching(progress);
            if self.send(sink, Ok(pb::TrainResponse { kind: Some(kind) })).is_err() {
                return Ok(false);
            }
        }
        self.taught = true;
        let memory_bytes = self.note_progress();
        info!(windows = total, memory_bytes, seconds = started.elapsed().as_secs_f64(), "taught");
        Ok(true)
    }

    fn check_stretch(&self, stretch: Stretch) -> Result<(), Failure> {
        let Stretch { first_step, end_step, generation } = stretch;
        self.require_group()?;
        if generation != self.generation {
            let reason = if generation < self.generation {
                Reason::StaleGeneration
            } else {
                Reason::SkippedGeneration
            };
            let message = format!("generation {} is in force, not {generation}", self.generation);
            return Err(Failure::new(reason, message).with_fact("generation", self.generation));
        }
        if first_step != self.next_step {
            let message = format!("the next step is {}, not {first_step}", self.next_step);
            return Err(Failure::new(Reason::WrongStep, message).with_fact("next_step", self.next_step));
        }
        if end_step <= first_step || end_step > self.setup.recipe.steps {
            let steps = self.setup.recipe.steps;
            return Err(Failure::invalid_field(
                "end_step",
                format!("must lie in {}..={steps}; got {end_step}", first_step + 1),
            ));
        }
        if self.data.micro_batches(first_step).is_none() {
            return Err(data::none_loaded("training data", "training_data"));
        }
        Ok(())
    }

    /// One optimizer step; returns its scores in chunks and then its report.
    fn step(&mut self, step: u64) -> Result<Vec<pb::TrainResponse>, Fault> {
        let _span = info_span!("step", step).entered();
        let started = Instant::now();
        let Some(micro_batches) = self.data.micro_batches(step) else {
            return Err(data::none_loaded("training data", "training_data").into());
        };
        let outcome = self.engine.train_step(step, &micro_batches)?;
        let duration = started.elapsed();
        self.next_step = step + 1;
        self.steps_done.fetch_add(1, Ordering::Relaxed);
        let memory_bytes = self.note_progress();
        let width = match self.setup.recipe.precision.compute {
            Compute::F64 => ScoreWidth::F64,
            Compute::F32 | Compute::Bf16 => ScoreWidth::F32,
        };
        let mut messages = Vec::new();
        for scores in &outcome.scores {
            let place = ScorePlace {
                step,
                generation: self.generation,
                layer: scores.layer,
                projection: scores.projection,
            };
            messages.extend(
                chunks(place, &scores.values, width)
                    .map(|chunk| pb::TrainResponse { kind: Some(pb::train_response::Kind::Scores(chunk)) }),
            );
        }
        debug!(
            step,
            loss = outcome.loss,
            milliseconds = duration.as_secs_f64() * 1e3,
            memory_bytes,
            "step ended"
        );
        messages.push(pb::TrainResponse {
            kind: Some(pb::train_response::Kind::Report(pb::StepReport {
                step,
                loss: outcome.loss,
                grad_norm: outcome.grad_norm,
                learning_rate: outcome.learning_rate,
                tokens: self.setup.recipe.batch.tokens_per_step(),
                duration: Some(time::duration_to_pb(duration)),
                score_duration: Some(time::duration_to_pb(outcome.score_time)),
                memory_bytes,
                sparsity: self.keep_mask.sparsity(&self.dense),
                generation: self.generation,
                skipped: outcome.skipped.unwrap_or_default(),
            })),
        });
        Ok(messages)
    }

    fn apply_mask(&mut self, generation: u64, keep_mask: KeepMask) -> Result<(MaskApplied, u64), Fault> {
        self.require_group()?;
        if generation == self.generation {
            if keep_mask != self.keep_mask {
                let problem = format!("is not the mask that generation {generation} was applied with");
                return Err(Failure::invalid_field("keep_mask", problem).into());
            }
            return Ok((self.last_applied, self.note_progress()));
        }
        if generation != self.generation + 1 {
            let (reason, how) = if generation < self.generation {
                (Reason::StaleGeneration, "is older than")
            } else {
                (Reason::SkippedGeneration, "does not follow")
            };
            let message =
                format!("generation {generation} {how} generation {}, which is in force", self.generation);
            return Err(Failure::new(reason, message).with_fact("generation", self.generation).into());
        }
        mask::check_fits(&keep_mask, &self.dense, "keep_mask").map_err(Failure::from)?;
        keep_mask.check_subset_of(&self.keep_mask).map_err(Failure::from)?;
        let recipe = &self.setup.recipe;
        let compensation = recipe.pruning.as_ref().and_then(|pruning| pruning.compensation.least_squares());
        let calibration =
            compensation.map(|choice| self.data.calibration(choice.windows, recipe.seed)).unwrap_or_default();
        let applying = info_span!("apply mask", generation).entered();
        let applied = self.engine.apply_mask(generation, &keep_mask, &calibration);
        drop(applying);
        let applied = match applied {
            Ok(applied) => applied,
            // Refused before anything changed: the session goes on. Else the shard may be half sliced.
            Err(error @ EngineError::Refused(_)) => return Err(error.into()),
            Err(
                error @ (EngineError::File(_)
                | EngineError::Unwritten(_)
                | EngineError::NotFinite { .. }
                | EngineError::Collective(_)
                | EngineError::Device(_)),
            ) => return Err(Fault { failure: failure::of_engine(&error), ends_session: true }),
        };
        self.keep_mask = keep_mask;
        self.generation = generation;
        self.last_applied = applied;
        let memory_bytes = self.note_progress();
        info!(generation, received_groups = applied.received_groups, memory_bytes, "mask applied");
        Ok((applied, memory_bytes))
    }

    fn evaluate(&mut self, window_index: usize) -> Result<Perplexity, Fault> {
        self.require_group()?;
        let Some(held) = self.data.evaluation(window_index) else {
            return Err(data::none_loaded("held-out text of that window", "evaluation").into());
        };
        let (rows, rows_per_pass, window_tokens) = (held.set.rows(), held.rows_per_pass, held.window_tokens);
        let started = Instant::now();
        let mut sum = NllSum::default();
        // A pass at a time, so that an abort need not wait for all of them.
        for rows in rows.chunks(rows_per_pass.max(1)) {
            if self.context.end.is_over() {
                return Err(self.context.end.why().into());
            }
            let pass = self.engine.evaluate(rows, rows_per_pass)?;
            sum.negative_log_likelihood += pass.negative_log_likelihood;
            sum.predicted += pass.predicted;
        }
        self.note_progress();
        info!(
            perplexity = sum.perplexity(),
            window_tokens,
            predicted_tokens = sum.predicted,
            seconds = started.elapsed().as_secs_f64(),
            "evaluated"
        );
        Ok(Perplexity { sum, window_tokens })
    }

    fn snapshot(&mut self, with_logits: bool) -> Result<Taken, Fault> {
        self.require_group()?;
        let prompts = if with_logits { self.data.prompts() } else { &[] };
        let snapshot = self.engine.snapshot(prompts)?;
        debug!(size_bytes = snapshot.size_bytes(), generation = self.generation, "snapshot taken");
        Ok(Taken { file: format!("rank-{}.safetensors", self.setup.tp_rank), snapshot })
    }

    fn require_group(&self) -> Result<(), Failure> {
        if self.joined {
            return Ok(());
        }
        let message = format!(
            "rank {} of {} has not joined its group; call JoinGroup first",
            self.setup.tp_rank, self.setup.tp_degree
        );
        Err(Failure::new(Reason::GroupNotFormed, message))
    }

    /// Writes down where the session stands and returns the shard's memory.
    fn note_progress(&self) -> u64 {
        let memory_bytes = match self.engine.memory_bytes() {
            0 => crate::memory::resident_bytes(),
            bytes => bytes,
        };
        self.context.progress.generation.store(self.generation, Ordering::Relaxed);
        self.context.progress.next_step.store(self.next_step, Ordering::Relaxed);
        self.context.progress.memory_bytes.store(memory_bytes, Ordering::Relaxed);
        memory_bytes
    }

    /// Waits for room in the stream; fails when the caller is gone or the session over.
    fn send<T>(&self, sink: &mpsc::Sender<T>, item: T) -> Result<(), ()> {
        send(self.context, sink, item)
    }
}

/// See [`Shard::send`].
fn send<T>(context: &Context, sink: &mpsc::Sender<T>, item: T) -> Result<(), ()> {
    context.runtime.block_on(async {
        tokio::select! {
            biased;
            () = context.end.over() => Err(()),
            sent = sink.send(item) => sent.map_err(drop),
        }
    })
}

/// Does `work` and answers.
fn answer<T>(reply: Reply<T>, end: &SessionEnd, what: &str, work: impl FnOnce() -> Result<T, Fault>) {
    let answer = guarded(what, work).map_err(|Fault { failure, ends_session }| {
        if ends_session {
            lose(end, failure.clone());
        }
        failure
    });
    // A caller that went away does not want its answer.
    let _ = reply.send(answer);
}

/// Ends a session whose shard is lost, before anyone is told: nobody who has heard of it finds it still there.
fn lose(end: &SessionEnd, failure: Failure) {
    warn!(error = %failure, "session lost");
    end.end(failure);
}
