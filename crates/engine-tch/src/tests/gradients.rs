//! Gradients of every LoRA factor through the whole model, and the score pass, against autograd and plain formulas.

use super::group::{fixtures, set_factors, spec_of};
use crate::communicator::Alone;
use crate::dropout::Dropout;
use crate::factors::Factor;
use crate::importance::to_f64;
use crate::layer::Narrowing;
use crate::model::Adapters;
use crate::observed::Observed;
use crate::shard::Shard;
use engine::{ShardEngine, ShardSetup};
use model_spec::{ModelSpec, Projection};
use pruning::criterion::{self, AdaptedWeight, LoraGradients};
use recipe::{Batch, Compute, Criterion, LoraPruneForm, Precision, Pruning, Recipe, Storage};
use std::time::Duration;
use tch::{Device, Kind, Tensor};

const RANK: usize = 4;

fn recipe(criterion: Criterion) -> Recipe {
    let mut recipe = Recipe {
        steps: 10,
        batch: Batch { window_tokens: 9, rows: 2, micro_batches: 1 },
        max_grad_norm: None,
        precision: Precision { compute: Compute::F64, storage: Storage::F64 },
        pruning: Some(Pruning::published()),
        ..Recipe::default()
    };
    recipe.lora = recipe::Lora { rank: RANK, alpha: 6.0, dropout: 0.0 };
    recipe.learning_rate.peak = 0.0;
    recipe.pruning.as_mut().unwrap().criterion = criterion;
    recipe
}

fn initial(spec: &ModelSpec) -> Vec<(String, Vec<f64>)> {
    let mut all = Vec::new();
    for layer in 0..spec.layers.len() {
        for projection in Projection::ALL {
            let [rows, columns] = spec.projection_shape(layer, projection);
            for (factor, count) in [("lora_a", RANK * columns), ("lora_b", rows * RANK)] {
                let seed = (layer * 31 + projection.index() * 7 + count) as f64;
                let values =
                    (0..count).map(|i| ((i as f64 * 1.7 + seed).sin() * 997.0).fract() * 0.2).collect();
                all.push((format!("layers.{layer}.{projection}.{factor}"), values));
            }
        }
    }
    all
}

/// The block written out with autograd: no fused product, no hand-written backward.
struct Plain {
    spec: ModelSpec,
    source: crate::source::Source,
    factors: Vec<(String, Tensor)>,
    scaling: f64,
}

impl Plain {
    fn weight(&self, name: &str) -> Tensor {
        self.source.tensor(name).unwrap().to_kind(Kind::Double)
    }

    fn linear(&self, layer: usize, projection: Projection, x: &Tensor) -> Tensor {
        let find = |factor: &str| {
            let name = format!("layers.{layer}.{projection}.{factor}");
            &self.factors.iter().find(|(known, _)| *known == name).unwrap().1
        };
        let w = self.weight(&checkpoint::projection_weight(layer, projection));
        x.matmul(&w.tr()) + x.matmul(&find("lora_a").tr()).matmul(&find("lora_b").tr()) * self.scaling
    }

    fn norm(&self, name: &str, x: &Tensor) -> Tensor {
        let mean = x.square().mean_dim(&[-1i64][..], true, None);
        x * (mean + self.spec.rms_norm_eps).rsqrt() * self.weight(name)
    }

    fn rotate(&self, x: &Tensor) -> Tensor {
        let (_, tokens, _, width) = x.size4().unwrap();
        let frequencies = Tensor::from_slice(&self.spec.rope.inverse_frequencies(width as usize));
        let angles =
            Tensor::arange(tokens, (Kind::Double, Device::Cpu)).unsqueeze(1) * frequencies.unsqueeze(0);
        let (cos, sin) = (angles.cos().unsqueeze(1), angles.sin().unsqueeze(1));
        let (left, right) = (x.narrow(3, 0, width / 2), x.narrow(3, width / 2, width / 2));
        Tensor::cat(&[&left * &cos - &right * &sin, &right * &cos + &left * &sin], 3)
    }

