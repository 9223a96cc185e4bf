//! Which whole blocks go (Shortened LLaMA, arXiv:2402.02834): those of the lowest score, of equal ones the first.

use crate::legal_counts::violation;
use crate::{KeepMask, LayerKeep};
use model_spec::ModelSpec;
use recipe::{Budget, Depth, FieldViolation, Pruning};

/// The first and the last blocks that `protect_ends` keeps.
const FIRST_KEPT: usize = 4;
const LAST_KEPT: usize = 2;

/// How many blocks go, and which of them may.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DepthGoal {
    pub count: usize,
    /// By layer.
    pub removable: Vec<bool>,
}

/// The scores of blocks do not say which go.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum DepthError {
    #[error("{actual} blocks are scored, the model has {expected}")]
    Count { expected: usize, actual: usize },
    #[error("the score of block {layer} is {value}")]
    NotFinite { layer: usize, value: f64 },
    #[error("block {layer} may not go, or goes twice")]
    NotRemovable { layer: usize },
}

impl DepthGoal {
    /// # Errors
    /// When the model's layers differ, or more blocks would go than may.
    pub fn resolve(dense: &ModelSpec, pruning: &Pruning, depth: &Depth) -> Result<Self, FieldViolation> {
        let layers = dense.layers.len();
        if dense.uniform_layer().is_none() {
            let problem = "needs a model whose layers have equal widths, which this one has not";
            return Err(violation("pruning.depth", problem));
        }
        let ends = |layer: usize| layer < FIRST_KEPT || layer + LAST_KEPT >= layers;
        let removable: Vec<bool> = (0..layers)
            .map(|layer| {
                !(depth.protect_ends && ends(layer)
                    || pruning.protection.covers(layer, layers, pruning.shape))
            })
            .collect();
        let may_go = removable.iter().filter(|may_go| **may_go).count().min(layers - 1);
        let (field, count) = match depth.blocks {
            Some(count) => ("pruning.depth.blocks", count),
            None => nearest_to_budget(dense, pruning.budget),
        };
        if count > may_go {
            let kept = match depth.protect_ends {
                true => format!("; `protect_ends` keeps the first {FIRST_KEPT} and the last {LAST_KEPT}"),
                false => String::new(),
            };
            let problem = format!("{count} of {layers} blocks would go, but no more than {may_go} may{kept}");
            return Err(violation(field, problem));
        }
        Ok(Self { count, removable })
    }

    /// The blocks that go by `scores`, one for each layer, ascending.
    ///
    /// # Errors
    /// When there is not one finite score for each block.
    pub fn select(&self, scores: &[f64]) -> Result<Vec<usize>, DepthError> {
        let expected = self.removable.len();
        if scores.len() != expected {
            return Err(DepthError::Count { expected, actual: scores.len() });
        }
        if let Some((layer, &value)) = scores.iter().enumerate().find(|(_, score)| !score.is_finite()) {
            return Err(DepthError::NotFinite { layer, value });
        }
        let mut order: Vec<usize> = (0..expected).filter(|&layer| self.removable[layer]).collect();
        order.sort_by(|&one, &other| scores[one].total_cmp(&scores[other]).then(one.cmp(&other)));
        order.truncate(self.count);
        order.sort_unstable();
        Ok(order)
    }

    /// `keep` without the blocks of `removed`.
    ///
    /// # Errors
    /// When one of them may not go.
    pub fn without(&self, keep: &KeepMask, removed: &[usize]) -> Result<KeepMask, DepthError> {
        let mut left = keep.clone();
        for &layer in removed {
            let may_go = self.removable.get(layer) == Some(&true);
            match left.layers.get_mut(layer) {
                Some(layer) if may_go && !layer.is_removed() => *layer = LayerKeep::removed(),
                Some(_) | None => return Err(DepthError::NotRemovable { layer }),
            }
        }
        Ok(left)
    }
}

/// The number of blocks that comes nearest to a budget, and the field that asks for it.
fn nearest_to_budget(dense: &ModelSpec, budget: Budget) -> (&'static str, usize) {
    let layers = dense.layers.len() as f64;
    match budget {
        Budget::Sparsity(sparsity) => ("pruning.budget.sparsity", (sparsity * layers).round() as usize),
        Budget::Parameters(parameters) => {
            let excess = dense.parameter_count().saturating_sub(parameters) as f64;
            ("pruning.budget.parameters", (excess / block_parameters(dense) as f64).round() as usize)
        }
    }
}

