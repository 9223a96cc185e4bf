//! Cancelling runs and stopping processes.

use cluster_tests::{Cluster, PATIENCE, in_time, toy};
use engine::Engine;
use std::sync::Arc;
use std::time::{Duration, Instant};
use wire::pb;
use wire::pb::RunState;

fn slow() -> Arc<dyn Engine> {
    Arc::new(toy().with_step_time(Duration::from_millis(50)))
}

async fn cancel(cluster: &Cluster, id: &str) -> pb::Run {
    let request = pb::CancelRunRequest { id: id.to_owned(), discard: true };
    in_time("CancelRun", cluster.runs().cancel_run(request)).await.unwrap().into_inner().run.unwrap()
}

fn long(cluster: &Cluster, tp_degree: u32, out: &str) -> pb::RunSpec {
    let mut spec = cluster.spec(tp_degree, out);
    spec.recipe.as_mut().unwrap().steps = Some(10_000);
    spec
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cancelled_run_frees_its_workers_for_the_next() {
    let mut cluster = Cluster::start().await;
    cluster.add_workers(2, &slow()).await;
    let running = cluster.create(long(&cluster, 2, "a")).await;
    let queued = cluster.create(long(&cluster, 1, "b")).await;
    cluster.until(&running.id, "a step", |run| run.last_step.is_some()).await;
    for id in [&queued.id, &running.id, &running.id] {
        let run = cancel(&cluster, id).await;
        assert_eq!(run.state(), RunState::Cancelled);
        assert_eq!(run.status_message, "cancelled on request");
    }
    let next = cluster.create(cluster.spec(2, "a")).await;
    let next = cluster.ended(&next.id).await;
    assert_eq!(next.state(), RunState::Succeeded, "{}", next.status_message);
    assert_eq!(cancel(&cluster, &next.id).await.state(), RunState::Succeeded, "an ended run stays as it is");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_workers_a_run_stays_queued_and_says_why() {
    let mut cluster = Cluster::start().await;
    let run = cluster.create(cluster.spec(2, "out")).await;
    let none = "needs 2 idle workers; none is registered";
    cluster.until(&run.id, "the reason", |run| run.status_message == none).await;
    cluster.add_workers(1, &slow()).await;
    let one = "needs 2 idle workers; 1 of 1 registered is idle";
    let run = cluster.until(&run.id, "the count", |run| run.status_message == one).await;
    assert_eq!(run.state(), RunState::Queued);
    assert!(run.start_time.is_none() && run.worker_ids.is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_coordinator_told_to_stop_checkpoints_its_runs_and_ends_their_streams() {
    let mut cluster = Cluster::start().await;
    cluster.add_workers(1, &slow()).await;
    let running = cluster.create(long(&cluster, 1, "a")).await;
    let queued = cluster.create(long(&cluster, 1, "b")).await;
    cluster.until(&running.id, "a step", |run| run.last_step.is_some()).await;
    let request = |run: &pb::Run| pb::WatchRunRequest { id: run.id.clone(), after_revision: 0 };
    let mut watches = Vec::new();
    for run in [&running, &queued] {
        watches.push(cluster.runs().watch_run(request(run)).await.unwrap().into_inner());
    }
    let started = Instant::now();
    let ending = tokio::spawn(cluster.shut_down());
    let mut checkpoints = 0;
    for mut watch in watches {
        let status = loop {
            match in_time("the end of the stream", watch.message()).await {
                Ok(message) => {
                    let event =
                        message.expect("a stream of a run that goes on later does not end well").event;
                    let kind = event.unwrap().kind;
                    checkpoints += u32::from(matches!(kind, Some(pb::run_event::Kind::Checkpoint(_))));
                }
                Err(status) => break status,
            }
        };
        assert_eq!(status.code(), tonic::Code::Unavailable, "{status:?}");
    }
    assert!(checkpoints >= 1, "the run under way is saved");
    ending.await.unwrap().unwrap();
    assert!(started.elapsed() < PATIENCE / 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn health_is_served() {
    let cluster = Cluster::start().await;
    let channel = wire::client::lazy_channel(&cluster.endpoint()).unwrap();
    let mut health = tonic_health::pb::health_client::HealthClient::new(channel);
    for service in ["", "espalier.v1.RunService", "espalier.v1.RegistryService"] {
        let request = tonic_health::pb::HealthCheckRequest { service: service.to_owned() };
        let status = in_time("Check", health.check(request)).await.unwrap().into_inner().status();
        assert_eq!(status, tonic_health::pb::health_check_response::ServingStatus::Serving, "{service}");
    }
}
