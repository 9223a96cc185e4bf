use crate::{DecideError, KeepMask, MovingAverage, Target, decide};
use model_spec::{Block, LayerSpec, ModelSpec};
use recipe::{FieldViolation, Pruning, Shape};

/// What another budget would keep.
#[derive(Debug, Clone, PartialEq)]
pub struct WhatIf {
    /// Kept counts by layer.
    pub widths: Vec<LayerSpec>,
    /// Parameters of the whole model that stay.
    pub parameters: u64,
    /// Fraction of projection weights that goes.
    pub sparsity: f64,
    /// Sum of the importance of the groups that would go.
    pub importance_lost: f64,
    /// The same as a fraction of the importance of all groups that are there.
    pub importance_lost_share: f64,
}

/// Why another budget cannot be looked at.
#[derive(Debug, thiserror::Error)]
pub enum WhatIfError {
    #[error("the budget cannot be met: {}", .0.first().map(ToString::to_string).unwrap_or_default())]
    Budget(Vec<FieldViolation>),
    /// Importance is averaged over the groups that are there: of those that are gone it is not known.
    #[error(
        "it would keep more than decision masks have left ({what}); what is gone comes back only by ForkRun from an earlier \
         decision"
    )]
    Regrowth { what: String },
    #[error(transparent)]
    Decide(DecideError),
}

/// What `pruning` would keep of the groups of `keep_now`, decided on `average`, which was averaged under that mask.
/// Nothing is changed.
///
/// # Errors
/// When the budget cannot be met, or is above what is there.
pub fn what_if(
    dense: &ModelSpec,
    keep_now: &KeepMask,
    average: &MovingAverage,
    pruning: &Pruning,
) -> Result<WhatIf, WhatIfError> {
    let target = Target::resolve(dense, pruning).map_err(WhatIfError::Budget)?;
    let removed = keep_now.layers.iter().filter(|layer| layer.is_removed()).count();
    if let Some(depth) = target.depth()
        && depth.count != removed
    {
        let problem = format!(
            "{} blocks would go and {removed} are gone: which ones go is not known before the run's first decision",
            depth.count
        );
        return Err(WhatIfError::Budget(vec![crate::legal_counts::violation("pruning.depth", problem)]));
    }
    let kept = decide(dense, keep_now, average, &target, 1.0).map_err(|error| match error {
        DecideError::BelowTarget { .. } | DecideError::Growth(_) => {
            WhatIfError::Regrowth { what: error.to_string() }
        }
        DecideError::Share { .. }
        | DecideError::KeepMask(_)
        | DecideError::OtherModel { .. }
        | DecideError::NotFinite { .. } => WhatIfError::Decide(error),
    })?;
    if pruning.shape == Shape::Global {
        check_above(dense, keep_now, &target)?;
    }
    let grouping = pruning.head_grouping;
    let sum = |mask: &KeepMask| -> f64 {
        let layers = mask.layers.iter().zip(&average.layers);
        let of_layer = |(keep, importance): (&crate::LayerKeep, &crate::GroupImportance)| -> f64 {
            [Block::Attention, Block::Mlp]
                .map(|block| {
                    let values = importance.of(block);
                    keep.groups(block, grouping).iter().map(|&group| values[group]).sum::<f64>()
                })
                .iter()
                .sum()
        };
        layers.map(of_layer).sum()
    };
    let (there, stays) = (sum(keep_now), sum(&kept));
    let lost = (there - stays).max(0.0);
    let pruned = kept.pruned_spec(dense);
    Ok(WhatIf {
        parameters: pruned.parameter_count(),
        sparsity: kept.sparsity(dense),
        widths: pruned.layers,
        importance_lost: lost,
        importance_lost_share: if there > 0.0 { lost / there } else { 0.0 },
    })
}

