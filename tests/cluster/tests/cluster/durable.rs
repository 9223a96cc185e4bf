//! What was acknowledged is there after any death of the coordinator, and the run goes on to the same end.

use cluster_tests::{Cluster, toy};
use engine::Engine;
use std::sync::Arc;
use std::time::Duration;
use wire::pb;
use wire::pb::RunState;

fn slow() -> Arc<dyn Engine> {
    Arc::new(toy().with_step_time(Duration::from_millis(20)))
}

fn at_step(step: u64) -> impl Fn(&pb::Run) -> bool {
    move |run| run.last_step.as_ref().is_some_and(|last| last.step >= step)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_run_survives_the_death_of_its_coordinator_again_and_again() {
    let expected = Cluster::undisturbed(2, |_| {}).await;
    let mut cluster = Cluster::start().await;
    cluster.add_workers(2, &slow()).await;
    let run = cluster.create(cluster.durable_spec(2, "out")).await;
    for step in [5, 14, 26, 37] {
        let seen = cluster.until(&run.id, "a step", at_step(step)).await;
        let acknowledged = cluster.get(&run.id).await.revision;
        assert!(acknowledged >= seen.revision);
        cluster.kill_coordinator();
        cluster.start_coordinator().await;
        assert!(cluster.get(&run.id).await.revision >= acknowledged, "nothing acknowledged is lost");
    }
    let ended = cluster.ended(&run.id).await;
    assert_eq!(ended.state(), RunState::Succeeded, "{}", ended.status_message);
    assert!(ended.restarts >= 3, "{} restarts", ended.restarts);
    assert_eq!(cluster.outcome(&run.id).await, expected);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_run_goes_on_after_an_orderly_restart_without_a_step_taken_twice() {
    let expected = Cluster::undisturbed(1, |_| {}).await;
    let mut cluster = Cluster::start().await;
    cluster.add_workers(1, &slow()).await;
    let run = cluster.create(cluster.durable_spec(1, "out")).await;
    cluster.until(&run.id, "a step", at_step(10)).await;
    cluster.stop_coordinator().await.unwrap();
    cluster.start_coordinator().await;
    let ended = cluster.ended(&run.id).await;
    assert_eq!(ended.state(), RunState::Succeeded, "{}", ended.status_message);
    let steps = cluster.watch(&run.id, 0).await.into_iter().filter_map(|event| match event.kind {
        Some(pb::run_event::Kind::Step(step)) => Some(step.step),
        _ => None,
    });
    assert_eq!(steps.collect::<Vec<_>>(), (0..40).collect::<Vec<_>>());
    assert_eq!(cluster.outcome(&run.id).await, expected);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_makes_one_run_also_across_a_restart() {
    let mut cluster = Cluster::start().await;
    let request = |spec: pb::RunSpec| pb::CreateRunRequest {
        spec: Some(spec),
        request_id: "mine".into(),
        ..Default::default()
    };
    let create = |cluster: &Cluster, spec| {
        let mut runs = cluster.runs();
        async move { runs.create_run(request(spec)).await }
    };
    let spec = cluster.spec(1, "out");
    let first = create(&cluster, spec.clone()).await.unwrap().into_inner().run.unwrap();
    cluster.kill_coordinator();
    cluster.start_coordinator().await;
    let again = create(&cluster, spec.clone()).await.unwrap().into_inner().run.unwrap();
    assert_eq!(again.id, first.id);
    assert_eq!((again.spec, again.create_time), (first.spec, first.create_time));
    let other = pb::RunSpec { display_name: "another".into(), ..spec };
    let status = create(&cluster, other).await.unwrap_err();
    assert_eq!(status.code(), tonic::Code::AlreadyExists);
    let listed = cluster.runs().list_runs(pb::ListRunsRequest::default()).await.unwrap().into_inner();
    assert_eq!(listed.runs.len(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ended_runs_are_shown_as_they_were_after_a_restart() {
    let mut cluster = Cluster::start().await;
    let engine: Arc<dyn Engine> = Arc::new(toy());
    cluster.add_workers(1, &engine).await;
    let run = cluster.create(cluster.durable_spec(1, "out")).await;
    let ended = cluster.ended(&run.id).await;
    let events = cluster.watch(&run.id, 0).await;
    let outcome = cluster.outcome(&run.id).await;
    cluster.kill_coordinator();
    cluster.start_coordinator().await;
    let shown = cluster.get(&run.id).await;
    assert_eq!(pb::Run { worker_ids: Vec::new(), ..shown }, pb::Run { worker_ids: Vec::new(), ..ended });
    assert_eq!(cluster.watch(&run.id, 0).await, events);
    assert_eq!(cluster.watch(&run.id, 7).await, events[7..]);
    assert_eq!(cluster.outcome(&run.id).await, outcome);
    // Another export of the result needs the last checkpoint.
    cluster.until_workers("the worker to come back", |workers| workers.len() == 1).await;
    let export = pb::ExportSpec { path: cluster.path("again"), ..Default::default() };
    let request = pb::ExportRunRequest { id: run.id.clone(), export: Some(export) };
    cluster.runs().export_run(request).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_coordinator_whose_store_another_has_opened_ends() {
    let mut cluster = Cluster::start().await;
    let config = run_store::StoreUrl::file(cluster.root.path().join("data/espalier.db"));
    let other = run_store::RunStore::open(&config, run_store::StoreOptions::default()).await.unwrap();
    let spec = cluster.spec(1, "out");
    let request = pb::CreateRunRequest { spec: Some(spec), ..Default::default() };
    let status = cluster.runs().create_run(request).await.unwrap_err();
    assert_eq!(status.code(), tonic::Code::Unavailable, "{status:?}");
    other.close().await;
    // It need not be called to notice.
    let error = cluster.coordinator_gives_up().await;
    assert!(error.contains("another coordinator has opened the store"), "{error}");
    cluster.start_coordinator().await;
    cluster.create(cluster.spec(1, "out")).await;
}
