//! The solve against brute force and fixtures, and compensated runs against themselves on other numbers of ranks, without
//! slicing, and with groups that move.

use super::golden_runs::{Golden, assert_close};
use super::group::{RunInputs, RunRecord, fixtures, run, spec_of};
use crate::communicator::Alone;
use crate::compensation::{Statistics, Unsolved};
use crate::layer::Narrowing;
use crate::model::Adapters;
use crate::shard::Shard;
use engine::{EngineError, ShardEngine, ShardSetup};
use model_spec::Projection;
use pruning::{KeepMask, LayerKeep};
use recipe::{
    Compensation, CompensationTarget, Compute, LeastSquares, Precision, Pruning, Recipe, Shrink, Storage,
};
use std::time::Duration;
use tch::{Device, Kind, Tensor};

const F64: (Kind, Device) = (Kind::Double, Device::Cpu);
const TARGETS: [CompensationTarget; 2] = [CompensationTarget::Layer, CompensationTarget::Stream];

fn random(shape: [i64; 2], seed: f64) -> Tensor {
    let count = shape[0] * shape[1];
    let uniform =
        (((Tensor::arange(count, F64) + seed) * 12.9898).sin() * 43_758.545_3).frac().abs() * 0.998 + 0.001;
    (uniform * 2.0 - 1.0).erfinv().view(shape)
}

fn statistics(inputs: &Tensor, missing: &Tensor) -> Statistics {
    let mut sums = Statistics::zeros(inputs.size()[1], missing.size()[1], Device::Cpu).unwrap();
    let half = inputs.size()[0] / 2;
    for (start, len) in [(0, half), (half, inputs.size()[0] - half)] {
        sums.add(&inputs.narrow(0, start, len), &missing.narrow(0, start, len)).unwrap();
    }
    sums
}

fn largest(tensor: &Tensor) -> f64 {
    tensor.abs().max().double_value(&[])
}

#[test]
fn three_inputs_of_which_two_go_leave_a_loss_of_twelve() {
    // H = [[2, 1, 0], [1, 2, 1], [0, 1, 2]], w = (1, 2, 3); inputs 0 and 2 go.
    let sums = Statistics {
        gram: Tensor::from_slice(&[2.0]).view([1, 1]),
        cross: Tensor::from_slice(&[1.0 * 1.0 + 1.0 * 3.0]).view([1, 1]),
        missing: Tensor::from_slice(&[2.0 * 1.0 + 2.0 * 9.0]),
    };
    let delta = sums.solve(1e-300).unwrap();
    assert!((delta.double_value(&[0, 0]) - 2.0).abs() < 1e-12, "2 becomes 4");
    assert!((20.0 * sums.share_left(&delta).unwrap() - 12.0).abs() < 1e-12);
}

#[test]
fn the_solve_is_the_least_squares_one_and_shared_by_all_rows() {
    let inputs = random([40, 8], 0.3).matmul(&random([8, 8], 7.1));
    let weight = random([5, 8], 2.7);
    let (gone, stay) = ([1i64, 4, 6], [0i64, 2, 3, 5, 7]);
    let columns = |tensor: &Tensor, of: &[i64]| tensor.index_select(1, &Tensor::from_slice(of));
    let missing = columns(&inputs, &gone).matmul(&columns(&weight, &gone).tr());
    let kept = columns(&inputs, &stay);
    for damping in [1e-14, 0.01, 1.0] {
        let sums = statistics(&kept, &missing);
        let delta = sums.solve(damping).unwrap();
        // Damping is as many more equations as there are inputs.
        let ridge = (sums.gram.diagonal(0, 0, 1).mean(Kind::Double).double_value(&[]) * damping).sqrt();
        let tall = Tensor::cat(&[kept.shallow_clone(), Tensor::eye(5, F64) * ridge], 0);
        let goal = Tensor::cat(&[missing.shallow_clone(), Tensor::zeros([5, 5], F64)], 0);
        let (brute, _, _, _) = Tensor::linalg_lstsq(&tall, &goal, None, "gelsd");
        assert!(largest(&(&delta - &brute)) < 1e-10, "damping {damping}");
        let left =
            (&missing - kept.matmul(&delta)).square().sum(Kind::Double) / missing.square().sum(Kind::Double);
        assert!((left.double_value(&[]) - sums.share_left(&delta).unwrap()).abs() < 1e-10);
        for row in 0..5 {
            let alone = statistics(&kept, &missing.narrow(1, row, 1)).solve(damping).unwrap();
            assert!(largest(&(alone - delta.narrow(1, row, 1))) < 1e-12);
        }
    }
    // The same from the side of what goes (arXiv:2410.15567): dw = -w_P [(H^-1)_PP]^-1 (H^-1)_PK.
    let inverse = Tensor::linalg_inv(&inputs.tr().matmul(&inputs));
    let rows = |tensor: &Tensor, of: &[i64]| tensor.index_select(0, &Tensor::from_slice(of));
    let block = |left: &[i64], right: &[i64]| columns(&rows(&inverse, left), right);
    let middle = Tensor::linalg_inv(&block(&gone, &gone));
    let from_gone = -columns(&weight, &gone).matmul(&middle).matmul(&block(&gone, &stay));
    let delta = statistics(&kept, &missing).solve(1e-14).unwrap();
    assert!(largest(&(delta.tr() - from_gone)) < 1e-9);
}

