use crate::{Compensation, Criterion, Depth, LoraPruneForm, Ramp, Violations, in_unit_interval};
use serde::{Deserialize, Serialize};

/// What is removed, how much of it, and by which rule.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Pruning {
    pub criterion: Criterion,
    /// `E <- decay * E + (1 - decay) * S` over the steps' scores `S`, from zero.
    pub moving_average_decay: f64,
    pub budget: Budget,
    pub ramp: Ramp,
    pub shape: Shape,
    pub head_grouping: HeadGrouping,
    pub protection: Protection,
    /// Kept FFN channels of a layer are a multiple of this (1: any number).
    pub channel_multiple: usize,
    /// Tensor-parallel degrees at which the result must be servable: kept heads and channels divide by each.
    pub serve_tp: Vec<usize>,
    pub shrink: Shrink,
    pub compensation: Compensation,
    /// Whole blocks that go at the first decision, before heads and channels. Absent: none.
    pub depth: Option<Depth>,
    /// Windows of training text that a decision is calibrated on, where its method needs passes of its own; all of them
    /// where there are fewer.
    pub calibration_windows: usize,
}

/// How small the result shall be.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Budget {
    /// Fraction of the weights in unprotected layers' projections that goes, in `[0, 1)`.
    Sparsity(f64),
    /// Parameters of the whole model that stay, embeddings and norms included.
    Parameters(u64),
}

/// Which widths the layers of the result may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Shape {
    /// Every layer keeps the same counts, so that a stock `config.json` can describe the result.
    Uniform,
    /// The published rule: `floor(count * sparsity)` groups go from each unprotected layer.
    Paper,
    /// One ranking over all unprotected layers, importance per weight.
    Global,
}

/// What stands or falls together in attention.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HeadGrouping {
    /// A key/value head with all its query heads.
    KvGroups,
    /// Single query heads, equally many from each key/value head, which all stay.
    QueryHeads,
}

/// Layers that are tuned but never pruned.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Protection {
    /// None for `uniform` and `global`; the first tenth and the last for `paper`, as published.
    ByShape,
    /// Exactly these, 0-based.
    Layers(Vec<usize>),
}

/// What a mask decision does to the tensors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Shrink {
    /// Weights, LoRA factors and moments are sliced at once: every later step is smaller.
    Live,
    /// Removed groups are multiplied by zero. Slower and the same result: the oracle for `live`.
    Never,
}

/// What is best in `docs/results.md`: by what flows through it everything goes in the first third, what stays is refitted at
/// each decision, and two thirds of the steps tune the final structure.
impl Default for Pruning {
    fn default() -> Self {
        Self {
            criterion: Criterion::default(),
            moving_average_decay: 0.9,
            budget: Budget::Sparsity(0.5),
            ramp: Ramp::default(),
            shape: Shape::Uniform,
            head_grouping: HeadGrouping::KvGroups,
            protection: Protection::ByShape,
            channel_multiple: 1,
            serve_tp: Vec::new(),
            shrink: Shrink::Live,
            compensation: Compensation::default(),
            depth: None,
            calibration_windows: 16,
        }
    }
}

impl Pruning {
    /// LoRAPrune as its authors' code has it (arXiv:2305.18403): LoRA-guided scores, a cubic ramp, nothing refitted.
    #[must_use]
    pub fn published() -> Self {
        Self {
            criterion: Criterion::LoraPrune { form: LoraPruneForm::Code },
            ramp: Ramp::published(),
            compensation: Compensation::None,
            ..Self::default()
        }
    }
}

impl Protection {
    /// Whether layer `layer` of `layer_count` is left unpruned under `shape`.
    #[must_use]
    pub fn covers(&self, layer: usize, layer_count: usize, shape: Shape) -> bool {
        match (self, shape) {
            (Self::Layers(layers), _) => layers.contains(&layer),
            (Self::ByShape, Shape::Paper) => layer < layer_count / 10 || layer + 1 == layer_count,
            (Self::ByShape, Shape::Uniform | Shape::Global) => false,
        }
    }
}

impl Pruning {
    /// Whether a decision waits for calibration: passes of its own over `calibration_windows` windows. The first does, the
    /// others go by the steps' scores.
    #[must_use]
    pub fn calibrates(&self) -> bool {
        self.depth.is_some()
    }

    /// Whether whole blocks go at the first decision, and nothing after that.
    #[must_use]
    pub fn only_blocks(&self) -> bool {
        matches!(self.depth, Some(Depth { blocks: None, .. }))
    }

    pub(crate) fn check(&self, steps: u64, found: &mut Violations) {
        found.require(
            in_unit_interval(self.moving_average_decay, false),
            "pruning.moving_average_decay",
            || format!("must lie in [0, 1); got {}", self.moving_average_decay),
        );
        match self.budget {
            Budget::Sparsity(sparsity) => {
                found.require(in_unit_interval(sparsity, false), "pruning.budget.sparsity", || {
                    format!("must lie in [0, 1): it is the fraction removed; got {sparsity}")
                });
            }
            Budget::Parameters(parameters) => {
                found.require(parameters > 0, "pruning.budget.parameters", || "must be at least 1".into());
            }
        }
        self.ramp.check(steps, found);
        found.require(self.channel_multiple >= 1, "pruning.channel_multiple", || "must be at least 1".into());
        found.require(self.serve_tp.iter().all(|degree| *degree >= 1), "pruning.serve_tp", || {
            "every degree must be at least 1".into()
        });
        found.require(self.calibration_windows >= 1, "pruning.calibration_windows", || {
            "must be at least 1".into()
        });
        if let Some(depth) = &self.depth {
            depth.check(found);
            found.require(self.shape != Shape::Paper, "pruning.shape", || {
                "`paper` protects layers by their places, which change when blocks go; use `uniform` or `global` with `depth`"
                    .into()
            });
        }
        let protects_some = matches!(&self.protection, Protection::Layers(layers) if !layers.is_empty());
        found.require(!(protects_some && self.shape == Shape::Uniform), "pruning.protection", || {
            "protected layers keep their widths, which `shape: uniform` cannot express; use `paper` or `global`".into()
        });
    }
}
