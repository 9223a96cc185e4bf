//! Twenty steps with pruning against `tests/fixtures/reference_loraprune.py`, and against ourselves on other numbers of
//! ranks and without slicing.

use super::group::{RunInputs, RunRecord, fixtures, run, spec_of};
use model_spec::Projection;
use recipe::{Recipe, Shrink};
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

pub(super) struct Golden {
    bytes: Vec<u8>,
    json: Value,
}

impl Golden {
    pub(super) fn read(name: &str) -> Self {
        let folder = fixtures().join("goldens");
        let json = std::fs::read(folder.join(format!("run_{name}.json"))).unwrap();
        Self {
            bytes: std::fs::read(folder.join(format!("run_{name}.safetensors"))).unwrap(),
            json: serde_json::from_slice(&json).unwrap(),
        }
    }

    pub(super) fn values(&self, name: &str) -> Vec<f64> {
        let file = SafeTensors::deserialize(&self.bytes).unwrap();
        let tensor = file.tensor(name).unwrap_or_else(|error| panic!("{name}: {error}"));
        let data = tensor.data();
        let dtype = tensor.dtype();
        if dtype == Dtype::F64 {
            data.chunks_exact(8).map(|b| f64::from_le_bytes(b.try_into().unwrap())).collect()
        } else if dtype == Dtype::F32 {
            data.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap()).into()).collect()
        } else {
            assert_eq!(dtype, Dtype::I64, "{name}");
            data.chunks_exact(8).map(|b| i64::from_le_bytes(b.try_into().unwrap()) as f64).collect()
        }
    }

    pub(super) fn batches(&self) -> Vec<Vec<Vec<Vec<u32>>>> {
        let file = SafeTensors::deserialize(&self.bytes).unwrap();
        let shape = file.tensor("batch.input_ids").unwrap().shape().to_vec();
        let ids: Vec<u32> = self.values("batch.input_ids").iter().map(|id| *id as u32).collect();
        ids.chunks(shape[1] * shape[2] * shape[3])
            .map(|step| {
                step.chunks(shape[2] * shape[3])
                    .map(|micro| micro.chunks(shape[3]).map(<[u32]>::to_vec).collect())
                    .collect()
            })
            .collect()
    }

    pub(super) fn recipe(&self, shrink: Shrink) -> Recipe {
        let mut recipe: Recipe = serde_json::from_value(self.json["recipe"].clone()).unwrap();
        recipe.pruning.as_mut().unwrap().shrink = shrink;
        recipe
    }

    pub(super) fn model(&self) -> &str {
        self.json["model"].as_str().unwrap()
    }

    fn run(&self, tp_degree: usize, shrink: Shrink) -> RunRecord {
        run(&RunInputs {
            model: self.model(),
            recipe: self.recipe(shrink),
            tp_degree,
            initial: Some(&|name| self.values(name)),
            batches: &self.batches(),
        })
    }
}

/// Largest difference, relative to the larger of the reference's largest magnitude and `floor`.
fn relative(actual: &[f64], expected: &[f64]) -> f64 {
    assert_eq!(actual.len(), expected.len());
    let scale = expected.iter().fold(f64::MIN_POSITIVE, |scale, value| scale.max(value.abs()));
    actual.iter().zip(expected).fold(0.0, |worst: f64, (a, e)| worst.max((a - e).abs() / scale))
}

pub(super) fn assert_close(what: &str, actual: &[f64], expected: &[f64], bound: f64) {
    let difference = relative(actual, expected);
    assert!(difference <= bound, "{what}: relative difference {difference:.3e} exceeds {bound:.0e}");
}

