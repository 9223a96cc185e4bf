//! Aborts, callers that leave, and engines that fail or hang.

use crate::harness::{DEADLINE, SESSION, eventually, load_request, request, start, toy};
use engine::toy::ToyFault;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use tonic::Code;
use wire::pb;
use wire::status::{Reason, reason};

fn abort() -> pb::AbortRequest {
    pb::AbortRequest { session_id: SESSION.into() }
}

#[tokio::test]
async fn abort_ends_training_between_steps() {
    let mut worker = start(toy().with_step_time(Duration::from_millis(20))).await;
    worker.load().await;
    let train = worker.train_request(0, 12, 0);
    let mut stream = worker.client.train(train).await.unwrap().into_inner();
    stream.message().await.unwrap().unwrap();
    let told = Instant::now();
    worker.client.abort(request(abort())).await.unwrap();
    let status = loop {
        match tokio::time::timeout(DEADLINE, stream.message()).await.unwrap() {
            Ok(Some(_)) => {}
            Ok(None) => panic!("an aborted stream must not end as if all were done"),
            Err(status) => break status,
        }
    };
    assert_eq!((status.code(), reason(&status)), (Code::Aborted, Some(Reason::Aborted)));
    assert!(told.elapsed() < Duration::from_secs(2));
    assert_eq!(worker.describe().await.session_id, "");
    worker.load().await;
    worker.train(0, 1, 0).await.unwrap();
}

#[tokio::test]
async fn abort_answers_callers_although_a_collective_hangs() {
    let mut worker = start(toy().with_fault(1, ToyFault::PeerSilent)).await;
    worker.load().await;
    let train = worker.train_request(0, 12, 0);
    let mut stream = worker.client.train(train).await.unwrap().into_inner();
    let mut reports = 0;
    while reports == 0 {
        let message = stream.message().await.unwrap().unwrap();
        reports += u32::from(matches!(message.kind, Some(pb::train_response::Kind::Report(_))));
    }
    // The collective hangs for two seconds from here on; the stream must not.
    let told = Instant::now();
    let mut other = worker.client.clone();
    let aborting = tokio::spawn(async move { other.abort(request(abort())).await });
    let status = tokio::time::timeout(Duration::from_secs(1), stream.message()).await.unwrap().unwrap_err();
    assert_eq!(status.code(), Code::Aborted);
    aborting.await.unwrap().unwrap();
    assert!(told.elapsed() >= Duration::from_secs(1), "abort waits for the device thread");
    worker.load().await;
}

#[tokio::test]
async fn a_load_waits_for_the_device_that_a_hung_session_holds() {
    let mut worker = start(toy().with_fault(0, ToyFault::PeerSilent)).await;
    worker.load().await;
    let train = worker.train_request(0, 12, 0);
    let mut stream = worker.client.train(train).await.unwrap().into_inner();
    tokio::time::sleep(Duration::from_millis(50)).await;
    let started = Instant::now();
    let second = pb::LoadRequest { session_id: "s-2".into(), ..load_request() };
    let mut other = worker.client.clone();
    let loading = tokio::spawn(async move { other.load(request(second)).await });
    let status = tokio::time::timeout(Duration::from_secs(1), stream.message()).await.unwrap().unwrap_err();
    assert_eq!(status.code(), Code::Aborted);
    assert!(status.message().contains("s-2"), "{status:?}");
    loading.await.unwrap().unwrap();
    assert!(started.elapsed() >= Duration::from_secs(1), "the device was not free before");
    assert_eq!(worker.describe().await.session_id, "s-2");
}

#[tokio::test]
async fn abort_ends_a_load() {
    let mut worker = start(toy().with_load_time(Duration::from_secs(1))).await;
    let mut other = worker.client.clone();
    let loading = tokio::spawn(async move { other.load(request(load_request())).await });
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(worker.describe().await.session_id, SESSION);
    worker.client.abort(request(abort())).await.unwrap();
    assert_eq!(loading.await.unwrap().unwrap_err().code(), Code::Aborted);
    assert_eq!(worker.describe().await.session_id, "");
}

