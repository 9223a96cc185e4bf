//! Tasks: their stream, what is refused, and their end.

use crate::harness::{Harness, SESSION, load_request, request, start, task_file, tasks, toy};
use std::time::{Duration, Instant};
use tonic::{Code, Streaming};
use wire::pb;
use wire::pb::evaluate_task_response::Kind;
use wire::status::{Reason, reason};

fn task(task_index: u32) -> tonic::Request<pb::EvaluateTaskRequest> {
    request(pb::EvaluateTaskRequest { session_id: SESSION.into(), task_index })
}

/// Loads two tasks that are asked pair by pair.
async fn load(worker: &mut Harness) {
    let spec = tasks(&[&task_file("contexts"), &task_file("beginnings")]);
    let tasks = Some(pb::TaskSpec { pass_tokens: Some(1), ..spec });
    worker.client.load(request(pb::LoadRequest { tasks, ..load_request() })).await.unwrap();
}

async fn drain(mut stream: Streaming<pb::EvaluateTaskResponse>) -> (Vec<pb::TaskProgress>, pb::TaskScore) {
    let (mut progress, mut score) = (Vec::new(), None);
    while let Some(message) = stream.message().await.unwrap() {
        assert!(score.is_none(), "the score comes last");
        match message.kind.unwrap() {
            Kind::Progress(one) => progress.push(one),
            Kind::Score(one) => score = Some(one),
        }
    }
    (progress, score.unwrap())
}

#[tokio::test]
async fn a_task_tells_of_its_passes_and_then_its_score() {
    let mut worker = start(toy()).await;
    load(&mut worker).await;
    for (index, name, rows, choices) in [(0, "contexts", 3, 6), (1, "beginnings", 4, 11)] {
        let stream = worker.client.evaluate_task(task(index)).await.unwrap().into_inner();
        let (progress, score) = drain(stream).await;
        assert!(progress.windows(2).all(|pair| pair[0].tokens < pair[1].tokens));
        let last = progress.last().unwrap();
        assert_eq!((last.tokens, score.tokens), (last.total_tokens, last.total_tokens));
        assert_eq!((score.task.as_str(), score.count, score.log_likelihoods.len()), (name, rows, choices));
        // The toy gives every token two nats, so that of a row's choices the one with the fewest tokens wins.
        assert!(score.log_likelihoods.iter().all(|nats| *nats < 0.0 && nats % 2.0 == 0.0));
        assert_eq!(score.log_likelihood, score.log_likelihoods.iter().sum::<f64>());
        assert_eq!(score.correct_normalized.is_some(), name == "beginnings");
    }
    let described = worker.describe().await;
    assert_eq!(described.session_id, SESSION, "the session goes on");
}

#[tokio::test]
async fn a_task_that_was_not_loaded_is_refused() {
    let mut worker = start(toy()).await;
    worker.load().await;
    let none = worker.client.evaluate_task(task(0)).await.unwrap_err();
    assert_eq!((none.code(), reason(&none)), (Code::FailedPrecondition, Some(Reason::Refused)));
    load(&mut worker).await;
    let third = worker.client.evaluate_task(task(2)).await.unwrap_err();
    assert_eq!(reason(&third), Some(Reason::Refused));
    let other = pb::EvaluateTaskRequest { session_id: "s-9".into(), task_index: 0 };
    let other = worker.client.evaluate_task(request(other)).await.unwrap_err();
    assert_eq!(reason(&other), Some(Reason::WrongSession));
}

#[tokio::test]
async fn a_broken_task_file_is_named_when_it_is_loaded() {
    let mut worker = start(toy()).await;
    let path = worker.scratch.join("broken.jsonl");
    std::fs::write(&path, "{\"query\": \"a\", \"choices\": [\"b\", \"c\"], \"gold\": 5}\n").unwrap();
    let tasks = Some(tasks(&[&path.display().to_string()]));
    let refused = worker.client.load(request(pb::LoadRequest { tasks, ..load_request() })).await.unwrap_err();
    assert_eq!(reason(&refused), Some(Reason::BadFile));
    assert!(refused.message().contains("broken.jsonl` line 1"), "{}", refused.message());
    assert!(refused.message().contains("`gold` is 5"), "{}", refused.message());
}

#[tokio::test]
async fn a_task_ends_at_the_next_pass_when_it_is_aborted_or_nobody_listens() {
    let mut worker = start(toy().with_step_time(Duration::from_millis(100))).await;
    load(&mut worker).await;
    let mut stream = worker.client.evaluate_task(task(1)).await.unwrap().into_inner();
    stream.message().await.unwrap().unwrap();
    let started = Instant::now();
    worker.client.abort(request(pb::AbortRequest { session_id: SESSION.into() })).await.unwrap();
    assert!(started.elapsed() < Duration::from_millis(600), "{:?}", started.elapsed());
    let ended = loop {
        match stream.message().await {
            Ok(Some(message)) => assert!(matches!(message.kind, Some(Kind::Progress(_)))),
            Ok(None) => panic!("the stream of an aborted task ends in good order"),
            Err(status) => break status,
        }
    };
    assert_eq!(reason(&ended), Some(Reason::Aborted));

    load(&mut worker).await;
    let mut stream = worker.client.evaluate_task(task(1)).await.unwrap().into_inner();
    stream.message().await.unwrap().unwrap();
    drop(stream);
    // Free for the next call long before the task would have ended.
    let next =
        worker.client.evaluate(request(pb::EvaluateRequest { session_id: SESSION.into(), window_index: 0 }));
    let next = tokio::time::timeout(Duration::from_millis(600), next).await.unwrap().unwrap();
    assert!(next.into_inner().predicted_tokens > 0);
}
