//! Timed optimizer steps on random weights that are made on the device, dense and then over a short ramp of masks.

use super::{Formats, TIMEOUT};
use engine::{Engine, ShardEngine, ShardSetup, StepOutcome};
use engine_tch::{Device, TchEngine, device_memory, reset_peak, synchronize};
use model_spec::{Family, LayerSpec, ModelSpec, Rope, RopeScaling};
use pruning::{KeepMask, LayerKeep};
use recipe::{Batch, Pruning, Recipe};
use serde_json::{Value, json};
use std::error::Error;
use std::time::Instant;

type Failure = Box<dyn Error>;

#[derive(clap::Args)]
pub(super) struct StepOptions {
    /// hidden,layers,heads,kv_heads,ffn,vocabulary
    #[arg(long, value_name = "SHAPE")]
    random: String,
    /// Windows in a micro-batch
    #[arg(long, default_value_t = 1)]
    rows: usize,
    /// Tokens in a window
    #[arg(long, default_value_t = 2048)]
    window: usize,
    /// Micro-batches in a step
    #[arg(long, default_value_t = 1)]
    micro: usize,
    /// Steps timed, after one that is not
    #[arg(long, default_value_t = 3)]
    steps: u64,
    /// Decisions on the way to half of the groups; 0 for none
    #[arg(long, default_value_t = 0)]
    ramp: u64,
    #[arg(long, default_value_t = 0.0)]
    dropout: f64,
    #[arg(long, default_value_t = 8)]
    lora_rank: usize,
    /// The device's dense rate in bf16; an H200's is 989
    #[arg(long, default_value_t = 989.0)]
    peak_tflop_per_s: f64,
    #[command(flatten)]
    formats: Formats,
}

pub(super) fn answer(options: &StepOptions) -> Result<Value, Failure> {
    let device = options.formats.open()?;
    let spec = spec(options)?;
    let mut recipe = Recipe {
        batch: Batch { window_tokens: options.window, rows: options.rows, micro_batches: options.micro },
        pruning: Some(Pruning::published()),
        ..Recipe::default()
    };
    recipe.lora.rank = options.lora_rank;
    recipe.lora.dropout = options.dropout;
    options.formats.set(&mut recipe)?;
    let engine =
        TchEngine::new(device, options.formats.threads, "worker".into()).with_random_weights(spec.clone());
    let started = Instant::now();
    let setup = ShardSetup {
        model: "random".into(),
        recipe: recipe.clone(),
        tp_rank: 0,
        tp_degree: 1,
        collective_timeout: TIMEOUT,
        restore: None,
        progress: std::sync::Arc::default(),
    };
    let mut shard = engine.load(setup)?;
    synchronize(device)?;
    let load_s = started.elapsed().as_secs_f64();
    let loaded = device_memory(device)?;
    let mut bench = Bench { shard: shard.as_mut(), device, windows: windows(options, &spec), step: 0 };
    bench.timed(1)?;
    reset_peak(device)?;
    let dense = bench.timed(options.steps)?;
    let memory = device_memory(device)?;
    let mut ramp = Vec::new();
    for generation in 1..=options.ramp {
        let mask = kept(&spec, generation as f64 / options.ramp as f64 * 0.5);
        let started = Instant::now();
        bench.shard.apply_mask(generation, &mask, &[])?;
        synchronize(device)?;
        let apply_s = started.elapsed().as_secs_f64();
        bench.timed(1)?;
        let timed = bench.timed(options.steps)?;
        let memory = device_memory(device)?;
        ramp.push(json!({
            "kept_parameters": mask.pruned_spec(&spec).projection_weight_count() as f64
                / spec.projection_weight_count() as f64,
            "apply_s": apply_s,
            "step_s": timed.seconds,
            "allocated_bytes": memory.allocated,
            "reserved_bytes": memory.reserved,
        }));
    }
    let weights = spec.projection_weight_count() + (spec.vocab_size * spec.hidden_size) as u64;
    let tokens = recipe.batch.tokens_per_step() as f64;
    // Forward and the inputs' gradients: 4 FLOP for each weight and token. Recomputed layers are not counted.
    let flop_per_s = 4.0 * weights as f64 * tokens / dense.seconds;
    Ok(json!({
        "device": options.formats.device,
        "compute": options.formats.compute,
        "storage": options.formats.storage,
        "recompute": options.formats.recompute,
        "shape": options.random,
        "tokens_per_step": tokens,
        "load_s": load_s,
        "loss": dense.outcome.loss,
        "step_s": dense.seconds,
        "score_s": dense.outcome.score_time.as_secs_f64(),
        "score_share": dense.outcome.score_time.as_secs_f64() / dense.seconds,
        "tokens_per_s": tokens / dense.seconds,
        "tflop_per_s": flop_per_s / 1e12,
        "mfu": flop_per_s / 1e12 / options.peak_tflop_per_s,
        "loaded_bytes": loaded.allocated.max(loaded.reserved),
        "peak_bytes": memory.peak.max(if device.is_cuda() { 0 } else { memory.reserved }),
        "reserved_bytes": memory.reserved,
        "ramp": ramp,
    }))
}