    fn loss(&self, rows: &[Vec<u32>]) -> Tensor {
        let (b, t, width) = (rows.len() as i64, rows[0].len() as i64, self.spec.head_dim as i64);
        let ids: Vec<i64> = rows.iter().flatten().map(|id| i64::from(*id)).collect();
        let ids = Tensor::from_slice(&ids).view([b, t]);
        let embedding = self.weight(checkpoint::EMBEDDING);
        let mut x = embedding.index_select(0, &ids.view(-1)).view([b, t, -1]);
        for (layer, widths) in self.spec.layers.iter().enumerate() {
            let h = self.norm(&checkpoint::input_norm(layer), &x);
            let heads = |projection, count: usize| {
                self.linear(layer, projection, &h).view([b, t, count as i64, width])
            };
            let shared = widths.query_heads_per_kv_head() as i64;
            let wide = |x: Tensor| x.repeat_interleave_self_int(shared, 2, None).transpose(1, 2);
            let q = self.rotate(&heads(Projection::Q, widths.query_head_count)).transpose(1, 2);
            let k = wide(self.rotate(&heads(Projection::K, widths.kv_head_count)));
            let v = wide(heads(Projection::V, widths.kv_head_count));
            let later = Tensor::ones([t, t], (Kind::Double, Device::Cpu)).triu(1).to_kind(Kind::Bool);
            let scores = q.matmul(&k.transpose(2, 3)) / (width as f64).sqrt();
            let probabilities = scores.masked_fill(&later, f64::NEG_INFINITY).softmax(-1, None);
            let attended = probabilities.matmul(&v).transpose(1, 2).reshape([b, t, -1]);
            x = &x + self.linear(layer, Projection::O, &attended);
            let h = self.norm(&checkpoint::post_attention_norm(layer), &x);
            let act =
                self.linear(layer, Projection::Gate, &h).silu() * self.linear(layer, Projection::Up, &h);
            x = &x + self.linear(layer, Projection::Down, &act);
        }
        let head = if self.spec.tie_word_embeddings { embedding } else { self.weight(checkpoint::LM_HEAD) };
        let logits = self.norm(checkpoint::FINAL_NORM, &x).matmul(&head.tr());
        let log_p = logits.narrow(1, 0, t - 1).log_softmax(-1, None);
        -log_p.gather(2, &ids.narrow(1, 1, t - 1).unsqueeze(2), false).mean(Kind::Double)
    }
}

fn rows(spec: &ModelSpec) -> Vec<Vec<u32>> {
    (0..2u32)
        .map(|row| (0..9u32).map(|token| (row * 37 + token * 13 + 5) % spec.vocab_size as u32).collect())
        .collect()
}

fn shard(model: &str, criterion: Criterion) -> Shard {
    let spec = spec_of(model);
    let setup = ShardSetup {
        model: fixtures().join("models").join(model),
        recipe: recipe(criterion),
        tp_rank: 0,
        tp_degree: 1,
        collective_timeout: Duration::from_secs(5),
        restore: None,
        progress: std::sync::Arc::default(),
    };
    let mut shard = Shard::load(setup, Device::Cpu).unwrap();
    set_factors(&mut shard, &spec, &initial(&spec));
    shard
}

#[test]
fn gradients_of_all_factors_are_those_of_autograd_and_of_central_differences() {
    for model in ["mha", "gqa", "tied", "llama3_rope", "mistral_headdim"] {
        let spec = spec_of(model);
        let rows = rows(&spec);
        let micro: Vec<&[u32]> = rows.iter().map(Vec::as_slice).collect();
        let mut ours = shard(model, Criterion::Magnitude);
        let loss = ours.train_step(0, &[micro]).unwrap().loss;
        let plain = tch::with_grad(|| {
            let factors = initial(&spec)
                .into_iter()
                .map(|(name, values)| {
                    let leaf =
                        Tensor::from_slice(&values).view(shape_of(&spec, &name)).set_requires_grad(true);
                    (name, leaf)
                })
                .collect();
            let source = crate::source::Source::open(&fixtures().join("models").join(model)).unwrap();
            Plain { spec: spec.clone(), source, factors, scaling: 6.0 / RANK as f64 }
        });
        let (expected_loss, gradients) = tch::with_grad(|| {
            let loss = plain.loss(&rows);
            let leaves: Vec<&Tensor> = plain.factors.iter().map(|(_, leaf)| leaf).collect();
            let gradients = Tensor::run_backward(&[&loss], &leaves, false, false);
            (loss.double_value(&[]), gradients)
        });
        assert!(
            (loss - expected_loss).abs() < 1e-12 * expected_loss,
            "{model}: loss {loss}, expected {expected_loss}"
        );
        for ((name, leaf), expected) in plain.factors.iter().zip(&gradients) {
            let actual = our_gradient(&ours, name);
            let scale = expected.abs().max().double_value(&[]);
            assert!(scale > 0.0, "{model} {name} has a gradient");
            let difference = (&actual - expected).abs().max().double_value(&[]) / scale;
            assert!(difference <= 1e-10, "{model} {name}: relative difference {difference:.2e}");
            let element = leaf.numel() as i64 / 3;
            let value = |step: f64| {
                let mut moved = leaf.view(-1).narrow(0, element, 1);
                let _ = moved.g_add_scalar_(step);
                let value = plain.loss(&rows).double_value(&[]);
                let _ = moved.g_add_scalar_(-step);
                value
            };
            let numeric = (value(1e-5) - value(-1e-5)) / 2e-5;
            let actual = actual.contiguous().view(-1).double_value(&[element]);
            assert!(
                (numeric - actual).abs() <= 1e-6 * scale,
                "{model} {name}: {actual}, differences give {numeric}"
            );
        }
    }
}

