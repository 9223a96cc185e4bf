//! WatchRun: nothing lost, nothing doubled, nobody held up.

use cluster_tests::{Cluster, in_time, toy};
use std::sync::Arc;
use std::time::Duration;
use tokio_stream::StreamExt;
use wire::pb;
use wire::pb::RunState;
use wire::pb::run_event::Kind;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watch_resumes_from_any_revision() {
    let mut cluster = Cluster::start().await;
    cluster.add_workers(2, &(Arc::new(toy()) as Arc<dyn engine::Engine>)).await;
    let created = cluster.create(cluster.spec(2, "out")).await;
    let live = cluster.watch(&created.id, 0).await;
    let revisions: Vec<u64> = live.iter().map(|event| event.revision).collect();
    assert_eq!(revisions, (1..=live.len() as u64).collect::<Vec<_>>());
    let Some(Kind::StateChange(last)) = &live.last().unwrap().kind else {
        panic!("a run ends with its state")
    };
    assert_eq!(last.state(), RunState::Succeeded);
    let steps: Vec<u64> = live
        .iter()
        .filter_map(|event| match event.kind.as_ref() {
            Some(Kind::Step(step)) => Some(step.step),
            Some(
                Kind::StateChange(_)
                | Kind::Decision(_)
                | Kind::Evaluation(_)
                | Kind::Task(_)
                | Kind::Export(_)
                | Kind::Checkpoint(_)
                | Kind::Restart(_)
                | Kind::Guard(_)
                | Kind::Calibration(_),
            )
            | None => None,
        })
        .collect();
    assert_eq!(steps, (0..8).collect::<Vec<_>>());
    for after in [0, 1, 7, live.len() as u64 - 1, live.len() as u64, 1_000_000, u64::MAX] {
        let replayed = cluster.watch(&created.id, after).await;
        let skipped = usize::try_from(after).unwrap_or(usize::MAX).min(live.len());
        assert_eq!(replayed, live[skipped..]);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_does_not_read_holds_up_nobody() {
    let mut cluster = Cluster::start().await;
    cluster.add_workers(1, &(Arc::new(toy()) as Arc<dyn engine::Engine>)).await;
    let mut spec = cluster.spec(1, "out");
    spec.recipe.as_mut().unwrap().steps = Some(2000);
    let created = cluster.create(spec).await;
    let request = pb::WatchRunRequest { id: created.id.clone(), after_revision: 0 };
    let mut slow = cluster.runs().watch_run(request).await.unwrap().into_inner();
    let run = cluster.ended(&created.id).await;
    assert_eq!(run.state(), RunState::Succeeded, "{}", run.status_message);
    let mut expected = 1;
    while let Some(event) = in_time("the next event", slow.next()).await {
        assert_eq!(event.unwrap().event.unwrap().revision, expected);
        expected += 1;
    }
    assert!(expected > 2000);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watch_begun_in_the_middle_joins_past_and_future() {
    let mut cluster = Cluster::start().await;
    let engine = toy().with_step_time(Duration::from_millis(20));
    cluster.add_workers(1, &(Arc::new(engine) as Arc<dyn engine::Engine>)).await;
    let created = cluster.create(cluster.spec(1, "out")).await;
    cluster.until(&created.id, "a step", |run| run.last_step.is_some()).await;
    let joined = cluster.watch(&created.id, 0).await;
    assert_eq!(joined, cluster.watch(&created.id, 0).await);
}
