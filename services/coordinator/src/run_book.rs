//! The runs that this coordinator knows: what is shown of them, and the latest of their numbered events.

use crate::records::{Fork, StoredEvent, StoredRun};
use crate::sync::lock;
use model_spec::LayerSpec;
use pruning_run::{
    Checkpoint, Evaluation, Event, ExportResult, Generation, GuardAction, RunEventKind, RunId, RunSetup,
    RunState, StepReport, TaskResult,
};
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::{Arc, Mutex};
use std::time::SystemTime;
use tokio::sync::{mpsc, watch};
use wire::{RunSpec, pb};

/// Most runs that may be under way or queued at once.
const MAX_LIVE_RUNS: usize = 1000;
/// Events of a run that are kept at hand; older ones are read from the store.
const RECENT_EVENTS: usize = 1024;

/// All runs, in the order in which they were created.
#[derive(Debug, Default)]
pub(crate) struct RunBook {
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    /// By place in the order of creation.
    runs: BTreeMap<u64, Arc<RunRecord>>,
    by_id: HashMap<String, u64>,
    by_request: HashMap<String, u64>,
}

/// Why a run is not taken into the book.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NotBooked {
    #[error("{MAX_LIVE_RUNS} runs are queued or under way, which is the most allowed")]
    TooMany,
    #[error("run `{other}`, which has not ended, exports to the same folder")]
    SameExport { other: RunId },
}

/// One run.
#[derive(Debug)]
pub(crate) struct RunRecord {
    pub(crate) id: RunId,
    /// Place in the order of creation.
    pub(crate) number: u64,
    pub(crate) spec: RunSpec,
    pub(crate) setup: Arc<RunSetup>,
    pub(crate) plan: pb::RunPlan,
    pub(crate) fork: Option<Fork>,
    pub(crate) create_time: SystemTime,
    /// SHA-256 of what the request asked for.
    pub(crate) request_digest: Vec<u8>,
    log: Mutex<Log>,
    /// Revision of the last event.
    revision: watch::Sender<u64>,
    /// To the run's driver, as long as there is one.
    requests: mpsc::UnboundedSender<Event>,
}

#[derive(Debug)]
struct Log {
    recent: VecDeque<Arc<StoredEvent>>,
    shown: Shown,
}

/// What the events so far amount to.
#[derive(Debug, Clone)]
pub(crate) struct Shown {
    pub(crate) revision: u64,
    pub(crate) state: RunState,
    pub(crate) message: String,
    /// What stands in the way of the run, outside of it.
    pub(crate) trouble: Option<String>,
    pub(crate) start_time: Option<SystemTime>,
    pub(crate) end_time: Option<SystemTime>,
    pub(crate) last_step: Option<StepReport>,
    pub(crate) decisions: Vec<ShownDecision>,
    pub(crate) generation: Generation,
    pub(crate) evaluations: Vec<Evaluation>,
    pub(crate) tasks: Vec<TaskResult>,
    pub(crate) export: Option<ExportResult>,
    pub(crate) checkpoint: Option<Checkpoint>,
    pub(crate) checkpoint_time: Option<SystemTime>,
    pub(crate) restarts: u32,
    /// By tensor-parallel rank.
    pub(crate) worker_ids: Vec<String>,
}

/// A decision without its mask, which the store has.
#[derive(Debug, Clone)]
pub(crate) struct ShownDecision {
    pub(crate) revision: u64,
    pub(crate) generation: Generation,
    pub(crate) step: u64,
    pub(crate) sparsity: f64,
    pub(crate) parameters: u64,
    pub(crate) widths: Vec<LayerSpec>,
}

/// Events at hand.
#[derive(Debug)]
pub(crate) enum Recent {
    Events {
        events: Vec<Arc<StoredEvent>>,
        /// The run has ended with the last of them.
        ends: bool,
    },
    /// They lie too far back: the store has them.
    Older,
}

