//! One run on a cluster of our own: created, followed, cancelled when told, and everything ended afterwards.

use crate::failure::{Failure, from_status};
use crate::follow::follow;
use crate::interrupts::Interrupts;
use crate::local_cluster::{ClusterOptions, LocalCluster};
use crate::progress::Progress;
use crate::tables::state_name;
use std::time::Duration;
use tokio::time::timeout;
use wire::client::{RunClient, within};
use wire::{limits, pb};

/// How long a cancelled run may take to end: one step, at most, and the workers' goodbyes.
const CANCEL_DEADLINE: Duration = Duration::from_secs(30);
/// How long a run may go on after one of its workers has died.
const WORKER_LOSS_DEADLINE: Duration = Duration::from_secs(20);

/// How long to look for a dead worker behind a failed run.
const ENDED_WORKER_GRACE: Duration = Duration::from_millis(300);

/// Why a run stopped being followed.
enum End {
    Ended,
    Failed(Failure),
    Interrupted,
    WorkerLost(Failure),
}

/// What a run on this machine left behind, whether it ended well or not.
pub(crate) struct LocalRun {
    pub run: pb::Run,
    /// Keep masks by generation, from the first.
    pub masks: Vec<(u64, pb::KeepMask)>,
    /// Why it did not succeed.
    pub failure: Option<Failure>,
}

/// Workers of a cluster of our own do not come back, so a run that has lost one ends.
fn without_restarts(mut spec: pb::RunSpec) -> pb::RunSpec {
    spec.durability.get_or_insert_default().max_restarts.get_or_insert(0);
    spec
}

/// Runs `spec` to its end and hands each event to `each`. A second signal kills the workers.
///
/// # Errors
/// When the run could not be created, or nothing is known of how it ended.
pub(crate) async fn run_locally(
    spec: pb::RunSpec,
    options: &ClusterOptions,
    mut interrupts: Interrupts,
    progress: &mut Progress,
    mut each: impl FnMut(&pb::RunEvent) -> Result<(), Failure>,
) -> Result<LocalRun, Failure> {
    let spec = without_restarts(spec);
    let mut cluster = LocalCluster::start(options).await?;
    // A run that cannot be is refused before any worker is started.
    create(&mut cluster.client, spec.clone(), true).await?;
    progress.phase("starting the workers");
    tokio::select! {
        started = cluster.start_workers(options) => started?,
        () = interrupts.reach(1) => {
            cluster.kill().await;
            return Err(Failure::Interrupted("the run was not started".into()));
        }
    }
    let mut insisting = interrupts.clone();
    let outcome = tokio::select! {
        outcome = drive(&mut cluster, spec, &mut interrupts, progress, &mut each) => outcome,
        () = insisting.reach(2) => {
            cluster.kill().await;
            return Err(Failure::Interrupted("the workers were killed".into()));
        }
    };
    tokio::select! {
        () = cluster.stop() => {}
        // Dropping what stops them kills the workers that still run.
        () = insisting.reach(2) => {}
    }
    outcome
}

/// Checks `spec` on a coordinator of our own, without workers.
///
/// # Errors
/// When the spec is refused.
pub(crate) async fn plan_locally(spec: pb::RunSpec, options: &ClusterOptions) -> Result<pb::Run, Failure> {
    let mut cluster = LocalCluster::start(options).await?;
    let result = create(&mut cluster.client, spec, true).await;
    cluster.stop().await;
    result
}

/// The run's trace begins here and goes on in the coordinator and the workers.
#[tracing::instrument(name = "create run", skip_all)]
async fn create(client: &mut RunClient, spec: pb::RunSpec, validate_only: bool) -> Result<pb::Run, Failure> {
    let request_id = uuid::Uuid::new_v4().to_string();
    let message = pb::CreateRunRequest { spec: Some(spec), validate_only, request_id };
    let response = client
        .create_run(within(limits::QUICK_CALL, message))
        .await
        .map_err(|status| from_status("the run cannot be made", &status))?;
    response.into_inner().run.ok_or_else(|| Failure::failed("the coordinator answered without a run"))
}

