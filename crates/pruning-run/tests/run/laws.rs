//! Laws that hold for any order of events.

use crate::world::{NOW, World, durable, id, options, recipe, report, run_to_end, setup, task_score};
use model_spec::Projection;
use proptest::collection::vec;
use proptest::prelude::*;
use pruning_run::{
    Event, Fault, Generation, RankReport, Retention, Run, RunOptions, RunState, ShardFile, WorkerId,
    transition,
};
use std::time::Duration;

/// Any event at all, most of them out of place.
fn any_event() -> impl Strategy<Value = Event> {
    let rank = 0usize..4;
    let step = 0u64..12;
    let generation = (0u64..6).prop_map(Generation);
    let worker = prop_oneof![Just("w0"), Just("w1"), Just("stranger")];
    let name =
        prop_oneof![Just("00000002-1"), Just("00000003-1"), Just("00000010-1")].prop_map(str::to_owned);
    let number = prop_oneof![Just(1.0), Just(f64::NAN), Just(-f64::INFINITY)];
    prop_oneof![
        (0usize..3, 0usize..3, 0usize..2).prop_map(|(idle, registered, ahead)| Event::WorkersShort {
            idle,
            registered,
            ahead
        }),
        vec(worker.clone(), 0..4).prop_map(|workers| Event::WorkersAssigned {
            workers: workers.into_iter().map(|worker| WorkerId(worker.into())).collect(),
        }),
        rank.clone().prop_map(|tp_rank| Event::Loaded { tp_rank, data_sha256: "d".into() }),
        Just(Event::RendezvousOpened { rendezvous: vec![1] }),
        rank.clone().prop_map(|tp_rank| Event::Joined { tp_rank }),
        (
            rank.clone(),
            step.clone(),
            generation.clone(),
            0usize..4,
            0usize..7,
            0usize..25,
            vec(number.clone(), 0..25)
        )
            .prop_map(|(tp_rank, step, generation, layer, projection, first_unit, values)| {
                Event::Scores {
                    tp_rank,
                    step,
                    generation,
                    layer,
                    projection: Projection::ALL[projection],
                    first_unit,
                    values,
                }
            }),
        (rank.clone(), step.clone(), generation.clone(), number.clone()).prop_map(
            |(tp_rank, step, generation, loss)| Event::StepEnded {
                tp_rank,
                report: RankReport { loss, ..report(step, generation) },
            }
        ),
        rank.clone().prop_map(|tp_rank| Event::TrainEnded { tp_rank }),
        (rank.clone(), generation)
            .prop_map(|(tp_rank, generation)| Event::MaskApplied { tp_rank, generation }),
        (rank.clone(), number, 0u64..3).prop_map(|(tp_rank, nats, predicted_tokens)| Event::Evaluated {
            tp_rank,
            window_index: 0,
            negative_log_likelihood: nats,
            predicted_tokens,
            window_tokens: 64,
            duration: Duration::ZERO,
        }),
        (rank.clone(), 0usize..2).prop_map(|(tp_rank, task_index)| Event::TaskEvaluated {
            tp_rank,
            task_index,
            score: task_score("t"),
            duration: Duration::ZERO,
        }),
        (rank.clone(), name.clone()).prop_map(|(tp_rank, name)| Event::Snapshotted { tp_rank, name }),
        (rank.clone(), name.clone()).prop_map(|(tp_rank, name)| Event::Checkpointed {
            tp_rank,
            name,
            shard: ShardFile { file: "f".into(), sha256: "s".into(), size_bytes: 1 },
        }),
        name.clone().prop_map(|name| Event::CheckpointFailed { name, cause: "disk full".into() }),
        name.prop_map(|name| Event::CheckpointWritten { name, size_bytes: 1 }),
        any::<bool>()
            .prop_map(|damaged| Event::RestoreFailed { cause: "its digest differs".into(), damaged }),
        Just(Event::SessionsAborted),
        (rank.clone(), 0usize..3).prop_map(|(tp_rank, kind)| Event::RankFailed {
            tp_rank,
            fault: [
                Fault::Own("broke".into()),
                Fault::PeerLost("peer".into()),
                Fault::Lasting("no such file".into())
            ][kind]
                .clone(),
        }),
        worker.prop_map(|worker| Event::WorkerLost { worker: WorkerId(worker.into()), cause: "gone".into() }),
        Just(Event::CoordinatorFailed { cause: "disk".into() }),
        any_wish(),
        Just(Event::Woken),
    ]
}

/// Anything that someone may ask of a run.
fn any_wish() -> impl Strategy<Value = Event> {
    (0usize..5, any::<bool>()).prop_map(|(kind, flag)| {
        let reason = "asked".to_owned();
        match kind {
            0 => Event::CancelRequested { reason, discard: flag },
            1 => Event::PauseRequested { reason },
            2 => Event::YieldRequested { reason, requeue: flag },
            _ => Event::ResumeRequested { reason },
        }
    })
}

