use super::*;
use model_spec::{Family, LayerSpec, ModelSpec, Rope, RopeScaling};
use proptest::prelude::*;
use recipe::{Batch, Compute, Precision, Pruning, Storage};

fn model(layers: usize, heads: usize, kv_heads: usize, channels: usize) -> ModelSpec {
    let widths = LayerSpec { query_head_count: heads, kv_head_count: kv_heads, intermediate_size: channels };
    ModelSpec {
        family: Family::Llama,
        hidden_size: 16,
        head_dim: 4,
        vocab_size: 50,
        max_position_embeddings: 64,
        rms_norm_eps: 1e-6,
        rope: Rope { theta: 10_000.0, scaling: RopeScaling::None },
        tie_word_embeddings: true,
        layers: vec![widths; layers],
    }
}

fn recipe(rows: usize, window_tokens: usize) -> Recipe {
    let mut recipe = Recipe {
        batch: Batch { rows, window_tokens, micro_batches: 1 },
        pruning: Some(Pruning::published()),
        ..Recipe::default()
    };
    recipe.lora.rank = 2;
    recipe.lora.dropout = 0.0;
    recipe
}

fn dense(model: &ModelSpec, tp_degree: usize, tp_rank: usize) -> RankShape {
    RankShape::new(model, &model.layers, tp_degree, tp_rank)
}

/// The kept tensors of one layer in f32, each written down by its shape.
fn plain_kept(model: &ModelSpec, recipe: &Recipe) -> u64 {
    let (n, r) = ((recipe.batch.rows * recipe.batch.window_tokens) as u64, recipe.lora.rank as u64);
    let d = model.hidden_size as u64;
    let mut numbers = 0;
    for layer in &model.layers {
        let q = (layer.query_head_count * model.head_dim) as u64;
        let k = (layer.kv_head_count * model.head_dim) as u64;
        let i = layer.intermediate_size as u64;
        let shapes = [
            [n, d],                             // x
            [n, 1],                             // rstd_1
            [n, q],                             // q
            [n, k],                             // k
            [n, k],                             // v
            [n, q],                             // attention's output
            [n, layer.query_head_count as u64], // log of its sums
            [n, 3 * r],                         // low_qkv
            [n, r],                             // low_o
            [n, d],                             // x_mid
            [n, 1],                             // rstd_2
            [n, 2 * i],                         // gate_up
            [n, 2 * r],                         // low_gate_up
            [n, r],                             // low_down
        ];
        numbers += shapes.iter().map(|[rows, columns]| rows * columns).sum::<u64>();
    }
    4 * numbers
}

#[test]
fn what_layers_keep_is_the_sum_of_their_tensors() {
    for (layers, heads, kv_heads, channels) in [(1, 4, 4, 10), (3, 8, 2, 7)] {
        let model = model(layers, heads, kv_heads, channels);
        let recipe = recipe(2, 5);
        assert_eq!(kept_bytes(&dense(&model, 1, 0), &recipe, Platform::Cpu), plain_kept(&model, &recipe));
    }
}

#[test]
fn running_layers_again_keeps_their_inputs_alone() {
    let model = model(3, 4, 4, 10);
    let recipe = Recipe { recompute: Recompute::Layer, ..recipe(2, 5) };
    assert_eq!(kept_bytes(&dense(&model, 1, 0), &recipe, Platform::Cpu), 3 * 10 * 16 * 4);
}

#[test]
fn the_fullest_moment_of_a_small_step_is_the_one_counted_by_hand() {
    // One layer, 10 tokens, q and k of 16, 100 channels, f32. The vocabulary is small, so that the backward pass of down is
    // fullest: everything kept, the gradient of the layer's output, and four tensors of [10, 100].
    let model = model(1, 4, 4, 100);
    let recipe = recipe(2, 5);
    let kept = plain_kept(&model, &recipe);
    let lasting = 5 * 4 * 4 + 24 * 10;
    let moment = fullest_moment(&dense(&model, 1, 0), &recipe, Platform::Cpu);
    assert_eq!(moment, Moment { activations: kept + 10 * 16 * 4 + 4 * 10 * 100 * 4, buffers: lasting });
}

#[test]
fn a_large_vocabulary_makes_the_loss_the_fullest_moment() {
    let mut model = model(1, 4, 4, 10);
    model.vocab_size = 10_000;
    let recipe = recipe(2, 5);
    // 8 predicted positions in one chunk.
    let expected = Moment {
        activations: plain_kept(&model, &recipe) + 10 * 16 * 4 + 2 * 8 * 16 * 4,
        buffers: 8 * 10_000 * 4 + 5 * 4 * 4 + 24 * 10,
    };
    assert_eq!(fullest_moment(&dense(&model, 1, 0), &recipe, Platform::Cpu), expected);
}

#[test]
fn a_chunk_of_logits_never_holds_more_than_its_bound() {
    let mut model = model(1, 4, 4, 10);
    model.vocab_size = 40_000;
    let recipe = recipe(16, 1024);
    let moment = fullest_moment(&dense(&model, 1, 0), &recipe, Platform::Cpu);
    assert!(
        moment.buffers > 4 * CHUNK_ELEMENTS / 2 && moment.buffers < 4 * CHUNK_ELEMENTS + (1 << 20),
        "{moment:?}"
    );
}

proptest! {
    #[test]
    fn more_of_a_batch_takes_no_less(
        rows in 1usize..6, window in 2usize..40, heads in 1usize..5, shared in 1usize..4, channels in 1usize..80,
        drops: bool, again: bool, quantised: bool,
    ) {
        let model = model(2, heads * shared, heads, channels);
        let of = |rows, window| {
            let mut recipe = recipe(rows, window);
            recipe.lora.dropout = if drops { 0.1 } else { 0.0 };
            recipe.recompute = if again { Recompute::Layer } else { Recompute::None };
            recipe.precision = Precision {
                compute: Compute::F32,
                storage: if quantised { Storage::Nf4 } else { Storage::F32 },
            };
            fullest_moment(&dense(&model, 1, 0), &recipe, Platform::Cpu).total()
        };
        prop_assert!(of(rows, window) <= of(rows + 1, window));
        prop_assert!(of(rows, window) <= of(rows, window + 1));
    }

    #[test]
    fn running_layers_again_never_takes_more_of_a_deep_model(rows in 1usize..6, window in 2usize..40, channels in 1usize..80) {
        let model = model(6, 4, 2, channels);
        let of = |recompute| {
            let recipe = Recipe { recompute, ..recipe(rows, window) };
            fullest_moment(&dense(&model, 1, 0), &recipe, Platform::Cpu).total()
        };
        prop_assert!(of(Recompute::Layer) <= of(Recompute::None));
    }
}
