use crate::run::{Answer, Gather, Measured, Phase, Purpose, Wish};
use crate::training::{Chunk, Segment, StreamFault};
use crate::{
    Effect, Event, ExportResult, Generation, Measurement, RankReport, Refusal, Restart, Restore, Run,
    RunEventKind, RunState, SavedState, WorkerId,
};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

/// About how long the ranks train without being asked.
const STRETCH: Duration = Duration::from_secs(1);
/// Most steps in one go.
const MOST_STEPS: u64 = 64;
/// Two ranks' losses, or likelihoods, may differ by this much of their size: they are sums over the same reductions.
const AGREEMENT: f64 = 1e-6;

/// What `event` makes of `run`, and what must be done about it, in order.
///
/// An event that does not fit changes nothing and is refused. A worker that breaks the protocol ends the run as FAILED; a
/// lost or stuck rank, a number that is not finite and ranks that disagree send it back to its last checkpoint, a bounded
/// number of times in a row.
#[must_use]
pub fn transition(mut run: Run, event: Event, now: SystemTime) -> (Run, Vec<Effect>) {
    let mut effects = Vec::new();
    if !run.state().has_ended() {
        Transition { run: &mut run, now, effects: &mut effects }.on(event);
    }
    (run, effects)
}

/// One event at work on a run.
pub(crate) struct Transition<'a> {
    pub(crate) run: &'a mut Run,
    pub(crate) now: SystemTime,
    pub(crate) effects: &'a mut Vec<Effect>,
}