fn shape_of(spec: &ModelSpec, name: &str) -> [i64; 2] {
    let mut parts = name.split('.').skip(1);
    let layer = parts.next().unwrap().parse().unwrap();
    let module = parts.next().unwrap();
    let projection = *Projection::ALL.iter().find(|projection| projection.name() == module).unwrap();
    let [rows, columns] = spec.projection_shape(layer, projection);
    if name.ends_with("lora_a") { [RANK as i64, columns as i64] } else { [rows as i64, RANK as i64] }
}

fn our_gradient(shard: &Shard, name: &str) -> Tensor {
    let mut parts = name.split('.').skip(1);
    let layer = parts.next().unwrap().parse().unwrap();
    let module = parts.next().unwrap();
    let projection = *Projection::ALL.iter().find(|projection| projection.name() == module).unwrap();
    let factor = if name.ends_with("lora_a") { Factor::A } else { Factor::B };
    shard.layout.view(&shard.gradients, layer, projection, factor).unwrap()
}

#[test]
fn the_score_pass_is_the_plain_formula_for_every_criterion() {
    for criterion in [
        Criterion::LoraPrune { form: LoraPruneForm::Code },
        Criterion::LoraPrune { form: LoraPruneForm::Paper },
        Criterion::Magnitude,
        Criterion::Taylor,
        Criterion::Wanda,
    ] {
        let spec = spec_of("gqa");
        let rows = rows(&spec);
        let mut ours = shard("gqa", criterion);
        let outcome = ours.train_step(0, &[rows.iter().map(Vec::as_slice).collect()]).unwrap();
        assert_eq!(outcome.scores.len(), 7 * spec.layers.len());
        // Tiles of one row, and of a few rows with a shorter rest.
        for tile_elements in [1, 5 * 48] {
            let tiled = ours.scores(0, criterion, tile_elements).unwrap();
            for (tiled, whole) in tiled.iter().zip(&outcome.scores) {
                for (tiled, whole) in tiled.values.iter().zip(&whole.values) {
                    assert!((tiled - whole).abs() <= 1e-12 * whole.abs(), "{criterion:?} in tiles");
                }
            }
        }
        for scores in &outcome.scores {
            let (layer, projection) = (scores.layer, scores.projection);
            let [out, input] = spec.projection_shape(layer, projection);
            let weight = ours.source.tensor(&checkpoint::projection_weight(layer, projection)).unwrap();
            let weight = to_f64(&weight.to_kind(Kind::Double)).unwrap();
            let view = |flat: &Tensor, factor| {
                to_f64(&ours.layout.view(flat, layer, projection, factor).unwrap().contiguous().view(-1))
                    .unwrap()
            };
            let (a, b) = (view(&ours.factors, Factor::A), view(&ours.factors, Factor::B));
            let (da, db) = (view(&ours.gradients, Factor::A), view(&ours.gradients, Factor::B));
            let g = weight_gradient(&ours, layer, projection);
            let scaling = 6.0 / RANK as f64;
            let adapted = AdaptedWeight {
                rows: out,
                columns: input,
                lora_rank: RANK,
                scaling,
                weight: &weight,
                lora_a: &a,
                lora_b: &b,
            };
            let sums = match criterion {
                Criterion::LoraPrune { form } => {
                    criterion::lora_guided_sums(&adapted, &LoraGradients { grad_a: &da, grad_b: &db }, form)
                }
                Criterion::Taylor => criterion::taylor_sums(&adapted, g.as_ref().unwrap()),
                Criterion::Magnitude | Criterion::Random => criterion::magnitude_sums(&adapted),
                Criterion::Tangent | Criterion::Flap => panic!("they have tests of their own"),
                Criterion::Wanda => criterion::wanda_sums(
                    &adapted,
                    &input_squares(&mut ours, layer, projection, &rows, input),
                ),
            };
            let expected = criterion::unit_sums(&sums.unwrap(), projection, spec.head_dim);
            assert_eq!(expected.len(), scores.values.len());
            for (actual, expected) in scores.values.iter().zip(&expected) {
                let close = (actual - expected).abs() <= 1e-11 * expected.abs().max(1e-9);
                assert!(close, "{criterion:?} layer {layer} {projection}: {actual}, expected {expected}");
            }
        }
    }
}

