use model_spec::{LayerSpec, ModelSpec};
use serde::{Deserialize, Serialize};

/// What one layer keeps, as indices into the unpruned model, each list ascending.
///
/// Invariant: every kept query head's key/value head is kept, and all kept key/value heads keep equally many query heads.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerKeep {
    pub query_heads: Vec<usize>,
    pub kv_heads: Vec<usize>,
    pub channels: Vec<usize>,
}

/// Which groups of every layer survive.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeepMask {
    pub layers: Vec<LayerKeep>,
}

/// A mask that would bring something back.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("layer {layer} would keep {what} {index}, which is already gone")]
pub struct NotASubset {
    pub layer: usize,
    pub what: &'static str,
    pub index: usize,
}

impl LayerKeep {
    #[must_use]
    pub fn full(spec: &LayerSpec) -> Self {
        Self {
            query_heads: (0..spec.query_head_count).collect(),
            kv_heads: (0..spec.kv_head_count).collect(),
            channels: (0..spec.intermediate_size).collect(),
        }
    }

    #[must_use]
    pub fn widths(&self) -> LayerSpec {
        LayerSpec {
            query_head_count: self.query_heads.len(),
            kv_head_count: self.kv_heads.len(),
            intermediate_size: self.channels.len(),
        }
    }
}

impl KeepMask {
    /// Everything is kept.
    #[must_use]
    pub fn full(spec: &ModelSpec) -> Self {
        Self { layers: spec.layers.iter().map(LayerKeep::full).collect() }
    }

    /// The dimensions of the model that `dense` becomes.
    #[must_use]
    pub fn pruned_spec(&self, dense: &ModelSpec) -> ModelSpec {
        ModelSpec { layers: self.layers.iter().map(LayerKeep::widths).collect(), ..dense.clone() }
    }

    /// Fraction of all projection weights that is gone.
    #[must_use]
    pub fn sparsity(&self, dense: &ModelSpec) -> f64 {
        1.0 - self.pruned_spec(dense).projection_weight_count() as f64 / dense.projection_weight_count() as f64
    }

    /// # Errors
    /// Names the first group that `self` keeps and `earlier` does not: kept sets only shrink.
    pub fn check_subset_of(&self, earlier: &Self) -> Result<(), NotASubset> {
        for (layer, (now, then)) in self.layers.iter().zip(&earlier.layers).enumerate() {
            for (what, now, then) in [
                ("query head", &now.query_heads, &then.query_heads),
                ("key/value head", &now.kv_heads, &then.kv_heads),
                ("channel", &now.channels, &then.channels),
            ] {
                if let Some(&index) = now.iter().find(|index| then.binary_search(index).is_err()) {
                    return Err(NotASubset { layer, what, index });
                }
            }
        }
        Ok(())
    }
}
