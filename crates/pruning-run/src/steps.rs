//! What follows from a step that all ranks have ended: the report, the average, the decision.

use crate::run::{Gather, Phase, Purpose};
use crate::training::EndedStep;
use crate::transition::{Transition, agree};
use crate::{CalibrationFound, Decision, Effect, RankReport, RunEventKind, StepReport};
use pruning::{KeepMask, Target, combine, decide, random_importances};
use recipe::{Criterion, Shrink};
use std::sync::Arc;
use std::time::Duration;

impl Transition<'_> {
    /// Takes in all steps that all ranks have ended, in order.
    pub(crate) fn end_steps(&mut self) {
        loop {
            let run = &mut *self.run;
            let Phase::Training(segment) = &mut run.phase else { return };
            let setup = &run.setup;
            let Some(ended) =
                segment.next_ended(setup.dense(), &run.keep_mask, |step| setup.wants_scores(step))
            else {
                return;
            };
            self.end_step(ended);
        }
    }

    fn end_step(&mut self, ended: EndedStep) {
        let first = ended.reports[0].clone();
        let step = first.step;
        let skips = |report: &RankReport| !report.skipped.is_empty();
        if let Some(other) = ended.reports.iter().position(|report| skips(report) != skips(&first)) {
            let name = self.run.name(other);
            return self.fault(format!(
                "ranks diverged at step {step}: {name} and rank 0 differ on whether it counts"
            ));
        }
        // Of a step that does not count the loss may be no number.
        let differs = |report: &RankReport| !skips(&first) && !agree(report.loss, first.loss);
        if let Some(other) = ended.reports.iter().position(differs) {
            let (name, loss) = (self.run.name(other), ended.reports[other].loss);
            return self.fault(format!(
                "ranks diverged at step {step}: the loss is {} on rank 0 and {loss} on {name}",
                first.loss
            ));
        }
        let dense = self.run.setup.dense();
        let report = StepReport {
            step,
            loss: first.loss,
            grad_norm: first.grad_norm,
            learning_rate: first.learning_rate,
            tokens: first.tokens,
            duration: longest(&ended.reports, |report| report.duration),
            score_duration: longest(&ended.reports, |report| report.score_duration),
            memory_bytes: ended.reports.iter().map(|report| report.memory_bytes).max().unwrap_or(0),
            sparsity: self.run.keep_mask.sparsity(dense),
            generation: self.run.generation,
            // The rank that holds the place knows more of it.
            skipped: ended
                .reports
                .iter()
                .map(|report| &report.skipped)
                .max_by_key(|text| text.len())
                .cloned()
                .unwrap_or_default(),
        };
        self.run.step_duration = Some(report.duration);
        self.record(RunEventKind::Step(report));
        if let Err(error) = self.average(step, ended) {
            self.fail(format!("step {step}: {error}"));
        }
    }

    /// Takes a step's scores into the moving average.
    fn average(&mut self, step: u64, ended: EndedStep) -> Result<(), Box<dyn std::error::Error>> {
        let setup = &self.run.setup;
        let (Some(pruning), Some(average)) = (&setup.recipe().pruning, &mut self.run.average) else {
            return Ok(());
        };
        let skipped = ended.reports.iter().any(|report| !report.skipped.is_empty());
        if skipped || setup.pruning_steps().last().is_none_or(|last| step > *last) {
            return Ok(());
        }
        let grouping = pruning.head_grouping;
        let importances = match (pruning.criterion, ended.scores) {
            (Criterion::Random, _) => {
                random_importances(setup.dense(), &self.run.keep_mask, setup.recipe().seed, grouping)
            }
            (criterion, Some(scores)) => combine(setup.dense(), &scores?, criterion, grouping)?,
            (
                Criterion::LoraPrune { .. }
                | Criterion::Tangent
                | Criterion::Flap
                | Criterion::Taylor
                | Criterion::Magnitude
                | Criterion::Wanda,
                None,
            ) => return Ok(()),
        };
        Ok(average.update(&importances)?)
    }

    /// What follows from the steps so far: a decision, if one is due and the guard lets it, or more of them.
    pub(crate) fn consider(&mut self) {
        let done = self.run.next_step >= self.run.setup.recipe().steps;
        if (self.decision_is_due() || done) && self.guard_looks() {
            self.measure(Purpose::Guard);
        } else {
            self.decide_or_go_on();
        }
    }

    /// A mask is in force: the guard looks at the last one, if it is the last step's.
    pub(crate) fn consider_end(&mut self) {
        if self.run.next_step >= self.run.setup.recipe().steps && self.guard_looks() {
            self.measure(Purpose::Guard);
        } else {
            self.go_on();
        }
    }

    fn decision_is_due(&self) -> bool {
        let in_force = self.run.history.masks.step(self.run.generation);
        let due = |last| {
            self.run.setup.pruning_steps().binary_search(&last).is_ok()
                && in_force.is_none_or(|step| step < last)
        };
        // What was decided before pruning was held is applied again after a fault.
        let may_prune = self.run.history.held_at.is_none_or(|held| self.run.generation < held);
        may_prune && self.run.next_step.checked_sub(1).is_some_and(due)
    }

    pub(crate) fn decide_or_go_on(&mut self) {
        match self.decision_is_due() {
            false => self.go_on(),
            true if self.must_calibrate() => self.calibrate(self.run.next_step - 1),
            true => self.decide(self.run.next_step - 1, None),
        }
    }

    /// Decides the mask due after `step`, logs it and has every rank apply it. One that was logged before a restart is
    /// not decided anew.
    pub(crate) fn decide(&mut self, step: u64, calibration: Option<&CalibrationFound>) {
        let setup = &self.run.setup;
        let (Some(pruning), Some(target), Some(average)) =
            (&setup.recipe().pruning, setup.target(), &mut self.run.average)
        else {
            return self.go_on();
        };
        debug_assert!(average.updates <= step + 1, "no step is averaged twice");
        let dense = setup.dense();
        let share = pruning.ramp.share_at(step, setup.recipe().steps);
        let generation = self.run.generation.next();
        let logged = self.run.history.masks.get(generation);
        let is_new = logged.is_none();
        let keep_mask = match logged {
            Some(logged) => Arc::new(logged),
            None => {
                let decided = without_blocks(&self.run.keep_mask, target, calibration).and_then(|keep_now| {
                    decide(dense, &keep_now, average, target, share).map_err(|error| chain(&error))
                });
                match decided {
                    Ok(keep_mask) => Arc::new(keep_mask),
                    Err(error) => {
                        return self.fail(format!("no mask can be decided after step {step}: {error}"));
                    }
                }
            }
        };
        debug_assert!(keep_mask.check_subset_of(&self.run.keep_mask).is_ok(), "kept sets only shrink");
        debug_assert!(
            (0..dense.layers.len())
                .filter(|&layer| pruning.protection.covers(layer, dense.layers.len(), pruning.shape))
                .all(|layer| keep_mask.layers[layer] == self.run.keep_mask.layers[layer]),
            "protected layers are never touched"
        );
        let importance = is_new.then(|| Arc::new(average.clone()));
        average.forget_removed(&keep_mask, pruning.head_grouping);
        let decision = Decision {
            generation,
            step,
            sparsity: keep_mask.sparsity(dense),
            parameters: keep_mask.pruned_spec(dense).parameter_count(),
            keep_mask: keep_mask.as_ref().clone(),
        };
        let restricted = self.run.placement.restricted_to(&keep_mask);
        self.run.placement = match pruning.shrink {
            Shrink::Live => restricted.rebalanced(dense),
            Shrink::Never => restricted,
        };
        self.run.generation = generation;
        self.run.keep_mask = keep_mask.clone();
        self.run.phase = Phase::ApplyingMask { acknowledged: Gather::new(self.run.tp_degree()) };
        if let Some(importance) = importance {
            self.effects.push(Effect::KeepImportance { generation, importance });
            self.record(RunEventKind::Decision(Arc::new(decision)));
        }
        self.effects.push(Effect::ApplyMask { generation, keep_mask });
    }
}

/// The mask in force without the blocks that go by a calibration.
fn without_blocks(
    keep_now: &KeepMask,
    target: &Target,
    calibration: Option<&CalibrationFound>,
) -> Result<KeepMask, String> {
    let (Some(goal), Some(found)) = (target.depth(), calibration) else { return Ok(keep_now.clone()) };
    let removed = match found.block_order.is_empty() {
        true => goal.select(&found.block_scores),
        false => Ok(found.block_order.clone()),
    };
    removed.and_then(|removed| goal.without(keep_now, &removed)).map_err(|error| error.to_string())
}

fn longest(reports: &[RankReport], part: impl Fn(&RankReport) -> Duration) -> Duration {
    reports.iter().map(part).max().unwrap_or(Duration::ZERO)
}

/// An error with its causes.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(&format!(": {cause}"));
        source = cause.source();
    }
    text
}
