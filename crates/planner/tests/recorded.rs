//! Estimates against peaks that were measured once; `tests/processes/tests/planned_memory.rs` measures anew.

use model_spec::{Family, LayerSpec, ModelSpec, Rope, RopeScaling};
use planner::{Device, Kind, Question, Stage, estimate};
use recipe::{Batch, Criterion, Precision, Pruning, Recipe, Recompute, Storage};

/// `hidden, layers, heads, key/value heads, channels, vocabulary`
type Shape = [usize; 6];

fn model([hidden_size, layers, heads, kv_heads, channels, vocab_size]: Shape) -> ModelSpec {
    let widths = LayerSpec { query_head_count: heads, kv_head_count: kv_heads, intermediate_size: channels };
    ModelSpec {
        family: Family::Llama,
        hidden_size,
        head_dim: hidden_size / heads,
        vocab_size,
        max_position_embeddings: 1 << 16,
        rms_norm_eps: 1e-5,
        rope: Rope { theta: 10_000.0, scaling: RopeScaling::None },
        tie_word_embeddings: false,
        layers: vec![widths; layers],
    }
}

const LLAMA: Shape = [1024, 8, 16, 16, 2752, 32_000];
const GROUPED: Shape = [768, 12, 12, 4, 2048, 50_000];

fn recipe(rows: usize, window_tokens: usize) -> Recipe {
    let mut recipe = Recipe {
        batch: Batch { rows, window_tokens, micro_batches: 1 },
        pruning: Some(Pruning::published()),
        ..Recipe::default()
    };
    recipe.lora.dropout = 0.0;
    recipe
}

fn stored(storage: Storage, recipe: Recipe) -> Recipe {
    Recipe { precision: Precision { storage, ..recipe.precision }, ..recipe }
}

fn judged_by(criterion: Criterion, mut recipe: Recipe) -> Recipe {
    if let Some(pruning) = &mut recipe.pruning {
        pruning.criterion = criterion;
    }
    recipe
}

/// Peak resident bytes of two optimizer steps by `crates/engine-tch/examples/step.rs`, in millions; 2026-11-25, two threads of
/// AMD EPYC, glibc.
#[test]
fn estimates_lie_within_a_tenth_of_recorded_peaks() {
    let dropped = |mut recipe: Recipe| {
        recipe.lora.dropout = 0.05;
        recipe
    };
    let again = |recipe: Recipe| Recipe { recompute: Recompute::Layer, ..recipe };
    let cases = [
        ("f32", LLAMA, recipe(4, 256), 1462),
        ("bf16", LLAMA, stored(Storage::Bf16, recipe(4, 256)), 1236),
        ("int8", LLAMA, stored(Storage::Int8, recipe(4, 256)), 1202),
        ("nf4", LLAMA, stored(Storage::Nf4, recipe(4, 256)), 1271),
        ("twice the rows", LLAMA, recipe(8, 256), 1872),
        ("layers run again", LLAMA, again(recipe(8, 256)), 1211),
        ("dropout", LLAMA, dropped(recipe(8, 256)), 2051),
        ("a short window", LLAMA, recipe(1, 64), 1175),
        ("wanda", LLAMA, dropped(judged_by(Criterion::Wanda, recipe(2, 512))), 1494),
        ("taylor", LLAMA, judged_by(Criterion::Taylor, recipe(1, 64)), 1370),
        ("nf4, layers run again", LLAMA, again(stored(Storage::Nf4, recipe(8, 256))), 1159),
        ("grouped heads", GROUPED, recipe(8, 128), 1337),
    ];
    let mut far = Vec::new();
    for (name, shape, recipe, measured) in cases {
        let dense = model(shape);
        let question = Question { dense: &dense, recipe: &recipe, tp_degree: 1, device: &Device::cpu() };
        let estimate = estimate(&question).unwrap_or_else(|found| panic!("{name}: {found:?}"));
        // The example makes no decision and writes no checkpoint.
        let of = |stage| estimate.stage(stage).map_or(0, |memory| memory.total());
        let planned = of(Stage::Loading).max(of(Stage::FirstStep)) as f64 / 1e6;
        let ratio = planned / f64::from(measured);
        println!("{name}: planned {planned:.0} MB, measured {measured} MB, {ratio:.3}");
        if !(0.9..=1.1).contains(&ratio) {
            far.push(format!("{name}: {planned:.0} MB for {measured} MB: {:?}", estimate.stages));
        }
        assert!(Kind::ALL.iter().all(|kind| estimate.ranks[0].of(*kind) > 0), "{name}");
    }
    assert!(far.is_empty(), "{far:#?}");
}
