use crate::args::PruneArgs;
use crate::failure::Failure;
use crate::interrupts::Interrupts;
use crate::local_cluster::ClusterOptions;
use crate::local_run::{LocalRun, plan_locally, run_locally};
use crate::out_folder::OutFolder;
use crate::output::say;
use crate::progress::Progress;
use crate::report::{History, Removals};
use crate::run_file::{Evaluation, Export, RunFile};
use crate::{local_paths, tables, telemetry, units};
use anyhow::Context;
use model_spec::ModelSpec;
use std::path::PathBuf;
use std::time::Duration;
use wire::pb;

/// A run on this machine, checked as far as that goes without starting anything.
struct Job {
    file: RunFile,
    model: PathBuf,
    dense: ModelSpec,
}

/// # Errors
/// When the input is wrong, the run fails or is interrupted.
pub(crate) async fn run(args: PruneArgs) -> Result<(), Failure> {
    let job = job(&args)?;
    if args.dry_run {
        return dry_run(&args, job).await;
    }
    let out = args.out.as_deref().ok_or_else(|| Failure::bad_input("--out is required"))?;
    let mut folder = OutFolder::create(out)?;
    let _telemetry = telemetry::to_file(&folder.logs().join("coordinator.log"))?;
    let interrupts = Interrupts::listen()?;
    let mut file = job.file.clone();
    file.export.get_or_insert_with(Export::default).path = Some(folder.model());
    let mut options = options(&args, &job, folder.logs(), folder.state());
    options.roots.insert(folder.root().to_owned());

    let mut progress = Progress::new(file.recipe.steps);
    let mut history = History::default();
    let result = run_locally(file.to_spec(), &options, interrupts, &mut progress, |event| {
        history.note(event);
        folder.note_event(event)
    })
    .await;
    progress.finish();
    let LocalRun { run, masks, failure } = result?;
    history.run = Some(run);
    history.removals = removals(&job.dense, &masks);
    let report = folder.finish(&history)?;
    if let Some(failure) = failure {
        return Err(failure.with_note(&format!("what was recorded is in `{}`", folder.root().display())));
    }
    if let Some(table) = tables::summary_table(&history) {
        say(table);
    }
    say(closing_words(&history, &report));
    Ok(())
}

fn closing_words(history: &History, report: &std::path::Path) -> String {
    let mut lines = Vec::new();
    if let Some(peak) = history.peak_memory_bytes() {
        lines.push(format!("peak memory      {} on the fullest worker", units::bytes(peak)));
    }
    if !history.decisions.is_empty() {
        lines.push(format!(
            "sparsity         {} of the projection weights",
            units::percent(history.final_sparsity())
        ));
    }
    lines
        .push(format!("took             {}", units::duration(Duration::from_secs_f64(history.wall_seconds))));
    if let Some(result) = &history.export {
        lines.push(format!(
            "pruned model     {}  ({} weights, model type `{}`)",
            result.path,
            units::bytes(result.weight_bytes),
            result.model_type
        ));
        lines.push(format!(
            "reload check     largest logit difference {:.1e}, {}",
            result.max_logit_difference,
            crate::report::summary::check_words(result)
        ));
    }
    lines.push(format!("report           {}", report.display()));
    lines.join("\n")
}

async fn dry_run(args: &PruneArgs, job: Job) -> Result<(), Failure> {
    let _telemetry = telemetry::to_stderr()?;
    let mut file = job.file.clone();
    let mut out_root = None;
    if let Some(out) = &args.out {
        // Not created: only named, below the nearest folder that is there.
        let absolute = std::path::absolute(out).map_err(|error| Failure::bad_input(error.to_string()))?;
        let full = absolute.read_dir().is_ok_and(|mut entries| entries.next().is_some());
        if full {
            return Err(Failure::bad_input(format!("the output folder `{}` is not empty", out.display())));
        }
        let existing = absolute.ancestors().find(|folder| folder.is_dir());
        let real = existing.and_then(|folder| folder.canonicalize().ok());
        if let (Some(existing), Some(real)) = (existing, real) {
            let rest = absolute.strip_prefix(existing).unwrap_or(&absolute);
            file.export.get_or_insert_with(Export::default).path = Some(real.join(rest).join("model"));
            out_root = Some(real);
        }
    } else {
        file.export = None;
    }
    let scratch = tempfile::tempdir().context("failed to create a temporary folder")?;
    let scratch_path = scratch.path().canonicalize().context("failed to find the temporary folder")?;
    let mut options = options(args, &job, scratch_path.clone(), scratch_path.join("state"));
    options.roots.insert(scratch_path);
    options.roots.extend(out_root);
    let run = plan_locally(file.to_spec(), &options).await?;
    say(tables::plan_table(&run.plan.unwrap_or_default()));
    Ok(())
}

