//! Saving a run while it goes on: the ranks copy their state aside, the copies are written while they train, and the
//! manifest comes last.

use crate::leaving::pause_after;
use crate::run::{Gather, Phase, Taken, Writing};
use crate::transition::Transition;
use crate::{
    Checkpoint, CheckpointRef, Effect, Generation, GuardAction, RunEventKind, SavedState, ShardFile,
};
use std::sync::Arc;
use std::time::SystemTime;

/// Before the first step there is nothing to save.
const START: Taken = Taken { steps_done: 0, generation: Generation(0) };

impl Transition<'_> {
    fn here(&self) -> Taken {
        Taken { steps_done: self.run.next_step, generation: self.run.generation }
    }

    /// Whether this group has done something that no checkpoint holds.
    pub(crate) fn is_unsaved(&self) -> bool {
        self.run.taken.unwrap_or(START) != self.here()
    }

    /// Whether to take one now. While one is on its way another is not begun, unless it would be the last.
    pub(crate) fn checkpoint_is_due(&self, done: bool) -> bool {
        let options = self.run.setup.options();
        if self.run.setup.recipe().steps == 0 {
            return options.exports && self.run.taken.is_none();
        }
        // What a run ends with holds the logits that an export is checked against, then or later.
        let lacks_logits = done && self.run.shards.is_none() && !self.writes_logits();
        if !self.is_unsaved() && !lacks_logits {
            return false;
        }
        // One that was not written is tried again when the next is due, so that a full store does not slow training.
        let tried = self.run.tried.unwrap_or(START);
        let decided = tried.generation != self.run.generation;
        let old = self.run.next_step.saturating_sub(tried.steps_done) >= options.checkpoint_every.max(1);
        done || ((decided || old) && self.run.writing.is_none())
    }

    /// Whether a guard could not go back to this generation if it gave up the next: its checkpoint is still on its way.
    pub(crate) fn opens_unsafely(&self) -> bool {
        let generation = self.run.generation;
        let reverts = self.run.setup.options().guard.is_some_and(|guard| guard.action == GuardAction::Revert);
        let is_written =
            || self.run.history.checkpoints.iter().any(|kept| kept.place.generation == generation);
        let is_on_its_way =
            self.run.writing.as_ref().is_some_and(|writing| writing.state.generation == generation);
        reverts && is_on_its_way && !is_written()
    }

    /// When the run goes on with a checkpoint that it waits to try again.
    pub(crate) fn next_try(&self) -> Option<SystemTime> {
        let waits = matches!(self.run.phase, Phase::AwaitingCheckpoint) && self.run.writing.is_none();
        self.run.checkpoint_again.filter(|_| waits)
    }

    fn writes_logits(&self) -> bool {
        self.run.writing.as_ref().is_some_and(|writing| writing.state.with_logits)
    }

    /// Has the ranks copy their state aside. One that is still being written is waited for first.
    pub(crate) fn snapshot(&mut self, done: bool) {
        if self.run.writing.is_some() {
            self.run.phase = Phase::AwaitingCheckpoint;
            return;
        }
        // Within training the steps are pause enough.
        let waits = done || self.run.wish.is_some();
        if let Some(again) = self.run.checkpoint_again.filter(|again| waits && *again > self.now) {
            self.run.phase = Phase::AwaitingCheckpoint;
            self.effects.push(Effect::WakeAt(again));
            return;
        }
        let with_logits = done;
        // A group tries the same place again only after a failure.
        let name = match (self.run.next_step, self.run.history.starts, self.run.failed_checkpoints_in_a_row) {
            (steps, start, 0) => format!("{steps:08}-{start}"),
            (steps, start, failures) => format!("{steps:08}-{start}-{failures}"),
        };
        let tp_degree = self.run.tp_degree();
        let state = SavedState {
            steps_done: self.run.next_step,
            generation: self.run.generation,
            keep_mask: self.run.keep_mask.as_ref().clone(),
            placement: self.run.placement.clone(),
            average: self.run.average.clone(),
            shards: Vec::new(),
            with_logits,
        };
        self.run.writing = Some(Writing {
            name: name.clone(),
            since: self.now,
            state,
            shards: Gather::new(tp_degree),
            committing: false,
        });
        self.run.tried = Some(self.here());
        self.run.phase = Phase::Snapshotting { name: name.clone(), taken: Gather::new(tp_degree) };
        self.effects.push(Effect::Checkpoint { name, with_logits });
    }

    pub(crate) fn snapshotted(&mut self, tp_rank: usize, of: &str) {
        if !self.is_rank("a snapshot", tp_rank) {
            return;
        }
        let Phase::Snapshotting { name, taken } = &mut self.run.phase else {
            return self.refuse("a snapshot", tp_rank);
        };
        if name != of {
            return self.refuse("a snapshot", tp_rank);
        }
        if taken.put(tp_rank, ()).is_some() {
            // It may have failed on one rank before the others had taken theirs.
            if self.run.writing.as_ref().is_some_and(|writing| writing.name == of) {
                self.run.taken = Some(self.here());
            }
            self.go_on();
        }
    }

    pub(crate) fn checkpointed(&mut self, tp_rank: usize, name: &str, shard: ShardFile) {
        if !self.is_rank("a checkpoint", tp_rank) {
            return;
        }
        let Some(writing) = self.run.writing.as_mut().filter(|writing| writing.name == name) else {
            return self.refuse("a checkpoint", tp_rank);
        };
        let Some(shards) = writing.shards.put(tp_rank, shard) else { return };
        writing.committing = true;
        writing.state.shards = shards;
        let state = Arc::new(writing.state.clone());
        self.effects.push(Effect::Commit { name: writing.name.clone(), state });
    }

    pub(crate) fn checkpoint_written(&mut self, name: &str, size_bytes: u64) {
        let Some(writing) = self.run.writing.take_if(|writing| writing.name == name && writing.committing)
        else {
            return self.refuse("a finished checkpoint", 0);
        };
        let place = CheckpointRef {
            run_id: self.run.id.clone(),
            name: name.to_owned(),
            steps_done: writing.state.steps_done,
            generation: writing.state.generation,
        };
        let with_logits = writing.state.with_logits;
        self.run.faults_in_a_row = 0;
        self.run.failed_checkpoints_in_a_row = 0;
        self.run.checkpoint_again = None;
        if with_logits {
            self.run.shards = Some((place.clone(), writing.state.shards));
        }
        let duration = self.now.duration_since(writing.since).unwrap_or_default();
        self.record(RunEventKind::Checkpoint(Checkpoint { place, size_bytes, duration, with_logits }));
        self.run.forget_checkpoints();
        let mut kept = self.run.checkpoints();
        // One that a group is reading stays while it does.
        if let Phase::Restoring { from } | Phase::Loading { restores: Some(from), .. } = &self.run.phase
            && !kept.contains(from)
        {
            kept.insert(0, from.clone());
        }
        self.effects.push(Effect::Retain(kept));
        if let Phase::AwaitingCheckpoint = self.run.phase {
            self.go_on();
        }
    }

    /// A checkpoint that did not come about costs nothing but the time since the one before, unless it was the last.
    pub(crate) fn checkpoint_failed(&mut self, name: &str, cause: &str) {
        let Some(writing) = self.run.writing.take_if(|writing| writing.name == name) else {
            return self.refuse("a failed checkpoint", 0);
        };
        self.run.failed_checkpoints_in_a_row += 1;
        let steps_done = writing.state.steps_done;
        let message = format!("the checkpoint after {steps_done} steps was not written: {cause}");
        if self.run.failed_checkpoints_in_a_row > self.run.setup.options().max_restarts {
            return self.fail(message);
        }
        self.run.checkpoint_again = Some(self.now + pause_after(self.run.failed_checkpoints_in_a_row));
        let state = self.run.state();
        self.enter(state, format!("{message}; another will be tried"));
        if self.run.taken == Some(Taken { steps_done, generation: writing.state.generation }) {
            // It is as if it had never been taken.
            self.run.taken = self
                .run
                .base()
                .map(|place| Taken { steps_done: place.steps_done, generation: place.generation });
        }
        if let Phase::AwaitingCheckpoint = self.run.phase {
            self.go_on();
        }
    }
}
