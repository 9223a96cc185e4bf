//! Estimates against plain sums, and laws that hold for any model.

use model_spec::{Family, LayerSpec, ModelSpec, Projection, Rope, RopeScaling, Split};
use planner::{
    Course, Device, Estimate, Kind, Question, RankShape, Refusal, Stage, estimate, known_device, refusals,
};
use proptest::prelude::*;
use recipe::{Batch, Budget, Compute, Precision, Pruning, Recipe, Shape, Shrink, Storage};

fn model(layers: usize, kv_heads: usize, shared: usize, channels: usize, tied: bool) -> ModelSpec {
    let widths = LayerSpec {
        query_head_count: kv_heads * shared,
        kv_head_count: kv_heads,
        intermediate_size: channels,
    };
    ModelSpec {
        family: Family::Llama,
        hidden_size: 64,
        head_dim: 8,
        vocab_size: 301,
        max_position_embeddings: 256,
        rms_norm_eps: 1e-6,
        rope: Rope { theta: 10_000.0, scaling: RopeScaling::None },
        tie_word_embeddings: tied,
        layers: vec![widths; layers],
    }
}

fn llama(hidden: usize, layers: usize, heads: usize, channels: usize) -> ModelSpec {
    ModelSpec {
        hidden_size: hidden,
        head_dim: hidden / heads,
        vocab_size: 32_000,
        ..model(layers, heads, 1, channels, false)
    }
}

fn recipe() -> Recipe {
    Recipe { batch: Batch { window_tokens: 32, rows: 2, micro_batches: 3 }, ..Recipe::default() }
}

fn planned(dense: &ModelSpec, recipe: &Recipe, tp_degree: usize, device: &Device) -> Estimate {
    estimate(&Question { dense, recipe, tp_degree, device }).unwrap_or_else(|found| panic!("{found:?}"))
}

fn on_cpu(dense: &ModelSpec, recipe: &Recipe, tp_degree: usize) -> Estimate {
    planned(dense, recipe, tp_degree, &Device::cpu())
}

#[test]
fn parameters_are_those_of_the_published_models() {
    for (dense, expected) in
        [(llama(4096, 32, 32, 11_008), 6_738_415_616), (llama(8192, 80, 64, 22_016), 65_285_660_672)]
    {
        let estimate = on_cpu(&dense, &recipe(), 1);
        assert_eq!(estimate.dense_parameters, expected);
        assert_eq!(estimate.rank_parameters[0], expected, "one rank holds all");
        assert_eq!(estimate.pruned_parameters, expected - dense.projection_weight_count() / 2);
    }
}

#[test]
fn seven_billion_weights_in_bf16_take_two_bytes_each() {
    let dense = llama(4096, 32, 32, 11_008);
    let recipe =
        Recipe { precision: Precision { compute: Compute::Bf16, storage: Storage::Bf16 }, ..recipe() };
    let estimate = planned(&dense, &recipe, 1, &known_device("h100").unwrap());
    let weights = estimate.stage(Stage::FirstStep).unwrap().weights;
    // Indices of o's and down's inputs and of the hidden features are eight bytes each.
    assert_eq!(weights, 2 * 6_738_415_616 + 8 * (32 * (4096 + 11_008) + 4096));
    // LoRA of rank 8: 8 (8 d + 3 (d + i)) a layer, in f32 with a copy in bf16.
    let lora = 32 * 8 * (8 * 4096 + 3 * (4096 + 11_008));
    let memory = estimate.stage(Stage::FirstStep).unwrap();
    assert_eq!([memory.lora, memory.gradients, memory.moments], [6 * lora, 4 * lora, 8 * lora]);
}

/// The numbers of one projection's LoRA factors on a rank that holds `split` of its split features.
fn plain_lora(dense: &ModelSpec, projection: Projection, split: u64, lora_rank: u64) -> u64 {
    let hidden = dense.hidden_size as u64;
    match projection.split() {
        // a: [r, hidden], b: [split, r]; or a: [r, split], b: [hidden, r].
        Split::Column | Split::Row => lora_rank * hidden + split * lora_rank,
    }
}

fn any_model() -> impl Strategy<Value = ModelSpec> {
    (1usize..5, 1usize..9, 1usize..4, 8usize..90, any::<bool>()).prop_map(
        |(layers, kv_heads, shared, channels, tied)| model(layers, kv_heads, shared, channels, tied),
    )
}

