use crate::history::{History, Kept};
use crate::training::Segment;
use crate::{
    CalibrationFound, CheckpointRef, Effect, ExportResult, Generation, Measurement, RunEvent, RunEventKind,
    RunId, RunSetup, RunState, SavedState, ShardFile, TaskScore, WorkerId,
};
use pruning::{KeepMask, MovingAverage};
use recipe::Shrink;
use sharding::{Placement, PlacementError};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

/// Everything that a run is, between two events.
#[derive(Debug, Clone)]
pub struct Run {
    pub(crate) id: RunId,
    pub(crate) setup: Arc<RunSetup>,
    /// Where a run that was forked begins.
    pub(crate) origin: Option<CheckpointRef>,
    pub(crate) history: History,
    /// By tensor-parallel rank; empty while no group is held.
    pub(crate) workers: Vec<WorkerId>,
    pub(crate) phase: Phase,
    pub(crate) keep_mask: Arc<KeepMask>,
    pub(crate) generation: Generation,
    /// Who holds what under `keep_mask`.
    pub(crate) placement: Placement,
    /// Absent when nothing is averaged.
    pub(crate) average: Option<MovingAverage>,
    pub(crate) next_step: u64,
    /// How far the last checkpoint is that was taken or read by this group.
    pub(crate) taken: Option<Taken>,
    /// How far the last checkpoint is that was tried, whether or not it came about.
    pub(crate) tried: Option<Taken>,
    /// A checkpoint on its way to the store.
    pub(crate) writing: Option<Writing>,
    /// The ranks' files of the checkpoint that an export is made of.
    pub(crate) shards: Option<(CheckpointRef, Vec<ShardFile>)>,
    pub(crate) wish: Option<Wish>,
    /// What the group is told once it stands, when it takes the place of one that failed.
    pub(crate) resuming: Option<String>,
    /// Since the last complete checkpoint.
    pub(crate) faults_in_a_row: u32,
    pub(crate) failed_checkpoints_in_a_row: u32,
    /// After a checkpoint that was not written: when another may be begun.
    pub(crate) checkpoint_again: Option<SystemTime>,
    /// Of the last step, to know how many of them make a second.
    pub(crate) step_duration: Option<Duration>,
    /// Ranks that blame a peer, in the order in which they did.
    pub(crate) suspects: Vec<Suspect>,
}

/// How far a checkpoint is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Taken {
    pub(crate) steps_done: u64,
    pub(crate) generation: Generation,
}

/// A checkpoint whose ranks have taken, or are taking, their snapshots.
#[derive(Debug, Clone)]
pub(crate) struct Writing {
    pub(crate) name: String,
    pub(crate) since: SystemTime,
    /// Without the shards.
    pub(crate) state: SavedState,
    pub(crate) shards: Gather<ShardFile>,
    /// All ranks have written, and the coordinator writes its part.
    pub(crate) committing: bool,
}

/// What someone wants of a run as soon as it has a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Wish {
    Pause { reason: String },
    Cancel { reason: String },
    Yield { reason: String, requeue: bool },
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
    /// The checkpoint is read.
    Restoring {
        from: CheckpointRef,
    },
    Loading {
        restores: Option<CheckpointRef>,
        data_sha256: Gather<String>,
    },
    OpeningRendezvous,
    Joining {
        joined: Gather<()>,
    },
    /// Measuring number `place` of what the setup wants measured.
    Evaluating {
        purpose: Purpose,
        place: usize,
        answers: Gather<Answer>,
    },
    Training(Segment),
    /// Passes for the decision after `step`.
    Calibrating {
        step: u64,
        answers: Gather<(CalibrationFound, Duration)>,
    },
    ApplyingMask {
        acknowledged: Gather<()>,
    },
    /// The ranks copy their state aside.
    Snapshotting {
        name: String,
        taken: Gather<()>,
    },
    /// Nothing is left to do until the checkpoint is complete.
    AwaitingCheckpoint,
    /// The sessions end, so that the export has their memory.
    FreeingMemory,
    Exporting,
    /// The sessions end, and the workers are given back.
    Leaving {
        next: Next,
    },
    /// A fault has come after a fault; the next try waits.
    BackingOff {
        until: SystemTime,
    },
    Paused,
    /// Rests until the coordinator starts anew.
    Resting,
    Ended,
}

