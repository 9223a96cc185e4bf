use super::*;
use crate::testing::{importances, llama, model, random_scores, smollm2};
use crate::{GroupImportance, ScoreAssembly, StepScores, combine, random_importance};
use model_spec::Projection;
use proptest::prelude::*;
use recipe::{Budget, Criterion, LoraPruneForm, Protection, Pruning, Shape};

const KV: HeadGrouping = HeadGrouping::KvGroups;
const QUERIES: HeadGrouping = HeadGrouping::QueryHeads;

fn pruning(shape: Shape, sparsity: f64) -> Pruning {
    Pruning { shape, budget: Budget::Sparsity(sparsity), ..Pruning::published() }
}

fn average(dense: &ModelSpec, grouping: HeadGrouping, layers: Vec<GroupImportance>) -> MovingAverage {
    MovingAverage { layers, ..MovingAverage::new(dense, grouping, 0.9) }
}

/// One decision at the full target from importances `value(layer, block, group)`.
fn decided(dense: &ModelSpec, pruning: &Pruning, value: impl Fn(usize, Block, usize) -> f64) -> KeepMask {
    let grouping = pruning.head_grouping;
    let average = average(dense, grouping, importances(dense, grouping, value));
    let target = Target::resolve(dense, pruning).unwrap();
    let mask = decide(dense, &KeepMask::full(dense), &average, &target, 1.0).unwrap();
    mask.check_fits(dense).unwrap();
    mask
}

fn random(seed: u64) -> impl Fn(usize, Block, usize) -> f64 {
    move |layer, block, group| random_importance(seed, layer, block, group)
}

#[test]
fn the_least_important_groups_go() {
    let dense = model(2, 8, 4, 6);
    let mask = decided(&dense, &pruning(Shape::Uniform, 0.5), |layer, block, group| match block {
        Block::Attention => [[4.0, 1.0, 3.0, 2.0], [1.0, 2.0, 3.0, 4.0]][layer][group],
        Block::Mlp => [[6.0, 1.0, 5.0, 2.0, 4.0, 3.0], [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]][layer][group],
    });
    assert_eq!(
        mask.layers,
        [
            LayerKeep { query_heads: vec![0, 1, 4, 5], kv_heads: vec![0, 2], channels: vec![0, 2, 4] },
            LayerKeep { query_heads: vec![4, 5, 6, 7], kv_heads: vec![2, 3], channels: vec![3, 4, 5] },
        ]
    );
}

#[test]
fn of_equal_groups_the_lower_index_goes_first() {
    let dense = model(2, 8, 4, 6);
    for value in [0.0, 1.0, 7.25] {
        let mask = decided(&dense, &pruning(Shape::Uniform, 0.5), |_, _, _| value);
        let expected =
            LayerKeep { query_heads: vec![4, 5, 6, 7], kv_heads: vec![2, 3], channels: vec![3, 4, 5] };
        assert_eq!(mask.layers, [expected.clone(), expected]);
    }
}

#[test]
fn each_key_value_head_loses_its_least_query_heads() {
    let dense = model(1, 8, 2, 6);
    let recipe = Pruning { head_grouping: QUERIES, ..pruning(Shape::Uniform, 0.4) };
    let mask = decided(&dense, &recipe, |_, block, group| match block {
        Block::Attention => [4.0, 3.0, 2.0, 1.0, 0.0, 0.0, 9.0, 0.0][group],
        Block::Mlp => 1.0,
    });
    // 0.6 * 4 is nearest to 2: heads 2 and 3 of the first, 4 and (of three equal ones) 5 of the second.
    assert_eq!(mask.layers[0].query_heads, [0, 1, 6, 7]);
    assert_eq!(mask.layers[0].kv_heads, [0, 1]);
}

#[test]
fn half_of_a_65b_model_is_decided_exactly() {
    let dense = llama(8192, 80, 64, 22_016);
    for shape in [Shape::Uniform, Shape::Global] {
        let mask = decided(&dense, &pruning(shape, 0.5), random(1));
        let kept = mask.pruned_spec(&dense).projection_weight_count();
        let budget = dense.projection_weight_count() / 2;
        let largest_group = 4 * 128 * 8192;
        assert!(kept <= budget && kept + largest_group > budget);
        if shape == Shape::Uniform {
            let expected = LayerSpec { query_head_count: 32, kv_head_count: 32, intermediate_size: 11_008 };
            assert!(mask.layers.iter().all(|layer| layer.widths() == expected));
        }
    }
}

