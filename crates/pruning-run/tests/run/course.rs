//! The course of a run: what follows what, and how it ends.

use crate::world::{NOW, World, id, model, options, recipe, report, run_to_end, setup, shaped};
use model_spec::Projection;
use pruning_run::{
    Effect, Event, Fault, Generation, RankReport, Refusal, Run, RunOptions, RunSetup, RunState, TaskScore,
    WorkerId, transition,
};
use recipe::{Budget, Criterion, Pruning, Recipe, Shape, Shrink};
use std::time::Duration;

#[test]
fn a_whole_run_passes_every_state_and_meets_its_target() {
    for tp_degree in [1, 2, 3] {
        let setup = setup(recipe(), tp_degree, options());
        let world = run_to_end(&setup, 3, &[]);
        let states: Vec<RunState> = world.states().into_iter().map(|(state, _)| state).collect();
        use RunState::{Exporting, Queued, Running, Starting, Succeeded};
        assert_eq!(states, [Queued, Starting, Running, Exporting, Succeeded], "{}", world.last_message());
        assert_eq!(world.evaluations(), [("dense".to_owned(), 0), ("pruned".to_owned(), 10)]);
        let steps: Vec<u64> = world.decisions().iter().map(|decision| decision.step).collect();
        assert_eq!(steps, [2, 4, 6, 8]);
        let last = world.decisions().pop().unwrap();
        let due = setup.target().unwrap().counts_at(1.0).unwrap();
        assert_eq!(last.widths(), due);
        assert_eq!(last.parameters, setup.target().unwrap().summary().kept_parameters);
        assert_eq!(world.run.generation(), Generation(4));
    }
}

#[test]
fn decisions_do_not_depend_on_the_number_of_ranks_the_order_of_arrival_or_the_size_of_chunks() {
    for shape in [Shape::Uniform, Shape::Paper, Shape::Global] {
        for shrink in [Shrink::Live, Shrink::Never] {
            let decide = |tp_degree, chunk, order: &[usize]| {
                run_to_end(&setup(shaped(shape, shrink), tp_degree, options()), chunk, order).decisions()
            };
            let expected = decide(1, 100, &[]);
            assert_eq!(expected.len(), 4);
            for (tp_degree, chunk, order) in
                [(2, 1, vec![1]), (2, 7, vec![0, 1]), (3, 2, vec![2, 0, 1, 1]), (6, 3, vec![5, 0])]
            {
                assert_eq!(decide(tp_degree, chunk, &order), expected, "{shape:?} over {tp_degree}");
            }
        }
    }
}

#[test]
fn what_is_not_asked_for_does_not_happen() {
    let none = RunOptions { windows: 0, exports: false, ..options() };
    let tuning = Recipe { pruning: None, ..recipe() };
    let looking = Recipe { steps: 0, pruning: None, ..recipe() };
    for (recipe, options, evaluations, last) in [
        (recipe(), none, vec![], "of 3352 parameters stay"),
        (tuning.clone(), options(), vec!["dense", "tuned"], "3352 parameters; written to /out"),
        (tuning, RunOptions { windows: 1, ..none }, vec!["dense", "tuned"], "3352 parameters"),
        (looking.clone(), RunOptions { windows: 1, ..none }, vec!["dense"], "3352 parameters"),
        (
            looking.clone(),
            RunOptions { windows: 2, tasks: 2, ..none },
            vec!["dense", "dense", "dense task-0", "dense task-1"],
            "3352 parameters",
        ),
        (looking.clone(), RunOptions { tasks: 1, ..none }, vec!["dense task-0"], "3352 parameters"),
        (looking, options(), vec!["dense"], "3352 parameters; written to /out"),
    ] {
        let steps = recipe.steps;
        let world = run_to_end(&setup(recipe, 2, options), 4, &[]);
        assert_eq!(world.run.state(), RunState::Succeeded);
        assert!(world.last_message().ends_with(last), "{}", world.last_message());
        let labels: Vec<String> = world.evaluations().into_iter().map(|(label, _)| label).collect();
        assert_eq!(labels, evaluations);
        assert_eq!(!world.checkpoints().is_empty(), steps > 0 || options.exports);
    }
}

