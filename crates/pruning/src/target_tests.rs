use super::*;
use crate::testing::{llama, model, smollm2};
use proptest::prelude::*;
use recipe::{HeadGrouping, LoraPruneForm, Protection};

fn uniform_at(sparsity: f64) -> Pruning {
    Pruning { budget: Budget::Sparsity(sparsity), ..Pruning::published() }
}

fn final_counts(dense: &ModelSpec, pruning: &Pruning) -> Vec<LayerSpec> {
    Target::resolve(dense, pruning).unwrap().counts_at(1.0).unwrap()
}

fn widths(query_head_count: usize, kv_head_count: usize, intermediate_size: usize) -> LayerSpec {
    LayerSpec { query_head_count, kv_head_count, intermediate_size }
}

#[test]
fn half_of_a_published_model_is_half_its_heads_and_channels() {
    for (dense, heads, channels) in [
        (llama(4096, 32, 32, 11_008), 16, 5504),
        (llama(5120, 40, 40, 13_824), 20, 6912),
        (llama(6656, 60, 52, 17_920), 26, 8960),
        (llama(8192, 80, 64, 22_016), 32, 11_008),
    ] {
        let target = Target::resolve(&dense, &uniform_at(0.5)).unwrap();
        let expected = vec![widths(heads, heads, channels); dense.layers.len()];
        assert_eq!(target.counts_at(1.0).unwrap(), expected);
        let summary = target.summary();
        assert_eq!(2 * summary.kept_prunable_weights, dense.projection_weight_count());
        assert_eq!((summary.sparsity_of_prunable, summary.sparsity_of_projections), (0.5, 0.5));
        assert_eq!(summary.kept_parameters, dense.parameter_count() - dense.projection_weight_count() / 2);
    }
}

#[test]
fn head_counts_are_rounded_first_and_channels_make_up_the_budget() {
    let (kv, queries) = (HeadGrouping::KvGroups, HeadGrouping::QueryHeads);
    for (sparsity, head_grouping, serve_tp, channel_multiple, expected) in [
        // 0.5 * 3 lies halfway between 1 and 2: the larger is kept. 1 769 472 - 589 824 weights are 682.7 channels.
        (0.5, kv, vec![], 1, widths(6, 2, 682)),
        (0.5, kv, vec![2], 1, widths(6, 2, 682)),
        (0.5, kv, vec![2], 64, widths(6, 2, 640)),
        (0.5, kv, vec![3], 1, widths(3, 1, 852)),
        (0.0, kv, vec![], 1, widths(9, 3, 1536)),
        (0.2, kv, vec![], 1, widths(6, 2, 1297)),
        (0.8, kv, vec![], 1, widths(3, 1, 238)),
        (0.5, queries, vec![], 1, widths(6, 3, 640)),
        (0.9, kv, vec![], 1, widths(3, 1, 34)),
    ] {
        let pruning = Pruning { head_grouping, serve_tp, channel_multiple, ..uniform_at(sparsity) };
        assert_eq!(final_counts(&smollm2(), &pruning)[7], expected, "{pruning:?}");
    }
}

#[test]
fn heads_give_way_where_the_nearest_count_leaves_no_room_for_channels() {
    // Attention holds 4 * 2 * 8 = 64 weights a head, the mlp 24 a channel: 512 + 48 in all. Half is 280.
    let dense = model(3, 8, 8, 2);
    assert_eq!(final_counts(&dense, &uniform_at(0.5))[0], widths(4, 4, 1));
    // 4 of 8 heads and the two channels that must stay take 304.
    let pruning = Pruning { channel_multiple: 2, ..uniform_at(0.5) };
    assert_eq!(final_counts(&dense, &pruning)[0], widths(3, 3, 2));
}

#[test]
fn the_published_rule_takes_the_floor_and_spares_the_first_tenth_and_the_last_layer() {
    let dense = llama(4096, 32, 32, 11_008);
    for (sparsity, heads, channels, parameters) in
        [(0.5, 16, 5504, 3_905_163_264), (0.2, 26, 8807, 5_628_809_216)]
    {
        let target =
            Target::resolve(&dense, &Pruning { shape: Shape::Paper, ..uniform_at(sparsity) }).unwrap();
        for (layer, found) in target.counts_at(1.0).unwrap().into_iter().enumerate() {
            let spared = layer < 3 || layer == 31;
            let expected = if spared { widths(32, 32, 11_008) } else { widths(heads, heads, channels) };
            assert_eq!(found, expected, "layer {layer}");
        }
        assert_eq!(target.summary().kept_parameters, parameters);
    }
}