fn assert_matches(golden: &Golden, record: &RunRecord, bound: f64) {
    let spec = spec_of(golden.model());
    assert_close("loss", &record.losses, &golden.values("loss"), bound);
    assert_close("gradient norm", &record.grad_norms, &golden.values("grad_norm"), bound);
    assert_close("learning rate", &record.learning_rates, &golden.values("learning_rate"), 1e-12);
    let decisions = golden.json["decisions"].as_array().unwrap();
    assert_eq!(record.decisions.len(), decisions.len());
    for ((step, mask), expected) in record.decisions.iter().zip(decisions) {
        assert_eq!(*step, expected["step"].as_u64().unwrap());
        for (layer, keep) in mask.layers.iter().enumerate() {
            for (name, kept) in [
                ("kept_query_heads", &keep.query_heads),
                ("kept_kv_heads", &keep.kv_heads),
                ("kept_channels", &keep.channels),
            ] {
                let expected: Vec<usize> = serde_json::from_value(expected[name][layer].clone()).unwrap();
                assert_eq!(*kept, expected, "step {step}, layer {layer}, {name}");
            }
        }
    }
    for layer in 0..spec.layers.len() {
        for step in [0, 10] {
            for projection in Projection::ALL {
                let name = format!("raw.{step}.layers.{layer}.{projection}");
                assert_close(&name, record.scores[step].of(layer, projection), &golden.values(&name), bound);
            }
        }
        for step in [0, 9, 19] {
            let average = &record.averages[step].layers[layer];
            for (block, values) in [("attention", &average.attention), ("mlp", &average.mlp)] {
                let name = format!("average.{step}.layers.{layer}.{block}");
                assert_close(&name, values, &golden.values(&name), bound);
            }
        }
    }
    let last = &record.decisions.last().unwrap().1;
    for (name, factor) in &record.factors {
        let layer: usize = name.split('.').nth(1).unwrap().parse().unwrap();
        let keep = &last.layers[layer];
        let kept = |heads: &[usize]| -> Vec<i64> {
            heads
                .iter()
                .flat_map(|head| head * spec.head_dim..(head + 1) * spec.head_dim)
                .map(|i| i as i64)
                .collect()
        };
        let all = |count: usize| (0..count as i64).collect::<Vec<_>>();
        let channels: Vec<i64> = keep.channels.iter().map(|channel| *channel as i64).collect();
        let (rows, columns) = match name.split('.').nth(2).unwrap() {
            "q_proj" => (kept(&keep.query_heads), all(spec.hidden_size)),
            "k_proj" | "v_proj" => (kept(&keep.kv_heads), all(spec.hidden_size)),
            "o_proj" => (all(spec.hidden_size), kept(&keep.query_heads)),
            "gate_proj" | "up_proj" => (channels, all(spec.hidden_size)),
            _ => (all(spec.hidden_size), channels),
        };
        let expected = golden.values(&format!("final.{name}"));
        let expected = tch::Tensor::from_slice(&expected).view(factor.size().as_slice());
        let (dim, indices) = if name.ends_with("lora_a") { (1, columns) } else { (0, rows) };
        let indices = tch::Tensor::from_slice(&indices);
        let pick = |tensor: &tch::Tensor| {
            crate::importance::to_f64(&tensor.index_select(dim, &indices).contiguous().view(-1)).unwrap()
        };
        assert_close(name, &pick(factor), &pick(&expected), bound * 10.0);
    }
}

#[test]
fn f64_runs_match_the_plain_reference() {
    for name in [
        "mha_code_f64",
        "gqa_code_kv_groups_f64",
        "gqa_paper_kv_groups_f64",
        "gqa_code_query_heads_f64",
        "mha_taylor_f64",
        "mha_magnitude_f64",
    ] {
        let golden = Golden::read(name);
        assert_matches(&golden, &golden.run(1, Shrink::Live), 1e-9);
    }
}

#[test]
fn an_f32_run_matches_the_plain_reference() {
    let golden = Golden::read("mha_code_f32");
    assert_matches(&golden, &golden.run(1, Shrink::Live), 1e-4);
}

#[test]
fn two_and_three_ranks_are_one_rank() {
    for (name, bound) in [
        ("gqa_code_kv_groups_f64", 1e-10),
        ("gqa_code_query_heads_f64", 1e-10),
        ("mha_taylor_f64", 1e-10),
        ("mha_code_f32", 1e-4),
    ] {
        let golden = Golden::read(name);
        let one = golden.run(1, Shrink::Live);
        for degree in [2, 3] {
            let many = golden.run(degree, Shrink::Live);
            assert_close("loss", &many.losses, &one.losses, bound);
            assert_eq!(many.decisions, one.decisions, "{name} on {degree} ranks");
            let difference = (&many.logits - &one.logits).abs().max().double_value(&[]);
            assert!(
                difference <= bound * 10.0,
                "{name} on {degree} ranks: logits differ by {difference:.2e}"
            );
        }
    }
}