/// A ranking over all layers takes away what it must and never asks whether too much is gone already. It may have gone one
/// quantum beyond its goal; more than that was another budget's work.
fn check_above(dense: &ModelSpec, keep_now: &KeepMask, target: &Target) -> Result<(), WhatIfError> {
    let gone = dense.projection_weight_count() - keep_now.pruned_spec(dense).projection_weight_count();
    let summary = target.summary();
    let due = summary.prunable_weights - summary.kept_prunable_weights;
    if gone < due + target.largest_quantum(dense) {
        return Ok(());
    }
    Err(WhatIfError::Regrowth { what: format!("{gone} weights are gone, and the budget removes {due}") })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::model;
    use proptest::prelude::*;
    use recipe::{Budget, HeadGrouping};

    fn average(dense: &ModelSpec) -> MovingAverage {
        let mut average = MovingAverage::new(dense, HeadGrouping::KvGroups, 0.9);
        for (layer, importance) in average.layers.iter_mut().enumerate() {
            for (place, value) in importance.attention.iter_mut().enumerate() {
                *value = 1.0 + ((place * 7 + layer) % 5) as f64;
            }
            for (place, value) in importance.mlp.iter_mut().enumerate() {
                *value = 1.0 + ((place * 3 + layer) % 11) as f64;
            }
        }
        average
    }

    fn pruning(sparsity: f64, shape: Shape) -> Pruning {
        Pruning { budget: Budget::Sparsity(sparsity), shape, ..Pruning::published() }
    }

    #[test]
    fn it_is_what_the_decision_would_be_and_more_loses_more() {
        let dense = model(3, 12, 6, 20);
        let (full, average) = (KeepMask::full(&dense), average(&dense));
        for shape in [Shape::Uniform, Shape::Paper, Shape::Global] {
            let mut before = -1.0;
            for sparsity in [0.0, 0.1, 0.3, 0.5, 0.7] {
                let pruning = pruning(sparsity, shape);
                let answer = what_if(&dense, &full, &average, &pruning).unwrap();
                let target = Target::resolve(&dense, &pruning).unwrap();
                let decided = decide(&dense, &full, &average, &target, 1.0).unwrap();
                assert_eq!(answer.widths, decided.pruned_spec(&dense).layers);
                assert_eq!(answer.sparsity, decided.sparsity(&dense));
                assert!(answer.importance_lost >= before, "{shape:?} {sparsity}");
                assert!((0.0..1.0).contains(&answer.importance_lost_share));
                before = answer.importance_lost;
            }
        }
    }

    #[test]
    fn the_loss_is_the_sum_over_the_groups_that_go() {
        let dense = model(1, 2, 2, 4);
        let mut average = MovingAverage::new(&dense, HeadGrouping::KvGroups, 0.9);
        average.layers[0].attention = vec![5.0, 1.0];
        average.layers[0].mlp = vec![4.0, 3.0, 2.0, 1.0];
        let answer =
            what_if(&dense, &KeepMask::full(&dense), &average, &pruning(0.5, Shape::Uniform)).unwrap();
        // Head 1 and channels 2 and 3 of a total of 16.
        assert_eq!(answer.importance_lost, 1.0 + 2.0 + 1.0);
        assert_eq!(answer.importance_lost_share, 4.0 / 16.0);
    }

    #[test]
    fn what_is_gone_does_not_come_back() {
        let dense = model(2, 12, 6, 20);
        let (full, average) = (KeepMask::full(&dense), average(&dense));
        let target = Target::resolve(&dense, &pruning(0.5, Shape::Uniform)).unwrap();
        let half = decide(&dense, &full, &average, &target, 1.0).unwrap();
        let error = what_if(&dense, &half, &average, &pruning(0.2, Shape::Uniform)).unwrap_err();
        assert!(matches!(error, WhatIfError::Regrowth { .. }), "{error}");
        assert!(error.to_string().contains("ForkRun"), "{error}");
        let error = what_if(&dense, &half, &average, &pruning(2.0, Shape::Uniform)).unwrap_err();
        assert!(matches!(error, WhatIfError::Budget(_)), "{error}");
    }

    #[test]
    fn a_global_budget_below_what_is_gone_is_refused_and_the_same_budget_loses_nothing() {
        let dense = model(3, 12, 6, 20);
        let (full, average) = (KeepMask::full(&dense), average(&dense));
        let target = Target::resolve(&dense, &pruning(0.5, Shape::Global)).unwrap();
        let half = decide(&dense, &full, &average, &target, 1.0).unwrap();
        let same = what_if(&dense, &half, &average, &pruning(0.5, Shape::Global)).unwrap();
        assert_eq!((same.importance_lost, same.sparsity), (0.0, half.sparsity(&dense)));
        let error = what_if(&dense, &half, &average, &pruning(0.1, Shape::Global)).unwrap_err();
        assert!(matches!(error, WhatIfError::Regrowth { .. }), "{error}");
    }

    proptest! {
        #[test]
        fn any_answer_is_the_decision_of_its_budget_and_the_loss_a_plain_sum(
            seed: u64, sparsity in 0.05f64..0.8, shape in 0usize..3, by_query_head: bool, multiple in 1usize..4,
        ) {
            let dense = model(3, 12, 4, 20);
            let grouping = if by_query_head { HeadGrouping::QueryHeads } else { HeadGrouping::KvGroups };
            let mut average = MovingAverage::new(&dense, grouping, 0.9);
            average.layers = crate::random_importances(&dense, &KeepMask::full(&dense), seed, grouping);
            let of = |sparsity| Pruning {
                head_grouping: grouping,
                channel_multiple: multiple,
                ..pruning(sparsity, [Shape::Uniform, Shape::Paper, Shape::Global][shape])
            };
            let (less, more) = (of(sparsity / 2.0), of(sparsity));
            let full = KeepMask::full(&dense);
            let answers = [&less, &more].map(|pruning| what_if(&dense, &full, &average, pruning));
            for (pruning, answer) in [&less, &more].into_iter().zip(&answers) {
                let Ok(answer) = answer else { continue };
                let target = Target::resolve(&dense, pruning).unwrap();
                let decided = decide(&dense, &full, &average, &target, 1.0).unwrap();
                prop_assert_eq!(&answer.widths, &decided.pruned_spec(&dense).layers);
                prop_assert_eq!(answer.parameters, decided.pruned_spec(&dense).parameter_count());
                let mut lost = 0.0;
                for (layer, keep) in decided.layers.iter().enumerate() {
                    for block in [Block::Attention, Block::Mlp] {
                        for (group, value) in average.layers[layer].of(block).iter().enumerate() {
                            if !keep.groups(block, grouping).contains(&group) {
                                lost += value;
                            }
                        }
                    }
                }
                prop_assert!((answer.importance_lost - lost).abs() < 1e-9 * (1.0 + lost));
            }
            if let [Ok(less), Ok(more)] = &answers {
                // Under `uniform` a head less may leave room for more channels.
                if shape != 0 {
                    prop_assert!(less.sparsity <= more.sparsity + 1e-12);
                    prop_assert!(less.importance_lost <= more.importance_lost + 1e-9);
                }
            }
        }
    }
}