proptest! {
    #[test]
    fn ranks_add_up_to_the_whole(dense in any_model(), tp_degree in 1usize..9, lora_rank in 1u64..9) {
        prop_assume!(dense.layers[0].kv_head_count >= tp_degree);
        let ranks: Vec<RankShape> =
            (0..tp_degree).map(|rank| RankShape::new(&dense, &dense.layers, tp_degree, rank)).collect();
        let sum = |of: &dyn Fn(&RankShape) -> u64| ranks.iter().map(of).sum::<u64>();
        prop_assert_eq!(sum(&RankShape::projection_weights), dense.projection_weight_count());
        prop_assert_eq!(sum(&RankShape::vocabulary_weights), (dense.vocab_size * dense.hidden_size) as u64);
        let whole = RankShape::new(&dense, &dense.layers, 1, 0);
        prop_assert_eq!(sum(&|shape| shape.split_lora(lora_rank)), whole.split_lora(lora_rank));
        prop_assert!(ranks.iter().all(|shape| shape.replicated_lora(lora_rank) == whole.replicated_lora(lora_rank)));
        let plain: u64 = dense.layers.iter().flat_map(|widths| {
            Projection::ALL.map(|projection| {
                let split = match projection {
                    Projection::Q | Projection::O => widths.query_head_count * dense.head_dim,
                    Projection::K | Projection::V => widths.kv_head_count * dense.head_dim,
                    Projection::Gate | Projection::Up | Projection::Down => widths.intermediate_size,
                };
                plain_lora(&dense, projection, split as u64, lora_rank)
            })
        }).sum();
        prop_assert_eq!(whole.lora(lora_rank), plain);
        // The placement that workers compute holds as much on each rank.
        let placement = sharding::Placement::dense(&dense, tp_degree).unwrap();
        for (shape, held) in ranks.iter().zip(&placement.ranks) {
            for (widths, held) in shape.layers.iter().zip(held) {
                prop_assert_eq!(widths.query_heads as usize, held.query_heads.len());
                prop_assert_eq!(widths.kv_heads as usize, held.kv_heads.len());
                prop_assert_eq!(widths.channels as usize, held.channels.len());
            }
        }
    }

    #[test]
    fn more_ranks_never_take_more_memory_each(dense in any_model(), tp_degree in 2usize..9) {
        prop_assume!(dense.layers[0].kv_head_count >= tp_degree);
        let of = |degree| on_cpu(&dense, &recipe(), degree).stage(Stage::FirstStep).unwrap();
        let (more, one) = (of(tp_degree), of(1));
        prop_assert!(Kind::ALL.iter().all(|kind| more.of(*kind) <= one.of(*kind)), "{more:?} {one:?}");
    }

    #[test]
    fn pruning_more_leaves_less_to_do(dense in any_model(), less in 0.0f64..0.4, more in 0.4f64..0.8) {
        let of = |sparsity| {
            let pruning = Pruning { budget: Budget::Sparsity(sparsity), ..Pruning::default() };
            let recipe = Recipe { pruning: Some(pruning), ..recipe() };
            estimate(&Question { dense: &dense, recipe: &recipe, tp_degree: 1, device: &Device::cpu() })
        };
        if let (Ok(little), Ok(much)) = (of(less), of(more)) {
            prop_assert!(much.pruned_parameters <= little.pruned_parameters);
            let last = |estimate: &Estimate| estimate.stage(Stage::LastStep).unwrap().weights;
            prop_assert!(last(&much) <= last(&little));
            prop_assert!(much.steps[1].work.forward <= little.steps[1].work.forward);
            prop_assert_eq!(much.steps[0].work, little.steps[0].work);
        }
    }

    #[test]
    fn the_stretches_of_a_run_cover_its_steps(dense in any_model(), steps in 2u64..300, live: bool) {
        let mut pruning = Pruning::default();
        pruning.shrink = if live { Shrink::Live } else { Shrink::Never };
        let recipe = Recipe { steps, pruning: Some(pruning), ..recipe() };
        prop_assume!(recipe.violations().is_empty());
        if let Ok(course) = Course::new(&dense, &recipe) {
            let stretches = course.stretches();
            prop_assert_eq!(stretches.iter().map(|(count, _)| count).sum::<u64>(), steps);
            prop_assert!(live || stretches.len() == 1);
        }
    }
}

#[test]
fn traffic_is_counted_sum_by_sum() {
    let dense = model(3, 4, 2, 40, false);
    let recipe = Recipe { pruning: Some(Pruning::published()), ..recipe() };
    let traffic = on_cpu(&dense, &recipe, 2).steps[0].traffic;
    // 3 micro-batches of 64 tokens of 64 hidden features in f32.
    let stream = 64 * 64 * 4;
    assert_eq!(traffic.forward, 3 * (2 * 3 + 1) * stream);
    assert_eq!(traffic.backward, 3 * 2 * 3 * stream);
    assert_eq!(traffic.loss, 3 * 62 * (64 * 4 + 3 * 4));
    assert_eq!(traffic.lora_gradients, 7 * 8 * 64 * 3 * 4);
    // Half of 8 query heads, 4 key/value heads and 40 channels, by projection.
    assert_eq!(traffic.scores, 3 * (2 * 4 + 2 * 2 + 3 * 20) * 4);
    let alone = on_cpu(&dense, &recipe, 1).steps[0].traffic;
    assert_eq!(alone.summed(), 0);
    assert_eq!(traffic.sent(2), traffic.summed() as f64);
}

