//! The masks of a run, each group with the decision that took it: a thousand masks of a large model would fill gigabytes.

use crate::{Decision, Generation};
use pruning::{KeepMask, LayerKeep};

/// Of a group that no decision has taken yet.
const STAYS: u64 = u64::MAX;

/// Masks in the order of their generations. Kept sets only shrink, so that one number a group is enough for all.
#[derive(Debug, Clone, Default)]
pub(crate) struct Masks {
    /// Each generation with the step after which it was decided.
    decided: Vec<(Generation, u64)>,
    layers: Vec<LayerMasks>,
}

#[derive(Debug, Clone)]
struct LayerMasks {
    query_heads: Groups,
    kv_heads: Groups,
    channels: Groups,
}

/// What the first mask keeps of one kind in one layer, and which generation took it, in the same order.
#[derive(Debug, Clone)]
struct Groups {
    indices: Vec<usize>,
    gone_at: Vec<u64>,
}

impl Masks {
    /// Takes in what was decided next. A generation that has its mask keeps it.
    pub(crate) fn push(&mut self, decision: &Decision) {
        let Decision { generation, step, keep_mask: mask, .. } = decision;
        match self.decided.last() {
            None => self.layers = mask.layers.iter().map(LayerMasks::first).collect(),
            Some((last, _)) if last >= generation => return,
            Some(_) => {}
        }
        self.decided.push((*generation, *step));
        for (layer, keep) in self.layers.iter_mut().zip(&mask.layers) {
            layer.query_heads.restrict_to(&keep.query_heads, generation.0);
            layer.kv_heads.restrict_to(&keep.kv_heads, generation.0);
            layer.channels.restrict_to(&keep.channels, generation.0);
        }
    }

    /// The step after which a mask was decided, if it was.
    pub(crate) fn step(&self, generation: Generation) -> Option<u64> {
        let place = self.decided.binary_search_by_key(&generation, |(decided, _)| *decided).ok()?;
        Some(self.decided[place].1)
    }

    /// The mask that was decided as `generation`, if it was.
    pub(crate) fn get(&self, generation: Generation) -> Option<KeepMask> {
        self.step(generation)?;
        let layers = self.layers.iter().map(|layer| LayerKeep {
            query_heads: layer.query_heads.kept_at(generation),
            kv_heads: layer.kv_heads.kept_at(generation),
            channels: layer.channels.kept_at(generation),
        });
        Some(KeepMask { layers: layers.collect() })
    }
}

impl LayerMasks {
    fn first(keep: &LayerKeep) -> Self {
        Self {
            query_heads: Groups::first(&keep.query_heads),
            kv_heads: Groups::first(&keep.kv_heads),
            channels: Groups::first(&keep.channels),
        }
    }
}

impl Groups {
    fn first(kept: &[usize]) -> Self {
        Self { indices: kept.to_vec(), gone_at: vec![STAYS; kept.len()] }
    }

    /// Both lists ascend. Without a branch on what is kept, which nobody could foretell.
    fn restrict_to(&mut self, kept: &[usize], generation: u64) {
        let mut place = 0;
        for (index, gone_at) in self.indices.iter().zip(&mut self.gone_at) {
            let stays = kept.get(place) == Some(index);
            place += usize::from(stays);
            *gone_at = if stays { *gone_at } else { generation.min(*gone_at) };
        }
    }

    fn kept_at(&self, generation: Generation) -> Vec<usize> {
        let kept = self.indices.iter().zip(&self.gone_at).filter(|(_, gone_at)| **gone_at > generation.0);
        kept.map(|(index, _)| *index).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Masks of a layer with 9 groups of each kind, each a part of the one before.
    fn shrinking() -> impl Strategy<Value = Vec<KeepMask>> {
        let kept = || prop::collection::vec(prop::collection::vec(0_u8..8, 9), 3);
        prop::collection::vec(kept(), 2).prop_map(|layers| {
            // A group stays up to the generation that was drawn for it.
            let of = |lasts: &[u8], generation: u8| -> Vec<usize> {
                (0..lasts.len()).filter(|&index| lasts[index] >= generation).collect()
            };
            let layer = |lasts: &Vec<Vec<u8>>, generation| LayerKeep {
                query_heads: of(&lasts[0], generation),
                kv_heads: of(&lasts[1], generation),
                channels: of(&lasts[2], generation),
            };
            let mask = |generation| KeepMask {
                layers: layers.iter().map(|lasts| layer(lasts, generation)).collect(),
            };
            (1..=7).map(mask).collect()
        })
    }

    fn decision(generation: u64, keep_mask: KeepMask) -> Decision {
        let (sparsity, parameters) = (0.0, 1);
        Decision {
            generation: Generation(generation),
            step: 10 * generation,
            sparsity,
            parameters,
            keep_mask,
        }
    }

    proptest! {
        /// A fork's first decision need not be the first there is.
        #[test]
        fn every_mask_comes_back_as_it_was_taken_in(taken in shrinking(), before in 0_u64..3) {
            let mut masks = Masks::default();
            for (generation, mask) in (before + 1..).zip(&taken) {
                prop_assert_eq!(masks.get(Generation(generation)), None);
                masks.push(&decision(generation, mask.clone()));
                // What comes again changes nothing.
                masks.push(&decision(before + 1, KeepMask { layers: Vec::new() }));
            }
            for (generation, mask) in (before + 1..).zip(&taken) {
                prop_assert_eq!(masks.get(Generation(generation)), Some(mask.clone()));
                prop_assert_eq!(masks.step(Generation(generation)), Some(10 * generation));
            }
            for generation in [Generation(before), Generation(before + 8)] {
                prop_assert_eq!((masks.get(generation), masks.step(generation)), (None, None));
            }
        }
    }

    #[test]
    fn a_thousand_masks_take_no_more_room_than_one() {
        let layer = LayerKeep { query_heads: vec![0], kv_heads: vec![0], channels: (0..1000).collect() };
        let mut masks = Masks::default();
        for generation in 1..=1000 {
            let keep = LayerKeep { channels: (generation - 1..1000).collect(), ..layer.clone() };
            masks.push(&decision(generation as u64, KeepMask { layers: vec![keep] }));
        }
        let room = |groups: &Groups| groups.indices.capacity() + groups.gone_at.capacity();
        assert_eq!(room(&masks.layers[0].channels), 2000);
        let kept = masks.get(Generation(700)).unwrap();
        assert_eq!(kept.layers[0].channels, (699..1000).collect::<Vec<_>>());
    }
}
