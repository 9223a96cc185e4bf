//! Runs that begin where another was.

use crate::faults::lost;
use crate::world::{World, durable, recipe, run_to_end, setup};
use pruning_run::{CheckpointRef, Generation, RunId, RunOptions, RunSetup, RunState};
use std::sync::Arc;

/// A run that begins at a checkpoint of `parent`.
pub(crate) fn fork(parent: &World, place: &CheckpointRef, setup: &Arc<RunSetup>) -> World {
    let of_parent = RunId("parent".into());
    let origin = CheckpointRef { run_id: of_parent.clone(), ..place.clone() };
    let state = parent.saved[&(place.run_id.clone(), place.name.clone())].clone();
    let mut world = World::queued(setup, Some(origin), 100);
    world.saved.insert((of_parent, place.name.clone()), state);
    world
}

#[test]
fn a_fork_prunes_on_from_any_decision_as_its_parent_did() {
    let setup = setup(recipe(), 2, durable());
    let parent = run_to_end(&setup, 100, &[]);
    for place in parent.checkpoints() {
        let mut world = fork(&parent, &place, &setup);
        world.settle();
        assert_eq!(world.run.state(), RunState::Succeeded, "{}", world.last_message());
        assert_eq!(world.decisions(), parent.decisions()[place.generation.0 as usize..]);
        assert!(world.restarts().is_empty(), "its beginning is no restart");
        let steps: Vec<_> = world.steps().into_values().collect();
        let expected: Vec<_> = parent.steps().into_values().skip(place.steps_done as usize).collect();
        assert_eq!(steps, expected);
        assert!(world.saved.keys().any(|(run_id, _)| run_id.0 == "parent"), "what is not its own stays");
    }
}

#[test]
fn a_fork_that_stops_pruning_keeps_the_mask_it_began_with() {
    let parent = run_to_end(&setup(recipe(), 2, durable()), 100, &[]);
    let setup = setup(recipe(), 2, RunOptions { stop_pruning: true, ..durable() });
    for place in parent.checkpoints() {
        for kill in [false, true] {
            let mut world = fork(&parent, &place, &setup);
            world.step(0);
            if kill {
                world.until(|world| world.run.state() == RunState::Running);
                world.kill();
            }
            world.settle();
            assert_eq!(world.run.state(), RunState::Succeeded, "{}", world.last_message());
            assert!(world.decisions().is_empty());
            assert!(world.steps().values().all(|report| report.generation == place.generation));
        }
    }
}

#[test]
fn a_fork_that_fails_goes_on_from_its_own_last_checkpoint_or_its_beginning() {
    let setup = setup(recipe(), 2, durable());
    let parent = run_to_end(&setup, 100, &[]);
    let place = parent.checkpoints().into_iter().find(|place| place.generation == Generation(2)).unwrap();
    for (own, expected) in [(0, place.steps_done), (1, 7)] {
        let mut world = fork(&parent, &place, &setup);
        world.until(|world| world.run.state() == RunState::Running && world.checkpoints().len() == own);
        world.deliver(lost("w0"));
        world.until(|world| world.run.state() == RunState::Running && world.loads.len() == 2);
        assert_eq!(world.loads[1].as_ref().expect("a checkpoint").state.steps_done, expected);
        world.settle();
        assert_eq!(world.run.state(), RunState::Succeeded, "{}", world.last_message());
        assert_eq!(world.decisions(), parent.decisions()[2..]);
    }
}

#[test]
fn a_fork_whose_only_checkpoint_is_damaged_goes_back_to_its_beginning() {
    let setup = setup(recipe(), 2, durable());
    let parent = run_to_end(&setup, 100, &[]);
    let place = parent.checkpoints().into_iter().find(|place| place.generation == Generation(2)).unwrap();
    let mut world = fork(&parent, &place, &setup);
    world.until(|world| world.checkpoints().len() == 1);
    world.damaged.insert(world.checkpoints()[0].name.clone());
    world.deliver(lost("w0"));
    world.settle();
    assert_eq!(world.run.state(), RunState::Succeeded, "{}", world.last_message());
    assert_eq!(world.restarts()[0].next_step, place.steps_done);
    assert_eq!(world.decisions(), parent.decisions()[2..]);
}
