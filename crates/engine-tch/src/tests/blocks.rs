//! Whole blocks: their scores against slow forms, and a model without one against a model that never had it.

use crate::importance::to_f64;
use crate::shard::Shard;
use crate::tests::group::{fixtures, spec_of};
use crate::tests::resume::{setup_of, windows, with_pruning};
use engine::{Calibration, CalibrationProgress, ShardEngine};
use model_spec::Projection;
use pruning::{KeepMask, LayerKeep};
use recipe::{BlockCriterion, Compensation, Compute, Depth, Precision, Recipe, Shape, Shrink, Storage};
use tch::{Device, Kind, Tensor};

const MODEL: &str = "gqa";

fn recipe(criterion: BlockCriterion, shrink: Shrink) -> Recipe {
    let mut recipe = with_pruning(|pruning| {
        pruning.depth = Some(Depth { criterion, blocks: Some(1), protect_ends: false, iterative: false });
        pruning.shape = Shape::Uniform;
        pruning.compensation = Compensation::None;
        pruning.shrink = shrink;
    });
    recipe.lora.dropout = 0.0;
    recipe
}

fn in_f64(mut recipe: Recipe) -> Recipe {
    recipe.precision = Precision { compute: Compute::F64, storage: Storage::F64 };
    recipe
}

/// A shard whose adapters do something.
fn shard(recipe: &Recipe) -> Shard {
    let mut shard = Shard::load(setup_of(recipe, 0, 1, None), Device::Cpu).unwrap();
    let noise = crate::tests::pieces::random(&shard.factors.size(), 3) * 0.02;
    let _ = shard.factors.f_add_(&noise.to_kind(shard.factors.kind())).unwrap();
    shard
}

fn without(layers: &[usize]) -> KeepMask {
    let mut mask = KeepMask::full(&spec_of(MODEL));
    layers.iter().for_each(|layer| mask.layers[*layer] = LayerKeep::removed());
    mask
}

fn calibrate(shard: &mut Shard, rows: &[&[u32]]) -> (Calibration, Vec<CalibrationProgress>) {
    let mut heard = Vec::new();
    let found = shard.calibrate(rows, &mut |progress| {
        heard.push(progress);
        Ok(())
    });
    (found.unwrap(), heard)
}

#[test]
fn a_block_passed_over_is_a_block_removed_to_the_bit() {
    let windows = windows();
    for removed in [vec![0], vec![2], vec![3], vec![1, 2]] {
        let mut passed_over = shard(&recipe(BlockCriterion::Perplexity, Shrink::Live));
        removed.iter().for_each(|layer| passed_over.model.passed_over[*layer] = true);
        let expected = passed_over.prompt_logits(&windows[..2]).unwrap();
        for shrink in [Shrink::Live, Shrink::Never] {
            let mut gone = shard(&recipe(BlockCriterion::Perplexity, shrink));
            gone.apply_mask(1, &without(&removed), &[]).unwrap();
            assert!(gone.prompt_logits(&windows[..2]).unwrap() == expected, "{removed:?}, {shrink:?}");
            // And without the short cut.
            gone.model.passed_over.fill(false);
            assert!(gone.prompt_logits(&windows[..2]).unwrap() == expected, "{removed:?}, {shrink:?}");
        }
    }
}

#[test]
fn perplexities_are_those_of_the_model_without_the_block_over_all_tokens() {
    let windows = windows();
    // Of unequal lengths: the mean is over tokens, not over windows.
    let rows: Vec<&[u32]> = vec![&windows[0], &windows[1][..5], &windows[2][..9]];
    let recipe = in_f64(recipe(BlockCriterion::Perplexity, Shrink::Live));
    let mut ours = shard(&recipe);
    let (found, heard) = calibrate(&mut ours, &rows);
    let chunks = rows.len().div_ceil(recipe.batch.rows);
    assert_eq!(heard.len(), chunks * found.blocks.len());
    assert_eq!(heard.last().unwrap().passes, heard.last().unwrap().total_passes);
    assert!(ours.model.passed_over.iter().all(|passed| !passed), "nothing has changed");
    for (layer, found) in found.blocks.iter().enumerate() {
        let mut gone = shard(&recipe);
        gone.apply_mask(1, &without(&[layer]), &[]).unwrap();
        let (mut sum, mut count) = (0.0, 0);
        for row in &rows {
            let logits = gone.prompt_logits(&[row.to_vec()]).unwrap().log_softmax(-1, Kind::Double);
            for (position, token) in row[1..].iter().enumerate() {
                sum -= logits.double_value(&[position as i64, i64::from(*token)]);
                count += 1;
            }
        }
        let expected = (sum / f64::from(count)).exp();
        assert!((found - expected).abs() < 1e-9 * expected, "block {layer}: {found}, expected {expected}");
    }
}

