use crate::{KeepMask, ScoreError, StepScores, random_importance};
use model_spec::{Block, LayerSpec, ModelSpec, Projection};
use recipe::{Criterion, HeadGrouping};
use serde::{Deserialize, Serialize};

/// Importance of one layer's groups, by index into the unpruned model; 0 for those that are gone.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct GroupImportance {
    /// Per key/value head under `kv_groups`, per query head under `query_heads`.
    pub attention: Vec<f64>,
    /// Per channel.
    pub mlp: Vec<f64>,
}

/// Added to the L2 norm before dividing by it, as in the published code: an all-zero projection gives 0, not NaN.
const NORM_EPS: f64 = 1e-8;

/// One step's importance of every group, layer by layer (LoRAPrune, arXiv:2305.18403, eq. 4, summed as its published code does).
///
/// ```text
/// kv_groups:    q and o are summed over the query heads of each key/value head;  S_att = v_q + v_k + v_v + v_o
/// query_heads:  the key/value heads stay, so only what goes with a query head counts;  S_att = v_q + v_o
/// both:         S_mlp = v_gate + v_up + v_down
/// ```
///
/// `v` is a projection's vector of sums, divided by `|v|_2 + 1e-8` where the criterion normalises. Sums run over
/// ascending units and over projections in the order of [`Projection::ALL`], whatever order the scores came in.
///
/// # Errors
/// [`ScoreError::Overflow`] when finite scores have an infinite sum or norm.
pub fn combine(
    dense: &ModelSpec,
    scores: &StepScores,
    criterion: Criterion,
    grouping: HeadGrouping,
) -> Result<Vec<GroupImportance>, ScoreError> {
    if criterion == Criterion::Flap {
        return Ok(standardised(dense, scores, grouping));
    }
    let normalises = criterion.normalises_projections();
    let layers = dense.layers.iter().enumerate().map(|(layer, widths)| {
        let units = |projection| scores.of(layer, projection);
        let by_kv_head = |projection| folded(units(projection), widths.query_heads_per_kv_head());
        let attention = match grouping {
            HeadGrouping::KvGroups => {
                let (q, o) = (by_kv_head(Projection::Q), by_kv_head(Projection::O));
                let parts = [&q[..], units(Projection::K), units(Projection::V), &o[..]];
                added(parts, [Projection::Q, Projection::K, Projection::V, Projection::O], normalises)
            }
            HeadGrouping::QueryHeads => {
                let projections = [Projection::Q, Projection::O];
                added(projections.map(units), projections, normalises)
            }
        };
        let projections = [Projection::Gate, Projection::Up, Projection::Down];
        let mlp = added(projections.map(units), projections, normalises);
        let in_layer = |projection| ScoreError::Overflow { layer, projection };
        let mut importance =
            GroupImportance { attention: attention.map_err(in_layer)?, mlp: mlp.map_err(in_layer)? };
        importance.attention.resize(group_count(widths, Block::Attention, grouping), 0.0);
        importance.mlp.resize(group_count(widths, Block::Mlp, grouping), 0.0);
        Ok(importance)
    });
    layers.collect()
}

/// FLAP's scores, which come standardised: of o by query head, whose mean counts for a group of them, and of down.
fn standardised(dense: &ModelSpec, scores: &StepScores, grouping: HeadGrouping) -> Vec<GroupImportance> {
    let layers = dense.layers.iter().enumerate().map(|(layer, widths)| {
        let by_head = scores.of(layer, Projection::O);
        let attention = match grouping {
            HeadGrouping::KvGroups => {
                let heads = widths.query_heads_per_kv_head().max(1);
                folded(by_head, heads).iter().map(|sum| sum / heads as f64).collect()
            }
            HeadGrouping::QueryHeads => by_head.to_vec(),
        };
        GroupImportance { attention, mlp: scores.of(layer, Projection::Down).to_vec() }
    });
    layers.collect()
}

