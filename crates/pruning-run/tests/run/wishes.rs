//! Pause, resume, cancel and yield, at any point.

use crate::faults::lost;
use crate::world::{World, durable, recipe, run_to_end, setup};
use pruning_run::{Event, RunOptions, RunState};

fn pause() -> Event {
    Event::PauseRequested { reason: "paused by a user".into() }
}

fn resume() -> Event {
    Event::ResumeRequested { reason: "resumed by a user".into() }
}

fn cancel(discard: bool) -> Event {
    Event::CancelRequested { reason: "cancelled by a user".into(), discard }
}

fn give_way(requeue: bool) -> Event {
    Event::YieldRequested { reason: "its workers are needed".into(), requeue }
}

/// A run after each of the events of its course.
fn at_every_event() -> Vec<(usize, World)> {
    World::queued(&setup(recipe(), 2, RunOptions { tasks: 1, ..durable() }), None, 100).at_every_event()
}

fn assert_ends_as_if_undisturbed(world: &World, after: usize) {
    let whole = run_to_end(&world.setup, 100, &[]);
    assert_eq!(world.run.state(), RunState::Succeeded, "after {after}: {}", world.last_message());
    assert_eq!(world.decisions(), whole.decisions(), "after {after}");
    assert_eq!(world.steps(), whole.steps(), "after {after}");
    assert_eq!(world.evaluations(), whole.evaluations(), "after {after}");
}

#[test]
fn a_run_paused_at_any_event_gives_its_workers_back_and_goes_on_when_asked() {
    for (after, mut world) in at_every_event() {
        let exporting = world.run.state() == RunState::Exporting;
        let before = world.steps().len();
        world.deliver(pause());
        if !exporting {
            world.settle();
            assert_eq!(world.run.state(), RunState::Paused, "after {after}");
            assert!(!world.run.holds_workers());
            assert!(world.last_message().starts_with("paused by a user; "), "{}", world.last_message());
            let saved = world.checkpoints().last().map_or(0, |place| place.steps_done);
            assert_eq!(saved as usize, world.steps().len(), "nothing that was done is lost");
            assert!(world.steps().len() <= before + 8, "it stops soon");
            // It stays paused, whoever drives it.
            world.kill();
            world.settle();
            assert_eq!(world.run.state(), RunState::Paused);
            world.deliver(resume());
        }
        world.settle();
        assert_ends_as_if_undisturbed(&world, after);
        assert!(world.restarts().is_empty(), "no step was repeated");
    }
}

#[test]
fn a_pause_taken_back_before_it_came_changes_nothing() {
    for (after, mut world) in at_every_event() {
        world.deliver(pause());
        world.step(0);
        world.deliver(resume());
        world.settle();
        assert_ends_as_if_undisturbed(&world, after);
    }
}

#[test]
fn a_run_cancelled_at_any_event_is_saved_first_unless_that_is_not_wanted() {
    for discard in [false, true] {
        for (after, mut world) in at_every_event() {
            let exporting = world.run.state() == RunState::Exporting;
            world.deliver(cancel(discard));
            if discard || exporting {
                assert_eq!(world.run.state(), RunState::Cancelled, "after {after}");
            }
            world.settle();
            assert_eq!(world.run.state(), RunState::Cancelled, "after {after}");
            assert!(!world.run.holds_workers() && world.queued.is_none());
            assert!(world.last_message().starts_with("cancelled by a user"), "{}", world.last_message());
            if !discard {
                let saved = world.checkpoints().last().map_or(0, |place| place.steps_done);
                assert_eq!(saved as usize, world.steps().len(), "after {after}");
            }
        }
    }
}

#[test]
fn a_run_that_gives_way_queues_again_or_rests_until_the_next_start() {
    for requeue in [true, false] {
        for (after, mut world) in at_every_event() {
            world.deliver(give_way(requeue));
            world.settle();
            if !requeue && !world.run.state().has_ended() {
                assert!(world.run.rests(), "after {after}: {:?}", world.run.state());
                assert!(!world.run.holds_workers());
                world.kill();
                world.settle();
            }
            assert_ends_as_if_undisturbed(&world, after);
            let repeated = world.restarts().iter().all(|restart| restart.cause.contains("started anew"));
            assert!(repeated, "no step was repeated: {:?}", world.restarts());
        }
    }
}

#[test]
fn the_end_outranks_a_pause_and_a_pause_a_new_start() {
    for (first, second, expected) in [
        (pause(), cancel(false), RunState::Cancelled),
        (cancel(false), pause(), RunState::Cancelled),
        (give_way(true), pause(), RunState::Paused),
        (pause(), give_way(true), RunState::Paused),
        (pause(), give_way(false), RunState::Paused),
        (give_way(false), cancel(false), RunState::Cancelled),
        (cancel(false), give_way(true), RunState::Cancelled),
    ] {
        for (after, world) in at_every_event() {
            if world.run.state() == RunState::Exporting {
                continue;
            }
            // The second comes at once, or while the first is on its way.
            for between in 0..4 {
                let mut world = world.clone();
                world.deliver(first.clone());
                for _ in 0..between {
                    world.step(0);
                }
                if world.run.state() == RunState::Paused || world.run.state() == RunState::Exporting {
                    continue;
                }
                world.deliver(second.clone());
                world.settle();
                let state = world.run.state();
                assert_eq!(state, expected, "after {after}+{between}: {first:?}, then {second:?}");
            }
        }
    }
}

#[test]
fn a_run_at_rest_still_takes_a_pause_and_keeps_it_over_a_start() {
    let mut world = World::new(&setup(recipe(), 2, durable()), 100);
    world.until(|world| world.decisions().len() == 2);
    world.deliver(give_way(false));
    world.settle();
    assert!(world.run.rests());
    world.deliver(pause());
    world.kill();
    world.settle();
    assert_eq!(world.run.state(), RunState::Paused);
}

#[test]
fn giving_way_outranks_a_new_start_when_the_coordinator_ends() {
    let mut world = World::new(&setup(recipe(), 2, durable()), 100);
    world.until(|world| world.decisions().len() == 2);
    world.deliver(give_way(false));
    world.deliver(give_way(true));
    world.settle();
    assert!(world.run.rests());
}

#[test]
fn a_wish_survives_a_fault_that_comes_before_it_is_granted() {
    for (wish, expected) in [(pause(), RunState::Paused), (cancel(false), RunState::Cancelled)] {
        let mut world = World::new(&setup(recipe(), 2, durable()), 100);
        world.until(|world| world.decisions().len() == 2);
        world.deliver(wish);
        world.deliver(lost("w1"));
        world.settle();
        assert_eq!(world.run.state(), expected);
        if expected == RunState::Paused {
            world.deliver(resume());
            world.settle();
            assert_ends_as_if_undisturbed_but_repeated(&world);
        }
    }
}

#[test]
fn steps_are_never_repeated_without_a_word() {
    // A fault, a pause while the next group is awaited, and another coordinator: the log alone knows of the fault.
    let mut world = World::new(&setup(recipe(), 2, durable()), 100);
    world.until(|world| world.steps().len() == 5);
    world.available = 0;
    world.deliver(lost("w1"));
    world.settle();
    world.deliver(pause());
    world.kill();
    assert_eq!(world.run.state(), RunState::Paused);
    world.available = 2;
    world.deliver(resume());
    world.settle();
    assert_ends_as_if_undisturbed_but_repeated(&world);
}

fn assert_ends_as_if_undisturbed_but_repeated(world: &World) {
    assert_ends_as_if_undisturbed(world, 0);
    assert_eq!(world.restarts().len(), 1);
}
