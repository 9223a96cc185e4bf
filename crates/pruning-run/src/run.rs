use crate::training::Segment;
use crate::{
    Effect, ExportResult, Generation, Measurement, RunEvent, RunEventKind, RunSetup, RunState, ShardFile,
    TaskScore, WorkerId,
};
use pruning::{KeepMask, MovingAverage};
use sharding::Placement;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

/// Everything that a run is, between two events.
#[derive(Debug, Clone)]
pub struct Run {
    pub(crate) setup: Arc<RunSetup>,
    /// By tensor-parallel rank; empty while queued.
    pub(crate) workers: Vec<WorkerId>,
    pub(crate) state: RunState,
    pub(crate) phase: Phase,
    pub(crate) keep_mask: Arc<KeepMask>,
    pub(crate) generation: Generation,
    /// Who holds what under `keep_mask`.
    pub(crate) placement: Placement,
    /// Absent when nothing is averaged.
    pub(crate) average: Option<MovingAverage>,
    pub(crate) next_step: u64,
    pub(crate) shards: Option<Vec<ShardFile>>,
    /// Ranks that blame a peer, in the order in which they did.
    pub(crate) suspects: Vec<Suspect>,
    pub(crate) last_revision: u64,
}

/// A rank that has lost a peer.
#[derive(Debug, Clone)]
pub(crate) struct Suspect {
    pub(crate) tp_rank: usize,
    pub(crate) message: String,
    /// From when on it is taken at its word.
    pub(crate) until: SystemTime,
}

/// What a run waits for.
#[derive(Debug, Clone)]
pub(crate) enum Phase {
    /// With the reason last given.
    Queued {
        message: String,
    },
    Loading {
        data_sha256: Gather<String>,
    },
    OpeningRendezvous,
    Joining {
        joined: Gather<()>,
    },
    /// Measuring number `place` of what the setup wants measured.
    Evaluating {
        label: &'static str,
        place: usize,
        answers: Gather<Answer>,
    },
    Training(Segment),
    ApplyingMask {
        acknowledged: Gather<()>,
    },
    Checkpointing {
        shards: Gather<ShardFile>,
    },
    /// The sessions end, so that the export has their memory.
    FreeingMemory,
    Exporting,
    Ended,
}

/// One rank's measurement.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Answer {
    /// What was asked for.
    pub(crate) measurement: Measurement,
    pub(crate) measured: Measured,
    pub(crate) duration: Duration,
}

#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Measured {
    Window { negative_log_likelihood: f64, predicted_tokens: u64, window_tokens: u32 },
    Task(TaskScore),
}

/// One answer of every rank.
#[derive(Debug, Clone)]
pub(crate) struct Gather<T>(Vec<Option<T>>);

impl<T: Clone> Gather<T> {
    pub(crate) fn new(tp_degree: usize) -> Self {
        Self(vec![None; tp_degree])
    }

    /// Keeps a rank's first answer; later ones change nothing. Returns all answers once there is one of every rank.
    pub(crate) fn put(&mut self, tp_rank: usize, answer: T) -> Option<Vec<T>> {
        if self.0[tp_rank].is_some() {
            return None;
        }
        self.0[tp_rank] = Some(answer);
        self.0.iter().cloned().collect()
    }

    fn missing(&self) -> Vec<usize> {
        (0..self.0.len()).filter(|&rank| self.0[rank].is_none()).collect()
    }
}

impl Run {
    /// A run that waits for workers, and its first event.
    #[must_use]
    pub fn new(setup: Arc<RunSetup>, now: SystemTime) -> (Self, Vec<Effect>) {
        let recipe = setup.recipe();
        let average = recipe.pruning.as_ref().map(|pruning| {
            MovingAverage::new(setup.dense(), pruning.head_grouping, pruning.moving_average_decay)
        });
        let mut run = Self {
            workers: Vec::new(),
            state: RunState::Queued,
            phase: Phase::Queued { message: String::new() },
            keep_mask: Arc::new(KeepMask::full(setup.dense())),
            generation: Generation::default(),
            placement: setup.placement().clone(),
            average,
            next_step: 0,
            shards: None,
            suspects: Vec::new(),
            last_revision: 0,
            setup,
        };
        let message = match run.tp_degree() {
            1 => "waits for 1 worker".to_owned(),
            needed => format!("waits for {needed} workers"),
        };
        let mut effects = Vec::new();
        run.enter(RunState::Queued, message, now, &mut effects);
        (run, effects)
    }

