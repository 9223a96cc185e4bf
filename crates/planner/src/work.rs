//! Floating point operations of one rank: of an optimizer step, and of a decision.

use crate::formats::compute_bytes;
use crate::rank_shape::RankShape;
use model_spec::LayerSpec;
use recipe::{Compensation, CompensationTarget, Criterion, Recipe, Recompute};
use serde::{Deserialize, Serialize};

/// What one rank computes in an optimizer step, in floating point operations, and what it reads of its weights.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct StepWork {
    /// Layers, head and, where layers are run again, once more.
    pub forward: f64,
    /// Gradients of inputs and of the LoRA factors; with `taylor` of the weights too.
    pub backward: f64,
    /// The score pass.
    pub scores: f64,
    /// Bytes of frozen weights read by the passes over all micro-batches, and of activations written and read again.
    pub bytes: f64,
    /// Bytes read by the score pass and by the update.
    pub update_bytes: f64,
}

impl StepWork {
    /// For each token, with `W` projection weights, `H` head weights, `R` LoRA numbers and `A = 2 q (t + 1)` for the two
    /// products of causal attention, which sees `(t + 1) / 2` tokens on average:
    ///
    /// ```text
    /// forward    2 W + 2 R + A + 2 H             layers run again: 2 W + 2 R + A more
    /// backward   2 W + 4 R + 5/2 A + 2 H         (five products for two; taylor: 2 W more)
    /// scores     LoRA-guided (6 r + 3) W a step · magnitude (2 r + 2) W · taylor, and wanda on o and down: (2 r + 3) W
    /// ```
    #[must_use]
    pub fn of_step(shape: &RankShape, recipe: &Recipe, kept_bytes: u64, frozen_bytes: u64) -> Self {
        let batch = recipe.batch;
        let tokens = batch.tokens_per_step() as f64;
        let weights = shape.projection_weights() as f64;
        let head = shape.vocabulary_weights() as f64;
        let lora_rank = recipe.lora.rank as u64;
        let lora = shape.lora(lora_rank) as f64;
        let query: f64 = shape.layers.iter().map(|layer| shape.query(layer) as f64).sum();
        let attention = 2.0 * query * (batch.window_tokens as f64 + 1.0);
        let predicted = batch.predictions_per_step() as f64;
        let layers = 2.0 * weights + 2.0 * lora + attention;
        let passes = match recipe.recompute {
            Recompute::None => 1.0,
            Recompute::Layer => 2.0,
        };
        let criterion = recipe.pruning.as_ref().map(|pruning| pruning.criterion);
        let weight_gradients = if criterion == Some(Criterion::Taylor) { 2.0 * weights } else { 0.0 };
        let micro = batch.micro_batches as f64;
        let c = compute_bytes(recipe.precision.compute) as f64;
        let scored = criterion.map_or(0.0, |criterion| scored_share(shape, criterion));
        Self {
            forward: tokens * passes * layers + predicted * 2.0 * head,
            backward: tokens * (2.0 * weights + 4.0 * lora + 2.5 * attention + weight_gradients)
                + predicted * 2.0 * head,
            scores: criterion.map_or(0.0, |criterion| score_flops(lora_rank as f64, criterion)) * scored,
            bytes: micro * ((passes + 1.0) * frozen_bytes as f64 + 2.0 * kept_bytes as f64),
            update_bytes: scored * frozen_bytes as f64 / shape.parameters().max(1) as f64
                + 7.0 * lora * c.max(4.0),
        }
    }

    #[must_use]
    pub fn total(&self) -> f64 {
        self.forward + self.backward + self.scores
    }
}

/// Weights that a criterion reads.
fn scored_share(shape: &RankShape, criterion: Criterion) -> f64 {
    let narrowing: u64 =
        shape.layers.iter().map(|layer| shape.hidden * (shape.query(layer) + layer.channels)).sum();
    match criterion {
        Criterion::LoraPrune { .. } | Criterion::Tangent | Criterion::Taylor | Criterion::Magnitude => {
            shape.projection_weights() as f64
        }
        Criterion::Wanda | Criterion::Flap => narrowing as f64,
        Criterion::Random => 0.0,
    }
}

/// Operations for each weight that is read.
fn score_flops(lora_rank: f64, criterion: Criterion) -> f64 {
    match criterion {
        Criterion::LoraPrune { .. } | Criterion::Tangent => 6.0 * lora_rank + 3.0,
        Criterion::Taylor | Criterion::Wanda | Criterion::Flap => 2.0 * lora_rank + 3.0,
        Criterion::Magnitude => 2.0 * lora_rank + 2.0,
        Criterion::Random => 0.0,
    }
}

/// What one rank computes for the compensation of a decision.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub(crate) struct DecisionWork {
    /// Of the passes over the calibration windows, in the run's format.
    pub(crate) passes: f64,
    /// Of the sums of second moments, in f32.
    pub(crate) sums: f64,
    /// Of the solves, in f64: the same on every rank.
    pub(crate) solves: f64,
}

impl DecisionWork {
    /// With `T` calibration tokens, which the ranks share for the sums, and `K` inputs that stay of one of the matrices:
    ///
    /// ```text
    /// passes   layer: 3 forward passes of every layer, stream: 4        (before, what is missing, after)
    /// sums     2 T K (K + d) / p      solves   K^3 / 3 + 2 K^2 d + 2 K^2 d
    /// ```
    pub(crate) fn of(
        held: &RankShape,
        before: &[LayerSpec],
        after: &[LayerSpec],
        recipe: &Recipe,
        tp_degree: usize,
    ) -> Self {
        let compensation = recipe.pruning.as_ref().map_or(Compensation::None, |pruning| pruning.compensation);
        let Some(choice) = compensation.least_squares() else { return Self::default() };
        let tokens = (choice.windows * recipe.batch.window_tokens) as f64;
        let passes = match choice.target {
            CompensationTarget::Layer => 3.0,
            CompensationTarget::Stream => 4.0,
        };
        let d = held.hidden as f64;
        let mut work =
            Self { passes: passes * tokens * 2.0 * held.projection_weights() as f64, ..Self::default() };
        for (before, after) in before.iter().zip(after) {
            let heads = |widths: &LayerSpec| widths.query_head_count as u64 * held.head_dim;
            for (was, stays) in [
                (heads(before), heads(after)),
                (before.intermediate_size as u64, after.intermediate_size as u64),
            ] {
                if stays < was {
                    let k = stays as f64;
                    work.sums += 2.0 * tokens * k * (k + d) / tp_degree as f64;
                    work.solves += k.powi(3) / 3.0 + 4.0 * k * k * d;
                }
            }
        }
        work
    }
}
