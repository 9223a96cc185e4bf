//! Bytes between ranks, and from ranks to the coordinator, in one optimizer step.

use crate::formats::{compute_bytes, master_bytes};
use crate::rank_shape::RankShape;
use recipe::{Compute, Recipe, Recompute};
use serde::{Deserialize, Serialize};

/// What one rank contributes to sums over the ranks in an optimizer step, in bytes, and what it sends to the coordinator.
/// Zero for a rank alone, but for the scores.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Traffic {
    /// The embedding's rows and two sums a layer; one more a layer where it is run again.
    pub forward: u64,
    /// Two sums a layer.
    pub backward: u64,
    /// The greatest logit, two sums and the gradient of each predicted position.
    pub loss: u64,
    /// Gradients of the factors that every rank holds.
    pub lora_gradients: u64,
    /// Group sums, to the coordinator.
    pub scores: u64,
}

impl Traffic {
    /// ```text
    /// forward    m ((2 or 3) L + 1) n d c        backward   m 2 L n d c        m micro-batches of n tokens
    /// loss       m n' (d c + 3 w)                n' predicted positions, w bytes of a logit
    /// gradients  7 r d L w                       scores     L (2 h + 2 g + 3 i) bytes of a sum
    /// ```
    #[must_use]
    pub fn of_step(shape: &RankShape, recipe: &Recipe, tp_degree: usize) -> Self {
        let scores = Self::scores(shape, recipe);
        if tp_degree == 1 {
            return Self { scores, ..Self::default() };
        }
        let batch = recipe.batch;
        let (rows, micro) = (batch.rows as u64, batch.micro_batches as u64);
        let (n, predicted) =
            (rows * batch.window_tokens as u64, rows * batch.window_tokens.saturating_sub(1) as u64);
        let c = compute_bytes(recipe.precision.compute);
        let layers = shape.layers.len() as u64;
        let stream = n * shape.hidden * c;
        let again = match recipe.recompute {
            Recompute::None => 0,
            Recompute::Layer => 1,
        };
        let lora_rank = recipe.lora.rank as u64;
        Self {
            forward: micro * ((2 + again) * layers + 1) * stream,
            backward: micro * 2 * layers * stream,
            loss: micro * predicted * (shape.hidden * c + 3 * c.max(4)),
            lora_gradients: shape.replicated_lora(lora_rank) * master_bytes(recipe.precision.compute),
            scores,
        }
    }

    fn scores(shape: &RankShape, recipe: &Recipe) -> u64 {
        let is_scored =
            recipe.pruning.as_ref().is_some_and(|pruning| pruning.criterion.is_scored_by_workers());
        let sum_bytes = match recipe.precision.compute {
            Compute::F32 | Compute::Bf16 => 4,
            Compute::F64 => 8,
        };
        let units =
            shape.layers.iter().map(|layer| 2 * (layer.query_heads + layer.kv_heads) + 3 * layer.channels);
        if is_scored { units.sum::<u64>() * sum_bytes } else { 0 }
    }

    /// Bytes summed between the ranks.
    #[must_use]
    pub fn summed(&self) -> u64 {
        self.forward + self.backward + self.loss + self.lora_gradients
    }

    /// Bytes that a rank sends to its neighbour: a ring passes `2 (p - 1) / p` of each sum.
    #[must_use]
    pub fn sent(&self, tp_degree: usize) -> f64 {
        let degree = tp_degree.max(1) as f64;
        self.summed() as f64 * 2.0 * (degree - 1.0) / degree
    }
}
