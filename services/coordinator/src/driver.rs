//! The loop that performs a run's effects and returns their outcomes as events, and nothing else: what is to be done is
//! `pruning-run`'s to say.

use crate::calls::{Calls, LoadPlan};
use crate::context::Context;
use crate::metrics;
use crate::records::StoredEvent;
use crate::registry::{ClaimNews, GroupClaim, Ticket, Turn};
use crate::run_book::RunRecord;
use crate::stores::{Append, StoresError};
use backon::{ExponentialBuilder, Retryable};
use opentelemetry::trace::{Span as _, TraceContextExt, Tracer};
use pruning::MovingAverage;
use pruning_run::{
    CheckpointRef, Effect, Event, Restore, Run, RunEvent, RunEventKind, RunId, SavedState, WorkerId,
    transition,
};
use run_store::StoreError;
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};
use tokio::sync::mpsc;
use tracing::{Instrument, Span, debug, field, info, info_span, warn};
use tracing_opentelemetry::OpenTelemetrySpanExt;
use wire::convert::{data, mask, recipe, run};
use wire::pb;
use wire::status::chain;

/// Outcomes that may wait to be read; beyond it the workers' streams are held back.
const OUTCOMES: usize = 64;
/// Times that events are offered to a store that fails, and how long that may go on.
const STORE_TRIES: usize = 8;
const LONGEST_STORE_PAUSE: Duration = Duration::from_secs(5);
/// How often a store that has failed is asked whether it is back.
const STORE_CHECK: Duration = Duration::from_secs(3);

/// Where a driver begins.
pub(crate) enum Start {
    /// A run that was just created, its first events stored and shown.
    Created(Box<Run>, Vec<Effect>),
    /// A run that another process has driven, as the store has it.
    Stored(Box<Run>, Vec<Effect>),
}

/// Why a driver has stopped.
enum Stopped {
    /// The run has ended, or rests until the coordinator starts anew.
    Done,
    /// What the run does cannot be stored.
    StoreFailed(String),
    /// Another coordinator has the store.
    Fenced,
}

/// Drives a run to its end, in a span of the caller's trace that outlives the caller's own. It stands in the queue for
/// workers as soon as this is called.
pub(crate) fn drive(
    context: Arc<Context>,
    record: Arc<RunRecord>,
    start: Start,
    requests: mpsc::UnboundedReceiver<Event>,
) -> impl Future<Output = ()> + Send {
    let span = run_span(&record.id);
    let (run, effects, stored) = match start {
        Start::Created(run, effects) => (run, effects, true),
        Start::Stored(run, effects) => (run, effects, false),
    };
    let mut driver = Driver::new(context, record, *run);
    // Those who were created first come first.
    let (queueing, rest): (Vec<Effect>, Vec<Effect>) =
        effects.into_iter().partition(|effect| matches!(effect, Effect::Enqueue { .. }));
    for effect in queueing {
        if let Effect::Enqueue { workers, at_least } = effect {
            driver.enqueue(workers, at_least);
        }
    }
    let fresh = |effect: &Effect| !(stored && matches!(effect, Effect::Record(_)));
    drive_on(driver, rest.into_iter().filter(fresh).collect(), requests).instrument(span)
}

async fn drive_on(
    mut driver: Driver,
    mut effects: Vec<Effect>,
    mut requests: mpsc::UnboundedReceiver<Event>,
) {
    loop {
        driver.perform(effects).await;
        let (context, record) = (driver.context.clone(), driver.record.clone());
        match driver.run_to_end(&mut requests).await {
            Stopped::Done => return,
            Stopped::Fenced => {
                context.fenced.cancel();
                return;
            }
            Stopped::StoreFailed(cause) => {
                record.set_trouble(Some(format!("what it does cannot be stored: {cause}")));
                let Some(run) = reloaded(&context, &record).await else { return };
                record.set_trouble(None);
                driver = Driver::new(context, record, run.0);
                effects = run.1;
            }
        }
    }
}

