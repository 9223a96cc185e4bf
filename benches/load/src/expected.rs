//! The masks that a run must come to, decided here from all scores at once: without ranks, chunks, messages or a store.

use anyhow::Context as _;
use model_spec::{ModelSpec, Projection};
use pruning::{KeepMask, MovingAverage, ScoreAssembly, Target, combine, decide};
use recipe::Recipe;
use std::hash::{DefaultHasher, Hasher};
use wire::convert::mask;
use wire::pb;

/// By layer and projection, of every unit of the dense model.
pub(crate) type Scores = Vec<[Vec<f32>; 7]>;

/// Digests of the masks by generation, from 1 on, of a run whose scores are the same in each step.
///
/// # Errors
/// When the recipe prunes nothing, or more than there is.
pub(crate) fn masks(dense: &ModelSpec, recipe: &Recipe, scores: &Scores) -> anyhow::Result<Vec<u64>> {
    let pruning = recipe.pruning.as_ref().context("the recipe prunes nothing")?;
    let wrong = |found: Vec<recipe::FieldViolation>| anyhow::anyhow!("the budget does not fit: {found:?}");
    let target = Target::resolve(dense, pruning).map_err(wrong)?;
    let (form, grouping) = (pruning.criterion, pruning.head_grouping);
    let mut average = MovingAverage::new(dense, grouping, pruning.moving_average_decay);
    let mut keep = KeepMask::full(dense);
    let mut importances = combine(dense, &of_kept(dense, &keep, scores)?, form, grouping)?;
    let steps = recipe.pruning_steps();
    let mut digests = Vec::with_capacity(steps.len());
    for step in 0..steps.last().map_or(0, |last| last + 1) {
        average.update(&importances)?;
        if steps.binary_search(&step).is_ok() {
            let share = pruning.ramp.share_at(step, recipe.steps);
            keep = decide(dense, &keep, &average, &target, share)?;
            average.forget_removed(&keep, grouping);
            digests.push(digest(&mask::to_pb(&keep)));
            importances = combine(dense, &of_kept(dense, &keep, scores)?, form, grouping)?;
        }
    }
    Ok(digests)
}

fn of_kept(dense: &ModelSpec, keep: &KeepMask, scores: &Scores) -> anyhow::Result<pruning::StepScores> {
    let mut assembly = ScoreAssembly::new(dense, keep);
    for (layer, kept) in keep.layers.iter().enumerate() {
        for projection in Projection::ALL {
            let units = kept.units(projection);
            let of_unit = |&unit: &usize| f64::from(scores[layer][projection.index()][unit]);
            let values: Vec<f64> = units.iter().map(of_unit).collect();
            assembly.add(layer, projection, units, &values)?;
        }
    }
    Ok(assembly.finish()?)
}

/// Tells one mask from another.
pub(crate) fn digest(mask: &pb::KeepMask) -> u64 {
    let mut hasher = DefaultHasher::new();
    for layer in &mask.layers {
        for list in [&layer.query_heads, &layer.kv_heads, &layer.channels] {
            hasher.write_usize(list.len());
            // Eight bytes at a time, or it would take longer than deciding the mask.
            let mut pairs = list.chunks_exact(2);
            for pair in &mut pairs {
                hasher.write_u64(u64::from(pair[0]) << 32 | u64::from(pair[1]));
            }
            pairs.remainder().iter().for_each(|&index| hasher.write_u32(index));
        }
    }
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_digest_tells_masks_apart_that_differ_in_one_place() {
        let mask = |query_heads: &[u32], channels: &[u32]| pb::KeepMask {
            layers: vec![pb::LayerKeep {
                query_heads: query_heads.to_vec(),
                kv_heads: vec![0],
                channels: channels.to_vec(),
            }],
        };
        let all = [
            mask(&[0, 1], &[0, 1, 2]),
            mask(&[0, 1], &[0, 1, 3]),
            mask(&[0, 1], &[0, 2, 3]),
            mask(&[0, 1], &[0, 1]),
            mask(&[0, 1, 2], &[1, 2]),
            mask(&[0], &[1, 0, 1, 2]),
        ];
        let digests: std::collections::BTreeSet<u64> = all.iter().map(digest).collect();
        assert_eq!(digests.len(), all.len());
        assert_eq!(digest(&all[0]), digest(&all[0].clone()));
    }
}
