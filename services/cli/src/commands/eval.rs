use crate::args::EvalArgs;
use crate::failure::Failure;
use crate::interrupts::Interrupts;
use crate::local_cluster::ClusterOptions;
use crate::local_run::run_locally;
use crate::measured::Measured;
use crate::progress::Progress;
use crate::run_file::RunFile;
use crate::{local_paths, telemetry};
use anyhow::Context;
use recipe::Recipe;
use wire::pb::run_event::Kind;

/// # Errors
/// When the input is wrong, or the measurement fails or is interrupted.
pub(crate) async fn run(args: EvalArgs) -> Result<(), Failure> {
    let (model, _) = local_paths::model(&args.model)?;
    let (mut evaluation, mut tasks) = (args.measure.evaluation(), args.measure.tasks());
    let (texts, task_files) = (
        evaluation.as_mut().map_or_else(Default::default, |evaluation| evaluation.data.as_mut_slice()),
        tasks.as_mut().map_or_else(Default::default, |tasks| tasks.files.as_mut_slice()),
    );
    local_paths::texts(texts)?;
    local_paths::tasks(task_files)?;
    let files = texts.iter().map(|file| file.path.as_path()).chain(task_files.iter().map(AsRef::as_ref));
    let mut roots = local_paths::roots(&model, files);
    let scratch = tempfile::tempdir().context("failed to create a folder for logs")?;
    let scratch_path = scratch.path().canonicalize().context("failed to find the folder for logs")?;
    let _telemetry = telemetry::to_file(&scratch_path.join("coordinator.log"))?;
    roots.insert(scratch_path.clone());
    let interrupts = Interrupts::listen()?;
    let options = ClusterOptions {
        worker_count: args.workers,
        threads: args.threads,
        device: args.device.clone(),
        roots,
        logs: scratch_path.clone(),
        state: scratch_path.join("state"),
    };
    let file = RunFile {
        name: "eval".into(),
        model: Some(model),
        recipe: Recipe { steps: 0, pruning: None, ..Recipe::default() },
        workers: Some(args.workers),
        evaluation,
        tasks,
        ..RunFile::default()
    };
    let mut progress = Progress::new(0);
    let mut measured = Measured::default();
    let result = run_locally(file.to_spec(), &options, interrupts, &mut progress, |event| {
        match &event.kind {
            Some(Kind::Evaluation(evaluation)) => measured.evaluations.push(evaluation.clone()),
            Some(Kind::Task(result)) => measured.tasks.push(result.clone()),
            Some(
                Kind::StateChange(_)
                | Kind::Step(_)
                | Kind::Decision(_)
                | Kind::Export(_)
                | Kind::Checkpoint(_)
                | Kind::Restart(_)
                | Kind::Guard(_)
                | Kind::Calibration(_),
            )
            | None => {}
        }
        Ok(())
    })
    .await;
    progress.finish();
    if let Some(failure) = result?.failure {
        return Err(failure);
    }
    if measured.is_empty() {
        return Err(Failure::failed("the run ended without a measurement"));
    }
    measured.show(args.json)
}
