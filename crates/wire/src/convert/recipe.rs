//! `Recipe`: every choice of a run.

use super::{below, bounded_list, count_field, enum_field};
use crate::fields::{InvalidFields, Violations};
use crate::{limits, pb};
use recipe::{
    AdamW, Batch, BlockCriterion, Budget, Chain, Compensation, CompensationTarget, Compute, Criterion, Decay,
    Depth, Distillation, FieldViolation, HeadGrouping, LearningRate, LeastSquares, Lora, LoraPruneForm,
    LoraRite, Optimizer, Precision, Protection, Pruning, Ramp, RampShape, Recipe, Recompute, Recovery, Shape,
    Shrink, Storage,
};

/// A recipe that has passed every check that needs no model, defaults filled in.
///
/// # Errors
/// Names every field that is wrong, by its path below `path`.
pub fn checked(message: Option<pb::Recipe>, path: &str) -> Result<Recipe, InvalidFields> {
    let mut found = Violations::default();
    let recipe = from_pb(message, path, &mut found);
    found.finish(recipe)
}

/// See [`checked`]; what is wrong goes to `found`.
pub fn from_pb(message: Option<pb::Recipe>, path: &str, found: &mut Violations) -> Recipe {
    let message = message.unwrap_or_default();
    let default = Recipe::default();
    let at = |field: &str| below(path, field);
    let steps = message.steps.unwrap_or(default.steps);
    if steps > limits::MAX_STEPS {
        found.reject(at("steps"), format!("must not exceed {}; got {steps}", limits::MAX_STEPS));
    }
    let recipe = Recipe {
        seed: message.seed,
        steps: steps.min(limits::MAX_STEPS),
        batch: batch(message.batch.unwrap_or_default(), &at("batch"), found),
        lora: lora(message.lora.unwrap_or_default()),
        chain: message.chain.and_then(|message| chain(message, &at("chain"), found)),
        optimizer: optimizer(message.optimizer.unwrap_or_default()),
        learning_rate: learning_rate(message.learning_rate.unwrap_or_default(), &at("learning_rate"), found),
        max_grad_norm: match message.max_grad_norm {
            None => default.max_grad_norm,
            Some(0.0) => None,
            Some(norm) => Some(norm),
        },
        pruning: message.pruning.map(|pruning| self::pruning(pruning, &at("pruning"), found)),
        distillation: message.distillation.map(distillation),
        precision: precision(message.precision.unwrap_or_default(), &at("precision"), found),
        recompute: enum_field(
            message.recompute,
            default.recompute,
            |member| match member {
                pb::Recompute::Unspecified => None,
                pb::Recompute::None => Some(Recompute::None),
                pb::Recompute::Layer => Some(Recompute::Layer),
            },
            &at("recompute"),
            "RECOMPUTE_NONE or RECOMPUTE_LAYER",
            found,
        ),
    };
    let violations = recipe.violations().into_iter().map(|FieldViolation { field, problem }| {
        FieldViolation { field: field_of_message(&field, &recipe), problem }
    });
    let fresh: Vec<_> = violations.filter(|violation| !found.notes(&at(&violation.field))).collect();
    found.extend_below(path, fresh);
    recipe
}

/// The message's name of a field that the domain type calls otherwise, relative to the recipe.
#[must_use]
pub fn field_of_message(field: &str, recipe: &Recipe) -> String {
    if let Some(field) = field.strip_prefix("optimizer.") {
        let kind = match recipe.optimizer {
            Optimizer::AdamW(_) => "adamw",
            Optimizer::LoraRite(_) => "lora_rite",
        };
        return format!("optimizer.{kind}.{field}");
    }
    let field = match field {
        "pruning.budget.sparsity" => "pruning.sparsity",
        "pruning.budget.parameters" => "pruning.parameters",
        "pruning.protection" => "pruning.protected_layers",
        "pruning.compensation" => "pruning.least_squares",
        "pruning.compensation.windows" => "pruning.least_squares.windows",
        "pruning.compensation.damping" => "pruning.least_squares.damping",
        same => same,
    };
    field.to_owned()
}