#[test]
fn the_global_ranking_goes_by_importance_per_weight_where_scores_share_a_unit() {
    // A key/value group of 1 query head holds 64 weights, a channel 24.
    let dense = model(2, 2, 2, 4);
    let mut recipe = pruning(Shape::Global, 0.0);
    recipe.criterion = Criterion::LoraPrune { form: LoraPruneForm::Paper };
    let value = |layer: usize, block: Block, group: usize| match block {
        Block::Attention => [[6.4, 64.0], [12.8, 640.0]][layer][group],
        Block::Mlp => [[2.42, 9.0, 9.0, 9.0], [2.5, 24.0, 4.9, 9.0]][layer][group],
    };
    // Densities: 0.1 (layer 0: head 0), 0.101 (channel 0), 0.104 (layer 1: channel 0), 0.2 (head 0), 0.204 (channel 2), ...
    let dense_weights = dense.projection_weight_count();
    let removed = [
        (1, vec![(0, Block::Attention, 0)]),
        (65, vec![(0, Block::Attention, 0), (0, Block::Mlp, 0)]),
        (89, vec![(0, Block::Attention, 0), (0, Block::Mlp, 0), (1, Block::Mlp, 0)]),
        (
            113,
            vec![(0, Block::Attention, 0), (0, Block::Mlp, 0), (1, Block::Mlp, 0), (1, Block::Attention, 0)],
        ),
    ];
    for (weights, gone) in removed {
        recipe.budget = Budget::Parameters(dense.parameter_count() - weights);
        let mask = decided(&dense, &recipe, value);
        let mut expected = KeepMask::full(&dense);
        for (layer, block, group) in &gone {
            let keep = &mut expected.layers[*layer];
            match block {
                Block::Attention => {
                    keep.kv_heads.retain(|head| head != group);
                    keep.query_heads.retain(|head| head != group);
                }
                Block::Mlp => keep.channels.retain(|channel| channel != group),
            }
        }
        assert_eq!(mask, expected, "{weights} weights of {dense_weights}");
    }
}

#[test]
fn the_global_ranking_goes_by_the_share_of_the_block_where_scores_are_normalised() {
    let dense = model(2, 2, 2, 4);
    // By weight every channel of layer 1 would go before any head; each is half or twice the mean of its block instead.
    let value = |layer: usize, block: Block, group: usize| match (layer, block) {
        (0, Block::Attention) => [50.0, 150.0][group],
        (1, Block::Attention) => [99.0, 101.0][group],
        (0, Block::Mlp) => [8.0, 8.0, 4.0, 20.0][group],
        (_, _) => [0.01, 0.02, 0.01, 0.0][group],
    };
    let recipe = Pruning {
        budget: Budget::Parameters(dense.parameter_count() - 24 - 24 - 64 - 24),
        ..pruning(Shape::Global, 0.0)
    };
    let mask = decided(&dense, &recipe, value);
    // Densities: layer 0 heads 0.5 and 1.5, channels 0.8, 0.8, 0.4, 2; layer 1 heads 0.99, 1.01, channels 1, 2, 1, 0.
    assert_eq!(mask.layers[0], LayerKeep { query_heads: vec![1], kv_heads: vec![1], channels: vec![1, 3] });
    assert_eq!(
        mask.layers[1],
        LayerKeep { query_heads: vec![0, 1], kv_heads: vec![0, 1], channels: vec![0, 1, 2] }
    );
}

#[test]
fn global_ties_go_by_layer_then_attention_before_mlp_then_index() {
    let dense = model(2, 2, 2, 4);
    let mut gone = Vec::new();
    for weights in [1, 65, 89, 113, 137, 201, 225, 249] {
        let recipe = Pruning {
            budget: Budget::Parameters(dense.parameter_count() - weights),
            ..pruning(Shape::Global, 0.0)
        };
        let mask = decided(&dense, &recipe, |_, _, _| 0.0);
        let widths = |layer: &LayerKeep| (layer.kv_heads.len(), layer.channels.len());
        gone.push((widths(&mask.layers[0]), widths(&mask.layers[1])));
        assert!(mask.layers.iter().all(|layer| layer.kv_heads.contains(&1) && layer.channels.contains(&3)));
    }
    assert_eq!(
        gone,
        [
            ((1, 4), (2, 4)),
            ((1, 3), (2, 4)),
            ((1, 2), (2, 4)),
            ((1, 1), (2, 4)),
            ((1, 1), (1, 4)),
            ((1, 1), (1, 3)),
            ((1, 1), (1, 2)),
            ((1, 1), (1, 1)),
        ]
    );
}

