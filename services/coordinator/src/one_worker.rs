//! What a finished run may still ask of one idle worker: another measurement, another export.

use crate::calls::{Calls, LoadPlan, export_on, in_time};
use crate::context::Context;
use crate::driver::export_request;
use crate::messages;
use crate::registry::{ClaimNews, GroupClaim};
use crate::run_book::{RunRecord, Shown};
use crate::stores::store_failure;
use pruning_run::{Evaluation, Event, ExportResult, Fault, Measurement, RunState, TaskResult};
use recipe::Recipe;
use std::collections::VecDeque;
use std::future::Future;
use std::sync::Arc;
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;
use tracing::{Instrument, instrument};
use wire::client::worker_client;
use wire::convert::{data, recipe as recipe_message, run};
use wire::status::{Failure, Reason, chain};
use wire::{EvaluationSpec, ExportSpec, TaskSpec};

/// Label of what is measured after a run.
const EXPORTED: &str = "exported";

/// What EvaluateRun is to measure.
#[derive(Debug)]
pub(crate) struct Wanted {
    pub(crate) evaluation: Option<EvaluationSpec>,
    pub(crate) tasks: Option<TaskSpec>,
}

/// What EvaluateRun has measured, in the order of what was wanted.
#[derive(Debug, Default)]
pub(crate) struct Measured {
    pub(crate) evaluations: Vec<Evaluation>,
    pub(crate) tasks: Vec<TaskResult>,
}

impl Wanted {
    fn measurements(&self) -> VecDeque<Measurement> {
        let windows = self.evaluation.as_ref().map_or(0, |evaluation| evaluation.windows.len());
        let tasks = self.tasks.as_ref().map_or(0, |tasks| tasks.files.len());
        let windows = (0..windows).map(|index| Measurement::Window { index });
        windows.chain((0..tasks).map(|index| Measurement::Task { index })).collect()
    }
}

/// Measures the exported model of a run on another text, or on tasks.
///
/// # Errors
/// When nothing was exported, no worker is idle, or the worker fails.
#[instrument(skip_all, fields(run_id = %record.id))]
pub(crate) async fn evaluate(
    context: &Arc<Context>,
    record: &Arc<RunRecord>,
    wanted: Wanted,
) -> Result<Measured, Failure> {
    let Some(exported) = record.shown().export else {
        return Err(not_ready(record, "has not exported a model yet"));
    };
    let claim = claim_one(context, record)?;
    let steps = record.spec.recipe.steps;
    let plan = LoadPlan {
        model: exported.path,
        recipe: recipe_message::to_pb(&Recipe { steps: 0, pruning: None, ..record.spec.recipe.clone() }),
        training_data: Vec::new(),
        evaluation: wanted.evaluation.as_ref().map(data::evaluation_to_pb),
        tasks: wanted.tasks.as_ref().map(data::tasks_to_pb),
        restore: None,
    };
    let mut left = wanted.measurements();
    let session_id = format!("{}-evaluate-{}", record.id, uuid::Uuid::new_v4().simple());
    let (deadlines, peers) = (context.deadlines, context.peers.clone());
    in_background(context, move |given_up| async move {
        let (sender, mut outcomes) = mpsc::channel(4);
        let mut calls = Calls::new(session_id, claim.workers(), &peers, deadlines, sender)
            .map_err(|cause| Failure::new(Reason::Internal, cause))?;
        let mut claim = claim;
        calls.load(&plan);
        let mut measured = Measured::default();
        let result = loop {
            let event = tokio::select! {
                Some(event) = outcomes.recv() => event,
                news = claim.next_news() => match news {
                    ClaimNews::Lost { id, cause } => break Err(worker_failure(&id, &Fault::Own(cause))),
                    // It is soon over.
                    ClaimNews::Draining { .. } => continue,
                },
                () = given_up.cancelled() => break Err(Failure::new(Reason::Aborted, "the caller went away")),
            };
            match event {
                Event::Loaded { .. } => {}
                Event::Evaluated {
                    negative_log_likelihood,
                    predicted_tokens,
                    window_tokens,
                    duration,
                    ..
                } => {
                    if predicted_tokens == 0 || !negative_log_likelihood.is_finite() {
                        let message = format!(
                            "{negative_log_likelihood} nats over {predicted_tokens} tokens are no measurement"
                        );
                        break Err(Failure::new(Reason::NotFinite, message));
                    }
                    measured.evaluations.push(Evaluation {
                        label: EXPORTED.to_owned(),
                        perplexity: (negative_log_likelihood / predicted_tokens as f64).exp(),
                        negative_log_likelihood,
                        predicted_tokens,
                        step: steps,
                        duration,
                        window_tokens,
                    });
                }
                Event::TaskEvaluated { score, duration, .. } => {
                    if !score.is_sound() {
                        let message = format!(
                            "task `{}`: {} right of {}, {} nats are no measurement",
                            score.task, score.correct, score.count, score.log_likelihood
                        );
                        break Err(Failure::new(Reason::NotFinite, message));
                    }
                    let label = EXPORTED.to_owned();
                    measured.tasks.push(TaskResult { label, score, step: steps, duration });
                }
                Event::RankFailed { fault, .. } => {
                    let id = claim.workers().first().map_or("", |worker| worker.id.as_str());
                    break Err(worker_failure(id, &fault));
                }
                Event::WorkersShort { .. }
                | Event::WorkersAssigned { .. }
                | Event::RendezvousOpened { .. }
                | Event::Joined { .. }
                | Event::Scores { .. }
                | Event::StepEnded { .. }
                | Event::TrainEnded { .. }
                | Event::Calibrated { .. }
                | Event::MaskApplied { .. }
                | Event::Snapshotted { .. }
                | Event::Checkpointed { .. }
                | Event::CheckpointFailed { .. }
                | Event::CheckpointWritten { .. }
                | Event::Restored { .. }
                | Event::RestoreFailed { .. }
                | Event::PauseRequested { .. }
                | Event::ResumeRequested { .. }
                | Event::YieldRequested { .. }
                | Event::SessionsAborted
                | Event::Exported { .. }
                | Event::WorkerLost { .. }
                | Event::CoordinatorFailed { .. }
                | Event::CancelRequested { .. }
                | Event::Woken => continue,
            }
            match left.pop_front() {
                Some(measurement) => calls.evaluate(measurement),
                None => break Ok(measured),
            }
        };
        // A failure here is logged, and the worker drops the session at its next Load.
        let _ = calls.abort_sessions().await;
        drop(claim);
        result
    })
    .await
}

