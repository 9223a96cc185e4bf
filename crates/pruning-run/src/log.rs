//! What a run tells the world: numbered events, from which everything shown of a run can be rebuilt.

use crate::{CalibrationFound, CheckpointRef, Generation, GuardAction, TaskScore};
use model_spec::LayerSpec;
use pruning::{KeepMask, LayerKeep};
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

/// Something that happened in a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RunEvent {
    /// 1 for a run's first event, then rising by one.
    pub revision: u64,
    pub time: SystemTime,
    pub kind: RunEventKind,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RunEventKind {
    StateChange { state: RunState, message: String },
    Step(StepReport),
    Decision(Arc<Decision>),
    Evaluation(Evaluation),
    Task(TaskResult),
    Export(ExportResult),
    Checkpoint(Checkpoint),
    Restart(Restart),
    Guard(GuardVerdict),
    Calibration(Arc<Calibration>),
}

/// What a decision was calibrated on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Calibration {
    /// The decision is the one after this step.
    pub step: u64,
    pub found: CalibrationFound,
    /// Wall time of the slowest rank.
    pub duration: Duration,
}

/// Where a run stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RunState {
    /// Waits for idle workers.
    Queued,
    /// Workers load their shards and form their group.
    Starting,
    /// Workers train, prune or measure.
    Running,
    /// The result is written and checked.
    Exporting,
    Succeeded,
    Failed,
    Cancelled,
    /// A checkpoint is written in order to pause.
    Pausing,
    /// Waits to be asked on; no worker is held.
    Paused,
    /// Waits for workers in order to go on from a checkpoint.
    Recovering,
    /// A checkpoint is written in order to end.
    Cancelling,
}

impl RunState {
    /// Whether nothing can happen any more.
    #[must_use]
    pub fn has_ended(self) -> bool {
        match self {
            Self::Queued
            | Self::Starting
            | Self::Running
            | Self::Exporting
            | Self::Pausing
            | Self::Paused
            | Self::Recovering
            | Self::Cancelling => false,
            Self::Succeeded | Self::Failed | Self::Cancelled => true,
        }
    }
}

/// What one optimizer step did, all ranks taken together.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StepReport {
    /// 0-based.
    pub step: u64,
    /// Mean negative log likelihood, in nats; may be no number where the step was skipped.
    #[serde(with = "perhaps_no_number")]
    pub loss: f64,
    /// Global L2 norm of the gradients before clipping; likewise.
    #[serde(with = "perhaps_no_number")]
    pub grad_norm: f64,
    pub learning_rate: f64,
    pub tokens: u64,
    /// Of the slowest rank.
    pub duration: Duration,
    /// Part of `duration` spent on scores.
    pub score_duration: Duration,
    /// Of the fullest rank.
    pub memory_bytes: u64,
    /// Fraction of projection weights gone during this step.
    pub sparsity: f64,
    /// Mask in force during this step.
    pub generation: Generation,
    /// Why the optimizer took no step; empty when it did.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub skipped: String,
}

/// JSON has no NaN and no infinity: they are written as null and read back as NaN.
mod perhaps_no_number {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    pub(super) fn serialize<S: Serializer>(value: &f64, serializer: S) -> Result<S::Ok, S::Error> {
        value.is_finite().then_some(*value).serialize(serializer)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
        Ok(Option::deserialize(deserializer)?.unwrap_or(f64::NAN))
    }
}

/// One numbered, immutable choice of what stays.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Decision {
    pub generation: Generation,
    /// The step whose scores were the last to enter.
    pub step: u64,
    /// Fraction of all projection weights that is gone.
    pub sparsity: f64,
    /// Parameters of the whole model that stay.
    pub parameters: u64,
    pub keep_mask: KeepMask,
}

impl Decision {
    /// Kept counts by layer.
    #[must_use]
    pub fn widths(&self) -> Vec<LayerSpec> {
        self.keep_mask.layers.iter().map(LayerKeep::widths).collect()
    }
}

/// A complete checkpoint.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Checkpoint {
    pub place: CheckpointRef,
    pub size_bytes: u64,
    /// From the snapshot to the manifest.
    pub duration: Duration,
    /// It holds the logits that an export is checked against.
    pub with_logits: bool,
}

/// A run goes on from a checkpoint, or starts anew where there was none.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Restart {
    /// How often the run has done so.
    pub restarts: u32,
    /// The next optimizer step, from which on step events are repeated.
    pub next_step: u64,
    pub generation: Generation,
    pub cause: String,
    /// Workers of the new group.
    pub tp_degree: usize,
}

/// A quality guard has looked.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct GuardVerdict {
    pub perplexity: f64,
    pub max_perplexity: f64,
    /// Mask measured.
    pub generation: Generation,
    /// What follows; absent when pruning goes on.
    pub action: Option<GuardAction>,
}

/// A measured perplexity.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Evaluation {
    /// What was measured: `dense`, `pruned` or `tuned`.
    pub label: String,
    pub perplexity: f64,
    /// Sum over predicted tokens, in nats.
    pub negative_log_likelihood: f64,
    pub predicted_tokens: u64,
    /// Optimizer steps done when it was measured.
    pub step: u64,
    /// Wall time of the slowest rank.
    pub duration: Duration,
    pub window_tokens: u32,
}

/// A measured task.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TaskResult {
    /// What was measured: `dense`, `pruned` or `tuned`.
    pub label: String,
    pub score: TaskScore,
    /// Optimizer steps done when it was measured.
    pub step: u64,
    /// Wall time of the slowest rank.
    pub duration: Duration,
}

/// A share of right answers.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Accuracy {
    pub share: f64,
    /// `sqrt(p (1 - p) / (n - 1))`; absent below two rows.
    pub standard_error: Option<f64>,
}

impl Accuracy {
    /// Of `correct` right answers to `count` questions.
    #[must_use]
    pub fn new(correct: u64, count: u64) -> Self {
        let share = correct as f64 / count as f64;
        let standard_error = (count > 1).then(|| (share * (1.0 - share) / (count - 1) as f64).sqrt());
        Self { share, standard_error }
    }
}

/// What an export wrote and what its check found.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ExportResult {
    pub path: String,
    /// Parameters written, padding included.
    pub parameters: u64,
    pub weight_bytes: u64,
    pub model_type: String,
    pub manifest_sha256: String,
    /// Largest difference between a logit of the run and of the reloaded folder.
    pub max_logit_difference: f64,
    pub max_logit: f64,
    /// Share of positions whose most likely token is the same.
    pub top_token_agreement: f64,
    /// Mean KL divergence from the run's distribution to the reloaded folder's, in nats.
    pub mean_kl: f64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_accuracy_has_the_standard_error_of_a_mean() {
        // One right of four: the mean of (1, 0, 0, 0) is 1/4, its sample deviation 1/2, over sqrt(4).
        assert_eq!(Accuracy::new(1, 4), Accuracy { share: 0.25, standard_error: Some(0.25) });
        assert_eq!(Accuracy::new(3, 3), Accuracy { share: 1.0, standard_error: Some(0.0) });
        assert_eq!(Accuracy::new(1, 1), Accuracy { share: 1.0, standard_error: None });
    }
}