#[tokio::test]
async fn training_stops_when_its_caller_leaves() {
    let mut worker = start(toy().with_step_time(Duration::from_millis(10))).await;
    let mut message = load_request();
    message.recipe.as_mut().unwrap().steps = Some(1_000_000);
    worker.client.load(request(message)).await.unwrap();
    let train = worker.train_request(0, 1_000_000, 0);
    let mut stream = worker.client.train(train).await.unwrap().into_inner();
    stream.message().await.unwrap().unwrap();
    drop(stream);
    let mut step = worker.describe().await.next_step;
    let stopped = async {
        loop {
            tokio::time::sleep(Duration::from_millis(200)).await;
            let now = worker.describe().await.next_step;
            if now == step {
                return now;
            }
            step = now;
        }
    };
    let next_step = tokio::time::timeout(DEADLINE, stopped).await.expect("training must stop");
    let train = worker.train_request(next_step, next_step + 1, 0);
    worker.client.train(train).await.expect("the session is still there");
}

#[tokio::test]
async fn a_loss_that_is_no_number_is_an_error_and_the_session_stays() {
    let mut worker = start(toy().with_fault(2, ToyFault::NotFinite)).await;
    worker.load().await;
    let status = worker.train(0, 12, 0).await.unwrap_err();
    assert_eq!((status.code(), reason(&status)), (Code::OutOfRange, Some(Reason::NotFinite)));
    assert!(status.message().contains("step 5"), "three are skipped first: {status:?}");
    let described = worker.describe().await;
    assert_eq!((described.session_id.as_str(), described.next_step), (SESSION, 5));
}

#[tokio::test]
async fn a_lost_peer_device_or_thread_ends_the_session_and_not_the_worker() {
    for (fault, code, expected) in [
        (ToyFault::PeerLost, Code::Unavailable, Reason::PeerLost),
        (ToyFault::DeviceFailed, Code::Internal, Reason::DeviceFailed),
        (ToyFault::Panic, Code::Internal, Reason::DeviceFailed),
    ] {
        let mut worker = start(toy().with_fault(1, fault)).await;
        worker.load().await;
        let status = worker.train(0, 12, 0).await.unwrap_err();
        assert_eq!((status.code(), reason(&status)), (code, Some(expected)), "{fault:?}");
        let gone = worker.train(1, 2, 0).await.unwrap_err();
        assert_eq!(reason(&gone), Some(Reason::SessionFailed), "{fault:?}");
        assert_eq!(worker.describe().await.session_id, "");
        worker.load().await;
        worker.train(0, 1, 0).await.unwrap();
    }
}

#[tokio::test]
async fn calls_wait_in_line_and_a_line_too_long_is_refused() {
    let mut worker = start(toy().with_step_time(Duration::from_millis(500))).await;
    worker.load().await;
    let train = worker.train_request(0, 1, 0);
    let _stream = worker.client.train(train).await.unwrap();
    let calls: Vec<_> = (0..8)
        .map(|_| {
            let mut client = worker.client.clone();
            tokio::spawn(async move {
                client
                    .evaluate(request(pb::EvaluateRequest { session_id: SESSION.into(), window_index: 0 }))
                    .await
            })
        })
        .collect();
    let mut busy = 0;
    for call in calls {
        match call.await.unwrap() {
            Ok(evaluated) => assert!(evaluated.into_inner().predicted_tokens > 0),
            Err(status) => {
                assert_eq!(reason(&status), Some(Reason::SessionBusy));
                busy += 1;
            }
        }
    }
    assert!((1..8).contains(&busy), "{busy} of 8");
}

#[tokio::test]
async fn a_worker_told_to_stop_ends_although_a_collective_hangs() {
    let mut worker = start(toy().with_fault(0, ToyFault::PeerSilent)).await;
    worker.load().await;
    let train = worker.train_request(0, 12, 0);
    let mut stream = worker.client.train(train).await.unwrap().into_inner();
    tokio::time::sleep(Duration::from_millis(50)).await;
    worker.stop.cancel();
    let status = tokio::time::timeout(Duration::from_secs(1), stream.message()).await.unwrap().unwrap_err();
    assert_eq!((status.code(), reason(&status)), (Code::Unavailable, Some(Reason::ShuttingDown)));
    drop(stream);
    let ended = tokio::time::timeout(DEADLINE, &mut worker.ended).await.expect("must end").unwrap();
    assert!(ended.is_ok(), "{ended:?}");
}

#[tokio::test]
async fn steps_are_counted_for_the_lease() {
    let mut worker = crate::harness::start_with_lease(toy(), Duration::from_millis(300)).await;
    worker.load().await;
    worker.train(0, 5, 0).await.unwrap();
    worker.load().await;
    worker.train(0, 2, 0).await.unwrap();
    let registry = std::sync::Arc::clone(&worker.registry);
    eventually("a renewal says 7 steps", || registry.steps_done.load(Ordering::SeqCst) == 7).await;
}