fn batch(message: pb::Batch, path: &str, found: &mut Violations) -> Batch {
    let default = Batch::default();
    let window_tokens = match message.window_tokens {
        None => default.window_tokens,
        Some(tokens) if tokens <= limits::MAX_WINDOW_TOKENS => tokens as usize,
        Some(tokens) => {
            let most = limits::MAX_WINDOW_TOKENS;
            found.reject(below(path, "window_tokens"), format!("must not exceed {most}; got {tokens}"));
            default.window_tokens
        }
    };
    let mut count =
        |value, default, field| count_field(value, default, limits::MAX_ROWS, &below(path, field), found);
    Batch {
        window_tokens,
        rows: count(message.rows, default.rows, "rows"),
        micro_batches: count(message.micro_batches, default.micro_batches, "micro_batches"),
    }
}

fn lora(message: pb::Lora) -> Lora {
    let default = Lora::default();
    Lora {
        rank: message.rank.map_or(default.rank, |rank| rank as usize),
        alpha: message.alpha.unwrap_or(default.alpha),
        dropout: message.dropout.unwrap_or(default.dropout),
    }
}

fn chain(message: pb::Chain, path: &str, found: &mut Violations) -> Option<Chain> {
    let pb::Chain { knots, warmup_steps, settle_steps } = message;
    let default = Chain::default();
    bounded_list(knots.len(), &below(path, "knots"), found).then_some(Chain {
        knots,
        warmup_steps: warmup_steps.unwrap_or(default.warmup_steps),
        settle_steps: settle_steps.unwrap_or(default.settle_steps),
    })
}

fn optimizer(message: pb::Optimizer) -> Optimizer {
    match message.kind {
        None => Optimizer::default(),
        Some(pb::optimizer::Kind::Adamw(message)) => {
            let default = AdamW::default();
            Optimizer::AdamW(AdamW {
                beta1: message.beta1.unwrap_or(default.beta1),
                beta2: message.beta2.unwrap_or(default.beta2),
                eps: message.eps.unwrap_or(default.eps),
                weight_decay: message.weight_decay.unwrap_or(default.weight_decay),
            })
        }
        Some(pb::optimizer::Kind::LoraRite(message)) => {
            let default = LoraRite::default();
            Optimizer::LoraRite(LoraRite {
                beta1: message.beta1.unwrap_or(default.beta1),
                beta2: message.beta2.unwrap_or(default.beta2),
                eps: message.eps.unwrap_or(default.eps),
                weight_decay: message.weight_decay.unwrap_or(default.weight_decay),
                escaped_mass: message.escaped_mass,
                guard: message.guard.unwrap_or(default.guard),
                max_rms: message.max_rms.filter(|most| *most != 0.0),
            })
        }
    }
}

fn learning_rate(message: pb::LearningRate, path: &str, found: &mut Violations) -> LearningRate {
    let default = LearningRate::default();
    LearningRate {
        peak: message.peak.unwrap_or(default.peak),
        warmup_steps: message.warmup_steps,
        decay: enum_field(
            message.decay,
            default.decay,
            |member| match member {
                pb::Decay::Unspecified => None,
                pb::Decay::Cosine => Some(Decay::Cosine),
                pb::Decay::Linear => Some(Decay::Linear),
                pb::Decay::Constant => Some(Decay::Constant),
            },
            &below(path, "decay"),
            "DECAY_COSINE, DECAY_LINEAR or DECAY_CONSTANT",
            found,
        ),
        floor: message.floor,
        recovery: enum_field(
            message.recovery,
            default.recovery,
            |member| match member {
                pb::Recovery::Unspecified => None,
                pb::Recovery::Continue => Some(Recovery::Continue),
                pb::Recovery::Hold => Some(Recovery::Hold),
                pb::Recovery::Restart => Some(Recovery::Restart),
            },
            &below(path, "recovery"),
            "RECOVERY_CONTINUE, RECOVERY_HOLD or RECOVERY_RESTART",
            found,
        ),
    }
}

