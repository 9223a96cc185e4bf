//! Small models and seeded numbers for this crate's tests.

use crate::{GroupImportance, KeepMask, ScoreAssembly, StepScores, random_importance};
use model_spec::{Block, Family, LayerSpec, ModelSpec, Projection, Rope, RopeScaling};
use recipe::HeadGrouping;

/// A model of equal layers with `head_dim` 2, `hidden_size` 8 and a vocabulary of 16.
pub(crate) fn model(layers: usize, query_heads: usize, kv_heads: usize, channels: usize) -> ModelSpec {
    let widths =
        LayerSpec { query_head_count: query_heads, kv_head_count: kv_heads, intermediate_size: channels };
    ModelSpec {
        family: Family::Llama,
        hidden_size: 8,
        head_dim: 2,
        vocab_size: 16,
        max_position_embeddings: 32,
        rms_norm_eps: 1e-6,
        rope: Rope { theta: 10_000.0, scaling: RopeScaling::None },
        tie_word_embeddings: true,
        layers: vec![widths; layers],
    }
}

/// LLaMA-1 dimensions.
pub(crate) fn llama(hidden: usize, layers: usize, heads: usize, channels: usize) -> ModelSpec {
    ModelSpec {
        hidden_size: hidden,
        head_dim: hidden / heads,
        vocab_size: 32_000,
        tie_word_embeddings: false,
        ..model(layers, heads, heads, channels)
    }
}

/// SmolLM2-135M: 9 query heads on 3 key/value heads.
pub(crate) fn smollm2() -> ModelSpec {
    ModelSpec { hidden_size: 576, head_dim: 64, vocab_size: 49_152, ..model(30, 9, 3, 1536) }
}

/// A score for every live unit, from `value(layer, projection, unit)`.
pub(crate) fn scores(
    dense: &ModelSpec,
    keep: &KeepMask,
    value: impl Fn(usize, Projection, usize) -> f64,
) -> StepScores {
    let mut assembly = ScoreAssembly::new(dense, keep);
    for (layer, kept) in keep.layers.iter().enumerate() {
        for projection in Projection::ALL {
            let units = kept.units(projection);
            let values: Vec<f64> = units.iter().map(|&unit| value(layer, projection, unit)).collect();
            assembly.add(layer, projection, units, &values).expect("live units, each once");
        }
    }
    assembly.finish().expect("every live unit was scored")
}

/// Pseudo-random scores in `(0, 1)`.
pub(crate) fn random_scores(dense: &ModelSpec, keep: &KeepMask, seed: u64) -> StepScores {
    scores(dense, keep, |layer, projection, unit| {
        random_importance(seed ^ (projection.index() as u64) << 40, layer, projection.block(), unit)
    })
}

/// Importances from `value(layer, block, unit)`.
pub(crate) fn importances(
    dense: &ModelSpec,
    grouping: HeadGrouping,
    value: impl Fn(usize, Block, usize) -> f64,
) -> Vec<GroupImportance> {
    let mut layers = GroupImportance::zeros(dense, grouping);
    for (layer, importance) in layers.iter_mut().enumerate() {
        for (block, values) in
            [(Block::Attention, &mut importance.attention), (Block::Mlp, &mut importance.mlp)]
        {
            for (unit, slot) in values.iter_mut().enumerate() {
                *slot = value(layer, block, unit);
            }
        }
    }
    layers
}

/// Pseudo-random numbers in `(-1, 1)`.
pub(crate) fn numbers(seed: u64, count: usize) -> Vec<f64> {
    (0..count).map(|unit| 2.0 * random_importance(seed, 0, Block::Mlp, unit) - 1.0).collect()
}
