//! The calls to the workers of one session: each to all ranks at once, each with its deadline, each outcome an event.

use crate::deadlines::Deadlines;
use crate::messages;
use crate::metrics;
use crate::registry::device_kind;
use pruning_run::{CalibrationFound, Event, Fault, Generation, Measurement, RunId, ShardFile, TaskScore};
use recipe::Compensation;
use std::collections::BTreeSet;
use std::future::Future;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};
use tonic::Status;
use tracing::{Instrument, debug, warn};
use wire::client::{ClientSecurity, WorkerClient, within, worker_client};
use wire::convert::{mask, scores};
use wire::pb;
use wire::status::{Reason, chain, describe, reason};

/// The workers of one session, by tensor-parallel rank, and the calls to them in flight.
#[derive(Debug)]
pub(crate) struct Calls {
    session_id: String,
    clients: Vec<WorkerClient>,
    backend: pb::CollectiveBackend,
    deadlines: Deadlines,
    outcomes: mpsc::Sender<Event>,
    in_flight: JoinSet<()>,
    /// Ranks whose worker is gone: nobody waits for what they answer.
    lost: BTreeSet<usize>,
}

/// What all ranks load; rank and session are filled in for each.
#[derive(Debug, Clone)]
pub(crate) struct LoadPlan {
    pub(crate) model: String,
    pub(crate) recipe: pb::Recipe,
    pub(crate) training_data: Vec<pb::TextSource>,
    pub(crate) evaluation: Option<pb::EvaluationSpec>,
    pub(crate) tasks: Option<pb::TaskSpec>,
    pub(crate) restore: Option<pb::Restore>,
}

/// Time for a late answer to be preferred over our own deadline.
const MARGIN: Duration = Duration::from_secs(2);

impl Calls {
    /// Nothing is sent yet. Connections are made at their first use.
    ///
    /// # Errors
    /// When a worker's endpoint is no URL.
    pub(crate) fn new(
        session_id: String,
        workers: &[pb::WorkerInfo],
        peers: &ClientSecurity,
        deadlines: Deadlines,
        outcomes: mpsc::Sender<Event>,
    ) -> Result<Self, String> {
        let clients = workers
            .iter()
            .map(|worker| {
                let channel = peers
                    .lazy(&worker.endpoint)
                    .map_err(|error| format!("worker `{}`: {}", worker.id, chain(&error)))?;
                Ok(worker_client(channel))
            })
            .collect::<Result<_, String>>()?;
        let on_gpus = workers.iter().all(|worker| device_kind(&worker.device) == "cuda");
        let backend = if on_gpus { pb::CollectiveBackend::Nccl } else { pb::CollectiveBackend::Gloo };
        let (in_flight, lost) = (JoinSet::new(), BTreeSet::new());
        Ok(Self { session_id, clients, backend, deadlines, outcomes, in_flight, lost })
    }

    /// Notes that a rank's worker is gone, or does not advance.
    pub(crate) fn lose(&mut self, tp_rank: usize) {
        self.lost.insert(tp_rank);
    }

    pub(crate) fn load(&mut self, plan: &LoadPlan) {
        let session_id = self.session_id.clone();
        let tp_degree = u32::try_from(self.clients.len()).unwrap_or(u32::MAX);
        let deadline = self.deadlines.load;
        self.on_all_ranks("Load", deadline, |tp_rank, mut client| {
            let request = pb::LoadRequest {
                session_id: session_id.clone(),
                model: plan.model.clone(),
                recipe: Some(plan.recipe.clone()),
                tp_rank: u32::try_from(tp_rank).unwrap_or(u32::MAX),
                tp_degree,
                training_data: plan.training_data.clone(),
                evaluation: plan.evaluation.clone(),
                tasks: plan.tasks.clone(),
                restore: plan.restore.clone(),
            };
            async move {
                let loaded = client.load(within(deadline, request)).await?.into_inner();
                Ok(Event::Loaded { tp_rank, data_sha256: loaded.data_sha256 })
            }
        });
    }