#[test]
fn a_block_that_adds_nothing_goes_first_and_costs_nothing() {
    let windows = windows();
    let rows: Vec<&[u32]> = windows.iter().map(Vec::as_slice).collect();
    let mut ours = shard(&in_f64(recipe(BlockCriterion::Perplexity, Shrink::Live)));
    for projection in [Projection::O, Projection::Down] {
        let mut b = ours.layout.view(&ours.factors, 1, projection, crate::factors::Factor::B).unwrap();
        let _ = b.zero_();
    }
    for which in crate::layer::Narrowing::BOTH {
        let held = ours.model.layers[1].narrowing_mut(which);
        let zeros = crate::compensation::as_stored(held).unwrap().zeros_like();
        *held = crate::frozen::FrozenWeight::Dense(zeros);
    }
    let dense = ours.evaluate(&rows, 2).unwrap().perplexity();
    let (found, _) = calibrate(&mut ours, &rows);
    assert!((found.blocks[1] - dense).abs() < 1e-12 * dense);
    ours.apply_mask(1, &without(&[1]), &[]).unwrap();
    let after = ours.evaluate(&rows, 2).unwrap().perplexity();
    assert!((after - dense).abs() < 1e-12 * dense);
}

/// `W0 + s B A` of a projection.
fn merged(shard: &Shard, layer: usize, projection: Projection) -> Tensor {
    let view = |factor| shard.layout.view(&shard.factors, layer, projection, factor).unwrap();
    let weight = shard.source.tensor(&checkpoint::projection_weight(layer, projection)).unwrap();
    let product = view(crate::factors::Factor::B).mm(&view(crate::factors::Factor::A));
    weight.to_kind(Kind::Double) + product * shard.setup.recipe.lora.scaling()
}

#[test]
fn magnitudes_are_sums_over_all_seven_projections() {
    let windows = windows();
    let mut ours = shard(&in_f64(recipe(BlockCriterion::Magnitude, Shrink::Live)));
    let (found, _) = calibrate(&mut ours, &[&windows[0]]);
    for (layer, found) in found.blocks.iter().enumerate() {
        let sums =
            Projection::ALL.map(|each| merged(&ours, layer, each).abs().sum(Kind::Double).double_value(&[]));
        let expected: f64 = sums.iter().sum();
        assert!((found - expected).abs() < 1e-11 * expected);
    }
}