fn job(args: &PruneArgs) -> Result<Job, Failure> {
    let mut file = match &args.recipe {
        Some(path) => RunFile::read(path)?,
        None => RunFile::default(),
    };
    args.recipe_flags.apply(&mut file.recipe);
    if let Some(model) = &args.model {
        file.model = Some(model.clone());
    }
    if !args.text.data.is_empty() {
        file.data = args.text.files(&args.text.data);
    }
    if let Some(workers) = args.workers {
        file.workers = Some(workers);
    }
    let workers = *file.workers.get_or_insert(1);
    if workers == 0 {
        return Err(Failure::bad_input("`workers` must be at least 1"));
    }
    let says_evaluation = !args.eval_data.is_empty()
        || args.eval_window.is_some()
        || args.eval_max_tokens.is_some()
        || args.eval_mode.is_some();
    if says_evaluation {
        let evaluation = file.evaluation.get_or_insert_with(Evaluation::default);
        if !args.eval_data.is_empty() {
            evaluation.data = args.text.files(&args.eval_data);
        }
        evaluation.window_tokens = args.eval_window.unwrap_or(evaluation.window_tokens);
        evaluation.max_tokens = args.eval_max_tokens.unwrap_or(evaluation.max_tokens);
        evaluation.mode = args.eval_mode.unwrap_or(evaluation.mode);
        if evaluation.data.is_empty() {
            return Err(Failure::bad_input(
                "--eval-window, --eval-max-tokens and --eval-mode need --eval-data",
            ));
        }
    }
    if let Some(dtype) = args.export_dtype {
        file.export.get_or_insert_with(Export::default).dtype = dtype;
    }
    if file.data.is_empty() && file.recipe.steps > 0 {
        return Err(Failure::bad_input(
            "there is no text to tune on: name it with --data, or in the run file",
        ));
    }
    let violations = file.recipe.violations();
    if !violations.is_empty() {
        let lines: Vec<String> = violations.iter().map(|violation| format!("\n  {violation}")).collect();
        return Err(Failure::bad_input(format!("the recipe is not sound:{}", lines.concat())));
    }
    let folder = file.model.clone().ok_or_else(|| Failure::bad_input("no model is named: use --model"))?;
    let (model, dense) = local_paths::model(&folder)?;
    file.model = Some(model.clone());
    local_paths::texts(&mut file.data)?;
    if let Some(evaluation) = &mut file.evaluation {
        local_paths::texts(&mut evaluation.data)?;
    }
    if let Some(tasks) = &mut file.tasks {
        local_paths::tasks(&mut tasks.files)?;
    }
    if file.name.is_empty() {
        file.name = model.file_name().map_or(String::new(), |name| name.to_string_lossy().into_owned());
    }
    Ok(Job { file, model, dense })
}

fn options(args: &PruneArgs, job: &Job, logs: PathBuf, state: PathBuf) -> ClusterOptions {
    let evaluated = job.file.evaluation.iter().flat_map(|evaluation| &evaluation.data);
    let texts = job.file.data.iter().chain(evaluated).map(|file| file.path.as_path());
    let tasks = job.file.tasks.iter().flat_map(|tasks| &tasks.files).map(PathBuf::as_path);
    let roots = local_paths::roots(&job.model, texts.chain(tasks));
    ClusterOptions {
        worker_count: job.file.workers.unwrap_or(1),
        threads: args.threads,
        device: args.device.clone(),
        roots,
        logs,
        state,
    }
}

fn removals(dense: &ModelSpec, masks: &[(u64, pb::KeepMask)]) -> Option<Removals> {
    let mut removals = Removals::none(&dense.layers);
    for (generation, mask) in masks {
        removals.note(*generation, mask);
    }
    (!masks.is_empty()).then_some(removals)
}
