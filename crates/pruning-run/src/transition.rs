use crate::event::Fault;
use crate::run::{Answer, Gather, Measured, Phase, Suspect};
use crate::training::{Chunk, Segment, StreamFault};
use crate::{
    Effect, Event, ExportResult, Generation, Measurement, RankReport, Refusal, Run, RunEventKind, RunState,
    ShardFile, WorkerId,
};
use std::time::SystemTime;

/// Two ranks' losses, or likelihoods, may differ by this much of their size: they are sums over the same reductions.
const AGREEMENT: f64 = 1e-6;

/// What `event` makes of `run`, and what must be done about it, in order.
///
/// An event that does not fit changes nothing and is refused; a worker that breaks the protocol, a number that is not
/// finite and ranks that disagree end the run as FAILED.
#[must_use]
pub fn transition(mut run: Run, event: Event, now: SystemTime) -> (Run, Vec<Effect>) {
    let mut effects = Vec::new();
    if !run.state.has_ended() {
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
            Event::Checkpointed { tp_rank, shard } => self.checkpointed(tp_rank, shard),
            Event::SessionsAborted => self.sessions_aborted(),
            Event::Exported { result } => self.exported(result),
            Event::RankFailed { tp_rank, fault } => self.rank_failed(tp_rank, fault),
            Event::WorkerLost { worker, cause } => self.worker_lost(&worker, &cause),
            Event::CoordinatorFailed { cause } => self.fail(format!("the coordinator cannot go on: {cause}")),
            Event::CancelRequested { reason } => {
                self.run.end(RunState::Cancelled, reason, self.now, self.effects);
            }
            Event::Woken => self.woken(),
        }
    }

    // --- getting started ---

    fn workers_short(&mut self, idle: usize, registered: usize, ahead: usize) {
        let needed = match self.run.tp_degree() {
            1 => "needs 1 idle worker".to_owned(),
            needed => format!("needs {needed} idle workers"),
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
            self.enter(RunState::Queued, reason);
        }
    }

    fn workers_assigned(&mut self, workers: Vec<WorkerId>) {
        let Phase::Queued { .. } = self.run.phase else { return self.refuse("an assignment", 0) };
        let tp_degree = self.run.tp_degree();
        if workers.len() != tp_degree {
            return self
                .fail(format!("{} workers were assigned where {tp_degree} are needed", workers.len()));
        }
        let names = workers.iter().map(|worker| format!("`{worker}`")).collect::<Vec<_>>().join(", ");
        self.run.workers = workers;
        self.enter(RunState::Starting, format!("loads the model on {names}"));
        self.run.phase = Phase::Loading { data_sha256: Gather::new(tp_degree) };
        self.effects.push(Effect::Load);
    }

    fn loaded(&mut self, tp_rank: usize, data: String) {
        if !self.is_rank("an answer to Load", tp_rank) {
            return;
        }
        let Phase::Loading { data_sha256 } = &mut self.run.phase else {
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
        self.enter(RunState::Running, message);
        if self.run.setup.measures() {
            self.evaluate("dense");
        } else {
            self.train();
        }
    }

    // --- the middle: measure (see `measuring`), train, decide ---

    /// Runs the next stretch of steps, or goes on to the end when none is left.
    pub(crate) fn train(&mut self) {
        let (first_step, steps) = (self.run.next_step, self.run.setup.recipe().steps);
        if first_step < steps {
            let end_step = self.run.setup.segment_end(first_step);
            let generation = self.run.generation;
            let segment = Segment::new(first_step..end_step, generation, self.run.tp_degree());
            self.run.phase = Phase::Training(segment);
            self.effects.push(Effect::Train { first_step, end_step, generation });
        } else if steps > 0 && self.run.setup.measures() {
            self.evaluate(if self.run.setup.target().is_some() { "pruned" } else { "tuned" });
        } else {
            self.wind_up();
        }
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
        let last_step = segment.end_step() - 1;
        if self.run.setup.pruning_steps().binary_search(&last_step).is_ok() {
            self.decide(last_step);
        } else {
            self.train();
        }
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
            self.train();
        }
    }

    // --- the end ---

    /// All steps are done and measured.
    pub(crate) fn wind_up(&mut self) {
        let exports = self.run.setup.options().exports;
        if self.run.setup.recipe().steps == 0 && !exports {
            let message = self.run.summary(None);
            return self.run.end(RunState::Succeeded, message, self.now, self.effects);
        }
        self.run.phase = Phase::Checkpointing { shards: Gather::new(self.run.tp_degree()) };
        self.effects.push(Effect::Checkpoint);
    }

    fn checkpointed(&mut self, tp_rank: usize, shard: ShardFile) {
        if !self.is_rank("a checkpoint", tp_rank) {
            return;
        }
        let Phase::Checkpointing { shards } = &mut self.run.phase else {
            return self.refuse("a checkpoint", tp_rank);
        };
        let Some(shards) = shards.put(tp_rank, shard) else { return };
        self.run.shards = Some(shards);
        if self.run.setup.options().exports {
            self.enter(RunState::Exporting, "merges, writes and checks the result".into());
            self.run.phase = Phase::FreeingMemory;
            self.effects.push(Effect::AbortSessions);
        } else {
            let message = self.run.summary(None);
            self.run.end(RunState::Succeeded, message, self.now, self.effects);
        }
    }

    fn sessions_aborted(&mut self) {
        let Phase::FreeingMemory = self.run.phase else { return self.refuse("the end of the sessions", 0) };
        self.run.phase = Phase::Exporting;
        let shards = self.run.shards.clone().unwrap_or_default();
        debug_assert_eq!(shards.len(), self.run.tp_degree(), "every rank has written its state");
        self.effects.push(Effect::ReleaseAllButFirst);
        self.effects.push(Effect::Export { shards, keep_mask: self.run.keep_mask.clone() });
    }

    fn exported(&mut self, result: ExportResult) {
        let Phase::Exporting = self.run.phase else { return self.refuse("an export", 0) };
        let message = self.run.summary(Some(&result));
        self.record(RunEventKind::Export(result));
        self.run.end(RunState::Succeeded, message, self.now, self.effects);
    }

    // --- what goes wrong ---

    fn rank_failed(&mut self, tp_rank: usize, fault: Fault) {
        if !self.is_rank("a failure", tp_rank) || self.is_released(tp_rank) {
            return;
        }
        let doing = self.run.doing();
        match fault {
            Fault::Own(message) => {
                self.fail(format!("{} failed while {doing}: {message}", self.run.name(tp_rank)));
            }
            Fault::PeerLost(message) => {
                if self.run.suspects.iter().any(|suspect| suspect.tp_rank == tp_rank) {
                    return;
                }
                let until = self.now + self.run.setup.options().blame_grace;
                let message = format!("{} failed while {doing}: {message}", self.run.name(tp_rank));
                self.run.suspects.push(Suspect { tp_rank, message, until });
                if self.run.suspects.len() == self.run.tp_degree() {
                    let first = self.run.suspects[0].message.clone();
                    self.fail(first);
                } else {
                    self.effects.push(Effect::WakeAt(until));
                }
            }
        }
    }

    fn woken(&mut self) {
        if let Some(due) = self.run.suspects.iter().find(|suspect| suspect.until <= self.now) {
            let message = due.message.clone();
            self.fail(message);
        }
    }

    fn worker_lost(&mut self, worker: &WorkerId, cause: &str) {
        let Some(tp_rank) = self.run.workers.iter().position(|held| held == worker) else { return };
        if !self.is_released(tp_rank) {
            let message = format!("{} was lost while {}: {cause}", self.run.name(tp_rank), self.run.doing());
            self.fail(message);
        }
    }

    /// Whether the run needs this rank no more.
    fn is_released(&self, tp_rank: usize) -> bool {
        tp_rank > 0 && matches!(self.run.phase, Phase::Exporting)
    }

    fn stream_fault(&mut self, tp_rank: usize, fault: &StreamFault) {
        let message = format!("{} failed while {}: {fault}", self.run.name(tp_rank), self.run.doing());
        self.fail(message);
    }

    pub(crate) fn fail(&mut self, message: String) {
        self.run.fail(message, self.now, self.effects);
    }

    fn enter(&mut self, state: RunState, message: String) {
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
