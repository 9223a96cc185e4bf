//! Runs that distil: the unpruned model reads every window before the first step.

use crate::harness::{SESSION, load_request, request, start, toy};
use std::time::{Duration, Instant};
use wire::pb;
use wire::pb::train_response::Kind;

fn distilling() -> pb::LoadRequest {
    let mut message = load_request();
    message.recipe.as_mut().unwrap().distillation = Some(pb::Distillation::default());
    message
}

#[tokio::test]
async fn every_window_of_the_run_is_taught_once_before_the_first_step() {
    let mut worker = start(toy()).await;
    worker.client.load(request(distilling())).await.unwrap();
    let trained = worker.train(0, 3, 0).await.unwrap();
    // 12 steps of 2 micro-batches of 2 rows, all different: the text has more windows.
    let read: Vec<u64> = trained.teaching.iter().map(|progress| progress.windows).collect();
    assert_eq!(read, (1..=24).map(|pass| 2 * pass).collect::<Vec<u64>>());
    assert!(trained.teaching.iter().all(|progress| progress.total_windows == 48));
    assert_eq!(trained.reports.len(), 3);

    let smaller = worker.smaller_mask();
    worker.apply_mask(1, &smaller).await.unwrap();
    // The toy refuses a window that was not taught.
    let trained = worker.train(3, 12, 1).await.unwrap();
    assert_eq!((trained.teaching.len(), trained.reports.len()), (0, 9));
}

#[tokio::test]
async fn a_window_used_in_many_epochs_is_taught_once() {
    let mut worker = start(toy()).await;
    let mut message = distilling();
    message.recipe.as_mut().unwrap().steps = Some(4000);
    let windows = worker.client.load(request(message)).await.unwrap().into_inner().window_count;
    assert!(windows < 4000 * 4);
    let trained = worker.train(0, 1, 0).await.unwrap();
    let last = trained.teaching.last().unwrap();
    assert_eq!((last.windows, last.total_windows), (windows, windows));
}

#[tokio::test]
async fn a_run_that_does_not_distil_is_taught_nothing() {
    let mut worker = start(toy()).await;
    worker.load().await;
    assert!(worker.train(0, 2, 0).await.unwrap().teaching.is_empty());
}

#[tokio::test]
async fn an_abort_waits_for_one_pass_of_teaching_at_most() {
    let mut worker = start(toy().with_step_time(Duration::from_millis(400))).await;
    worker.client.load(request(distilling())).await.unwrap();
    let mut stream = worker.client.train(worker.train_request(0, 3, 0)).await.unwrap().into_inner();
    let first = stream.message().await.unwrap().unwrap().kind;
    assert!(matches!(first, Some(Kind::Teaching(_))), "{first:?}");
    let started = Instant::now();
    let abort = request(pb::AbortRequest { session_id: SESSION.into() });
    worker.client.abort(abort).await.unwrap();
    // 24 passes would take 9.6 s.
    assert!(started.elapsed() < Duration::from_secs(3), "{:?}", started.elapsed());
    let ended = loop {
        match stream.message().await {
            Ok(Some(_)) => {}
            ended => break ended,
        }
    };
    assert_eq!(ended.unwrap_err().code(), tonic::Code::Aborted);
}
