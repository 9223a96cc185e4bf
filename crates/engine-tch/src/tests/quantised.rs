//! Runs on a quantised base: the values that its codes stand for are the model, for gradients, ranks, masks and slices.

use super::golden_runs::{Golden, assert_close};
use super::group::{RunInputs, RunRecord, fixtures, run, spec_of};
use crate::frozen::{FrozenFormat, FrozenWeight};
use crate::shard::Shard;
use crate::source::Source;
use engine::{ShardEngine, ShardSetup};
use model_spec::{ModelSpec, Projection, Split};
use recipe::{Batch, Compute, Precision, Pruning, Recipe, Shrink, Storage};
use std::path::Path;
use std::time::Duration;
use tch::{Device, Kind, Tensor};

const QUANTISED: [Storage; 2] = [Storage::Int8, Storage::Nf4];

fn all_features(spec: &ModelSpec, layer: usize, projection: Projection) -> Vec<i64> {
    let shape = spec.projection_shape(layer, projection);
    (0..shape[usize::from(projection.split() == Split::Row)] as i64).collect()
}

/// The model folder `name` with the projections' weights replaced by what `storage` makes of them, in f32.
fn dequantised_copy(name: &str, storage: Storage, folder: &Path) {
    let from = fixtures().join("models").join(name);
    let source = Source::open(&from).unwrap();
    let spec = source.spec().clone();
    let mut tensors = Vec::new();
    for (name, _) in checkpoint::required_tensors(&spec) {
        let mut tensor = source.tensor(&name).unwrap().to_kind(Kind::Float);
        for layer in 0..spec.layers.len() {
            for projection in Projection::ALL {
                if checkpoint::projection_weight(layer, projection) == name {
                    let features = all_features(&spec, layer, projection);
                    let format = FrozenFormat::of(storage);
                    tensor =
                        FrozenWeight::quantise(&tensor, projection.split(), &features, format, Device::Cpu)
                            .unwrap()
                            .dense(Kind::Float)
                            .unwrap();
                }
            }
        }
        tensors.push((name, crate::state_file::to_bytes(&tensor).unwrap()));
    }
    let refs: Vec<checkpoint::TensorRef> = tensors
        .iter()
        .map(|(name, (shape, dtype, bytes))| checkpoint::TensorRef { name, dtype: *dtype, shape, bytes })
        .collect();
    checkpoint::write_tensors(&folder.join("model.safetensors"), &refs, &Default::default()).unwrap();
    std::fs::copy(from.join("config.json"), folder.join("config.json")).unwrap();
}

fn shard(model: &Path, storage: Storage, compute: Compute) -> Shard {
    let mut recipe = Recipe {
        steps: 10,
        batch: Batch { window_tokens: 9, rows: 2, micro_batches: 1 },
        max_grad_norm: None,
        precision: Precision { compute, storage },
        pruning: Some(Pruning::published()),
        ..Recipe::default()
    };
    recipe.lora = recipe::Lora { rank: 4, alpha: 8.0, dropout: 0.0 };
    let setup = ShardSetup {
        model: model.to_owned(),
        recipe,
        tp_rank: 0,
        tp_degree: 1,
        collective_timeout: Duration::from_secs(5),
        restore: None,
        progress: std::sync::Arc::default(),
    };
    let shard = Shard::load(setup, Device::Cpu).unwrap();
    // Fresh factors have no B, and so no gradient of A.
    let count = shard.factors.numel() as i64;
    let wave = (Tensor::arange(count, (shard.factors.kind(), Device::Cpu)) * 0.7).sin() * 0.1;
    shard.factors.shallow_clone().copy_(&wave);
    shard
}