#[test]
fn llm_pruners_quarter_of_layers_4_to_29_has_its_published_parameter_count() {
    let pruning = Pruning {
        shape: Shape::Paper,
        protection: Protection::Layers(vec![0, 1, 2, 3, 30, 31]),
        ..uniform_at(0.25)
    };
    let target = Target::resolve(&llama(4096, 32, 32, 11_008), &pruning).unwrap();
    assert_eq!(target.summary().kept_parameters, 5_422_977_024);
}

#[test]
fn the_published_rule_rounds_up_to_legal_counts_and_leaves_one_group() {
    for (dense, sparsity, serve_tp, channel_multiple, expected) in [
        (model(1, 8, 8, 100), 0.3, vec![], 1, widths(6, 6, 70)),
        (model(1, 8, 8, 100), 0.3, vec![4], 16, widths(8, 8, 80)),
        (model(1, 8, 8, 100), 0.01, vec![], 16, widths(8, 8, 96)),
        (model(1, 2, 2, 3), 0.99, vec![], 1, widths(1, 1, 1)),
        (model(1, 8, 2, 10), 0.3, vec![], 1, widths(8, 2, 7)),
    ] {
        let pruning = Pruning {
            shape: Shape::Paper,
            protection: Protection::Layers(vec![]),
            serve_tp,
            channel_multiple,
            ..uniform_at(sparsity)
        };
        assert_eq!(final_counts(&dense, &pruning), [expected], "{pruning:?}");
    }
    let by_heads = Pruning {
        shape: Shape::Paper,
        protection: Protection::Layers(vec![]),
        head_grouping: HeadGrouping::QueryHeads,
        ..uniform_at(0.3)
    };
    assert_eq!(final_counts(&model(1, 8, 2, 10), &by_heads), [widths(6, 2, 7)]);
}

#[test]
fn a_ramp_over_a_published_model_takes_whole_groups_and_ends_exactly() {
    let dense = llama(4096, 32, 32, 11_008);
    let pruning = uniform_at(0.5);
    let target = Target::resolve(&dense, &pruning).unwrap();
    for (share, heads, channels) in
        [(0.0, 32, 11_008), (0.06, 31, 10_678), (0.25, 28, 9632), (0.96, 17, 5724), (1.0, 16, 5504)]
    {
        assert_eq!(target.counts_at(share).unwrap()[0], widths(heads, heads, channels), "at {share}");
    }
    // Two epochs of 20 000 samples in batches of 128.
    let steps = pruning.ramp.pruning_steps(312);
    let due = |step: &u64| target.counts_at(pruning.ramp.share_at(*step, 312)).unwrap()[0].kv_head_count;
    assert_eq!(steps.iter().map(due).collect::<Vec<_>>()[..6], [30, 29, 27, 26, 24, 23]);
    assert_eq!((due(&280), due(&281)), (16, 16));
}

#[test]
fn the_only_head_to_go_does_so_halfway_but_as_published_by_the_floor() {
    for shape in [Shape::Uniform, Shape::Paper] {
        let pruning = Pruning { shape, protection: Protection::Layers(vec![]), ..uniform_at(0.5) };
        let target = Target::resolve(&smollm2(), &pruning).unwrap();
        let heads =
            [0.0, 0.49, 0.5, 0.66, 0.999, 1.0].map(|share| target.counts_at(share).unwrap()[0].kv_head_count);
        let expected = match shape {
            Shape::Uniform => [3, 3, 2, 2, 2, 2],
            // floor(1.5 share)
            Shape::Paper | Shape::Global => [3, 3, 3, 3, 2, 2],
        };
        assert_eq!(heads, expected, "{shape:?}");
    }
}