#[test]
fn an_input_that_is_always_zero_gets_no_change() {
    let inputs = random([30, 6], 1.1);
    let _ = inputs.narrow(1, 2, 1).zero_();
    let delta = statistics(&inputs, &random([30, 3], 5.0)).solve(0.01).unwrap();
    assert_eq!(largest(&delta.narrow(0, 2, 1)), 0.0);
    assert!(largest(&delta) > 0.0);
    let delta = statistics(&Tensor::zeros([30, 6], F64), &random([30, 3], 5.0)).solve(0.01).unwrap();
    assert_eq!(largest(&delta), 0.0);
}

#[test]
fn damping_is_raised_where_it_must_be_and_not_without_end() {
    // Eigenvalues 3 and -1, mean of the diagonal 1.
    let sums = Statistics {
        gram: Tensor::from_slice(&[1.0, 2.0, 2.0, 1.0]).view([2, 2]),
        cross: Tensor::ones([2, 1], F64),
        missing: Tensor::ones([1], F64),
    };
    let raised = sums.solve(0.02).unwrap();
    let expected = 1.0 / (3.0 + 0.02 * 100.0);
    assert!(largest(&(raised - expected)) < 1e-12);
    match sums.solve(1e-4) {
        Err(Unsolved::NotPositive { damping }) => assert!((damping - 0.1).abs() < 1e-12),
        other => panic!("expected no solution, got {other:?}"),
    }
    let broken = statistics(&(random([4, 2], 0.0) * f64::NAN), &random([4, 1], 0.0)).solve(0.01);
    assert!(matches!(broken, Err(Unsolved::Fault(_))));
}

fn recipe(choice: LeastSquares, shrink: Shrink) -> Recipe {
    let pruning =
        Pruning { shrink, compensation: Compensation::LeastSquares(choice), ..Pruning::published() };
    Recipe {
        steps: 10,
        pruning: Some(pruning),
        precision: Precision { compute: Compute::F64, storage: Storage::F64 },
        ..Recipe::default()
    }
}

fn shard(model: &str, recipe: Recipe) -> Shard {
    let setup = ShardSetup {
        model: fixtures().join("models").join(model),
        recipe,
        tp_rank: 0,
        tp_degree: 1,
        collective_timeout: Duration::from_secs(10),
        restore: None,
        progress: std::sync::Arc::default(),
    };
    let mut shard = Shard::load(setup, Device::Cpu).unwrap();
    // Fresh factors have no effect; these have one.
    let noise = random([1, shard.factors.numel() as i64], 3.3).view([-1]) * 0.02;
    shard.factors = &shard.factors + noise;
    shard
}

fn windows(model: &str, count: usize) -> Vec<Vec<u32>> {
    let vocab = spec_of(model).vocab_size;
    let token = |row: usize, place: usize| ((row * 977 + place * place * 31 + place * 7) % vocab) as u32;
    (0..count).map(|row| (0..24).map(|place| token(row, place)).collect()).collect()
}

fn as_rows(windows: &[Vec<u32>]) -> Vec<&[u32]> {
    windows.iter().map(Vec::as_slice).collect()
}

/// Without the second key/value head and without every third channel; the first layer keeps its heads.
fn smaller(model: &str) -> KeepMask {
    let layers = spec_of(model)
        .layers
        .iter()
        .enumerate()
        .map(|(layer, widths)| {
            let mut keep = LayerKeep::full(widths);
            if layer > 0 {
                keep.kv_heads.retain(|head| *head != 1);
                keep.query_heads.retain(|query| keep.kv_heads.contains(&widths.kv_head_of(*query)));
            }
            keep.channels.retain(|channel| channel % 3 != 1);
            keep
        })
        .collect();
    KeepMask { layers }
}