fn distillation(message: pb::Distillation) -> Distillation {
    let default = Distillation::default();
    Distillation {
        weight: message.weight.unwrap_or(default.weight),
        top_k: message.top_k.map_or(default.top_k, |top_k| top_k as usize),
    }
}

fn pruning(message: pb::Pruning, path: &str, found: &mut Violations) -> Pruning {
    let default = Pruning::default();
    let at = |field: &str| below(path, field);
    let mut protection = default.protection;
    if let Some(layers) = message.protected_layers
        && bounded_list(layers.layers.len(), &at("protected_layers"), found)
    {
        protection = Protection::Layers(layers.layers.into_iter().map(|layer| layer as usize).collect());
    }
    let mut serve_tp = Vec::new();
    if bounded_list(message.serve_tp.len(), &at("serve_tp"), found) {
        serve_tp.extend(message.serve_tp.into_iter().map(|degree| degree as usize));
    }
    Pruning {
        criterion: enum_field(
            message.criterion,
            default.criterion,
            |member| match member {
                pb::Criterion::Unspecified => None,
                pb::Criterion::LorapruneCode => Some(Criterion::LoraPrune { form: LoraPruneForm::Code }),
                pb::Criterion::LoraprunePaper => Some(Criterion::LoraPrune { form: LoraPruneForm::Paper }),
                pb::Criterion::Taylor => Some(Criterion::Taylor),
                pb::Criterion::Magnitude => Some(Criterion::Magnitude),
                pb::Criterion::Random => Some(Criterion::Random),
                pb::Criterion::Wanda => Some(Criterion::Wanda),
                pb::Criterion::Tangent => Some(Criterion::Tangent),
                pb::Criterion::Flap => Some(Criterion::Flap),
            },
            &at("criterion"),
            "CRITERION_LORAPRUNE_CODE, CRITERION_LORAPRUNE_PAPER, CRITERION_TAYLOR, CRITERION_MAGNITUDE, \
             CRITERION_RANDOM, CRITERION_WANDA, CRITERION_TANGENT or CRITERION_FLAP",
            found,
        ),
        moving_average_decay: message.moving_average_decay.unwrap_or(default.moving_average_decay),
        budget: match message.budget {
            None => default.budget,
            Some(pb::pruning::Budget::Sparsity(sparsity)) => Budget::Sparsity(sparsity),
            Some(pb::pruning::Budget::Parameters(parameters)) => Budget::Parameters(parameters),
        },
        ramp: ramp(message.ramp.unwrap_or_default(), &at("ramp"), found),
        shape: enum_field(
            message.shape,
            default.shape,
            |member| match member {
                pb::Shape::Unspecified => None,
                pb::Shape::Uniform => Some(Shape::Uniform),
                pb::Shape::Paper => Some(Shape::Paper),
                pb::Shape::Global => Some(Shape::Global),
            },
            &at("shape"),
            "SHAPE_UNIFORM, SHAPE_PAPER or SHAPE_GLOBAL",
            found,
        ),
        head_grouping: enum_field(
            message.head_grouping,
            default.head_grouping,
            |member| match member {
                pb::HeadGrouping::Unspecified => None,
                pb::HeadGrouping::KvGroups => Some(HeadGrouping::KvGroups),
                pb::HeadGrouping::QueryHeads => Some(HeadGrouping::QueryHeads),
            },
            &at("head_grouping"),
            "HEAD_GROUPING_KV_GROUPS or HEAD_GROUPING_QUERY_HEADS",
            found,
        ),
        protection,
        channel_multiple: message
            .channel_multiple
            .map_or(default.channel_multiple, |multiple| multiple as usize),
        serve_tp,
        shrink: enum_field(
            message.shrink,
            default.shrink,
            |member| match member {
                pb::Shrink::Unspecified => None,
                pb::Shrink::Live => Some(Shrink::Live),
                pb::Shrink::Never => Some(Shrink::Never),
            },
            &at("shrink"),
            "SHRINK_LIVE or SHRINK_NEVER",
            found,
        ),
        compensation: match message.compensation {
            None => default.compensation,
            Some(pb::pruning::Compensation::NoCompensation(_)) => Compensation::None,
            Some(pb::pruning::Compensation::LeastSquares(message)) => {
                Compensation::LeastSquares(least_squares(message, &at("least_squares"), found))
            }
        },
        depth: message.depth.map(|message| depth(message, &at("depth"), found)),
        calibration_windows: count_field(
            message.calibration_windows,
            default.calibration_windows,
            limits::MAX_ROWS,
            &at("calibration_windows"),
            found,
        ),
    }
}

