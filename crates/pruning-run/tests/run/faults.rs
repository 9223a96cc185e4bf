//! Lost workers, numbers that are not finite, damaged checkpoints: what a run goes on from, and when it gives up.

use crate::world::{NOW, World, durable, recipe, report, run_to_end, setup};
use pruning_run::{Event, Fault, Generation, RankReport, RunOptions, RunState, WorkerId};
use std::time::Duration;

pub(crate) fn lost(worker: &str) -> Event {
    Event::WorkerLost { worker: WorkerId(worker.into()), cause: "its lease ran out".into() }
}

#[test]
fn a_worker_lost_at_any_event_costs_a_restart_and_changes_nothing() {
    let setup = setup(recipe(), 2, durable());
    let whole = run_to_end(&setup, 100, &[]);
    for (after, mut world) in World::queued(&setup, None, 100).at_every_event() {
        let held = world.run.holds_workers();
        let trained = !world.steps().is_empty();
        let exporting = world.run.state() == RunState::Exporting;
        world.deliver(lost("w0"));
        world.settle();
        assert_eq!(world.run.state(), RunState::Succeeded, "{after}: {}", world.last_message());
        assert_eq!(world.decisions(), whole.decisions());
        assert_eq!(world.steps(), whole.steps());
        assert_eq!(world.evaluations(), whole.evaluations());
        let restarts = world.restarts();
        // Only the export was left: no group was formed again.
        assert_eq!(restarts.len(), usize::from(held && !exporting), "{after}");
        if trained && !exporting {
            assert!(restarts[0].cause.contains("worker `w0` (rank 0) was lost while"), "{restarts:?}");
            assert!(restarts[0].cause.contains("its lease ran out"));
            let checkpoint = world.loads[1].as_ref().map_or(0, |restore| restore.state.steps_done);
            assert_eq!(restarts[0].next_step, checkpoint);
        }
    }
}

#[test]
fn faults_in_a_row_are_bounded_and_a_checkpoint_between_them_starts_the_count_anew() {
    let mut world = World::new(&setup(recipe(), 2, durable()), 100);
    for _ in 0..3 {
        world.until(|world| world.run.state() == RunState::Running);
        world.deliver(lost("w1"));
    }
    world.until(|world| world.run.state() == RunState::Running);
    let restarts: Vec<u32> = world.restarts().iter().map(|restart| restart.restarts).collect();
    assert_eq!(restarts, [1, 2, 3]);
    let mut helped = world;
    let checkpoints = helped.checkpoints().len();
    helped.until(|world| world.checkpoints().len() > checkpoints);
    helped.deliver(lost("w1"));
    assert_eq!(helped.run.state(), RunState::Recovering);
    helped.settle();
    assert_eq!(helped.run.state(), RunState::Succeeded, "{}", helped.last_message());

    for (most, expected) in [
        (0, "its lease ran out"),
        (1, "its lease ran out; a restart did not help"),
        (2, "its lease ran out; 2 restarts in a row did not help"),
    ] {
        let mut world = World::new(&setup(recipe(), 2, RunOptions { max_restarts: most, ..durable() }), 100);
        for _ in 0..=most {
            world.until(|world| world.run.state() == RunState::Running);
            world.deliver(lost("w1"));
        }
        assert_eq!(world.run.state(), RunState::Failed);
        assert!(world.last_message().ends_with(expected), "{}", world.last_message());
        assert!(world.last_message().contains("worker `w1` (rank 1) was lost while"));
    }
}

#[test]
fn after_a_second_fault_in_a_row_the_next_try_waits_and_each_time_longer() {
    let mut world = World::new(&setup(recipe(), 2, RunOptions { max_restarts: 20, ..durable() }), 100);
    let mut pauses = Vec::new();
    for _ in 0..8 {
        world.until(|world| world.run.state() == RunState::Running);
        world.deliver(lost("w1"));
        let before = world.now;
        world.until(|world| world.run.state() == RunState::Starting);
        pauses.push(world.now.duration_since(before).unwrap().as_secs());
    }
    assert_eq!(pauses, [0, 1, 2, 4, 8, 16, 30, 30]);
}

#[test]
fn a_wake_up_before_its_time_is_asked_for_again() {
    let mut world = World::new(&setup(recipe(), 2, durable()), 100);
    for _ in 0..2 {
        world.until(|world| world.run.state() == RunState::Running);
        world.deliver(lost("w1"));
    }
    world.step(0);
    world.deliver(Event::Woken);
    assert_eq!(world.run.state(), RunState::Recovering, "too early");
    world.settle();
    assert_eq!(world.run.state(), RunState::Succeeded, "{}", world.last_message());

    let mut suspicious = World::new(&setup(recipe(), 2, durable()), 100);
    suspicious.until(|world| world.run.state() == RunState::Running);
    suspicious.outboxes[0].clear();
    suspicious.outboxes[1].clear();
    suspicious.deliver(Event::RankFailed { tp_rank: 1, fault: Fault::PeerLost("reset".into()) });
    suspicious.deliver(Event::Woken);
    suspicious.settle();
    assert_eq!(suspicious.run.state(), RunState::Succeeded, "{}", suspicious.last_message());
    assert_eq!(suspicious.now, NOW + Duration::from_secs(5), "the grace was waited out");
}

