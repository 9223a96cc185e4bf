//! What a run must be before it is taken: every field right, every path allowed and there, the plan possible.

use crate::exported::writing_problem;
use crate::records::StoredRun;
use checkpoint::{ModelFolder, export_form};
use model_spec::{Family, LayerSpec, ModelSpec};
use planner::{Device, Question, Refusal};
use pruning_run::{RunOptions, RunSetup};
use recipe::{Budget, FieldViolation, Shape};
use service_kit::Roots;
use sharding::Placement;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use wire::convert::plan::estimate_to_pb;
use wire::convert::{mask, recipe::field_of_message, run};
use wire::status::chain;
use wire::{EvaluationSpec, ExportSpec, InvalidFields, RunSpec, TaskSpec, TextSource, Violations, pb};

/// A run that may start.
#[derive(Debug)]
pub(crate) struct Admitted {
    pub(crate) setup: Arc<RunSetup>,
    pub(crate) plan: pb::RunPlan,
}

/// The field of CreateRunRequest that holds the spec.
const SPEC: &str = "spec";

/// The spec of a request, its own fields checked; what is wrong goes to `found`.
pub(crate) fn read_spec(message: Option<pb::RunSpec>, found: &mut Violations) -> RunSpec {
    run::from_pb(message, SPEC, found)
}

/// Holds a spec against the files and the model. Blocks on the file system.
///
/// # Errors
/// All that is wrong, what was found before included.
pub(crate) fn admit(
    spec: &RunSpec,
    roots: &Roots,
    blame_grace: Duration,
    device: &Device,
    stop_pruning: bool,
    mut found: Violations,
) -> Result<Admitted, InvalidFields> {
    check_sources(&spec.training_data, &format!("{SPEC}.training_data"), roots, &mut found);
    if let Some(evaluation) = &spec.evaluation {
        check_evaluation(evaluation, &format!("{SPEC}.evaluation"), roots, &mut found);
    }
    if let Some(tasks) = &spec.tasks {
        check_tasks(tasks, &format!("{SPEC}.tasks"), roots, &mut found);
    }
    if let Some(export) = &spec.export {
        check_output(export, &format!("{SPEC}.export"), roots, &mut found);
    }
    let setup = open_model(spec, roots, &mut found)
        .and_then(|dense| set_up(spec, dense, options(spec, blame_grace, stop_pruning), &mut found));
    found.finish(())?;
    let setup = setup.ok_or_else(|| InvalidFields {
        violations: vec![FieldViolation { field: SPEC.to_owned(), problem: "cannot be set up".to_owned() }],
    })?;
    let mut plan = plan(spec, &setup);
    plan.estimate = Some(estimated(spec, &setup, device, &plan.export_form)?);
    Ok(Admitted { setup: Arc::new(setup), plan })
}

/// What the run will take on `device`.
///
/// # Errors
/// When it cannot fit there, or its result cannot be exported.
fn estimated(
    spec: &RunSpec,
    setup: &RunSetup,
    device: &Device,
    export_form: &str,
) -> Result<pb::Estimate, InvalidFields> {
    let question = Question { dense: setup.dense(), recipe: &spec.recipe, tp_degree: spec.tp_degree, device };
    let refused = |refusals: Vec<Refusal>| {
        let violations = refusals.iter().map(|refusal| FieldViolation {
            field: format!("{SPEC}.{}", refusal.field()),
            problem: refusal.to_string(),
        });
        InvalidFields { violations: violations.collect() }
    };
    let estimate = planner::estimate(&question).map_err(refused)?;
    let cannot_export =
        export_form.strip_prefix("none: ").filter(|_| spec.export.is_some()).map(str::to_owned);
    match planner::refusals(&estimate, &spec.recipe, device.memory_bytes, cannot_export) {
        none if none.is_empty() => Ok(estimate_to_pb(&estimate)),
        found => Err(refused(found)),
    }
}

/// Files of text that are there and may be read; what is wrong goes to `found`.
fn check_sources(sources: &[TextSource], path: &str, roots: &Roots, found: &mut Violations) {
    for (place, source) in sources.iter().enumerate().filter(|(_, source)| !source.path.is_empty()) {
        if let Err(problem) = readable_file(&source.path, roots) {
            found.reject(format!("{path}[{place}].path"), problem);
        }
    }
}