/// Why something is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// The model as it came.
    Dense,
    /// What the run made of it.
    Result,
    /// Whether pruning may go on.
    Guard,
}

/// What follows once the workers are given back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Next {
    /// Another group, after a fault.
    Recover,
    /// What was wished.
    Wish(Wish),
    /// Another group, from an earlier checkpoint.
    Revert,
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
    /// A new run, which queues for workers. `origin` is where a fork begins.
    #[must_use]
    pub fn new(
        id: RunId,
        setup: Arc<RunSetup>,
        origin: Option<CheckpointRef>,
        now: SystemTime,
    ) -> (Self, Vec<Effect>) {
        Self::forked(id, setup, origin, History::default(), now)
    }

    /// A new run whose log already holds what it has taken over from another.
    #[must_use]
    pub fn forked(
        id: RunId,
        setup: Arc<RunSetup>,
        origin: Option<CheckpointRef>,
        history: History,
        now: SystemTime,
    ) -> (Self, Vec<Effect>) {
        let mut run = Self::at_start(id, setup, origin, history);
        let message = match run.setup.tp_degree() {
            1 => "waits for 1 worker".to_owned(),
            needed => format!("waits for {needed} workers"),
        };
        let mut effects = Vec::new();
        run.enter(RunState::Queued, message.clone(), now, &mut effects);
        run.phase = Phase::Queued { message };
        effects.push(run.enqueue());
        (run, effects)
    }

    /// A run that another process has driven so far, from its events.
    #[must_use]
    pub fn resumed(
        id: RunId,
        setup: Arc<RunSetup>,
        origin: Option<CheckpointRef>,
        history: History,
        now: SystemTime,
    ) -> (Self, Vec<Effect>) {
        let state = history.state.unwrap_or(RunState::Queued);
        let mut run = Self::at_start(id, setup, origin, history);
        run.forget_checkpoints();
        let mut effects = Vec::new();
        match state {
            RunState::Succeeded | RunState::Failed | RunState::Cancelled => run.phase = Phase::Ended,
            RunState::Paused => run.phase = Phase::Paused,
            RunState::Pausing => {
                run.enter(RunState::Paused, run.at_checkpoint("paused"), now, &mut effects);
                run.phase = Phase::Paused;
            }
            RunState::Cancelling => {
                run.end(RunState::Cancelled, run.at_checkpoint("cancelled"), now, &mut effects);
            }
            RunState::Queued => {
                run.phase = Phase::Queued { message: run.history.message.clone() };
                effects.push(run.enqueue());
            }
            RunState::Starting | RunState::Running | RunState::Exporting | RunState::Recovering => {
                let cause = "the coordinator has started anew";
                let message = run.at_checkpoint(cause);
                run.resuming = Some(cause.to_owned());
                run.enter(RunState::Recovering, message.clone(), now, &mut effects);
                run.phase = Phase::Queued { message };
                effects.push(run.enqueue());
            }
        }
        (run, effects)
    }

    fn at_start(id: RunId, setup: Arc<RunSetup>, origin: Option<CheckpointRef>, history: History) -> Self {
        let mut run = Self {
            id,
            workers: Vec::new(),
            phase: Phase::Resting,
            keep_mask: Arc::new(KeepMask::full(setup.dense())),
            generation: Generation::default(),
            placement: setup.placement().clone(),
            average: None,
            next_step: 0,
            taken: None,
            tried: None,
            writing: None,
            shards: None,
            wish: None,
            resuming: None,
            faults_in_a_row: 0,
            failed_checkpoints_in_a_row: 0,
            checkpoint_again: None,
            step_duration: None,
            suspects: Vec::new(),
            origin,
            history,
            setup,
        };
        if run.setup.options().stop_pruning {
            run.history.hold(run.origin.as_ref().map_or(Generation(0), |origin| origin.generation));
        }
        run.reset();
        run
    }

    /// Back to the dense model and no step.
    pub(crate) fn reset(&mut self) {
        let setup = &self.setup;
        self.average = setup.recipe().pruning.as_ref().map(|pruning| {
            MovingAverage::new(setup.dense(), pruning.head_grouping, pruning.moving_average_decay)
        });
        self.keep_mask = Arc::new(KeepMask::full(setup.dense()));
        self.generation = Generation::default();
        self.next_step = 0;
        self.taken = None;
        self.tried = None;
    }

    /// To where a checkpoint was taken.
    ///
    /// # Errors
    /// When the present group cannot hold its model.
    pub(crate) fn restore(&mut self, state: &SavedState) -> Result<(), PlacementError> {
        self.placement = if state.placement.tp_degree() == self.workers.len() {
            state.placement.clone()
        } else {
            let dense = self.setup.dense();
            let restricted = Placement::dense(dense, self.workers.len())?.restricted_to(&state.keep_mask);
            match self.setup.recipe().pruning.as_ref().map(|pruning| pruning.shrink) {
                Some(Shrink::Live) => restricted.rebalanced(dense),
                Some(Shrink::Never) | None => restricted,
            }
        };
        self.keep_mask = Arc::new(state.keep_mask.clone());
        self.generation = state.generation;
        self.average.clone_from(&state.average);
        self.next_step = state.steps_done;
        self.taken = Some(Taken { steps_done: state.steps_done, generation: state.generation });
        self.tried = self.taken;
        Ok(())
    }

    /// The checkpoint that the next group goes on from.
    pub(crate) fn base(&self) -> Option<&CheckpointRef> {
        self.history.last_checkpoint().map(|kept| &kept.place).or(self.origin.as_ref())
    }

    /// Whether all that is left to do is to write the result, from a complete checkpoint.
    pub(crate) fn only_exports(&self) -> bool {
        let finished = |kept: &Kept| kept.with_logits && kept.place.steps_done >= self.setup.recipe().steps;
        self.setup.options().exports
            && self.history.last_checkpoint().is_some_and(finished)
            && self.history.measured(self.result_label()) >= self.result_measurements()
    }

    pub(crate) fn enqueue(&self) -> Effect {
        let (workers, at_least) = self.wanted_workers();
        Effect::Enqueue { workers, at_least }
    }

    /// As many as planned, or for an export one; and the fewest that will do.
    pub(crate) fn wanted_workers(&self) -> (usize, usize) {
        if self.only_exports() {
            return (1, 1);
        }
        // A run that has not begun starts as it was planned.
        let at_least = match self.base() {
            Some(_) => self.setup.min_tp_degree(),
            None if self.history.starts > 0 => self.setup.min_tp_degree(),
            None => self.setup.tp_degree(),
        };
        (self.setup.tp_degree(), at_least)
    }

    /// Gives up a checkpoint that cannot be read. Whether there is another to go on from.
    pub(crate) fn give_up(&mut self, unreadable: &CheckpointRef) -> bool {
        self.history.checkpoints.retain(|kept| kept.place != *unreadable);
        self.base().is_some_and(|base| base != unreadable)
    }

    /// Drops the checkpoints that need not be kept.
    pub(crate) fn forget_checkpoints(&mut self) {
        let retention = self.setup.options().retention;
        let first_of_last = self.history.checkpoints.len().saturating_sub(retention.last.max(1));
        let mut place = 0;
        self.history.checkpoints.retain(|kept| {
            place += 1;
            let opens = kept.opens_generation && kept.place.generation > Generation(0);
            place > first_of_last || (retention.decisions && opens)
        });
    }

    /// The checkpoints that are kept, oldest first.
    #[must_use]
    pub fn checkpoints(&self) -> Vec<CheckpointRef> {
        self.history.checkpoints.iter().map(|kept| kept.place.clone()).collect()
    }

    /// `cause; goes on from step 20`.
    pub(crate) fn at_checkpoint(&self, cause: &str) -> String {
        match self.base() {
            Some(place) => format!("{cause}; the last checkpoint is after {} steps", place.steps_done),
            None => format!("{cause}; there is no checkpoint yet"),
        }
    }

    #[must_use]
    pub fn setup(&self) -> &RunSetup {
        &self.setup
    }

    #[must_use]
    pub fn state(&self) -> RunState {
        self.history.state.unwrap_or(RunState::Queued)
    }

    /// Whether nothing will happen until the coordinator starts anew.
    #[must_use]
    pub fn rests(&self) -> bool {
        matches!(self.phase, Phase::Resting)
    }

    /// Whether it holds workers.
    #[must_use]
    pub fn holds_workers(&self) -> bool {
        !self.workers.is_empty()
    }

    /// Whether an export of this run was begun before the one under way.
    #[must_use]
    pub fn exports_again(&self) -> bool {
        self.history.exports > 1
    }

    /// Optimizer steps done.
    #[must_use]
    pub fn steps_done(&self) -> u64 {
        self.next_step
    }

    /// The moving average of importance as it now is.
    #[must_use]
    pub fn average(&self) -> Option<&MovingAverage> {
        self.average.as_ref()
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

    /// Ranks of the group that is held, or of the one that is planned.
    #[must_use]
    pub fn tp_degree(&self) -> usize {
        match self.workers.len() {
            0 => self.setup.tp_degree(),
            held => held,
        }
    }

    /// Appends to the run's log.
    pub(crate) fn record(&mut self, kind: RunEventKind, now: SystemTime, effects: &mut Vec<Effect>) {
        let event = RunEvent { revision: self.history.revision + 1, time: now, kind };
        self.history.take_in(&event);
        effects.push(Effect::Record(event));
    }

    /// Changes the state, or only its message.
    pub(crate) fn enter(
        &mut self,
        state: RunState,
        message: String,
        now: SystemTime,
        effects: &mut Vec<Effect>,
    ) {
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
        if matches!(self.phase, Phase::Queued { .. }) && self.workers.is_empty() {
            effects.push(Effect::LeaveQueue);
        }
        self.phase = Phase::Ended;
        self.average = None;
        self.writing = None;
        self.suspects.clear();
        if !self.workers.is_empty() {
            effects.push(Effect::AbortSessions);
            effects.push(Effect::ReleaseWorkers);
            self.workers.clear();
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
            Phase::Queued { .. } | Phase::BackingOff { .. } => "waiting for workers".into(),
            Phase::Restoring { .. } => "reading the checkpoint".into(),
            Phase::Loading { .. } => "loading".into(),
            Phase::OpeningRendezvous => "opening the rendezvous".into(),
            Phase::Joining { joined } => {
                format!("joining the group (not yet joined: ranks {:?})", joined.missing())
            }
            Phase::Evaluating { purpose, .. } => format!("evaluating the {} model", self.label(*purpose)),
            Phase::Training(segment) => format!("training step {}", segment.first_open_step()),
            Phase::Calibrating { step, .. } => format!("calibrating the decision after step {step}"),
            Phase::ApplyingMask { .. } => format!("applying mask {}", self.generation),
            Phase::Snapshotting { .. } | Phase::AwaitingCheckpoint => "writing the checkpoint".into(),
            Phase::FreeingMemory | Phase::Leaving { .. } => "ending its session".into(),
            Phase::Paused | Phase::Resting => "the run was paused".into(),
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
