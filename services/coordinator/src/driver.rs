//! The loop that performs a run's effects and returns their outcomes as events, and nothing else: what is to be done is
//! `pruning-run`'s to say.

use crate::calls::{Calls, LoadPlan};
use crate::context::Context;
use crate::journal::Journal;
use crate::registry::{GroupClaim, Ticket, Turn};
use crate::run_book::RunRecord;
use opentelemetry::trace::TraceContextExt;
use pruning_run::{Effect, Event, Run, RunEvent, RunEventKind, RunId, WorkerId, transition};
use std::collections::VecDeque;
use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;
use tokio::sync::mpsc;
use tracing::{Instrument, Span, debug, info, info_span, warn};
use tracing_opentelemetry::OpenTelemetrySpanExt;
use wire::convert::{data, mask, recipe, run};
use wire::pb;
use wire::status::chain;

/// Outcomes that may wait to be read; beyond it the workers' streams are held back.
const OUTCOMES: usize = 64;

/// Drives a run to its end, in a span of the caller's trace that outlives the caller's own.
pub(crate) fn drive(
    context: Arc<Context>,
    record: Arc<RunRecord>,
    ticket: Ticket,
) -> impl Future<Output = ()> + Send {
    let span = run_span(&record.id);
    drive_in_span(context, record, ticket).instrument(span)
}

/// The span of a run: the caller's trace goes on, but its span need not stay open as long as the run.
fn run_span(run_id: &RunId) -> Span {
    let span = info_span!(parent: None, "run", %run_id);
    let caller = Span::current().context();
    if caller.span().span_context().is_valid()
        && let Err(error) = span.set_parent(caller)
    {
        debug!(%error, "the run starts a trace of its own");
    }
    span
}

async fn drive_in_span(context: Arc<Context>, record: Arc<RunRecord>, ticket: Ticket) {
    let (sender, outcomes) = mpsc::channel(OUTCOMES);
    let (run, effects) = Run::new(record.setup.clone(), SystemTime::now());
    let journal = Journal::open(&context.data_dir, &record.id.0);
    let mut driver = Driver {
        context,
        record,
        run: Some(run),
        journal: None,
        ticket: Some(ticket),
        claim: None,
        calls: None,
        sender,
        wake: None,
        pending: VecDeque::new(),
    };
    match journal {
        Ok(journal) => driver.journal = Some(journal),
        Err(error) => driver.pending.push_back(Event::CoordinatorFailed { cause: chain(&error) }),
    }
    driver.perform(effects).await;
    driver.run_to_end(outcomes).await;
}

struct Driver {
    context: Arc<Context>,
    record: Arc<RunRecord>,
    /// Absent only while a transition consumes it.
    run: Option<Run>,
    journal: Option<Journal>,
    /// Held while queued.
    ticket: Option<Ticket>,
    /// Held from the assignment on.
    claim: Option<GroupClaim>,
    calls: Option<Calls>,
    sender: mpsc::Sender<Event>,
    wake: Option<SystemTime>,
    /// Events of our own making, seen before any other.
    pending: VecDeque<Event>,
}

impl Driver {
    async fn run_to_end(mut self, mut outcomes: mpsc::Receiver<Event>) {
        let mut cancelled = false;
        while !self.has_ended() {
            let event = match self.pending.pop_front() {
                Some(event) => event,
                None => tokio::select! {
                    biased;
                    reason = self.record.cancel_requested(), if !cancelled => {
                        cancelled = true;
                        Event::CancelRequested { reason }
                    }
                    lost = next_lost(&mut self.claim) => {
                        Event::WorkerLost { worker: WorkerId(lost.id), cause: lost.cause }
                    }
                    Some(event) = outcomes.recv() => event,
                    turn = next_turn(&mut self.ticket) => self.take_turn(turn),
                    () = sleep_until(self.wake) => {
                        self.wake = None;
                        Event::Woken
                    }
                },
            };
            self.advance(event).await;
        }
    }

