//! Pools: whose workers a run takes, who waits for whom, and when a worker is ready.

use cluster_tests::{Cluster, in_time, toy};
use engine::Engine;
use std::sync::Arc;
use std::time::Duration;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;
use wire::pb;
use wire::pb::RunState;

fn slow() -> Arc<dyn Engine> {
    Arc::new(toy().with_step_time(Duration::from_millis(50)))
}

fn spec(cluster: &Cluster, tp_degree: u32, pool: &str, out: &str) -> pb::RunSpec {
    pb::RunSpec { worker_pool: pool.to_owned(), ..cluster.spec(tp_degree, out) }
}

async fn endpoint(cluster: &Cluster, id: &str) -> String {
    let listed = in_time("ListWorkers", cluster.registry().list_workers(pb::ListWorkersRequest {})).await;
    let workers = listed.unwrap().into_inner().workers.into_iter().filter_map(|worker| worker.info);
    workers.into_iter().find(|info| info.id == id).expect("a registered worker").endpoint
}

async fn until_status(endpoint: &str, wanted: ServingStatus) {
    let mut health = HealthClient::new(wire::client::lazy_channel(endpoint).unwrap());
    let asked = async {
        loop {
            let request = HealthCheckRequest { service: "espalier.v1.WorkerService".to_owned() };
            if health.check(request).await.unwrap().into_inner().status() == wanted {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    in_time(&format!("{wanted:?}"), asked).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_run_takes_workers_of_its_pool_and_waits_for_no_other() {
    let mut cluster = Cluster::start().await;
    for (id, pool) in [("a", "large"), ("b", "large"), ("c", "small"), ("d", "small")] {
        cluster.add_worker_of(id, slow(), pool, 1).await;
    }
    let mut long = spec(&cluster, 2, "small", "first");
    long.recipe.as_mut().unwrap().steps = Some(10_000);
    let first = cluster.create(long).await;
    let first = cluster.until(&first.id, "a step", |run| run.last_step.is_some()).await;
    assert_eq!(first.worker_ids, ["c", "d"]);

    let waits = cluster.create(spec(&cluster, 1, "small", "waits")).await;
    let none = "needs 1 idle worker; 0 of 2 registered are idle";
    cluster.until(&waits.id, "the reason", |run| run.status_message == none).await;
    let unknown = cluster.create(spec(&cluster, 1, "huge", "unknown")).await;
    let none = "needs 1 idle worker; none is registered";
    cluster.until(&unknown.id, "the reason", |run| run.status_message == none).await;
    // Both are before it in the queue, and for other pools.
    let other = cluster.create(spec(&cluster, 2, "large", "other")).await;
    let other = cluster.ended(&other.id).await;
    assert_eq!(other.state(), RunState::Succeeded, "{}", other.status_message);
    assert_eq!(
        cluster
            .runs()
            .get_run(pb::GetRunRequest { id: waits.id })
            .await
            .unwrap()
            .into_inner()
            .run
            .unwrap()
            .state(),
        RunState::Queued
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_group_never_spans_two_pools() {
    let mut cluster = Cluster::start().await;
    for (id, pool) in [("a", "one"), ("b", "two"), ("c", "two")] {
        cluster.add_worker_of(id, slow(), pool, 1).await;
    }
    let run = cluster.create(cluster.spec(3, "three")).await;
    let none = "needs 3 idle workers; 3 of 3 registered are idle";
    cluster.until(&run.id, "the reason", |run| run.status_message == none).await;
    let pair = cluster.create(spec(&cluster, 2, "two", "pair")).await;
    // It stands behind one that any pool would do for.
    cluster.until(&pair.id, "the reason", |run| run.status_message.ends_with("1 queued before it")).await;
    let request = pb::CancelRunRequest { id: run.id, discard: true };
    in_time("CancelRun", cluster.runs().cancel_run(request)).await.unwrap();
    assert_eq!(cluster.ended(&pair.id).await.state(), RunState::Succeeded);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_is_ready_while_its_whole_group_can_train() {
    let mut cluster = Cluster::start().await;
    cluster.add_worker_of("a", slow(), "pair", 2).await;
    // Another pool is no help.
    cluster.add_worker_of("x", slow(), "single", 1).await;
    let (first, other) = (endpoint(&cluster, "a").await, endpoint(&cluster, "x").await);
    until_status(&other, ServingStatus::Serving).await;
    until_status(&first, ServingStatus::NotServing).await;
    cluster.add_worker_of("b", slow(), "pair", 2).await;
    let second = endpoint(&cluster, "b").await;
    until_status(&first, ServingStatus::Serving).await;
    until_status(&second, ServingStatus::Serving).await;
    cluster.stop("b");
    until_status(&first, ServingStatus::NotServing).await;
    until_status(&other, ServingStatus::Serving).await;
}