fn depth(message: pb::Depth, path: &str, found: &mut Violations) -> Depth {
    let default = Depth::default();
    Depth {
        criterion: enum_field(
            message.criterion,
            default.criterion,
            |member| match member {
                pb::BlockCriterion::Unspecified => None,
                pb::BlockCriterion::Magnitude => Some(BlockCriterion::Magnitude),
                pb::BlockCriterion::Taylor => Some(BlockCriterion::Taylor),
                pb::BlockCriterion::Perplexity => Some(BlockCriterion::Perplexity),
            },
            &below(path, "criterion"),
            "BLOCK_CRITERION_MAGNITUDE, BLOCK_CRITERION_TAYLOR or BLOCK_CRITERION_PERPLEXITY",
            found,
        ),
        blocks: message.blocks.map(|blocks| blocks as usize),
        protect_ends: message.protect_ends.unwrap_or(default.protect_ends),
        iterative: message.iterative,
    }
}

fn depth_to_pb(depth: &Depth) -> pb::Depth {
    let criterion = match depth.criterion {
        BlockCriterion::Magnitude => pb::BlockCriterion::Magnitude,
        BlockCriterion::Taylor => pb::BlockCriterion::Taylor,
        BlockCriterion::Perplexity => pb::BlockCriterion::Perplexity,
    };
    pb::Depth {
        criterion: Some(criterion.into()),
        blocks: depth.blocks.map(narrow),
        protect_ends: Some(depth.protect_ends),
        iterative: depth.iterative,
    }
}

fn least_squares(message: pb::LeastSquares, path: &str, found: &mut Violations) -> LeastSquares {
    let default = LeastSquares::default();
    LeastSquares {
        windows: message.windows.map_or(default.windows, |windows| windows as usize),
        damping: message.damping.unwrap_or(default.damping),
        target: enum_field(
            message.target,
            default.target,
            |member| match member {
                pb::CompensationTarget::Unspecified => None,
                pb::CompensationTarget::Layer => Some(CompensationTarget::Layer),
                pb::CompensationTarget::Stream => Some(CompensationTarget::Stream),
            },
            &below(path, "target"),
            "COMPENSATION_TARGET_LAYER or COMPENSATION_TARGET_STREAM",
            found,
        ),
    }
}

fn ramp(message: pb::Ramp, path: &str, found: &mut Violations) -> Ramp {
    let default = Ramp::default();
    Ramp {
        warmup: message.warmup.unwrap_or(default.warmup),
        cooldown: message.cooldown.unwrap_or(default.cooldown),
        every: message.every.unwrap_or(default.every),
        shape: enum_field(
            message.shape,
            default.shape,
            |member| match member {
                pb::RampShape::Unspecified => None,
                pb::RampShape::Cubic => Some(RampShape::Cubic),
                pb::RampShape::OneShot => Some(RampShape::OneShot),
            },
            &below(path, "shape"),
            "RAMP_SHAPE_CUBIC or RAMP_SHAPE_ONE_SHOT",
            found,
        ),
    }
}

