use crate::args::EvalArgs;
use crate::failure::Failure;
use crate::interrupts::Interrupts;
use crate::local_cluster::ClusterOptions;
use crate::local_run::run_locally;
use crate::out_folder::pretty;
use crate::output::say;
use crate::progress::Progress;
use crate::run_file::{Evaluation, RunFile, TextFile};
use crate::{local_paths, proto_json, telemetry, units};
use anyhow::Context;
use recipe::Recipe;
use std::time::Duration;

/// # Errors
/// When the input is wrong, or the measurement fails or is interrupted.
pub(crate) async fn run(args: EvalArgs) -> Result<(), Failure> {
    let (model, _) = local_paths::model(&args.model)?;
    let file = |path: &std::path::PathBuf| TextFile {
        path: path.clone(),
        field: args.data_field.clone(),
        format: args.data_format,
    };
    let mut data: Vec<TextFile> = args.data.iter().map(file).collect();
    local_paths::texts(&mut data)?;
    let scratch = tempfile::tempdir().context("failed to create a folder for logs")?;
    let scratch_path = scratch.path().canonicalize().context("failed to find the folder for logs")?;
    let _telemetry = telemetry::to_file(&scratch_path.join("coordinator.log"))?;
    let mut roots = local_paths::roots(&model, data.iter());
    roots.insert(scratch_path.clone());
    let interrupts = Interrupts::listen()?;
    let options = ClusterOptions {
        worker_count: args.workers,
        threads: args.threads,
        roots,
        logs: scratch_path.clone(),
        state: scratch_path.join("state"),
    };
    let file = RunFile {
        name: "eval".into(),
        model: Some(model),
        recipe: Recipe { steps: 0, pruning: None, ..Recipe::default() },
        workers: Some(args.workers),
        evaluation: Some(Evaluation {
            data,
            window_tokens: args.window,
            mode: args.mode,
            max_tokens: args.max_tokens,
            rows: args.rows,
        }),
        ..RunFile::default()
    };
    let mut progress = Progress::new(0);
    let result = run_locally(file.to_spec(), &options, interrupts, &mut progress, |_| Ok(())).await;
    progress.finish();
    let local = result?;
    if let Some(failure) = local.failure {
        return Err(failure);
    }
    let evaluation =
        local.run.evaluations.last().ok_or_else(|| Failure::failed("the run ended without a measurement"))?;
    if args.json {
        say(pretty(&proto_json::to_json(evaluation)?)?.trim_end());
    } else {
        say(format!("perplexity         {:.4}", evaluation.perplexity));
        say(format!("predicted tokens   {}", units::grouped(evaluation.predicted_tokens)));
        let took = units::duration(Duration::from_secs_f64(evaluation.seconds.max(0.0)));
        say(format!("took               {took}"));
    }
    Ok(())
}