/// Parameters of one block, its two norms included.
#[must_use]
pub fn block_parameters(dense: &ModelSpec) -> u64 {
    let layers = dense.layers.len().max(1) as u64;
    dense.projection_weight_count() / layers + 2 * dense.hidden_size as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::model;
    use model_spec::{Family, LayerSpec, Rope, RopeScaling};

    fn llama(hidden: usize, layers: usize, heads: usize, channels: usize) -> ModelSpec {
        let layer = LayerSpec { query_head_count: heads, kv_head_count: heads, intermediate_size: channels };
        ModelSpec {
            family: Family::Llama,
            hidden_size: hidden,
            head_dim: hidden / heads,
            vocab_size: 32_000,
            max_position_embeddings: 2048,
            rms_norm_eps: 1e-6,
            rope: Rope { theta: 10_000.0, scaling: RopeScaling::None },
            tie_word_embeddings: false,
            layers: vec![layer; layers],
        }
    }

    fn goal(dense: &ModelSpec, depth: Depth, budget: Budget) -> Result<DepthGoal, FieldViolation> {
        let pruning = Pruning { budget, depth: Some(depth), ..Pruning::default() };
        DepthGoal::resolve(dense, &pruning, &depth)
    }

    fn blocks(count: usize) -> Depth {
        Depth { blocks: Some(count), ..Depth::default() }
    }

    #[test]
    fn models_without_blocks_have_the_published_numbers_of_parameters() {
        let dense = llama(4096, 32, 32, 11_008);
        assert_eq!(block_parameters(&dense), 202_383_360);
        let goal = goal(&dense, blocks(6), Budget::Sparsity(0.5)).unwrap();
        let scores: Vec<f64> = (0..32).map(f64::from).collect();
        let removed = goal.select(&scores).unwrap();
        assert_eq!(removed, [4, 5, 6, 7, 8, 9], "the first four stay");
        let kept = goal.without(&KeepMask::full(&dense), &removed).unwrap().pruned_spec(&dense);
        assert_eq!(kept.parameter_count(), 5_524_115_456);
        assert_eq!(kept.without_removed_layers().layers.len(), 26);
        for (count, billions) in [(15, 3.70), (20, 2.69), (26, 1.48)] {
            let parameters = dense.parameter_count() - count * block_parameters(&dense);
            assert!((parameters as f64 / 1e9 - billions).abs() < 0.005);
        }
    }

    #[test]
    fn protected_blocks_stay_and_more_than_may_go_is_refused() {
        let dense = llama(64, 32, 4, 128);
        let most = goal(&dense, blocks(26), Budget::Sparsity(0.5)).unwrap();
        let removed = most.select(&[1.0; 32]).unwrap();
        assert_eq!(removed, (4..30).collect::<Vec<_>>());
        let refused = goal(&dense, blocks(27), Budget::Sparsity(0.5)).unwrap_err();
        assert_eq!(refused.field, "pruning.depth.blocks");
        assert!(refused.problem.contains("no more than 26 may"), "{}", refused.problem);
        let free = Depth { protect_ends: false, ..blocks(31) };
        assert_eq!(goal(&dense, free, Budget::Sparsity(0.5)).unwrap().count, 31);
        let all = Depth { protect_ends: false, ..blocks(32) };
        assert!(goal(&dense, all, Budget::Sparsity(0.5)).is_err(), "one block stays");
        let by_budget = goal(&dense, Depth::default(), Budget::Sparsity(0.9)).unwrap_err();
        assert_eq!(by_budget.field, "pruning.budget.sparsity");
    }

    #[test]
    fn a_budget_is_met_by_the_nearest_whole_number_of_blocks() {
        let dense = llama(64, 30, 4, 128);
        for (sparsity, count) in [(0.0, 0), (0.2, 6), (0.21, 6), (0.22, 7), (0.5, 15)] {
            assert_eq!(goal(&dense, Depth::default(), Budget::Sparsity(sparsity)).unwrap().count, count);
        }
        let parameters = dense.parameter_count() - 9 * block_parameters(&dense) - 10;
        assert_eq!(goal(&dense, Depth::default(), Budget::Parameters(parameters)).unwrap().count, 9);
    }

    #[test]
    fn equal_scores_go_by_place_and_a_score_that_is_no_number_is_refused() {
        let dense = model(8, 2, 2, 4);
        let depth = Depth { protect_ends: false, ..blocks(3) };
        let goal = goal(&dense, depth, Budget::Sparsity(0.5)).unwrap();
        assert_eq!(goal.select(&[3.0, 1.0, 2.0, 1.0, 1.0, 1.0, 9.0, 9.0]).unwrap(), [1, 3, 4]);
        let error = goal.select(&[1.0, f64::NAN, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]).unwrap_err();
        assert!(matches!(error, DepthError::NotFinite { layer: 1, .. }));
        assert_eq!(goal.select(&[1.0; 3]), Err(DepthError::Count { expected: 8, actual: 3 }));
        let full = KeepMask::full(&dense);
        assert_eq!(goal.without(&full, &[2, 2]), Err(DepthError::NotRemovable { layer: 2 }));
        assert_eq!(goal.without(&full, &[8]), Err(DepthError::NotRemovable { layer: 8 }));
    }
}
