use crate::{Optimizer, Recipe, Violations};
use serde::{Deserialize, Serialize};

/// Several pairs of factors, one after the other (Chain of LoRA, arXiv:2401.04151): at a knot the pair that was tuned is frozen
/// and stays, a fresh one takes its place, and the optimizer begins anew.
///
/// ```text
/// W = W0 + s (B_1 A_1 + … + B_k A_k)      s = alpha / rank      only B_k and A_k are tuned
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Chain {
    /// Steps before which a knot is tied, ascending.
    pub knots: Vec<u64>,
    /// Steps over which the learning rate rises again after each knot.
    pub warmup_steps: u64,
    /// Steps after a knot whose scores do not count: with `B` at zero the LoRA-guided ones see half of the gradient.
    pub settle_steps: u64,
}

impl Default for Chain {
    fn default() -> Self {
        Self { knots: Vec::new(), warmup_steps: 10, settle_steps: 5 }
    }
}

/// Most knots: each leaves a pair of factors that every pass goes through.
const MOST_KNOTS: usize = 64;

impl Chain {
    pub(crate) fn check(&self, recipe: &Recipe, found: &mut Violations) {
        let steps = recipe.steps;
        let ascend = self.knots.windows(2).all(|pair| pair[0] < pair[1]);
        let inside = self.knots.iter().all(|knot| (1..steps).contains(knot));
        found.require(ascend && inside && !self.knots.is_empty(), "chain.knots", || {
            format!(
                "must name steps in 1..{steps}, ascending, at least one; got {:?}; leave `chain` out for one adapter",
                self.knots
            )
        });
        found.require(self.knots.len() <= MOST_KNOTS, "chain.knots", || {
            format!("must not be more than {MOST_KNOTS}; got {}", self.knots.len())
        });
        let guided = recipe.pruning.as_ref().is_some_and(|pruning| pruning.criterion.is_lora_guided());
        found.require(!guided || self.settle_steps >= 1, "chain.settle_steps", || {
            "must be at least 1: right after a knot `B` is zero, and LoRA-guided scores see half of the gradient".into()
        });
        let bounded = !matches!(&recipe.optimizer, Optimizer::LoraRite(rite) if !rite.guard);
        found.require(bounded || self.warmup_steps >= 1, "chain.warmup_steps", || {
            "must be at least 1 where LoRA-RITE has no guard: each knot is a cold start, whose steps are not bounded"
                .into()
        });
    }

    /// The last knot that is tied before `step` is taken.
    #[must_use]
    pub fn last_knot(&self, step: u64) -> Option<u64> {
        self.knots.iter().copied().rfind(|knot| *knot <= step)
    }

    /// Pairs that are frozen when `step` is taken.
    #[must_use]
    pub fn frozen_pairs(&self, step: u64) -> usize {
        self.knots.iter().filter(|knot| **knot <= step).count()
    }

    /// Factor on the learning rate of `step`.
    #[must_use]
    pub fn warmup_at(&self, step: u64) -> f64 {
        match self.last_knot(step) {
            Some(knot) if step - knot < self.warmup_steps => {
                (step - knot + 1) as f64 / (self.warmup_steps + 1) as f64
            }
            Some(_) | None => 1.0,
        }
    }

    /// Whether the scores of `step` count.
    #[must_use]
    pub fn has_settled(&self, step: u64) -> bool {
        self.last_knot(step).is_none_or(|knot| step - knot >= self.settle_steps)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Criterion, LoraPruneForm, LoraRite, Pruning};

    fn chain(knots: &[u64]) -> Chain {
        Chain { knots: knots.to_vec(), warmup_steps: 3, settle_steps: 2 }
    }

    #[test]
    fn knots_ascend_and_lie_inside_the_run() {
        for (knots, good) in [
            (vec![1, 5, 9], true),
            (vec![], false),
            (vec![0], false),
            (vec![10], false),
            (vec![5, 5], false),
            (vec![5, 4], false),
        ] {
            let recipe = Recipe { steps: 10, chain: Some(chain(&knots)), ..Recipe::default() };
            let fields: Vec<String> = recipe.violations().into_iter().map(|one| one.field).collect();
            assert_eq!(fields.is_empty(), good, "{knots:?}: {fields:?}");
            assert!(fields.iter().all(|field| field == "chain.knots"));
        }
    }

    #[test]
    fn what_a_cold_start_would_spoil_is_refused() {
        let fields = |criterion, guard, warmup_steps, settle_steps| -> Vec<String> {
            let recipe = Recipe {
                steps: 100,
                chain: Some(Chain { knots: vec![50], warmup_steps, settle_steps }),
                optimizer: Optimizer::LoraRite(LoraRite { guard, ..LoraRite::default() }),
                pruning: Some(Pruning { criterion, ..Pruning::default() }),
                ..Recipe::default()
            };
            recipe.violations().into_iter().map(|one| one.field).collect()
        };
        let code = Criterion::LoraPrune { form: LoraPruneForm::Code };
        assert_eq!(fields(code, true, 0, 1), [""; 0]);
        assert_eq!(fields(code, true, 0, 0), ["chain.settle_steps"]);
        assert_eq!(fields(Criterion::Tangent, true, 0, 0), ["chain.settle_steps"]);
        assert_eq!(fields(Criterion::Wanda, true, 0, 0), [""; 0]);
        assert_eq!(fields(Criterion::Wanda, false, 1, 0), [""; 0]);
        assert_eq!(fields(Criterion::Wanda, false, 0, 0), ["chain.warmup_steps"]);
    }

    #[test]
    fn after_a_knot_the_rate_rises_anew_and_scores_wait() {
        let chain = chain(&[4, 10]);
        let rates: Vec<f64> = (2..9).map(|step| chain.warmup_at(step)).collect();
        assert_eq!(rates, [1.0, 1.0, 0.25, 0.5, 0.75, 1.0, 1.0]);
        let settled: Vec<bool> = (3..7).map(|step| chain.has_settled(step)).collect();
        assert_eq!(settled, [true, false, false, true]);
        assert_eq!([3, 4, 9, 10].map(|step| chain.frozen_pairs(step)), [0, 1, 1, 2]);
    }
}