#[test]
fn the_random_criterion_needs_no_scores() {
    let pruning = Pruning { criterion: Criterion::Random, ..recipe().pruning.unwrap() };
    let setup = setup(Recipe { pruning: Some(pruning), ..recipe() }, 2, options());
    let with_scores = run_to_end(&setup, 5, &[]);
    let mut without = World::new(&setup, 5);
    loop {
        for outbox in &mut without.outboxes {
            outbox.retain(|event| !matches!(event, Event::Scores { .. }));
        }
        if !without.step(1) {
            break;
        }
    }
    assert_eq!(without.run.state(), RunState::Succeeded, "{}", without.last_message());
    assert_eq!(without.decisions(), with_scores.decisions());
}

#[test]
fn a_queued_run_says_what_it_waits_for_once_per_change() {
    let (mut run, effects) = Run::new(id(), setup(recipe(), 2, options()), None, NOW);
    assert_eq!(effects.len(), 2);
    for (idle, registered, ahead, expected) in [
        (0, 0, 0, Some("needs 2 idle workers; none is registered")),
        (1, 3, 0, Some("needs 2 idle workers; 1 of 3 registered are idle")),
        (1, 3, 0, None),
        (2, 3, 1, Some("2 of 3 registered are idle, and 1 queued before it")),
    ] {
        let (next, effects) = transition(run, Event::WorkersShort { idle, registered, ahead }, NOW);
        let said = effects.first().map(|effect| format!("{effect:?}"));
        assert_eq!(said.is_some(), expected.is_some(), "{idle} of {registered}");
        assert!(expected.is_none_or(|expected| said.unwrap().contains(expected)));
        run = next;
    }
}

#[test]
fn a_run_cancelled_at_once_ends_its_sessions_and_nothing_comes_after() {
    let setup = setup(recipe(), 2, options());
    let whole = run_to_end(&setup, 100, &[]).delivered.len();
    for after in 0..whole - 1 {
        let mut world = World::new(&setup, 100);
        for _ in 0..after {
            world.step(0);
        }
        if world.run.state().has_ended() {
            continue;
        }
        let (run, effects) = transition(world.run.clone(), cancelled(), NOW);
        assert_eq!(run.state(), RunState::Cancelled);
        assert_eq!(effects[effects.len() - 2..], [Effect::AbortSessions, Effect::ReleaseWorkers]);
        let (again, effects) = transition(run, cancelled(), NOW);
        assert_eq!((again.state(), effects), (RunState::Cancelled, vec![]));
    }
    let (queued, _) = Run::new(id(), setup, None, NOW);
    let (run, effects) = transition(queued, cancelled(), NOW);
    assert_eq!(run.state(), RunState::Cancelled);
    assert_eq!(effects.last(), Some(&Effect::LeaveQueue), "a queued run has no sessions");
}

fn cancelled() -> Event {
    Event::CancelRequested { reason: "cancelled".into(), discard: true }
}

/// A world whose workers train the first stretch of steps and have said nothing of it yet.
fn training(tp_degree: usize) -> World {
    let mut world = World::new(&setup(recipe(), tp_degree, options()), 4);
    while !world.outboxes[0].iter().any(|event| matches!(event, Event::Scores { .. })) {
        assert!(world.step(0));
    }
    world
}

fn scores(
    tp_rank: usize,
    step: u64,
    generation: u64,
    layer: usize,
    first_unit: usize,
    values: &[f64],
) -> Event {
    let (generation, values) = (Generation(generation), values.to_vec());
    Event::Scores { tp_rank, step, generation, layer, projection: Projection::Up, first_unit, values }
}