#[test]
fn the_global_ranking_leaves_protected_layers_alone_and_legal_counts_elsewhere() {
    let dense = smollm2();
    for (head_grouping, serve_tp) in [(KV, vec![2]), (QUERIES, vec![3])] {
        let recipe = Pruning {
            head_grouping,
            serve_tp: serve_tp.clone(),
            channel_multiple: 32,
            protection: Protection::Layers(if serve_tp == [3] { vec![0, 29] } else { vec![] }),
            ..pruning(Shape::Global, 0.4)
        };
        let mask = decided(&dense, &recipe, random(5));
        for (layer, keep) in mask.layers.iter().enumerate() {
            let widths = keep.widths();
            assert!(widths.intermediate_size.is_multiple_of(32) && widths.intermediate_size > 0);
            match head_grouping {
                HeadGrouping::KvGroups => assert_eq!((widths.query_head_count, widths.kv_head_count), (6, 2)),
                HeadGrouping::QueryHeads => assert_eq!(widths.kv_head_count, 3),
            }
            assert!(
                recipe.protection != Protection::Layers(vec![0, 29])
                    || layer % 29 != 0
                    || widths == dense.layers[0]
            );
        }
    }
}

#[test]
fn arguments_that_do_not_belong_together_are_refused() {
    let dense = model(2, 4, 4, 6);
    let target = Target::resolve(&dense, &pruning(Shape::Uniform, 0.5)).unwrap();
    let full = KeepMask::full(&dense);
    let good = average(&dense, KV, importances(&dense, KV, random(2)));
    for share in [-0.1, 1.5, f64::NAN] {
        assert!(matches!(decide(&dense, &full, &good, &target, share), Err(DecideError::Share { .. })));
    }
    let mut nan = good.clone();
    nan.layers[1].mlp[4] = f64::NAN;
    let error = decide(&dense, &full, &nan, &target, 1.0).unwrap_err();
    assert_eq!(
        error.to_string(),
        "layer 1: averaged importance of mlp group 4 is NaN; go back to the last checkpoint"
    );
    let mut infinite = good.clone();
    infinite.layers[0].attention[1] = f64::INFINITY;
    let expected = DecideError::NotFinite { layer: 0, block: "attention", group: 1, value: f64::INFINITY };
    assert_eq!(decide(&dense, &full, &infinite, &target, 0.5), Err(expected));
    let other = average(&dense, QUERIES, GroupImportance::zeros(&model(1, 4, 4, 6), QUERIES));
    assert_eq!(decide(&dense, &full, &other, &target, 0.5), Err(DecideError::OtherModel { layer: 1 }));
    let wider = model(2, 4, 4, 7);
    let mask = KeepMask::full(&wider);
    assert_eq!(decide(&wider, &mask, &good, &target, 0.5), Err(DecideError::OtherModel { layer: 0 }));
    let mut broken = full.clone();
    broken.layers[1].channels = vec![9];
    assert!(matches!(decide(&dense, &broken, &good, &target, 0.5), Err(DecideError::KeepMask(_))));
    let mut below = full.clone();
    below.layers[1].channels = vec![0, 1];
    let expected = DecideError::BelowTarget { layer: 1, what: "channels", live: 2, last: 3 };
    assert_eq!(decide(&dense, &below, &good, &target, 0.1), Err(expected));
}

/// Every score of a step as single entries, in an order and in chunks that `seed` picks.
fn assembled(dense: &ModelSpec, keep: &KeepMask, scores: &StepScores, seed: u64, ranks: usize) -> StepScores {
    let mut chunks = Vec::new();
    for (layer, kept) in keep.layers.iter().enumerate() {
        for projection in Projection::ALL {
            for rank in 0..ranks {
                let units: Vec<usize> =
                    kept.units(projection).iter().copied().filter(|unit| unit % ranks == rank).collect();
                let chunk_len = 1 + (seed as usize + layer + rank) % 3;
                chunks.extend(units.chunks(chunk_len).map(|units| (layer, projection, units.to_vec())));
            }
        }
    }
    let key = |index: usize| (random_importance(seed, index, Block::Mlp, 0) * 1e9) as u64;
    let mut order: Vec<usize> = (0..chunks.len()).collect();
    order.sort_by_key(|&index| key(index));
    let mut assembly = ScoreAssembly::new(dense, keep);
    for index in order {
        let (layer, projection, units) = &chunks[index];
        let values: Vec<f64> = units.iter().map(|&unit| scores.of(*layer, *projection)[unit]).collect();
        assembly.add(*layer, *projection, units, &values).unwrap();
    }
    assembly.finish().unwrap()
}