async fn drive(
    cluster: &mut LocalCluster,
    spec: pb::RunSpec,
    interrupts: &mut Interrupts,
    progress: &mut Progress,
    each: &mut impl FnMut(&pb::RunEvent) -> Result<(), Failure>,
) -> Result<LocalRun, Failure> {
    let mut client = cluster.client.clone();
    let id = create(&mut client, spec, false).await?.id;
    let mut seen = 0;
    let end = {
        let following = follow(&mut client, &id, 0, |event| {
            seen = event.revision;
            progress.event(event);
            each(event)
        });
        tokio::pin!(following);
        tokio::select! {
            result = &mut following => match result {
                Ok(()) => End::Ended,
                Err(failure) => End::Failed(failure),
            },
            () = interrupts.reach(1) => End::Interrupted,
            lost = cluster.worker_ended() => {
                // The coordinator notices too, and its words are better: wait for them a little.
                match timeout(WORKER_LOSS_DEADLINE, &mut following).await {
                    Ok(_) | Err(_) => End::WorkerLost(lost),
                }
            }
        }
    };
    let failure = match end {
        End::Ended => None,
        End::Failed(failure) | End::WorkerLost(failure) => Some(failure),
        End::Interrupted => {
            progress.phase("cancelling the run; Ctrl-C again kills the workers");
            Some(Failure::Interrupted("the run was cancelled".into()))
        }
    };
    if failure.is_some() {
        cancel(&mut client, &id, seen, &mut |event| {
            progress.event(event);
            each(event)
        })
        .await;
    }
    let run = get(&mut client, &id).await?;
    let failure = verdict(&run, failure, cluster).await;
    let masks = masks(&mut client, &id, run.generation).await;
    Ok(LocalRun { run, masks, failure })
}

/// Why the run did not succeed, in the words of whoever knows best.
async fn verdict(run: &pb::Run, failure: Option<Failure>, cluster: &mut LocalCluster) -> Option<Failure> {
    if run.state() == pb::RunState::Succeeded {
        return failure;
    }
    let words = format!("the run {}: {}", state_name(run.state()), run.status_message);
    match failure {
        Some(Failure::Failed(error)) => Some(Failure::failed(format!("{words}\n{error:#}"))),
        Some(failure @ (Failure::Interrupted(_) | Failure::BadInput(_))) => Some(failure),
        None => {
            // A broken call is often a process that has ended, which takes a moment to show.
            let note = match timeout(ENDED_WORKER_GRACE, cluster.worker_ended()).await {
                Ok(lost) => lost.message(),
                Err(_) => cluster.log_warnings(),
            };
            Some(Failure::failed(words).with_note(&note))
        }
    }
}

/// Cancels the run and follows it to its end, for a while; what goes wrong here changes nothing any more.
async fn cancel(
    client: &mut RunClient,
    id: &str,
    seen: u64,
    each: &mut impl FnMut(&pb::RunEvent) -> Result<(), Failure>,
) {
    let request = within(limits::QUICK_CALL, pb::CancelRunRequest { id: id.to_owned(), discard: true });
    if let Err(status) = client.cancel_run(request).await {
        tracing::warn!(run_id = id, %status, "the run could not be cancelled");
        return;
    }
    if timeout(CANCEL_DEADLINE, follow(client, id, seen, each)).await.is_err() {
        tracing::warn!(run_id = id, "the cancelled run did not end in time");
    }
}

async fn get(client: &mut RunClient, id: &str) -> Result<pb::Run, Failure> {
    let request = within(limits::QUICK_CALL, pb::GetRunRequest { id: id.to_owned() });
    let response =
        client.get_run(request).await.map_err(|status| from_status("failed to read the run", &status))?;
    response.into_inner().run.ok_or_else(|| Failure::failed("the coordinator answered without a run"))
}

/// The masks of all decisions, as far as the coordinator gives them: the report can do without.
async fn masks(client: &mut RunClient, id: &str, last_generation: u64) -> Vec<(u64, pb::KeepMask)> {
    let mut masks = Vec::new();
    for generation in 1..=last_generation {
        let message = pb::GetKeepMaskRequest { id: id.to_owned(), generation: Some(generation) };
        match client.get_keep_mask(within(limits::QUICK_CALL, message)).await {
            Ok(response) => masks.extend(response.into_inner().keep_mask.map(|mask| (generation, mask))),
            Err(status) => {
                tracing::warn!(run_id = id, generation, %status, "a keep mask could not be read");
                break;
            }
        }
    }
    masks
}
