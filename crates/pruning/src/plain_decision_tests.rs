//! Decisions against plain ones: everything sorted, in full, with its place.

use super::*;
use crate::target::Density;
use crate::testing::{importances, model};
use model_spec::Projection;
use proptest::prelude::*;
use recipe::{Budget, Criterion, LoraPruneForm, Protection, Pruning, Shape};

/// A quantum of groups that go together: density, then layer, attention before mlp, and place in the block.
type Quantum = (f64, usize, usize, usize, Vec<usize>, u64);

/// `live` in the order in which it goes: least important first, of equal ones the lower index.
fn by_importance(live: &[usize], importance: &[f64]) -> Vec<usize> {
    let mut sorted = live.to_vec();
    sorted.sort_by(|one, other| importance[*one].total_cmp(&importance[*other]).then(one.cmp(other)));
    sorted
}

fn without_lowest(live: &[usize], importance: &[f64], kept_count: usize) -> Vec<usize> {
    let removed = live.len().saturating_sub(kept_count);
    let gone = &by_importance(live, importance)[..removed];
    live.iter().copied().filter(|group| !gone.contains(group)).collect()
}

/// The quanta of one block, in the order in which they may go. `strands` lose equally many each.
fn quanta(strands: &[Vec<usize>], importance: &[f64], counts: &[usize]) -> Vec<Vec<usize>> {
    let sorted: Vec<Vec<usize>> = strands.iter().map(|strand| by_importance(strand, importance)).collect();
    let live = strands[0].len();
    let mut removed = 0;
    let mut quanta = Vec::new();
    for &count in counts.iter().rev().filter(|count| **count < live) {
        let of_strand = |strand: &Vec<usize>| strand[removed..live - count].to_vec();
        quanta.push(sorted.iter().flat_map(of_strand).collect());
        removed = live - count;
    }
    quanta
}

fn plain_global(
    dense: &ModelSpec,
    keep: &KeepMask,
    average: &MovingAverage,
    target: &Target,
    share: f64,
) -> KeepMask {
    let Goal::Weights(goal) = &target.goal else { unreachable!("a global target") };
    let (legal, grouping) = (&target.legal, target.legal.grouping());
    let mut gone = dense.projection_weight_count() - keep.pruned_spec(dense).projection_weight_count();
    let due = if share >= 1.0 { goal.removed_weights } else { (share * goal.removed_weights as f64) as u64 };
    let mut going: Vec<Quantum> = Vec::new();
    let mut going_anyway: Vec<Quantum> = Vec::new();
    for (layer, live) in keep.layers.iter().enumerate().filter(|(layer, _)| goal.prunable[*layer]) {
        let widths = &dense.layers[layer];
        for (place, block) in [Block::Attention, Block::Mlp].into_iter().enumerate() {
            let importance = average.layers[layer].of(block);
            let (strands, counts, is_legal, group_weights) = match (block, grouping) {
                (Block::Attention, HeadGrouping::KvGroups) => (
                    vec![live.kv_heads.clone()],
                    legal.legal_attention(widths),
                    legal.attention_is_legal(widths, live.kv_heads.len()),
                    dense.block_weight_count(layer, block) / widths.kv_head_count as u64,
                ),
                (Block::Attention, HeadGrouping::QueryHeads) => (
                    (0..widths.kv_head_count)
                        .map(|kv| {
                            live.query_heads.iter().copied().filter(|q| widths.kv_head_of(*q) == kv).collect()
                        })
                        .collect(),
                    legal.legal_attention(widths),
                    legal.attention_is_legal(widths, live.query_heads.len() / widths.kv_head_count),
                    [Projection::Q, Projection::O]
                        .map(|projection| dense.projection_shape(layer, projection))
                        .map(|[rows, columns]| (rows * columns / widths.query_head_count) as u64)
                        .iter()
                        .sum(),
                ),
                (Block::Mlp, _) => (
                    vec![live.channels.clone()],
                    (1..=widths.intermediate_size).filter(|count| legal.channels_are_legal(*count)).collect(),
                    legal.channels_are_legal(live.channels.len()),
                    dense.block_weight_count(layer, block) / widths.intermediate_size as u64,
                ),
            };
            let total: f64 = importance.iter().sum();
            let scale = match goal.density {
                Density::ByWeight => 1.0 / group_weights as f64,
                Density::Itself => 1.0,
                Density::ByBlockMean if total > 0.0 => importance.len() as f64 / total,
                Density::ByBlockMean => 0.0,
            };
            let mut quanta = quanta(&strands, importance, &counts);
            let forced = share >= 1.0 && !is_legal && !quanta.is_empty();
            if block == Block::Mlp && legal.channel_quantum() == 1 {
                // Single channels go in any order: equal densities of unequal importances by index.
                quanta.sort();
            }
            let mut least = f64::NEG_INFINITY;
            for (index, groups) in quanta.into_iter().enumerate() {
                let mean = groups.iter().map(|group| importance[*group]).sum::<f64>() / groups.len() as f64;
                let weights = groups.len() as u64 * group_weights;
                let is_ordered = block == Block::Attention || legal.channel_quantum() > 1;
                let density = if is_ordered { (mean * scale).max(least) } else { mean * scale };
                if forced && index == 0 {
                    going_anyway.push((density, layer, place, index, groups, weights));
                } else {
                    least = density;
                    going.push((density, layer, place, index, groups, weights));
                }
            }
        }
    }
    going.sort_by(|one, other| {
        one.0.total_cmp(&other.0).then((one.1, one.2, one.3).cmp(&(other.1, other.2, other.3)))
    });
    let mut mask = keep.clone();
    let forced_count = going_anyway.len();
    for (index, (_, layer, place, _, groups, weights)) in going_anyway.into_iter().chain(going).enumerate() {
        if index >= forced_count && gone >= due {
            break;
        }
        gone += weights;
        let keep = &mut mask.layers[layer];
        match (place, grouping) {
            (0, HeadGrouping::KvGroups) => {
                keep.kv_heads.retain(|head| !groups.contains(head));
                keep.query_heads.retain(|head| !groups.contains(&dense.layers[layer].kv_head_of(*head)));
            }
            (0, HeadGrouping::QueryHeads) => keep.query_heads.retain(|head| !groups.contains(head)),
            _ => keep.channels.retain(|channel| !groups.contains(channel)),
        }
    }
    mask
}

