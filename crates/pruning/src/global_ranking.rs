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
//! Groups go in quanta: from one legal count of a layer to the next (`channel_multiple`, `serve_tp`; under
//! `query_heads` one head from each key/value head), so the counts are legal from the first decision on. A quantum's
//! density is the mean over its groups, and at least that of the quantum before it. The last legal count always stays.

use crate::decide::{Ranked, keep_kv_groups, ranked, sort_key};
use crate::legal_counts::LegalCounts;
use crate::target::{Density, WeightGoal};
use crate::{KeepMask, LayerKeep, MovingAverage};
use model_spec::{Block, ModelSpec, Projection};
use recipe::HeadGrouping;
use std::ops::Range;

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
    let mut wanted = due.saturating_sub(gone);

    let mut pools = Vec::new();
    for (layer, live) in keep_now.layers.iter().enumerate().filter(|(layer, _)| goal.prunable[*layer]) {
        pools.push(Pool::attention(dense, layer, live, average, legal));
        pools.push(Pool::mlp(dense, layer, live, average, legal));
    }
    let mut taken: Vec<Vec<bool>> = pools.iter().map(|pool| vec![false; pool.quantum_count()]).collect();
    let mut candidates = Vec::with_capacity(pools.iter().map(Pool::quantum_count).sum());
    for (index, (pool, taken)) in pools.iter().zip(&mut taken).enumerate() {
        if last && pool.is_illegal && !taken.is_empty() {
            taken[0] = true;
            wanted = wanted.saturating_sub(pool.weights(0));
        }
        pool.rank(index, average, goal.density, taken, &mut candidates);
    }
    let weights = |candidate: &Candidate| pools[candidate.pool as usize].weights(candidate.quantum as usize);
    for candidate in least_dense(&mut candidates, wanted, weights) {
        taken[candidate.pool as usize][candidate.quantum as usize] = true;
    }
    without_taken(keep_now, dense, legal.grouping(), &pools, &taken)
}

/// The live groups of one block of one layer that may go.
struct Pool {
    layer: usize,
    block: Block,
    group_weights: u64,
    groups: Vec<usize>,
    cut: Cut,
    /// The count in force is not legal: the last decision takes the first quantum whatever it scores.
    is_illegal: bool,
}

/// How a pool's groups fall into quanta.
enum Cut {
    /// Each group by itself, in any order.
    Singles,
    /// Ends of the quanta within the groups, which are sorted: a quantum goes only after those before it.
    Ends(Vec<usize>),
}

/// A quantum with its place in the ranking: by density, then by pool (layer, attention before mlp), then in its pool's
/// order.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Candidate {
    density_key: u64,
    pool: u32,
    quantum: u32,
}

impl Pool {
    fn attention(
        dense: &ModelSpec,
        layer: usize,
        live: &LayerKeep,
        average: &MovingAverage,
        legal: &LegalCounts,
    ) -> Self {
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
        let steps = live.widths();
        let (groups, cut) =
            cut_sorted(&strands, &average.layers[layer].attention, &legal.legal_attention(widths));
        let is_illegal = !legal.attention_is_legal(widths, legal.attention_steps(&steps));
        Self { layer, block: Block::Attention, group_weights, groups, cut, is_illegal }
    }

    fn mlp(
        dense: &ModelSpec,
        layer: usize,
        live: &LayerKeep,
        average: &MovingAverage,
        legal: &LegalCounts,
    ) -> Self {
        let importance = &average.layers[layer].mlp;
        let (count, quantum) = (dense.layers[layer].intermediate_size, legal.channel_quantum());
        let (groups, cut) = if quantum == 1 {
            let most = live.channels.iter().copied().max_by_key(|&channel| ranked(channel, importance));
            (live.channels.iter().copied().filter(|channel| Some(*channel) != most).collect(), Cut::Singles)
        } else {
            let legal_counts: Vec<usize> = (1..=count / quantum).map(|multiple| multiple * quantum).collect();
            cut_sorted(&[&live.channels], importance, &legal_counts)
        };
        Self {
            layer,
            block: Block::Mlp,
            group_weights: dense.block_weight_count(layer, Block::Mlp) / count as u64,
            groups,
            cut,
            is_illegal: !legal.channels_are_legal(live.channels.len()),
        }
    }

    fn quantum_count(&self) -> usize {
        match &self.cut {
            Cut::Singles => self.groups.len(),
            Cut::Ends(ends) => ends.len(),
        }
    }

