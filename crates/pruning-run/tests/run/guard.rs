//! The quality guard: prune on only while the held-out text stays within a bound.

use crate::world::{World, durable, recipe, run_to_end, setup};
use pruning_run::{Guard, GuardAction, GuardBound, RunOptions, RunState};

fn guarded(bound: GuardBound, action: GuardAction) -> RunOptions {
    RunOptions { guard: Some(Guard { bound, action }), ..durable() }
}

/// A run whose perplexity is `exp(nats / 10)` under each generation.
fn run(options: RunOptions, nats: &[f64]) -> World {
    let mut world = World::new(&setup(recipe(), 2, options), 100);
    world.nats = nats.to_vec();
    world.settle();
    world
}

/// Mask looked at, and what followed.
fn verdicts(world: &World) -> Vec<(u64, Option<GuardAction>)> {
    world.verdicts().iter().map(|verdict| (verdict.generation.0, verdict.action)).collect()
}

const WITHIN: GuardBound = GuardBound::Ratio(1.1);

#[test]
fn within_its_bound_a_run_prunes_as_it_would_unguarded() {
    let world = run(guarded(WITHIN, GuardAction::Hold), &[20.0]);
    assert_eq!(world.run.state(), RunState::Succeeded, "{}", world.last_message());
    assert_eq!(verdicts(&world), [(1, None), (2, None), (3, None), (4, None)]);
    assert_eq!(world.decisions(), run_to_end(&setup(recipe(), 2, durable()), 100, &[]).decisions());
}

#[test]
fn beyond_its_bound_a_run_that_holds_keeps_its_mask_to_the_end() {
    for bound in [WITHIN, GuardBound::Perplexity(8.0)] {
        let world = run(guarded(bound, GuardAction::Hold), &[20.0, 20.5, 22.0]);
        assert_eq!(world.run.state(), RunState::Succeeded, "{}", world.last_message());
        assert_eq!(verdicts(&world), [(1, None), (2, Some(GuardAction::Hold))]);
        assert_eq!(world.decisions().len(), 2);
        assert_eq!(world.steps()[&9].generation.0, 2);
        assert!(world.restarts().is_empty());
    }
}

#[test]
fn beyond_its_bound_a_run_that_reverts_goes_back_to_the_decision_before() {
    let world = run(guarded(WITHIN, GuardAction::Revert), &[20.0, 20.5, 22.0]);
    assert_eq!(world.run.state(), RunState::Succeeded, "{}", world.last_message());
    assert_eq!(verdicts(&world), [(1, None), (2, Some(GuardAction::Revert))]);
    let restored = world.loads[1].as_ref().expect("a checkpoint");
    assert_eq!((restored.state.steps_done, restored.state.generation.0), (3, 1));
    assert_eq!(world.steps()[&9].generation.0, 1);
    let restart = &world.restarts()[0];
    assert_eq!((restart.next_step, restart.generation.0), (3, 1));
    assert!(restart.cause.contains("under mask 2 exceeds 8.1"), "{}", restart.cause);
    assert!(world.run.checkpoints().iter().all(|place| place.generation.0 < 2));
}

#[test]
fn a_first_mask_that_is_too_much_is_undone_down_to_the_dense_model() {
    for checkpoint_every in [2, 100] {
        let options = RunOptions { checkpoint_every, ..guarded(WITHIN, GuardAction::Revert) };
        let world = run(options, &[20.0, 22.0]);
        assert_eq!(world.run.state(), RunState::Succeeded, "{}", world.last_message());
        assert_eq!(verdicts(&world), [(1, Some(GuardAction::Revert))]);
        assert_eq!(world.steps()[&9].generation.0, 0);
        assert_eq!(world.restarts()[0].next_step, if checkpoint_every == 2 { 2 } else { 0 });
        assert!(world.last_message().starts_with("3352 of 3352 parameters stay"), "{}", world.last_message());
    }
}

#[test]
fn the_last_mask_is_looked_at_too() {
    for (action, last) in [(GuardAction::Hold, 4), (GuardAction::Revert, 3)] {
        let world = run(guarded(WITHIN, action), &[20.0, 20.0, 20.0, 20.0, 22.0]);
        assert_eq!(world.run.state(), RunState::Succeeded, "{}", world.last_message());
        assert_eq!(verdicts(&world).last(), Some(&(4, Some(action))));
        assert_eq!(world.steps()[&9].generation.0, last);
    }
}

#[test]
fn a_guarded_run_killed_at_any_event_and_resumed_ends_with_the_same_mask() {
    for action in [GuardAction::Hold, GuardAction::Revert] {
        // With few checkpoints, so that decisions and verdicts are met again.
        for every in [2, 100] {
            let options = RunOptions { checkpoint_every: every, ..guarded(WITHIN, action) };
            let setup = setup(recipe(), 2, options);
            let nats = [20.0, 20.5, 22.0];
            let whole = run(options, &nats);
            let mut world = World::queued(&setup, None, 100);
            world.nats = nats.to_vec();
            for (after, mut world) in world.at_every_event() {
                world.kill();
                world.settle();
                assert_eq!(world.run.state(), RunState::Succeeded, "{}", world.last_message());
                assert_eq!(world.decisions(), whole.decisions(), "killed after {after}");
                assert_eq!(world.steps(), whole.steps(), "killed after {after}");
                assert_eq!(world.run.keep_mask(), whole.run.keep_mask(), "killed after {after}");
            }
        }
    }
}

#[test]
fn a_mask_that_was_held_is_put_into_force_again_after_a_fault() {
    let options = guarded(WITHIN, GuardAction::Hold);
    let mut world = World::new(&setup(recipe(), 2, options), 100);
    world.nats = vec![20.0, 20.5, 22.0];
    world.until(|world| world.verdicts().len() == 2);
    // All checkpoints from the held mask on are lost.
    for place in world.checkpoints().iter().filter(|place| place.generation.0 == 2) {
        world.damaged.insert(place.name.clone());
    }
    world.kill();
    world.settle();
    assert_eq!(world.run.state(), RunState::Succeeded, "{}", world.last_message());
    assert_eq!(world.steps()[&9].generation.0, 2);
    assert_eq!(world.verdicts().len(), 2, "what was looked at is not looked at again");
}

#[test]
fn a_ratio_needs_the_dense_model_to_have_been_measured() {
    let whole = run_to_end(&setup(recipe(), 2, durable()), 100, &[]);
    let place = whole.checkpoints().into_iter().find(|place| place.generation.0 == 1).unwrap();
    let setup = setup(recipe(), 2, guarded(WITHIN, GuardAction::Hold));
    let mut fork = crate::forks::fork(&whole, &place, &setup);
    fork.settle();
    assert_eq!(fork.run.state(), RunState::Failed);
    assert_eq!(fork.last_message(), "the quality guard has no perplexity of the dense model to compare with");
}