/// The engine on dense weights is held to autograd by `gradients`; so this compares with it, on the same values.
#[test]
fn loss_gradients_and_scores_are_those_of_the_values_that_the_codes_stand_for() {
    for model in ["gqa", "stories260k"] {
        for storage in QUANTISED {
            let copy = tempfile::tempdir().unwrap();
            dequantised_copy(model, storage, copy.path());
            let original = fixtures().join("models").join(model);
            let mut quantised = shard(&original, storage, Compute::F64);
            let mut expected = shard(copy.path(), Storage::F64, Compute::F64);
            let mut other = shard(&original, Storage::F64, Compute::F64);
            let vocabulary = spec_of(model).vocab_size as u32;
            let rows: Vec<Vec<u32>> = (0..2u32)
                .map(|row| (0..9u32).map(|token| (row * 37 + token * 13 + 5) % vocabulary).collect())
                .collect();
            let micro = || vec![rows.iter().map(Vec::as_slice).collect::<Vec<_>>()];
            let (ours, reference) =
                (quantised.train_step(0, &micro()).unwrap(), expected.train_step(0, &micro()).unwrap());
            assert!((ours.loss - reference.loss).abs() <= 1e-12 * reference.loss, "{model} {storage:?}");
            let scale = expected.gradients.abs().max().double_value(&[]);
            let difference = (&quantised.gradients - &expected.gradients).abs().max().double_value(&[]);
            assert!(scale > 0.0 && difference <= 1e-11 * scale, "{model} {storage:?}: {difference:.1e}");
            for (ours, reference) in ours.scores.iter().zip(&reference.scores) {
                for (ours, reference) in ours.values.iter().zip(&reference.values) {
                    assert!(
                        (ours - reference).abs() <= 1e-9 * reference.abs().max(1e-9),
                        "{model} {storage:?}"
                    );
                }
            }
            let unrounded = other.train_step(0, &micro()).unwrap().loss;
            let moved = (unrounded - ours.loss).abs();
            assert!(
                moved > 1e-7 && moved < 0.1 * unrounded,
                "{model} {storage:?}: the loss moved by {moved:.1e}"
            );
        }
    }
}

fn golden_run(golden: &Golden, storage: Storage, tp_degree: usize, shrink: Shrink) -> RunRecord {
    let mut recipe = golden.recipe(shrink);
    recipe.precision = Precision { compute: Compute::F64, storage };
    run(&RunInputs {
        model: golden.model(),
        recipe,
        tp_degree,
        initial: Some(&|name| golden.values(name)),
        batches: &golden.batches(),
    })
}

#[test]
fn a_run_on_a_quantised_base_depends_neither_on_the_ranks_nor_on_slicing() {
    for name in ["mha_code_f64", "gqa_code_kv_groups_f64"] {
        let golden = Golden::read(name);
        for storage in QUANTISED {
            let one = golden_run(&golden, storage, 1, Shrink::Live);
            assert!(one.decisions.len() > 1);
            for (tp_degree, shrink) in [(2, Shrink::Live), (3, Shrink::Live), (1, Shrink::Never)] {
                let other = golden_run(&golden, storage, tp_degree, shrink);
                let what = format!("{name} {storage:?} on {tp_degree} ranks, shrink {shrink:?}");
                assert_close(&what, &other.losses, &one.losses, 1e-10);
                assert_eq!(other.decisions, one.decisions, "{what}");
                let difference = (&other.logits - &one.logits).abs().max().double_value(&[]);
                assert!(difference <= 1e-9, "{what}: logits differ by {difference:.1e}");
            }
        }
    }
}

#[test]
fn taylor_scores_work_on_a_quantised_base() {
    let golden = Golden::read("mha_taylor_f64");
    let record = golden_run(&golden, Storage::Nf4, 1, Shrink::Live);
    assert!(record.losses.iter().all(|loss| loss.is_finite()));
    assert_eq!(golden_run(&golden, Storage::Nf4, 2, Shrink::Live).decisions, record.decisions);
}

#[test]
fn quantised_bases_take_less_memory() {
    let model = fixtures().join("models/stories260k");
    let bytes = |storage| -> u64 {
        shard(&model, storage, Compute::F32)
            .model
            .layers
            .iter()
            .flat_map(|layer| [&layer.qkv, &layer.o, &layer.gate_up, &layer.down])
            .map(FrozenWeight::bytes)
            .sum()
    };
    let (dense, int8, nf4) = (bytes(Storage::F32), bytes(Storage::Int8), bytes(Storage::Nf4));
    assert!(int8 * 100 < dense * 30, "{int8} of {dense}");
    assert!(nf4 * 100 < dense * 20, "{nf4} of {dense}");
}