/// The run as the store has it, once the store answers again.
async fn reloaded(context: &Arc<Context>, record: &Arc<RunRecord>) -> Option<(Run, Vec<Effect>)> {
    loop {
        tokio::select! {
            () = context.stopping.cancelled() => return None,
            () = tokio::time::sleep(STORE_CHECK) => {}
        }
        let read = async {
            context.stores.check().await?;
            context.stores.history(&record.id, |event| record.publish(event)).await
        };
        match read.await {
            Ok(history) => {
                info!(run_id = %record.id, "the store is back");
                let origin = record.fork.as_ref().map(|fork| fork.checkpoint.clone());
                let now = SystemTime::now();
                return Some(Run::resumed(record.id.clone(), record.setup.clone(), origin, history, now));
            }
            Err(StoresError::Store(StoreError::Fenced)) => {
                context.fenced.cancel();
                return None;
            }
            Err(error) => debug!(error = %chain(&error), "the store still fails"),
        }
    }
}

/// The span of a run: the caller's trace goes on, but its span need not stay open as long as the run.
fn run_span(run_id: &RunId) -> Span {
    let span = info_span!(parent: None, "run", %run_id, trace_id = field::Empty);
    let caller = Span::current().context();
    if caller.span().span_context().is_valid()
        && let Err(error) = span.set_parent(caller)
    {
        debug!(%error, "the run starts a trace of its own");
    }
    let trace = span.context().span().span_context().clone();
    if trace.is_valid() {
        span.record("trace_id", field::display(trace.trace_id()));
    }
    span
}

/// Only afterwards is it known that there was a decision.
fn span_of_decision(began: SystemTime) {
    let tracer = opentelemetry::global::tracer("espalier");
    let span = tracer.span_builder("decision").with_start_time(began);
    span.start_with_context(&tracer, &Span::current().context()).end();
}

struct Driver {
    context: Arc<Context>,
    record: Arc<RunRecord>,
    /// Absent only while a transition consumes it.
    run: Option<Run>,
    /// Held while queued.
    ticket: Option<Ticket>,
    /// Held from the assignment on.
    claim: Option<GroupClaim>,
    /// To the group's workers; outcomes of an earlier group never reach a later one.
    calls: Option<Calls>,
    outcomes: Option<mpsc::Receiver<Event>>,
    /// Outcomes of the stores.
    own: (mpsc::UnboundedSender<Event>, mpsc::UnboundedReceiver<Event>),
    wake: Option<SystemTime>,
    /// Events of our own making, seen before any other.
    pending: VecDeque<Event>,
    /// What the decision that is recorded next was made on.
    importance: Option<Arc<MovingAverage>>,
    /// When the last step's report came.
    reported: Option<Instant>,
    /// Ranks that have not applied the mask decided last.
    masks_awaited: usize,
    stopped: Option<Stopped>,
}

impl Driver {
    fn new(context: Arc<Context>, record: Arc<RunRecord>, run: Run) -> Self {
        Self {
            context,
            record,
            run: Some(run),
            ticket: None,
            claim: None,
            calls: None,
            outcomes: None,
            own: mpsc::unbounded_channel(),
            wake: None,
            pending: VecDeque::new(),
            importance: None,
            reported: None,
            masks_awaited: 0,
            stopped: None,
        }
    }

