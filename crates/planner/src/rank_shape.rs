use crate::formats::{compute_bytes, frozen_bytes, vocabulary_bytes};
use model_spec::{LayerSpec, ModelSpec, Projection, Split};
use recipe::{Precision, Recipe};
use sharding::vocabulary_rows;

/// Widths of one layer on one rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct RankWidths {
    pub query_heads: u64,
    pub kv_heads: u64,
    pub channels: u64,
}

/// The part of a model that one rank holds, as far as its size goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RankShape {
    pub hidden: u64,
    pub head_dim: u64,
    /// Rows of the embedding, and of the head where it has its own.
    pub vocabulary_rows: u64,
    pub tied: bool,
    pub layers: Vec<RankWidths>,
}

/// The share of `count` that falls to part `index` of `parts`: sizes differ by at most one, as `sharding` deals them.
fn share(count: usize, parts: usize, index: usize) -> u64 {
    (count * (index + 1) / parts - count * index / parts) as u64
}

impl RankShape {
    /// The share of `tp_rank` in a model whose layers have these widths. What a decision leaves uneven is dealt out anew
    /// (`Placement::rebalanced`) once a rank holds more than 2 % above this.
    #[must_use]
    pub fn new(dense: &ModelSpec, layers: &[LayerSpec], tp_degree: usize, tp_rank: usize) -> Self {
        let layers = layers.iter().map(|widths| {
            let kv_heads = share(widths.kv_head_count, tp_degree, tp_rank);
            RankWidths {
                query_heads: kv_heads * widths.query_heads_per_kv_head() as u64,
                kv_heads,
                channels: share(widths.intermediate_size, tp_degree, tp_rank),
            }
        });
        Self {
            hidden: dense.hidden_size as u64,
            head_dim: dense.head_dim as u64,
            vocabulary_rows: vocabulary_rows(dense.vocab_size, tp_degree, tp_rank).len() as u64,
            tied: dense.tie_word_embeddings,
            layers: layers.collect(),
        }
    }

    /// Features of q's output, which are those of o's input.
    pub(crate) fn query(&self, layer: &RankWidths) -> u64 {
        layer.query_heads * self.head_dim
    }

    /// Features of k's output, and of v's.
    pub(crate) fn key(&self, layer: &RankWidths) -> u64 {
        layer.kv_heads * self.head_dim
    }

    /// Rows and columns of a projection's part.
    pub(crate) fn matrix(&self, layer: &RankWidths, projection: Projection) -> [u64; 2] {
        match projection {
            Projection::Q => [self.query(layer), self.hidden],
            Projection::K | Projection::V => [self.key(layer), self.hidden],
            Projection::O => [self.hidden, self.query(layer)],
            Projection::Gate | Projection::Up => [layer.channels, self.hidden],
            Projection::Down => [self.hidden, layer.channels],
        }
    }

    fn matrices(&self) -> impl Iterator<Item = (Projection, [u64; 2])> {
        self.layers.iter().flat_map(|layer| {
            Projection::ALL.into_iter().map(|projection| (projection, self.matrix(layer, projection)))
        })
    }

    /// Weights of the projections' parts.
    #[must_use]
    pub fn projection_weights(&self) -> u64 {
        self.matrices().map(|(_, [rows, columns])| rows * columns).sum()
    }

    /// Weights of the head's part; of the embedding's too.
    #[must_use]
    pub fn vocabulary_weights(&self) -> u64 {
        self.vocabulary_rows * self.hidden
    }

    /// Parameters held: projections, embedding, head (once when tied) and all norms, which every rank has.
    #[must_use]
    pub fn parameters(&self) -> u64 {
        let tables = if self.tied { 1 } else { 2 };
        self.projection_weights() + tables * self.vocabulary_weights() + self.norm_weights()
    }

    fn norm_weights(&self) -> u64 {
        (2 * self.layers.len() as u64 + 1) * self.hidden
    }

    /// LoRA numbers that every rank holds: `r in` for `lora_a` of the five column-parallel projections, `r out` for `lora_b`
    /// of o and down, all of them `r d` long.
    #[must_use]
    pub fn replicated_lora(&self, lora_rank: u64) -> u64 {
        7 * lora_rank * self.hidden * self.layers.len() as u64
    }

    /// LoRA numbers that no other rank holds: `lora_b` of q, k, v, gate and up, `lora_a` of o and down.
    #[must_use]
    pub fn split_lora(&self, lora_rank: u64) -> u64 {
        self.matrices()
            .map(|(projection, [rows, columns])| match projection.split() {
                Split::Column => lora_rank * rows,
                Split::Row => lora_rank * columns,
            })
            .sum()
    }

    #[must_use]
    pub fn lora(&self, lora_rank: u64) -> u64 {
        self.replicated_lora(lora_rank) + self.split_lora(lora_rank)
    }

    /// Bytes of the frozen weights: projections as stored, embedding and head as [`vocabulary_bytes`], norms in the format
    /// of the products, and eight bytes for each index of o's and down's inputs and of the hidden features.
    pub(crate) fn frozen_bytes(&self, precision: Precision) -> u64 {
        let projections: u64 = self
            .matrices()
            .map(|(projection, [rows, columns])| {
                frozen_bytes(precision.storage, projection.split(), rows, columns)
            })
            .sum();
        let tables = if self.tied { 1 } else { 2 };
        let indices: u64 = self.layers.iter().map(|layer| self.query(layer) + layer.channels).sum();
        projections
            + tables * self.vocabulary_weights() * vocabulary_bytes(precision)
            + self.norm_weights() * compute_bytes(precision.compute)
            + 8 * (indices + self.hidden)
    }

    /// Bytes of o and of down, which compensation changes and checkpoints then hold.
    pub(crate) fn narrowing_bytes(&self, recipe: &Recipe) -> u64 {
        let of = |projection: Projection| projection.split() == Split::Row;
        self.matrices()
            .filter(|(projection, _)| of(*projection))
            .map(|(projection, [rows, columns])| {
                frozen_bytes(recipe.precision.storage, projection.split(), rows, columns)
            })
            .sum()
    }
}
