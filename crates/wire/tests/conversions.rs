//! Messages into domain types and back: defaults, round trips, and refusals that name their field.

use model_spec::{Family, LayerSpec, ModelSpec, Projection, Rope, RopeScaling};
use proptest::prelude::*;
use pruning::KeepMask;
use recipe::{
    Chain, Compensation, CompensationTarget, Compute, Criterion, Distillation, HeadGrouping, LearningRate,
    LeastSquares, LoraPruneForm, Precision, Protection, Pruning, Ramp, RampShape, Recipe, Recovery, Shape,
    Shrink, Storage,
};
use wire::convert::{mask, recipe as recipe_message, run, scores, time};
use wire::{FieldViolation, limits, pb};

fn fields(violations: &[FieldViolation]) -> Vec<&str> {
    violations.iter().map(|violation| violation.field.as_str()).collect()
}

fn source(path: &str) -> pb::TextSource {
    pb::TextSource { path: path.into(), ..Default::default() }
}

fn smallest_spec() -> pb::RunSpec {
    pb::RunSpec {
        model: "/models/a".into(),
        training_data: vec![source("/data/a.txt")],
        ..Default::default()
    }
}

#[test]
fn an_empty_recipe_is_the_default_without_pruning() {
    let expected = Recipe { pruning: None, ..Recipe::default() };
    for message in [None, Some(pb::Recipe::default())] {
        assert_eq!(recipe_message::checked(message, "recipe"), Ok(expected.clone()));
    }
}

#[test]
fn an_empty_pruning_is_the_default_pruning() {
    let message = pb::Recipe { pruning: Some(pb::Pruning::default()), ..Default::default() };
    assert_eq!(recipe_message::checked(Some(message), ""), Ok(Recipe::default()));
}

#[test]
fn a_chain_survives_the_round_trip_and_takes_its_defaults() {
    for chain in [
        Chain { knots: vec![10, 20], warmup_steps: 0, settle_steps: 1 },
        Chain { knots: vec![7], ..Chain::default() },
    ] {
        let recipe = Recipe { chain: Some(chain), ..Recipe::default() };
        assert_eq!(recipe_message::checked(Some(recipe_message::to_pb(&recipe)), ""), Ok(recipe));
    }
    let message = pb::Recipe {
        chain: Some(pb::Chain { knots: vec![7], ..pb::Chain::default() }),
        ..pb::Recipe::default()
    };
    let chain = recipe_message::checked(Some(message), "").unwrap().chain;
    assert_eq!(chain, Some(Chain { knots: vec![7], ..Chain::default() }));
}

#[test]
fn every_member_of_every_choice_survives_the_round_trip() {
    let criteria = [
        Criterion::LoraPrune { form: LoraPruneForm::Code },
        Criterion::LoraPrune { form: LoraPruneForm::Paper },
        Criterion::Taylor,
        Criterion::Magnitude,
        Criterion::Random,
        Criterion::Wanda,
        Criterion::Tangent,
        Criterion::Flap,
    ];
    for criterion in criteria {
        for shape in [Shape::Uniform, Shape::Paper, Shape::Global] {
            for head_grouping in [HeadGrouping::KvGroups, HeadGrouping::QueryHeads] {
                for shrink in [Shrink::Live, Shrink::Never] {
                    let protection = match shape {
                        Shape::Uniform => Protection::ByShape,
                        Shape::Paper | Shape::Global => Protection::Layers(vec![0, 3]),
                    };
                    let pruning = Pruning {
                        criterion,
                        shape,
                        head_grouping,
                        shrink,
                        protection,
                        serve_tp: vec![2, 4],
                        channel_multiple: 64,
                        ..Pruning::default()
                    };
                    let recipe = Recipe { pruning: Some(pruning), max_grad_norm: None, ..Recipe::default() };
                    assert_eq!(recipe_message::checked(Some(recipe_message::to_pb(&recipe)), ""), Ok(recipe));
                }
            }
        }
    }
}

#[test]
fn every_pair_of_number_formats_survives_the_round_trip() {
    for compute in [Compute::F32, Compute::F64, Compute::Bf16] {
        for storage in [Storage::F32, Storage::F64, Storage::Bf16, Storage::Int8, Storage::Nf4] {
            let pruning = Some(Pruning::published());
            let recipe = Recipe { precision: Precision { compute, storage }, pruning, ..Recipe::default() };
            let checked = recipe_message::checked(Some(recipe_message::to_pb(&recipe)), "");
            if recipe.violations().is_empty() {
                assert_eq!(checked, Ok(recipe));
            } else {
                assert_eq!(
                    fields(&checked.unwrap_err().violations),
                    ["precision.storage"],
                    "{compute:?} {storage:?}"
                );
            }
        }
    }
}