fn plain_counts(
    dense: &ModelSpec,
    keep: &KeepMask,
    average: &MovingAverage,
    target: &Target,
    share: f64,
) -> KeepMask {
    let mut mask = keep.clone();
    for (layer, due) in target.counts_at(share).expect("counts").iter().enumerate() {
        let (keep, importance) = (&mut mask.layers[layer], &average.layers[layer]);
        keep.channels = without_lowest(&keep.channels, &importance.mlp, due.intermediate_size);
        let widths = &dense.layers[layer];
        match target.legal.grouping() {
            HeadGrouping::KvGroups => {
                keep.kv_heads = without_lowest(&keep.kv_heads, &importance.attention, due.kv_head_count);
                let kv_heads = keep.kv_heads.clone();
                keep.query_heads.retain(|head| kv_heads.contains(&widths.kv_head_of(*head)));
            }
            HeadGrouping::QueryHeads => {
                let each = due.query_head_count / due.kv_head_count;
                let heads = std::mem::take(&mut keep.query_heads);
                for kv_head in 0..widths.kv_head_count {
                    let its: Vec<usize> =
                        heads.iter().copied().filter(|head| widths.kv_head_of(*head) == kv_head).collect();
                    keep.query_heads.extend(without_lowest(&its, &importance.attention, each));
                }
            }
        }
    }
    mask
}

proptest! {
    #[test]
    fn a_decision_is_the_plain_one_whatever_the_ties(
        shape in prop_oneof![Just(Shape::Uniform), Just(Shape::Paper), Just(Shape::Global)],
        form in prop_oneof![Just(LoraPruneForm::Code), Just(LoraPruneForm::Paper)],
        head_grouping in prop_oneof![Just(HeadGrouping::KvGroups), Just(HeadGrouping::QueryHeads)],
        sparsity in 0.0f64..0.9,
        channel_multiple in 1usize..5,
        serve_tp in prop_oneof![Just(vec![]), Just(vec![2])],
        protected in prop_oneof![Just(vec![]), Just(vec![1])],
        // How many different importances there are, from all equal to hardly any; and how far apart.
        levels in prop_oneof![Just(1u64), Just(2), Just(7), Just(1 << 30)],
        spread in prop_oneof![Just(0.0f64), Just(1e-12), Just(1.0), Just(1e9)],
        shares in proptest::collection::vec(0.0f64..1.0, 0..3),
        seed: u64,
    ) {
        let dense = model(3, 12, 4, 24);
        let recipe = Pruning {
            shape,
            criterion: Criterion::LoraPrune { form },
            head_grouping,
            channel_multiple,
            serve_tp,
            budget: Budget::Sparsity(sparsity),
            protection: Protection::Layers(if shape == Shape::Uniform { vec![] } else { protected }),
            ..Pruning::published()
        };
        let Ok(target) = Target::resolve(&dense, &recipe) else { return Ok(()) };
        let mut shares = shares;
        shares.sort_by(f64::total_cmp);
        shares.push(1.0);
        let mut keep = KeepMask::full(&dense);
        for (decision, share) in shares.into_iter().enumerate() {
            let mut average = MovingAverage::new(&dense, head_grouping, 0.9);
            average.layers = importances(&dense, head_grouping, |layer, block, group| {
                let random = crate::random_importance(seed ^ decision as u64, layer, block, group);
                1.0 + spread * ((random * levels as f64).floor() / levels as f64)
            });
            average.forget_removed(&keep, head_grouping);
            let decided = decide(&dense, &keep, &average, &target, share).unwrap();
            let plain = if shape == Shape::Global { plain_global } else { plain_counts };
            prop_assert_eq!(&decided, &plain(&dense, &keep, &average, &target, share));
            keep = decided;
        }
    }
}