#[test]
fn a_sliced_run_is_the_masked_one() {
    for (name, tp_degree, bound) in [
        ("mha_code_f64", 1, 1e-10),
        ("gqa_code_kv_groups_f64", 2, 1e-10),
        ("gqa_code_query_heads_f64", 3, 1e-10),
        ("mha_code_f32", 1, 1e-5),
    ] {
        let golden = Golden::read(name);
        let (sliced, masked) = (golden.run(tp_degree, Shrink::Live), golden.run(tp_degree, Shrink::Never));
        assert_eq!(sliced.decisions, masked.decisions, "{name}");
        let difference = (&sliced.logits - &masked.logits).abs().max().double_value(&[]);
        assert!(difference <= bound, "{name}: logits differ by {difference:.2e}");
    }
}

#[test]
fn groups_move_between_uneven_ranks_and_change_nothing() {
    let golden = Golden::read("mha_code_f64");
    let (one, many) = (golden.run(1, Shrink::Live), golden.run(2, Shrink::Live));
    assert!(many.received_groups > 0, "this run was chosen because it leaves ranks uneven");
    assert_eq!(many.decisions, one.decisions);
    for ((name, many), (_, one)) in many.factors.iter().zip(&one.factors) {
        let difference = (many - one).abs().max().double_value(&[]);
        assert!(difference <= 1e-10, "{name} differs by {difference:.2e}");
    }
}

#[test]
fn the_same_seed_gives_the_same_bits() {
    let golden = Golden::read("gqa_code_kv_groups_f64");
    let mut recipe = golden.recipe(Shrink::Live);
    recipe.lora.dropout = 0.1;
    recipe.precision = recipe::Precision::default();
    let once = |tp_degree| {
        run(&RunInputs {
            model: golden.model(),
            recipe: recipe.clone(),
            tp_degree,
            initial: None,
            batches: &golden.batches(),
        })
    };
    for tp_degree in [1, 2] {
        let (first, second) = (once(tp_degree), once(tp_degree));
        let bits = |losses: &[f64]| losses.iter().map(|loss| loss.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(&first.losses), bits(&second.losses));
        assert!(first.logits == second.logits);
        assert_eq!(first.decisions, second.decisions);
    }
}

#[test]
fn dropout_does_not_depend_on_the_number_of_ranks_nor_on_recomputation() {
    let golden = Golden::read("gqa_code_kv_groups_f64");
    let mut recipe = golden.recipe(Shrink::Live);
    recipe.lora.dropout = 0.2;
    let with = |recompute, tp_degree| {
        let recipe = Recipe { recompute, ..recipe.clone() };
        run(&RunInputs {
            model: golden.model(),
            recipe,
            tp_degree,
            initial: Some(&|name| golden.values(name)),
            batches: &golden.batches(),
        })
    };
    let one = with(recipe::Recompute::None, 1);
    let dry = golden.run(1, Shrink::Live);
    assert!(relative(&one.losses, &dry.losses) > 1e-6, "dropout changes the run");
    for (recompute, tp_degree) in [(recipe::Recompute::None, 3), (recipe::Recompute::Layer, 1)] {
        let other = with(recompute, tp_degree);
        assert_close("loss", &other.losses, &one.losses, 1e-10);
        assert_eq!(other.decisions, one.decisions);
    }
}

#[test]
fn weights_stored_in_bf16_give_the_run_of_their_f32_values() {
    let golden = Golden::read("gqa_code_kv_groups_f64");
    let with = |storage, tp_degree| {
        let mut recipe = golden.recipe(Shrink::Live);
        recipe.precision = recipe::Precision { compute: recipe::Compute::F32, storage };
        run(&RunInputs {
            model: "bf16_sharded",
            recipe,
            tp_degree,
            initial: None,
            batches: &golden.batches(),
        })
    };
    let (wide, narrow) = (with(recipe::Storage::F32, 1), with(recipe::Storage::Bf16, 1));
    assert_eq!(narrow.losses, wide.losses, "the file is in bf16, so nothing is rounded");
    assert_eq!(narrow.decisions, wide.decisions);
    let split = with(recipe::Storage::Bf16, 2);
    assert_close("loss", &split.losses, &wide.losses, 1e-4);
    assert_eq!(split.decisions, wide.decisions);
}