fn adapters<'a>(shard: &'a Shard, factors: &'a Tensor) -> Adapters<'a> {
    Adapters::evaluating(&shard.layout, factors, &[], &shard.setup.recipe.lora)
}

/// Takes the calibration windows through the compensated model, and each of its matrices through the whole one on the
/// same input: their outputs are the reference.
#[test]
fn every_matrix_comes_as_near_to_its_whole_output_as_it_can() {
    let (model, damping) = ("gqa", 0.01);
    let windows = windows(model, 12);
    let choice = LeastSquares { windows: 12, damping, target: CompensationTarget::Layer };
    let mut whole = shard(model, recipe(choice, Shrink::Never));
    let mut pruned = shard(model, recipe(choice, Shrink::Never));
    let keep = smaller(model);
    pruned.apply_mask(1, &keep, &as_rows(&windows)).unwrap();
    let factors = whole.compute_factors().unwrap();
    let (rows, embedded) = whole.model.embed(&as_rows(&windows), whole.communicator.as_mut()).unwrap();
    let _ = pruned.model.embed(&as_rows(&windows), pruned.communicator.as_mut()).unwrap();
    let head_dim = spec_of(model).head_dim;
    let mut hidden = embedded;
    for layer in 0..keep.layers.len() {
        for which in Narrowing::BOTH {
            let adapters = adapters(&whole, &factors);
            let pass = whole.model.pass(&rows, &adapters, 0).unwrap();
            let (before, after) = (&whole.model.layers[layer], &pruned.model.layers[layer]);
            let all = before.inputs_of(layer, which, &hidden, &pass).unwrap();
            let stay = after.inputs_of(layer, which, &hidden, &pass).unwrap();
            let communicator = &mut Alone;
            let goal = before.output_of(layer, which, &all, &pass, communicator).unwrap();
            let old = before.output_of(layer, which, &stay, &pass, communicator).unwrap();
            let new = after.output_of(layer, which, &stay, &pass, communicator).unwrap();
            let error = |out: &Tensor| (&goal - out).square().sum(Kind::Double).double_value(&[]);
            let what = format!("layer {layer} {}", which.projection());
            if which == Narrowing::O && layer == 0 {
                assert!(new.equal(&goal), "{what} loses nothing and is left alone");
            } else {
                assert!(error(&new) < 0.999 * error(&old), "{what}: {} {}", error(&new), error(&old));
                let kept: Vec<i64> = match which {
                    Narrowing::O => keep.layers[layer]
                        .query_heads
                        .iter()
                        .flat_map(|head| head * head_dim..(head + 1) * head_dim)
                        .map(|feature| feature as i64)
                        .collect(),
                    Narrowing::Down => {
                        keep.layers[layer].channels.iter().map(|channel| *channel as i64).collect()
                    }
                };
                let kept = Tensor::from_slice(&kept);
                let stay = stay.index_select(1, &kept);
                let change = after.narrowing(which).dense(Kind::Double).unwrap()
                    - before.narrowing(which).dense(Kind::Double).unwrap();
                // The slope of the damped squared error is zero there.
                let mean = stay.square().sum_dim_intlist(&[0i64][..], false, None).mean(Kind::Double);
                let pull = change.index_select(1, &kept).tr() * (mean * damping);
                let slope = stay.tr().matmul(&(&goal - &new)) - &pull;
                assert!(
                    largest(&slope) < 1e-9 * largest(&pull).max(1.0),
                    "{what}: slope {:.1e}",
                    largest(&slope)
                );
                let changed = change.abs().amax([0i64], false).gt(0.0).sum(Kind::Int64).int64_value(&[]);
                assert_eq!(changed, kept.size()[0], "{what}: columns that go are left alone");
            }
            hidden = new + &hidden;
        }
    }
}

#[test]
fn towards_the_stream_the_end_of_the_model_comes_nearer_too() {
    let model = "gqa";
    let windows = windows(model, 12);
    let logits = |shard: &mut Shard| shard.prompt_logits(&windows).unwrap();
    let dense = logits(&mut shard(model, recipe(LeastSquares::default(), Shrink::Live)));
    let error = |compensation| {
        let mut recipe = recipe(LeastSquares::default(), Shrink::Live);
        recipe.pruning.as_mut().unwrap().compensation = compensation;
        let mut shard = shard(model, recipe);
        shard.apply_mask(1, &smaller(model), &as_rows(&windows)).unwrap();
        (logits(&mut shard) - &dense).square().mean(Kind::Double).double_value(&[])
    };
    let none = error(Compensation::None);
    for target in TARGETS {
        let compensated =
            error(Compensation::LeastSquares(LeastSquares { windows: 12, damping: 1e-3, target }));
        assert!(compensated < 0.9 * none, "{target:?}: {compensated} {none}");
    }
}