#[test]
fn every_breach_fails_the_run_and_names_rank_worker_and_place() {
    let ended = |report: RankReport| Event::StepEnded { tp_rank: 1, report };
    let good = || report(0, Generation(0));
    for (event, expected) in [
        (scores(1, 0, 0, 2, 0, &[1.0, f64::NAN]), "layer 2 `up_proj`: score of unit 11 is NaN"),
        (scores(1, 0, 0, 2, 0, &[f64::INFINITY]), "layer 2 `up_proj`: score of unit 10 is inf"),
        (scores(1, 0, 0, 3, 0, &[1.0]), "scores for layer 3, but the model has 3 layers"),
        (scores(1, 0, 0, 0, 8, &[1.0; 3]), "units 8..11 of layer 0 `up_proj`, but holds 10"),
        (scores(1, 0, 0, 0, usize::MAX, &[1.0; 3]), "but holds 10"),
        (scores(1, 1, 0, 0, 0, &[1.0]), "it sent scores of step 1; its step 0 is due"),
        (scores(1, 0, 1, 0, 0, &[1.0]), "it sent scores of generation 1; generation 0 is in force"),
        (ended(RankReport { loss: f64::NAN, ..good() }), "loss of step 0 is NaN"),
        (ended(RankReport { grad_norm: f64::INFINITY, ..good() }), "gradient norm of step 0 is inf"),
        (ended(RankReport { step: 2, ..good() }), "it sent a report of step 2; its step 0 is due"),
        (ended(RankReport { generation: Generation(7), ..good() }), "generation 7; generation 0 is in force"),
        (Event::TrainEnded { tp_rank: 1 }, "its stream ended before step 0 of 1"),
        (
            Event::RankFailed { tp_rank: 1, fault: Fault::Own("out of memory".into()) },
            "failed while training step 0: out of memory",
        ),
        (
            Event::WorkerLost { worker: WorkerId("w1".into()), cause: "its lease ran out".into() },
            "its lease ran out",
        ),
    ] {
        let mut world = training(2);
        world.deliver(event);
        assert_eq!(world.run.state(), RunState::Failed);
        let message = world.last_message();
        assert!(message.contains(expected), "{message}");
        assert!(message.contains("worker `w1` (rank 1)"), "{message}");
    }
}

#[test]
fn scores_that_come_twice_or_not_at_all_fail_the_run() {
    let mut doubled = training(2);
    doubled.deliver(scores(1, 0, 0, 0, 0, &[1.0]));
    doubled.deliver(scores(1, 0, 0, 0, 0, &[1.0]));
    assert!(
        doubled.last_message().contains("unit 10 was scored twice in one step"),
        "{}",
        doubled.last_message()
    );

    let mut missing = training(2);
    let dropped = missing.outboxes[1].iter().position(|event| matches!(event, Event::Scores { .. })).unwrap();
    missing.outboxes[1].remove(dropped);
    missing.settle();
    assert_eq!(missing.run.state(), RunState::Failed);
    assert!(missing.decisions().is_empty());
    assert!(
        missing.last_message().contains("scores are missing; first layer 0 `q_proj`"),
        "{}",
        missing.last_message()
    );
}

#[test]
fn ranks_that_disagree_fail_the_run() {
    let mut losses = training(2);
    for event in losses.outboxes[1].iter_mut() {
        if let Event::StepEnded { report, .. } = event {
            report.loss *= 1.001;
        }
    }
    losses.settle();
    assert!(losses.last_message().contains("ranks diverged at step 0"), "{}", losses.last_message());

    let setup = setup(recipe(), 2, options());
    let mut data = World::new(&setup, 4);
    data.outboxes[1][0] = Event::Loaded { tp_rank: 1, data_sha256: "other".into() };
    data.settle();
    assert!(data.last_message().contains("worker `w1` (rank 1) has loaded other training data"));

    for (nats, tokens, expected) in
        [(20.1, 10, "ranks diverged"), (20.0, 11, "ranks diverged"), (f64::NAN, 10, "cannot be measured")]
    {
        let mut measured = World::new(&setup, 4);
        while !matches!(measured.outboxes[1].front(), Some(Event::Evaluated { .. })) {
            measured.step(0);
        }
        if let Some(Event::Evaluated { negative_log_likelihood, predicted_tokens, .. }) =
            measured.outboxes[1].front_mut()
        {
            (*negative_log_likelihood, *predicted_tokens) = (nats, tokens);
        }
        measured.settle();
        assert!(measured.last_message().contains(expected), "{}", measured.last_message());
    }
}