    fn span(&self, quantum: usize) -> Range<usize> {
        match &self.cut {
            Cut::Singles => quantum..quantum + 1,
            Cut::Ends(ends) => quantum.checked_sub(1).map_or(0, |before| ends[before])..ends[quantum],
        }
    }

    fn weights(&self, quantum: usize) -> u64 {
        self.span(quantum).len() as u64 * self.group_weights
    }

    /// Adds a candidate for each quantum that is not taken yet.
    fn rank(
        &self,
        pool: usize,
        average: &MovingAverage,
        density: Density,
        taken: &[bool],
        candidates: &mut Vec<Candidate>,
    ) {
        let importance = average.layers[self.layer].of(self.block);
        let total: f64 = importance.iter().sum();
        let to_density = match density {
            Density::ByWeight => 1.0 / self.group_weights as f64,
            Density::ByBlockMean if total > 0.0 => importance.len() as f64 / total,
            Density::ByBlockMean => 0.0,
        };
        let mut before = f64::NEG_INFINITY;
        for quantum in (0..taken.len()).filter(|&quantum| !taken[quantum]) {
            let span = self.span(quantum);
            let count = span.len() as f64;
            let mean = self.groups[span].iter().map(|&group| importance[group]).sum::<f64>() / count;
            let mut density = mean * to_density;
            if let Cut::Ends(_) = self.cut {
                density = density.max(before);
                before = density;
            }
            let density_key = sort_key(density);
            candidates.push(Candidate { density_key, pool: pool as u32, quantum: quantum as u32 });
        }
    }
}

/// Sorts each strand by importance and cuts all of them alike from the live count down to the least legal one.
fn cut_sorted(strands: &[&[usize]], importance: &[f64], legal_counts: &[usize]) -> (Vec<usize>, Cut) {
    let sorted: Vec<Vec<Ranked>> = strands
        .iter()
        .map(|strand| {
            let mut strand: Vec<Ranked> = strand.iter().map(|&group| ranked(group, importance)).collect();
            strand.sort_unstable();
            strand
        })
        .collect();
    let live = strands.first().map_or(0, |strand| strand.len());
    let (mut groups, mut ends) = (Vec::new(), Vec::new());
    let mut removed = 0;
    for &count in legal_counts.iter().rev().filter(|&&count| count < live) {
        for strand in &sorted {
            groups.extend(strand[removed..live - count].iter().map(|(_, group)| *group));
        }
        removed = live - count;
        ends.push(groups.len());
    }
    (groups, Cut::Ends(ends))
}

/// The shortest run of candidates, least dense first, that weighs at least `wanted`; all of them when they do not.
/// Linear in time.
fn least_dense(
    candidates: &mut [Candidate],
    mut wanted: u64,
    weights: impl Fn(&Candidate) -> u64,
) -> &[Candidate] {
    if wanted == 0 {
        return &[];
    }
    // Those before `low` are taken, those from `high` on are not, and what is between is denser than the former.
    let (mut low, mut high) = (0, candidates.len());
    while high - low > 1 {
        let half = (high - low) / 2;
        candidates[low..high].select_nth_unstable(half);
        let lower: u64 = candidates[low..low + half].iter().map(&weights).sum();
        if lower >= wanted {
            high = low + half;
        } else {
            wanted -= lower;
            low += half;
        }
    }
    &candidates[..high]
}

/// What is left of `keep_now`.
fn without_taken(
    keep_now: &KeepMask,
    dense: &ModelSpec,
    grouping: HeadGrouping,
    pools: &[Pool],
    taken: &[Vec<bool>],
) -> KeepMask {
    let mut mask = keep_now.clone();
    for (pool, taken) in pools.iter().zip(taken) {
        let widths = &dense.layers[pool.layer];
        let keep = &mut mask.layers[pool.layer];
        let mut gone = vec![false; widths.query_head_count.max(widths.intermediate_size)];
        for quantum in (0..taken.len()).filter(|&quantum| taken[quantum]) {
            for &group in &pool.groups[pool.span(quantum)] {
                gone[group] = true;
            }
        }
        let left = keep.groups(pool.block, grouping).iter().copied().filter(|&group| !gone[group]).collect();
        match (pool.block, grouping) {
            (Block::Attention, HeadGrouping::KvGroups) => {
                let channels = std::mem::take(&mut keep.channels);
                *keep = keep_kv_groups(keep, widths, left, channels);
            }
            (Block::Attention, HeadGrouping::QueryHeads) => keep.query_heads = left,
            (Block::Mlp, HeadGrouping::KvGroups | HeadGrouping::QueryHeads) => keep.channels = left,
        }
    }
    mask
}