#[test]
fn choices_of_schedule_and_loss_survive_the_round_trip() {
    for recovery in [Recovery::Continue, Recovery::Hold, Recovery::Restart] {
        for shape in [RampShape::Cubic, RampShape::OneShot] {
            for distillation in [None, Some(Distillation { weight: 0.25, top_k: 7 })] {
                let ramp = Ramp { shape, ..Ramp::default() };
                let recipe = Recipe {
                    learning_rate: LearningRate { recovery, ..LearningRate::default() },
                    pruning: Some(Pruning { ramp, ..Pruning::default() }),
                    distillation,
                    ..Recipe::default()
                };
                assert_eq!(recipe_message::checked(Some(recipe_message::to_pb(&recipe)), ""), Ok(recipe));
            }
        }
    }
    let fitted = |target| Compensation::LeastSquares(LeastSquares { windows: 7, damping: 0.25, target });
    for compensation in
        [Compensation::None, fitted(CompensationTarget::Layer), fitted(CompensationTarget::Stream)]
    {
        let pruning = Pruning { compensation, ..Pruning::default() };
        let recipe = Recipe { pruning: Some(pruning), ..Recipe::default() };
        assert_eq!(recipe_message::checked(Some(recipe_message::to_pb(&recipe)), ""), Ok(recipe));
    }
    let message = pb::Recipe { distillation: Some(pb::Distillation::default()), ..Default::default() };
    let recipe = recipe_message::checked(Some(message), "").unwrap();
    assert_eq!(recipe.distillation, Some(Distillation::default()));
}

#[test]
fn what_is_returned_for_a_spec_says_every_default() {
    let spec = run::checked(Some(smallest_spec())).unwrap();
    let message = run::to_pb(&spec);
    assert_eq!(message.tp_degree, Some(1));
    let recipe = message.recipe.clone().unwrap();
    assert_eq!(recipe.steps, Some(200));
    assert_eq!(recipe.batch.unwrap().window_tokens, Some(256));
    assert_eq!(recipe.recompute, Some(pb::Recompute::None.into()));
    assert_eq!(recipe.precision.unwrap().compute, Some(pb::Compute::F32.into()));
    assert_eq!(run::checked(Some(message)).unwrap(), spec);
}

#[test]
fn an_unknown_or_unspecified_enum_is_refused_by_its_path() {
    for number in [0, 99, -1] {
        let message = pb::RunSpec {
            recipe: Some(pb::Recipe {
                pruning: Some(pb::Pruning {
                    shape: Some(number),
                    criterion: Some(number),
                    head_grouping: Some(number),
                    shrink: Some(number),
                    compensation: Some(pb::pruning::Compensation::LeastSquares(pb::LeastSquares {
                        target: Some(number),
                        ..Default::default()
                    })),
                    ramp: Some(pb::Ramp { shape: Some(number), ..Default::default() }),
                    ..Default::default()
                }),
                learning_rate: Some(pb::LearningRate {
                    decay: Some(number),
                    recovery: Some(number),
                    ..Default::default()
                }),
                precision: Some(pb::Precision { compute: Some(number), storage: Some(number) }),
                recompute: Some(number),
                ..Default::default()
            }),
            evaluation: Some(pb::EvaluationSpec {
                sources: vec![source("/e")],
                mode: Some(number),
                ..Default::default()
            }),
            export: Some(pb::ExportSpec { path: "/out".into(), dtype: Some(number), max_shard_bytes: None }),
            ..smallest_spec()
        };
        let mut violations = run::checked(Some(message)).unwrap_err().violations;
        violations.sort_by(|one, other| one.field.cmp(&other.field));
        assert_eq!(
            fields(&violations),
            [
                "evaluation.mode",
                "export.dtype",
                "recipe.learning_rate.decay",
                "recipe.learning_rate.recovery",
                "recipe.precision.compute",
                "recipe.precision.storage",
                "recipe.pruning.criterion",
                "recipe.pruning.head_grouping",
                "recipe.pruning.least_squares.target",
                "recipe.pruning.ramp.shape",
                "recipe.pruning.shape",
                "recipe.pruning.shrink",
                "recipe.recompute",
            ]
        );
    }
}

