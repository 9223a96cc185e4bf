//! Keep probabilities learned from the losses of sampled masks (arXiv:2406.10576): forward passes only.
//!
//! Each unit (a key/value head with its query heads, or an FFN channel) is kept with a probability `s` of its own.
//! Masks are drawn from the probabilities, the model is run under each, and the losses move the probabilities by the
//! score-function estimate of the gradient of their expectation, within the budget `sum s <= keep_share * units`.
//!
//! A draw is a function of seed, step, sample, layer, block and unit of the unpruned model, and of nothing else: whoever
//! runs the masks, on however many ranks, in whatever order, the search takes the same course.

use super::budget_projection::{ProjectionError, project_to_budget};
use super::estimator::{Estimator, Signal};
use super::warm_start::{WarmStartError, keep_probabilities};
use crate::criterion::random::{and_then, block_key, keyed, unit_interval};
use crate::decide::keep_kv_groups;
use crate::slices::lowest_places;
use crate::{GroupImportance, KeepMask, LayerKeep};
use model_spec::{Block, ModelSpec};
use serde::{Deserialize, Serialize};
use std::f64::consts::PI;

/// Which units share a budget.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Scope {
    /// Attention of all layers; channels of all layers.
    Model,
    /// Each block of each layer.
    Layer,
}

/// What a search may choose.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PolicySettings {
    pub seed: u64,
    pub estimator: Estimator,
    pub scope: Scope,
    /// Of the first step; it falls along half a cosine to nothing at `step_count`.
    pub learning_rate: f64,
    pub step_count: u64,
    /// Masks run on each batch, `K`; at least 2 under `faithful`.
    pub samples_per_step: usize,
    /// Steps over which losses are averaged: the newest counts `1 / baseline_window` in the baseline.
    pub baseline_window: f64,
    /// Fractions of units that shall stay, in `(0, 1]`.
    pub attention_keep_share: f64,
    pub mlp_keep_share: f64,
    /// By layer; units of the others always stay and count in no budget.
    pub prunable: Vec<bool>,
}

/// Which units of every layer a sample keeps.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SampledMask {
    pub layers: Vec<SampledLayer>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SampledLayer {
    /// Per key/value head.
    pub attention: Vec<bool>,
    /// Per channel.
    pub mlp: Vec<bool>,
}