fn any_recipe() -> impl Strategy<Value = Pruning> {
    let shapes = prop_oneof![Just(Shape::Uniform), Just(Shape::Paper), Just(Shape::Global)];
    let criteria = prop_oneof![
        Just(Criterion::LoraPrune { form: LoraPruneForm::Code }),
        Just(Criterion::LoraPrune { form: LoraPruneForm::Paper }),
    ];
    (shapes, criteria, 0.0f64..0.85, prop_oneof![Just(KV), Just(QUERIES)], 1usize..5, any::<bool>()).prop_map(
        |(shape, criterion, sparsity, head_grouping, channel_multiple, servable)| Pruning {
            criterion,
            head_grouping,
            channel_multiple,
            protection: Protection::Layers(vec![]),
            serve_tp: if servable { vec![2] } else { vec![] },
            ..pruning(shape, sparsity)
        },
    )
}

proptest! {
    #[test]
    fn arrival_order_chunking_and_rank_split_never_change_the_mask(
        seed: u64, order: u64, ranks in 1usize..4, recipe in any_recipe(),
    ) {
        let dense = model(3, 12, 4, 24);
        let Ok(target) = Target::resolve(&dense, &recipe) else { return Ok(()) };
        let decide_from = |orders: [u64; 3], ranks: usize| {
            let mut keep = KeepMask::full(&dense);
            let mut average = MovingAverage::new(&dense, recipe.head_grouping, recipe.moving_average_decay);
            for (step, (order, share)) in orders.into_iter().zip([0.0, 0.5, 1.0]).enumerate() {
                let raw = random_scores(&dense, &keep, seed ^ step as u64);
                let scores = assembled(&dense, &keep, &raw, order, ranks);
                let step = combine(&dense, &scores, recipe.criterion, recipe.head_grouping).unwrap();
                average.update(&step).unwrap();
                keep = decide(&dense, &keep, &average, &target, share).unwrap();
                average.forget_removed(&keep, recipe.head_grouping);
            }
            (keep, average)
        };
        prop_assert_eq!(decide_from([1, 2, 3], 1), decide_from([order, order ^ 9, order / 2], ranks));
    }

    #[test]
    fn kept_sets_only_shrink_and_end_at_the_target_whatever_the_scores(
        recipe in any_recipe(), seeds in proptest::collection::vec(any::<u64>(), 1..6), zeros: bool,
    ) {
        let dense = model(3, 12, 4, 24);
        let Ok(target) = Target::resolve(&dense, &recipe) else { return Ok(()) };
        let mut keep = KeepMask::full(&dense);
        let steps = seeds.len();
        for (step, seed) in seeds.into_iter().enumerate() {
            let share = (step + 1) as f64 / steps as f64;
            let layers = importances(&dense, recipe.head_grouping, |layer, block, group| {
                if zeros { 0.0 } else { random_importance(seed, layer, block, group) }
            });
            let average = average(&dense, recipe.head_grouping, layers);
            let next = decide(&dense, &keep, &average, &target, share).unwrap();
            next.check_fits(&dense).unwrap();
            next.check_subset_of(&keep).unwrap();
            if let Some(due) = target.counts_at(share) {
                let found: Vec<LayerSpec> = next.layers.iter().map(LayerKeep::widths).collect();
                prop_assert_eq!(found, due);
            }
            prop_assert_eq!(&decide(&dense, &next, &average, &target, share).unwrap(), &next);
            keep = next;
        }
        let kept = keep.pruned_spec(&dense);
        let most = target.summary().kept_prunable_weights;
        prop_assert!(kept.projection_weight_count() <= most);
        for widths in &kept.layers {
            prop_assert!(widths.intermediate_size.is_multiple_of(recipe.channel_multiple));
            prop_assert!(recipe.serve_tp.iter().all(|tp| widths.query_head_count.is_multiple_of(*tp)));
        }
        if recipe.shape == Shape::Global {
            // The largest quantum is two key/value groups of 128 weights.
            let unit = 2 * 128;
            prop_assert!(kept.projection_weight_count() + unit > most, "{} of {most}", kept.projection_weight_count());
        } else {
            prop_assert_eq!(kept.projection_weight_count(), most);
        }
    }

    #[test]
    fn permuting_groups_permutes_the_mask(seed: u64, shift in 1usize..24, sparsity in 0.1f64..0.8, global: bool) {
        let dense = model(2, 24, 24, 24);
        let recipe = pruning(if global { Shape::Global } else { Shape::Uniform }, sparsity);
        let plain = decided(&dense, &recipe, random(seed));
        let moved = decided(&dense, &recipe, |layer, block, group| {
            random_importance(seed, layer, block, (group + 24 - shift) % 24)
        });
        for (plain, moved) in plain.layers.iter().zip(&moved.layers) {
            for (plain, moved) in [(&plain.channels, &moved.channels), (&plain.kv_heads, &moved.kv_heads)] {
                let mut expected: Vec<usize> = plain.iter().map(|group| (group + shift) % 24).collect();
                expected.sort_unstable();
                prop_assert_eq!(&expected, moved);
            }
        }
    }
}