#[test]
fn a_parameter_budget_is_met_to_within_a_channel_of_every_layer() {
    let dense = llama(4096, 32, 32, 11_008);
    let pruning = Pruning { budget: Budget::Parameters(3_500_000_000), ..Pruning::published() };
    let summary = *Target::resolve(&dense, &pruning).unwrap().summary();
    assert!(summary.kept_parameters <= 3_500_000_000);
    assert!(summary.kept_parameters + 32 * 3 * 4096 > 3_500_000_000);
    let all = Pruning { budget: Budget::Parameters(dense.parameter_count()), ..Pruning::published() };
    assert_eq!(final_counts(&dense, &all), dense.layers);
}

#[test]
fn the_global_target_is_a_number_of_weights() {
    let dense = llama(4096, 32, 32, 11_008);
    let pruning = Pruning { shape: Shape::Global, ..uniform_at(0.5) };
    let target = Target::resolve(&dense, &pruning).unwrap();
    assert_eq!(target.counts_at(1.0), None);
    assert_eq!(target.stock_family(&dense), None);
    let Goal::Weights(goal) = &target.goal else { panic!("{target:?}") };
    assert_eq!(goal.removed_weights, dense.projection_weight_count() / 2);
    assert_eq!(goal.density, Density::ByBlockMean);
    for (criterion, expected) in [
        (Criterion::LoraPrune { form: LoraPruneForm::Paper }, Density::ByWeight),
        (Criterion::Taylor, Density::ByWeight),
        (Criterion::Magnitude, Density::ByWeight),
        (Criterion::Random, Density::ByBlockMean),
    ] {
        assert_eq!(density(criterion), expected, "{criterion:?}");
    }
}

#[test]
fn the_stock_architecture_follows_from_the_final_widths() {
    let seven = llama(4096, 32, 32, 11_008);
    for (dense, sparsity, shape, expected) in [
        (&seven, 0.5, Shape::Uniform, Some(Family::Llama)),
        (&seven, 0.2, Shape::Uniform, Some(Family::Mistral)),
        (&smollm2(), 0.5, Shape::Uniform, Some(Family::Llama)),
        (&seven, 0.5, Shape::Paper, None),
        (&seven, 0.0, Shape::Paper, Some(Family::Llama)),
    ] {
        let target = Target::resolve(dense, &Pruning { shape, ..uniform_at(sparsity) }).unwrap();
        assert_eq!(target.stock_family(dense), expected, "{sparsity} {shape:?}");
    }
}

#[test]
fn what_cannot_be_met_is_refused_by_field_with_the_reason_and_what_is_possible() {
    let base = Pruning::published();
    let smol = smollm2();
    let mut uneven = smol.clone();
    uneven.layers[3].intermediate_size = 1000;
    let (sparsity, parameters) = ("pruning.budget.sparsity", "pruning.budget.parameters");
    let (tp, multiple) = ("pruning.serve_tp", "pruning.channel_multiple");
    for (dense, pruning, field, said) in [
        (&smol, uniform_at(1.0), sparsity, "[0, 1)"),
        (&smol, uniform_at(f64::NAN), sparsity, "got NaN"),
        (&smol, uniform_at(0.99), sparsity, "give 0.9161"),
        // One key/value head leaves 238 channels at 0.8.
        (&smol, Pruning { channel_multiple: 256, ..uniform_at(0.8) }, sparsity, "give 0.7916"),
        (&smol, Pruning { channel_multiple: 512, ..uniform_at(0.9) }, sparsity, "give 0.6666"),
        (
            &smol,
            Pruning { budget: Budget::Parameters(1_000_000), ..base.clone() },
            parameters,
            "37245888..=134515008",
        ),
        (
            &smol,
            Pruning { budget: Budget::Parameters(200_000_000), ..base.clone() },
            parameters,
            "got 200000000",
        ),
        (&smol, Pruning { channel_multiple: 2000, ..base.clone() }, multiple, "at most 1536"),
        (&smol, Pruning { channel_multiple: 0, ..base.clone() }, multiple, "at least 1"),
        (&smol, Pruning { serve_tp: vec![4], ..base.clone() }, tp, "one by one: 1, 2, 3, 6, 9"),
        (&smol, Pruning { serve_tp: vec![2, 9], ..base.clone() }, tp, "served at 2, 9"),
        (&smol, Pruning { serve_tp: vec![2], channel_multiple: 1535, ..base.clone() }, tp, "is 3070"),
        (
            &smol,
            Pruning { protection: Protection::Layers(vec![2]), ..base.clone() },
            "pruning.protection",
            "`uniform` cannot express",
        ),
        (
            &smol,
            Pruning { shape: Shape::Global, protection: Protection::Layers(vec![30]), ..base.clone() },
            "pruning.protection",
            "its last is 29",
        ),
        (
            &smol,
            Pruning {
                shape: Shape::Global,
                protection: Protection::Layers((0..30).collect()),
                ..base.clone()
            },
            "pruning.protection",
            "none of the 30 layers",
        ),
        (
            &smol,
            Pruning { shape: Shape::Paper, serve_tp: vec![2], ..base.clone() },
            tp,
            "layer 0 is protected, and its 9 query heads",
        ),
        (
            &smol,
            Pruning { shape: Shape::Paper, channel_multiple: 1000, ..base.clone() },
            multiple,
            "no multiple of 1000",
        ),
        (
            &model(2, 4, 4, 8),
            Pruning { head_grouping: HeadGrouping::QueryHeads, ..base.clone() },
            "pruning.head_grouping",
            "use `kv_groups`",
        ),
        (&uneven, base.clone(), "pruning.shape", "equal widths"),
    ] {
        let violations = Target::resolve(dense, &pruning).unwrap_err();
        assert_eq!(violations[0].field, field, "{violations:?}");
        assert!(violations[0].problem.contains(said), "{said:?} is not in {violations:?}");
    }
}