/// Why a search cannot begin or go on. It then stays as it was.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum PolicyError {
    #[error("`{what}` must {rule}; got {value}")]
    Setting { what: &'static str, rule: &'static str, value: f64 },
    #[error("there are {actual} layers; `prunable` names {expected}")]
    LayerCount { expected: usize, actual: usize },
    #[error("layer {layer}: {block} has {actual} units, the model {expected}")]
    UnitCount { layer: usize, block: &'static str, expected: usize, actual: usize },
    #[error("layer {layer}: keep probability of {block} unit {unit} is {value}; it must lie in [0, 1]")]
    Probability { layer: usize, block: &'static str, unit: usize, value: f64 },
    #[error("{actual} losses came for {expected} samples")]
    LossCount { expected: usize, actual: usize },
    #[error("the loss of sample {sample} is {value}; give a finite one or skip the step")]
    Loss { sample: usize, value: f64 },
    #[error("layer {layer}: the losses move {block} beyond all numbers; lower the learning rate")]
    Overflow { layer: usize, block: &'static str },
    #[error("all {step_count} steps have been taken")]
    Done { step_count: u64 },
    #[error("layer {layer}: the importances of {block} make no probabilities")]
    WarmStart {
        layer: usize,
        block: &'static str,
        #[source]
        source: WarmStartError,
    },
}

/// A search: the probabilities, the baseline, and how many steps were taken. It may be written down and taken up again,
/// and takes the course that it would have taken.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Written")]
pub struct PolicyGradient {
    settings: PolicySettings,
    probabilities: Vec<GroupImportance>,
    baseline: Option<f64>,
    step: u64,
}

/// A search as it was written, to be checked.
#[derive(Deserialize)]
struct Written {
    settings: PolicySettings,
    probabilities: Vec<GroupImportance>,
    baseline: Option<f64>,
    step: u64,
}

impl TryFrom<Written> for PolicyGradient {
    type Error = PolicyError;

    fn try_from(written: Written) -> Result<Self, PolicyError> {
        let Written { settings, probabilities, baseline, step } = written;
        settings.check_start(&probabilities)?;
        if let Some(value) = baseline.filter(|baseline| !baseline.is_finite()) {
            return Err(PolicyError::Setting { what: "baseline", rule: "be a number", value });
        }
        Ok(Self { settings, probabilities, baseline, step })
    }
}

const BLOCKS: [Block; 2] = [Block::Attention, Block::Mlp];

impl PolicyGradient {
    /// Starts from these keep probabilities, brought into the budget.
    ///
    /// # Errors
    /// Names the first setting that cannot be or probability that is none.
    pub fn new(settings: PolicySettings, probabilities: Vec<GroupImportance>) -> Result<Self, PolicyError> {
        settings.check_start(&probabilities)?;
        let mut search = Self { settings, probabilities, baseline: None, step: 0 };
        for (layer, of_layer) in search.probabilities.iter_mut().enumerate() {
            if !search.settings.prunable[layer] {
                BLOCKS.into_iter().for_each(|block| of_layer.of_mut(block).fill(1.0));
            }
        }
        search.project()?;
        Ok(search)
    }

    /// Starts from the importances of any criterion, layer by layer: see [`keep_probabilities`].
    ///
    /// # Errors
    /// As [`Self::new`], and when an importance is not finite.
    pub fn warm_started(
        settings: PolicySettings,
        importances: &[GroupImportance],
    ) -> Result<Self, PolicyError> {
        settings.check()?;
        let mut probabilities = importances.to_vec();
        for (layer, of_layer) in probabilities.iter_mut().enumerate() {
            for block in BLOCKS {
                let importances = of_layer.of_mut(block);
                let found = keep_probabilities(importances, settings.keep_share(block))
                    .map_err(|source| PolicyError::WarmStart { layer, block: name(block), source })?;
                importances.copy_from_slice(&found);
            }
        }
        Self::new(settings, probabilities)
    }

    /// Keep probabilities by layer; as good as importances to whoever decides a mask by importance.
    #[must_use]
    pub fn probabilities(&self) -> &[GroupImportance] {
        &self.probabilities
    }

    /// Steps taken, skipped ones included.
    #[must_use]
    pub fn step(&self) -> u64 {
        self.step
    }

    /// Moving average of the steps' mean losses; none before the first.
    #[must_use]
    pub fn baseline(&self) -> Option<f64> {
        self.baseline
    }

    #[must_use]
    pub fn is_done(&self) -> bool {
        self.step >= self.settings.step_count
    }

    /// Mask number `sample` of the step that is due. A layer may keep nothing of a block.
    #[must_use]
    pub fn sample(&self, sample: usize) -> SampledMask {
        let layers = self.probabilities.iter().enumerate().map(|(layer, of_layer)| {
            let draw = |block| {
                let draws = self.draws(sample, layer, block);
                of_layer.of(block).iter().enumerate().map(|(unit, keep)| draws.keeps(unit, *keep)).collect()
            };
            SampledLayer { attention: draw(Block::Attention), mlp: draw(Block::Mlp) }
        });
        SampledMask { layers: layers.collect() }
    }

    /// Ends the step that is due by the losses of its samples, in their order: mean loss of the same batch under each
    /// mask.
    ///
    /// # Errors
    /// When a loss is missing or not finite, or all steps have been taken. The search then stays as it was.
    pub fn update(&mut self, losses: &[f64]) -> Result<(), PolicyError> {
        let (expected, actual) = (self.settings.samples_per_step, losses.len());
        if self.is_done() {
            return Err(PolicyError::Done { step_count: self.settings.step_count });
        }
        if expected != actual {
            return Err(PolicyError::LossCount { expected, actual });
        }
        if let Some(sample) = losses.iter().position(|loss| !loss.is_finite()) {
            return Err(PolicyError::Loss { sample, value: losses[sample] });
        }
        let share = 1.0 / self.settings.baseline_window;
        let signal = Signal::new(self.settings.estimator, losses, self.baseline, share);
        let mut next = self.clone();
        let rate = self.settings.learning_rate_at(self.step);
        for (layer, of_layer) in next.probabilities.iter_mut().enumerate() {
            for block in BLOCKS.into_iter().filter(|_| self.settings.prunable[layer]) {
                let draws: Vec<Draws> =
                    (0..expected).map(|sample| self.draws(sample, layer, block)).collect();
                for (unit, keep) in of_layer.of_mut(block).iter_mut().enumerate() {
                    let kept = draws.iter().map(|draws| draws.keeps(unit, *keep));
                    *keep -= rate * signal.gradient(*keep, kept);
                }
            }
        }
        next.project()?;
        next.baseline = Some(signal.next_baseline);
        next.step += 1;
        *self = next;
        Ok(())
    }

    /// Takes the step that is due without moving anything: its losses were no numbers.
    ///
    /// # Errors
    /// When all steps have been taken.
    pub fn skip_step(&mut self) -> Result<(), PolicyError> {
        if self.is_done() {
            return Err(PolicyError::Done { step_count: self.settings.step_count });
        }
        self.step += 1;
        Ok(())
    }

    /// The mask that the search has come to: of `n` units that share a budget `floor(n (1 - keep_share))` go, those of
    /// the lowest probability, of equal ones the first; but each layer keeps its best unit of each block.
    ///
    /// # Errors
    /// When `dense` is another model.
    pub fn select(&self, dense: &ModelSpec) -> Result<KeepMask, PolicyError> {
        let kept = |of_layer: &GroupImportance| SampledLayer {
            attention: vec![true; of_layer.attention.len()],
            mlp: vec![true; of_layer.mlp.len()],
        };
        let mut mask = SampledMask { layers: self.probabilities.iter().map(kept).collect() };
        for (block, layers) in self.pools() {
            let mut candidates = Vec::new();
            let mut values = Vec::new();
            let mut unit_count = 0;
            for layer in layers {
                let of_block = self.probabilities[layer].of(block);
                unit_count += of_block.len();
                // The last to go anyway: of the highest the last.
                let best =
                    (0..of_block.len()).max_by(|one, other| of_block[*one].total_cmp(&of_block[*other]));
                for unit in (0..of_block.len()).filter(|unit| Some(*unit) != best) {
                    candidates.push((layer, unit));
                    values.push(of_block[unit]);
                }
            }
            // Guards the floor against the last bit of a product such as 0.3 * 10.
            let removed = unit_count as f64 * (1.0 - self.settings.keep_share(block)) + 1e-9;
            for place in lowest_places(&values, removed.floor() as usize) {
                let (layer, unit) = candidates[place];
                mask.layers[layer].of_mut(block)[unit] = false;
            }
        }
        mask.keep_mask(dense)
    }

    fn project(&mut self) -> Result<(), PolicyError> {
        for (block, layers) in self.pools() {
            let mut pool = Vec::new();
            for &layer in &layers {
                pool.extend_from_slice(self.probabilities[layer].of(block));
            }
            let budget = self.settings.keep_share(block) * pool.len() as f64;
            let projected = project_to_budget(&mut pool, budget);
            if let Err(ProjectionError::Budget { .. } | ProjectionError::Slice(_)) = projected {
                let is_bad = |layer: &&usize| {
                    self.probabilities[**layer].of(block).iter().any(|value| !value.is_finite())
                };
                let layer = layers.iter().find(is_bad).copied().unwrap_or_default();
                return Err(PolicyError::Overflow { layer, block: name(block) });
            }
            let mut rest = &pool[..];
            for &layer in &layers {
                let of_block = self.probabilities[layer].of_mut(block);
                let (own, after) = rest.split_at(of_block.len());
                of_block.copy_from_slice(own);
                rest = after;
            }
        }
        Ok(())
    }

    /// Blocks with the layers whose units share a budget.
    fn pools(&self) -> Vec<(Block, Vec<usize>)> {
        let prunable = &self.settings.prunable;
        let layers: Vec<usize> = (0..prunable.len()).filter(|&layer| prunable[layer]).collect();
        match self.settings.scope {
            Scope::Model => BLOCKS.into_iter().map(|block| (block, layers.clone())).collect(),
            Scope::Layer => {
                let of_block = |block| layers.iter().map(move |&layer| (block, vec![layer]));
                BLOCKS.into_iter().flat_map(of_block).collect()
            }
        }
    }

    fn draws(&self, sample: usize, layer: usize, block: Block) -> Draws {
        let parts = [self.step, sample as u64, layer as u64, block_key(block)];
        Draws(keyed(self.settings.seed, parts))
    }
}

impl PolicySettings {
    /// Whether a search with these settings may be at these probabilities.
    fn check_start(&self, probabilities: &[GroupImportance]) -> Result<(), PolicyError> {
        self.check()?;
        let (expected, actual) = (self.prunable.len(), probabilities.len());
        if expected != actual {
            return Err(PolicyError::LayerCount { expected, actual });
        }
        for (layer, of_layer) in probabilities.iter().enumerate() {
            for block in BLOCKS {
                let of_block = of_layer.of(block);
                if let Some(unit) = of_block.iter().position(|value| !(0.0..=1.0).contains(value)) {
                    let (block, value) = (name(block), of_block[unit]);
                    return Err(PolicyError::Probability { layer, block, unit, value });
                }
            }
        }
        Ok(())
    }

    fn keep_share(&self, block: Block) -> f64 {
        match block {
            Block::Attention => self.attention_keep_share,
            Block::Mlp => self.mlp_keep_share,
        }
    }

    fn learning_rate_at(&self, step: u64) -> f64 {
        self.learning_rate * (1.0 + (PI * step as f64 / self.step_count as f64).cos()) / 2.0
    }

    fn check(&self) -> Result<(), PolicyError> {
        let fewest = match self.estimator {
            Estimator::Strict => 1,
            Estimator::Faithful => 2,
        };
        let samples = self.samples_per_step;
        let is_share = |share: f64| share > 0.0 && share <= 1.0;
        let rate = self.learning_rate;
        for (is_good, what, rule, value) in [
            (
                is_share(self.attention_keep_share),
                "attention_keep_share",
                "lie in (0, 1]",
                self.attention_keep_share,
            ),
            (is_share(self.mlp_keep_share), "mlp_keep_share", "lie in (0, 1]", self.mlp_keep_share),
            (rate > 0.0 && rate.is_finite(), "learning_rate", "be a positive number", rate),
            (self.step_count > 0, "step_count", "be at least 1", self.step_count as f64),
            (
                samples >= fewest,
                "samples_per_step",
                "be at least 1, or 2 where the divisor is one less",
                samples as f64,
            ),
            (self.baseline_window >= 1.0, "baseline_window", "be at least 1", self.baseline_window),
        ] {
            if !is_good {
                return Err(PolicyError::Setting { what, rule, value });
            }
        }
        Ok(())
    }
}

impl SampledMask {
    /// As indices into the unpruned model. A layer of a sample may be empty, which no pruned model is.
    ///
    /// # Errors
    /// When `dense` is another model.
    pub fn keep_mask(&self, dense: &ModelSpec) -> Result<KeepMask, PolicyError> {
        let (expected, actual) = (dense.layers.len(), self.layers.len());
        if expected != actual {
            return Err(PolicyError::LayerCount { expected, actual });
        }
        let layers = self.layers.iter().zip(&dense.layers).enumerate().map(|(layer, (mask, widths))| {
            for (block, actual, expected) in [
                (Block::Attention, mask.attention.len(), widths.kv_head_count),
                (Block::Mlp, mask.mlp.len(), widths.intermediate_size),
            ] {
                if actual != expected {
                    return Err(PolicyError::UnitCount { layer, block: name(block), expected, actual });
                }
            }
            let indices = |kept: &[bool]| (0..kept.len()).filter(|&unit| kept[unit]).collect();
            Ok(keep_kv_groups(&LayerKeep::full(widths), widths, indices(&mask.attention), indices(&mask.mlp)))
        });
        Ok(KeepMask { layers: layers.collect::<Result<_, _>>()? })
    }
}

impl SampledLayer {
    fn of_mut(&mut self, block: Block) -> &mut [bool] {
        match block {
            Block::Attention => &mut self.attention,
            Block::Mlp => &mut self.mlp,
        }
    }
}

fn name(block: Block) -> &'static str {
    match block {
        Block::Attention => "attention",
        Block::Mlp => "mlp",
    }
}

/// Random numbers of one sample, layer and block.
#[derive(Debug, Clone, Copy)]
struct Draws(u64);

impl Draws {
    /// Probability 0 never keeps and 1 always does: a draw lies strictly between.
    fn keeps(self, unit: usize, probability: f64) -> bool {
        unit_interval(and_then(self.0, unit as u64)) < probability
    }
}

#[cfg(test)]
mod tests;
