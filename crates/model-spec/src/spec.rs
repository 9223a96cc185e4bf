use crate::{Block, LayerSpec, Projection, Rope};
use serde::{Deserialize, Serialize};

/// Architecture whose checkpoints we read. All of them compute the LLaMA block; they differ in names and defaults.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Family {
    Llama,
    /// Mistral without a sliding window.
    Mistral,
}

/// Everything that fixes the shapes and the function of a model, short of its weights.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ModelSpec {
    pub family: Family,
    pub hidden_size: usize,
    pub head_dim: usize,
    pub vocab_size: usize,
    pub max_position_embeddings: usize,
    pub rms_norm_eps: f64,
    pub rope: Rope,
    pub tie_word_embeddings: bool,
    pub layers: Vec<LayerSpec>,
}

/// Why dimensions do not make a model.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidModelSpec {
    #[error("`{field}` must be at least 1")]
    Zero { field: &'static str },
    #[error(
        "layer {layer}: `num_attention_heads` {query_heads} is not a multiple of `num_key_value_heads` {kv_heads}"
    )]
    UnevenGroups { layer: usize, query_heads: usize, kv_heads: usize },
    #[error("`head_dim` {head_dim} is odd; rotary embeddings need pairs")]
    OddHeadDim { head_dim: usize },
}

impl ModelSpec {
    /// # Errors
    /// Names the first field that cannot be.
    pub fn validate(&self) -> Result<(), InvalidModelSpec> {
        let positive = [
            ("hidden_size", self.hidden_size),
            ("head_dim", self.head_dim),
            ("vocab_size", self.vocab_size),
            ("max_position_embeddings", self.max_position_embeddings),
            ("num_hidden_layers", self.layers.len()),
        ];
        for (field, value) in positive {
            if value == 0 {
                return Err(InvalidModelSpec::Zero { field });
            }
        }
        if !self.head_dim.is_multiple_of(2) {
            return Err(InvalidModelSpec::OddHeadDim { head_dim: self.head_dim });
        }
        for (layer, spec) in self.layers.iter().enumerate() {
            for (field, value) in [
                ("num_attention_heads", spec.query_head_count),
                ("num_key_value_heads", spec.kv_head_count),
                ("intermediate_size", spec.intermediate_size),
            ] {
                if value == 0 {
                    return Err(InvalidModelSpec::Zero { field });
                }
            }
            if !spec.query_head_count.is_multiple_of(spec.kv_head_count) {
                return Err(InvalidModelSpec::UnevenGroups {
                    layer,
                    query_heads: spec.query_head_count,
                    kv_heads: spec.kv_head_count,
                });
            }
        }
        Ok(())
    }

    /// Rows and columns `[out, in]` of a projection of layer `layer`.
    #[must_use]
    pub fn projection_shape(&self, layer: usize, projection: Projection) -> [usize; 2] {
        let widths = &self.layers[layer];
        let query = widths.query_head_count * self.head_dim;
        let key = widths.kv_head_count * self.head_dim;
        match projection {
            Projection::Q => [query, self.hidden_size],
            Projection::K | Projection::V => [key, self.hidden_size],
            Projection::O => [self.hidden_size, query],
            Projection::Gate | Projection::Up => [widths.intermediate_size, self.hidden_size],
            Projection::Down => [self.hidden_size, widths.intermediate_size],
        }
    }

    /// Weights in the projections of one block of a layer: all of them are prunable.
    #[must_use]
    pub fn block_weight_count(&self, layer: usize, block: Block) -> u64 {
        Projection::ALL
            .iter()
            .filter(|projection| projection.block() == block)
            .map(|&projection| {
                let [rows, columns] = self.projection_shape(layer, projection);
                rows as u64 * columns as u64
            })
            .sum()
    }

    /// Weights of the seven projections of every layer.
    #[must_use]
    pub fn projection_weight_count(&self) -> u64 {
        (0..self.layers.len())
            .map(|layer| {
                self.block_weight_count(layer, Block::Attention) + self.block_weight_count(layer, Block::Mlp)
            })
            .sum()
    }

    /// All parameters: embedding, head (once when tied), and norms and projections of the layers that are not removed.
    #[must_use]
    pub fn parameter_count(&self) -> u64 {
        let embedding = (self.vocab_size * self.hidden_size) as u64;
        let heads = if self.tie_word_embeddings { 1 } else { 2 };
        let present = self.layers.iter().filter(|layer| !layer.is_removed()).count();
        let norms = (2 * present as u64 + 1) * self.hidden_size as u64;
        heads * embedding + norms + self.projection_weight_count()
    }

    /// The model without the layers that are removed.
    #[must_use]
    pub fn without_removed_layers(&self) -> Self {
        let layers = self.layers.iter().copied().filter(|layer| !layer.is_removed()).collect();
        Self { layers, ..self.clone() }
    }

    /// The widths when every layer has the same, which is what a stock `config.json` can say.
    #[must_use]
    pub fn uniform_layer(&self) -> Option<LayerSpec> {
        let first = *self.layers.first()?;
        self.layers.iter().all(|layer| *layer == first).then_some(first)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::RopeScaling;

    fn llama(hidden: usize, layers: usize, heads: usize, intermediate: usize) -> ModelSpec {
        ModelSpec {
            family: Family::Llama,
            hidden_size: hidden,
            head_dim: hidden / heads,
            vocab_size: 32_000,
            max_position_embeddings: 2048,
            rms_norm_eps: 1e-6,
            rope: Rope { theta: 10_000.0, scaling: RopeScaling::None },
            tie_word_embeddings: false,
            layers: vec![
                LayerSpec {
                    query_head_count: heads,
                    kv_head_count: heads,
                    intermediate_size: intermediate
                };
                layers
            ],
        }
    }

    #[test]
    fn parameter_counts_are_those_of_the_published_models() {
        for (spec, expected) in [
            (llama(4096, 32, 32, 11_008), 6_738_415_616),
            (llama(5120, 40, 40, 13_824), 13_015_864_320),
            (llama(8192, 80, 64, 22_016), 65_285_660_672),
        ] {
            assert_eq!(spec.parameter_count(), expected);
        }
    }

    #[test]
    fn query_heads_that_do_not_divide_into_groups_are_refused() {
        let mut spec = llama(64, 2, 4, 128);
        spec.layers[1].kv_head_count = 3;
        assert_eq!(
            spec.validate(),
            Err(InvalidModelSpec::UnevenGroups { layer: 1, query_heads: 4, kv_heads: 3 })
        );
    }
}