    #[must_use]
    pub fn setup(&self) -> &RunSetup {
        &self.setup
    }

    #[must_use]
    pub fn state(&self) -> RunState {
        self.state
    }

    /// Number of the mask in force.
    #[must_use]
    pub fn generation(&self) -> Generation {
        self.generation
    }

    #[must_use]
    pub fn keep_mask(&self) -> &Arc<KeepMask> {
        &self.keep_mask
    }

    /// The ranks' checkpoint files by rank, once all are written.
    #[must_use]
    pub fn shards(&self) -> Option<&[ShardFile]> {
        self.shards.as_deref()
    }

    #[must_use]
    pub fn tp_degree(&self) -> usize {
        self.setup.tp_degree()
    }

    /// Appends to the run's log.
    pub(crate) fn record(&mut self, kind: RunEventKind, now: SystemTime, effects: &mut Vec<Effect>) {
        self.last_revision += 1;
        effects.push(Effect::Record(RunEvent { revision: self.last_revision, time: now, kind }));
    }

    /// Changes the state, or only its message.
    pub(crate) fn enter(
        &mut self,
        state: RunState,
        message: String,
        now: SystemTime,
        effects: &mut Vec<Effect>,
    ) {
        self.state = state;
        self.record(RunEventKind::StateChange { state, message }, now, effects);
    }

    /// Ends the run. Nothing happens to it afterwards.
    pub(crate) fn end(
        &mut self,
        state: RunState,
        message: String,
        now: SystemTime,
        effects: &mut Vec<Effect>,
    ) {
        debug_assert!(state.has_ended());
        self.enter(state, message, now, effects);
        self.phase = Phase::Ended;
        self.average = None;
        self.suspects.clear();
        if !self.workers.is_empty() {
            effects.push(Effect::AbortSessions);
        }
    }

    pub(crate) fn fail(&mut self, message: String, now: SystemTime, effects: &mut Vec<Effect>) {
        self.end(RunState::Failed, message, now, effects);
    }

    /// A rank as people know it: ``worker `w1` (rank 1)``.
    pub(crate) fn name(&self, tp_rank: usize) -> String {
        match self.workers.get(tp_rank) {
            Some(worker) => format!("worker `{worker}` (rank {tp_rank})"),
            None => format!("rank {tp_rank}"),
        }
    }

    /// What the run is doing, for messages: `training from step 20`.
    pub(crate) fn doing(&self) -> String {
        match &self.phase {
            Phase::Queued { .. } => "waiting for workers".into(),
            Phase::Loading { .. } => "loading".into(),
            Phase::OpeningRendezvous => "opening the rendezvous".into(),
            Phase::Joining { joined } => {
                format!("joining the group (not yet joined: ranks {:?})", joined.missing())
            }
            Phase::Evaluating { label, .. } => format!("evaluating the {label} model"),
            Phase::Training(segment) => format!("training step {}", segment.first_open_step()),
            Phase::ApplyingMask { .. } => format!("applying mask {}", self.generation),
            Phase::Checkpointing { .. } => "writing the checkpoint".into(),
            Phase::FreeingMemory => "ending its session".into(),
            Phase::Exporting => "exporting".into(),
            Phase::Ended => "the run had ended".into(),
        }
    }

    /// The message of a run that ended well.
    pub(crate) fn summary(&self, export: Option<&ExportResult>) -> String {
        let dense = self.setup.dense();
        let kept = self.keep_mask.pruned_spec(dense).parameter_count();
        let mut message = match self.setup.target() {
            Some(_) => format!("{kept} of {} parameters stay", dense.parameter_count()),
            None => format!("{kept} parameters"),
        };
        if let Some(export) = export {
            message.push_str(&format!("; written to {}", export.path));
        }
        message
    }
}