/// The sum of the projections' vectors, each divided by its norm where `normalises`, or the first that overflows.
///
/// A sum takes its terms in order, for the same bits everywhere; the vectors' norms are summed side by side, because a
/// processor that waits for one addition can do the others.
fn added<const N: usize>(
    parts: [&[f64]; N],
    projections: [Projection; N],
    normalises: bool,
) -> Result<Vec<f64>, Projection> {
    let len = parts.iter().map(|part| part.len()).min().unwrap_or(0);
    let parts = parts.map(|part| &part[..len]);
    let mut norms = [1.0; N];
    if normalises {
        let mut squares = [0.0; N];
        for unit in 0..len {
            for (sum, part) in squares.iter_mut().zip(parts) {
                *sum += part[unit] * part[unit];
            }
        }
        norms = squares.map(|sum: f64| sum.sqrt() + NORM_EPS);
    }
    let mut sums = vec![0.0; len];
    for part in 0..N {
        let is_finite = norms[part].is_finite();
        let mut are_finite = true;
        for (sum, value) in sums.iter_mut().zip(parts[part]) {
            *sum += value / norms[part];
            are_finite &= sum.is_finite();
        }
        if !is_finite || !are_finite {
            return Err(projections[part]);
        }
    }
    Ok(sums)
}

/// The importance under [`Criterion::Random`], the same at every step: a fixed order, with 0 for what is gone.
#[must_use]
pub fn random_importances(
    dense: &ModelSpec,
    keep: &KeepMask,
    seed: u64,
    grouping: HeadGrouping,
) -> Vec<GroupImportance> {
    let mut layers = GroupImportance::zeros(dense, grouping);
    for (layer, (importance, keep)) in layers.iter_mut().zip(&keep.layers).enumerate() {
        for block in [Block::Attention, Block::Mlp] {
            let values = importance.of_mut(block);
            for &unit in keep.groups(block, grouping) {
                if let Some(value) = values.get_mut(unit) {
                    *value = random_importance(seed, layer, block, unit);
                }
            }
        }
    }
    layers
}

impl GroupImportance {
    /// Zero for every group of every layer.
    #[must_use]
    pub fn zeros(dense: &ModelSpec, grouping: HeadGrouping) -> Vec<Self> {
        let zeros = |widths: &LayerSpec| Self {
            attention: vec![0.0; group_count(widths, Block::Attention, grouping)],
            mlp: vec![0.0; group_count(widths, Block::Mlp, grouping)],
        };
        dense.layers.iter().map(zeros).collect()
    }

    #[must_use]
    pub fn of(&self, block: Block) -> &[f64] {
        match block {
            Block::Attention => &self.attention,
            Block::Mlp => &self.mlp,
        }
    }

    pub(crate) fn of_mut(&mut self, block: Block) -> &mut [f64] {
        match block {
            Block::Attention => &mut self.attention,
            Block::Mlp => &mut self.mlp,
        }
    }
}

/// Groups of a block in a layer of these widths.
pub(crate) fn group_count(widths: &LayerSpec, block: Block, grouping: HeadGrouping) -> usize {
    match (block, grouping) {
        (Block::Attention, HeadGrouping::KvGroups) => widths.kv_head_count,
        (Block::Attention, HeadGrouping::QueryHeads) => widths.query_head_count,
        (Block::Mlp, HeadGrouping::KvGroups | HeadGrouping::QueryHeads) => widths.intermediate_size,
    }
}