    pub(crate) fn open_rendezvous(&mut self) {
        let request =
            pb::OpenRendezvousRequest { session_id: self.session_id.clone(), backend: self.backend.into() };
        let deadline = self.deadlines.open_rendezvous;
        self.on_first_rank("OpenRendezvous", deadline, |mut client| async move {
            let opened = client.open_rendezvous(within(deadline, request)).await?.into_inner();
            Ok(Event::RendezvousOpened { rendezvous: opened.rendezvous.to_vec() })
        });
    }

    pub(crate) fn join_group(&mut self, rendezvous: Vec<u8>) {
        let (session_id, backend) = (self.session_id.clone(), self.backend.into());
        let deadline = self.deadlines.join_group;
        self.on_all_ranks("JoinGroup", deadline, |tp_rank, mut client| {
            let request = pb::JoinGroupRequest {
                session_id: session_id.clone(),
                backend,
                rendezvous: rendezvous.clone().into(),
            };
            async move {
                client.join_group(within(deadline, request)).await?;
                Ok(Event::Joined { tp_rank })
            }
        });
    }

    pub(crate) fn evaluate(&mut self, measurement: Measurement) {
        match measurement {
            Measurement::Window { index } => self.evaluate_window(index),
            Measurement::Task { index } => self.evaluate_task(index),
        }
    }

    fn evaluate_window(&mut self, window_index: usize) {
        let session_id = self.session_id.clone();
        let deadline = self.deadlines.evaluate;
        self.on_all_ranks("Evaluate", deadline, |tp_rank, mut client| {
            let request = pb::EvaluateRequest {
                session_id: session_id.clone(),
                window_index: u32::try_from(window_index).unwrap_or(u32::MAX),
            };
            async move {
                let started = Instant::now();
                let measured = client.evaluate(within(deadline, request)).await?.into_inner();
                Ok(Event::Evaluated {
                    tp_rank,
                    window_index,
                    negative_log_likelihood: measured.negative_log_likelihood,
                    predicted_tokens: measured.predicted_tokens,
                    window_tokens: measured.window_tokens,
                    duration: started.elapsed(),
                })
            }
        });
    }

    fn evaluate_task(&mut self, task_index: usize) {
        let silence = self.deadlines.step;
        for (tp_rank, client) in self.clients.iter().cloned().enumerate() {
            let request = pb::EvaluateTaskRequest {
                session_id: self.session_id.clone(),
                task_index: u32::try_from(task_index).unwrap_or(u32::MAX),
            };
            let outcomes = self.outcomes.clone();
            let measuring = async move {
                let started = Instant::now();
                let event = match task_on(client, request, silence).await {
                    Ok(score) => {
                        Event::TaskEvaluated { tp_rank, task_index, score, duration: started.elapsed() }
                    }
                    Err(fault) => Event::RankFailed { tp_rank, fault },
                };
                tell(&outcomes, event).await;
            };
            self.in_flight.spawn(measuring.in_current_span());
        }
    }

    pub(crate) fn train(&mut self, run_id: &RunId, first_step: u64, end_step: u64, generation: Generation) {
        let silence = self.deadlines.step;
        for (tp_rank, client) in self.clients.iter().cloned().enumerate() {
            let request = pb::TrainRequest {
                session_id: self.session_id.clone(),
                first_step,
                end_step,
                generation: generation.0,
            };
            let (outcomes, run_id) = (self.outcomes.clone(), run_id.clone());
            let training = async move {
                if let Err(fault) = train_on(&run_id, tp_rank, client, request, silence, &outcomes).await {
                    tell(&outcomes, Event::RankFailed { tp_rank, fault }).await;
                }
            };
            self.in_flight.spawn(training.in_current_span());
        }
    }