#[test]
fn numbers_out_of_range_are_refused_all_at_once() {
    let message = pb::Recipe {
        steps: Some(u64::MAX),
        batch: Some(pb::Batch { window_tokens: Some(1), rows: Some(0), micro_batches: Some(u32::MAX) }),
        lora: Some(pb::Lora { rank: Some(0), alpha: Some(f64::NAN), dropout: Some(1.0) }),
        optimizer: Some(pb::Optimizer {
            kind: Some(pb::optimizer::Kind::Adamw(pb::AdamW { beta1: Some(1.5), ..Default::default() })),
        }),
        max_grad_norm: Some(-1.0),
        distillation: Some(pb::Distillation { weight: Some(1.5), top_k: Some(0) }),
        pruning: Some(pb::Pruning {
            budget: Some(pb::pruning::Budget::Sparsity(1.0)),
            channel_multiple: Some(0),
            ..Default::default()
        }),
        ..Default::default()
    };
    let invalid = recipe_message::checked(Some(message), "recipe").unwrap_err();
    for expected in [
        "recipe.steps",
        "recipe.batch.window_tokens",
        "recipe.batch.rows",
        "recipe.batch.micro_batches",
        "recipe.lora.rank",
        "recipe.lora.alpha",
        "recipe.lora.dropout",
        "recipe.optimizer.adamw.beta1",
        "recipe.max_grad_norm",
        "recipe.pruning.sparsity",
        "recipe.pruning.channel_multiple",
        "recipe.distillation.weight",
        "recipe.distillation.top_k",
    ] {
        assert_eq!(
            fields(&invalid.violations).iter().filter(|field| **field == expected).count(),
            1,
            "{expected}"
        );
    }
}

#[test]
fn a_spec_without_model_data_or_workers_is_refused() {
    let invalid = run::checked(None).unwrap_err();
    assert_eq!(fields(&invalid.violations), ["model", "training_data"]);
    let message = pb::RunSpec {
        tp_degree: Some(0),
        training_data: vec![
            source(""),
            source("a\0b"),
            pb::TextSource { path: "/a".into(), format: 42, field: String::new() },
        ],
        evaluation: Some(pb::EvaluationSpec {
            window_tokens: Some(1),
            more_window_tokens: vec![128, 0],
            ..Default::default()
        }),
        tasks: Some(pb::TaskSpec { pass_tokens: Some(0), ..Default::default() }),
        ..smallest_spec()
    };
    let invalid = run::checked(Some(message)).unwrap_err();
    assert_eq!(
        fields(&invalid.violations),
        [
            "training_data[0].path",
            "training_data[1].path",
            "training_data[2].format",
            "tp_degree",
            "evaluation.sources",
            "evaluation.window_tokens",
            "evaluation.more_window_tokens[1]",
            "tasks.files",
            "tasks.pass_tokens",
        ]
    );
}

#[test]
fn a_run_of_no_steps_needs_no_training_data() {
    let message = pb::RunSpec {
        training_data: Vec::new(),
        recipe: Some(pb::Recipe { steps: Some(0), ..Default::default() }),
        ..smallest_spec()
    };
    assert!(run::checked(Some(message)).is_ok());
}

fn dense() -> ModelSpec {
    ModelSpec {
        family: Family::Llama,
        hidden_size: 64,
        head_dim: 8,
        vocab_size: 100,
        max_position_embeddings: 64,
        rms_norm_eps: 1e-6,
        rope: Rope { theta: 10_000.0, scaling: RopeScaling::None },
        tie_word_embeddings: false,
        layers: vec![LayerSpec { query_head_count: 8, kv_head_count: 4, intermediate_size: 16 }; 2],
    }
}

#[test]
fn masks_survive_the_round_trip_and_lists_must_ascend() {
    let full = KeepMask::full(&dense());
    let message = mask::to_pb(&full);
    assert_eq!(mask::checked(Some(message.clone()), "keep_mask"), Ok(full));
    for (indices, refused) in [(vec![0, 0], true), (vec![1, 0], true), (vec![0, 5], false), (vec![], false)] {
        let mut message = message.clone();
        message.layers[1].channels = indices;
        assert_eq!(mask::checked(Some(message), "keep_mask").is_err(), refused);
    }
    let invalid = mask::checked(None, "keep_mask").unwrap_err();
    assert_eq!(fields(&invalid.violations), ["keep_mask.layers"]);
}

