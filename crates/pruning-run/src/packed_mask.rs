//! Masks that are kept for later, a bit for each unit: of LLaMA-65B 0.2 MB instead of up to 14.

use pruning::{KeepMask, LayerKeep};

const BITS: usize = u64::BITS as usize;

/// A [`KeepMask`], whose indices ascend.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PackedMask {
    layers: Vec<[Bits; 3]>,
}

/// Which numbers are in a set.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Bits(Box<[u64]>);

impl PackedMask {
    pub(crate) fn of(mask: &KeepMask) -> Self {
        let pack = |layer: &LayerKeep| {
            [&layer.query_heads, &layer.kv_heads, &layer.channels].map(|indices| Bits::of(indices))
        };
        Self { layers: mask.layers.iter().map(pack).collect() }
    }

    pub(crate) fn unpacked(&self) -> KeepMask {
        let unpack = |[query_heads, kv_heads, channels]: &[Bits; 3]| LayerKeep {
            query_heads: query_heads.indices(),
            kv_heads: kv_heads.indices(),
            channels: channels.indices(),
        };
        KeepMask { layers: self.layers.iter().map(unpack).collect() }
    }
}

impl Bits {
    fn of(indices: &[usize]) -> Self {
        let mut words = vec![0_u64; indices.last().map_or(0, |last| last / BITS + 1)];
        for index in indices {
            words[index / BITS] |= 1 << (index % BITS);
        }
        Self(words.into())
    }

    fn indices(&self) -> Vec<usize> {
        let numbers = |(place, word): (usize, &u64)| {
            let word = *word;
            (0..BITS).filter(move |bit| word >> bit & 1 == 1).map(move |bit| place * BITS + bit)
        };
        self.0.iter().enumerate().flat_map(numbers).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::collection::btree_set;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn what_was_packed_comes_back(
            layers in proptest::collection::vec([btree_set(0..70_usize, 0..70), btree_set(0..9, 0..9), btree_set(0..3000, 0..300)], 0..4)
        ) {
            let layer = |[query_heads, kv_heads, channels]: [std::collections::BTreeSet<usize>; 3]| LayerKeep {
                query_heads: query_heads.into_iter().collect(),
                kv_heads: kv_heads.into_iter().collect(),
                channels: channels.into_iter().collect(),
            };
            let mask = KeepMask { layers: layers.into_iter().map(layer).collect() };
            prop_assert_eq!(PackedMask::of(&mask).unpacked(), mask);
        }
    }
}