#[test]
fn taylor_scores_follow_the_loss_and_do_not_depend_on_passes() {
    let windows = windows();
    let rows: Vec<&[u32]> = windows.iter().map(Vec::as_slice).collect();
    let mut one = in_f64(recipe(BlockCriterion::Taylor, Shrink::Live));
    one.batch.rows = 6;
    let mut many = one.clone();
    many.batch.rows = 1;
    let (mut at_once, mut apart) = (shard(&one), shard(&many));
    let before = at_once.gradients.copy();
    let (found, heard) = calibrate(&mut at_once, &rows);
    let (one_by_one, heard_apart) = calibrate(&mut apart, &rows);
    assert_eq!((heard.len(), heard_apart.len()), (1, 6));
    for (one, other) in found.blocks.iter().zip(&one_by_one.blocks) {
        assert!((one - other).abs() < 1e-11 * one, "signs are kept until all windows are summed");
    }
    assert!(at_once.gradients == before, "the step's gradients are left alone");

    // Scaling all of a block's weights by 1 - e changes the loss by e times the signed sum; shown for one projection.
    let loss = |shard: &mut Shard| {
        let sum = shard.evaluate(&rows, 6).unwrap();
        sum.negative_log_likelihood / sum.predicted as f64
    };
    let layer = 2;
    let gradient = weight_gradient(&one, &rows, layer);
    let weight = merged(&at_once, layer, Projection::Down);
    let signed = (&gradient * &weight).sum(Kind::Double).double_value(&[]);
    let step = 1e-4;
    let moved = |factor: f64| {
        let mut shard = shard(&one);
        let held = shard.model.layers[layer].narrowing_mut(crate::layer::Narrowing::Down);
        let frozen = crate::compensation::as_stored(held).unwrap() + &weight * factor;
        *held = crate::frozen::FrozenWeight::Dense(frozen);
        loss(&mut shard)
    };
    let slope = (moved(step) - moved(-step)) / (2.0 * step);
    assert!((slope - signed).abs() < 1e-6 * signed.abs().max(1e-3), "{slope} and {signed}");
    let absolute = (&gradient * &weight).abs().sum(Kind::Double).double_value(&[]);
    assert!(found.blocks[layer] > absolute, "the other projections count as well");
}

/// Of down, by the Taylor criterion's own pass.
fn weight_gradient(recipe: &Recipe, rows: &[&[u32]], layer: usize) -> Tensor {
    let mut with_taylor = recipe.clone();
    with_taylor.pruning.as_mut().unwrap().criterion = recipe::Criterion::Taylor;
    let mut shard = shard(&with_taylor);
    shard.train_step(0, &[rows.to_vec()]).unwrap();
    let observed = shard.observed.as_ref().unwrap();
    let crate::observed::Observed::WeightGradients(gradients) = &observed[layer] else { panic!("none kept") };
    gradients.down.copy()
}

#[test]
fn blocks_are_judged_anew_after_each_that_goes() {
    let windows = windows();
    let rows: Vec<&[u32]> = windows.iter().map(Vec::as_slice).collect();
    let mut recipe = in_f64(recipe(BlockCriterion::Perplexity, Shrink::Live));
    let depth = Depth { blocks: Some(2), iterative: true, protect_ends: false, ..Depth::default() };
    recipe.pruning.as_mut().unwrap().depth = Some(depth);
    let (found, heard) = calibrate(&mut shard(&recipe), &rows);
    let layers = found.blocks.len();
    assert_eq!(heard.len(), 3 * (layers + layers - 1), "each that is left is judged in each round");
    let lowest = |scores: &[f64], gone: &[usize]| {
        let left = (0..layers).filter(|layer| !gone.contains(layer));
        left.min_by(|one, other| scores[*one].total_cmp(&scores[*other])).unwrap()
    };
    let first = lowest(&found.blocks, &[]);
    let again: Vec<f64> = (0..layers)
        .map(|layer| {
            let mut gone = shard(&recipe);
            gone.apply_mask(1, &without(&[first, layer]), &[]).unwrap();
            gone.evaluate(&rows, 2).unwrap().perplexity()
        })
        .collect();
    assert_eq!(found.block_order, [first, lowest(&again, &[first])]);
}

#[test]
fn what_needs_no_calibration_or_has_nothing_to_be_calibrated_on_is_refused() {
    let mut plain = shard(&with_pruning(|_| {}));
    let error = plain.calibrate(&[&[1, 2, 3]], &mut |_| Ok(())).unwrap_err();
    assert!(error.to_string().contains("need no calibration"), "{error}");
    let mut ours = shard(&recipe(BlockCriterion::Perplexity, Shrink::Live));
    assert!(ours.calibrate(&[], &mut |_| Ok(())).unwrap_err().to_string().contains("no window"));
    let stop = |_| Err(engine::EngineError::Refused("enough".into()));
    assert!(ours.calibrate(&[&[1, 2, 3]], &mut { stop }).unwrap_err().to_string().contains("enough"));
    assert!(fixtures().is_dir() && to_f64(&ours.factors.abs().max()).unwrap()[0] > 0.0);
}
