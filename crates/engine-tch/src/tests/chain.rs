//! Chain of LoRA: what a knot leaves as it is, and what it begins anew.

use crate::factors::Factor;
use crate::optimizer::Moments;
use crate::shard::Shard;
use crate::tests::resume::{setup_of, windows, with_pruning};
use engine::ShardEngine;
use model_spec::Projection;
use recipe::{AdamW, Chain, Compensation, Compute, LoraRite, Optimizer, Precision, Recipe, Storage};
use tch::{Device, Tensor};

const KNOT: u64 = 3;

fn recipe(compute: Compute, storage: Storage) -> Recipe {
    let mut recipe = with_pruning(|pruning| pruning.compensation = Compensation::None);
    recipe.precision = Precision { compute, storage };
    recipe.chain = Some(Chain { knots: vec![KNOT], warmup_steps: 0, settle_steps: 1 });
    recipe.optimizer = Optimizer::AdamW(AdamW { weight_decay: 0.0, ..AdamW::default() });
    recipe
}

/// Trained up to the knot, which is not tied yet.
fn trained(recipe: &Recipe) -> Shard {
    let mut shard = Shard::load(setup_of(recipe, 0, 1, None), Device::Cpu).unwrap();
    (0..KNOT).for_each(|step| train(&mut shard, step));
    shard
}

fn train(shard: &mut Shard, step: u64) {
    let windows = windows();
    let batch = [vec![windows[step as usize].as_slice(), &windows[step as usize + 1]]];
    assert_eq!(shard.train_step(step, &batch).unwrap().skipped, None);
}

fn all(shard: &Shard, flat: &Tensor, factor: Factor) -> Tensor {
    let views: Vec<Tensor> = (0..shard.layout.layer_count())
        .flat_map(|layer| Projection::ALL.map(|projection| (layer, projection)))
        .map(|(layer, projection)| {
            shard.layout.view(flat, layer, projection, factor).unwrap().reshape([-1]).copy()
        })
        .collect();
    Tensor::cat(&views, 0)
}

#[test]
fn a_knot_leaves_the_function_as_it_is() {
    for (compute, storage, bound) in [
        (Compute::F64, Storage::F64, 1e-12),
        (Compute::F32, Storage::F32, 1e-5),
        // Weights stay as they are held: nothing is rounded anew.
        (Compute::F32, Storage::Int8, 1e-5),
    ] {
        let mut shard = trained(&recipe(compute, storage));
        let prompts = &windows()[..2];
        let before = shard.prompt_logits(prompts).unwrap();
        let tuned = shard.factors.copy();
        assert!(all(&shard, &tuned, Factor::B).abs().max().double_value(&[]) > 0.0);
        shard.tie_knot(KNOT).unwrap();
        let after = shard.prompt_logits(prompts).unwrap();
        let apart = ((&after - &before).abs().max() / before.abs().max()).double_value(&[]);
        assert!(apart <= bound, "{storage:?}: {apart:.2e}");
        assert!(shard.ledger.len() == 1 && shard.ledger[0] == tuned);
        // A second time it is tied already.
        shard.tie_knot(KNOT + 1).unwrap();
        assert_eq!(shard.ledger.len(), 1);
        // And the frozen pair does something.
        let _ = shard.ledger[0].zero_();
        assert!(shard.prompt_logits(prompts).unwrap() != before);
    }
}

#[test]
fn a_knot_begins_a_fresh_pair_and_its_moments_anew() {
    let optimizers = [Optimizer::AdamW(AdamW::default()), Optimizer::LoraRite(LoraRite::default())];
    for optimizer in optimizers {
        let mut recipe = recipe(Compute::F32, Storage::F32);
        recipe.optimizer = optimizer;
        let mut shard = trained(&recipe);
        let (pairs, lora_rank) = (shard.layout.pair_count(), recipe.lora.rank as i64);
        assert!(shard.moments.updates == KNOT && shard.moments.flats[0].abs().max().double_value(&[]) > 0.0);
        shard.tie_knot(KNOT).unwrap();
        let fresh = Moments::zeros(&recipe.optimizer, &shard.factors, pairs, lora_rank).unwrap();
        assert_eq!(shard.moments.updates, 0);
        assert!(shard.moments.flats.iter().zip(&fresh.flats).all(|(one, other)| one == other));
        assert_eq!(all(&shard, &shard.factors, Factor::B).abs().max().double_value(&[]), 0.0);
        let first = Shard::load(setup_of(&recipe, 0, 1, None), Device::Cpu).unwrap();
        let (a, before) = (all(&shard, &shard.factors, Factor::A), all(&first, &first.factors, Factor::A));
        assert!((&a - &before).abs().max().double_value(&[]) > 1e-3, "another draw");
        let spread = |a: &Tensor| a.std(true).double_value(&[]);
        assert!((spread(&a) / spread(&before) - 1.0).abs() < 0.1, "from the same law");
    }
}

#[test]
fn the_first_step_after_a_knot_moves_b_alone_and_never_the_frozen_pair() {
    let mut shard = trained(&recipe(Compute::F64, Storage::F64));
    shard.tie_knot(KNOT).unwrap();
    let (a, frozen) = (all(&shard, &shard.factors, Factor::A), shard.ledger[0].copy());
    train(&mut shard, KNOT);
    assert!(all(&shard, &shard.factors, Factor::A) == a);
    assert!(all(&shard, &shard.factors, Factor::B).abs().max().double_value(&[]) > 0.0);
    train(&mut shard, KNOT + 1);
    assert!(all(&shard, &shard.factors, Factor::A) != a);
    assert!(shard.ledger[0] == frozen);
}
