//! `RunSpec` and `ExportSpec`.

use super::{below, bounded_text, count_field, data, enum_field, recipe, required_text};
use crate::fields::{InvalidFields, Violations};
use crate::{Durability, ExportDtype, ExportSpec, RunSpec, limits, pb};
use pruning_run::{Guard, GuardAction, GuardBound, Retention};

const DEFAULT_MAX_SHARD_BYTES: u64 = 5 << 30;
const DEFAULT_CHECKPOINT_EVERY: u32 = 25;
const DEFAULT_KEEP_LAST: u32 = 2;
const DEFAULT_MAX_RESTARTS: u32 = 3;
const MOST_KEPT: u32 = 1000;
const MOST_RESTARTS: u32 = 1000;

/// A run's spec that has passed every check that needs no file, defaults filled in. Paths of violations are relative to
/// the spec, such as `recipe.pruning.shape`.
///
/// # Errors
/// Names every field that is wrong.
pub fn checked(message: Option<pb::RunSpec>) -> Result<RunSpec, InvalidFields> {
    let mut found = Violations::default();
    let spec = from_pb(message, "", &mut found);
    found.finish(spec)
}

/// See [`checked`]; what is wrong goes to `found`.
pub fn from_pb(message: Option<pb::RunSpec>, path: &str, found: &mut Violations) -> RunSpec {
    let at = |field: &str| below(path, field);
    let message = message.unwrap_or_default();
    required_text(&message.model, &at("model"), "a Hugging Face model folder", found);
    bounded_text(&message.display_name, &at("display_name"), found);
    bounded_text(&message.worker_pool, &at("worker_pool"), found);
    let recipe = recipe::from_pb(message.recipe, &at("recipe"), found);
    if message.training_data.is_empty() && recipe.steps > 0 {
        found.reject(
            at("training_data"),
            format!(
                "must name at least one file to take {} steps on; or set `recipe.steps` to 0",
                recipe.steps
            ),
        );
    }
    let training_data = data::sources_from_pb(message.training_data, &at("training_data"), found);
    let tp_degree = count_field(message.tp_degree, 1, limits::MAX_TP_DEGREE, &at("tp_degree"), found);
    let min_tp_degree =
        count_field(message.min_tp_degree, tp_degree, limits::MAX_TP_DEGREE, &at("min_tp_degree"), found);
    if min_tp_degree > tp_degree {
        found.reject(
            at("min_tp_degree"),
            format!("must not exceed `tp_degree` {tp_degree}; got {min_tp_degree}"),
        );
    }
    let durability = durability_from_pb(message.durability.unwrap_or_default(), &at("durability"), found);
    let guard = message.guard.and_then(|guard| guard_from_pb(guard, &at("guard"), found));
    if guard.is_some() && message.evaluation.is_none() {
        found.reject(at("guard"), "needs `evaluation`: the held-out text that it measures");
    }
    if guard.is_some_and(|guard| guard.action == GuardAction::Revert) && !durability.retention.decisions {
        found.reject(
            at("durability.forget_decisions"),
            "must not be set where `guard.action` is GUARD_ACTION_REVERT",
        );
    }
    RunSpec {
        model: message.model,
        training_data,
        recipe,
        tp_degree,
        evaluation: message.evaluation.map(|spec| data::evaluation_from_pb(spec, &at("evaluation"), found)),
        tasks: message.tasks.map(|spec| data::tasks_from_pb(spec, &at("tasks"), found)),
        export: message.export.map(|spec| export_from_pb(spec, &at("export"), found)),
        display_name: message.display_name,
        min_tp_degree,
        worker_pool: message.worker_pool,
        durability,
        guard,
    }
}

fn durability_from_pb(message: pb::DurabilitySpec, path: &str, found: &mut Violations) -> Durability {
    let at = |field: &str| below(path, field);
    let most_steps = u32::try_from(limits::MAX_STEPS).unwrap_or(u32::MAX);
    let every = at("checkpoint_every_steps");
    let last = at("keep_last");
    let max_restarts = message.max_restarts.unwrap_or(DEFAULT_MAX_RESTARTS);
    if max_restarts > MOST_RESTARTS {
        found.reject(at("max_restarts"), format!("must not exceed {MOST_RESTARTS}; got {max_restarts}"));
    }
    Durability {
        checkpoint_every_steps: count_field(
            message.checkpoint_every_steps,
            DEFAULT_CHECKPOINT_EVERY as usize,
            most_steps,
            &every,
            found,
        ) as u64,
        retention: Retention {
            last: count_field(message.keep_last, DEFAULT_KEEP_LAST as usize, MOST_KEPT, &last, found),
            decisions: !message.forget_decisions,
        },
        max_restarts,
    }
}

