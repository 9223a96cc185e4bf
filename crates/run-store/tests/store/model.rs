//! Calls at random: the store says and holds what a plain map would.

use crate::backends::Backend;
use proptest::prelude::*;
use proptest::test_runner::TestCaseResult;
use run_store::{NewRun, RunStore, StoreError, StoredCheckpoint, StoredDecision};
use std::collections::BTreeMap;
use std::time::UNIX_EPOCH;

/// Generations and steps that are drawn.
const DRAWN: std::ops::Range<u64> = 0..4;

#[derive(Debug, Clone)]
enum Call {
    Create,
    /// `gap` past where the events end.
    Append {
        gap: u64,
        count: usize,
        generation: Option<u64>,
        checkpoint: Option<u64>,
    },
    RemoveCheckpoint(u64),
    Delete,
    OpenAgain,
}

#[derive(Debug, Default)]
struct Run {
    events: Vec<Vec<u8>>,
    decisions: BTreeMap<u64, StoredDecision>,
    checkpoints: BTreeMap<u64, StoredCheckpoint>,
}

fn call() -> impl Strategy<Value = Call> {
    let small = || prop::option::weighted(0.4, DRAWN);
    let gap = prop_oneof![4 => Just(0_u64), 1 => 1..3_u64];
    let append = (gap, 0..4_usize, small(), small())
        .prop_map(|(gap, count, generation, checkpoint)| Call::Append { gap, count, generation, checkpoint });
    prop_oneof![
        2 => Just(Call::Create),
        8 => append,
        2 => DRAWN.prop_map(Call::RemoveCheckpoint),
        1 => Just(Call::Delete),
        1 => Just(Call::OpenAgain),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    #[test]
    fn sqlite_holds_what_a_map_would(calls in prop::collection::vec((0..2_u8, call()), 1..30)) {
        block_on(check(Backend::sqlite(), &calls))?;
    }
}

#[test]
fn postgres_holds_what_a_map_would() {
    let backend = std::cell::Cell::new(0);
    let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig {
        failure_persistence: None,
        ..ProptestConfig::with_cases(6)
    });
    runner
        .run(&prop::collection::vec((0..2_u8, call()), 1..30), |calls| {
            backend.set(backend.get() + 1);
            block_on(check(Backend::postgres(&format!("model_{}", backend.get())), &calls))
        })
        .unwrap();
}

fn block_on<T>(work: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap().block_on(work)
}

async fn check(backend: Backend, calls: &[(u8, Call)]) -> TestCaseResult {
    let mut store = backend.open().await;
    let mut runs: BTreeMap<String, Run> = BTreeMap::new();
    for (place, (run, call)) in calls.iter().enumerate() {
        let id = format!("r{run}");
        match call {
            Call::Create if runs.contains_key(&id) => {}
            Call::Create => {
                let event = vec![place as u8];
                store.create_run(&new_run(&id, event.clone())).await.unwrap();
                runs.insert(id, Run { events: vec![event], ..Run::default() });
            }
            Call::Append { gap, count, generation, checkpoint } => {
                let first = runs.get(&id).map_or(0, |run| run.events.len() as u64) + 1 + gap;
                let events: Vec<Vec<u8>> = (0..*count).map(|at| vec![place as u8, at as u8, 1]).collect();
                let decision = generation.map(|generation| StoredDecision {
                    generation,
                    revision: first,
                    payload: vec![place as u8],
                    importance: None,
                });
                let checkpoint = checkpoint.map(|steps_done| StoredCheckpoint {
                    name: steps_done.to_string(),
                    steps_done,
                    generation: 0,
                    payload: vec![place as u8],
                });
                let answer = store.append(&id, first, &events, decision.as_ref(), checkpoint.as_ref()).await;
                let Some(run) = runs.get_mut(&id) else {
                    prop_assert!(matches!(answer, Err(StoreError::NoRun { .. })), "{answer:?}");
                    continue;
                };
                let is_new = decision.iter().all(|new| !run.decisions.contains_key(&new.generation))
                    && checkpoint.iter().all(|new| !run.checkpoints.contains_key(&new.steps_done));
                if *gap > 0 {
                    prop_assert!(matches!(answer, Err(StoreError::Revision { .. })), "{answer:?}");
                } else if is_new {
                    prop_assert!(answer.is_ok(), "{answer:?}");
                    run.events.extend(events);
                    run.decisions.extend(decision.map(|new| (new.generation, new)));
                    run.checkpoints.extend(checkpoint.map(|new| (new.steps_done, new)));
                } else {
                    prop_assert!(answer.is_err());
                }
            }
            Call::RemoveCheckpoint(steps_done) => {
                store.remove_checkpoint(&id, &steps_done.to_string()).await.unwrap();
                runs.get_mut(&id).map(|run| run.checkpoints.remove(steps_done));
            }
            Call::Delete => {
                prop_assert_eq!(store.delete_run(&id).await.is_ok(), runs.remove(&id).is_some());
            }
            Call::OpenAgain => {
                let old = std::mem::replace(&mut store, backend.open().await);
                prop_assert!(matches!(old.check().await, Err(StoreError::Fenced)));
            }
        }
        holds(&store, &runs).await?;
    }
    store.close().await;
    Ok(())
}

async fn holds(store: &RunStore, runs: &BTreeMap<String, Run>) -> TestCaseResult {
    prop_assert_eq!(store.runs().await.unwrap().len(), runs.len());
    for id in ["r0", "r1"] {
        let nothing = Run::default();
        let run = runs.get(id).unwrap_or(&nothing);
        let events = store.events(id, 0, 1000).await.unwrap();
        prop_assert!(events.iter().map(|event| event.revision).eq(1..=run.events.len() as u64));
        prop_assert!(events.iter().map(|event| &event.payload).eq(&run.events));
        for generation in DRAWN {
            let decision = store.decision(id, generation).await.unwrap();
            prop_assert_eq!(decision.as_ref(), run.decisions.get(&generation));
        }
        prop_assert!(store.checkpoints(id).await.unwrap().iter().eq(run.checkpoints.values()));
    }
    Ok(())
}

fn new_run(id: &str, event: Vec<u8>) -> NewRun {
    NewRun {
        id: id.to_owned(),
        request_id: None,
        request_digest: Vec::new(),
        create_time: UNIX_EPOCH,
        record: Vec::new(),
        events: vec![event],
        decisions: Vec::new(),
    }
}