fn precision(message: pb::Precision, path: &str, found: &mut Violations) -> Precision {
    let default = Precision::default();
    Precision {
        compute: enum_field(
            message.compute,
            default.compute,
            |member| match member {
                pb::Compute::Unspecified => None,
                pb::Compute::F32 => Some(Compute::F32),
                pb::Compute::F64 => Some(Compute::F64),
                pb::Compute::Bf16 => Some(Compute::Bf16),
            },
            &below(path, "compute"),
            "COMPUTE_F32, COMPUTE_F64 or COMPUTE_BF16",
            found,
        ),
        storage: enum_field(
            message.storage,
            default.storage,
            |member| match member {
                pb::Storage::Unspecified => None,
                pb::Storage::F32 => Some(Storage::F32),
                pb::Storage::F64 => Some(Storage::F64),
                pb::Storage::Bf16 => Some(Storage::Bf16),
                pb::Storage::Int8 => Some(Storage::Int8),
                pb::Storage::Nf4 => Some(Storage::Nf4),
            },
            &below(path, "storage"),
            "STORAGE_F32, STORAGE_F64, STORAGE_BF16, STORAGE_INT8 or STORAGE_NF4",
            found,
        ),
    }
}

/// A count of the domain, whose checks keep it far below the bound.
fn narrow(count: usize) -> u32 {
    u32::try_from(count).unwrap_or(u32::MAX)
}

/// The recipe with every field set, so that whoever reads it needs to know no default.
#[must_use]
pub fn to_pb(recipe: &Recipe) -> pb::Recipe {
    pb::Recipe {
        seed: recipe.seed,
        steps: Some(recipe.steps),
        batch: Some(pb::Batch {
            window_tokens: Some(narrow(recipe.batch.window_tokens)),
            rows: Some(narrow(recipe.batch.rows)),
            micro_batches: Some(narrow(recipe.batch.micro_batches)),
        }),
        lora: Some(pb::Lora {
            rank: Some(narrow(recipe.lora.rank)),
            alpha: Some(recipe.lora.alpha),
            dropout: Some(recipe.lora.dropout),
        }),
        chain: recipe.chain.as_ref().map(|chain| pb::Chain {
            knots: chain.knots.clone(),
            warmup_steps: Some(chain.warmup_steps),
            settle_steps: Some(chain.settle_steps),
        }),
        optimizer: Some(pb::Optimizer {
            kind: Some(match recipe.optimizer {
                Optimizer::AdamW(adamw) => pb::optimizer::Kind::Adamw(pb::AdamW {
                    beta1: Some(adamw.beta1),
                    beta2: Some(adamw.beta2),
                    eps: Some(adamw.eps),
                    weight_decay: Some(adamw.weight_decay),
                }),
                Optimizer::LoraRite(rite) => pb::optimizer::Kind::LoraRite(pb::LoraRite {
                    beta1: Some(rite.beta1),
                    beta2: Some(rite.beta2),
                    eps: Some(rite.eps),
                    weight_decay: Some(rite.weight_decay),
                    escaped_mass: rite.escaped_mass,
                    guard: Some(rite.guard),
                    max_rms: Some(rite.max_rms.unwrap_or(0.0)),
                }),
            }),
        }),
        learning_rate: Some(pb::LearningRate {
            peak: Some(recipe.learning_rate.peak),
            warmup_steps: recipe.learning_rate.warmup_steps,
            decay: Some(
                match recipe.learning_rate.decay {
                    Decay::Cosine => pb::Decay::Cosine,
                    Decay::Linear => pb::Decay::Linear,
                    Decay::Constant => pb::Decay::Constant,
                }
                .into(),
            ),
            floor: recipe.learning_rate.floor,
            recovery: Some(
                match recipe.learning_rate.recovery {
                    Recovery::Continue => pb::Recovery::Continue,
                    Recovery::Hold => pb::Recovery::Hold,
                    Recovery::Restart => pb::Recovery::Restart,
                }
                .into(),
            ),
        }),
        max_grad_norm: Some(recipe.max_grad_norm.unwrap_or(0.0)),
        pruning: recipe.pruning.as_ref().map(pruning_to_pb),
        distillation: recipe.distillation.map(|Distillation { weight, top_k }| pb::Distillation {
            weight: Some(weight),
            top_k: Some(narrow(top_k)),
        }),
        precision: Some(pb::Precision {
            compute: Some(
                match recipe.precision.compute {
                    Compute::F32 => pb::Compute::F32,
                    Compute::F64 => pb::Compute::F64,
                    Compute::Bf16 => pb::Compute::Bf16,
                }
                .into(),
            ),
            storage: Some(
                match recipe.precision.storage {
                    Storage::F32 => pb::Storage::F32,
                    Storage::F64 => pb::Storage::F64,
                    Storage::Bf16 => pb::Storage::Bf16,
                    Storage::Int8 => pb::Storage::Int8,
                    Storage::Nf4 => pb::Storage::Nf4,
                }
                .into(),
            ),
        }),
        recompute: Some(
            match recipe.recompute {
                Recompute::None => pb::Recompute::None,
                Recompute::Layer => pb::Recompute::Layer,
            }
            .into(),
        ),
    }
}

