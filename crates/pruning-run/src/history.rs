//! What a run's events so far amount to: from it a run goes on after the process that drove it has died.

use crate::masks::Masks;
use crate::{CheckpointRef, Generation, GuardAction, GuardVerdict, RunEvent, RunEventKind, RunState};
use std::collections::BTreeMap;

/// A fold over the events of a run.
#[derive(Debug, Clone, Default)]
pub struct History {
    pub(crate) revision: u64,
    pub(crate) state: Option<RunState>,
    pub(crate) message: String,
    /// One generation has one mask for ever.
    pub(crate) masks: Masks,
    /// How many of the measurements of a label are done.
    measured: BTreeMap<String, usize>,
    pub(crate) dense_perplexity: Option<f64>,
    pub(crate) restarts: u32,
    /// Groups that were assigned.
    pub(crate) starts: u64,
    /// Exports that were begun.
    pub(crate) exports: u64,
    /// The last mask that is ever put into force, once pruning is held.
    pub(crate) held_at: Option<Generation>,
    /// The step after the last that was reported since the run last went back.
    pub(crate) next_step: u64,
    /// Complete and still there, oldest first.
    pub(crate) checkpoints: Vec<Kept>,
}

/// A complete checkpoint.
#[derive(Debug, Clone)]
pub(crate) struct Kept {
    pub(crate) place: CheckpointRef,
    pub(crate) with_logits: bool,
    /// The first under its mask.
    pub(crate) opens_generation: bool,
}

impl History {
    /// Takes in the next event.
    pub fn take_in(&mut self, event: &RunEvent) {
        self.revision = event.revision;
        match &event.kind {
            RunEventKind::StateChange { state, message } => {
                self.state = Some(*state);
                self.message.clone_from(message);
                self.starts += u64::from(*state == RunState::Starting);
                self.exports += u64::from(*state == RunState::Exporting);
            }
            RunEventKind::Step(report) => self.next_step = report.step + 1,
            RunEventKind::Export(_) | RunEventKind::Calibration(_) => {}
            RunEventKind::Decision(decision) => self.masks.push(decision),
            RunEventKind::Evaluation(evaluation) => {
                *self.measured.entry(evaluation.label.clone()).or_default() += 1;
                if evaluation.label == crate::measuring::DENSE {
                    self.dense_perplexity.get_or_insert(evaluation.perplexity);
                }
            }
            RunEventKind::Task(task) => *self.measured.entry(task.label.clone()).or_default() += 1,
            RunEventKind::Checkpoint(checkpoint) => {
                let place = checkpoint.place.clone();
                let generation = place.generation;
                let opens_generation =
                    !self.checkpoints.iter().any(|kept| kept.place.generation == generation);
                // A stretch that was repeated after a fault is checkpointed anew.
                let is_open =
                    |kept: &Kept| kept.place.steps_done == place.steps_done && kept.opens_generation;
                let reopens = self.checkpoints.iter().any(is_open);
                self.checkpoints.retain(|kept| kept.place.steps_done != place.steps_done);
                self.checkpoints.push(Kept {
                    place,
                    with_logits: checkpoint.with_logits,
                    opens_generation: opens_generation || reopens,
                });
            }
            RunEventKind::Restart(restart) => {
                self.restarts = restart.restarts;
                self.next_step = restart.next_step;
                // The run goes on from its last checkpoint that can be read: one of a later place cannot.
                self.checkpoints.retain(|kept| kept.place.steps_done <= restart.next_step);
            }
            RunEventKind::Guard(verdict) => self.judge(verdict),
        }
    }

    fn judge(&mut self, verdict: &GuardVerdict) {
        match verdict.action {
            None => {}
            Some(GuardAction::Hold) => self.hold(verdict.generation),
            Some(GuardAction::Revert) => {
                self.hold(Generation(verdict.generation.0.saturating_sub(1)));
                self.checkpoints.retain(|kept| kept.place.generation < verdict.generation);
            }
        }
    }

    /// No mask after `generation` is put into force any more.
    pub(crate) fn hold(&mut self, generation: Generation) {
        self.held_at = Some(self.held_at.map_or(generation, |held| held.min(generation)));
    }

    /// Measurements of a label that are done.
    pub(crate) fn measured(&self, label: &str) -> usize {
        self.measured.get(label).copied().unwrap_or(0)
    }

    /// The checkpoint to go on from.
    pub(crate) fn last_checkpoint(&self) -> Option<&Kept> {
        self.checkpoints.last()
    }

    /// Revision of the last event.
    #[must_use]
    pub fn revision(&self) -> u64 {
        self.revision
    }
}
