//! When each head and channel went.

use serde::{Deserialize, Serialize};
use wire::pb;

/// For each group of each layer the number of the decision that removed it; 0 for those that stay.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Removals {
    pub layers: Vec<LayerRemovals>,
}

#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct LayerRemovals {
    pub query_heads: Vec<u64>,
    pub kv_heads: Vec<u64>,
    pub channels: Vec<u64>,
}

impl Removals {
    /// Nothing removed from a model of these widths.
    #[must_use]
    pub(crate) fn none(dense: &[model_spec::LayerSpec]) -> Self {
        let layer = |widths: &model_spec::LayerSpec| LayerRemovals {
            query_heads: vec![0; widths.query_head_count],
            kv_heads: vec![0; widths.kv_head_count],
            channels: vec![0; widths.intermediate_size],
        };
        Self { layers: dense.iter().map(layer).collect() }
    }

    /// Notes the mask of decision `generation`; to be called in the order of decisions.
    pub(crate) fn note(&mut self, generation: u64, mask: &pb::KeepMask) {
        for (layer, keep) in self.layers.iter_mut().zip(&mask.layers) {
            note_kind(&mut layer.query_heads, generation, &keep.query_heads);
            note_kind(&mut layer.kv_heads, generation, &keep.kv_heads);
            note_kind(&mut layer.channels, generation, &keep.channels);
        }
    }
}

fn note_kind(removed_at: &mut [u64], generation: u64, kept: &[u32]) {
    let mut keeps = vec![false; removed_at.len()];
    for index in kept {
        if let Some(keep) = keeps.get_mut(*index as usize) {
            *keep = true;
        }
    }
    for (removed_at, keeps) in removed_at.iter_mut().zip(keeps) {
        if !keeps && *removed_at == 0 {
            *removed_at = generation;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use model_spec::LayerSpec;

    #[test]
    fn the_first_decision_without_a_group_removed_it() {
        let dense = [LayerSpec { query_head_count: 4, kv_head_count: 2, intermediate_size: 3 }];
        let mut removals = Removals::none(&dense);
        let mask = |query_heads: &[u32], kv_heads: &[u32], channels: &[u32]| pb::KeepMask {
            layers: vec![pb::LayerKeep {
                query_heads: query_heads.to_vec(),
                kv_heads: kv_heads.to_vec(),
                channels: channels.to_vec(),
            }],
        };
        removals.note(1, &mask(&[0, 1, 2, 3], &[0, 1], &[0, 2]));
        removals.note(2, &mask(&[2, 3], &[1], &[2]));
        assert_eq!(
            removals.layers[0],
            LayerRemovals { query_heads: vec![2, 2, 0, 0], kv_heads: vec![2, 0], channels: vec![2, 1, 0] }
        );
    }
}
