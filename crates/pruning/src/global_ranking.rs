//! One ranking over all unprotected layers: a knapsack by density, the least importance per weight first.
//!
//! Where the criterion is in one unit everywhere (a change of the loss for `paper` and `taylor`, a mass of weights for
//! `magnitude`), density is importance by weight: the greedy answer to "lose the least for so many weights".
//! Where it is not, that would compare artefacts. The `code` form divides each projection by its L2 norm, so a block of
//! `n` groups has scores near `1 / sqrt(n)`, and by weight every attention group would go before any channel; `random`
//! draws all groups from one range. There, density is importance over the mean importance of the block's groups,
//! counting those that are gone as zero: the share of its block that a group carries. A block already cut deeply thus
//! defends what it has left, and the layers differ by how unequal their groups are, which is all that such scores tell.
//!
//! FLAP's scores are standardised in each layer, to be compared as they are: density is importance itself.
//!
//! Groups go in quanta: from one legal count of a layer to the next (`channel_multiple`, `serve_tp`; under
//! `query_heads` one head from each key/value head), so the counts are legal from the first decision on. A quantum's
//! density is the mean over its groups, and at least that of the quantum before it. The last legal count always stays.

use crate::decide::{Ranked, keep_kv_groups, ranked, retained, sort_key};
use crate::legal_counts::LegalCounts;
use crate::target::{Density, WeightGoal};
use crate::{KeepMask, LayerKeep, MovingAverage};
use model_spec::{Block, ModelSpec, Projection};
use recipe::HeadGrouping;
use std::cmp::Ordering;

/// The mask after at least `share` of the goal's weights are gone, and less than one quantum more.
pub(crate) fn rank_globally(
    dense: &ModelSpec,
    keep_now: &KeepMask,
    average: &MovingAverage,
    legal: &LegalCounts,
    goal: &WeightGoal,
    share: f64,
) -> KeepMask {
    let last = share >= 1.0;
    let due = if last { goal.removed_weights } else { (share * goal.removed_weights as f64) as u64 };
    let gone = dense.projection_weight_count() - keep_now.pruned_spec(dense).projection_weight_count();

    let cutter = Cutter { dense, average, legal, density: goal.density, last };
    let mut scratch = Scratch::default();
    let mut pools = Vec::with_capacity(2 * dense.layers.len());
    let may_go = |layer: usize, live: &LayerKeep| goal.prunable[layer] && !live.is_removed();
    for (layer, live) in keep_now.layers.iter().enumerate().filter(|(layer, live)| may_go(*layer, live)) {
        pools.push(cutter.attention(layer, live, &mut scratch));
        pools.push(cutter.mlp(layer, live, &mut scratch));
    }
    let gone_anyway: u64 = pools.iter().map(Pool::weights_that_go_anyway).sum();
    let last_to_go = last_to_go(&pools, due.saturating_sub(gone).saturating_sub(gone_anyway));
    without(keep_now, dense, legal.grouping(), &pools, last_to_go)
}

/// The live groups of one block of one layer that may go.
struct Pool<'a> {
    layer: usize,
    block: Block,
    group_weights: u64,
    quanta: Quanta<'a>,
}

/// How a pool's groups fall into quanta.
enum Quanta<'a> {
    /// Each live group but one by itself, in any order; a quantum's number is its place in `live`.
    ///
    /// There may be millions, so nothing is written down for each: its density is cheaper to compute anew.
    Singles {
        live: &'a [usize],
        importance: &'a [f64],
        to_density: f64,
        place_that_stays: usize,
        /// Least and greatest density of all, the one that stays included.
        key_range: [u64; 2],
    },
    /// A quantum goes only after those before it. It takes equally many groups from each strand: from the live groups of
    /// a block, or from the query heads of each key/value head.
    Sorted {
        importance: &'a [f64],
        strand_count: usize,
        /// Live groups of a strand.
        strand_len: usize,
        /// Groups of each strand that are gone when a quantum is.
        ends: Vec<usize>,
        /// By quantum and strand, the last group that goes.
        last_groups: Vec<Ranked>,
        /// Of the quanta; they never fall, but for the first where it goes anyway.
        density_keys: Vec<u64>,
        /// The count in force is not legal, and this is the last decision: it takes the first whatever it scores.
        first_goes_anyway: bool,
    },
}

