use model_spec::{Block, LayerSpec, ModelSpec, Projection};
use recipe::HeadGrouping;
use serde::{Deserialize, Serialize};

/// What one layer keeps, as indices into the unpruned model, each list ascending. One that has gone as a whole keeps nothing.
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

/// A mask that does not describe a pruned form of the model.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidKeepMask {
    #[error("the keep mask has {actual} layers, the model {expected}")]
    LayerCount { expected: usize, actual: usize },
    #[error("layer {layer}: kept {what} indices must ascend and lie below {count}; {index} does not")]
    BadIndex { layer: usize, what: &'static str, count: usize, index: usize },
    #[error("layer {layer} keeps no {what}")]
    Empty { layer: usize, what: &'static str },
    #[error(
        "layer {layer}: key/value head {kv_head} keeps {actual} query heads; every kept one must keep {expected}, \
         and no other any"
    )]
    UnevenGroups { layer: usize, kv_head: usize, expected: usize, actual: usize },
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

    /// Kept units of a projection: query heads for `q` and `o`, key/value heads for `k` and `v`, else channels.
    #[must_use]
    pub fn units(&self, projection: Projection) -> &[usize] {
        match projection {
            Projection::Q | Projection::O => &self.query_heads,
            Projection::K | Projection::V => &self.kv_heads,
            Projection::Gate | Projection::Up | Projection::Down => &self.channels,
        }
    }

    /// Kept groups of a block.
    #[must_use]
    pub fn groups(&self, block: Block, grouping: HeadGrouping) -> &[usize] {
        match (block, grouping) {
            (Block::Attention, HeadGrouping::KvGroups) => &self.kv_heads,
            (Block::Attention, HeadGrouping::QueryHeads) => &self.query_heads,
            (Block::Mlp, HeadGrouping::KvGroups | HeadGrouping::QueryHeads) => &self.channels,
        }
    }

    /// Of a layer that goes as a whole.
    #[must_use]
    pub fn removed() -> Self {
        Self { query_heads: Vec::new(), kv_heads: Vec::new(), channels: Vec::new() }
    }

    /// Whether the layer has gone as a whole: what comes in goes out.
    #[must_use]
    pub fn is_removed(&self) -> bool {
        self.query_heads.is_empty() && self.kv_heads.is_empty() && self.channels.is_empty()
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

    /// The dimensions of the model that `dense` becomes, with widths of zero for layers that have gone.
    #[must_use]
    pub fn pruned_spec(&self, dense: &ModelSpec) -> ModelSpec {
        ModelSpec { layers: self.layers.iter().map(LayerKeep::widths).collect(), ..dense.clone() }
    }

    /// Fraction of all projection weights that is gone.
    #[must_use]
    pub fn sparsity(&self, dense: &ModelSpec) -> f64 {
        1.0 - self.pruned_spec(dense).projection_weight_count() as f64
            / dense.projection_weight_count() as f64
    }

    /// # Errors
    /// When the mask is not one of `dense`, or breaks the invariant of [`LayerKeep`].
    pub fn check_fits(&self, dense: &ModelSpec) -> Result<(), InvalidKeepMask> {
        if self.layers.len() != dense.layers.len() {
            let (expected, actual) = (dense.layers.len(), self.layers.len());
            return Err(InvalidKeepMask::LayerCount { expected, actual });
        }
        for (layer, (keep, widths)) in self.layers.iter().zip(&dense.layers).enumerate() {
            if keep.is_removed() {
                continue;
            }
            for (what, kept, count) in [
                ("query head", &keep.query_heads, widths.query_head_count),
                ("key/value head", &keep.kv_heads, widths.kv_head_count),
                ("channel", &keep.channels, widths.intermediate_size),
            ] {
                if kept.is_empty() {
                    return Err(InvalidKeepMask::Empty { layer, what });
                }
                // Nearly always all is well, which is found out without looking where it might not be.
                let ascend =
                    kept.iter().zip(&kept[1..]).fold(true, |ascend, (one, next)| ascend & (one < next));
                if ascend && kept.last().is_some_and(|last| *last < count) {
                    continue;
                }
                let mut least = 0;
                for &index in kept {
                    if index < least || index >= count {
                        return Err(InvalidKeepMask::BadIndex { layer, what, count, index });
                    }
                    least = index + 1;
                }
            }
            let each = keep.query_heads.len() / keep.kv_heads.len();
            let mut query_counts = vec![0; widths.kv_head_count];
            for &query_head in &keep.query_heads {
                query_counts[widths.kv_head_of(query_head)] += 1;
            }
            for (kv_head, actual) in query_counts.into_iter().enumerate() {
                let expected = if keep.kv_heads.binary_search(&kv_head).is_ok() { each.max(1) } else { 0 };
                if actual != expected {
                    return Err(InvalidKeepMask::UnevenGroups { layer, kv_head, expected, actual });
                }
            }
        }
        Ok(())
    }

    /// # Errors
    /// Names the first group that `self` keeps and `earlier` does not: kept sets only shrink.
    pub fn check_subset_of(&self, earlier: &Self) -> Result<(), NotASubset> {
        let mut is_there = Vec::new();
        for (layer, (now, then)) in self.layers.iter().zip(&earlier.layers).enumerate() {
            for (what, now, then) in [
                ("query head", &now.query_heads, &then.query_heads),
                ("key/value head", &now.kv_heads, &then.kv_heads),
                ("channel", &now.channels, &then.channels),
            ] {
                is_there.clear();
                is_there.resize(then.iter().max().map_or(0, |last| last + 1), false);
                then.iter().for_each(|&index| is_there[index] = true);
                if let Some(&index) = now.iter().find(|&&index| is_there.get(index) != Some(&true)) {
                    return Err(NotASubset { layer, what, index });
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::model;

    #[test]
    fn masks_that_describe_no_pruned_model_are_refused() {
        let dense = model(2, 6, 3, 4);
        let full = KeepMask::full(&dense);
        full.check_fits(&dense).unwrap();
        let with = |query_heads: &[usize], kv_heads: &[usize], channels: &[usize]| {
            let mut mask = full.clone();
            mask.layers[1] = LayerKeep {
                query_heads: query_heads.to_vec(),
                kv_heads: kv_heads.to_vec(),
                channels: channels.to_vec(),
            };
            mask.check_fits(&dense)
        };
        with(&[0, 1, 4, 5], &[0, 2], &[3]).unwrap();
        with(&[1, 4], &[0, 2], &[0, 1]).unwrap();
        let (layer, channel) = (1, "channel");
        for (found, expected) in [
            (with(&[0, 1], &[0], &[]), InvalidKeepMask::Empty { layer, what: channel }),
            (
                with(&[0, 1], &[0], &[2, 1]),
                InvalidKeepMask::BadIndex { layer, what: channel, count: 4, index: 1 },
            ),
            (
                with(&[0, 1], &[0], &[1, 1]),
                InvalidKeepMask::BadIndex { layer, what: channel, count: 4, index: 1 },
            ),
            (
                with(&[0, 1], &[0], &[4]),
                InvalidKeepMask::BadIndex { layer, what: channel, count: 4, index: 4 },
            ),
            (
                with(&[0, 2], &[0], &[0]),
                InvalidKeepMask::UnevenGroups { layer, kv_head: 0, expected: 2, actual: 1 },
            ),
            (
                with(&[0, 1, 2], &[0, 1], &[0]),
                InvalidKeepMask::UnevenGroups { layer, kv_head: 0, expected: 1, actual: 2 },
            ),
            (
                with(&[0], &[0, 1], &[0]),
                InvalidKeepMask::UnevenGroups { layer, kv_head: 1, expected: 1, actual: 0 },
            ),
        ] {
            assert_eq!(found, Err(expected));
        }
        let short = KeepMask { layers: full.layers[..1].to_vec() };
        assert_eq!(short.check_fits(&dense), Err(InvalidKeepMask::LayerCount { expected: 2, actual: 1 }));
    }

    #[test]
    fn a_mask_that_brings_something_back_is_not_a_subset() {
        let dense = model(2, 6, 3, 4);
        let full = KeepMask::full(&dense);
        let mut less = full.clone();
        less.layers[1].channels = vec![0, 3];
        less.check_subset_of(&full).unwrap();
        assert_eq!(full.check_subset_of(&less), Err(NotASubset { layer: 1, what: "channel", index: 1 }));
        assert!((less.sparsity(&dense) - 2.0 * 24.0 / dense.projection_weight_count() as f64).abs() < 1e-15);
    }
}