/// Sums of the query heads of each key/value head.
fn folded(query_heads: &[f64], per_kv_head: usize) -> Vec<f64> {
    query_heads.chunks(per_kv_head.max(1)).map(|group| group.iter().sum()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{model, random_scores, scores};
    use proptest::prelude::*;
    use recipe::LoraPruneForm;

    const CODE: Criterion = Criterion::LoraPrune { form: LoraPruneForm::Code };
    const PAPER: Criterion = Criterion::LoraPrune { form: LoraPruneForm::Paper };

    fn assert_close(actual: &[f64], expected: &[f64]) {
        assert_eq!(actual.len(), expected.len());
        for (actual, expected) in actual.iter().zip(expected) {
            assert!((actual - expected).abs() < 1e-7, "{actual} is not {expected}");
        }
    }

    /// Two key/value heads with two query heads each, and two channels, all sums worked out by hand.
    fn by_hand() -> (ModelSpec, StepScores) {
        let dense = model(1, 4, 2, 2);
        let scores = scores(&dense, &KeepMask::full(&dense), |_, projection, unit| match projection {
            Projection::Q => [1.0, 2.0, 3.0, 1.0][unit],
            Projection::K => [5.0, 12.0][unit],
            Projection::V => [0.0, 0.0][unit],
            Projection::O => [8.0, 7.0, 4.0, 4.0][unit],
            Projection::Gate => [3.0, 4.0][unit],
            Projection::Up => [6.0, 8.0][unit],
            Projection::Down => [0.0, 2.0][unit],
        });
        (dense, scores)
    }

    #[test]
    fn the_code_form_divides_each_projection_by_its_norm_and_adds() {
        let (dense, scores) = by_hand();
        let layers = combine(&dense, &scores, CODE, HeadGrouping::KvGroups).unwrap();
        // q folds to [3, 4] / 5, k is [5, 12] / 13, v is zero, o folds to [15, 8] / 17.
        assert_close(&layers[0].attention, &[0.6 + 5.0 / 13.0 + 15.0 / 17.0, 0.8 + 12.0 / 13.0 + 8.0 / 17.0]);
        assert_close(&layers[0].mlp, &[0.6 + 0.6, 0.8 + 0.8 + 1.0]);
    }

    #[test]
    fn the_other_forms_add_the_sums_as_they_are() {
        let (dense, scores) = by_hand();
        for criterion in [PAPER, Criterion::Taylor, Criterion::Magnitude] {
            let layers = combine(&dense, &scores, criterion, HeadGrouping::KvGroups).unwrap();
            assert_eq!(layers[0].attention, [3.0 + 5.0 + 15.0, 4.0 + 12.0 + 8.0]);
            assert_eq!(layers[0].mlp, [9.0, 14.0]);
        }
    }

    #[test]
    fn single_query_heads_are_judged_by_q_and_o_alone() {
        let (dense, scores) = by_hand();
        let layers = combine(&dense, &scores, PAPER, HeadGrouping::QueryHeads).unwrap();
        assert_eq!(layers[0].attention, [9.0, 9.0, 7.0, 5.0]);
        let layers = combine(&dense, &scores, CODE, HeadGrouping::QueryHeads).unwrap();
        let (q, o) = (15f64.sqrt(), 145f64.sqrt());
        assert_close(
            &layers[0].attention,
            &[1.0 / q + 8.0 / o, 2.0 / q + 7.0 / o, 3.0 / q + 4.0 / o, 1.0 / q + 4.0 / o],
        );
    }

    #[test]
    fn all_zero_scores_give_zero_and_not_nan() {
        let dense = model(2, 4, 2, 6);
        let zero = scores(&dense, &KeepMask::full(&dense), |_, _, _| 0.0);
        for grouping in [HeadGrouping::KvGroups, HeadGrouping::QueryHeads] {
            assert_eq!(
                combine(&dense, &zero, CODE, grouping).unwrap(),
                GroupImportance::zeros(&dense, grouping)
            );
        }
    }

    #[test]
    fn finite_scores_whose_norm_overflows_are_an_error_with_a_place() {
        let dense = model(2, 4, 2, 6);
        let huge = scores(&dense, &KeepMask::full(&dense), |layer, projection, _| {
            if layer == 1 && projection == Projection::Gate { 1e200 } else { 1.0 }
        });
        let expected = ScoreError::Overflow { layer: 1, projection: Projection::Gate };
        assert_eq!(combine(&dense, &huge, CODE, HeadGrouping::KvGroups), Err(expected));
        assert!(combine(&dense, &huge, PAPER, HeadGrouping::KvGroups).is_ok());
    }

    #[test]
    fn the_random_order_is_fixed_by_the_seed_and_zero_where_nothing_is_left() {
        let dense = model(2, 4, 2, 6);
        let mut keep = KeepMask::full(&dense);
        let full = random_importances(&dense, &keep, 7, HeadGrouping::KvGroups);
        keep.layers[0].channels.remove(2);
        let later = random_importances(&dense, &keep, 7, HeadGrouping::KvGroups);
        assert_eq!(later[0].mlp[2], 0.0);
        assert_eq!(later[0].mlp[3..], full[0].mlp[3..]);
        assert_eq!(later[1], full[1]);
        assert_ne!(full, random_importances(&dense, &KeepMask::full(&dense), 8, HeadGrouping::KvGroups));
    }

    proptest! {
        #[test]
        fn scaling_a_projection_leaves_the_code_form_unchanged(
            seed: u64, projection in 0usize..7, exponent in 0i32..12,
        ) {
            let dense = model(2, 6, 2, 9);
            let keep = KeepMask::full(&dense);
            let raw = random_scores(&dense, &keep, seed);
            let factor = 10f64.powi(exponent);
            let scaled = scores(&dense, &keep, |layer, of, unit| {
                raw.of(layer, of)[unit] * if of.index() == projection { factor } else { 1.0 }
            });
            for grouping in [HeadGrouping::KvGroups, HeadGrouping::QueryHeads] {
                let one = combine(&dense, &raw, CODE, grouping).unwrap();
                let other = combine(&dense, &scaled, CODE, grouping).unwrap();
                for (one, other) in one.iter().zip(&other) {
                    for block in [Block::Attention, Block::Mlp] {
                        for (one, other) in one.of(block).iter().zip(other.of(block)) {
                            // The epsilon beside the norm is all that differs: 1e-8 / |v|.
                            prop_assert!((one - other).abs() <= 1e-5 * one);
                        }
                    }
                }
            }
        }

        #[test]
        fn sums_are_those_of_plain_loops_to_the_last_bit(seed: u64, code: bool, by_query_head: bool) {
            let dense = model(2, 6, 3, 9);
            let raw = random_scores(&dense, &KeepMask::full(&dense), seed);
            let (criterion, grouping) = match (code, by_query_head) {
                (true, false) => (CODE, HeadGrouping::KvGroups),
                (true, true) => (CODE, HeadGrouping::QueryHeads),
                (false, false) => (PAPER, HeadGrouping::KvGroups),
                (false, true) => (PAPER, HeadGrouping::QueryHeads),
            };
            for (layer, combined) in combine(&dense, &raw, criterion, grouping).unwrap().iter().enumerate() {
                let mut plain = GroupImportance::zeros(&dense, grouping).remove(layer);
                for projection in Projection::ALL {
                    let units = raw.of(layer, projection);
                    let values: Vec<f64> = match projection {
                        Projection::K | Projection::V if by_query_head => continue,
                        Projection::Q | Projection::O if !by_query_head => {
                            (0..3).map(|kv_head| units[2 * kv_head] + units[2 * kv_head + 1]).collect()
                        }
                        Projection::Q
                        | Projection::K
                        | Projection::V
                        | Projection::O
                        | Projection::Gate
                        | Projection::Up
                        | Projection::Down => units.to_vec(),
                    };
                    let norm = values.iter().map(|value| value * value).sum::<f64>().sqrt() + NORM_EPS;
                    for (sum, value) in plain.of_mut(projection.block()).iter_mut().zip(&values) {
                        *sum += if code { value / norm } else { *value };
                    }
                }
                prop_assert_eq!(combined, &plain);
            }
        }

        #[test]
        fn permuting_groups_permutes_their_importance(seed: u64, shift in 1usize..6) {
            let dense = model(1, 12, 6, 6);
            let keep = KeepMask::full(&dense);
            let raw = random_scores(&dense, &keep, seed);
            // Group g goes to g + shift; the query heads of a group stay in their order.
            let moved = scores(&dense, &keep, |layer, projection, unit| {
                let from = match projection {
                    Projection::Q | Projection::O => (unit + 12 - 2 * shift) % 12,
                    Projection::K | Projection::V | Projection::Gate | Projection::Up | Projection::Down => {
                        (unit + 6 - shift) % 6
                    }
                };
                raw.of(layer, projection)[from]
            });
            let mut expected = combine(&dense, &raw, CODE, HeadGrouping::KvGroups).unwrap().remove(0);
            expected.attention.rotate_right(shift);
            expected.mlp.rotate_right(shift);
            let actual = combine(&dense, &moved, CODE, HeadGrouping::KvGroups).unwrap().remove(0);
            assert_close(&actual.attention, &expected.attention);
            assert_close(&actual.mlp, &expected.mlp);
        }
    }
}
