//! Giving the workers back before the end: on someone's wish, or after a fault.

use crate::run::{Next, Phase, Suspect, Wish};
use crate::transition::Transition;
use crate::{Effect, Fault, RunState, WorkerId};
use std::time::Duration;

const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// How long to wait after so many failures in a row. The first may well be the only one.
pub(crate) fn pause_after(failures: u32) -> Duration {
    match failures {
        0 | 1 => Duration::ZERO,
        failures => LONGEST_PAUSE.min(FIRST_PAUSE * 2_u32.saturating_pow(failures - 2)),
    }
}

impl Transition<'_> {
    // --- wishes ---

    /// Notes what someone wants; it happens as soon as there is a checkpoint. The end outranks a pause, a pause a rest,
    /// and a rest a new start.
    pub(crate) fn wish(&mut self, wish: Wish) {
        let rank = |wish: &Wish| match wish {
            Wish::Cancel { .. } => 3,
            Wish::Pause { .. } => 2,
            Wish::Yield { requeue: false, .. } => 1,
            Wish::Yield { requeue: true, .. } => 0,
        };
        let on_its_way = match &self.run.phase {
            Phase::Leaving { next: Next::Wish(wish) } => Some(wish),
            Phase::Leaving { next: Next::Recover | Next::Revert }
            | Phase::Queued { .. }
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
            | Phase::FreeingMemory
            | Phase::Exporting
            | Phase::BackingOff { .. }
            | Phase::Paused
            | Phase::Resting
            | Phase::Ended => None,
        };
        if self.run.wish.iter().chain(on_its_way).any(|earlier| rank(earlier) > rank(&wish)) {
            return;
        }
        // It takes the place of an earlier one.
        self.run.wish = None;
        match &self.run.phase {
            // A pause would only lose what is nearly done; the end is granted at once.
            Phase::Exporting | Phase::FreeingMemory => match wish {
                Wish::Cancel { reason } => self.run.end(RunState::Cancelled, reason, self.now, self.effects),
                Wish::Pause { .. } => self.refuse("a pause", 0),
                Wish::Yield { .. } => self.abandon(Next::Wish(wish)),
            },
            Phase::Queued { .. } | Phase::BackingOff { .. } => match &wish {
                // It holds no worker and keeps its place.
                Wish::Yield { requeue: true, .. } => {}
                // The end leaves the queue by itself.
                Wish::Cancel { .. } => self.grant(wish),
                Wish::Pause { .. } | Wish::Yield { requeue: false, .. } => {
                    if let Phase::Queued { .. } = self.run.phase {
                        self.effects.push(Effect::LeaveQueue);
                    }
                    self.grant(wish);
                }
            },
            Phase::Paused => match &wish {
                Wish::Cancel { .. } => self.grant(wish),
                Wish::Pause { .. } | Wish::Yield { .. } => {}
            },
            // What is asked of a run at rest holds at the coordinator's next start.
            Phase::Resting => match &wish {
                Wish::Cancel { .. } | Wish::Pause { .. } => self.grant(wish),
                Wish::Yield { .. } => {}
            },
            Phase::Leaving { .. } => {
                self.announce(&wish);
                self.run.wish = Some(wish);
            }
            Phase::Restoring { .. }
            | Phase::Loading { .. }
            | Phase::OpeningRendezvous
            | Phase::Joining { .. } => {
                self.announce(&wish);
                self.abandon(Next::Wish(wish));
            }
            Phase::Evaluating { .. } if !self.is_unsaved() && self.run.writing.is_none() => {
                self.announce(&wish);
                self.abandon(Next::Wish(wish));
            }
            Phase::Evaluating { .. }
            | Phase::Training(_)
            | Phase::Calibrating { .. }
            | Phase::ApplyingMask { .. }
            | Phase::Snapshotting { .. }
            | Phase::AwaitingCheckpoint => {
                self.announce(&wish);
                self.run.wish = Some(wish);
            }
            Phase::Ended => {}
        }
    }

    fn announce(&mut self, wish: &Wish) {
        match wish {
            Wish::Pause { reason } => self.enter(RunState::Pausing, reason.clone()),
            Wish::Cancel { reason } => self.enter(RunState::Cancelling, reason.clone()),
            Wish::Yield { reason, .. } => {
                let state = self.run.state();
                self.enter(state, format!("{reason}; writes a checkpoint"));
            }
        }
    }

    /// Between two steps, with a wish: saves what is unsaved, then gives the workers back.
    pub(crate) fn leave(&mut self) {
        if self.is_unsaved() {
            return self.snapshot(self.run.next_step >= self.run.setup.recipe().steps);
        }
        if self.run.writing.is_some() {
            self.run.phase = Phase::AwaitingCheckpoint;
            return;
        }
        if let Some(wish) = self.run.wish.take() {
            self.abandon(Next::Wish(wish));
        }
    }

    /// Ends the sessions; what follows comes when they have ended.
    pub(crate) fn abandon(&mut self, next: Next) {
        self.run.suspects.clear();
        self.run.phase = Phase::Leaving { next };
        self.effects.push(Effect::AbortSessions);
    }

    /// The sessions have ended.
    pub(crate) fn left(&mut self, next: Next) {
        self.effects.push(Effect::ReleaseWorkers);
        self.run.workers.clear();
        self.run.taken = None;
        self.run.tried = None;
        self.run.shards = None;
        self.drop_unfinished();
        // What was wished meanwhile comes first.
        match (self.run.wish.take(), next) {
            (Some(wish), _) | (None, Next::Wish(wish)) => self.grant(wish),
            (None, Next::Recover) => self.try_again(),
            (None, Next::Revert) => {
                let message = self.run.at_checkpoint("goes back to the decision before");
                self.queue(RunState::Recovering, message);
            }
        }
    }

    /// A checkpoint that the ranks have not all written will never be.
    fn drop_unfinished(&mut self) {
        let _ = self.run.writing.take_if(|writing| !writing.committing);
    }

    /// Does what was wished of a run without workers.
    fn grant(&mut self, wish: Wish) {
        match wish {
            Wish::Cancel { reason } => {
                let message = self.run.at_checkpoint(&reason);
                self.run.end(RunState::Cancelled, message, self.now, self.effects);
            }
            Wish::Pause { reason } => {
                let message = self.run.at_checkpoint(&reason);
                self.enter(RunState::Paused, message);
                self.run.phase = Phase::Paused;
            }
            Wish::Yield { reason, requeue } => {
                let message = self.run.at_checkpoint(&reason);
                if requeue {
                    self.queue(RunState::Recovering, message);
                } else {
                    self.run.phase = Phase::Resting;
                }
            }
        }
    }

    pub(crate) fn resume(&mut self, reason: &str) {
        match &self.run.phase {
            Phase::Paused => {
                let message = self.run.at_checkpoint(reason);
                let state = if self.run.history.starts > 0 { RunState::Recovering } else { RunState::Queued };
                self.queue(state, message);
            }
            // Not paused yet: it need not pause any more.
            Phase::Evaluating { .. }
            | Phase::Training(_)
            | Phase::Calibrating { .. }
            | Phase::ApplyingMask { .. }
            | Phase::Snapshotting { .. }
            | Phase::AwaitingCheckpoint
                if matches!(self.run.wish, Some(Wish::Pause { .. })) =>
            {
                self.run.wish = None;
                self.enter(RunState::Running, reason.to_owned());
                if let Phase::AwaitingCheckpoint = self.run.phase {
                    self.go_on();
                }
            }
            Phase::Leaving { next: Next::Recover | Next::Revert }
                if matches!(self.run.wish, Some(Wish::Pause { .. })) =>
            {
                self.run.wish = None;
                let message = self.run.at_checkpoint(reason);
                self.enter(RunState::Recovering, message);
            }
            Phase::Leaving { next: Next::Wish(Wish::Pause { .. }) } => {
                let message = self.run.at_checkpoint(reason);
                self.enter(RunState::Recovering, message);
                self.run.phase = Phase::Leaving {
                    next: Next::Wish(Wish::Yield { reason: reason.to_owned(), requeue: true }),
                };
            }
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
            | Phase::FreeingMemory
            | Phase::Exporting
            | Phase::Leaving { .. }
            | Phase::BackingOff { .. }
            | Phase::Resting
            | Phase::Ended => {}
        }
    }

    /// Waits for workers.
    fn queue(&mut self, state: RunState, message: String) {
        self.enter(state, message.clone());
        self.run.phase = Phase::Queued { message };
        let enqueue = self.run.enqueue();
        self.effects.push(enqueue);
    }

    // --- faults ---

    /// The group has failed: back to the last checkpoint with another, unless that has been tried too often.
    pub(crate) fn fault(&mut self, message: String) {
        let most = self.run.setup.options().max_restarts;
        self.run.faults_in_a_row += 1;
        if self.run.faults_in_a_row > most {
            let message = match most {
                0 => message,
                1 => format!("{message}; a restart did not help"),
                _ => format!("{message}; {most} restarts in a row did not help"),
            };
            return self.fail(message);
        }
        self.drop_unfinished();
        let announced = self.run.at_checkpoint(&message);
        self.run.resuming = Some(message);
        let state = match self.run.wish {
            Some(Wish::Pause { .. }) => RunState::Pausing,
            Some(Wish::Cancel { .. }) => RunState::Cancelling,
            Some(Wish::Yield { .. }) | None => RunState::Recovering,
        };
        self.enter(state, announced);
        self.abandon(Next::Recover);
    }

    fn try_again(&mut self) {
        let pause = pause_after(self.run.faults_in_a_row);
        if pause.is_zero() {
            let message = self.run.history.message.clone();
            self.run.phase = Phase::Queued { message };
            let enqueue = self.run.enqueue();
            self.effects.push(enqueue);
        } else {
            let until = self.now + pause;
            self.run.phase = Phase::BackingOff { until };
            self.effects.push(Effect::WakeAt(until));
        }
    }

    pub(crate) fn rank_failed(&mut self, tp_rank: usize, fault: Fault) {
        if !self.is_rank("a failure", tp_rank) || self.is_released(tp_rank) {
            return;
        }
        // A session that cannot be ended is dropped by its worker's next Load, or with the worker.
        if let Phase::Leaving { .. } = self.run.phase {
            return self.sessions_aborted();
        }
        if self.run.workers.is_empty() {
            return self.refuse("a failure", tp_rank);
        }
        let doing = self.run.doing();
        match fault {
            Fault::Lasting(message) => {
                let message = format!("{} failed while {doing}: {message}", self.run.name(tp_rank));
                self.lasting_fault(message);
            }
            Fault::Own(message) => {
                self.fault(format!("{} failed while {doing}: {message}", self.run.name(tp_rank)));
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
                    self.fault(first);
                } else {
                    self.effects.push(Effect::WakeAt(until));
                }
            }
        }
    }

    /// A fault that the same try would meet again. A checkpoint that cannot be loaded is given up for the one before.
    fn lasting_fault(&mut self, message: String) {
        let unreadable = match &self.run.phase {
            Phase::Loading { restores: Some(place), .. } => Some(place.clone()),
            Phase::Queued { .. }
            | Phase::Restoring { .. }
            | Phase::Loading { restores: None, .. }
            | Phase::OpeningRendezvous
            | Phase::Joining { .. }
            | Phase::Evaluating { .. }
            | Phase::Training(_)
            | Phase::Calibrating { .. }
            | Phase::ApplyingMask { .. }
            | Phase::Snapshotting { .. }
            | Phase::AwaitingCheckpoint
            | Phase::FreeingMemory
            | Phase::Exporting
            | Phase::Leaving { .. }
            | Phase::BackingOff { .. }
            | Phase::Paused
            | Phase::Resting
            | Phase::Ended => None,
        };
        if unreadable.is_some_and(|place| self.run.give_up(&place)) {
            self.fault(message);
        } else {
            self.fail(message);
        }
    }

    pub(crate) fn restore_failed(&mut self, cause: &str, damaged: bool) {
        let Phase::Restoring { from } = &self.run.phase else { return self.refuse("a checkpoint", 0) };
        let from = from.clone();
        let message = format!("the checkpoint after {} steps cannot be read: {cause}", from.steps_done);
        if damaged && !self.run.give_up(&from) {
            return self.fail(message);
        }
        self.fault(message);
    }

    pub(crate) fn woken(&mut self) {
        if let Phase::BackingOff { until } = self.run.phase {
            if until <= self.now {
                let message = self.run.history.message.clone();
                self.run.phase = Phase::Queued { message };
                let enqueue = self.run.enqueue();
                self.effects.push(enqueue);
            } else {
                self.effects.push(Effect::WakeAt(until));
            }
            return;
        }
        if let Some(due) = self.run.suspects.iter().find(|suspect| suspect.until <= self.now) {
            let message = due.message.clone();
            return self.fault(message);
        }
        let suspected = self.run.suspects.iter().map(|suspect| suspect.until).min();
        let (due, later) = match self.next_try() {
            Some(again) if again <= self.now => (true, None),
            later => (false, later),
        };
        if let Some(next) = suspected.into_iter().chain(later).min() {
            self.effects.push(Effect::WakeAt(next));
        }
        if due {
            self.go_on();
        }
    }

    pub(crate) fn worker_lost(&mut self, worker: &WorkerId, cause: &str) {
        let Some(tp_rank) = self.run.workers.iter().position(|held| held == worker) else { return };
        if self.is_released(tp_rank) || matches!(self.run.phase, Phase::Leaving { .. }) {
            return;
        }
        let message = format!("{} was lost while {}: {cause}", self.run.name(tp_rank), self.run.doing());
        self.fault(message);
    }

    /// Whether the run needs this rank no more.
    fn is_released(&self, tp_rank: usize) -> bool {
        tp_rank > 0 && matches!(self.run.phase, Phase::Exporting)
    }
}
