//! Checkpoints: which are written, what happens when one is not, and which are kept.

use crate::faults::lost;
use crate::world::{World, durable, recipe, run_to_end, setup};
use pruning_run::{Event, Generation, Retention, RunOptions, RunState, ShardFile, StepReport};

#[test]
fn a_checkpoint_follows_every_decision_every_interval_and_the_last_step() {
    let world = run_to_end(&setup(recipe(), 2, durable()), 100, &[]);
    let places: Vec<(u64, u64)> =
        world.checkpoints().iter().map(|place| (place.steps_done, place.generation.0)).collect();
    // The first stretch is one step long, to learn how long steps take.
    assert_eq!(places, [(2, 0), (3, 1), (5, 2), (7, 3), (9, 4), (10, 4)]);
}

#[test]
fn a_checkpoint_that_fails_costs_nothing_but_its_interval() {
    let setup = setup(recipe(), 2, durable());
    let whole = run_to_end(&setup, 100, &[]);
    for failing in 1..=3 {
        let mut world = World::new(&setup, 100);
        world.failing_checkpoints = failing;
        world.settle();
        assert_eq!(world.run.state(), RunState::Succeeded, "{}", world.last_message());
        let places = |world: &World| -> Vec<(u64, Generation)> {
            world.checkpoints().iter().map(|place| (place.steps_done, place.generation)).collect()
        };
        assert_eq!(places(&world), places(&whole)[failing..]);
        assert_eq!((world.steps(), world.decisions()), (whole.steps(), whole.decisions()));
        assert!(world.restarts().is_empty());
        let said = "the checkpoint after 2 steps was not written: disk full; another will be tried";
        assert!(world.states().contains(&(RunState::Running, said.into())), "{:?}", world.states());
    }
}

#[test]
fn the_last_checkpoint_is_tried_again_and_then_the_run_fails() {
    for (failing, ends_well) in [(1, true), (3, true), (4, false)] {
        let mut world = World::new(&setup(recipe(), 2, durable()), 100);
        world.until(|world| world.checkpoints().len() == 5);
        world.failing_checkpoints = failing;
        let before = world.now;
        world.settle();
        // Tried again at once, then after 1, 2, … seconds.
        let pauses = world.now.duration_since(before).unwrap().as_secs();
        assert_eq!(pauses, [0, 0, 0, 3, 3][failing]);
        assert_eq!(world.run.state() == RunState::Succeeded, ends_well, "{}", world.last_message());
        if !ends_well {
            assert_eq!(world.last_message(), "the checkpoint after 10 steps was not written: disk full");
        }
    }
}

#[test]
fn what_a_rank_says_of_a_failed_checkpoint_is_not_taken_for_the_next() {
    let mut world = World::new(&setup(recipe(), 2, durable()), 100);
    world.failing_checkpoints = 1;
    let is_written = |event: &Event| matches!(event, Event::Checkpointed { .. });
    world.until(|world| world.outboxes[0].iter().any(is_written));
    // Rank 0 is slow: its copy of the first checkpoint is written while the next is taken.
    let late = world.outboxes[0].iter().position(is_written).unwrap();
    let late = world.outboxes[0].remove(late).unwrap();
    world.until(|world| world.outboxes[0].iter().any(is_written));
    world.deliver(late);
    world.settle();
    assert_eq!(world.run.state(), RunState::Succeeded, "{}", world.last_message());
    for ((_, name), state) in &world.saved {
        let of_its_own = |shard: &ShardFile| shard.file.starts_with(&format!("{name}/"));
        assert!(state.shards.iter().all(of_its_own), "{name}: {:?}", state.shards);
    }
}

#[test]
fn retention_keeps_the_last_ones_and_the_first_of_each_mask() {
    for (last, decisions, expected) in
        [(1, false, vec![10]), (2, false, vec![9, 10]), (1, true, vec![3, 5, 7, 9, 10]), (0, false, vec![10])]
    {
        let retention = Retention { last, decisions };
        let world = run_to_end(&setup(recipe(), 2, RunOptions { retention, ..durable() }), 100, &[]);
        let kept: Vec<u64> = world.saved.values().map(|state| state.steps_done).collect();
        assert_eq!(kept, expected);
        let known: Vec<u64> = world.run.checkpoints().iter().map(|place| place.steps_done).collect();
        assert_eq!(known, expected);
    }
}