/// A quantum's place in the ranking: by density, then by pool (layer, attention before mlp), then in its pool's order.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Candidate {
    density_key: u64,
    pool: usize,
    quantum: usize,
}

/// Cuts blocks into quanta.
struct Cutter<'a> {
    dense: &'a ModelSpec,
    average: &'a MovingAverage,
    legal: &'a LegalCounts,
    density: Density,
    last: bool,
}

impl<'a> Cutter<'a> {
    fn attention(&self, layer: usize, live: &LayerKeep, scratch: &mut Scratch) -> Pool<'a> {
        let (dense, legal) = (self.dense, self.legal);
        let widths = &dense.layers[layer];
        let strands: Vec<&[usize]> = match legal.grouping() {
            HeadGrouping::KvGroups => vec![&live.kv_heads],
            HeadGrouping::QueryHeads => live
                .query_heads
                .chunk_by(|one, other| widths.kv_head_of(*one) == widths.kv_head_of(*other))
                .collect(),
        };
        let group_weights = match legal.grouping() {
            HeadGrouping::KvGroups => {
                dense.block_weight_count(layer, Block::Attention) / widths.kv_head_count as u64
            }
            HeadGrouping::QueryHeads => [Projection::Q, Projection::O]
                .iter()
                .map(|&projection| {
                    let [rows, columns] = dense.projection_shape(layer, projection);
                    (rows * columns / widths.query_head_count) as u64
                })
                .sum(),
        };
        let is_legal = legal.attention_is_legal(widths, legal.attention_steps(&live.widths()));
        let importance = &self.average.layers[layer].attention;
        let quanta = self.sorted(
            &strands,
            importance,
            group_weights,
            &legal.legal_attention(widths),
            is_legal,
            scratch,
        );
        Pool { layer, block: Block::Attention, group_weights, quanta }
    }

    fn mlp(&self, layer: usize, live: &'a LayerKeep, scratch: &mut Scratch) -> Pool<'a> {
        let importance = &self.average.layers[layer].mlp[..];
        let live = &live.channels[..];
        let (count, quantum) = (self.dense.layers[layer].intermediate_size, self.legal.channel_quantum());
        let group_weights = self.dense.block_weight_count(layer, Block::Mlp) / count as u64;
        let quanta = if quantum == 1 {
            let to_density = self.to_density(group_weights, importance);
            let (place_that_stays, extremes) = most_important(live, importance);
            let key_range = extremes.map(|importance| sort_key(importance * to_density));
            Quanta::Singles { live, importance, to_density, place_that_stays, key_range }
        } else {
            let legal_counts: Vec<usize> = (1..=count / quantum).map(|multiple| multiple * quantum).collect();
            let is_legal = self.legal.channels_are_legal(live.len());
            self.sorted(&[live], importance, group_weights, &legal_counts, is_legal, scratch)
        };
        Pool { layer, block: Block::Mlp, group_weights, quanta }
    }

    /// Sorts each strand by importance and cuts all of them alike from the live count down to the least legal one.
    fn sorted(
        &self,
        strands: &[&[usize]],
        importance: &'a [f64],
        group_weights: u64,
        legal_counts: &[usize],
        is_legal: bool,
        scratch: &mut Scratch,
    ) -> Quanta<'a> {
        let strand_len = strands.first().map_or(0, |strand| strand.len());
        scratch.sorted.clear();
        for strand in strands {
            rank(strand, importance, scratch);
        }
        let to_density = self.to_density(group_weights, importance);
        let first_goes_anyway = self.last && !is_legal;
        let (mut ends, mut last_groups, mut density_keys) = (Vec::new(), Vec::new(), Vec::new());
        let (mut start, mut least) = (0, f64::NEG_INFINITY);
        for &count in legal_counts.iter().rev().filter(|&&count| count < strand_len) {
            let end = strand_len - count;
            let strands = scratch.sorted.chunks(strand_len);
            let quantum = strands.clone().flat_map(|strand| &strand[start..end]);
            let sum = quantum.map(|(_, group)| importance[*group]).sum::<f64>();
            let density = (sum / (strands.len() * (end - start)) as f64 * to_density).max(least);
            density_keys.push(sort_key(density));
            last_groups.extend(strands.map(|strand| strand[end - 1]));
            ends.push(end);
            if start > 0 || !first_goes_anyway {
                least = density;
            }
            start = end;
        }
        let strand_count = strands.len();
        Quanta::Sorted {
            importance,
            strand_count,
            strand_len,
            ends,
            last_groups,
            density_keys,
            first_goes_anyway,
        }
    }

    /// What makes a density of a mean importance.
    fn to_density(&self, group_weights: u64, importance: &[f64]) -> f64 {
        match self.density {
            Density::ByWeight => 1.0 / group_weights as f64,
            Density::Itself => 1.0,
            Density::ByBlockMean => {
                let total: f64 = importance.iter().sum();
                if total > 0.0 { importance.len() as f64 / total } else { 0.0 }
            }
        }
    }
}