/// Writes the result of a run once more.
///
/// # Errors
/// When the run has not ended well, has no checkpoint, no worker is idle, or the worker fails.
#[instrument(skip_all, fields(run_id = %record.id))]
pub(crate) async fn export(
    context: &Arc<Context>,
    record: &Arc<RunRecord>,
    spec: ExportSpec,
) -> Result<ExportResult, Failure> {
    let Shown { state, checkpoint, .. } = record.shown();
    if state != RunState::Succeeded {
        return Err(not_ready(record, "has not ended well"));
    }
    let Some(checkpoint) = checkpoint.filter(|checkpoint| checkpoint.with_logits) else {
        return Err(not_ready(record, "took no optimizer step, so there is nothing to export"));
    };
    let state = context.stores.restore(&checkpoint.place).await.map_err(store_failure)?;
    let claim = claim_one(context, record)?;
    let folder = context.stores.folder(&checkpoint.place);
    let export = Some(run::export_to_pb(&spec));
    let request = export_request(record, folder, &state.shards, &state.keep_mask, export);
    let (deadline, of_run, peers) = (context.deadlines.export, record.clone(), context.peers.clone());
    let stores = context.stores.clone();
    in_background(context, move |given_up| async move {
        let worker = claim.workers().first().cloned().unwrap_or_default();
        let channel = peers.lazy(&worker.endpoint).map_err(|error| {
            Failure::new(Reason::Internal, format!("worker `{}`: {}", worker.id, chain(&error)))
        })?;
        let writing = in_time("Export", deadline, export_on(worker_client(channel), request, deadline));
        let written = tokio::select! {
            written = writing => written,
            () = given_up.cancelled() => return Err(Failure::new(Reason::Aborted, "the caller went away")),
        };
        drop(claim);
        let result = messages::export_from(written.map_err(|fault| worker_failure(&worker.id, &fault))?);
        if of_run.shown().export.is_none() {
            stores.set_late_export(&of_run.id, &result).await.map_err(store_failure)?;
            of_run.set_export(result.clone());
        }
        Ok(result)
    })
    .await
}

fn not_ready(record: &RunRecord, why: &str) -> Failure {
    Failure::new(Reason::RunNotReady, format!("run `{}` {why}", record.id)).with_fact("run_id", &record.id)
}

fn claim_one(context: &Arc<Context>, record: &RunRecord) -> Result<GroupClaim, Failure> {
    context.registry.claim_one(&record.id.0, &record.spec.worker_pool).ok_or_else(|| {
        let registered = context.registry.count();
        Failure::new(
            Reason::NoIdleWorker,
            format!("none of {registered} registered workers is idle; try again later"),
        )
    })
}

fn worker_failure(worker_id: &str, fault: &Fault) -> Failure {
    let (Fault::Own(message) | Fault::Lasting(message) | Fault::PeerLost(message)) = fault;
    Failure::new(Reason::Refused, format!("worker `{worker_id}` failed: {message}"))
        .with_fact("worker_id", worker_id)
}

/// Runs `work` to its end even when the caller goes away, which it is told of, or the coordinator stops.
async fn in_background<T, Work>(
    context: &Arc<Context>,
    work: impl FnOnce(CancellationToken) -> Work,
) -> Result<T, Failure>
where
    T: Send + 'static,
    Work: Future<Output = Result<T, Failure>> + Send + 'static,
{
    let given_up = context.stopping.child_token();
    let (sender, outcome) = oneshot::channel();
    let work = work(given_up.clone());
    let told = async move {
        // The caller may have gone away.
        let _ = sender.send(work.await);
    };
    let guard = given_up.drop_guard();
    context.tasks.spawn(told.in_current_span());
    let result = outcome.await;
    drop(guard);
    result.unwrap_or_else(|_| Err(Failure::new(Reason::Internal, "the call to the worker was dropped")))
}