fn pruning_to_pb(pruning: &Pruning) -> pb::Pruning {
    let criterion = match pruning.criterion {
        Criterion::LoraPrune { form: LoraPruneForm::Code } => pb::Criterion::LorapruneCode,
        Criterion::LoraPrune { form: LoraPruneForm::Paper } => pb::Criterion::LoraprunePaper,
        Criterion::Taylor => pb::Criterion::Taylor,
        Criterion::Magnitude => pb::Criterion::Magnitude,
        Criterion::Random => pb::Criterion::Random,
        Criterion::Wanda => pb::Criterion::Wanda,
        Criterion::Tangent => pb::Criterion::Tangent,
        Criterion::Flap => pb::Criterion::Flap,
    };
    let shape = match pruning.shape {
        Shape::Uniform => pb::Shape::Uniform,
        Shape::Paper => pb::Shape::Paper,
        Shape::Global => pb::Shape::Global,
    };
    let head_grouping = match pruning.head_grouping {
        HeadGrouping::KvGroups => pb::HeadGrouping::KvGroups,
        HeadGrouping::QueryHeads => pb::HeadGrouping::QueryHeads,
    };
    let shrink = match pruning.shrink {
        Shrink::Live => pb::Shrink::Live,
        Shrink::Never => pb::Shrink::Never,
    };
    pb::Pruning {
        criterion: Some(criterion.into()),
        moving_average_decay: Some(pruning.moving_average_decay),
        budget: Some(match pruning.budget {
            Budget::Sparsity(sparsity) => pb::pruning::Budget::Sparsity(sparsity),
            Budget::Parameters(parameters) => pb::pruning::Budget::Parameters(parameters),
        }),
        ramp: Some(pb::Ramp {
            warmup: Some(pruning.ramp.warmup),
            cooldown: Some(pruning.ramp.cooldown),
            every: Some(pruning.ramp.every),
            shape: Some(
                match pruning.ramp.shape {
                    RampShape::Cubic => pb::RampShape::Cubic,
                    RampShape::OneShot => pb::RampShape::OneShot,
                }
                .into(),
            ),
        }),
        shape: Some(shape.into()),
        head_grouping: Some(head_grouping.into()),
        protected_layers: match &pruning.protection {
            Protection::ByShape => None,
            Protection::Layers(layers) => {
                Some(pb::ProtectedLayers { layers: layers.iter().map(|&layer| narrow(layer)).collect() })
            }
        },
        channel_multiple: Some(narrow(pruning.channel_multiple)),
        serve_tp: pruning.serve_tp.iter().map(|&degree| narrow(degree)).collect(),
        shrink: Some(shrink.into()),
        compensation: Some(compensation_to_pb(pruning.compensation)),
        depth: pruning.depth.as_ref().map(depth_to_pb),
        calibration_windows: Some(narrow(pruning.calibration_windows)),
    }
}

fn compensation_to_pb(compensation: Compensation) -> pb::pruning::Compensation {
    match compensation {
        Compensation::None => pb::pruning::Compensation::NoCompensation(pb::NoCompensation {}),
        Compensation::LeastSquares(choice) => pb::pruning::Compensation::LeastSquares(pb::LeastSquares {
            windows: Some(narrow(choice.windows)),
            damping: Some(choice.damping),
            target: Some(
                match choice.target {
                    CompensationTarget::Layer => pb::CompensationTarget::Layer,
                    CompensationTarget::Stream => pb::CompensationTarget::Stream,
                }
                .into(),
            ),
        }),
    }
}
