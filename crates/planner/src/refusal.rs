use crate::estimate::{Estimate, Stage};
use crate::memory::{Kind, Memory};
use recipe::{FieldViolation, Recipe, Recompute, Shrink, Storage};

/// Why a run must not start.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum Refusal {
    #[error("`{}`: {}", .0.field, .0.problem)]
    Recipe(FieldViolation),
    #[error("{0}")]
    Degree(String),
    #[error(
        "{stage} takes {} on the fullest rank and the device has {}: {} take most ({}); {advice}",
        gib(.need.total()), gib(*.have), .need.dominant(), gib(.need.of(.need.dominant()))
    )]
    DoesNotFit { stage: Stage, need: Memory, have: u64, advice: String },
    #[error("the result cannot be exported: {0}")]
    NotExportable(String),
}

impl Refusal {
    /// The field of a run's spec that is to be changed.
    #[must_use]
    pub fn field(&self) -> &str {
        match self {
            Self::Recipe(violation) => &violation.field,
            Self::Degree(_) | Self::DoesNotFit { .. } => "tp_degree",
            Self::NotExportable(_) => "recipe.pruning",
        }
    }
}

/// Binary gigabytes with two places.
pub(crate) fn gib(bytes: u64) -> String {
    format!("{:.2} GiB", bytes as f64 / f64::from(1 << 30))
}

/// What stands against an estimate: `memory_bytes` is what the device has, and `export_form` says why widths cannot be
/// exported, or nothing.
#[must_use]
pub fn refusals(
    estimate: &Estimate,
    recipe: &Recipe,
    memory_bytes: Option<u64>,
    cannot_export: Option<String>,
) -> Vec<Refusal> {
    let mut found = Vec::new();
    if let Some(have) = memory_bytes {
        let (stage, need) = estimate.peak();
        if need.total() > have {
            let advice = advice(need.dominant(), stage, recipe, estimate.largest_degree > estimate.tp_degree);
            found.push(Refusal::DoesNotFit { stage, need, have, advice });
        }
    }
    found.extend(cannot_export.map(Refusal::NotExportable));
    found
}

/// What to change, cheapest first.
fn advice(kind: Kind, stage: Stage, recipe: &Recipe, more_workers: bool) -> String {
    let mut ways: Vec<String> = Vec::new();
    match kind {
        Kind::Weights => match recipe.precision.storage {
            Storage::F32 | Storage::F64 => ways.push("store weights in bf16, int8 or nf4".into()),
            Storage::Bf16 => ways.push("store weights in int8 or nf4 (without compensation)".into()),
            Storage::Int8 => ways.push("store weights in nf4".into()),
            Storage::Nf4 => {}
        },
        Kind::Lora | Kind::Gradients | Kind::Moments => {
            ways.push(format!("lower `lora.rank` from {}", recipe.lora.rank));
        }
        Kind::Activations => {
            if recipe.recompute == Recompute::None {
                ways.push("set `recompute: layer`".into());
            }
            if recipe.batch.rows > 1 {
                ways.push(format!(
                    "lower `batch.rows` from {} and raise `batch.micro_batches`",
                    recipe.batch.rows
                ));
            } else {
                ways.push(format!("shorten `batch.window_tokens` from {}", recipe.batch.window_tokens));
            }
        }
        Kind::Buffers => match stage {
            Stage::Decision => ways.push("choose `pruning.compensation: none`".into()),
            Stage::Loading | Stage::FirstStep | Stage::LastStep | Stage::Checkpoint => {
                let prunes_live =
                    recipe.pruning.as_ref().is_some_and(|pruning| pruning.shrink == Shrink::Live);
                if prunes_live && recipe.distillation.is_some() {
                    ways.push("lower `distillation.top_k`".into());
                }
                ways.push("choose a criterion that keeps no gradients of weights".into());
            }
        },
        Kind::Process => {}
    }
    if more_workers {
        ways.push("use more workers".into());
    }
    if ways.is_empty() {
        ways.push("use devices with more memory".into());
    }
    ways.join(", or ")
}
