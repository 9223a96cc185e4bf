//! Passes of their own that a decision waits for.

use crate::run::{Gather, Phase};
use crate::transition::{Transition, agree};
use crate::{Calibration, CalibrationFound, Effect, Generation, RunEventKind};
use std::sync::Arc;
use std::time::Duration;

impl Transition<'_> {
    /// Whether the decision that is due needs passes of its own first. One that was logged before a restart does not.
    pub(crate) fn must_calibrate(&self) -> bool {
        let pruning = &self.run.setup.recipe().pruning;
        let next = self.run.generation.next();
        pruning.as_ref().is_some_and(recipe::Pruning::calibrates)
            && next == Generation(1)
            && self.run.history.masks.step(next).is_none()
    }

    pub(crate) fn calibrate(&mut self, step: u64) {
        let generation = self.run.generation;
        self.run.phase = Phase::Calibrating { step, answers: Gather::new(self.run.tp_degree()) };
        self.effects.push(Effect::Calibrate { generation });
    }

    pub(crate) fn calibrated(
        &mut self,
        tp_rank: usize,
        generation: Generation,
        found: CalibrationFound,
        duration: Duration,
    ) {
        if !self.is_rank("a calibration", tp_rank) {
            return;
        }
        if generation != self.run.generation {
            return self.refuse("a calibration", tp_rank);
        }
        let Phase::Calibrating { step, answers } = &mut self.run.phase else {
            return self.refuse("a calibration", tp_rank);
        };
        let step = *step;
        let Some(answers) = answers.put(tp_rank, (found, duration)) else { return };
        let first = &answers[0].0;
        if let Some(other) = answers.iter().position(|(found, _)| !found.agrees_with(first)) {
            let name = self.run.name(other);
            return self.fault(format!(
                "ranks diverged while calibrating the decision after step {step}: {name} and rank 0 differ"
            ));
        }
        let duration = answers.iter().map(|(_, duration)| *duration).max().unwrap_or(Duration::ZERO);
        let found = first.clone();
        let calibration = Calibration { step, found: found.clone(), duration };
        self.record(RunEventKind::Calibration(Arc::new(calibration)));
        self.decide(step, Some(&found));
    }
}

impl CalibrationFound {
    /// The same but for rounding.
    fn agrees_with(&self, other: &Self) -> bool {
        let scores = self.block_scores.iter().zip(&other.block_scores);
        self.block_scores.len() == other.block_scores.len()
            && scores.into_iter().all(|(one, other)| agree(*one, *other))
            && self.block_order == other.block_order
    }
}
