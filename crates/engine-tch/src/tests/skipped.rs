//! Steps whose numbers are not finite: nothing is learnt from them, and every rank says the same.

use crate::factors::Factor;
use crate::fault::Fault;
use crate::shard::Shard;
use crate::tests::resume::{join, setup_of, windows, with_pruning};
use engine::{EngineError, MOST_SKIPPED, Rendezvous, ShardEngine};
use model_spec::Projection;
use std::path::Path;
use std::sync::{Barrier, Mutex};
use tch::Device;

fn step(shard: &mut Shard, step: u64) -> Result<engine::StepOutcome, EngineError> {
    let windows = windows();
    let row = windows[step as usize % windows.len()].as_slice();
    shard.train_step(step, &[vec![row]])
}

/// A step with factors that are no numbers, which are put back afterwards.
fn poisoned_step(shard: &mut Shard, number: u64) -> Result<engine::StepOutcome, EngineError> {
    let factors = shard.factors.copy();
    let _ = shard.factors.fill_(f64::NAN);
    let outcome = step(shard, number);
    shard.factors.copy_(&factors);
    outcome
}

fn digest(shard: &mut Shard, folder: &Path) -> String {
    shard.snapshot(&[]).unwrap().write(&folder.join("state")).unwrap()
}

#[test]
fn a_skipped_step_leaves_no_trace_and_too_many_in_a_row_are_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let recipe = with_pruning(|_| {});
    let load = || Shard::load(setup_of(&recipe, 0, 1, None), Device::Cpu).unwrap();
    let (mut one, mut other) = (load(), load());
    for number in [0, 1, 3] {
        step(&mut one, number).unwrap();
    }
    for number in [0, 1] {
        step(&mut other, number).unwrap();
    }
    let skipped = poisoned_step(&mut other, 2).unwrap();
    let why = skipped.skipped.unwrap();
    assert!(why.contains("loss at step 2"), "{why}");
    assert!(skipped.loss.is_nan() && skipped.scores.is_empty());
    let after = step(&mut other, 3).unwrap();
    assert!(after.skipped.is_none() && !after.scores.is_empty());
    assert_eq!(digest(&mut one, folder.path()), digest(&mut other, folder.path()));

    for number in 4..4 + u64::from(MOST_SKIPPED) {
        assert!(poisoned_step(&mut other, number).unwrap().skipped.is_some());
    }
    let error = poisoned_step(&mut other, 9).unwrap_err();
    assert!(matches!(error, EngineError::NotFinite { step: 9, .. }), "{error}");
}

#[test]
fn skipped_steps_are_counted_on_after_a_restore() {
    let folder = tempfile::tempdir().unwrap();
    let recipe = with_pruning(|_| {});
    let mut shard = Shard::load(setup_of(&recipe, 0, 1, None), Device::Cpu).unwrap();
    for number in 0..u64::from(MOST_SKIPPED) {
        poisoned_step(&mut shard, number).unwrap();
    }
    let file = folder.path().join("state");
    let sha256 = digest(&mut shard, folder.path());
    let restore = engine::Restore {
        shards: vec![(file, sha256)],
        generation: 0,
        next_step: u64::from(MOST_SKIPPED),
        keep_mask: shard.keep_mask.clone(),
    };
    let mut again = Shard::load(setup_of(&recipe, 0, 1, Some(restore)), Device::Cpu).unwrap();
    assert!(poisoned_step(&mut again, 3).is_err());
}

#[test]
fn all_ranks_name_the_first_gradient_that_is_not_finite_on_any() {
    let recipe = with_pruning(|_| {});
    let (meeting, barrier) = (Mutex::<Option<Rendezvous>>::default(), Barrier::new(2));
    let names: Vec<String> = std::thread::scope(|scope| {
        let ranks: Vec<_> = (0..2)
            .map(|tp_rank| {
                let (recipe, meeting, barrier) = (&recipe, &meeting, &barrier);
                scope.spawn(move || {
                    let mut shard = Shard::load(setup_of(recipe, tp_rank, 2, None), Device::Cpu).unwrap();
                    join(&mut shard, tp_rank, 2, meeting, barrier);
                    // Rank 0 has a later one than rank 1.
                    let (layer, projection) = [(1, Projection::K), (0, Projection::Up)][tp_rank];
                    let view = shard.layout.view(&shard.gradients, layer, projection, Factor::B).unwrap();
                    let _ = view.get(0).fill_(f64::INFINITY);
                    let fault = shard.name_bad_gradient(5, f64::INFINITY).unwrap();
                    let Fault::NotFinite { what, step: 5, .. } = fault else { panic!("{fault:?}") };
                    what
                })
            })
            .collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    });
    assert_eq!(names, ["gradient of layer 0 up_proj lora_b"; 2]);
}