    fn has_ended(&self) -> bool {
        self.run.as_ref().is_none_or(|run| run.state().has_ended())
    }

    /// Lets the machine see an event and does what it asks for.
    async fn advance(&mut self, event: Event) {
        let Some(run) = self.run.take() else { return };
        let (run, effects) = transition(run, event, SystemTime::now());
        if let Some(shards) = run.shards() {
            self.record.set_shards(shards.to_vec());
        }
        self.run = Some(run);
        self.perform(effects).await;
    }

    fn take_turn(&mut self, turn: Turn) -> Event {
        match turn {
            Turn::Waiting(standing) => Event::WorkersShort {
                idle: standing.idle,
                registered: standing.registered,
                ahead: standing.ahead,
            },
            Turn::Claimed(claim) => {
                self.ticket = None;
                let ids: Vec<String> = claim.workers().iter().map(|worker| worker.id.clone()).collect();
                let session_id = self.record.id.0.clone();
                let calls =
                    Calls::new(session_id, claim.workers(), self.context.deadlines, self.sender.clone());
                self.claim = Some(claim);
                match calls {
                    Ok(calls) => {
                        self.calls = Some(calls);
                        self.record.assign(ids.clone());
                        Event::WorkersAssigned { workers: ids.into_iter().map(WorkerId).collect() }
                    }
                    Err(cause) => Event::CoordinatorFailed { cause },
                }
            }
        }
    }

    async fn perform(&mut self, effects: Vec<Effect>) {
        for effect in effects {
            match effect {
                Effect::Record(event) => self.record_event(event),
                Effect::WakeAt(time) => self.wake = Some(self.wake.map_or(time, |wake| wake.min(time))),
                Effect::Refuse(refusal) => warn!(%refusal, "event refused"),
                Effect::ReleaseAllButFirst => {
                    if let Some(claim) = &self.claim {
                        claim.release_all_but_first();
                    }
                }
                Effect::AbortSessions => self.abort_sessions().await,
                Effect::Load
                | Effect::OpenRendezvous
                | Effect::JoinGroup { .. }
                | Effect::Evaluate(_)
                | Effect::Train { .. }
                | Effect::ApplyMask { .. }
                | Effect::Checkpoint
                | Effect::Export { .. } => self.call(effect),
            }
        }
    }

    /// Starts a call to the workers.
    fn call(&mut self, effect: Effect) {
        // A decision is written down before it is broadcast; without a journal the run is about to fail.
        let (Some(calls), Some(_)) = (&mut self.calls, &self.journal) else { return };
        match effect {
            Effect::Load => {
                info!("loading");
                calls.load(&load_plan(&self.record));
            }
            Effect::OpenRendezvous => calls.open_rendezvous(),
            Effect::JoinGroup { rendezvous } => calls.join_group(rendezvous),
            Effect::Evaluate(measurement) => {
                info!(?measurement, "evaluating");
                calls.evaluate(measurement);
            }
            Effect::Train { first_step, end_step, generation } => {
                info!(first_step, end_step, %generation, "training");
                calls.train(first_step, end_step, generation);
            }
            Effect::ApplyMask { generation, keep_mask } => {
                info!(%generation, "mask decided");
                let pruning = self.record.spec.recipe.pruning.as_ref();
                let compensation = pruning.map(|pruning| pruning.compensation).unwrap_or_default();
                calls.apply_mask(generation, &keep_mask, compensation);
            }
            Effect::Checkpoint => match self.context.make_checkpoint_folder(&self.record.id) {
                Ok(folder) => {
                    info!("writing the checkpoint");
                    calls.checkpoint(&folder.to_string_lossy());
                }
                Err(cause) => self.pending.push_back(Event::CoordinatorFailed { cause }),
            },
            Effect::Export { shards, keep_mask } => {
                info!("exporting");
                let export = self.record.spec.export.as_ref().map(run::export_to_pb);
                let folder = self.context.checkpoint_folder(&self.record.id);
                calls.export(export_request(&self.record, &folder, &shards, &keep_mask, export));
            }
            Effect::Record(_)
            | Effect::WakeAt(_)
            | Effect::Refuse(_)
            | Effect::ReleaseAllButFirst
            | Effect::AbortSessions => {}
        }
    }

