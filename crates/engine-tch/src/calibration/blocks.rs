//! Scores of whole blocks (Shortened LLaMA, arXiv:2402.02834), over the weights of a block's projections, adapters merged.
//!
//! ```text
//! magnitude    sum |w|
//! taylor       sum |w dL/dw|, L the mean loss of the calibration windows, its gradient summed over all of them first
//! perplexity   exp of the mean loss without the block; blocks that have gone before stay away
//! ```

use super::{Passes, engine};
use crate::fault::{Fault, Result};
use crate::importance::{self, ScoreInputs};
use crate::model::{Adapters, Training};
use crate::observed::Observed;
use crate::shard::Shard;
use ::engine::{Calibration, EngineError, PhaseTimes, Report};
use pruning::DepthGoal;
use recipe::{BlockCriterion, Criterion, Depth};
use tch::Tensor;

impl Shard {
    pub(super) fn score_blocks(
        &mut self,
        depth: &Depth,
        rows: &[&[u32]],
        report: &mut Report<'_>,
        calibration: &mut Calibration,
    ) -> std::result::Result<(), EngineError> {
        let batch = self.setup.recipe.batch.rows.max(1);
        let chunks = rows.len().div_ceil(batch) as u64;
        let layers = self.model.layers.len();
        let removed = self.removed_layers();
        match depth.criterion {
            BlockCriterion::Magnitude => {
                calibration.blocks = engine(self.block_sums(Criterion::Magnitude, None))?
            }
            BlockCriterion::Taylor => {
                let mut passes = Passes { done: 0, total: chunks, report };
                let observed = self.weight_gradients(rows, batch, &mut passes)?;
                calibration.blocks = engine(self.block_sums(Criterion::Taylor, Some(&observed)))?;
            }
            BlockCriterion::Perplexity => {
                let goal = self.depth_goal(depth)?;
                let rounds = if depth.iterative { goal.count } else { 1 };
                let there = layers - removed.iter().filter(|gone| **gone).count();
                let total = (0..rounds).map(|round| (there - round) as u64 * chunks).sum();
                let mut passes = Passes { done: 0, total, report };
                let mut gone = removed.clone();
                for round in 0..rounds {
                    let scores = self.perplexities_without(&gone, rows, batch, &mut passes)?;
                    if round == 0 {
                        calibration.blocks.clone_from(&scores);
                    }
                    if depth.iterative {
                        let next = lowest(&scores, &goal, &gone)?;
                        gone[next] = true;
                        calibration.block_order.push(next);
                    }
                }
            }
        }
        self.model.passed_over = removed;
        match calibration.blocks.iter().position(|score| !score.is_finite()) {
            Some(layer) => Err(EngineError::NotFinite {
                what: format!("score of block {layer}"),
                step: 0,
                value: calibration.blocks[layer],
            }),
            None => Ok(()),
        }
    }

    fn depth_goal(&self, depth: &Depth) -> std::result::Result<DepthGoal, EngineError> {
        let resolved = match &self.setup.recipe.pruning {
            Some(pruning) => DepthGoal::resolve(self.source.spec(), pruning, depth)
                .map_err(|violation| Fault::Refused(violation.to_string())),
            None => Err(Fault::Refused("the recipe does not prune".into())),
        };
        engine(resolved)
    }

    /// By layer; for those that have gone already, 0.
    fn perplexities_without(
        &mut self,
        gone: &[bool],
        rows: &[&[u32]],
        batch: usize,
        passes: &mut Passes<'_, '_>,
    ) -> std::result::Result<Vec<f64>, EngineError> {
        let mut perplexities = vec![0.0; gone.len()];
        for layer in (0..gone.len()).filter(|layer| !gone[*layer]) {
            self.model.passed_over = gone.to_vec();
            self.model.passed_over[layer] = true;
            let (mut sum, mut predicted) = (0.0, 0);
            for rows in rows.chunks(batch) {
                let found = engine(self.evaluate_rows(rows, batch))?;
                sum += found.negative_log_likelihood;
                predicted += found.predicted;
                passes.step()?;
            }
            perplexities[layer] = (sum / predicted as f64).exp();
        }
        Ok(perplexities)
    }

    /// Gradients of the mean loss by all weights, complete on every rank that holds them.
    fn weight_gradients(
        &mut self,
        rows: &[&[u32]],
        batch: usize,
        passes: &mut Passes<'_, '_>,
    ) -> std::result::Result<Vec<Observed>, EngineError> {
        let predictions: usize = rows.iter().map(|row| row.len().saturating_sub(1)).sum();
        let kind = self.factors.kind();
        let zeros = self.model.layers.iter().map(|layer| Observed::zeros(Criterion::Taylor, layer, kind));
        let mut observed: Vec<Observed> = engine(zeros.filter_map(Result::transpose).collect())?;
        let (factors, ledger) = (engine(self.compute_factors())?, engine(self.compute_ledger())?);
        let unwanted = engine(self.gradients.f_zeros_like().map_err(Fault::from))?;
        let recipe = self.setup.recipe.clone();
        for rows in rows.chunks(batch) {
            let mut times = PhaseTimes::default();
            let adapters = Adapters::evaluating(&self.layout, &factors, &ledger, &recipe.lora);
            let training = Training {
                gradients: &unwanted,
                observed: Some(&mut observed),
                loss_scale: 1.0 / predictions as f64,
                first_token: 0,
                recompute: recipe.recompute,
                soft_targets: None,
                times: &mut times,
            };
            let pass = self.model.negative_log_likelihood(
                rows,
                &adapters,
                Some(training),
                self.communicator.as_mut(),
            );
            engine(pass)?;
            passes.step()?;
        }
        Ok(observed)
    }

    /// Sums of a criterion's scores over all weights of each block, on all ranks.
    fn block_sums(&mut self, criterion: Criterion, observed: Option<&[Observed]>) -> Result<Vec<f64>> {
        let inputs = ScoreInputs {
            layout: &self.layout,
            factors: &self.factors,
            gradients: &self.gradients,
            observed,
            ledger: &self.ledger,
            scaling: self.setup.recipe.lora.scaling(),
            head_dim: self.source.spec().head_dim as i64,
            step: 0,
            tile_elements: importance::tile_elements(self.device),
        };
        let mut sums = Vec::with_capacity(self.model.layers.len());
        for (layer, (shard, live)) in self.model.layers.iter().zip(&self.live).enumerate() {
            let scores = importance::score_layer(criterion, layer, shard, live, &inputs)?;
            sums.push(scores.iter().flat_map(|scores| &scores.values).sum());
        }
        let mut sums: Tensor = Tensor::f_from_slice::<f64>(&sums)?.f_to_device(self.device)?;
        self.communicator.all_reduce_sum(&mut sums)?;
        importance::to_f64(&sums)
    }
}

/// The block that goes next.
fn lowest(scores: &[f64], goal: &DepthGoal, gone: &[bool]) -> std::result::Result<usize, EngineError> {
    let may_go = |layer: &usize| goal.removable[*layer] && !gone[*layer];
    let order = |one: &usize, other: &usize| scores[*one].total_cmp(&scores[*other]);
    (0..scores.len())
        .filter(may_go)
        .min_by(order)
        .ok_or_else(|| Fault::Refused("no block is left that may go".into()).into())
}