struct Bench<'a> {
    shard: &'a mut dyn ShardEngine,
    device: Device,
    windows: Vec<Vec<Vec<u32>>>,
    step: u64,
}

struct Timed {
    /// Median.
    seconds: f64,
    outcome: StepOutcome,
}

impl Bench<'_> {
    fn timed(&mut self, steps: u64) -> Result<Timed, Failure> {
        let mut all = Vec::new();
        let mut last = None;
        for _ in 0..steps.max(1) {
            let micro: Vec<Vec<&[u32]>> =
                self.windows.iter().map(|rows| rows.iter().map(Vec::as_slice).collect()).collect();
            synchronize(self.device)?;
            let started = Instant::now();
            last = Some(self.shard.train_step(self.step, &micro)?);
            synchronize(self.device)?;
            all.push(started.elapsed().as_secs_f64());
            self.step += 1;
        }
        all.sort_by(f64::total_cmp);
        let outcome = last.ok_or("no step was taken")?;
        Ok(Timed { seconds: all[all.len() / 2], outcome })
    }
}

fn spec(options: &StepOptions) -> Result<ModelSpec, Failure> {
    let wanted = "--random takes hidden,layers,heads,kv_heads,ffn,vocabulary";
    let numbers: Vec<usize> = options
        .random
        .split(',')
        .map(|number| number.trim().parse().map_err(|_| wanted))
        .collect::<Result<_, _>>()?;
    let [hidden, layers, heads, kv_heads, ffn, vocabulary] = numbers[..] else { return Err(wanted.into()) };
    if heads == 0 || hidden % heads != 0 {
        return Err("heads must divide hidden".into());
    }
    let layer = LayerSpec { query_head_count: heads, kv_head_count: kv_heads, intermediate_size: ffn };
    let spec = ModelSpec {
        family: Family::Llama,
        hidden_size: hidden,
        head_dim: hidden / heads,
        vocab_size: vocabulary,
        max_position_embeddings: options.window.max(2048),
        rms_norm_eps: 1e-5,
        rope: Rope { theta: 10_000.0, scaling: RopeScaling::None },
        tie_word_embeddings: false,
        layers: vec![layer; layers],
    };
    spec.validate()?;
    Ok(spec)
}

fn windows(options: &StepOptions, spec: &ModelSpec) -> Vec<Vec<Vec<u32>>> {
    let window = |micro: usize, row: usize| {
        (0..options.window)
            .map(|token| ((micro * 7919 + row * 977 + token * 131) % spec.vocab_size) as u32)
            .collect()
    };
    (0..options.micro).map(|micro| (0..options.rows).map(|row| window(micro, row)).collect()).collect()
}

/// The first groups of every layer, `removed` of them gone: key/value heads whole, channels by 64 where there are many.
fn kept(spec: &ModelSpec, removed: f64) -> KeepMask {
    let left = |count: usize, quantum: usize| {
        let left = (count as f64 * (1.0 - removed)).round() as usize;
        (left / quantum * quantum).clamp(1, count)
    };
    let layers = spec
        .layers
        .iter()
        .map(|widths| {
            let kv_heads = left(widths.kv_head_count, 1);
            let query_heads = kv_heads * widths.query_heads_per_kv_head();
            let quantum = if widths.intermediate_size >= 1024 { 64 } else { 1 };
            LayerKeep {
                query_heads: (0..query_heads).collect(),
                kv_heads: (0..kv_heads).collect(),
                channels: (0..left(widths.intermediate_size, quantum)).collect(),
            }
        })
        .collect();
    KeepMask { layers }
}