#[test]
fn without_windows_nothing_is_changed() {
    let model = "gqa";
    let mut shard = shard(model, recipe(LeastSquares::default(), Shrink::Live));
    let rows = windows(model, 2);
    let uneven = [&rows[0][..], &rows[1][..7]];
    for calibration in [&[][..], &uneven] {
        let refused = shard.apply_mask(1, &smaller(model), calibration);
        assert!(matches!(refused, Err(EngineError::Refused(_))), "{refused:?}");
    }
    shard.apply_mask(1, &smaller(model), &as_rows(&rows)).unwrap();
}

fn golden_run(
    golden: &Golden,
    choice: LeastSquares,
    tp_degree: usize,
    shrink: Shrink,
    precision: Option<Precision>,
) -> RunRecord {
    let mut recipe = golden.recipe(shrink);
    recipe.pruning.as_mut().unwrap().compensation = Compensation::LeastSquares(choice);
    if let Some(precision) = precision {
        recipe.precision = precision;
    }
    run(&RunInputs {
        model: golden.model(),
        recipe,
        tp_degree,
        initial: Some(&|name| golden.values(name)),
        batches: &golden.batches(),
    })
}

/// Several decisions; on two ranks, groups move between some of them.
#[test]
fn a_compensated_run_depends_neither_on_the_ranks_nor_on_slicing() {
    for (name, target) in [
        ("mha_code_f64", CompensationTarget::Layer),
        ("mha_code_f64", CompensationTarget::Stream),
        ("gqa_code_query_heads_f64", CompensationTarget::Stream),
    ] {
        let golden = Golden::read(name);
        let choice = LeastSquares { target, ..LeastSquares::default() };
        let one = golden_run(&golden, choice, 1, Shrink::Live, None);
        assert!(one.decisions.len() > 1);
        let mut received_groups = 0;
        for (tp_degree, shrink) in
            [(2, Shrink::Live), (3, Shrink::Live), (1, Shrink::Never), (2, Shrink::Never)]
        {
            let other = golden_run(&golden, choice, tp_degree, shrink, None);
            let what = format!("{name} {target:?} on {tp_degree} ranks, shrink {shrink:?}");
            assert_close(&what, &other.losses, &one.losses, 1e-10);
            assert_eq!(other.decisions, one.decisions, "{what}");
            let difference = largest(&(&other.logits - &one.logits));
            assert!(difference <= 1e-9, "{what}: logits differ by {difference:.1e}");
            received_groups += other.received_groups;
        }
        assert!(name != "mha_code_f64" || received_groups > 0, "{name} was chosen because groups move");
    }
}

#[test]
fn the_same_seed_gives_the_same_compensation() {
    let golden = Golden::read("gqa_code_kv_groups_f64");
    let choice = LeastSquares { target: CompensationTarget::Stream, ..LeastSquares::default() };
    let once = |tp_degree| golden_run(&golden, choice, tp_degree, Shrink::Live, Some(Precision::default()));
    for tp_degree in [1, 2] {
        let (first, second) = (once(tp_degree), once(tp_degree));
        assert_eq!(first.losses, second.losses);
        assert!(first.logits == second.logits);
    }
}

#[test]
fn a_checkpoint_has_what_compensation_made_of_o_and_down() {
    let model = "gqa";
    let scratch = tempfile::tempdir().unwrap();
    for storage in [Storage::F64, Storage::Bf16] {
        let mut recipe = recipe(LeastSquares::default(), Shrink::Live);
        recipe.precision.storage = storage;
        let mut shard = shard(model, recipe);
        shard.apply_mask(1, &smaller(model), &as_rows(&windows(model, 4))).unwrap();
        let file = scratch.path().join(format!("{storage:?}.safetensors"));
        let digest = shard.snapshot(&windows(model, 1)).unwrap().write(&file).unwrap();
        let state = crate::state_file::RankState::read(&file, &digest, 0, 1).unwrap();
        for (layer, weights) in shard.model.layers.iter().enumerate() {
            for which in Narrowing::BOTH {
                let name = crate::state_file::base_name(layer, which.projection());
                let held = weights.narrowing(which).dense(Kind::Double).unwrap();
                assert_eq!(state.tensor(&name).unwrap().to_kind(Kind::Double), held, "{storage:?} {name}");
            }
            assert!(state.tensor(&crate::state_file::base_name(layer, Projection::Q)).is_err());
        }
    }
}