impl RunBook {
    /// Whether another run like this may be taken.
    pub(crate) fn check_room(&self, spec: &RunSpec) -> Result<(), NotBooked> {
        let inner = lock(&self.inner);
        let live: Vec<&Arc<RunRecord>> = inner.runs.values().filter(|run| !run.state().has_ended()).collect();
        if live.len() >= MAX_LIVE_RUNS {
            return Err(NotBooked::TooMany);
        }
        let folder = |spec: &RunSpec| spec.export.as_ref().map(|export| export.path.clone());
        match folder(spec) {
            Some(path) => match live.iter().find(|run| folder(&run.spec).as_ref() == Some(&path)) {
                Some(other) => Err(NotBooked::SameExport { other: other.id.clone() }),
                None => Ok(()),
            },
            None => Ok(()),
        }
    }

    /// Takes in a run that is in the store.
    pub(crate) fn add(&self, record: Arc<RunRecord>, request_id: Option<String>) {
        let mut inner = lock(&self.inner);
        inner.by_id.insert(record.id.0.clone(), record.number);
        if let Some(request) = request_id {
            inner.by_request.insert(request, record.number);
        }
        inner.runs.insert(record.number, record);
    }

    /// Forgets a run.
    pub(crate) fn remove(&self, id: &RunId) {
        let mut inner = lock(&self.inner);
        if let Some(number) = inner.by_id.remove(&id.0) {
            inner.runs.remove(&number);
            inner.by_request.retain(|_, other| *other != number);
        }
    }

    pub(crate) fn get(&self, id: &str) -> Option<Arc<RunRecord>> {
        let inner = lock(&self.inner);
        inner.by_id.get(id).map(|number| inner.runs[number].clone())
    }

    /// The run that an earlier request made.
    pub(crate) fn by_request(&self, request_id: &str) -> Option<Arc<RunRecord>> {
        let inner = lock(&self.inner);
        inner.by_request.get(request_id).map(|number| inner.runs[number].clone())
    }

    /// All runs, newest first.
    pub(crate) fn all(&self) -> Vec<Arc<RunRecord>> {
        lock(&self.inner).runs.values().rev().cloned().collect()
    }
}

/// What a record is made of beside the run itself.
#[derive(Debug)]
pub(crate) struct Identity {
    pub(crate) id: RunId,
    pub(crate) number: u64,
    pub(crate) create_time: SystemTime,
    pub(crate) request_digest: Vec<u8>,
}

impl RunRecord {
    /// A record without events, and where requests to its run arrive.
    pub(crate) fn new(
        identity: Identity,
        run: StoredRun,
        setup: Arc<RunSetup>,
    ) -> (Arc<Self>, mpsc::UnboundedReceiver<Event>) {
        let shown = Shown {
            revision: 0,
            state: RunState::Queued,
            message: String::new(),
            trouble: None,
            start_time: None,
            end_time: None,
            last_step: None,
            decisions: Vec::new(),
            generation: Generation(0),
            evaluations: Vec::new(),
            tasks: Vec::new(),
            export: None,
            checkpoint: None,
            checkpoint_time: None,
            restarts: 0,
            worker_ids: Vec::new(),
        };
        let (requests, arriving) = mpsc::unbounded_channel();
        let record = Self {
            id: identity.id,
            number: identity.number,
            spec: run.spec,
            setup,
            plan: run.plan,
            fork: run.fork,
            create_time: identity.create_time,
            request_digest: identity.request_digest,
            log: Mutex::new(Log { recent: VecDeque::new(), shown }),
            revision: watch::Sender::new(0),
            requests,
        };
        (Arc::new(record), arriving)
    }

    pub(crate) fn state(&self) -> RunState {
        lock(&self.log).shown.state
    }

    pub(crate) fn shown(&self) -> Shown {
        lock(&self.log).shown.clone()
    }

