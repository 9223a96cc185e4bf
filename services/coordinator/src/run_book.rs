//! The runs that this coordinator knows: what is shown of them, and their numbered events.

use crate::sync::lock;
use pruning::KeepMask;
use pruning_run::{
    Decision, Evaluation, ExportResult, Generation, RunEvent, RunEventKind, RunId, RunSetup, RunState,
    ShardFile, StepReport, TaskResult,
};
use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex};
use std::time::SystemTime;
use tokio::sync::watch;
use wire::{RunSpec, pb};

/// Most runs that may be under way or queued at once.
const MAX_LIVE_RUNS: usize = 1000;

/// All runs, in the order in which they were created.
#[derive(Debug, Default)]
pub(crate) struct RunBook {
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    last_number: u64,
    /// By place in the order of creation.
    runs: BTreeMap<u64, Arc<RunRecord>>,
    by_id: HashMap<String, u64>,
    by_request: HashMap<String, u64>,
}

/// A run that passed admission, not yet in the book.
#[derive(Debug)]
pub(crate) struct NewRun {
    pub(crate) spec: RunSpec,
    pub(crate) setup: Arc<RunSetup>,
    pub(crate) plan: pb::RunPlan,
    /// Absent: every call makes a run.
    pub(crate) request_id: Option<String>,
}

/// Why a run is not taken into the book.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NotBooked {
    #[error("{MAX_LIVE_RUNS} runs are queued or under way, which is the most allowed")]
    TooMany,
    /// The request has made a run already.
    #[error("this request has already made run `{}`", .0.id)]
    Repeated(Arc<RunRecord>),
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
    pub(crate) create_time: SystemTime,
    log: Mutex<Log>,
    /// Revision of the last event.
    revision: watch::Sender<u64>,
    /// Why the run is to end, once someone has asked for it.
    cancel: watch::Sender<Option<String>>,
}

#[derive(Debug)]
struct Log {
    events: Vec<RunEvent>,
    shown: Shown,
}

/// What the events so far amount to.
#[derive(Debug, Clone)]
pub(crate) struct Shown {
    pub(crate) state: RunState,
    pub(crate) message: String,
    pub(crate) start_time: Option<SystemTime>,
    pub(crate) end_time: Option<SystemTime>,
    pub(crate) last_step: Option<StepReport>,
    pub(crate) decisions: Vec<Arc<Decision>>,
    pub(crate) evaluations: Vec<Evaluation>,
    pub(crate) tasks: Vec<TaskResult>,
    pub(crate) export: Option<ExportResult>,
    /// By tensor-parallel rank.
    pub(crate) worker_ids: Vec<String>,
    /// The ranks' checkpoint files, once the run has ended well.
    pub(crate) shards: Option<Vec<ShardFile>>,
}

impl RunBook {
    /// Writes a run into the book under a new id.
    pub(crate) fn add(&self, new: NewRun) -> Result<Arc<RunRecord>, NotBooked> {
        let mut inner = lock(&self.inner);
        if let Some(earlier) = new.request_id.as_ref().and_then(|request| inner.by_request.get(request)) {
            return Err(NotBooked::Repeated(inner.runs[earlier].clone()));
        }
        let live: Vec<&Arc<RunRecord>> = inner.runs.values().filter(|run| !run.state().has_ended()).collect();
        if live.len() >= MAX_LIVE_RUNS {
            return Err(NotBooked::TooMany);
        }
        let folder = |spec: &RunSpec| spec.export.as_ref().map(|export| export.path.clone());
        if let Some(path) = folder(&new.spec)
            && let Some(other) = live.iter().find(|run| folder(&run.spec).as_ref() == Some(&path))
        {
            return Err(NotBooked::SameExport { other: other.id.clone() });
        }
        let number = inner.last_number + 1;
        let id = RunId(format!("run-{}", &uuid::Uuid::new_v4().simple().to_string()[..12]));
        let record = Arc::new(RunRecord::new(id, number, new.spec, new.setup, new.plan));
        inner.last_number = number;
        inner.by_id.insert(record.id.0.clone(), number);
        if let Some(request) = new.request_id {
            inner.by_request.insert(request, number);
        }
        inner.runs.insert(number, record.clone());
        Ok(record)
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

    /// Up to `count` runs created before number `before`, newest first.
    pub(crate) fn newest(&self, before: u64, count: usize) -> Vec<Arc<RunRecord>> {
        lock(&self.inner).runs.range(..before).rev().take(count).map(|(_, run)| run.clone()).collect()
    }
}

impl RunRecord {
    fn new(id: RunId, number: u64, spec: RunSpec, setup: Arc<RunSetup>, plan: pb::RunPlan) -> Self {
        let shown = Shown {
            state: RunState::Queued,
            message: String::new(),
            start_time: None,
            end_time: None,
            last_step: None,
            decisions: Vec::new(),
            evaluations: Vec::new(),
            tasks: Vec::new(),
            export: None,
            worker_ids: Vec::new(),
            shards: None,
        };
        Self {
            id,
            number,
            spec,
            setup,
            plan,
            create_time: SystemTime::now(),
            log: Mutex::new(Log { events: Vec::new(), shown }),
            revision: watch::Sender::new(0),
            cancel: watch::Sender::new(None),
        }
    }

