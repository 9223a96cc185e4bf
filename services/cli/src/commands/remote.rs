//! Commands that ask a running coordinator.

use crate::args::{
    CancelArgs, CreateArgs, DrainArgs, EvaluateArgs, ExportArgs, ForkArgs, ListArgs, MaskArgs, RemoteArgs,
    RunIdArgs, WatchArgs, WorkersArgs,
};
use crate::failure::{Failure, OrBadInput, from_status};
use crate::follow::follow;
use crate::measured::Measured;
use crate::out_folder::pretty;
use crate::output::{say, tell};
use crate::progress::Progress;
use crate::proto_json::{Named, to_json};
use crate::run_file::{Evaluation, Export, RunFile, Tasks};
use crate::{tables, telemetry, units};
use service_kit::telemetry::Telemetry;
use std::time::Duration;
use tonic::Status;
use tracing::{Instrument, info_span};
use wire::client::{Connection, RunClient, registry_client, run_client, within};
use wire::{limits, pb};

/// Measuring or writing a large model takes its time; the coordinator ends what hangs.
const LONG_CALL: Duration = Duration::from_secs(6 * 3600);
/// Runs asked for at a time.
const PAGE: u32 = 1000;

pub(super) async fn connect(remote: &RemoteArgs) -> Result<(Connection, Telemetry), Failure> {
    let telemetry = telemetry::to_stderr()?;
    // Not a flag: whoever lists the processes of a machine sees their arguments.
    let token = std::env::var("ESPALIER_TOKEN").ok();
    let security = remote.security.open(token.as_deref()).or_bad_input()?;
    Ok((security.connect(&remote.coordinator).await?, telemetry))
}

/// Prints the answer as JSON, or as `table` puts it.
pub(super) fn show<M: Named>(
    remote: &RemoteArgs,
    message: &M,
    table: impl FnOnce(&M) -> String,
) -> Result<(), Failure> {
    if remote.json {
        say(pretty(&to_json(message)?)?.trim_end());
    } else {
        say(table(message));
    }
    Ok(())
}

pub(super) fn refused(doing: &str) -> impl FnOnce(Status) -> Failure + '_ {
    move |status| from_status(doing, &status)
}

fn run_or_none(run: &Option<pb::Run>) -> String {
    run.as_ref().map_or_else(|| "no run".to_owned(), tables::run_table)
}

/// # Errors
/// When the file is wrong, or the coordinator refuses or cannot be reached.
pub(crate) async fn create(args: CreateArgs) -> Result<(), Failure> {
    let spec = RunFile::read(&args.file)?.to_spec();
    let (channel, _telemetry) = connect(&args.remote).await?;
    let mut client = run_client(channel);
    let request_id = args.request_id.unwrap_or_else(|| uuid::Uuid::new_v4().to_string());
    let message = pb::CreateRunRequest { spec: Some(spec), validate_only: args.validate_only, request_id };
    let response = client
        .create_run(within(limits::QUICK_CALL, message))
        .instrument(info_span!("create run"))
        .await
        .map_err(refused("the run cannot be made"))?
        .into_inner();
    let id = response.run.as_ref().map_or(String::new(), |run| run.id.clone());
    if args.watch {
        tell(format!("run {id}"));
        return watch_run(client, &id, 0, args.remote.json).await;
    }
    show(&args.remote, &response, |response| match &response.run {
        Some(run) if args.validate_only => tables::plan_table(&run.plan.clone().unwrap_or_default()),
        run => run_or_none(run),
    })
}

/// # Errors
/// When there is no such run or no coordinator.
pub(crate) async fn get(args: RunIdArgs) -> Result<(), Failure> {
    let (channel, _telemetry) = connect(&args.remote).await?;
    let request = within(limits::QUICK_CALL, pb::GetRunRequest { id: args.id });
    let response = run_client(channel).get_run(request).await.map_err(refused("the run cannot be shown"))?;
    show(&args.remote, &response.into_inner(), |response| run_or_none(&response.run))
}

/// # Errors
/// When there is no coordinator.
pub(crate) async fn list(args: ListArgs) -> Result<(), Failure> {
    let (channel, _telemetry) = connect(&args.remote).await?;
    let mut client = run_client(channel);
    let mut all = pb::ListRunsResponse::default();
    loop {
        let left = args.limit - u32::try_from(all.runs.len()).unwrap_or(args.limit).min(args.limit);
        if left == 0 {
            break;
        }
        let message = pb::ListRunsRequest {
            page_size: left.min(PAGE),
            page_token: std::mem::take(&mut all.next_page_token),
            filter: args.filter.clone(),
            order_by: args.order_by.clone(),
        };
        let request = within(limits::QUICK_CALL, message);
        let page =
            client.list_runs(request).await.map_err(refused("the runs cannot be listed"))?.into_inner();
        let is_last = page.next_page_token.is_empty() || page.runs.is_empty();
        all.runs.extend(page.runs);
        all.next_page_token = page.next_page_token;
        if is_last {
            break;
        }
    }
    show(&args.remote, &all, |all| tables::runs_table(&all.runs))
}