    async fn run_to_end(mut self, requests: &mut mpsc::UnboundedReceiver<Event>) -> Stopped {
        let mut yielded = false;
        loop {
            if let Some(stopped) = self.stopped.take() {
                self.drop_group().await;
                return stopped;
            }
            if self.has_ended() {
                return Stopped::Done;
            }
            let event = match self.pending.pop_front() {
                Some(event) => event,
                None => tokio::select! {
                    biased;
                    () = self.context.stopping.cancelled(), if !yielded => {
                        yielded = true;
                        let reason = "the coordinator was shut down".to_owned();
                        Event::YieldRequested { reason, requeue: false }
                    }
                    Some(event) = requests.recv() => event,
                    news = next_news(&mut self.claim) => match news {
                        ClaimNews::Lost { id, cause } => self.lose(id, cause),
                        ClaimNews::Draining { id } => Event::YieldRequested {
                            reason: format!("worker `{id}` is taken out of service"),
                            requeue: true,
                        },
                    },
                    Some(event) = self.own.1.recv() => event,
                    Some(event) = next_outcome(&mut self.outcomes) => event,
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

    /// A worker of the group is gone, or does not advance.
    fn lose(&mut self, id: String, cause: String) -> Event {
        let tp_rank =
            self.claim.as_ref().and_then(|claim| claim.workers().iter().position(|worker| worker.id == id));
        if let (Some(tp_rank), Some(calls)) = (tp_rank, &mut self.calls) {
            calls.lose(tp_rank);
        }
        Event::WorkerLost { worker: WorkerId(id), cause }
    }

    /// Whether nothing more will happen in this process.
    fn has_ended(&self) -> bool {
        self.run.as_ref().is_none_or(|run| run.state().has_ended() || run.rests())
    }

    /// Lets the machine see an event and does what it asks for.
    async fn advance(&mut self, event: Event) {
        let Some(run) = self.run.take() else { return };
        self.time_decision(&event);
        let began = SystemTime::now();
        let (run, effects) = transition(run, event, began);
        if effects.iter().any(|effect| matches!(effect, Effect::KeepImportance { .. })) {
            span_of_decision(began);
        }
        if effects.iter().any(|effect| matches!(effect, Effect::ApplyMask { .. })) {
            self.masks_awaited = run.tp_degree();
        }
        self.run = Some(run);
        self.perform(effects).await;
    }

    /// Measures from the last report before a decision to the last rank that has its mask.
    fn time_decision(&mut self, event: &Event) {
        if let Event::StepEnded { .. } = event {
            self.reported = Some(Instant::now());
        }
        if let Event::MaskApplied { .. } = event
            && self.masks_awaited > 0
        {
            self.masks_awaited -= 1;
            if let (0, Some(reported)) = (self.masks_awaited, self.reported) {
                metrics::note_decision(&self.record.id, reported.elapsed());
            }
        }
    }

    fn enqueue(&mut self, workers: usize, at_least: usize) {
        let pool = &self.record.spec.worker_pool;
        self.ticket = Some(self.context.registry.enqueue(&self.record.id.0, pool, workers, at_least));
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
                self.claim = Some(claim);
                match self.call_group() {
                    Ok(()) => {
                        self.record.assign(ids.clone());
                        Event::WorkersAssigned { workers: ids.into_iter().map(WorkerId).collect() }
                    }
                    Err(cause) => Event::CoordinatorFailed { cause },
                }
            }
        }
    }

    /// A fresh session on the group's workers.
    fn call_group(&mut self) -> Result<(), String> {
        let Some(claim) = &self.claim else { return Err("no workers are held".to_owned()) };
        let (sender, outcomes) = mpsc::channel(OUTCOMES);
        let session_id = format!("{}-{}", self.record.id, &uuid::Uuid::new_v4().simple().to_string()[..8]);
        self.calls = Some(Calls::new(
            session_id,
            claim.workers(),
            &self.context.peers,
            self.context.deadlines,
            sender,
        )?);
        self.outcomes = Some(outcomes);
        Ok(())
    }

    async fn perform(&mut self, effects: Vec<Effect>) {
        let mut events = Vec::new();
        for effect in effects {
            match effect {
                Effect::Record(event) => {
                    if let RunEventKind::StateChange { state, message } = &event.kind {
                        info!(?state, message, "state changed");
                    }
                    events.push(event);
                    continue;
                }
                Effect::KeepImportance { importance, .. } => {
                    self.importance = Some(importance);
                    continue;
                }
                Effect::Enqueue { .. }
                | Effect::LeaveQueue
                | Effect::Restore(_)
                | Effect::Load { .. }
                | Effect::OpenRendezvous
                | Effect::JoinGroup { .. }
                | Effect::Evaluate(_)
                | Effect::Train { .. }
                | Effect::Calibrate { .. }
                | Effect::ApplyMask { .. }
                | Effect::Checkpoint { .. }
                | Effect::Commit { .. }
                | Effect::Retain(_)
                | Effect::AbortSessions
                | Effect::ReleaseWorkers
                | Effect::ReleaseAllButFirst
                | Effect::Export { .. }
                | Effect::WakeAt(_)
                | Effect::Refuse(_) => {}
            }
            // What is done depends on what was recorded before it.
            if !self.store(std::mem::take(&mut events)).await {
                return;
            }
            self.act(effect).await;
        }
        self.store(events).await;
    }

    async fn act(&mut self, effect: Effect) {
        match effect {
            Effect::Enqueue { workers, at_least } => self.enqueue(workers, at_least),
            Effect::LeaveQueue => {
                self.ticket = None;
                if !self.run.as_ref().is_some_and(Run::holds_workers) {
                    self.calls = None;
                    self.outcomes = None;
                    self.claim = None;
                }
            }
            Effect::WakeAt(time) => self.wake = Some(self.wake.map_or(time, |wake| wake.min(time))),
            Effect::Refuse(refusal) => warn!(%refusal, "event refused"),
            Effect::ReleaseAllButFirst => {
                if let Some(claim) = &self.claim {
                    claim.release_all_but_first();
                }
            }
            Effect::ReleaseWorkers => {
                self.calls = None;
                self.outcomes = None;
                self.claim = None;
                // Of a run that has ended it stays known who held it last.
                if !self.has_ended() {
                    self.record.assign(Vec::new());
                }
            }
            Effect::AbortSessions => self.abort_sessions().await,
            Effect::Restore(place) => self.restore(place),
            Effect::Commit { name, state } => self.commit(name, state),
            Effect::Retain(kept) => self.retain(kept),
            Effect::Record(_) | Effect::KeepImportance { .. } => {}
            Effect::Load { .. }
            | Effect::OpenRendezvous
            | Effect::JoinGroup { .. }
            | Effect::Evaluate(_)
            | Effect::Train { .. }
            | Effect::Calibrate { .. }
            | Effect::ApplyMask { .. }
            | Effect::Checkpoint { .. }
            | Effect::Export { .. } => self.call(effect),
        }
    }

    /// Starts a call to the workers.
    fn call(&mut self, effect: Effect) {
        let stores = &self.context.stores;
        let record = &self.record;
        let Some(calls) = &mut self.calls else { return };
        match effect {
            Effect::Load { restore } => {
                info!(restores = restore.is_some(), "loading");
                let restore =
                    restore.map(|restore| restore_message(&stores.folder(&restore.checkpoint), &restore));
                calls.load(&load_plan(record, restore));
            }
            Effect::OpenRendezvous => calls.open_rendezvous(),
            Effect::JoinGroup { rendezvous } => calls.join_group(rendezvous),
            Effect::Evaluate(measurement) => {
                info!(?measurement, "evaluating");
                calls.evaluate(measurement);
            }
            Effect::Train { first_step, end_step, generation } => {
                debug!(first_step, end_step, %generation, "training");
                calls.train(&record.id, first_step, end_step, generation);
            }
            Effect::Calibrate { generation } => {
                info!(%generation, "calibrating");
                calls.calibrate(generation);
            }
            Effect::ApplyMask { generation, keep_mask } => {
                info!(%generation, "mask decided");
                let pruning = record.spec.recipe.pruning.as_ref();
                let compensation = pruning.map(|pruning| pruning.compensation).unwrap_or_default();
                calls.apply_mask(generation, &keep_mask, compensation);
            }
            Effect::Checkpoint { name, with_logits } => {
                debug!(name, "writing a checkpoint");
                let place = self.run.as_ref().map(|run| place_of(record, run, &name));
                if let Some(place) = place {
                    calls.checkpoint(&name, &stores.folder(&place), with_logits);
                }
            }
            Effect::Export { checkpoint, shards, keep_mask } => {
                info!("exporting");
                let export = record.spec.export.as_ref().map(run::export_to_pb);
                let folder = stores.folder(&checkpoint);
                let request = export_request(record, folder, &shards, &keep_mask, export);
                let replace = self.run.as_ref().is_some_and(Run::exports_again);
                calls.export(pb::ExportRequest { replace, ..request });
            }
            Effect::Record(_)
            | Effect::KeepImportance { .. }
            | Effect::Enqueue { .. }
            | Effect::LeaveQueue
            | Effect::Restore(_)
            | Effect::Commit { .. }
            | Effect::Retain(_)
            | Effect::WakeAt(_)
            | Effect::Refuse(_)
            | Effect::ReleaseWorkers
            | Effect::ReleaseAllButFirst
            | Effect::AbortSessions => {}
        }
    }

    fn restore(&mut self, place: CheckpointRef) {
        let (stores, run_id, own) = (self.context.stores.clone(), self.record.id.clone(), self.own.0.clone());
        let kept = self.run.as_ref().map(Run::checkpoints).unwrap_or_default();
        let reading = async move {
            // No group writes now: what has no manifest will never have one.
            if let Err(error) = stores.sweep(&run_id, &kept).await {
                debug!(error = %chain(&error), "unfinished checkpoints were not removed");
            }
            let event = match stores.restore(&place).await {
                Ok(state) => Event::Restored { state: Arc::new(state) },
                Err(error) => Event::RestoreFailed { cause: chain(&error), damaged: error.is_damage() },
            };
            let _ = own.send(event);
        };
        self.context.tasks.spawn(reading.in_current_span());
    }

    fn commit(&mut self, name: String, state: Arc<SavedState>) {
        let (stores, own) = (self.context.stores.clone(), self.own.0.clone());
        let place = CheckpointRef {
            run_id: self.record.id.clone(),
            name: name.clone(),
            steps_done: state.steps_done,
            generation: state.generation,
        };
        let writing = async move {
            let event = match stores.commit(&place, &state).await {
                Ok(size_bytes) => Event::CheckpointWritten { name, size_bytes },
                Err(error) => Event::CheckpointFailed { name, cause: chain(&error) },
            };
            let _ = own.send(event);
        };
        self.context.tasks.spawn(writing.in_current_span());
    }

    fn retain(&mut self, kept: Vec<CheckpointRef>) {
        let (stores, run_id) = (self.context.stores.clone(), self.record.id.clone());
        let removing = async move {
            if let Err(error) = stores.retain(&run_id, &kept).await {
                warn!(error = %chain(&error), "old checkpoints were not removed");
            }
        };
        self.context.tasks.spawn(removing.in_current_span());
    }

    async fn abort_sessions(&mut self) {
        let outcome = match &mut self.calls {
            Some(calls) => calls.abort_sessions().await,
            None => Ok(()),
        };
        // What is still on its way from the sessions is of no interest any more.
        if let Err(cause) = self.call_group() {
            debug!(cause, "no session follows");
        }
        if !self.has_ended() {
            self.pending.push_back(match outcome {
                Ok(()) => Event::SessionsAborted,
                Err(fault) => Event::RankFailed { tp_rank: 0, fault },
            });
        }
    }

    /// Leaves the workers to others when the run cannot be driven on.
    async fn drop_group(&mut self) {
        if let Some(calls) = &mut self.calls {
            let _ = calls.abort_sessions().await;
        }
        self.record.assign(Vec::new());
    }

    /// Stores events for good, then shows them. False when that is not possible: the run must not go on then.
    async fn store(&mut self, events: Vec<RunEvent>) -> bool {
        if events.is_empty() {
            return self.stopped.is_none();
        }
        if self.stopped.is_some() {
            return false;
        }
        let importance = self.importance.take_if(|_| events.iter().any(is_decision));
        let append = Append { run_id: &self.record.id, events: &events, importance: importance.as_deref() };
        let pauses = ExponentialBuilder::default()
            .with_jitter()
            .with_max_delay(LONGEST_STORE_PAUSE)
            .with_max_times(STORE_TRIES);
        let may_pass = |error: &StoresError| match error {
            StoresError::Store(error) => error.may_pass(),
            StoresError::Blob(_) | StoresError::Record(_) | StoresError::OtherCheckpoint { .. } => false,
        };
        let tell = |error: &StoresError, pause: Duration| {
            warn!(error = %chain(error), pause_seconds = pause.as_secs_f64(), "events were not stored yet");
        };
        let append = &append;
        let stored = (|| async { self.context.stores.append(append).await })
            .retry(pauses)
            .sleep(tokio::time::sleep)
            .when(may_pass)
            .notify(tell)
            .await;
        match stored {
            Ok(()) => {
                for event in &events {
                    metrics::note(&self.record.id, event);
                    self.record.publish(StoredEvent::of(event));
                }
                true
            }
            Err(StoresError::Store(StoreError::Fenced)) => {
                self.stopped = Some(Stopped::Fenced);
                false
            }
            Err(error) => {
                let cause = chain(&error);
                warn!(cause, "events cannot be stored");
                self.stopped = Some(Stopped::StoreFailed(cause));
                false
            }
        }
    }
}

fn is_decision(event: &RunEvent) -> bool {
    matches!(event.kind, RunEventKind::Decision(_))
}

/// The checkpoint that is taken now.
fn place_of(record: &RunRecord, run: &Run, name: &str) -> CheckpointRef {
    CheckpointRef {
        run_id: record.id.clone(),
        name: name.to_owned(),
        steps_done: run.steps_done(),
        generation: run.generation(),
    }
}

fn load_plan(record: &RunRecord, restore: Option<pb::Restore>) -> LoadPlan {
    let spec = &record.spec;
    LoadPlan {
        model: spec.model.clone(),
        recipe: recipe::to_pb(&spec.recipe),
        training_data: data::sources_to_pb(&spec.training_data),
        evaluation: spec.evaluation.as_ref().map(data::evaluation_to_pb),
        tasks: spec.tasks.as_ref().map(data::tasks_to_pb),
        restore,
    }
}

fn restore_message(folder: &str, restore: &Restore) -> pb::Restore {
    pb::Restore {
        url: folder.to_owned(),
        shards: restore.state.shards.iter().map(shard_message).collect(),
        generation: restore.state.generation.0,
        next_step: restore.state.steps_done,
        keep_mask: Some(mask::to_pb(&restore.state.keep_mask)),
    }
}

fn shard_message(shard: &pruning_run::ShardFile) -> pb::CheckpointShard {
    pb::CheckpointShard {
        file: shard.file.clone(),
        sha256: shard.sha256.clone(),
        size_bytes: shard.size_bytes,
    }
}

/// What a worker needs to write a run's result.
pub(crate) fn export_request(
    record: &RunRecord,
    folder: String,
    shards: &[pruning_run::ShardFile],
    keep_mask: &pruning::KeepMask,
    export: Option<pb::ExportSpec>,
) -> pb::ExportRequest {
    pb::ExportRequest {
        model: record.spec.model.clone(),
        recipe: Some(recipe::to_pb(&record.spec.recipe)),
        checkpoint: folder,
        shards: shards.iter().map(shard_message).collect(),
        keep_mask: Some(mask::to_pb(keep_mask)),
        export,
        run_id: record.id.0.clone(),
        replace: false,
    }
}

async fn next_news(claim: &mut Option<GroupClaim>) -> ClaimNews {
    match claim {
        Some(claim) => claim.next_news().await,
        None => std::future::pending().await,
    }
}

async fn next_outcome(outcomes: &mut Option<mpsc::Receiver<Event>>) -> Option<Event> {
    match outcomes {
        Some(outcomes) => match outcomes.recv().await {
            Some(event) => Some(event),
            // All calls have ended; nothing comes until there are new ones.
            None => std::future::pending().await,
        },
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