/// Variances by a slow form, standardised over whole layers; and what a removed input costs once its mean is put back.
#[test]
fn flap_scores_are_standardised_fluctuations() {
    let spec = spec_of("gqa");
    let rows = rows(&spec);
    let mut ours = shard("gqa", Criterion::Flap);
    let outcome = ours.train_step(0, &[rows.iter().map(Vec::as_slice).collect()]).unwrap();
    // The step has moved the factors: scores were of those before it.
    let mut before = shard("gqa", Criterion::Flap);
    for (layer, widths) in spec.layers.iter().enumerate() {
        for (which, projection) in [(Narrowing::O, Projection::O), (Narrowing::Down, Projection::Down)] {
            let inputs = inputs_of_layer(&mut before, layer, which, &rows);
            let weight = before.source.tensor(&checkpoint::projection_weight(layer, projection)).unwrap();
            let view = |factor| before.layout.view(&before.factors, layer, projection, factor).unwrap();
            let merged =
                weight.to_kind(Kind::Double) + view(Factor::B).mm(&view(Factor::A)) * (6.0 / RANK as f64);
            let variance = inputs.var_dim(&[0i64][..], false, false);
            let lengths = merged.square().sum_dim_intlist(&[0i64][..], false, Kind::Double);
            let fluctuation = &variance * &lengths;
            if layer == 1 && projection == Projection::Down {
                let mean = inputs.mean_dim(&[0i64][..], false, Kind::Double);
                let lost =
                    (inputs.select(1, 5) - mean.get(5)).unsqueeze(1).mm(&merged.select(1, 5).unsqueeze(0));
                let error =
                    lost.square().sum_dim_intlist(&[1i64][..], false, Kind::Double).mean(Kind::Double);
                let expected = fluctuation.double_value(&[5]);
                assert!(
                    (error.double_value(&[]) - expected).abs() < 1e-12 * expected,
                    "what is lost is WIFV"
                );
                let shift = lost.mean_dim(&[0i64][..], false, Kind::Double).abs().max().double_value(&[]);
                assert!(shift < 1e-12, "and nothing of the mean");
            }
            let metric = if projection == Projection::O { fluctuation.square() } else { fluctuation };
            let standardised = (&metric - metric.mean(Kind::Double)) / metric.std(true);
            let expected = match projection {
                Projection::O => standardised.view([widths.query_head_count as i64, -1]).mean_dim(
                    &[1i64][..],
                    false,
                    Kind::Double,
                ),
                Projection::Q
                | Projection::K
                | Projection::V
                | Projection::Gate
                | Projection::Up
                | Projection::Down => standardised,
            };
            let expected = to_f64(&expected).unwrap();
            let found = outcome.scores.iter().find(|one| one.layer == layer && one.projection == projection);
            for (found, expected) in found.unwrap().values.iter().zip(&expected) {
                assert!(
                    (found - expected).abs() < 1e-9,
                    "layer {layer} {projection}: {found}, expected {expected}"
                );
            }
        }
    }
}