#[test]
fn ranks_that_disagree_on_a_task_fail_the_run() {
    let setup = setup(recipe(), 2, RunOptions { windows: 0, tasks: 1, ..options() });
    for (change, expected) in [
        ((|score| score.count += 1) as fn(&mut TaskScore), "ranks diverged"),
        (|score| score.log_likelihood -= 0.1, "ranks diverged"),
        (|score| score.task = "other".into(), "ranks diverged"),
        (|score| score.log_likelihood = f64::NAN, "cannot be measured"),
        (|score| score.correct = 9, "cannot be measured"),
    ] {
        let mut measured = World::new(&setup, 4);
        while !matches!(measured.outboxes[1].front(), Some(Event::TaskEvaluated { .. })) {
            measured.step(0);
        }
        if let Some(Event::TaskEvaluated { score, .. }) = measured.outboxes[1].front_mut() {
            change(score);
        }
        measured.settle();
        assert!(measured.last_message().contains(expected), "{}", measured.last_message());
    }
}

#[test]
fn a_stale_acknowledgement_is_refused_and_a_repeated_one_is_harmless() {
    let mut world = training(2);
    while world.run.generation() < Generation(2) {
        assert!(world.step(0));
    }
    for (generation, refused) in [(0, true), (1, true), (3, true), (2, false), (2, false)] {
        let event = Event::MaskApplied { tp_rank: 0, generation: Generation(generation) };
        let (run, effects) = transition(world.run.clone(), event, NOW);
        let refusal =
            effects.iter().any(|effect| matches!(effect, Effect::Refuse(Refusal::OtherGeneration { .. })));
        assert_eq!(refusal, refused);
        assert!(
            !effects.iter().any(|effect| matches!(effect, Effect::Train { .. })),
            "rank 1 has not answered"
        );
        world.run = run;
    }
    world.settle();
    assert_eq!(world.run.state(), RunState::Succeeded, "{}", world.last_message());
}

#[test]
fn the_rank_that_was_lost_is_blamed_before_those_that_miss_it() {
    let peer = |tp_rank| Event::RankFailed { tp_rank, fault: Fault::PeerLost("connection reset".into()) };
    let mut blamed = training(3);
    blamed.deliver(peer(0));
    assert_eq!(blamed.run.state(), RunState::Running, "waits for the culprit");
    blamed.deliver(Event::RankFailed { tp_rank: 2, fault: Fault::Own("unreachable".into()) });
    assert!(blamed.last_message().contains("worker `w2` (rank 2)"));

    let mut everyone = training(2);
    everyone.deliver(peer(1));
    everyone.deliver(peer(0));
    assert!(everyone.last_message().contains("worker `w1` (rank 1)"), "{}", everyone.last_message());

    let mut silent = training(2);
    silent.deliver(peer(1));
    silent.deliver(Event::Woken);
    assert_eq!(silent.run.state(), RunState::Running, "too early");
    let (run, _) = transition(silent.run, Event::Woken, NOW + Duration::from_secs(5));
    assert_eq!(run.state(), RunState::Failed);
}

#[test]
fn while_rank_zero_exports_the_others_may_leave() {
    let mut world = World::new(&setup(recipe(), 2, options()), 4);
    while !world.outboxes.iter().flatten().any(|event| matches!(event, Event::Exported { .. })) {
        assert!(world.step(0));
    }
    world.deliver(Event::WorkerLost { worker: WorkerId("w1".into()), cause: "scaled down".into() });
    assert_eq!(world.run.state(), RunState::Exporting);
    world.deliver(Event::RankFailed { tp_rank: 0, fault: Fault::Own("disk full".into()) });
    assert!(world.last_message().contains("worker `w0` (rank 0) failed while exporting: disk full"));
}

#[test]
fn a_setup_that_cannot_be_names_all_that_is_wrong() {
    let pruning = Pruning { budget: Budget::Sparsity(1.5), channel_multiple: 0, ..Pruning::published() };
    let error =
        RunSetup::new(model(), Recipe { pruning: Some(pruning), ..recipe() }, 7, options()).unwrap_err();
    let fields: Vec<&str> = error.recipe.iter().map(|violation| violation.field.as_str()).collect();
    assert_eq!(fields, ["pruning.budget.sparsity", "pruning.channel_multiple"]);
    assert!(error.placement.is_some());
}
