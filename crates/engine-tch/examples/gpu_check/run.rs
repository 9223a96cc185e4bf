//! A pruning run of a few steps on ranks that are threads of this process and share one device.

use super::{Formats, TIMEOUT};
use engine::{CollectiveBackend, Engine, Rendezvous, ShardEngine, ShardSetup, StepOutcome};
use engine_tch::{Device, TchEngine};
use model_spec::{ModelSpec, Projection};
use pruning::{KeepMask, MovingAverage, ScoreAssembly, Target, combine, decide};
use recipe::{Batch, Budget, Pruning, Ramp, Recipe};
use serde_json::{Value, json};
use sharding::{Placement, RankLayer};
use std::error::Error;
use std::path::PathBuf;
use std::sync::mpsc::{self, Receiver, Sender};

type Failure = Box<dyn Error>;

#[derive(clap::Args)]
pub(super) struct RunOptions {
    /// Model folder
    #[arg(long)]
    model: PathBuf,
    #[arg(long, default_value_t = 1)]
    ranks: usize,
    #[arg(long, default_value_t = 12)]
    steps: u64,
    #[command(flatten)]
    formats: Formats,
}

enum Order {
    Meet,
    Join(Rendezvous),
    Step(u64),
    Apply(u64, KeepMask),
}

enum Answer {
    Done,
    Met(Rendezvous),
    Stepped(StepOutcome),
}

pub(super) fn answer(options: &RunOptions) -> Result<Value, Failure> {
    let device = options.formats.open()?;
    let spec = checkpoint::ModelFolder::open(&options.model)?.spec().clone();
    let recipe = recipe(options)?;
    let ranks: Vec<Rank> =
        (0..options.ranks).map(|rank| Rank::start(options, &recipe, &spec, rank, device)).collect();
    let record = drive(&recipe, &spec, &ranks)?;
    let memory = engine_tch::device_memory(device)?;
    let kept: Vec<Value> = record
        .masks
        .iter()
        .map(|mask| {
            json!(
                mask.layers
                    .iter()
                    .map(|layer| json!({"query_heads": layer.query_heads, "channels": layer.channels}))
                    .collect::<Vec<_>>()
            )
        })
        .collect();
    Ok(json!({
        "device": options.formats.device,
        "compute": options.formats.compute,
        "storage": options.formats.storage,
        "ranks": options.ranks,
        "losses": record.losses,
        "grad_norms": record.grad_norms,
        "masks": kept,
        "reserved_bytes": memory.reserved,
    }))
}

fn recipe(options: &RunOptions) -> Result<Recipe, Failure> {
    let ramp = Ramp { every: 4, ..Ramp::published() };
    let mut recipe = Recipe {
        steps: options.steps,
        batch: Batch { window_tokens: 32, rows: 2, micro_batches: 2 },
        pruning: Some(Pruning { ramp, budget: Budget::Sparsity(0.3), ..Pruning::published() }),
        ..Recipe::default()
    };
    options.formats.set(&mut recipe)?;
    Ok(recipe)
}

/// A thread with a shard, and the channels to it.
struct Rank {
    orders: Sender<Order>,
    answers: Receiver<Result<Answer, String>>,
}

impl Rank {
    fn start(
        options: &RunOptions,
        recipe: &Recipe,
        spec: &ModelSpec,
        tp_rank: usize,
        device: Device,
    ) -> Self {
        let setup = ShardSetup {
            model: options.model.clone(),
            recipe: recipe.clone(),
            tp_rank,
            tp_degree: options.ranks,
            collective_timeout: TIMEOUT,
            restore: None,
            progress: std::sync::Arc::default(),
        };
        let engine = TchEngine::new(device, options.formats.threads, "worker".into())
            .with_backend(CollectiveBackend::Gloo);
        let vocabulary = spec.vocab_size as u32;
        let (orders, to_do) = mpsc::channel();
        let (done, answers) = mpsc::channel();
        std::thread::spawn(move || {
            let mut shard = match engine.load(setup) {
                Ok(shard) => shard,
                Err(error) => {
                    let _ = done.send(Err(error.to_string()));
                    return;
                }
            };
            for order in to_do {
                if done
                    .send(obey(shard.as_mut(), order, vocabulary).map_err(|error| error.to_string()))
                    .is_err()
                {
                    return;
                }
            }
        });
        Self { orders, answers }
    }
}

