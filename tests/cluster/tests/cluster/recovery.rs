//! Workers that die, hang or leave, and numbers that are none: found in time, and the run goes on to the same end.

use cluster_tests::{Cluster, in_time, toy};
use engine::Engine;
use engine::toy::{ToyEngine, ToyFault};
use std::sync::Arc;
use std::time::{Duration, Instant};
use wire::pb;
use wire::pb::RunState;
use wire::pb::run_event::Kind;

fn slow() -> ToyEngine {
    toy().with_step_time(Duration::from_millis(20))
}

fn shared(engine: ToyEngine) -> Arc<dyn Engine> {
    Arc::new(engine)
}

fn at_step(step: u64) -> impl Fn(&pb::Run) -> bool {
    move |run| run.last_step.as_ref().is_some_and(|last| last.step >= step)
}

async fn restarts(cluster: &Cluster, id: &str) -> Vec<pb::Restart> {
    let events = cluster.watch(id, 0).await.into_iter();
    events
        .filter_map(|event| match event.kind {
            Some(Kind::Restart(restart)) => Some(restart),
            _ => None,
        })
        .collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_worker_is_replaced_by_one_that_waits() {
    let expected = Cluster::undisturbed(2, |_| {}).await;
    let mut cluster = Cluster::start().await;
    cluster.add_workers(3, &shared(slow())).await;
    let run = cluster.create(cluster.durable_spec(2, "out")).await;
    cluster.until(&run.id, "a step", at_step(9)).await;
    let killed = Instant::now();
    cluster.kill("w1");
    let going_on =
        |run: &pb::Run| run.restarts == 1 && run.last_step.as_ref().is_some_and(|last| last.step > 12);
    let again = cluster.until(&run.id, "the run to go on", going_on).await;
    assert!(killed.elapsed() < Duration::from_secs(15), "{:?}", killed.elapsed());
    assert_eq!(again.worker_ids, ["w0", "w2"]);
    let ended = cluster.ended(&run.id).await;
    assert_eq!(ended.state(), RunState::Succeeded, "{}", ended.status_message);
    assert_eq!(cluster.outcome(&run.id).await, expected);
    let restarts = restarts(&cluster, &run.id).await;
    assert_eq!(restarts.len(), 1);
    assert!(restarts[0].cause.contains("worker `w1` (rank 1)"), "{}", restarts[0].cause);
    assert!(restarts[0].next_step >= 6, "at most a few steps are taken again: {}", restarts[0].next_step);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stuck_worker_is_named_and_the_run_goes_on_without_it() {
    let expected = Cluster::undisturbed(2, |_| {}).await;
    let mut cluster = Cluster::start_with(|config| config.stall_seconds = 2).await;
    cluster.add_workers(1, &shared(slow())).await;
    cluster.add_worker("w1", shared(slow().with_passing_fault(11, ToyFault::Stuck))).await;
    cluster.add_worker("w2", shared(slow())).await;
    let run = cluster.create(cluster.durable_spec(2, "out")).await;
    cluster.until(&run.id, "a step", at_step(10)).await;
    let stuck = Instant::now();
    cluster.until(&run.id, "the restart", |run| run.restarts == 1).await;
    assert!(stuck.elapsed() < Duration::from_secs(8), "{:?}", stuck.elapsed());
    let ended = cluster.ended(&run.id).await;
    assert_eq!(ended.state(), RunState::Succeeded, "{}", ended.status_message);
    let cause = &restarts(&cluster, &run.id).await[0].cause;
    assert!(cause.contains("worker `w1` (rank 1)") && cause.contains("has made no progress"), "{cause}");
    assert_eq!(cluster.outcome(&run.id).await, expected);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_run_that_may_goes_on_with_fewer_workers() {
    let expected = Cluster::undisturbed(2, |_| {}).await;
    let mut cluster = Cluster::start_with(|config| config.regroup_seconds = 1).await;
    cluster.add_workers(2, &shared(slow())).await;
    let mut spec = cluster.durable_spec(2, "out");
    spec.min_tp_degree = Some(1);
    let run = cluster.create(spec).await;
    cluster.until(&run.id, "a step", at_step(9)).await;
    cluster.kill("w0");
    let ended = cluster.ended(&run.id).await;
    assert_eq!(ended.state(), RunState::Succeeded, "{}", ended.status_message);
    let restarts = restarts(&cluster, &run.id).await;
    assert_eq!((restarts.len(), restarts[0].tp_degree), (1, 1));
    assert_eq!(cluster.outcome(&run.id).await, expected, "the toy's numbers are the same at any degree");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_fault_that_comes_back_ends_the_run_after_a_bounded_number_of_restarts() {
    let mut cluster = Cluster::start().await;
    cluster.add_workers(1, &shared(toy().with_fault(20, ToyFault::DeviceFailed))).await;
    let mut spec = cluster.durable_spec(1, "out");
    spec.durability.as_mut().unwrap().max_restarts = Some(2);
    let run = cluster.create(spec).await;
    let ended = cluster.ended(&run.id).await;
    assert_eq!(ended.state(), RunState::Failed);
    assert!(ended.status_message.contains("the toy device has failed"), "{}", ended.status_message);
    assert!(ended.status_message.contains("2 restarts in a row did not help"), "{}", ended.status_message);
    // One more for each checkpoint that was still on its way when the fault came.
    assert!((2..=6).contains(&ended.restarts), "{}", ended.restarts);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_step_whose_loss_is_no_number_is_skipped_and_said_so() {
    let mut cluster = Cluster::start().await;
    cluster.add_workers(2, &shared(toy().with_fault(9, ToyFault::NotFiniteOnce))).await;
    let run = cluster.create(cluster.durable_spec(2, "out")).await;
    let ended = cluster.ended(&run.id).await;
    assert_eq!(ended.state(), RunState::Succeeded, "{}", ended.status_message);
    let skipped: Vec<(u64, String)> = cluster
        .watch(&run.id, 0)
        .await
        .into_iter()
        .filter_map(|event| match event.kind {
            Some(Kind::Step(step)) if !step.skipped.is_empty() => Some((step.step, step.skipped)),
            _ => None,
        })
        .collect();
    assert_eq!(skipped, [(9, "the loss is NaN".to_owned())]);
    // The log is read back after a restart although the loss is no number.
    cluster.kill_coordinator();
    cluster.start_coordinator().await;
    assert_eq!(cluster.get(&run.id).await.state(), RunState::Succeeded);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_told_to_end_hands_its_run_over_first() {
    let expected = Cluster::undisturbed(1, |_| {}).await;
    let mut cluster = Cluster::start().await;
    cluster.add_workers(2, &shared(slow())).await;
    let run = cluster.create(cluster.durable_spec(1, "out")).await;
    cluster.until(&run.id, "a step", at_step(8)).await;
    assert_eq!(cluster.get(&run.id).await.worker_ids, ["w0"]);
    cluster.stop("w0");
    cluster.until_workers("w0 to leave", |workers| workers.len() == 1).await;
    let ended = cluster.ended(&run.id).await;
    assert_eq!((ended.state(), ended.restarts), (RunState::Succeeded, 0), "{}", ended.status_message);
    assert_eq!(cluster.outcome(&run.id).await, expected);
    let steps = cluster.watch(&run.id, 0).await;
    let steps = steps.iter().filter(|event| matches!(event.kind, Some(Kind::Step(_)))).count();
    assert_eq!(steps, 40, "no step is taken twice");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn several_runs_share_the_workers_whole_groups_at_a_time() {
    let mut cluster = Cluster::start().await;
    cluster.add_workers(3, &shared(toy().with_step_time(Duration::from_millis(2)))).await;
    let mut runs = Vec::new();
    for (place, degree) in [2, 3, 1, 2, 3].into_iter().enumerate() {
        runs.push((degree, cluster.create(cluster.durable_spec(degree, &format!("out-{place}"))).await));
    }
    for (degree, run) in &runs {
        let ended = cluster.ended(&run.id).await;
        assert_eq!(ended.state(), RunState::Succeeded, "{}", ended.status_message);
        assert_eq!(cluster.outcome(&run.id).await, Cluster::undisturbed(*degree, |_| {}).await);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drained_worker_gets_no_further_run() {
    let mut cluster = Cluster::start().await;
    cluster.add_workers(2, &shared(slow())).await;
    let run = cluster.create(cluster.durable_spec(1, "out")).await;
    cluster.until(&run.id, "a step", at_step(4)).await;
    let request = pb::DrainWorkerRequest { worker_id: "w0".into() };
    let drained =
        in_time("DrainWorker", cluster.registry().drain_worker(request)).await.unwrap().into_inner();
    assert!(drained.worker.unwrap().draining);
    let moved =
        |run: &pb::Run| run.worker_ids == ["w1"] && run.last_step.as_ref().is_some_and(|last| last.step > 6);
    cluster.until(&run.id, "the run to move", moved).await;
    assert_eq!(cluster.ended(&run.id).await.state(), RunState::Succeeded);
    let request = pb::DrainWorkerRequest { worker_id: "nobody".into() };
    let status = cluster.registry().drain_worker(request).await.unwrap_err();
    assert_eq!(status.code(), tonic::Code::NotFound);
}