#[test]
fn a_number_that_is_not_finite_sends_the_run_back_and_a_breach_of_the_protocol_ends_it() {
    for (loss, generation, ends) in [(f64::NAN, 0, false), (1.0, 7, true)] {
        let mut world = World::new(&setup(recipe(), 1, durable()), 100);
        world.until(|world| world.run.state() == RunState::Running && world.evaluations().len() == 1);
        let report = RankReport { loss, ..report(0, Generation(generation)) };
        world.deliver(Event::StepEnded { tp_rank: 0, report });
        assert_eq!(world.run.state() == RunState::Failed, ends);
        world.settle();
        assert_eq!(world.run.state() == RunState::Succeeded, !ends);
    }
}

#[test]
fn a_fault_that_would_come_again_ends_the_run_at_once() {
    let mut world = World::new(&setup(recipe(), 2, durable()), 100);
    world.deliver(Event::RankFailed { tp_rank: 1, fault: Fault::Lasting("no such file".into()) });
    assert_eq!(world.run.state(), RunState::Failed);
    assert_eq!(world.last_message(), "worker `w1` (rank 1) failed while loading: no such file");
}

#[test]
fn a_damaged_checkpoint_is_given_up_for_the_one_before() {
    let setup = setup(recipe(), 2, durable());
    let whole = run_to_end(&setup, 100, &[]);
    // Found by the coordinator, or by a rank while it loads.
    for found_by_rank in [false, true] {
        let mut world = World::new(&setup, 100);
        world.until(|world| world.checkpoints().len() == 3);
        let places = world.checkpoints();
        if !found_by_rank {
            world.damaged.insert(places[2].name.clone());
        }
        world.deliver(lost("w0"));
        if found_by_rank {
            world.until(|world| world.loads.len() == 2);
            world.deliver(Event::RankFailed { tp_rank: 0, fault: Fault::Lasting("another digest".into()) });
        }
        world.until(|world| world.run.state() == RunState::Running);
        let restored = world.loads.last().unwrap().as_ref().expect("a checkpoint");
        assert_eq!(restored.checkpoint, places[1]);
        let restart = world.restarts().pop().unwrap();
        assert_eq!((restart.next_step, restart.generation), (places[1].steps_done, places[1].generation));
        // What is known to be damaged is not tried again, by this coordinator or the next.
        world.kill();
        world.settle();
        assert_eq!(world.run.state(), RunState::Succeeded, "{}", world.last_message());
        assert_eq!(world.decisions(), whole.decisions());
        assert_eq!(world.steps(), whole.steps());
    }
}

#[test]
fn a_run_whose_only_checkpoint_is_damaged_says_so_and_ends() {
    let mut world = World::new(&setup(recipe(), 2, durable()), 100);
    world.until(|world| world.checkpoints().len() == 1);
    world.damaged.insert(world.checkpoints()[0].name.clone());
    world.deliver(lost("w0"));
    world.settle();
    assert_eq!(world.run.state(), RunState::Failed);
    assert_eq!(world.last_message(), "the checkpoint after 2 steps cannot be read: its digest differs");
}

#[test]
fn a_run_goes_on_with_fewer_workers_where_that_is_allowed() {
    for (min_tp_degree, expected) in [(1, Some(1)), (2, Some(2)), (usize::MAX, None)] {
        let setup = setup(recipe(), 3, RunOptions { min_tp_degree, ..durable() });
        let whole = run_to_end(&setup, 100, &[]);
        let mut world = World::new(&setup, 100);
        world.until(|world| world.decisions().len() == 2);
        world.available = expected.unwrap_or(2);
        world.deliver(lost("w2"));
        world.settle();
        match expected {
            None => {
                assert_eq!(world.queued, Some((3, 3)));
                world.available = 3;
                world.assign();
                world.settle();
            }
            Some(degree) => assert_eq!(world.restarts()[0].tp_degree, degree),
        }
        assert_eq!(world.run.state(), RunState::Succeeded, "{}", world.last_message());
        assert_eq!(world.decisions(), whole.decisions());
        assert_eq!(world.steps().len(), 10);
    }
}

#[test]
fn a_run_that_has_not_begun_waits_for_all_its_workers() {
    let setup = setup(recipe(), 3, RunOptions { min_tp_degree: 1, ..durable() });
    let mut world = World::queued(&setup, None, 100);
    assert_eq!(world.queued, None, "three are there");
    world.own.clear();
    world.queued = Some((3, 3));
    world.deliver(Event::WorkersShort { idle: 2, registered: 2, ahead: 0 });
    assert_eq!(world.last_message(), "needs 3 idle workers; 2 of 2 registered are idle");
    world.kill();
    assert!(
        world
            .own
            .iter()
            .any(|event| matches!(event, Event::WorkersAssigned { workers } if workers.len() == 3))
    );
}

#[test]
fn for_an_export_that_is_left_one_worker_is_enough() {
    let mut world = World::new(&setup(recipe(), 3, durable()), 100);
    world.until(|world| world.run.state() == RunState::Exporting);
    let loads = world.loads.len();
    world.available = 1;
    world.deliver(lost("w0"));
    world.settle();
    assert_eq!(world.run.state(), RunState::Succeeded, "{}", world.last_message());
    assert_eq!(world.loads.len(), loads, "nothing is loaded for it");

    let mut waits = World::new(&setup(recipe(), 3, durable()), 100);
    waits.until(|world| world.run.state() == RunState::Exporting);
    waits.available = 0;
    waits.kill();
    waits.deliver(Event::WorkersShort { idle: 0, registered: 0, ahead: 0 });
    assert_eq!(waits.last_message(), "needs 1 idle worker; none is registered");
}