    pub(crate) fn state(&self) -> RunState {
        lock(&self.log).shown.state
    }

    pub(crate) fn shown(&self) -> Shown {
        lock(&self.log).shown.clone()
    }

    /// Appends an event and wakes all who watch. Events come in the order of their revisions.
    pub(crate) fn publish(&self, event: RunEvent) {
        let revision = event.revision;
        let mut log = lock(&self.log);
        debug_assert_eq!(revision, log.events.len() as u64 + 1);
        log.shown.take_in(&event);
        log.events.push(event);
        drop(log);
        self.revision.send_replace(revision);
    }

    /// Up to `count` events past `revision`, and whether the run has ended with the last of them.
    pub(crate) fn events_after(&self, revision: u64, count: usize) -> (Vec<RunEvent>, bool) {
        let log = lock(&self.log);
        let first = usize::try_from(revision).unwrap_or(usize::MAX).min(log.events.len());
        let last = first.saturating_add(count).min(log.events.len());
        let ends = last == log.events.len() && log.shown.state.has_ended();
        (log.events[first..last].to_vec(), ends)
    }

    /// Changes whenever an event is published.
    pub(crate) fn revisions(&self) -> watch::Receiver<u64> {
        self.revision.subscribe()
    }

    /// Waits until the run has ended.
    pub(crate) async fn ended(&self) {
        let mut revisions = self.revisions();
        // The sender lives in `self`, so waiting cannot fail.
        let _ = revisions.wait_for(|_| lock(&self.log).shown.state.has_ended()).await;
    }

    /// Asks for the end. The first reason counts.
    pub(crate) fn request_cancel(&self, reason: &str) {
        self.cancel.send_if_modified(|asked| {
            let first = asked.is_none();
            if first {
                *asked = Some(reason.to_owned());
            }
            first
        });
    }

    /// Waits until someone asks for the end, and returns why.
    pub(crate) async fn cancel_requested(&self) -> String {
        let mut asked = self.cancel.subscribe();
        // The sender lives in `self`, so waiting cannot fail.
        let _ = asked.wait_for(Option::is_some).await;
        let reason = asked.borrow().clone();
        reason.unwrap_or_default()
    }

    pub(crate) fn assign(&self, worker_ids: Vec<String>) {
        lock(&self.log).shown.worker_ids = worker_ids;
    }

    pub(crate) fn set_shards(&self, shards: Vec<ShardFile>) {
        lock(&self.log).shown.shards = Some(shards);
    }

    /// Remembers an export made after the run's end, when it had made none itself.
    pub(crate) fn set_export(&self, result: ExportResult) {
        lock(&self.log).shown.export.get_or_insert(result);
    }

    /// What decision `generation` keeps; generation 0 is the dense model.
    pub(crate) fn keep_mask(&self, generation: Generation) -> Option<KeepMask> {
        if generation == Generation(0) {
            return Some(KeepMask::full(self.setup.dense()));
        }
        let log = lock(&self.log);
        let decision = log.shown.decisions.iter().find(|decision| decision.generation == generation)?;
        Some(decision.keep_mask.clone())
    }
}

impl Shown {
    /// Number of the mask in force.
    pub(crate) fn generation(&self) -> Generation {
        self.decisions.last().map_or(Generation(0), |decision| decision.generation)
    }

    fn take_in(&mut self, event: &RunEvent) {
        match &event.kind {
            RunEventKind::StateChange { state, message } => {
                self.state = *state;
                self.message.clone_from(message);
                if *state == RunState::Starting {
                    self.start_time = Some(event.time);
                }
                if state.has_ended() {
                    self.end_time = Some(event.time);
                }
            }
            RunEventKind::Step(report) => self.last_step = Some(*report),
            RunEventKind::Decision(decision) => self.decisions.push(decision.clone()),
            RunEventKind::Evaluation(evaluation) => self.evaluations.push(evaluation.clone()),
            RunEventKind::Task(result) => self.tasks.push(result.clone()),
            RunEventKind::Export(result) => self.export = Some(result.clone()),
        }
    }
}
