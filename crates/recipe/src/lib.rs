//! Everything a run may choose, as closed enums, and the schedules over its steps.
//!
//! A new criterion, optimizer or schedule starts here: the compiler then lists every place that must honour it.

mod adapter;
mod chain;
mod compensation;
mod criterion;
mod depth;
mod distillation;
mod optimizer;
mod precision;
mod pruning;
mod schedule;

pub use adapter::Lora;
pub use chain::Chain;
pub use compensation::{Compensation, CompensationTarget, LeastSquares};
pub use criterion::{Criterion, LoraPruneForm};
pub use depth::{BlockCriterion, Depth};
pub use distillation::Distillation;
pub use optimizer::{AdamW, LoraRite, Optimizer};
pub use precision::{Compute, Precision, Recompute, Storage};
pub use pruning::{Budget, HeadGrouping, Protection, Pruning, Shape, Shrink};
pub use schedule::{Decay, LearningRate, Ramp, RampShape, Recovery};

use serde::{Deserialize, Serialize};

/// The whole choice of a run. Two runs with equal recipes, data, model and tensor-parallel degree are equal bit for bit.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Recipe {
    pub seed: u64,
    /// Optimizer steps; 0 only evaluates.
    pub steps: u64,
    pub batch: Batch,
    pub lora: Lora,
    /// Absent: one pair of factors throughout.
    pub chain: Option<Chain>,
    pub optimizer: Optimizer,
    pub learning_rate: LearningRate,
    /// Gradients are scaled down to this global L2 norm; absent means never. With LoRA-RITE, the unmagnified ones.
    pub max_grad_norm: Option<f64>,
    /// Absent: LoRA fine-tuning alone.
    pub pruning: Option<Pruning>,
    /// Absent: the next token of the text is all that is trained towards.
    pub distillation: Option<Distillation>,
    pub precision: Precision,
    pub recompute: Recompute,
}

/// How many tokens an optimizer step sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Batch {
    /// Length of a window; its first token is not predicted.
    pub window_tokens: usize,
    /// Windows in one forward and backward pass.
    pub rows: usize,
    /// Passes whose gradients are summed into one optimizer step.
    pub micro_batches: usize,
}

impl Batch {
    #[must_use]
    pub fn tokens_per_step(&self) -> u64 {
        (self.window_tokens * self.rows * self.micro_batches) as u64
    }

    /// Predictions that the loss of one optimizer step is the mean of.
    #[must_use]
    pub fn predictions_per_step(&self) -> u64 {
        (self.window_tokens.saturating_sub(1) * self.rows * self.micro_batches) as u64
    }
}

impl Default for Batch {
    fn default() -> Self {
        Self { window_tokens: 256, rows: 4, micro_batches: 1 }
    }
}

impl Default for Recipe {
    fn default() -> Self {
        Self {
            seed: 0,
            steps: 200,
            batch: Batch::default(),
            lora: Lora::default(),
            chain: None,
            optimizer: Optimizer::default(),
            learning_rate: LearningRate::default(),
            max_grad_norm: Some(1.0),
            pruning: Some(Pruning::default()),
            distillation: None,
            precision: Precision::default(),
            recompute: Recompute::None,
        }
    }
}

/// One thing wrong with a recipe: the field by its path, and what it must be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{field}`: {problem}")]
pub struct FieldViolation {
    pub field: String,
    pub problem: String,
}

impl Recipe {
    /// All that is wrong with the recipe by itself, without knowing the model. Empty means it may run.
    #[must_use]
    pub fn violations(&self) -> Vec<FieldViolation> {
        let mut found = Violations::default();
        found.require(self.batch.window_tokens >= 2, "batch.window_tokens", || {
            format!(
                "must be at least 2, so that one token can be predicted; got {}",
                self.batch.window_tokens
            )
        });
        found.require(self.batch.rows >= 1, "batch.rows", || "must be at least 1".into());
        found.require(self.batch.micro_batches >= 1, "batch.micro_batches", || "must be at least 1".into());
        self.lora.check(&mut found);
        if let Some(chain) = &self.chain {
            chain.check(self, &mut found);
        }
        self.optimizer.check(&mut found);
        self.learning_rate.check(self.steps, self.last_removal(), &mut found);
        if let Some(norm) = self.max_grad_norm {
            found.require(norm.is_finite() && norm > 0.0, "max_grad_norm", || {
                format!("must be a positive number, or absent for no clipping; got {norm}")
            });
        }
        self.precision.check(&mut found);
        if let Some(pruning) = &self.pruning {
            pruning.check(self.steps, &mut found);
            pruning.compensation.check(self.precision.storage, &mut found);
        }
        if let Some(distillation) = &self.distillation {
            distillation.check(&mut found);
        }
        found.0
    }

    /// What needs the model to be seen: its vocabulary bounds what can be distilled.
    #[must_use]
    pub fn violations_on(&self, vocab_size: usize) -> Vec<FieldViolation> {
        let mut found = Violations::default();
        if let Some(Distillation { top_k, .. }) = self.distillation {
            found.require(top_k <= vocab_size, "distillation.top_k", || {
                format!("must not exceed the model's vocabulary of {vocab_size} tokens; got {top_k}")
            });
        }
        found.0
    }

    /// Pairs of factors that knots will have frozen at the end.
    #[must_use]
    pub fn frozen_pairs(&self) -> u64 {
        self.chain.as_ref().map_or(0, |chain| chain.knots.len() as u64)
    }

    /// Learning rate of `step`.
    #[must_use]
    pub fn learning_rate_at(&self, step: u64) -> f64 {
        let rewarmed = self.chain.as_ref().map_or(1.0, |chain| chain.warmup_at(step));
        rewarmed * self.learning_rate.at(step, self.steps, self.last_removal())
    }

    /// The last step after which a mask is decided; none without pruning.
    fn last_removal(&self) -> Option<u64> {
        let pruning = self.pruning.as_ref()?;
        match pruning.only_blocks() {
            true => self.pruning_steps().last().copied(),
            false => Some(pruning.ramp.end_step(self.steps)),
        }
    }

    /// Steps after which a mask is decided, in order; empty without pruning.
    #[must_use]
    pub fn pruning_steps(&self) -> Vec<u64> {
        match &self.pruning {
            Some(pruning) => {
                let mut steps = pruning.ramp.pruning_steps(self.steps);
                if pruning.only_blocks() {
                    steps.truncate(1);
                }
                steps
            }
            None => Vec::new(),
        }
    }
}

/// Collects violations, so that a caller sees all of them at once.
#[derive(Default)]
pub(crate) struct Violations(Vec<FieldViolation>);

impl Violations {
    pub(crate) fn require(&mut self, holds: bool, field: &str, problem: impl FnOnce() -> String) {
        if !holds {
            self.0.push(FieldViolation { field: field.to_owned(), problem: problem() });
        }
    }
}

/// Holds the exclusive or inclusive unit interval checks in one place; NaN fails both.
pub(crate) fn in_unit_interval(value: f64, one_allowed: bool) -> bool {
    (0.0..1.0).contains(&value) || (one_allowed && value == 1.0)
}
