//! `RunSpec` and `ExportSpec`.

use super::{below, bounded_text, count_field, data, enum_field, recipe, required_text};
use crate::fields::{InvalidFields, Violations};
use crate::{ExportDtype, ExportSpec, RunSpec, limits, pb};

const DEFAULT_MAX_SHARD_BYTES: u64 = 5 << 30;

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
    RunSpec {
        model: message.model,
        training_data: data::sources_from_pb(message.training_data, &at("training_data"), found),
        recipe,
        tp_degree: count_field(message.tp_degree, 1, limits::MAX_TP_DEGREE, &at("tp_degree"), found),
        evaluation: message.evaluation.map(|spec| data::evaluation_from_pb(spec, &at("evaluation"), found)),
        tasks: message.tasks.map(|spec| data::tasks_from_pb(spec, &at("tasks"), found)),
        export: message.export.map(|spec| export_from_pb(spec, &at("export"), found)),
        display_name: message.display_name,
    }
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