fn guard_from_pb(message: pb::QualityGuard, path: &str, found: &mut Violations) -> Option<Guard> {
    let at = |field: &str| below(path, field);
    let action = match pb::GuardAction::try_from(message.action) {
        Ok(pb::GuardAction::Hold) => Some(GuardAction::Hold),
        Ok(pb::GuardAction::Revert) => Some(GuardAction::Revert),
        Ok(pb::GuardAction::Unspecified) | Err(_) => {
            found.reject(at("action"), "must be GUARD_ACTION_HOLD or GUARD_ACTION_REVERT");
            None
        }
    };
    let (field, value, bound) = match message.bound {
        None => {
            found.reject(path, "needs a bound: `max_perplexity` or `max_ratio`");
            return None;
        }
        Some(pb::quality_guard::Bound::MaxPerplexity(most)) => {
            ("max_perplexity", most, GuardBound::Perplexity(most))
        }
        Some(pb::quality_guard::Bound::MaxRatio(most)) => ("max_ratio", most, GuardBound::Ratio(most)),
    };
    if !value.is_finite() || value < 1.0 {
        found.reject(at(field), format!("must be a number of at least 1; got {value}"));
    }
    Some(Guard { bound, action: action? })
}

/// Where and how a model is written; what is wrong goes to `found`.
pub fn export_from_pb(message: pb::ExportSpec, path: &str, found: &mut Violations) -> ExportSpec {
    let at = |field: &str| below(path, field);
    required_text(&message.path, &at("path"), "a folder below one of the workers' roots", found);
    let max_shard_bytes = message.max_shard_bytes.unwrap_or(DEFAULT_MAX_SHARD_BYTES);
    if max_shard_bytes == 0 {
        found.reject(at("max_shard_bytes"), "must be at least 1; leave it out for 5 GiB");
    }
    ExportSpec {
        path: message.path,
        dtype: enum_field(
            message.dtype,
            ExportDtype::Source,
            |member| match member {
                pb::ExportDtype::Unspecified => None,
                pb::ExportDtype::Source => Some(ExportDtype::Source),
                pb::ExportDtype::Bf16 => Some(ExportDtype::Bf16),
                pb::ExportDtype::F16 => Some(ExportDtype::F16),
                pb::ExportDtype::F32 => Some(ExportDtype::F32),
            },
            &at("dtype"),
            "EXPORT_DTYPE_SOURCE, EXPORT_DTYPE_BF16, EXPORT_DTYPE_F16 or EXPORT_DTYPE_F32",
            found,
        ),
        max_shard_bytes,
    }
}

/// The spec with every field set.
#[must_use]
pub fn to_pb(spec: &RunSpec) -> pb::RunSpec {
    pb::RunSpec {
        model: spec.model.clone(),
        training_data: data::sources_to_pb(&spec.training_data),
        recipe: Some(recipe::to_pb(&spec.recipe)),
        tp_degree: Some(u32::try_from(spec.tp_degree).unwrap_or(u32::MAX)),
        evaluation: spec.evaluation.as_ref().map(data::evaluation_to_pb),
        tasks: spec.tasks.as_ref().map(data::tasks_to_pb),
        export: spec.export.as_ref().map(export_to_pb),
        display_name: spec.display_name.clone(),
        min_tp_degree: Some(u32::try_from(spec.min_tp_degree).unwrap_or(u32::MAX)),
        worker_pool: spec.worker_pool.clone(),
        durability: Some(durability_to_pb(&spec.durability)),
        guard: spec.guard.as_ref().map(guard_to_pb),
    }
}

fn durability_to_pb(spec: &Durability) -> pb::DurabilitySpec {
    pb::DurabilitySpec {
        checkpoint_every_steps: Some(u32::try_from(spec.checkpoint_every_steps).unwrap_or(u32::MAX)),
        keep_last: Some(u32::try_from(spec.retention.last).unwrap_or(u32::MAX)),
        forget_decisions: !spec.retention.decisions,
        max_restarts: Some(spec.max_restarts),
    }
}

fn guard_to_pb(guard: &Guard) -> pb::QualityGuard {
    pb::QualityGuard {
        bound: Some(match guard.bound {
            GuardBound::Perplexity(most) => pb::quality_guard::Bound::MaxPerplexity(most),
            GuardBound::Ratio(most) => pb::quality_guard::Bound::MaxRatio(most),
        }),
        action: action_to_pb(guard.action).into(),
    }
}

#[must_use]
pub fn action_to_pb(action: GuardAction) -> pb::GuardAction {
    match action {
        GuardAction::Hold => pb::GuardAction::Hold,
        GuardAction::Revert => pb::GuardAction::Revert,
    }
}

#[must_use]
pub fn export_to_pb(spec: &ExportSpec) -> pb::ExportSpec {
    let dtype = match spec.dtype {
        ExportDtype::Source => pb::ExportDtype::Source,
        ExportDtype::Bf16 => pb::ExportDtype::Bf16,
        ExportDtype::F16 => pb::ExportDtype::F16,
        ExportDtype::F32 => pb::ExportDtype::F32,
    };
    pb::ExportSpec {
        path: spec.path.clone(),
        dtype: Some(dtype.into()),
        max_shard_bytes: Some(spec.max_shard_bytes),
    }
}