impl Transition<'_> {
    fn on(&mut self, event: Event) {
        match event {
            Event::WorkersShort { idle, registered, ahead } => self.workers_short(idle, registered, ahead),
            Event::WorkersAssigned { workers } => self.workers_assigned(workers),
            Event::Loaded { tp_rank, data_sha256 } => self.loaded(tp_rank, data_sha256),
            Event::RendezvousOpened { rendezvous } => self.rendezvous_opened(rendezvous),
            Event::Joined { tp_rank } => self.joined(tp_rank),
            Event::Scores { tp_rank, step, generation, layer, projection, first_unit, values } => {
                let chunk = Chunk { step, generation, layer, projection, first_unit, values: &values };
                self.scores(tp_rank, &chunk);
            }
            Event::StepEnded { tp_rank, report } => self.step_ended(tp_rank, report),
            Event::TrainEnded { tp_rank } => self.train_ended(tp_rank),
            Event::Calibrated { tp_rank, generation, found, duration } => {
                self.calibrated(tp_rank, generation, found, duration);
            }
            Event::MaskApplied { tp_rank, generation } => self.mask_applied(tp_rank, generation),
            Event::Evaluated {
                tp_rank,
                window_index: index,
                negative_log_likelihood,
                predicted_tokens,
                window_tokens,
                duration,
            } => {
                let measurement = Measurement::Window { index };
                let measured = Measured::Window { negative_log_likelihood, predicted_tokens, window_tokens };
                self.evaluated(tp_rank, Answer { measurement, measured, duration });
            }
            Event::TaskEvaluated { tp_rank, task_index: index, score, duration } => {
                let (measurement, measured) = (Measurement::Task { index }, Measured::Task(score));
                self.evaluated(tp_rank, Answer { measurement, measured, duration });
            }
            Event::Snapshotted { tp_rank, name } => self.snapshotted(tp_rank, &name),
            Event::Checkpointed { tp_rank, name, shard } => self.checkpointed(tp_rank, &name, shard),
            Event::CheckpointWritten { name, size_bytes } => self.checkpoint_written(&name, size_bytes),
            Event::CheckpointFailed { name, cause } => self.checkpoint_failed(&name, &cause),
            Event::Restored { state } => self.restored(state),
            Event::RestoreFailed { cause, damaged } => self.restore_failed(&cause, damaged),
            Event::SessionsAborted => self.sessions_aborted(),
            Event::Exported { result } => self.exported(result),
            Event::RankFailed { tp_rank, fault } => self.rank_failed(tp_rank, fault),
            Event::WorkerLost { worker, cause } => self.worker_lost(&worker, &cause),
            Event::CoordinatorFailed { cause } => self.fail(format!("the coordinator cannot go on: {cause}")),
            Event::CancelRequested { reason, discard: true } => {
                self.run.end(RunState::Cancelled, reason, self.now, self.effects);
            }
            Event::CancelRequested { reason, discard: false } => self.wish(Wish::Cancel { reason }),
            Event::PauseRequested { reason } => self.wish(Wish::Pause { reason }),
            Event::YieldRequested { reason, requeue } => self.wish(Wish::Yield { reason, requeue }),
            Event::ResumeRequested { reason } => self.resume(&reason),
            Event::Woken => self.woken(),
        }
    }

    // --- getting started ---

    fn workers_short(&mut self, idle: usize, registered: usize, ahead: usize) {
        let needed = match self.run.wanted_workers() {
            (1, _) => "needs 1 idle worker".to_owned(),
            (most, least) if least < most => format!("needs {least} to {most} idle workers"),
            (most, _) => format!("needs {most} idle workers"),
        };
        let Phase::Queued { message } = &mut self.run.phase else {
            return self.refuse("a count of idle workers", 0);
        };
        let mut reason = match registered {
            0 => format!("{needed}; none is registered"),
            1 => format!("{needed}; {idle} of 1 registered is idle"),
            _ => format!("{needed}; {idle} of {registered} registered are idle"),
        };
        if ahead > 0 {
            reason.push_str(&format!(", and {ahead} queued before it"));
        }
        if *message != reason {
            message.clone_from(&reason);
            let state = self.run.state();
            self.enter(state, reason);
        }
    }

    fn workers_assigned(&mut self, workers: Vec<WorkerId>) {
        let Phase::Queued { .. } = self.run.phase else { return self.refuse("an assignment", 0) };
        // Since it queued, a last checkpoint may have been completed, after which one worker is enough.
        let (most, at_least) = (self.run.setup.tp_degree(), self.run.wanted_workers().1);
        let count = workers.len();
        let names = workers.iter().map(|worker| format!("`{worker}`")).collect::<Vec<_>>().join(", ");
        self.run.workers = workers;
        if count > most || count < at_least {
            return self.fail(format!("{count} workers were assigned where {at_least} to {most} are needed"));
        }
        let from = self.run.base().cloned();
        let what = match &from {
            Some(place) => format!("loads its checkpoint after {} steps on {names}", place.steps_done),
            None => format!("loads the model on {names}"),
        };
        self.enter(RunState::Starting, what);
        match from {
            Some(from) => {
                self.effects.push(Effect::Restore(from.clone()));
                self.run.phase = Phase::Restoring { from };
            }
            None => {
                self.run.reset();
                match sharding::Placement::dense(self.run.setup.dense(), self.run.workers.len()) {
                    Ok(placement) => self.run.placement = placement,
                    Err(error) => return self.fail(error.to_string()),
                }
                self.load(None);
            }
        }
    }

    fn restored(&mut self, state: Arc<SavedState>) {
        let Phase::Restoring { from } = &self.run.phase else { return self.refuse("a checkpoint", 0) };
        let from = from.clone();
        // One that the group before had taken was completed meanwhile.
        if let Some(newer) = self.run.base().filter(|base| **base != from).cloned() {
            self.effects.push(Effect::Restore(newer.clone()));
            self.run.phase = Phase::Restoring { from: newer };
            return;
        }
        if self.run.only_exports() {
            self.run.shards = Some((from, state.shards.clone()));
            self.run.keep_mask = Arc::new(state.keep_mask.clone());
            self.run.generation = state.generation;
            self.run.next_step = state.steps_done;
            if self.run.workers.len() > 1 {
                self.effects.push(Effect::ReleaseAllButFirst);
            }
            return self.export();
        }
        if let Err(error) = self.run.restore(&state) {
            return self.fail(error.to_string());
        }
        self.run.shards = state.with_logits.then(|| (from.clone(), state.shards.clone()));
        self.load(Some(Restore { checkpoint: from, state }));
    }

    fn load(&mut self, restore: Option<Restore>) {
        let restores = restore.as_ref().map(|restore| restore.checkpoint.clone());
        self.run.phase = Phase::Loading { restores, data_sha256: Gather::new(self.run.tp_degree()) };
        self.effects.push(Effect::Load { restore });
    }

    fn loaded(&mut self, tp_rank: usize, data: String) {
        if !self.is_rank("an answer to Load", tp_rank) {
            return;
        }
        let Phase::Loading { data_sha256, .. } = &mut self.run.phase else {
            return self.refuse("an answer to Load", tp_rank);
        };
        let Some(digests) = data_sha256.put(tp_rank, data) else { return };
        if let Some(other) = digests.iter().position(|digest| *digest != digests[0]) {
            let other = self.run.name(other);
            return self.fail(format!(
                "{other} has loaded other training data than rank 0; give all workers the same files"
            ));
        }
        if self.run.tp_degree() > 1 {
            self.run.phase = Phase::OpeningRendezvous;
            self.effects.push(Effect::OpenRendezvous);
        } else {
            self.begin();
        }
    }

    fn rendezvous_opened(&mut self, rendezvous: Vec<u8>) {
        let Phase::OpeningRendezvous = self.run.phase else { return self.refuse("a rendezvous", 0) };
        self.run.phase = Phase::Joining { joined: Gather::new(self.run.tp_degree()) };
        self.effects.push(Effect::JoinGroup { rendezvous });
    }

    fn joined(&mut self, tp_rank: usize) {
        if !self.is_rank("an answer to JoinGroup", tp_rank) {
            return;
        }
        let Phase::Joining { joined } = &mut self.run.phase else {
            return self.refuse("an answer to JoinGroup", tp_rank);
        };
        if joined.put(tp_rank, ()).is_some() {
            self.begin();
        }
    }

    /// The shards are loaded and the group stands.
    fn begin(&mut self) {
        let message = match (self.run.setup.recipe().steps, self.run.setup.target().is_some()) {
            (0, _) => "measures the model as it is".to_owned(),
            (steps, true) => {
                let decisions = match self.run.setup.pruning_steps().len() {
                    1 => "one decision".to_owned(),
                    count => format!("{count} decisions"),
                };
                format!("tunes and prunes over {steps} steps, {decisions}")
            }
            (steps, false) => format!("tunes over {steps} steps"),
        };
        let next_step = self.run.next_step;
        // Whatever the reason, no step is repeated without a word.
        let repeats = self.run.history.next_step > next_step;
        let cause = self.run.resuming.take().or(repeats.then(|| "goes on from its last checkpoint".into()));
        let message = match (next_step, cause) {
            (0, None) => message,
            (next_step, None) => format!("{message}; goes on with step {next_step}"),
            (next_step, Some(cause)) => {
                let restart = Restart {
                    restarts: self.run.history.restarts + 1,
                    next_step,
                    generation: self.run.generation,
                    cause,
                    tp_degree: self.run.tp_degree(),
                };
                self.record(RunEventKind::Restart(restart));
                format!("{message}; goes on with step {next_step}")
            }
        };
        self.enter(RunState::Running, message);
        if self.run.next_step == 0 { self.measure(Purpose::Dense) } else { self.go_on() }
    }

    // --- the middle: measure (see `measuring`), train, decide (see `steps`), save (see `checkpointing`) ---

    /// What follows once the ranks are at one between two steps.
    pub(crate) fn go_on(&mut self) {
        let steps = self.run.setup.recipe().steps;
        let done = self.run.next_step >= steps;
        if self.run.wish.is_some() {
            return self.leave();
        }
        if self.checkpoint_is_due(done) {
            return self.snapshot(done);
        }
        if !done && self.opens_unsafely() {
            self.run.phase = Phase::AwaitingCheckpoint;
            return;
        }
        if !done {
            return self.train();
        }
        if steps > 0 && !self.is_measured(Purpose::Result) {
            return self.measure(Purpose::Result);
        }
        if self.run.writing.is_some() {
            self.run.phase = Phase::AwaitingCheckpoint;
            return;
        }
        self.wind_up();
    }

    /// Runs the next steps: up to a decision, a checkpoint or the end, but no more than make about a second, since a wish
    /// can be granted only in between.
    fn train(&mut self) {
        let first_step = self.run.next_step;
        let setup = &self.run.setup;
        let quickly = match self.run.step_duration {
            Some(duration) => (STRETCH.as_secs_f64() / duration.as_secs_f64().max(1e-6)) as u64,
            None => 1,
        };
        let since = self.run.tried.map_or(0, |tried| tried.steps_done);
        let next_checkpoint = since + setup.options().checkpoint_every.max(1);
        let mut end_step = setup.stretch_end(first_step).min(first_step + quickly.clamp(1, MOST_STEPS));
        if next_checkpoint > first_step {
            end_step = end_step.min(next_checkpoint);
        }
        let generation = self.run.generation;
        let segment = Segment::new(first_step..end_step, generation, self.run.tp_degree());
        self.run.phase = Phase::Training(segment);
        self.effects.push(Effect::Train { first_step, end_step, generation });
    }

    fn scores(&mut self, tp_rank: usize, chunk: &Chunk<'_>) {
        if !self.is_rank("scores", tp_rank) {
            return;
        }
        let run = &mut *self.run;
        let Phase::Training(segment) = &mut run.phase else { return self.refuse("scores", tp_rank) };
        let needed = run.setup.wants_scores(chunk.step).then_some((
            run.setup.dense(),
            run.keep_mask.as_ref(),
            &run.placement,
        ));
        if let Err(fault) = segment.scores(tp_rank, chunk, needed) {
            self.stream_fault(tp_rank, &fault);
        }
    }

    fn step_ended(&mut self, tp_rank: usize, report: RankReport) {
        if !self.is_rank("a step report", tp_rank) {
            return;
        }
        let Phase::Training(segment) = &mut self.run.phase else {
            return self.refuse("a step report", tp_rank);
        };
        if let Err(fault) = segment.report(tp_rank, report) {
            return self.stream_fault(tp_rank, &fault);
        }
        self.end_steps();
        self.end_segment();
    }

    fn train_ended(&mut self, tp_rank: usize) {
        if !self.is_rank("the end of training", tp_rank) {
            return;
        }
        let Phase::Training(segment) = &mut self.run.phase else {
            return self.refuse("the end of training", tp_rank);
        };
        if let Err(fault) = segment.stream_end(tp_rank) {
            return self.stream_fault(tp_rank, &fault);
        }
        self.end_segment();
    }

    fn end_segment(&mut self) {
        let Phase::Training(segment) = &self.run.phase else { return };
        if !segment.is_complete() {
            return;
        }
        self.run.next_step = segment.end_step();
        self.consider();
    }

    fn mask_applied(&mut self, tp_rank: usize, actual: Generation) {
        if !self.is_rank("an acknowledgement", tp_rank) {
            return;
        }
        let expected = self.run.generation;
        if actual != expected {
            return self.effects.push(Effect::Refuse(Refusal::OtherGeneration { tp_rank, expected, actual }));
        }
        // The generation in force, acknowledged once more, changes nothing in any phase.
        if let Phase::ApplyingMask { acknowledged } = &mut self.run.phase
            && acknowledged.put(tp_rank, ()).is_some()
        {
            self.consider_end();
        }
    }

    // --- the end ---

    /// All steps are done, measured and saved.
    fn wind_up(&mut self) {
        if !self.run.setup.options().exports {
            let message = self.run.summary(None);
            return self.run.end(RunState::Succeeded, message, self.now, self.effects);
        }
        self.enter(RunState::Exporting, "merges, writes and checks the result".into());
        self.run.phase = Phase::FreeingMemory;
        self.effects.push(Effect::AbortSessions);
    }

    pub(crate) fn sessions_aborted(&mut self) {
        match self.run.phase.clone() {
            Phase::FreeingMemory => {
                self.effects.push(Effect::ReleaseAllButFirst);
                self.export();
            }
            Phase::Leaving { next } => self.left(next),
            Phase::Queued { .. }
            | Phase::Restoring { .. }
            | Phase::Loading { .. }
            | Phase::OpeningRendezvous
            | Phase::Joining { .. }
            | Phase::Evaluating { .. }
            | Phase::Training(_)
            | Phase::Calibrating { .. }
            | Phase::ApplyingMask { .. }
            | Phase::Snapshotting { .. }
            | Phase::AwaitingCheckpoint
            | Phase::Exporting
            | Phase::BackingOff { .. }
            | Phase::Paused
            | Phase::Resting
            | Phase::Ended => self.refuse("the end of the sessions", 0),
        }
    }

    fn export(&mut self) {
        let Some((checkpoint, shards)) = self.run.shards.clone() else {
            return self.fail("there is no checkpoint to make the export of".into());
        };
        if self.run.state() != RunState::Exporting {
            self.enter(RunState::Exporting, "merges, writes and checks the result".into());
        }
        self.run.phase = Phase::Exporting;
        self.effects.push(Effect::Export { checkpoint, shards, keep_mask: self.run.keep_mask.clone() });
    }

    fn exported(&mut self, result: ExportResult) {
        let Phase::Exporting = self.run.phase else { return self.refuse("an export", 0) };
        let message = self.run.summary(Some(&result));
        self.record(RunEventKind::Export(result));
        self.run.end(RunState::Succeeded, message, self.now, self.effects);
    }

    /// A number that is not finite may come right from the last checkpoint on; a breach of the protocol never does.
    fn stream_fault(&mut self, tp_rank: usize, fault: &StreamFault) {
        let message = format!("{} failed while {}: {fault}", self.run.name(tp_rank), self.run.doing());
        if fault.is_not_finite() { self.fault(message) } else { self.fail(message) }
    }

    pub(crate) fn fail(&mut self, message: String) {
        self.run.fail(message, self.now, self.effects);
    }

    pub(crate) fn enter(&mut self, state: RunState, message: String) {
        self.run.enter(state, message, self.now, self.effects);
    }

    pub(crate) fn record(&mut self, kind: RunEventKind) {
        self.run.record(kind, self.now, self.effects);
    }

    pub(crate) fn refuse(&mut self, event: &'static str, tp_rank: usize) {
        self.effects.push(Effect::Refuse(Refusal::OutOfPlace { event, tp_rank }));
    }

    /// Whether a rank of that number exists; an event of any other is refused.
    pub(crate) fn is_rank(&mut self, event: &'static str, tp_rank: usize) -> bool {
        let tp_degree = self.run.tp_degree();
        let known = tp_rank < tp_degree;
        if !known {
            self.effects.push(Effect::Refuse(Refusal::UnknownRank { event, tp_rank, tp_degree }));
        }
        known
    }
}

/// Whether two ranks' figures are the same but for rounding.
pub(crate) fn agree(one: f64, other: f64) -> bool {
    (one - other).abs() <= AGREEMENT * one.abs().max(other.abs()).max(1.0)
}