/// # Errors
/// When there is no such run, or the coordinator stays away for a minute.
pub(crate) async fn watch(args: WatchArgs) -> Result<(), Failure> {
    let (channel, _telemetry) = connect(&args.remote).await?;
    watch_run(run_client(channel), &args.id, args.from, args.remote.json).await
}

async fn watch_run(mut client: RunClient, id: &str, from: u64, json: bool) -> Result<(), Failure> {
    let request = within(limits::QUICK_CALL, pb::GetRunRequest { id: id.to_owned() });
    let run = client.get_run(request).await.map_err(refused("the run cannot be watched"))?.into_inner().run;
    let spec = run.and_then(|run| run.spec).unwrap_or_default();
    let steps = spec.recipe.and_then(|recipe| recipe.steps).unwrap_or(0);
    let mut last_state: Option<pb::StateChange> = None;
    let mut progress = (!json).then(|| Progress::new(steps));
    follow(&mut client, id, from, |event| {
        if let Some(pb::run_event::Kind::StateChange(change)) = &event.kind {
            last_state = Some(change.clone());
        }
        match &mut progress {
            Some(progress) => progress.event(event),
            None => say(to_json(event)?.to_string()),
        }
        Ok(())
    })
    .await?;
    drop(progress);
    let Some(change) = last_state else { return Ok(()) };
    let words = format!("the run {}: {}", tables::state_name(change.state()), change.message);
    if change.state() == pb::RunState::Succeeded {
        if !json {
            say(&words);
        }
        Ok(())
    } else {
        Err(Failure::failed(words))
    }
}

/// # Errors
/// When there is no such run, it cannot be paused any more, or there is no coordinator.
pub(crate) async fn pause(args: RunIdArgs) -> Result<(), Failure> {
    let (channel, _telemetry) = connect(&args.remote).await?;
    let request = within(limits::QUICK_CALL, pb::PauseRunRequest { id: args.id });
    let paused = run_client(channel).pause_run(request).await.map_err(refused("the run cannot be paused"))?;
    show_run(&args.remote, paused.into_inner().run)
}

/// # Errors
/// When there is no such run, it has ended, or there is no coordinator.
pub(crate) async fn resume(args: RunIdArgs) -> Result<(), Failure> {
    let (channel, _telemetry) = connect(&args.remote).await?;
    let request = within(limits::QUICK_CALL, pb::ResumeRunRequest { id: args.id });
    let resumed = run_client(channel).resume_run(request).await.map_err(refused("the run cannot go on"))?;
    show_run(&args.remote, resumed.into_inner().run)
}

/// # Errors
/// When there is no such run or no coordinator.
pub(crate) async fn cancel(args: CancelArgs) -> Result<(), Failure> {
    let (channel, _telemetry) = connect(&args.remote).await?;
    let message = pb::CancelRunRequest { id: args.id, discard: args.discard };
    let cancelled = run_client(channel)
        .cancel_run(within(limits::QUICK_CALL, message))
        .instrument(info_span!("cancel run"))
        .await
        .map_err(refused("the run cannot be cancelled"))?;
    show_run(&args.remote, cancelled.into_inner().run)
}

/// # Errors
/// When there is no such run, it has not ended, or there is no coordinator.
pub(crate) async fn delete(args: RunIdArgs) -> Result<(), Failure> {
    let (channel, _telemetry) = connect(&args.remote).await?;
    let request = within(limits::QUICK_CALL, pb::DeleteRunRequest { id: args.id.clone() });
    run_client(channel).delete_run(request).await.map_err(refused("the run cannot be deleted"))?;
    if !args.remote.json {
        say(format!("run {} is deleted", args.id));
    }
    Ok(())
}

/// # Errors
/// When there is no such decision, its checkpoint was not kept, or the new run cannot go on from there.
pub(crate) async fn fork(args: ForkArgs) -> Result<(), Failure> {
    let spec = args.file.as_deref().map(RunFile::read).transpose()?.map(|file| file.to_spec());
    let (channel, _telemetry) = connect(&args.remote).await?;
    let message = pb::ForkRunRequest {
        id: args.id,
        generation: args.generation,
        spec,
        stop_pruning: args.stop_pruning,
        validate_only: args.validate_only,
        request_id: args.request_id.unwrap_or_else(|| uuid::Uuid::new_v4().to_string()),
    };
    let forked = run_client(channel)
        .fork_run(within(limits::QUICK_CALL, message))
        .instrument(info_span!("fork run"))
        .await
        .map_err(refused("the run cannot be forked"))?;
    show_run(&args.remote, forked.into_inner().run)
}