    /// Shows an event that is in the store, and wakes all who watch. One that is shown already is passed over.
    pub(crate) fn publish(&self, event: StoredEvent) {
        let revision = event.event.revision;
        let mut log = lock(&self.log);
        if revision != log.shown.revision + 1 {
            return;
        }
        log.shown.take_in(&event);
        log.recent.push_back(Arc::new(event));
        if log.recent.len() > RECENT_EVENTS {
            log.recent.pop_front();
        }
        drop(log);
        self.revision.send_replace(revision);
    }

    /// Up to `count` events past `revision`, if they are at hand.
    pub(crate) fn recent(&self, revision: u64, count: usize) -> Recent {
        let log = lock(&self.log);
        let first = log.recent.front().map_or(log.shown.revision + 1, |event| event.event.revision);
        if revision + 1 < first {
            return Recent::Older;
        }
        let skipped = usize::try_from(revision + 1 - first).unwrap_or(usize::MAX);
        let events: Vec<_> = log.recent.iter().skip(skipped).take(count).cloned().collect();
        let last = events.last().map_or(revision, |event| event.event.revision);
        Recent::Events { events, ends: last >= log.shown.revision && log.shown.state.has_ended() }
    }

    /// Changes whenever an event is published.
    pub(crate) fn revisions(&self) -> watch::Receiver<u64> {
        self.revision.subscribe()
    }

    /// Waits until what is shown is as wanted.
    pub(crate) async fn until(&self, wanted: impl Fn(&Shown) -> bool) {
        let mut revisions = self.revisions();
        // The sender lives in `self`, so waiting cannot fail.
        let _ = revisions.wait_for(|_| wanted(&lock(&self.log).shown)).await;
    }

    /// Asks the run's driver for something. A run that has ended does not hear it.
    pub(crate) fn request(&self, event: Event) {
        let _ = self.requests.send(event);
    }

    pub(crate) fn assign(&self, worker_ids: Vec<String>) {
        lock(&self.log).shown.worker_ids = worker_ids;
    }

    pub(crate) fn set_trouble(&self, trouble: Option<String>) {
        lock(&self.log).shown.trouble = trouble;
    }

    /// Remembers an export made after the run's end, when it had made none itself.
    pub(crate) fn set_export(&self, result: ExportResult) {
        lock(&self.log).shown.export.get_or_insert(result);
    }
}

impl Shown {
    fn take_in(&mut self, stored: &StoredEvent) {
        let event = &stored.event;
        self.revision = event.revision;
        match &event.kind {
            RunEventKind::StateChange { state, message } => {
                self.state = *state;
                self.message.clone_from(message);
                if *state == RunState::Starting {
                    self.start_time.get_or_insert(event.time);
                }
                if state.has_ended() {
                    self.end_time = Some(event.time);
                }
            }
            RunEventKind::Step(report) => self.last_step = Some(report.clone()),
            RunEventKind::Decision(decision) => {
                self.generation = decision.generation;
                self.decisions.push(ShownDecision {
                    revision: event.revision,
                    generation: decision.generation,
                    step: decision.step,
                    sparsity: decision.sparsity,
                    parameters: decision.parameters,
                    widths: stored.widths.clone(),
                });
            }
            RunEventKind::Evaluation(evaluation) => self.evaluations.push(evaluation.clone()),
            RunEventKind::Task(result) => self.tasks.push(result.clone()),
            RunEventKind::Export(result) => self.export = Some(result.clone()),
            RunEventKind::Checkpoint(checkpoint) => {
                self.checkpoint = Some(checkpoint.clone());
                self.checkpoint_time = Some(event.time);
            }
            RunEventKind::Restart(restart) => {
                self.restarts = restart.restarts;
                self.generation = restart.generation;
            }
            RunEventKind::Calibration(_) => {}
            RunEventKind::Guard(verdict) => {
                if verdict.action == Some(GuardAction::Revert) {
                    self.generation = Generation(verdict.generation.0.saturating_sub(1));
                }
            }
        }
    }
}
