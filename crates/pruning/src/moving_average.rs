use crate::{GroupImportance, KeepMask};
use model_spec::{Block, ModelSpec};
use recipe::HeadGrouping;
use serde::{Deserialize, Serialize};

/// Importance averaged over the steps: `E <- decay * E + (1 - decay) * S`, from zero, without bias correction
/// (LoRAPrune, arXiv:2305.18403, eq. 11; the published code has `decay` 0.9).
///
/// It is part of a run's durable state: without it a resumed run would decide other masks.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MovingAverage {
    pub decay: f64,
    /// By layer and group of the unpruned model; 0 for groups that are gone.
    pub layers: Vec<GroupImportance>,
    /// Steps averaged so far.
    pub updates: u64,
}

/// One step's importances do not belong to the model of the average.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "the step's importances and the average differ in shape at layer {layer}; do they belong to the same model?"
)]
pub struct ImportanceMismatch {
    pub layer: usize,
}

impl MovingAverage {
    #[must_use]
    pub fn new(dense: &ModelSpec, grouping: HeadGrouping, decay: f64) -> Self {
        Self { decay, layers: GroupImportance::zeros(dense, grouping), updates: 0 }
    }

    /// Takes in one step's importances.
    ///
    /// # Errors
    /// When their shape is another one; the average is then unchanged.
    pub fn update(&mut self, step: &[GroupImportance]) -> Result<(), ImportanceMismatch> {
        let same = |(one, other): (&GroupImportance, &GroupImportance)| {
            one.attention.len() == other.attention.len() && one.mlp.len() == other.mlp.len()
        };
        let agreeing = self.layers.iter().zip(step).take_while(|&pair| same(pair)).count();
        if agreeing != self.layers.len() || agreeing != step.len() {
            return Err(ImportanceMismatch { layer: agreeing });
        }
        for (average, step) in self.layers.iter_mut().zip(step) {
            for block in [Block::Attention, Block::Mlp] {
                for (average, step) in average.of_mut(block).iter_mut().zip(step.of(block)) {
                    *average = self.decay * *average + (1.0 - self.decay) * step;
                }
            }
        }
        self.updates += 1;
        Ok(())
    }

    /// Sets what `keep` does not keep to zero. Call it after each decision.
    pub fn forget_removed(&mut self, keep: &KeepMask, grouping: HeadGrouping) {
        for (average, keep) in self.layers.iter_mut().zip(&keep.layers) {
            for block in [Block::Attention, Block::Mlp] {
                let average = average.of_mut(block);
                let mut first_gone = 0;
                for kept in keep.groups(block, grouping).iter().copied().chain([average.len()]) {
                    average.get_mut(first_gone..kept).unwrap_or_default().fill(0.0);
                    first_gone = kept + 1;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{importances, model};

    #[test]
    fn the_average_starts_at_zero_and_decays() {
        let dense = model(1, 2, 2, 3);
        let step = |value: f64| importances(&dense, HeadGrouping::KvGroups, |_, _, unit| value + unit as f64);
        let mut average = MovingAverage::new(&dense, HeadGrouping::KvGroups, 0.75);
        average.update(&step(4.0)).unwrap();
        assert_eq!(average.layers[0].mlp, [1.0, 1.25, 1.5]);
        average.update(&step(8.0)).unwrap();
        assert_eq!(average.layers[0].attention, [2.75, 0.75 * 1.25 + 2.25]);
        assert_eq!(average.updates, 2);
    }

    #[test]
    fn removed_groups_are_zero_after_a_decision() {
        let dense = model(1, 4, 2, 3);
        let mut keep = KeepMask::full(&dense);
        keep.layers[0].query_heads = vec![1, 2];
        keep.layers[0].channels = vec![0, 2];
        let mut average = MovingAverage::new(&dense, HeadGrouping::QueryHeads, 0.5);
        average.update(&importances(&dense, HeadGrouping::QueryHeads, |_, _, _| 2.0)).unwrap();
        average.forget_removed(&keep, HeadGrouping::QueryHeads);
        assert_eq!(average.layers[0].attention, [0.0, 1.0, 1.0, 0.0]);
        assert_eq!(average.layers[0].mlp, [1.0, 0.0, 1.0]);
    }

    #[test]
    fn importances_of_another_model_are_refused_and_change_nothing() {
        let dense = model(2, 4, 2, 3);
        let mut average = MovingAverage::new(&dense, HeadGrouping::KvGroups, 0.5);
        let before = average.clone();
        for (other, grouping, layer) in [
            (model(1, 4, 2, 3), HeadGrouping::KvGroups, 1),
            (model(3, 4, 2, 3), HeadGrouping::KvGroups, 2),
            (model(2, 4, 2, 4), HeadGrouping::KvGroups, 0),
            (model(2, 4, 2, 3), HeadGrouping::QueryHeads, 0),
        ] {
            let step = GroupImportance::zeros(&other, grouping);
            assert_eq!(average.update(&step), Err(ImportanceMismatch { layer }));
        }
        assert_eq!(average, before);
    }
}