#[test]
fn a_mask_must_fit_its_model() {
    let full = KeepMask::full(&dense());
    assert!(mask::check_fits(&full, &dense(), "keep_mask").is_ok());
    type Change = fn(&mut KeepMask);
    let changes: [(Change, &str); 6] = [
        (|mask| mask.layers.truncate(1), "keep_mask.layers"),
        (|mask| mask.layers[0].channels = vec![16], "keep_mask.layers[0].channels"),
        (|mask| mask.layers[1].channels.clear(), "keep_mask.layers[1].channels"),
        (|mask| mask.layers[1].query_heads = vec![0, 1, 2], "keep_mask.layers[1].query_heads"),
        (|mask| mask.layers[1].kv_heads = vec![0, 1, 2], "keep_mask.layers[1].query_heads"),
        (|mask| mask.layers[0].query_heads = vec![99], "keep_mask.layers[0].query_heads"),
    ];
    for (change, field) in changes {
        let mut changed = full.clone();
        change(&mut changed);
        let invalid = mask::check_fits(&changed, &dense(), "keep_mask").unwrap_err();
        assert!(fields(&invalid.violations).contains(&field), "{field}: {invalid}");
    }
}

#[test]
fn projections_survive_the_round_trip_and_unknown_ones_are_nothing() {
    for projection in Projection::ALL {
        assert_eq!(mask::projection_from_pb(mask::projection_to_pb(projection).into()), Some(projection));
    }
    for number in [0, 8, -1] {
        assert_eq!(mask::projection_from_pb(number), None);
    }
}

proptest! {
    #[test]
    fn scores_come_back_from_their_chunks_in_place(count in 0_usize..200_000, wide: bool) {
        let values: Vec<f64> = (0..count).map(|unit| unit as f64 * 0.5).collect();
        let width = if wide { scores::ScoreWidth::F64 } else { scores::ScoreWidth::F32 };
        let place = scores::ScorePlace { step: 3, generation: 1, layer: 2, projection: Projection::Down };
        let mut back = Vec::new();
        for chunk in scores::chunks(place, &values, width) {
            prop_assert!(chunk.values_f32.len() * 4 + chunk.values_f64.len() * 8 <= limits::SCORE_CHUNK_BYTES);
            let slice = scores::from_pb(chunk).unwrap();
            prop_assert_eq!((slice.step, slice.generation, slice.layer, slice.projection), (3, 1, 2, Projection::Down));
            prop_assert_eq!(slice.first_unit, back.len());
            back.extend(slice.values);
        }
        prop_assert_eq!(back, values);
    }

    #[test]
    fn no_recipe_message_however_odd_panics(steps: Option<u64>, rows: Option<u32>, micro_batches: Option<u32>,
        warmup: Option<f64>, cooldown: Option<f64>, every: Option<u64>, shape: Option<i32>, warmup_steps: u64,
        ramp_shape in proptest::option::of(0..4), recovery in proptest::option::of(0..5)) {
        let message = pb::Recipe {
            steps,
            batch: Some(pb::Batch { window_tokens: rows, rows, micro_batches }),
            learning_rate: Some(pb::LearningRate { warmup_steps, recovery, ..Default::default() }),
            pruning: Some(pb::Pruning {
                ramp: Some(pb::Ramp { warmup, cooldown, every, shape: ramp_shape }),
                shape,
                ..Default::default()
            }),
            ..Default::default()
        };
        if let Ok(recipe) = recipe_message::checked(Some(message), "") {
            prop_assert!(recipe.batch.tokens_per_step() > 0);
            prop_assert!(recipe.steps <= limits::MAX_STEPS);
        }
    }
}

#[test]
fn durations_and_times_survive_the_round_trip() {
    let duration = std::time::Duration::from_micros(1_234_567);
    assert_eq!(time::duration_from_pb(Some(time::duration_to_pb(duration))), Some(duration));
    assert_eq!(time::duration_from_pb(Some(prost_types::Duration { seconds: -1, nanos: 0 })), None);
    assert_eq!(time::duration_from_pb(None), None);
    let now = std::time::SystemTime::now();
    assert_eq!(time::time_from_pb(Some(time::time_to_pb(now))), Some(now));
}