/// # Errors
/// When there is no such worker or no coordinator.
pub(crate) async fn drain(args: DrainArgs) -> Result<(), Failure> {
    let (channel, _telemetry) = connect(&args.remote).await?;
    let request = within(limits::QUICK_CALL, pb::DrainWorkerRequest { worker_id: args.worker_id });
    let drained = registry_client(channel)
        .drain_worker(request)
        .await
        .map_err(refused("the worker cannot be drained"))?;
    let worker = drained.into_inner().worker.unwrap_or_default();
    show(&args.remote, &worker, |worker| tables::workers_table(std::slice::from_ref(worker)))
}

fn show_run(remote: &RemoteArgs, run: Option<pb::Run>) -> Result<(), Failure> {
    show(remote, &pb::GetRunResponse { run }, |response| run_or_none(&response.run))
}

/// # Errors
/// When the run has no exported model, no worker is idle, or the text is wrong.
pub(crate) async fn evaluate(args: EvaluateArgs) -> Result<(), Failure> {
    let (channel, _telemetry) = connect(&args.remote).await?;
    let message = pb::EvaluateRunRequest {
        id: args.id,
        evaluation: args.measure.evaluation().as_ref().map(Evaluation::to_pb),
        tasks: args.measure.tasks().as_ref().map(Tasks::to_pb),
    };
    let response = run_client(channel)
        .evaluate_run(within(LONG_CALL, message))
        .instrument(info_span!("evaluate run"))
        .await
        .map_err(refused("the run cannot be measured"))?;
    let response = response.into_inner();
    if args.remote.json {
        say(pretty(&to_json(&response)?)?.trim_end());
        return Ok(());
    }
    let evaluations = response.evaluation.into_iter().chain(response.more_evaluations).collect();
    Measured { evaluations, tasks: response.task_results }.show(false)
}

/// # Errors
/// When the run has not finished, no worker is idle, or the folder cannot be written.
pub(crate) async fn export(args: ExportArgs) -> Result<(), Failure> {
    let export = Export { path: Some(args.out), dtype: args.dtype, max_shard_bytes: args.max_shard_bytes };
    let (channel, _telemetry) = connect(&args.remote).await?;
    let message = pb::ExportRunRequest { id: args.id, export: Some(export.to_pb()) };
    let response = run_client(channel)
        .export_run(within(LONG_CALL, message))
        .instrument(info_span!("export run"))
        .await
        .map_err(refused("the run cannot be exported"))?;
    show(&args.remote, &response.into_inner(), |response| {
        let result = response.export_result.clone().unwrap_or_default();
        format!(
            "{}: {} parameters, {}, model type `{}`, largest logit difference {:.1e}",
            result.path,
            units::grouped(result.parameters),
            units::bytes(result.weight_bytes),
            result.model_type,
            result.max_logit_difference
        )
    })
}

/// # Errors
/// When there is no such run or no coordinator.
pub(crate) async fn decisions(args: RunIdArgs) -> Result<(), Failure> {
    let (channel, _telemetry) = connect(&args.remote).await?;
    let request = within(limits::QUICK_CALL, pb::ListDecisionsRequest { id: args.id });
    let response = run_client(channel)
        .list_decisions(request)
        .await
        .map_err(refused("the decisions cannot be listed"))?;
    show(&args.remote, &response.into_inner(), |response| tables::decisions_table(&response.decisions))
}

/// # Errors
/// When there is no such run or decision, or no coordinator.
pub(crate) async fn mask(args: MaskArgs) -> Result<(), Failure> {
    let (channel, _telemetry) = connect(&args.remote).await?;
    let message = pb::GetKeepMaskRequest { id: args.id, generation: args.generation };
    let response = run_client(channel)
        .get_keep_mask(within(limits::QUICK_CALL, message))
        .await
        .map_err(refused("the mask cannot be shown"))?;
    show(&args.remote, &response.into_inner(), |response| {
        tables::mask_table(&response.keep_mask.clone().unwrap_or_default())
    })
}

/// # Errors
/// When there is no coordinator.
pub(crate) async fn workers(args: WorkersArgs) -> Result<(), Failure> {
    let (channel, _telemetry) = connect(&args.remote).await?;
    let request = within(limits::QUICK_CALL, pb::ListWorkersRequest {});
    let response = registry_client(channel)
        .list_workers(request)
        .await
        .map_err(refused("the workers cannot be listed"))?;
    show(&args.remote, &response.into_inner(), |response| tables::workers_table(&response.workers))
}
