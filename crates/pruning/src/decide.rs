use crate::global_ranking::rank_globally;
use crate::importance::group_count;
use crate::target::Goal;
use crate::{InvalidKeepMask, KeepMask, LayerKeep, MovingAverage, NotASubset, Target};
use model_spec::{Block, LayerSpec, ModelSpec};
use recipe::HeadGrouping;

/// Why no mask can be decided.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum DecideError {
    #[error("share of the target must lie in [0, 1]; got {share}")]
    Share { share: f64 },
    #[error("the keep mask in force does not fit the model")]
    KeepMask(#[source] InvalidKeepMask),
    #[error(
        "the target was resolved for another model or the average is another run's: they differ at layer {layer}"
    )]
    OtherModel { layer: usize },
    #[error(
        "layer {layer}: averaged importance of {block} group {group} is {value}; go back to the last checkpoint"
    )]
    NotFinite { layer: usize, block: &'static str, group: usize, value: f64 },
    #[error("layer {layer} keeps {live} {what}, fewer than the {last} of the target")]
    BelowTarget { layer: usize, what: &'static str, live: usize, last: usize },
    #[error("the decision would bring a group back")]
    Growth(#[source] NotASubset),
}

/// The mask due when `share` of the target is due: the least important of the live groups go.
///
/// Equal importances go by index, the lower first (under `global` by layer, attention before mlp, then index). Counts
/// are met exactly and kept sets only shrink: the decision is a function of its arguments, nothing else.
///
/// # Errors
/// When the arguments do not belong together or an importance is not a finite number.
pub fn decide(
    dense: &ModelSpec,
    keep_now: &KeepMask,
    average: &MovingAverage,
    target: &Target,
    share: f64,
) -> Result<KeepMask, DecideError> {
    check(dense, keep_now, average, target, share)?;
    let decided = match &target.goal {
        Goal::Counts { last, .. } => {
            check_above(keep_now, last)?;
            let due = target.counts_at(share).unwrap_or_default();
            let layers = keep_now.layers.iter().zip(&average.layers).zip(&dense.layers).zip(due);
            let mut scratch = Scratch::default();
            let layers = layers.map(|(((live, importance), dense), due)| {
                if live.is_removed() {
                    return LayerKeep::removed();
                }
                let mut drop_lowest = |live: &[usize], importance: &[f64], kept_count| {
                    drop_lowest(live, importance, kept_count, &mut scratch)
                };
                let channels = drop_lowest(&live.channels, &importance.mlp, due.intermediate_size);
                match target.legal.grouping() {
                    HeadGrouping::KvGroups => {
                        let kv_heads = drop_lowest(&live.kv_heads, &importance.attention, due.kv_head_count);
                        keep_kv_groups(live, dense, kv_heads, channels)
                    }
                    HeadGrouping::QueryHeads => {
                        let each = due.query_head_count / due.kv_head_count.max(1);
                        let query_heads = live
                            .query_heads
                            .chunk_by(|one, other| dense.kv_head_of(*one) == dense.kv_head_of(*other))
                            .flat_map(|heads| drop_lowest(heads, &importance.attention, each))
                            .collect();
                        LayerKeep { query_heads, kv_heads: live.kv_heads.clone(), channels }
                    }
                }
            });
            KeepMask { layers: layers.collect() }
        }
        Goal::Weights(goal) => rank_globally(dense, keep_now, average, &target.legal, goal, share),
    };
    decided.check_subset_of(keep_now).map_err(DecideError::Growth)?;
    Ok(decided)
}

/// A layer left with these key/value heads, their live query heads and these channels.
pub(crate) fn keep_kv_groups(
    live: &LayerKeep,
    dense: &LayerSpec,
    kv_heads: Vec<usize>,
    channels: Vec<usize>,
) -> LayerKeep {
    let kept = |query_head: &usize| kv_heads.binary_search(&dense.kv_head_of(*query_head)).is_ok();
    LayerKeep { query_heads: live.query_heads.iter().copied().filter(kept).collect(), kv_heads, channels }
}

/// A group with its importance as an integer that sorts alike: by importance, then by index.
pub(crate) type Ranked = (u64, usize);

pub(crate) fn ranked(group: usize, importance: &[f64]) -> Ranked {
    (sort_key(importance[group]), group)
}

/// An integer that sorts as the finite `number` does.
pub(crate) fn sort_key(number: f64) -> u64 {
    // Adding zero makes -0 equal to 0. Flipping the sign bit, or all bits below zero, makes the order that of integers.
    let bits = (number + 0.0).to_bits();
    bits ^ if bits >> 63 == 0 { 1 << 63 } else { u64::MAX }
}

/// Memory that one layer after the other uses.
#[derive(Default)]
struct Scratch {
    keys: Vec<u64>,
    groups: Vec<usize>,
}

/// The `kept_count` most important of `live`, ascending by index; all of them when they are no more.
fn drop_lowest(live: &[usize], importance: &[f64], kept_count: usize, scratch: &mut Scratch) -> Vec<usize> {
    let Some(removed_count @ 1..) = live.len().checked_sub(kept_count) else {
        return live.to_vec();
    };
    let Scratch { keys, groups } = scratch;
    keys.clear();
    keys.extend(live.iter().map(|&group| sort_key(importance[group])));
    let (lower, &mut last_key, _) = keys.select_nth_unstable(removed_count - 1);
    // Of those equal to the last one that goes, the first go.
    let mut equal_that_go = 1 + lower.iter().filter(|key| **key == last_key).count();
    retained(live, groups, |_, group| {
        let key = sort_key(importance[group]);
        let goes_by_index = (key == last_key) & (equal_that_go > 0);
        equal_that_go -= usize::from(goes_by_index);
        (key >= last_key) & !goes_by_index
    })
}

/// The groups of `live` that `stays(place, group)` picks, in order. Whether one stays is no better known beforehand than
/// a coin's fall, so that this does without branches. `scratch` is for its use: memory anew for every layer costs more.
pub(crate) fn retained(
    live: &[usize],
    scratch: &mut Vec<usize>,
    mut stays: impl FnMut(usize, usize) -> bool,
) -> Vec<usize> {
    scratch.resize(live.len().max(scratch.len()), 0);
    let mut count = 0;
    for (place, &group) in live.iter().enumerate() {
        scratch[count] = group;
        count += usize::from(stays(place, group));
    }
    scratch[..count].to_vec()
}

fn check(
    dense: &ModelSpec,
    keep_now: &KeepMask,
    average: &MovingAverage,
    target: &Target,
    share: f64,
) -> Result<(), DecideError> {
    if !(0.0..=1.0).contains(&share) {
        return Err(DecideError::Share { share });
    }
    keep_now.check_fits(dense).map_err(DecideError::KeepMask)?;
    let grouping = target.legal.grouping();
    let layer_count = dense.layers.len();
    if target.dense_layers.len() != layer_count || average.layers.len() != layer_count {
        return Err(DecideError::OtherModel { layer: target.dense_layers.len().min(average.layers.len()) });
    }
    for (layer, widths) in dense.layers.iter().enumerate() {
        for (block, name) in [(Block::Attention, "attention"), (Block::Mlp, "mlp")] {
            let values = average.layers[layer].of(block);
            if target.dense_layers[layer] != *widths || values.len() != group_count(widths, block, grouping) {
                return Err(DecideError::OtherModel { layer });
            }
            let are_finite = values.iter().fold(true, |are, value| are & value.is_finite());
            if !are_finite && let Some(group) = values.iter().position(|value| !value.is_finite()) {
                return Err(DecideError::NotFinite { layer, block: name, group, value: values[group] });
            }
        }
    }
    Ok(())
}

/// A mask below the target is not one that this run has decided.
fn check_above(keep_now: &KeepMask, last: &[LayerSpec]) -> Result<(), DecideError> {
    let there = keep_now.layers.iter().zip(last).enumerate().filter(|(_, (live, _))| !live.is_removed());
    for (layer, (live, last)) in there {
        let live = live.widths();
        for (what, live, last) in [
            ("query heads", live.query_head_count, last.query_head_count),
            ("key/value heads", live.kv_head_count, last.kv_head_count),
            ("channels", live.intermediate_size, last.intermediate_size),
        ] {
            if live < last {
                return Err(DecideError::BelowTarget { layer, what, live, last });
            }
        }
    }
    Ok(())
}

#[cfg(test)]
#[path = "decide_tests.rs"]
mod tests;

#[cfg(test)]
#[path = "plain_decision_tests.rs"]
mod plain;