impl Pool<'_> {
    fn weights_that_go_anyway(&self) -> u64 {
        match &self.quanta {
            Quanta::Sorted { ends, strand_count, first_goes_anyway: true, .. } => {
                ends.first().map_or(0, |end| (end * strand_count) as u64 * self.group_weights)
            }
            Quanta::Sorted { .. } | Quanta::Singles { .. } => 0,
        }
    }

    /// Bounds of the density keys; none without quanta.
    fn key_range(&self) -> Option<(u64, u64)> {
        match &self.quanta {
            Quanta::Singles { live: [], .. } => None,
            Quanta::Singles { key_range: [least, most], .. } => Some((*least, *most)),
            Quanta::Sorted { density_keys, .. } => {
                Some((*density_keys.iter().min()?, *density_keys.iter().max()?))
            }
        }
    }

    /// Calls `visit(quantum, density_key, weights)` for each quantum that the scores may take, in order.
    fn visit(&self, mut visit: impl FnMut(usize, u64, u64)) {
        match &self.quanta {
            Quanta::Singles { live, importance, to_density, place_that_stays, .. } => {
                let (before, from) = live.split_at(*place_that_stays);
                let mut each = |first_place: usize, groups: &[usize]| {
                    for (place, &group) in groups.iter().enumerate() {
                        let density_key = sort_key(importance[group] * to_density);
                        visit(first_place + place, density_key, self.group_weights);
                    }
                };
                each(0, before);
                each(place_that_stays + 1, from.get(1..).unwrap_or_default());
            }
            Quanta::Sorted { ends, strand_count, density_keys, first_goes_anyway, .. } => {
                let mut start = 0;
                for (quantum, (&end, &density_key)) in ends.iter().zip(density_keys).enumerate() {
                    if quantum > 0 || !first_goes_anyway {
                        let groups = (end - start) * strand_count;
                        visit(quantum, density_key, groups as u64 * self.group_weights);
                    }
                    start = end;
                }
            }
        }
    }

    /// What is left of the groups of `live` when all quanta up to `(key, quantum_end)`, exclusive, go.
    fn left(&self, live: &[usize], key: u64, quantum_end: usize, scratch: &mut Vec<usize>) -> Vec<usize> {
        let goes = |density_key: u64, quantum: usize| {
            (density_key < key) | ((density_key == key) & (quantum < quantum_end))
        };
        match &self.quanta {
            Quanta::Singles { live, importance, to_density, place_that_stays, .. } => {
                retained(live, scratch, |place, group| {
                    (place == *place_that_stays) | !goes(sort_key(importance[group] * to_density), place)
                })
            }
            Quanta::Sorted {
                importance,
                strand_count,
                strand_len,
                last_groups,
                density_keys,
                first_goes_anyway,
                ..
            } => {
                let by_score = density_keys
                    .iter()
                    .enumerate()
                    .rposition(|(quantum, &density_key)| goes(density_key, quantum));
                let Some(last) = by_score.or(first_goes_anyway.then_some(0)) else { return live.to_vec() };
                let Some(last_groups) = last_groups.chunks(*strand_count).nth(last) else {
                    return live.to_vec();
                };
                retained(live, scratch, |place, group| {
                    ranked(group, importance) > last_groups[place / strand_len]
                })
            }
        }
    }
}