/// Acknowledgements and answers that may be said twice without harm.
fn may_be_repeated(event: &Event) -> bool {
    matches!(
        event,
        Event::MaskApplied { .. }
            | Event::Calibrated { .. }
            | Event::Loaded { .. }
            | Event::Joined { .. }
            | Event::Evaluated { .. }
            | Event::TaskEvaluated { .. }
            | Event::Snapshotted { .. }
            | Event::Checkpointed { .. }
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn any_interleaving_with_repeats_decides_the_same(
        tp_degree in 1usize..5,
        chunk in 1usize..30,
        order in vec(0usize..5, 1..40),
        repeats in vec(any::<bool>(), 1..20),
    ) {
        let options = RunOptions { windows: 2, tasks: 2, ..options() };
        let expected = run_to_end(&setup(recipe(), 1, options), 100, &[]);
        let mut world = World::new(&setup(recipe(), tp_degree, options), chunk);
        let mut turn = 0;
        while world.step(order[turn % order.len()]) {
            let last = world.delivered.last().cloned();
            if let Some(last) = last.filter(may_be_repeated)
                && repeats[turn % repeats.len()]
            {
                world.deliver(last);
            }
            turn += 1;
        }
        prop_assert_eq!(world.run.state(), RunState::Succeeded, "{}", world.last_message());
        prop_assert_eq!(world.decisions(), expected.decisions());
        prop_assert_eq!(world.evaluations(), expected.evaluations());
    }

    #[test]
    fn replaying_the_events_gives_the_same_log(tp_degree in 1usize..4, order in vec(0usize..4, 1..20)) {
        let setup = setup(recipe(), tp_degree, options());
        let world = run_to_end(&setup, 4, &order);
        let stored = serde_json::to_string(&world.delivered).unwrap();
        let events: Vec<Event> = serde_json::from_str(&stored).unwrap();
        let (mut run, effects) = Run::new(id(), setup, None, NOW);
        let mut log = effects;
        for event in events {
            let (next, effects) = transition(run, event, NOW);
            log.extend(effects);
            run = next;
        }
        let mut records = Vec::new();
        for effect in log {
            if let pruning_run::Effect::Record(event) = effect {
                records.push(event);
            }
        }
        prop_assert_eq!(records, world.log);
    }

    #[test]
    fn no_event_out_of_place_panics_or_skips_what_is_due(
        tp_degree in 1usize..4,
        before in 0usize..900,
        strays in vec((any_event(), 0usize..30), 1..12),
        restarts in 0u32..4,
    ) {
        let options = RunOptions { max_restarts: restarts, ..durable() };
        let mut world = World::new(&setup(recipe(), tp_degree, options), 4);
        for _ in 0..before {
            world.step(0);
        }
        for (stray, steps) in strays {
            // A stranger's assignment is not the test's: the world would have to play its workers.
            let assigned = matches!(&stray, Event::WorkersAssigned { .. });
            if assigned && !world.run.holds_workers() && !world.run.state().has_ended() {
                continue;
            }
            world.deliver(stray);
            for _ in 0..steps {
                world.step(1);
            }
        }
        world.settle();
        let decided: Vec<u64> = world.decisions().iter().map(|decision| decision.step).collect();
        prop_assert!([2, 4, 6, 8].starts_with(&decided));
        if world.run.state() == RunState::Succeeded {
            prop_assert_eq!(decided.len(), 4);
        }
    }

    #[test]
    fn a_run_killed_anywhere_and_resumed_ends_like_one_never_killed(
        tp_degree in 1usize..4,
        chunk in 3usize..30,
        order in vec(0usize..5, 1..40),
        kills in vec(0usize..700, 1..4),
        checkpoint_every in 1u64..5,
        last in 1usize..4,
    ) {
        let retention = Retention { last, decisions: last == 2 };
        let options = RunOptions { windows: 2, tasks: 1, checkpoint_every, retention, ..durable() };
        let setup = setup(recipe(), tp_degree, options);
        let expected = run_to_end(&setup, 100, &[]);
        let mut world = World::new(&setup, chunk);
        let mut turn = 0;
        for kill in kills {
            for _ in 0..kill {
                world.step(order[turn % order.len()]);
                turn += 1;
            }
            world.kill();
        }
        while world.step(order[turn % order.len()]) {
            turn += 1;
        }
        prop_assert_eq!(world.run.state(), RunState::Succeeded, "{}", world.last_message());
        prop_assert_eq!(world.decisions(), expected.decisions());
        prop_assert_eq!(world.steps(), expected.steps());
        prop_assert_eq!(world.evaluations(), expected.evaluations());
    }

    #[test]
    fn wishes_and_faults_in_any_order_leave_a_run_that_can_be_brought_to_its_end(
        tp_degree in 1usize..4,
        disturbances in vec((0usize..150, 0usize..6, any_wish()), 1..10),
        order in vec(0usize..5, 1..10),
    ) {
        let options = RunOptions { max_restarts: 100, ..durable() };
        let setup = setup(recipe(), tp_degree, options);
        let expected = run_to_end(&setup, 100, &[]);
        let mut world = World::new(&setup, 100);
        let mut turn = 0;
        for (before, kind, wish) in disturbances {
            for _ in 0..before {
                world.step(order[turn % order.len()]);
                turn += 1;
            }
            match kind {
                0 => world.kill(),
                1 => world.deliver(Event::WorkerLost { worker: WorkerId("w0".into()), cause: "gone".into() }),
                2 => world.failing_checkpoints = 2,
                _ => world.deliver(wish),
            }
        }
        world.settle();
        if world.run.rests() {
            world.kill();
            world.settle();
        }
        if world.run.state() == RunState::Paused {
            world.deliver(Event::ResumeRequested { reason: "asked".into() });
            world.settle();
        }
        prop_assert!(world.run.state().has_ended(), "{:?}: {}", world.run.state(), world.last_message());
        prop_assert!(world.run.state() != RunState::Failed, "{}", world.last_message());
        if world.run.state() == RunState::Succeeded {
            prop_assert_eq!(world.decisions(), expected.decisions());
            prop_assert_eq!(world.steps(), expected.steps());
            prop_assert_eq!(world.evaluations(), expected.evaluations());
        }
    }
}