/// `G P_A + P_B G - P_B G P_A` times `s`, which the gradients of the factors carry, of the true gradient `G`.
#[test]
fn the_tangent_form_reads_the_true_gradients_part_in_the_tangent_space() {
    let spec = spec_of("gqa");
    let rows = rows(&spec);
    let windows: Vec<&[u32]> = rows.iter().map(Vec::as_slice).collect();
    let mut with_gradients = shard("gqa", Criterion::Taylor);
    with_gradients.train_step(0, std::slice::from_ref(&windows)).unwrap();
    let mut ours = shard("gqa", Criterion::Tangent);
    let factors = ours.factors.copy();
    let outcome = ours.train_step(0, std::slice::from_ref(&windows)).unwrap();
    let onto = |columns: &Tensor| {
        let (basis, _) = Tensor::linalg_qr(columns, "reduced");
        basis.mm(&basis.tr())
    };
    for scores in &outcome.scores {
        let (layer, projection) = (scores.layer, scores.projection);
        let shape = spec.projection_shape(layer, projection).map(|size| size as i64);
        let weight = ours.source.tensor(&checkpoint::projection_weight(layer, projection)).unwrap();
        let view = |factor| ours.layout.view(&factors, layer, projection, factor).unwrap();
        let (a, b) = (view(Factor::A), view(Factor::B));
        let gradient = weight_gradient(&with_gradients, layer, projection).unwrap();
        let gradient = Tensor::from_slice(&gradient).view(shape);
        let (on_a, on_b) = (onto(&a.tr()), onto(&b));
        let tangent = gradient.mm(&on_a) + on_b.mm(&gradient) - on_b.mm(&gradient).mm(&on_a);
        let scaling = 6.0 / RANK as f64;
        let merged = weight.to_kind(Kind::Double) + b.mm(&a) * scaling;
        let score = (tangent * merged * scaling).abs();
        let sums = |dim: i64| to_f64(&score.sum_dim_intlist(&[dim][..], false, Kind::Double)).unwrap();
        let sums = criterion::WeightSums { rows: sums(1), columns: sums(0) };
        let expected = criterion::unit_sums(&sums, projection, spec.head_dim);
        for (actual, expected) in scores.values.iter().zip(&expected) {
            let close = (actual - expected).abs() <= 1e-11 * expected.abs().max(1e-9);
            assert!(close, "layer {layer} {projection}: {actual}, expected {expected}");
        }
    }
}

/// Sums of the squares of a projection's inputs over all tokens, from a forward pass of their own; zeros for the projections
/// whose inputs no decision removes.
fn input_squares(
    shard: &mut Shard,
    layer: usize,
    projection: Projection,
    rows: &[Vec<u32>],
    inputs: usize,
) -> Vec<f64> {
    let which = match projection {
        Projection::O => Narrowing::O,
        Projection::Down => Narrowing::Down,
        Projection::Q | Projection::K | Projection::V | Projection::Gate | Projection::Up => {
            return vec![0.0; inputs];
        }
    };
    let inputs = inputs_of_layer(shard, layer, which, rows);
    to_f64(&(&inputs * &inputs).sum_dim_intlist(&[0i64][..], false, Kind::Double)).unwrap()
}

fn inputs_of_layer(shard: &mut Shard, layer: usize, which: Narrowing, rows: &[Vec<u32>]) -> Tensor {
    let windows: Vec<&[u32]> = rows.iter().map(Vec::as_slice).collect();
    let (rows, mut x) = shard.model.embed(&windows, &mut Alone).unwrap();
    let adapters = Adapters {
        layout: &shard.layout,
        factors: &shard.factors,
        ledger: &[],
        lora_rank: RANK,
        scaling: 6.0 / RANK as f64,
        dropout: Dropout::off(),
    };
    let pass = shard.model.pass(&rows, &adapters, 0).unwrap();
    for (index, held) in shard.model.layers.iter().enumerate() {
        for each in Narrowing::BOTH {
            let inputs = held.inputs_of(index, each, &x, &pass).unwrap();
            if (index, each) == (layer, which) {
                return inputs;
            }
            x += held.output_of(index, each, &inputs, &pass, &mut Alone).unwrap();
        }
    }
    panic!("the model has no layer {layer}")
}

fn weight_gradient(shard: &Shard, layer: usize, projection: Projection) -> Option<Vec<f64>> {
    let Observed::WeightGradients(gradients) = &shard.observed.as_ref()?[layer] else { return None };
    let held = &shard.model.layers[layer];
    let k = shard.source.spec().head_dim as i64;
    let (query, key) = (held.query_heads * k, held.kv_heads * k);
    let part = match projection {
        Projection::Q => gradients.qkv.narrow(0, 0, query),
        Projection::K => gradients.qkv.narrow(0, query, key),
        Projection::V => gradients.qkv.narrow(0, query + key, key),
        Projection::O => gradients.o.shallow_clone(),
        Projection::Gate => gradients.gate_up.narrow(0, 0, held.channels),
        Projection::Up => gradients.gate_up.narrow(0, held.channels, held.channels),
        Projection::Down => gradients.down.shallow_clone(),
    };
    Some(to_f64(&part.contiguous().view(-1)).unwrap())
}