    pub(crate) fn calibrate(&mut self, generation: Generation) {
        let silence = self.deadlines.step;
        for (tp_rank, client) in self.clients.iter().cloned().enumerate() {
            let request =
                pb::CalibrateRequest { session_id: self.session_id.clone(), generation: generation.0 };
            let outcomes = self.outcomes.clone();
            let calibrating = async move {
                let started = Instant::now();
                let event = match calibrate_on(client, request, silence).await {
                    Ok(found) => {
                        Event::Calibrated { tp_rank, generation, found, duration: started.elapsed() }
                    }
                    Err(fault) => Event::RankFailed { tp_rank, fault },
                };
                tell(&outcomes, event).await;
            };
            self.in_flight.spawn(calibrating.in_current_span());
        }
    }

    pub(crate) fn apply_mask(
        &mut self,
        generation: Generation,
        keep_mask: &pruning::KeepMask,
        compensation: Compensation,
    ) {
        let session_id = self.session_id.clone();
        let keep_mask = mask::to_pb(keep_mask);
        let deadline = match compensation {
            Compensation::None => self.deadlines.apply_mask,
            Compensation::LeastSquares(_) => self.deadlines.compensate,
        };
        self.on_all_ranks("ApplyMask", deadline, |tp_rank, mut client| {
            let request = pb::ApplyMaskRequest {
                session_id: session_id.clone(),
                generation: generation.0,
                keep_mask: Some(keep_mask.clone()),
            };
            async move {
                client.apply_mask(within(deadline, request)).await?;
                Ok(Event::MaskApplied { tp_rank, generation })
            }
        });
    }

    /// Has all ranks copy their state aside, then write it: each tells of both.
    pub(crate) fn checkpoint(&mut self, name: &str, url: &str, with_logits: bool) {
        let deadline = self.deadlines.checkpoint;
        for (tp_rank, client) in self.clients.iter().cloned().enumerate() {
            let request = pb::CheckpointRequest {
                session_id: self.session_id.clone(),
                url: url.to_owned(),
                with_logits,
            };
            let (outcomes, name) = (self.outcomes.clone(), name.to_owned());
            let saving = async move {
                let mut taken = false;
                if let Err(fault) =
                    save_on(tp_rank, &name, client, request, deadline, &outcomes, &mut taken).await
                {
                    let event = match fault {
                        // The rank trains on, only this checkpoint is lost.
                        Fault::Own(cause) | Fault::Lasting(cause) if taken => {
                            Event::CheckpointFailed { name, cause: format!("rank {tp_rank}: {cause}") }
                        }
                        Fault::Own(_) | Fault::Lasting(_) | Fault::PeerLost(_) => {
                            Event::RankFailed { tp_rank, fault }
                        }
                    };
                    tell(&outcomes, event).await;
                }
            };
            self.in_flight.spawn(saving.in_current_span());
        }
    }

    pub(crate) fn export(&mut self, request: pb::ExportRequest) {
        let deadline = self.deadlines.export;
        self.on_first_rank("Export", deadline, |client| async move {
            let result = export_on(client, request, deadline).await?;
            Ok(Event::Exported { result: messages::export_from(result) })
        });
    }

    /// Drops all calls in flight and ends the sessions. Tells of rank 0's failure alone: nobody needs the others again.
    ///
    /// A lost rank is told as well, but not waited for: its silence must not keep the others from a new group.
    pub(crate) async fn abort_sessions(&mut self) -> Result<(), Fault> {
        self.in_flight.shutdown().await;
        let deadline = self.deadlines.abort;
        let mut aborting = JoinSet::new();
        for (tp_rank, mut client) in self.clients.iter().cloned().enumerate() {
            let request = pb::AbortRequest { session_id: self.session_id.clone() };
            let abort = async move {
                let answer = in_time("Abort", deadline, client.abort(within(deadline, request))).await;
                (tp_rank, answer.err())
            };
            if self.lost.contains(&tp_rank) {
                tokio::spawn(abort.in_current_span());
            } else {
                aborting.spawn(abort.in_current_span());
            }
        }
        let mut first = Ok(());
        while let Some(ended) = aborting.join_next().await {
            let Ok((tp_rank, Some(fault))) = ended else { continue };
            warn!(tp_rank, ?fault, "session not ended; the worker drops it at its next Load");
            if tp_rank == 0 {
                first = Err(fault);
            }
        }
        first
    }