/// A held-out text that can be read; what is wrong goes to `found`.
pub(crate) fn check_evaluation(spec: &EvaluationSpec, path: &str, roots: &Roots, found: &mut Violations) {
    check_sources(&spec.sources, &format!("{path}.sources"), roots, found);
}

/// Task files that are there and may be read; what is wrong goes to `found`.
pub(crate) fn check_tasks(spec: &TaskSpec, path: &str, roots: &Roots, found: &mut Violations) {
    for (place, file) in spec.files.iter().enumerate().filter(|(_, file)| !file.is_empty()) {
        if let Err(problem) = readable_file(file, roots) {
            found.reject(format!("{path}.files[{place}]"), problem);
        }
    }
}

/// A folder that may be written to and holds nothing, on a disk or in an object store; what is wrong goes to `found`.
pub(crate) fn check_output(spec: &ExportSpec, path: &str, roots: &Roots, found: &mut Violations) {
    if !spec.path.is_empty()
        && let Some(problem) = writing_problem(&spec.path, roots)
    {
        found.reject(format!("{path}.path"), problem);
    }
}

fn readable_file(path: &str, roots: &Roots) -> Result<(), String> {
    let real = roots.input(path).map_err(|refused| chain(&refused))?;
    let metadata = real.metadata().map_err(|cause| format!("`{path}` cannot be looked at: {cause}"))?;
    if !metadata.is_file() {
        return Err(format!("`{path}` is not a file"));
    }
    if metadata.len() == 0 {
        return Err(format!("`{path}` is empty"));
    }
    std::fs::File::open(&real).map(drop).map_err(|cause| format!("`{path}` cannot be read: {cause}"))
}

fn open_model(spec: &RunSpec, roots: &Roots, found: &mut Violations) -> Option<ModelSpec> {
    if spec.model.is_empty() {
        return None;
    }
    let opened = roots.input_folder(&spec.model).map_err(|refused| chain(&refused)).and_then(|real| {
        let folder = ModelFolder::open(Path::new(&real)).map_err(|error| chain(&error))?;
        folder.open_weights().map_err(|error| chain(&error))?;
        Ok(folder.spec().clone())
    });
    opened.map_err(|problem| found.reject(format!("{SPEC}.model"), problem)).ok()
}

/// What a stored run was admitted as.
///
/// # Errors
/// When this version of the program would not admit it any more.
pub(crate) fn setup_of(run: &StoredRun, blame_grace: Duration) -> Result<Arc<RunSetup>, String> {
    let stop_pruning = run.fork.as_ref().is_some_and(|fork| fork.stop_pruning);
    let options = options(&run.spec, blame_grace, stop_pruning);
    let setup = RunSetup::new(run.dense.clone(), run.spec.recipe.clone(), run.spec.tp_degree, options);
    setup.map(Arc::new).map_err(|error| {
        let fields = error.recipe.iter().map(ToString::to_string);
        let all: Vec<String> = fields.chain(error.placement.map(|error| error.to_string())).collect();
        all.join("; ")
    })
}

fn options(spec: &RunSpec, blame_grace: Duration, stop_pruning: bool) -> RunOptions {
    RunOptions {
        windows: spec.evaluation.as_ref().map_or(0, |evaluation| evaluation.windows.len()),
        tasks: spec.tasks.as_ref().map_or(0, |tasks| tasks.files.len()),
        exports: spec.export.is_some(),
        blame_grace,
        min_tp_degree: spec.min_tp_degree,
        checkpoint_every: spec.durability.checkpoint_every_steps,
        retention: spec.durability.retention,
        max_restarts: spec.durability.max_restarts,
        guard: spec.guard,
        stop_pruning,
    }
}