proptest! {
    #[test]
    fn a_uniform_budget_is_never_exceeded_and_missed_by_less_than_a_quantum_unless_all_channels_stay(
        sparsity in 0.0f64..0.95,
        per_kv in 1usize..4,
        kv_heads in 1usize..9,
        channels in 8usize..200,
        multiple in 1usize..9,
        tp in 1usize..4,
    ) {
        let dense = model(3, per_kv * kv_heads, kv_heads, channels);
        let pruning = Pruning { channel_multiple: multiple, serve_tp: vec![tp], ..uniform_at(sparsity) };
        if let Ok(target) = Target::resolve(&dense, &pruning) {
            let last = target.counts_at(1.0).unwrap();
            let kept = ModelSpec { layers: last.clone(), ..dense.clone() }.projection_weight_count();
            prop_assert_eq!(kept, target.summary().kept_prunable_weights);
            let budget = (1.0 - sparsity) * dense.projection_weight_count() as f64;
            prop_assert!(kept as f64 <= budget * (1.0 + 1e-9), "{kept} of {budget}");
            let quantum = target.legal.channel_quantum();
            let all_stay = last[0].intermediate_size + quantum > channels;
            let unit = 3 * 3 * 8 * quantum;
            prop_assert!(all_stay || (kept + unit as u64) as f64 > budget - 1.0, "{kept} of {budget}");
            prop_assert!(last[0].intermediate_size.is_multiple_of(quantum));
            prop_assert!(last[0].query_head_count.is_multiple_of(tp));
        }
    }

    #[test]
    fn counts_never_rise_with_the_share_and_never_fall_below_the_last(
        sparsity in 0.0f64..0.9, shares in proptest::collection::vec(0.0f64..1.0, 2..12), shape in 0usize..2,
        by_query_heads: bool, multiple in 1usize..5,
    ) {
        let mut pruning = uniform_at(sparsity);
        pruning.shape = [Shape::Uniform, Shape::Paper][shape];
        pruning.protection = Protection::Layers(vec![]);
        pruning.channel_multiple = multiple;
        if by_query_heads {
            pruning.head_grouping = HeadGrouping::QueryHeads;
        }
        let dense = model(2, 12, 3, 40);
        if let Ok(target) = Target::resolve(&dense, &pruning) {
            let mut shares = shares;
            shares.sort_by(f64::total_cmp);
            shares.insert(0, 0.0);
            shares.push(1.0);
            let counts: Vec<LayerSpec> = shares.iter().map(|&share| target.counts_at(share).unwrap()[1]).collect();
            prop_assert_eq!(counts[0], dense.layers[1]);
            for pair in counts.windows(2) {
                prop_assert!(pair[0].query_head_count >= pair[1].query_head_count);
                prop_assert!(pair[0].kv_head_count >= pair[1].kv_head_count);
                prop_assert!(pair[0].intermediate_size >= pair[1].intermediate_size);
            }
        }
    }
}