fn obey(shard: &mut dyn ShardEngine, order: Order, vocabulary: u32) -> Result<Answer, engine::EngineError> {
    match order {
        Order::Meet => shard.open_rendezvous("127.0.0.1").map(Answer::Met),
        Order::Join(rendezvous) => shard.join_group(&rendezvous, "127.0.0.1").map(|()| Answer::Done),
        Order::Step(step) => {
            let windows: Vec<Vec<Vec<u32>>> = (0..2)
                .map(|micro| {
                    let row = |row: u32| {
                        (0..32).map(|token| word(step as u32, micro, row, token) % vocabulary).collect()
                    };
                    (0..2).map(row).collect()
                })
                .collect();
            let micro: Vec<Vec<&[u32]>> =
                windows.iter().map(|rows| rows.iter().map(Vec::as_slice).collect()).collect();
            shard.train_step(step, &micro).map(Answer::Stepped)
        }
        Order::Apply(generation, mask) => shard.apply_mask(generation, &mask, &[]).map(|_| Answer::Done),
    }
}

/// A text that has something to learn: each window counts up by a step of its own.
fn word(step: u32, micro: u32, row: u32, token: u32) -> u32 {
    step * 31 + micro * 17 + row * 7 + token * (1 + row + 2 * micro)
}

struct Record {
    losses: Vec<f64>,
    grad_norms: Vec<f64>,
    masks: Vec<KeepMask>,
}

/// The coordinator's part, in few lines.
fn drive(recipe: &Recipe, spec: &ModelSpec, ranks: &[Rank]) -> Result<Record, Failure> {
    let Some(pruning) = &recipe.pruning else { return Err("the recipe does not prune".into()) };
    let everyone = |order: &dyn Fn() -> Order| -> Result<Vec<Answer>, Failure> {
        for rank in ranks {
            rank.orders.send(order())?;
        }
        ranks.iter().map(|rank| Ok(rank.answers.recv_timeout(TIMEOUT * 2)??)).collect()
    };
    if let [first, _, ..] = ranks {
        first.orders.send(Order::Meet)?;
        let Answer::Met(rendezvous) = first.answers.recv_timeout(TIMEOUT * 2)?? else {
            return Err("rank 0 opened no meeting".into());
        };
        everyone(&|| Order::Join(rendezvous.clone()))?;
    }
    let target = Target::resolve(spec, pruning)
        .map_err(|violations| violations.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))?;
    let mut keep = KeepMask::full(spec);
    let mut placement = Placement::dense(spec, ranks.len())?;
    let mut average = MovingAverage::new(spec, pruning.head_grouping, pruning.moving_average_decay);
    let mut record = Record { losses: Vec::new(), grad_norms: Vec::new(), masks: Vec::new() };
    for step in 0..recipe.steps {
        let mut assembly = ScoreAssembly::new(spec, &keep);
        for (rank, answer) in everyone(&|| Order::Step(step))?.into_iter().enumerate() {
            let Answer::Stepped(outcome) = answer else { return Err("a rank did not step".into()) };
            for scores in &outcome.scores {
                let units = units(&placement.ranks[rank][scores.layer], scores.projection);
                assembly.add(scores.layer, scores.projection, units, &scores.values)?;
            }
            if rank == 0 {
                record.losses.push(outcome.loss);
                record.grad_norms.push(outcome.grad_norm);
            }
        }
        average.update(&combine(spec, &assembly.finish()?, pruning.criterion, pruning.head_grouping)?)?;
        if pruning.ramp.decides_at(step, recipe.steps) {
            keep = decide(spec, &keep, &average, &target, pruning.ramp.share_at(step, recipe.steps))?;
            average.forget_removed(&keep, pruning.head_grouping);
            record.masks.push(keep.clone());
            let generation = record.masks.len() as u64;
            everyone(&|| Order::Apply(generation, keep.clone()))?;
            placement = placement.restricted_to(&keep).rebalanced(spec);
        }
    }
    Ok(record)
}

fn units(held: &RankLayer, projection: Projection) -> &[usize] {
    match projection {
        Projection::Q | Projection::O => &held.query_heads,
        Projection::K | Projection::V => &held.kv_heads,
        Projection::Gate | Projection::Up | Projection::Down => &held.channels,
    }
}