/// Buckets of [`rank`], as a power of two: a handful of groups in each where a layer has ten thousands.
const BUCKET_BITS: u32 = 12;

/// Memory that one layer's ranking after the other uses: anew for each, its pages would cost more than the sorting.
#[derive(Default)]
struct Scratch {
    ranked: Vec<Ranked>,
    sorted: Vec<Ranked>,
    ends: Vec<usize>,
}

/// Adds `groups`, which ascend, by importance to `scratch.sorted`. Sorts them into buckets of nearly equal importance
/// first, and then each bucket, which is several times faster than at once.
fn rank(groups: &[usize], importance: &[f64], scratch: &mut Scratch) {
    let Scratch { ranked: all, sorted, ends } = scratch;
    all.clear();
    all.extend(groups.iter().map(|&group| ranked(group, importance)));
    let first = sorted.len();
    sorted.resize(first + all.len(), (0, 0));
    let sorted = &mut sorted[first..];
    ends.clear();
    ends.resize(1 << BUCKET_BITS, 0);
    let keys = || all.iter().map(|(key, _)| *key);
    let (Some(least), Some(most)) = (keys().min(), keys().max()) else { return };
    let shift = (u64::BITS - (most - least).leading_zeros()).saturating_sub(BUCKET_BITS);
    let bucket_of = |key: u64| ((key - least) >> shift) as usize;
    keys().for_each(|key| ends[bucket_of(key)] += 1);
    let mut total = 0;
    for end in ends.iter_mut() {
        total += std::mem::replace(end, total);
    }
    for one in all.iter() {
        // A bucket's end begins as its start, and moves as it fills.
        let end = &mut ends[bucket_of(one.0)];
        sorted[*end] = *one;
        *end += 1;
    }
    let mut start = 0;
    for end in ends.iter() {
        sorted[start..*end].sort_unstable();
        start = *end;
    }
}

/// Place of the most important group (of equal ones the last), and the least and the greatest importance.
fn most_important(live: &[usize], importance: &[f64]) -> (usize, [f64; 2]) {
    let (mut place_of_most, mut least, mut most) = (0, f64::INFINITY, f64::NEG_INFINITY);
    for (place, &group) in live.iter().enumerate() {
        let value = importance[group];
        least = least.min(value);
        if value >= most {
            (place_of_most, most) = (place, value);
        }
    }
    (place_of_most, [least, most])
}

/// Buckets of a pass of [`last_to_go`], as a power of two: their sums stay in a core's own cache.
const DIGIT_BITS: u32 = 14;

/// Candidates that are written down and compared rather than counted once more. Few in tests, whose models are small.
const FEW: u64 = if cfg!(test) { 3 } else { 1 << 16 };

