//! What follows from a step that all ranks have ended: the report, the average, the decision.

use crate::run::{Gather, Phase};
use crate::training::EndedStep;
use crate::transition::{Transition, agree};
use crate::{Decision, Effect, Generation, RankReport, RunEventKind, StepReport};
use pruning::{combine, decide, random_importances};
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
        let first = ended.reports[0];
        let step = first.step;
        if let Some(other) = ended.reports.iter().position(|report| !agree(report.loss, first.loss)) {
            let (name, loss) = (self.run.name(other), ended.reports[other].loss);
            return self.fail(format!(
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
        };
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
        if setup.pruning_steps().last().is_none_or(|last| step > *last) {
            return Ok(());
        }
        let grouping = pruning.head_grouping;
        let importances = match (pruning.criterion, ended.scores) {
            (Criterion::Random, _) => {
                random_importances(setup.dense(), &self.run.keep_mask, setup.recipe().seed, grouping)
            }
            (criterion, Some(scores)) => combine(setup.dense(), &scores?, criterion, grouping)?,
            (
                Criterion::LoraPrune { .. } | Criterion::Taylor | Criterion::Magnitude | Criterion::Wanda,
                None,
            ) => return Ok(()),
        };
        Ok(average.update(&importances)?)
    }

    /// Decides the mask due after `step`, logs it and has every rank apply it.
    pub(crate) fn decide(&mut self, step: u64) {
        let setup = &self.run.setup;
        let (Some(pruning), Some(target), Some(average)) =
            (&setup.recipe().pruning, setup.target(), &mut self.run.average)
        else {
            return self.train();
        };
        debug_assert_eq!(average.updates, step + 1, "every step up to the decision has been averaged");
        let dense = setup.dense();
        let share = pruning.ramp.share_at(step, setup.recipe().steps);
        let keep_mask = match decide(dense, &self.run.keep_mask, average, target, share) {
            Ok(keep_mask) => Arc::new(keep_mask),
            Err(error) => {
                return self.fail(format!("no mask can be decided after step {step}: {}", chain(&error)));
            }
        };
        debug_assert!(keep_mask.check_subset_of(&self.run.keep_mask).is_ok(), "kept sets only shrink");
        debug_assert!(
            (0..dense.layers.len())
                .filter(|&layer| pruning.protection.covers(layer, dense.layers.len(), pruning.shape))
                .all(|layer| keep_mask.layers[layer] == self.run.keep_mask.layers[layer]),
            "protected layers are never touched"
        );
        average.forget_removed(&keep_mask, pruning.head_grouping);
        let generation = self.run.generation.next();
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
        self.put_in_force(generation, keep_mask, decision);
    }

    fn put_in_force(
        &mut self,
        generation: Generation,
        keep_mask: Arc<pruning::KeepMask>,
        decision: Decision,
    ) {
        self.run.generation = generation;
        self.run.keep_mask = keep_mask.clone();
        self.run.phase = Phase::ApplyingMask { acknowledged: Gather::new(self.run.tp_degree()) };
        self.record(RunEventKind::Decision(Arc::new(decision)));
        self.effects.push(Effect::ApplyMask { generation, keep_mask });
    }
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