fn set_up(spec: &RunSpec, dense: ModelSpec, options: RunOptions, found: &mut Violations) -> Option<RunSetup> {
    let refuse_degree = |error: sharding::PlacementError, found: &mut Violations| {
        found.reject(format!("{SPEC}.tp_degree"), error.to_string());
    };
    if !spec.recipe.violations().is_empty() {
        // Noted when the message was read. What follows from them would only confuse.
        if let Err(error) = Placement::dense(&dense, spec.tp_degree) {
            refuse_degree(error, found);
        }
        return None;
    }
    match RunSetup::new(dense, spec.recipe.clone(), spec.tp_degree, options) {
        Ok(setup) => Some(setup),
        Err(error) => {
            let named = |violation: FieldViolation| FieldViolation {
                field: field_of_message(&violation.field, &spec.recipe),
                problem: violation.problem,
            };
            found.extend_below(&format!("{SPEC}.recipe"), error.recipe.into_iter().map(named));
            if let Some(error) = error.placement {
                refuse_degree(error, found);
            }
            None
        }
    }
}

fn plan(spec: &RunSpec, setup: &RunSetup) -> pb::RunPlan {
    let dense = setup.dense();
    let last = match setup.target() {
        Some(target) => target.counts_at(1.0),
        None => Some(dense.layers.clone()),
    };
    let summary = setup.target().map(pruning::Target::summary);
    let form = form(dense, last.as_deref());
    pb::RunPlan {
        dense_parameters: dense.parameter_count(),
        pruned_parameters: summary.map_or(dense.parameter_count(), |summary| summary.kept_parameters),
        sparsity: summary.map_or(0.0, |summary| summary.sparsity_of_projections),
        layers: last.iter().flatten().map(mask::widths_to_pb).collect(),
        pruning_steps: setup.pruning_steps().to_vec(),
        notes: notes(spec, setup, last.as_deref(), &form),
        export_form: form,
        estimate: None,
    }
}

/// How the result will be written. `last` is absent where the scores decide the widths.
fn form(dense: &ModelSpec, last: Option<&[LayerSpec]>) -> String {
    let padding = ", padded to the widest layer";
    let Some(last) = last else {
        return format!("llama, or mistral if its heads do not divide the hidden size{padding}");
    };
    let pruned = ModelSpec { layers: last.to_vec(), ..dense.clone() };
    match export_form(&pruned) {
        Ok(form) => {
            let name = match form.family {
                Family::Llama => "llama",
                Family::Mistral => "mistral",
            };
            format!("{name}{}", if form.padded { padding } else { "" })
        }
        Err(error) => format!("none: {}", chain(&error)),
    }
}

/// What a user should read before time is spent.
fn notes(spec: &RunSpec, setup: &RunSetup, last: Option<&[LayerSpec]>, form: &str) -> Vec<String> {
    let mut notes = Vec::new();
    let dense = setup.dense();
    if spec.recipe.steps == 0 && spec.recipe.pruning.is_some() {
        notes.push("`recipe.steps` is 0: nothing is tuned or pruned".to_owned());
    }
    if let (Some(pruning), Some(target)) = (&spec.recipe.pruning, setup.target()) {
        let summary = target.summary();
        if let Budget::Sparsity(asked) = pruning.budget
            && (summary.sparsity_of_prunable - asked).abs() > 5e-4
        {
            notes.push(format!(
                "{:.2} % of the prunable weights go instead of {:.2} %: whole groups and legal counts allow no closer",
                100.0 * summary.sparsity_of_prunable,
                100.0 * asked
            ));
        }
        if pruning.shape == Shape::Global {
            notes.push("the scores decide each layer's widths".to_owned());
        }
        if let [only] = setup.pruning_steps() {
            notes.push(format!(
                "everything goes at once, after step {only}; a longer run prunes step by step"
            ));
        }
    }
    if form.contains("padded") {
        notes.push(
            "layers of different widths are padded with zeros: the file and its cost in a stock server do not shrink \
             below the widest layer's"
                .to_owned(),
        );
    } else if form == "mistral" && dense.family == Family::Llama {
        let heads = last.and_then(|last| last.first()).map_or(0, |layer| layer.query_head_count);
        notes.push(format!(
            "{heads} heads do not divide the hidden size {}, which `llama` requires; `mistral` computes the same",
            dense.hidden_size
        ));
    }
    let window = spec.recipe.batch.window_tokens;
    if spec.recipe.steps > 0 && window > dense.max_position_embeddings {
        notes.push(format!(
            "windows of {window} tokens are longer than the {} positions that the model was made for",
            dense.max_position_embeddings
        ));
    }
    if spec.export.is_none() {
        notes.push("nothing is exported; ExportRun can do it afterwards".to_owned());
    }
    notes
}