/// The last quantum of the shortest run, least dense first, that weighs at least `wanted`; none when nothing is wanted,
/// and one beyond all when they weigh less.
///
/// A radix selection: each pass cuts the range in which the key sought lies into buckets, sums their weights and goes on
/// in the one that it falls into. One pass nearly always leaves few candidates.
fn last_to_go(pools: &[Pool], mut wanted: u64) -> Option<Candidate> {
    if wanted == 0 {
        return None;
    }
    let beyond_all = Candidate { density_key: u64::MAX, pool: usize::MAX, quantum: usize::MAX };
    let ranges = || pools.iter().filter_map(Pool::key_range);
    let lightest = pools.iter().map(|pool| pool.group_weights).min().unwrap_or(1).max(1);
    let (Some(mut low), Some(mut high)) =
        (ranges().map(|(low, _)| low).min(), ranges().map(|(_, high)| high).max())
    else {
        return Some(beyond_all);
    };
    let mut weights = vec![0; 1 << DIGIT_BITS];
    loop {
        let shift = (u64::BITS - (high - low).leading_zeros()).saturating_sub(DIGIT_BITS);
        weights.fill(0);
        for pool in pools {
            pool.visit(|_, key, weight| {
                if (low..=high).contains(&key) {
                    weights[((key - low) >> shift) as usize] += weight;
                }
            });
        }
        let Some(bucket) = take_while_less(weights.iter().copied(), &mut wanted) else {
            return Some(beyond_all);
        };
        low += (bucket as u64) << shift;
        high = high.min(low.saturating_add((1 << shift) - 1));
        if shift == 0 || weights[bucket] / lightest <= FEW {
            break;
        }
    }
    if low == high {
        // Equal ones go in order.
        let mut last = None;
        for (index, pool) in pools.iter().enumerate() {
            pool.visit(|quantum, density_key, weight| {
                if density_key == low && wanted > 0 {
                    wanted = wanted.saturating_sub(weight);
                    last = Some(Candidate { density_key, pool: index, quantum });
                }
            });
        }
        return last;
    }
    let mut few = Vec::new();
    for (index, pool) in pools.iter().enumerate() {
        pool.visit(|quantum, density_key, weight| {
            if (low..=high).contains(&density_key) {
                few.push((Candidate { density_key, pool: index, quantum }, weight));
            }
        });
    }
    few.sort_unstable();
    let last = take_while_less(few.iter().map(|(_, weight)| *weight), &mut wanted)?;
    Some(few[last].0)
}

/// Index of the first of `weights` that makes the sum `wanted` or more; takes those before it off `wanted`.
fn take_while_less(weights: impl Iterator<Item = u64>, wanted: &mut u64) -> Option<usize> {
    for (index, weight) in weights.enumerate() {
        if weight >= *wanted {
            return Some(index);
        }
        *wanted -= weight;
    }
    None
}

/// What is left of `keep_now` when all quanta up to `last_to_go` go.
fn without(
    keep_now: &KeepMask,
    dense: &ModelSpec,
    grouping: HeadGrouping,
    pools: &[Pool],
    last_to_go: Option<Candidate>,
) -> KeepMask {
    let mut scratch = Vec::new();
    let mut left = |index: usize| {
        let pool = &pools[index];
        let (key, quantum_end) = match last_to_go {
            None => (0, 0),
            Some(last) => {
                let quantum_end = match index.cmp(&last.pool) {
                    Ordering::Less => usize::MAX,
                    Ordering::Equal => last.quantum + 1,
                    Ordering::Greater => 0,
                };
                (last.density_key, quantum_end)
            }
        };
        let live = keep_now.layers[pool.layer].groups(pool.block, grouping);
        pool.left(live, key, quantum_end, &mut scratch)
    };
    let mut layers = Vec::with_capacity(keep_now.layers.len());
    let mut index = 0;
    for (layer, live) in keep_now.layers.iter().enumerate() {
        if pools.get(index).is_none_or(|pool| pool.layer != layer) {
            layers.push(live.clone());
            continue;
        }
        let (attention, channels) = (left(index), left(index + 1));
        index += 2;
        layers.push(match grouping {
            HeadGrouping::KvGroups => keep_kv_groups(live, &dense.layers[layer], attention, channels),
            HeadGrouping::QueryHeads => {
                LayerKeep { query_heads: attention, kv_heads: live.kv_heads.clone(), channels }
            }
        });
    }
    KeepMask { layers }
}
