//! A whole run on any number of ranks, each a thread with its own shard, over real Gloo; decisions as the coordinator
//! makes them.

use crate::shard::Shard;
use crate::state_file::factor_name;
use engine::{ProjectionScores, Rendezvous, ShardEngine, ShardSetup};
use model_spec::{ModelSpec, Projection};
use pruning::{KeepMask, MovingAverage, ScoreAssembly, StepScores, Target, combine, decide};
use recipe::{Recipe, Shrink};
use sharding::{Placement, RankLayer};
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::Duration;
use tch::{Device, Kind, Tensor};

pub(crate) fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures")
}

pub(crate) fn spec_of(model: &str) -> ModelSpec {
    checkpoint::ModelFolder::open(&fixtures().join("models").join(model)).unwrap().spec().clone()
}

/// What a run left behind.
pub(crate) struct RunRecord {
    pub(crate) losses: Vec<f64>,
    pub(crate) grad_norms: Vec<f64>,
    pub(crate) learning_rates: Vec<f64>,
    pub(crate) scores: Vec<StepScores>,
    pub(crate) averages: Vec<MovingAverage>,
    pub(crate) decisions: Vec<(u64, KeepMask)>,
    /// What the first decision was calibrated on.
    pub(crate) calibration: engine::Calibration,
    /// Full-vocabulary logits of the final model on a fixed prompt.
    pub(crate) logits: Tensor,
    pub(crate) received_groups: u64,
    /// Final `lora_a`, `lora_b` in the unpruned model's layout, zero where nothing is held.
    pub(crate) factors: Vec<(String, Tensor)>,
}

/// A factor's first values by its golden name.
pub(crate) type Initial<'a> = &'a dyn Fn(&str) -> Vec<f64>;

pub(crate) struct RunInputs<'a> {
    pub(crate) model: &'a str,
    pub(crate) recipe: Recipe,
    pub(crate) tp_degree: usize,
    /// Initial factors by golden name (`layers.0.q_proj.lora_a`); absent means fresh ones.
    pub(crate) initial: Option<Initial<'a>>,
    /// `[step][micro][row][token]`
    pub(crate) batches: &'a [Vec<Vec<Vec<u32>>>],
}

enum Order {
    Step(u64),
    Calibrate,
    Apply(u64, KeepMask),
    Finish,
}

