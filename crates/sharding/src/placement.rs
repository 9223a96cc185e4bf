use model_spec::{LayerSpec, ModelSpec};
use pruning::KeepMask;
use serde::{Deserialize, Serialize};
use std::ops::Range;

/// What one rank holds of one layer, as ascending indices into the unpruned model.
///
/// A key/value head lies on one rank together with all its kept query heads, so attention needs no exchange.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct RankLayer {
    pub query_heads: Vec<usize>,
    pub kv_heads: Vec<usize>,
    pub channels: Vec<usize>,
}

/// Who holds which groups. A pure function of the model, the tensor-parallel degree and the masks so far: every process
/// computes it for itself and all agree.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Placement {
    /// `ranks[tp_rank][layer]`.
    pub ranks: Vec<Vec<RankLayer>>,
}

/// Why a model cannot be spread over so many ranks.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PlacementError {
    #[error("tensor-parallel degree must be at least 1")]
    NoRanks,
    #[error(
        "tensor-parallel degree {tp_degree} exceeds the {kv_heads} key/value heads of layer {layer}; \
         use at most {kv_heads} workers"
    )]
    TooFewHeads { tp_degree: usize, kv_heads: usize, layer: usize },
}

/// The share of `count` that falls to part `index` of `parts`: contiguous, sizes differing by at most one.
fn even_part(count: usize, parts: usize, index: usize) -> Range<usize> {
    count * index / parts..count * (index + 1) / parts
}

/// Rows of the embedding and of the head that `tp_rank` holds.
#[must_use]
pub fn vocabulary_rows(vocab_size: usize, tp_degree: usize, tp_rank: usize) -> Range<usize> {
    even_part(vocab_size, tp_degree, tp_rank)
}

impl Placement {
    /// Contiguous, even shares of the dense model.
    ///
    /// # Errors
    /// When a rank would get no key/value head.
    pub fn dense(spec: &ModelSpec, tp_degree: usize) -> Result<Self, PlacementError> {
        if tp_degree == 0 {
            return Err(PlacementError::NoRanks);
        }
        if let Some((layer, widths)) =
            spec.layers.iter().enumerate().find(|(_, widths)| widths.kv_head_count < tp_degree)
        {
            return Err(PlacementError::TooFewHeads { tp_degree, kv_heads: widths.kv_head_count, layer });
        }
        let share = |widths: &LayerSpec, rank| {
            let kv_heads = even_part(widths.kv_head_count, tp_degree, rank);
            let per_kv = widths.query_heads_per_kv_head();
            RankLayer {
                query_heads: (kv_heads.start * per_kv..kv_heads.end * per_kv).collect(),
                kv_heads: kv_heads.collect(),
                channels: even_part(widths.intermediate_size, tp_degree, rank).collect(),
            }
        };
        let ranks = (0..tp_degree)
            .map(|rank| spec.layers.iter().map(|widths| share(widths, rank)).collect())
            .collect();
        Ok(Self { ranks })
    }

    #[must_use]
    pub fn tp_degree(&self) -> usize {
        self.ranks.len()
    }

    /// What stays where it is under `mask`: nothing moves.
    #[must_use]
    pub fn restricted_to(&self, mask: &KeepMask) -> Self {
        let mut scratch = Vec::new();
        let mut ranks = vec![Vec::with_capacity(mask.layers.len()); self.ranks.len()];
        for (layer, keep) in mask.layers.iter().enumerate() {
            let [query_heads, kv_heads, channels] =
                [&keep.query_heads, &keep.kv_heads, &keep.channels].map(|kept| are_in(kept));
            for (restricted, held) in ranks.iter_mut().zip(&self.ranks) {
                let Some(held) = held.get(layer) else { continue };
                restricted.push(RankLayer {
                    query_heads: those_in(&held.query_heads, &query_heads, &mut scratch),
                    kv_heads: those_in(&held.kv_heads, &kv_heads, &mut scratch),
                    channels: those_in(&held.channels, &channels, &mut scratch),
                });
            }
        }
        Self { ranks }
    }

    /// Deals groups out anew where `self` (already restricted to a mask of `dense`) is uneven.
    ///
    /// A list moves only when its fullest rank holds more than one group and more than 2 % above the fair share. The
    /// over-full ranks then give their last groups to the emptiest, lowest rank first, until sizes differ by at most one.
    #[must_use]
    pub fn rebalanced(&self, dense: &ModelSpec) -> Self {
        let mut balanced = self.clone();
        for layer in 0..dense.layers.len() {
            let mut kv_heads: Vec<Vec<usize>> =
                balanced.ranks.iter_mut().map(|rank| std::mem::take(&mut rank[layer].kv_heads)).collect();
            let mut query_heads: Vec<usize> = balanced
                .ranks
                .iter_mut()
                .flat_map(|rank| std::mem::take(&mut rank[layer].query_heads))
                .collect();
            let mut channels: Vec<Vec<usize>> =
                balanced.ranks.iter_mut().map(|rank| std::mem::take(&mut rank[layer].channels)).collect();
            level(&mut kv_heads);
            level(&mut channels);
            query_heads.sort_unstable();
            for (rank, (kv_heads, channels)) in kv_heads.into_iter().zip(channels).enumerate() {
                let queries = query_heads
                    .iter()
                    .copied()
                    .filter(|&query| kv_heads.binary_search(&dense.layers[layer].kv_head_of(query)).is_ok())
                    .collect();
                balanced.ranks[rank][layer] = RankLayer { query_heads: queries, kv_heads, channels };
            }
        }
        balanced
    }
}

/// Whether each index, up to the greatest of `kept`, is one of them.
fn are_in(kept: &[usize]) -> Vec<bool> {
    let mut are_in = vec![false; kept.iter().max().map_or(0, |last| last + 1)];
    kept.iter().for_each(|&index| are_in[index] = true);
    are_in
}

/// Those of `held` that are in, in order. Without branches, which would be mispredicted half the time.
fn those_in(held: &[usize], are_in: &[bool], scratch: &mut Vec<usize>) -> Vec<usize> {
    scratch.resize(held.len().max(scratch.len()), 0);
    let mut count = 0;
    for &index in held {
        scratch[count] = index;
        count += usize::from(are_in.get(index).copied().unwrap_or(false));
    }
    scratch[..count].to_vec()
}

/// Evens out how many items the parts hold, moving as few as possible.
fn level(parts: &mut [Vec<usize>]) {
    if parts.is_empty() {
        return;
    }
    let total: usize = parts.iter().map(Vec::len).sum();
    let fair = total.div_ceil(parts.len());
    let fullest = parts.iter().map(Vec::len).max().unwrap_or(0);
    if fullest <= fair || (fullest - fair) as f64 <= 0.02 * fair as f64 {
        return;
    }
    // The parts that may hold one more than the floor are those that hold the most already.
    let (floor, mut extra) = (total / parts.len(), total % parts.len());
    let mut order: Vec<usize> = (0..parts.len()).collect();
    order.sort_by_key(|&part| (std::cmp::Reverse(parts[part].len()), part));
    let mut target = vec![floor; parts.len()];
    for part in order {
        if extra > 0 {
            target[part] += 1;
            extra -= 1;
        }
    }
    let mut surplus = Vec::new();
    for (part, target) in parts.iter_mut().zip(&target) {
        surplus.extend(part.drain((*target).min(part.len())..));
    }
    surplus.sort_unstable();
    let mut surplus = surplus.into_iter();
    for (part, target) in parts.iter_mut().zip(&target) {
        part.extend(surplus.by_ref().take(target - part.len()));
        part.sort_unstable();
    }
}