    fn on_all_ranks<F, Answer>(&mut self, what: &'static str, deadline: Duration, call: F)
    where
        F: Fn(usize, WorkerClient) -> Answer,
        Answer: Future<Output = Result<Event, Status>> + Send + 'static,
    {
        for tp_rank in 0..self.clients.len() {
            let answer = call(tp_rank, self.clients[tp_rank].clone());
            self.spawn(tp_rank, what, deadline, answer);
        }
    }

    fn on_first_rank<F, Answer>(&mut self, what: &'static str, deadline: Duration, call: F)
    where
        F: FnOnce(WorkerClient) -> Answer,
        Answer: Future<Output = Result<Event, Status>> + Send + 'static,
    {
        if let Some(client) = self.clients.first().cloned() {
            self.spawn(0, what, deadline, call(client));
        }
    }

    fn spawn<Answer>(&mut self, tp_rank: usize, what: &'static str, deadline: Duration, answer: Answer)
    where
        Answer: Future<Output = Result<Event, Status>> + Send + 'static,
    {
        let outcomes = self.outcomes.clone();
        let answered = async move {
            let event = match in_time(what, deadline, answer).await {
                Ok(event) => event,
                Err(fault) => Event::RankFailed { tp_rank, fault },
            };
            tell(&outcomes, event).await;
        };
        self.in_flight.spawn(answered.in_current_span());
    }
}

/// Writes a pruned model on one worker.
pub(crate) async fn export_on(
    mut client: WorkerClient,
    request: pb::ExportRequest,
    deadline: Duration,
) -> Result<pb::ExportResult, Status> {
    let answer = client.export(within(deadline, request)).await?.into_inner();
    answer.result.ok_or_else(|| Status::internal("the worker's answer to Export holds no result"))
}

/// One rank's training stream, message by message.
async fn train_on(
    run_id: &RunId,
    tp_rank: usize,
    mut client: WorkerClient,
    request: pb::TrainRequest,
    silence: Duration,
    outcomes: &mpsc::Sender<Event>,
) -> Result<(), Fault> {
    let mut stream = in_time("Train", silence, client.train(request)).await?.into_inner();
    loop {
        use pb::train_response::Kind;
        let Some(message) = in_time("Train", silence, stream.message()).await? else {
            tell(outcomes, Event::TrainEnded { tp_rank }).await;
            return Ok(());
        };
        let event = match message.kind {
            Some(Kind::Scores(chunk)) => {
                let bytes = size_of_val(&*chunk.values_f32) + size_of_val(&*chunk.values_f64);
                metrics::note_scores(run_id, bytes);
                let slice = scores::from_pb(chunk)
                    .map_err(|invalid| Fault::Own(format!("its scores cannot be read: {invalid}")))?;
                Event::Scores {
                    tp_rank,
                    step: slice.step,
                    generation: Generation(slice.generation),
                    layer: slice.layer,
                    projection: slice.projection,
                    first_unit: slice.first_unit,
                    values: slice.values,
                }
            }
            Some(Kind::Report(report)) => Event::StepEnded { tp_rank, report: messages::rank_report(report) },
            Some(Kind::Teaching(progress)) => {
                debug!(tp_rank, windows = progress.windows, of = progress.total_windows, "teaching");
                continue;
            }
            None => return Err(Fault::Own("it sent an empty message while training".to_owned())),
        };
        tell(outcomes, event).await;
    }
}

/// One rank's checkpoint: its snapshot, then its file.
async fn save_on(
    tp_rank: usize,
    name: &str,
    mut client: WorkerClient,
    request: pb::CheckpointRequest,
    deadline: Duration,
    outcomes: &mpsc::Sender<Event>,
    taken: &mut bool,
) -> Result<(), Fault> {
    use pb::checkpoint_response::Kind;
    let mut stream = in_time("Checkpoint", deadline, client.checkpoint(request)).await?.into_inner();
    loop {
        let Some(message) = in_time("Checkpoint", deadline, stream.message()).await? else {
            return Err(Fault::Own("it ended a checkpoint without naming its file".to_owned()));
        };
        match message.kind {
            Some(Kind::Snapshot(_)) => {
                *taken = true;
                tell(outcomes, Event::Snapshotted { tp_rank, name: name.to_owned() }).await;
            }
            Some(Kind::Shard(pb::CheckpointShard { file, sha256, size_bytes })) => {
                let shard = ShardFile { file, sha256, size_bytes };
                tell(outcomes, Event::Checkpointed { tp_rank, name: name.to_owned(), shard }).await;
                return Ok(());
            }
            None => return Err(Fault::Own("it sent an empty message while writing a checkpoint".to_owned())),
        }
    }
}

/// One rank's calibration: signs of life, then what it found.
async fn calibrate_on(
    mut client: WorkerClient,
    request: pb::CalibrateRequest,
    silence: Duration,
) -> Result<CalibrationFound, Fault> {
    use pb::calibrate_response::Kind;
    let mut stream = in_time("Calibrate", silence, client.calibrate(request)).await?.into_inner();
    loop {
        let Some(message) = in_time("Calibrate", silence, stream.message()).await? else {
            return Err(Fault::Own("it ended a calibration without a result".to_owned()));
        };
        match message.kind {
            Some(Kind::Progress(pb::CalibrationProgress { passes, total_passes })) => {
                debug!(passes, total_passes, "calibration goes on");
            }
            Some(Kind::Result(found)) => return Ok(messages::calibration_found(found)),
            None => return Err(Fault::Own("it sent an empty message while calibrating".to_owned())),
        }
    }
}

/// One rank's measurement of a task: signs of life, then the score.
async fn task_on(
    mut client: WorkerClient,
    request: pb::EvaluateTaskRequest,
    silence: Duration,
) -> Result<TaskScore, Fault> {
    use pb::evaluate_task_response::Kind;
    let mut stream = in_time("EvaluateTask", silence, client.evaluate_task(request)).await?.into_inner();
    loop {
        let Some(message) = in_time("EvaluateTask", silence, stream.message()).await? else {
            return Err(Fault::Own("it ended a task without a score".to_owned()));
        };
        match message.kind {
            Some(Kind::Progress(pb::TaskProgress { tokens, total_tokens })) => {
                debug!(tokens, total_tokens, "task goes on");
            }
            Some(Kind::Score(score)) => return Ok(messages::task_score(score)),
            None => return Err(Fault::Own("it sent an empty message while measuring a task".to_owned())),
        }
    }
}

/// Waits for an answer, and says what its absence means.
pub(crate) async fn in_time<T>(
    what: &str,
    deadline: Duration,
    answer: impl Future<Output = Result<T, Status>>,
) -> Result<T, Fault> {
    match timeout(deadline + MARGIN, answer).await {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(status)) => Err(fault(&status)),
        Err(_) => Err(Fault::Own(format!("no sign of life from {what} in {} s", deadline.as_secs_f64()))),
    }
}

/// Whom a failed call blames: a rank that has lost a peer is not at fault itself.
fn fault(status: &Status) -> Fault {
    let said = describe(status);
    match reason(status) {
        Some(Reason::PeerLost) => Fault::PeerLost(said),
        // The same request would be refused again.
        Some(Reason::InvalidFields | Reason::Refused | Reason::BadFile) => Fault::Lasting(said),
        Some(_) => Fault::Own(said),
        None => Fault::Own(format!("the call broke off: {said}")),
    }
}

/// A driver that has stopped listening does not care any more.
async fn tell(outcomes: &mpsc::Sender<Event>, event: Event) {
    let _ = outcomes.send(event).await;
}