#[test]
fn a_checkpoint_is_not_dropped_while_a_group_reads_it() {
    let options = RunOptions { retention: Retention { last: 1, decisions: false }, ..durable() };
    let mut world = World::new(&setup(recipe(), 2, options), 100);
    world.until(|world| world.checkpoints().len() == 1);
    let is_commit = |event: &Event| matches!(event, Event::CheckpointWritten { .. });
    while !world.own.iter().any(is_commit) {
        world.step(0);
    }
    // The next one is complete only once the group that goes on from the first reads it.
    let commit = world.own.pop_back().unwrap();
    world.deliver(lost("w0"));
    while !world.own.iter().any(|event| matches!(event, Event::Restored { .. })) {
        world.step(0);
    }
    world.deliver(commit);
    assert_eq!(world.saved.len(), 2, "the one that is read and the new one");
    world.settle();
    assert_eq!(world.run.state(), RunState::Succeeded, "{}", world.last_message());
    assert_eq!(world.saved.len(), 1);
}

#[test]
fn a_checkpoint_completed_while_the_next_group_reads_an_older_one_is_gone_on_from() {
    let setup = setup(recipe(), 2, durable());
    let whole = run_to_end(&setup, 100, &[]);
    for last in [false, true] {
        let mut world = World::new(&setup, 100);
        world.until(|world| world.checkpoints().len() == if last { 5 } else { 2 });
        let is_commit = |event: &Event| matches!(event, Event::CheckpointWritten { .. });
        while !world.own.iter().any(is_commit) {
            world.step(0);
        }
        let commit = world.own.pop_back().unwrap();
        // All but the write itself is done.
        world.until(|world| !last || world.evaluations().len() == 2);
        world.deliver(lost("w0"));
        let mut queued = world.clone();
        while !world.own.iter().any(|event| matches!(event, Event::Restored { .. })) {
            world.step(0);
        }
        world.deliver(commit.clone());
        world.settle();
        assert_eq!(world.run.state(), RunState::Succeeded);
        // Or while it waits for its workers.
        while !queued.own.iter().any(|event| matches!(event, Event::WorkersAssigned { .. })) {
            queued.step(0);
        }
        queued.deliver(commit);
        queued.settle();
        assert_eq!(queued.run.state(), RunState::Succeeded, "{}", queued.last_message());
        assert_eq!(queued.last_message(), whole.last_message());
        assert_eq!(world.last_message(), whole.last_message());
        assert_eq!(world.loads.len(), if last { 1 } else { 2 });
        if !last {
            assert_eq!(world.restarts()[0].next_step, 5);
        }
    }
}

#[test]
fn a_decision_that_was_logged_is_applied_again_and_not_logged_again() {
    let setup = setup(recipe(), 2, RunOptions { checkpoint_every: 100, ..durable() });
    let mut world = World::new(&setup, 100);
    // Mask 1 is logged and its checkpoint is not complete.
    world.until(|world| world.decisions().len() == 1);
    world.kill();
    world.until(|world| world.run.generation() == Generation(1));
    assert_eq!(world.decisions().len(), 1);
    world.settle();
    assert_eq!(world.run.state(), RunState::Succeeded, "{}", world.last_message());
    assert_eq!(world.decisions(), run_to_end(&setup, 100, &[]).decisions());
}

#[test]
fn a_skipped_step_is_reported_and_not_averaged() {
    let setup = setup(recipe(), 2, durable());
    let mut world = World::new(&setup, 100);
    world.skipped.insert(1);
    world.until(|world| world.decisions().len() == 1);
    assert_eq!(world.run.average().unwrap().updates, 2, "of three steps");
    world.settle();
    assert_eq!(world.run.state(), RunState::Succeeded, "{}", world.last_message());
    let skipped = &world.steps()[&1];
    assert_eq!(skipped.skipped, "the loss is NaN");
    let stored = serde_json::to_string(skipped).unwrap();
    assert!(serde_json::from_str::<StepReport>(&stored).unwrap().loss.is_nan(), "{stored}");
    assert!(world.steps()[&2].skipped.is_empty());
}