    async fn abort_sessions(&mut self) {
        let Some(calls) = &mut self.calls else { return };
        let outcome = calls.abort_sessions().await;
        if !self.has_ended() {
            self.pending.push_back(match outcome {
                Ok(()) => Event::SessionsAborted,
                Err(fault) => Event::RankFailed { tp_rank: 0, fault },
            });
        }
    }

    /// Writes an event down, then shows it. A run whose events cannot be kept must not go on.
    fn record_event(&mut self, event: RunEvent) {
        if let RunEventKind::StateChange { state, message } = &event.kind {
            info!(?state, message, "state changed");
        }
        if let Some(journal) = &mut self.journal
            && let Err(error) = journal.append(&event)
        {
            let cause = chain(&error);
            warn!(cause, "event not written down");
            self.journal = None;
            self.pending.push_back(Event::CoordinatorFailed { cause });
        }
        self.record.publish(event);
    }
}

fn load_plan(record: &RunRecord) -> LoadPlan {
    let spec = &record.spec;
    LoadPlan {
        model: spec.model.clone(),
        recipe: recipe::to_pb(&spec.recipe),
        training_data: data::sources_to_pb(&spec.training_data),
        evaluation: spec.evaluation.as_ref().map(data::evaluation_to_pb),
        tasks: spec.tasks.as_ref().map(data::tasks_to_pb),
    }
}

/// What a worker needs to write a run's result.
pub(crate) fn export_request(
    record: &RunRecord,
    folder: &Path,
    shards: &[pruning_run::ShardFile],
    keep_mask: &pruning::KeepMask,
    export: Option<pb::ExportSpec>,
) -> pb::ExportRequest {
    let shard = |shard: &pruning_run::ShardFile| pb::CheckpointResponse {
        file: shard.file.clone(),
        sha256: shard.sha256.clone(),
    };
    pb::ExportRequest {
        model: record.spec.model.clone(),
        recipe: Some(recipe::to_pb(&record.spec.recipe)),
        checkpoint: folder.to_string_lossy().into_owned(),
        shards: shards.iter().map(shard).collect(),
        keep_mask: Some(mask::to_pb(keep_mask)),
        export,
        run_id: record.id.0.clone(),
    }
}

async fn next_lost(claim: &mut Option<GroupClaim>) -> crate::registry::LostWorker {
    match claim {
        Some(claim) => claim.next_lost().await,
        None => std::future::pending().await,
    }
}

async fn next_turn(ticket: &mut Option<Ticket>) -> Turn {
    match ticket {
        Some(ticket) => ticket.next().await,
        None => std::future::pending().await,
    }
}

async fn sleep_until(time: Option<SystemTime>) {
    match time {
        Some(time) => {
            tokio::time::sleep(time.duration_since(SystemTime::now()).unwrap_or_default()).await;
        }
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use opentelemetry::trace::{TraceId, TracerProvider};
    use opentelemetry_sdk::trace::SdkTracerProvider;
    use tracing_subscriber::layer::SubscriberExt;

    #[test]
    fn a_run_goes_on_in_the_trace_of_the_call_that_made_it() {
        let provider = SdkTracerProvider::builder().build();
        let subscriber = tracing_subscriber::registry()
            .with(tracing_opentelemetry::layer().with_tracer(provider.tracer("test")));
        let trace = |span: &Span| span.context().span().span_context().trace_id();
        tracing::subscriber::with_default(subscriber, || {
            let call = info_span!("create_run");
            let run = call.in_scope(|| run_span(&RunId("r".into())));
            assert_ne!(trace(&call), TraceId::INVALID);
            assert_eq!(trace(&run), trace(&call));
            assert_ne!(trace(&run_span(&RunId("other".into()))), trace(&call));
        });
    }
}