#[test]
fn the_work_of_a_step_is_a_few_operations_for_each_weight_and_token() {
    let dense = model(1, 1, 1, 10, false);
    let mut recipe = Recipe { pruning: None, ..recipe() };
    recipe.lora.rank = 1;
    let work = on_cpu(&dense, &recipe, 1).steps[0].work;
    let weights = (4 * 8 * 64 + 3 * 10 * 64) as f64;
    let head = (301 * 64) as f64;
    let lora = (7 * 64 + 4 * 8 + 3 * 10) as f64;
    let attention = (2 * 8 * 33) as f64;
    let (tokens, predicted) = ((32 * 2 * 3) as f64, (31 * 2 * 3) as f64);
    assert_eq!(work.forward, tokens * (2.0 * weights + 2.0 * lora + attention) + predicted * 2.0 * head);
    assert_eq!(
        work.backward,
        tokens * (2.0 * weights + 4.0 * lora + 2.5 * attention) + predicted * 2.0 * head
    );
    assert_eq!(work.scores, 0.0);
}

#[test]
fn a_run_that_does_not_fit_is_refused_with_what_to_change() {
    let dense = llama(8192, 80, 64, 22_016);
    let bf16 = Precision { compute: Compute::Bf16, storage: Storage::Bf16 };
    let recipe = Recipe { precision: bf16, ..recipe() };
    let device = known_device("a100").unwrap();
    let estimate = planned(&dense, &recipe, 1, &device);
    let found = refusals(&estimate, &recipe, device.memory_bytes, None);
    let [refusal @ Refusal::DoesNotFit { .. }] = &found[..] else { panic!("{found:?}") };
    let text = refusal.to_string();
    for word in ["frozen weights", "80.00 GiB", "int8", "more workers"] {
        assert!(text.contains(word), "no {word:?} in {text}");
    }
    let spread = planned(&dense, &recipe, 8, &device);
    assert_eq!(refusals(&spread, &recipe, device.memory_bytes, None), []);
    let cannot = refusals(&spread, &recipe, device.memory_bytes, Some("no form".into()));
    assert_eq!(cannot, [Refusal::NotExportable("no form".into())]);
}

#[test]
fn impossible_degrees_and_recipes_are_refused_by_field() {
    let dense = model(2, 4, 1, 40, false);
    let field = |recipe: &Recipe, tp_degree| {
        let question = Question { dense: &dense, recipe, tp_degree, device: &Device::cpu() };
        estimate(&question).unwrap_err().iter().map(|refusal| refusal.field().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(field(&recipe(), 5), ["tp_degree"]);
    assert_eq!(field(&recipe(), 0), ["tp_degree"]);
    let served = |serve_tp| {
        let pruning = Pruning { serve_tp, ..Pruning::default() };
        Recipe { pruning: Some(pruning), ..recipe() }
    };
    assert_eq!(field(&served(vec![3, 64]), 1)[0], "pruning.serve_tp");
    let bf16 = Recipe { precision: Precision { compute: Compute::Bf16, storage: Storage::Bf16 }, ..recipe() };
    assert_eq!(field(&bf16, 1), ["precision.compute"]);
}

#[test]
fn widths_that_the_scores_decide_are_said_to_be_so() {
    let dense = model(4, 8, 1, 64, false);
    let pruning = Pruning { shape: Shape::Global, ..Pruning::default() };
    let recipe = Recipe { pruning: Some(pruning), ..recipe() };
    let estimate = on_cpu(&dense, &recipe, 2);
    assert_eq!(estimate.layers, None);
    assert!(estimate.notes.iter().any(|note| note.contains("scores decide")), "{:?}", estimate.notes);
    assert!(
        estimate.stage(Stage::LastStep).unwrap().total() < estimate.stage(Stage::FirstStep).unwrap().total()
    );
}

#[test]
fn times_follow_the_rates() {
    let dense = llama(4096, 32, 32, 11_008);
    let recipe =
        Recipe { precision: Precision { compute: Compute::Bf16, storage: Storage::Bf16 }, ..recipe() };
    let (a100, h100) = (known_device("a100").unwrap(), known_device("h100").unwrap());
    let seconds = |device: &Device, degree| planned(&dense, &recipe, degree, device).run.unwrap();
    assert!(seconds(&h100, 1).total() < seconds(&a100, 1).total());
    assert!(seconds(&a100, 4).total() < seconds(&a100, 1).total());
    assert!(seconds(&a100, 4).device_hours > seconds(&a100, 1).device_hours, "sums are not free");
    let mut half = a100.clone();
    half.rates.as_mut().unwrap().efficiency /= 2.0;
    let twice = seconds(&half, 2).total() / seconds(&a100, 2).total();
    assert!((twice - 2.0).abs() < 1e-9, "{twice}");
}