/// Layer, projection, `lora_a` or `lora_b`, shape, values.
type FactorValues = (usize, Projection, &'static str, Vec<i64>, Vec<f64>);

enum Answer {
    Step(engine::StepOutcome),
    Calibrated(engine::Calibration),
    Applied(u64),
    Finished { logits: Vec<f64>, positions: i64, factors: Vec<FactorValues> },
}

const PROMPT: [u32; 12] = [5, 40, 41, 9, 77, 12, 60, 3, 33, 21, 90, 8];

pub(crate) fn run(inputs: &RunInputs) -> RunRecord {
    let spec = spec_of(inputs.model);
    let degree = inputs.tp_degree;
    let (meet, meeting) = mpsc::channel::<Rendezvous>();
    let mut orders = Vec::new();
    let mut answers = Vec::new();
    let initial: Option<Vec<(String, Vec<f64>)>> = inputs.initial.map(|read| {
        (0..spec.layers.len())
            .flat_map(|layer| Projection::ALL.map(|projection| (layer, projection)))
            .flat_map(|(layer, projection)| {
                ["lora_a", "lora_b"].map(|f| format!("layers.{layer}.{projection}.{f}"))
            })
            .map(|name| (name.clone(), read(&name)))
            .collect()
    });
    std::thread::scope(|scope| {
        let mut joins = Vec::new();
        for tp_rank in 0..degree {
            let (order, rank_orders) = mpsc::channel::<Order>();
            let (rank_answers, answer) = mpsc::channel::<Answer>();
            let (join, rank_join) = mpsc::channel::<Rendezvous>();
            orders.push(order);
            answers.push(answer);
            joins.push(join);
            let (meet, spec, initial) = (meet.clone(), spec.clone(), initial.clone());
            let (model, recipe, batches) = (inputs.model, inputs.recipe.clone(), inputs.batches);
            let calibration = batches[0].concat();
            scope.spawn(move || {
                let setup = ShardSetup {
                    model: fixtures().join("models").join(model),
                    recipe,
                    tp_rank,
                    tp_degree: degree,
                    collective_timeout: Duration::from_secs(60),
                    restore: None,
                    progress: std::sync::Arc::default(),
                };
                tch::set_num_threads(1);
                let mut shard = Shard::load(setup, Device::Cpu).unwrap();
                if let Some(initial) = initial {
                    set_factors(&mut shard, &spec, &initial);
                }
                if degree > 1 {
                    if tp_rank == 0 {
                        meet.send(shard.open_rendezvous("127.0.0.1").unwrap()).unwrap();
                    }
                    let rendezvous = rank_join.recv().unwrap();
                    shard.join_group(&rendezvous, "127.0.0.1").unwrap();
                }
                if shard.setup.recipe.distillation.is_some() {
                    for rows in batches.iter().flatten() {
                        shard.teach(&rows_of(rows)).unwrap();
                    }
                }
                for order in rank_orders {
                    let answer = match order {
                        Order::Step(step) => {
                            let micro: Vec<Vec<&[u32]>> = batches[step as usize]
                                .iter()
                                .map(|rows| rows.iter().map(Vec::as_slice).collect())
                                .collect();
                            Answer::Step(shard.train_step(step, &micro).unwrap())
                        }
                        Order::Calibrate => {
                            let (mut last, rows) = (None, rows_of(&calibration));
                            let found = shard.calibrate(&rows, &mut |progress| {
                                last = Some(progress);
                                Ok(())
                            });
                            let ended = last.is_none_or(|last| last.passes == last.total_passes);
                            assert!(ended, "it says how far it is: {last:?}");
                            Answer::Calibrated(found.unwrap())
                        }
                        Order::Apply(generation, mask) => Answer::Applied(
                            shard
                                .apply_mask(generation, &mask, &rows_of(&calibration))
                                .unwrap()
                                .received_groups,
                        ),
                        Order::Finish => finish(&mut shard),
                    };
                    rank_answers.send(answer).unwrap();
                }
            });
        }
        if degree > 1 {
            let rendezvous = meeting.recv().unwrap();
            for join in &joins {
                join.send(rendezvous.clone()).unwrap();
            }
        }
        let record = drive(inputs, &spec, &orders, &answers);
        orders.clear();
        record
    })
}

fn rows_of(rows: &[Vec<u32>]) -> Vec<&[u32]> {
    rows.iter().map(Vec::as_slice).collect()
}

fn drive(
    inputs: &RunInputs,
    spec: &ModelSpec,
    orders: &[mpsc::Sender<Order>],
    answers: &[mpsc::Receiver<Answer>],
) -> RunRecord {
    let recipe = &inputs.recipe;
    let pruning = recipe.pruning.as_ref().unwrap();
    let target = Target::resolve(spec, pruning).unwrap();
    let mut keep = KeepMask::full(spec);
    let mut placement = Placement::dense(spec, inputs.tp_degree).unwrap();
    let mut average = MovingAverage::new(spec, pruning.head_grouping, pruning.moving_average_decay);
    let mut record = RunRecord {
        losses: Vec::new(),
        grad_norms: Vec::new(),
        learning_rates: Vec::new(),
        scores: Vec::new(),
        averages: Vec::new(),
        decisions: Vec::new(),
        calibration: engine::Calibration::default(),
        logits: Tensor::new(),
        received_groups: 0,
        factors: Vec::new(),
    };
    let everyone = |order: &dyn Fn() -> Order| -> Vec<Answer> {
        orders.iter().for_each(|rank| rank.send(order()).unwrap());
        answers.iter().map(|rank| rank.recv_timeout(Duration::from_secs(120)).unwrap()).collect()
    };
    for step in 0..recipe.steps {
        let mut assembly = ScoreAssembly::new(spec, &keep);
        let mut outcomes = Vec::new();
        for (rank, answer) in everyone(&|| Order::Step(step)).into_iter().enumerate() {
            let Answer::Step(outcome) = answer else { panic!("rank {rank} answered something else") };
            for ProjectionScores { layer, projection, values } in &outcome.scores {
                let held = &placement.ranks[rank][*layer];
                assembly.add(*layer, *projection, units(held, *projection), values).unwrap();
            }
            outcomes.push(outcome);
        }
        assert!(outcomes.iter().all(|other| other.loss == outcomes[0].loss), "ranks disagree on the loss");
        record.losses.push(outcomes[0].loss);
        record.grad_norms.push(outcomes[0].grad_norm);
        record.learning_rates.push(outcomes[0].learning_rate);
        let scores = assembly.finish().unwrap();
        average.update(&combine(spec, &scores, pruning.criterion, pruning.head_grouping).unwrap()).unwrap();
        record.scores.push(scores);
        if recipe.pruning_steps().contains(&step) {
            let share = pruning.ramp.share_at(step, recipe.steps);
            if record.decisions.is_empty() && pruning.calibrates() {
                let found: Vec<engine::Calibration> = everyone(&|| Order::Calibrate)
                    .into_iter()
                    .map(|answer| match answer {
                        Answer::Calibrated(found) => found,
                        Answer::Step(_) | Answer::Applied(_) | Answer::Finished { .. } => {
                            panic!("expected a calibration")
                        }
                    })
                    .collect();
                assert!(found.iter().all(|other| *other == found[0]), "ranks disagree on the calibration");
                if let Some(goal) = target.depth() {
                    let removed = match found[0].block_order.is_empty() {
                        true => goal.select(&found[0].blocks).unwrap(),
                        false => found[0].block_order.clone(),
                    };
                    keep = goal.without(&keep, &removed).unwrap();
                }
                record.calibration = found[0].clone();
            }
            keep = decide(spec, &keep, &average, &target, share).unwrap();
            average.forget_removed(&keep, pruning.head_grouping);
            record.decisions.push((step, keep.clone()));
            let generation = record.decisions.len() as u64;
            for answer in everyone(&|| Order::Apply(generation, keep.clone())) {
                let Answer::Applied(received) = answer else { panic!("expected an acknowledgement") };
                record.received_groups += received;
            }
            placement = placement.restricted_to(&keep);
            if pruning.shrink == Shrink::Live {
                placement = placement.rebalanced(spec);
            }
        }
        record.averages.push(average.clone());
    }
    let mut parts = Vec::new();
    let mut factors: Vec<(String, Tensor)> = Vec::new();
    for answer in everyone(&|| Order::Finish) {
        let Answer::Finished { logits, positions, factors: held } = answer else {
            panic!("expected the end")
        };
        parts.push(Tensor::from_slice(&logits).view([positions, -1]));
        for (layer, projection, factor, features, values) in held {
            let name = format!("layers.{layer}.{projection}.{factor}");
            let [rows, columns] = spec.projection_shape(layer, projection);
            let rank = recipe.lora.rank as i64;
            let (shape, dim) =
                if factor == "lora_a" { ([rank, columns as i64], 1) } else { ([rows as i64, rank], 0) };
            let mut part_shape = shape;
            part_shape[dim as usize] = features.len() as i64;
            let part = Tensor::from_slice(&values).view(part_shape);
            let place = match factors.iter().position(|(known, _)| *known == name) {
                Some(place) => place,
                None => {
                    factors.push((name, Tensor::zeros(shape, (Kind::Double, Device::Cpu))));
                    factors.len() - 1
                }
            };
            let _ = factors[place].1.index_copy_(dim, &Tensor::from_slice(&features), &part);
        }
    }
    record.logits = Tensor::cat(&parts, 1);
    record.factors = factors;
    record
}

fn units(held: &RankLayer, projection: Projection) -> &[usize] {
    match projection {
        Projection::Q | Projection::O => &held.query_heads,
        Projection::K | Projection::V => &held.kv_heads,
        Projection::Gate | Projection::Up | Projection::Down => &held.channels,
    }
}

fn finish(shard: &mut Shard) -> Answer {
    let logits = shard.prompt_logits(&[PROMPT.to_vec()]).unwrap();
    let positions = logits.size()[0];
    let mut factors = Vec::new();
    let head_dim = shard.source.spec().head_dim;
    let hidden = shard.source.spec().hidden_size as i64;
    for layer in 0..shard.layout.layer_count() {
        for projection in Projection::ALL {
            for factor in crate::factors::Factor::BOTH {
                let view = shard.layout.view(&shard.factors, layer, projection, factor).unwrap();
                let features = if crate::factors::is_replicated(projection, factor) {
                    (0..hidden).collect()
                } else {
                    crate::factors::split_features(&shard.held()[layer], projection, head_dim)
                };
                let values = crate::importance::to_f64(&view.contiguous().view(-1)).unwrap();
                factors.push((layer, projection, factor.name(), features, values));
            }
        }
    }
    Answer::Finished { logits: crate::importance::to_f64(&logits.view(-1)).unwrap(), positions, factors }
}

/// Gives a shard its part of factors in the unpruned model's layout.
pub(crate) fn set_factors(shard: &mut Shard, spec: &ModelSpec, initial: &[(String, Vec<f64>)]) {
    for layer in 0..spec.layers.len() {
        for projection in Projection::ALL {
            for factor in crate::factors::Factor::BOTH {
                let name = factor_name("", layer, projection, factor);
                let name = name.trim_start_matches('.');
                let (_, values) = initial.iter().find(|(known, _)| known == name).unwrap();
                let [rows, columns] = spec.projection_shape(layer, projection);
                let rank = shard.setup.recipe.lora.rank as i64;
                let (shape, dim) = match factor {
                    crate::factors::Factor::A => ([rank, columns as i64], 1),
                    crate::factors::Factor::B => ([rows as i64, rank], 0),
                };
                let whole = Tensor::from_slice(values).view(shape);
                let part = if crate::factors::is_replicated(projection, factor) {
                    whole
                } else {
                    let held = &shard.placement.ranks[shard.setup.tp_rank][layer];
                    let features = crate::factors::split_features(held, projection, spec.head_dim);
                    whole.index_select(dim, &Tensor::from_slice(&features))
                };
                shard.layout.view(&shard.factors, layer, projection, factor).unwrap().copy_(&part);
            }
        }
    }
}
