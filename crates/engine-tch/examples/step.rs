//! Times optimizer steps of one rank, on a model folder or on random weights of a given shape.
//!
//! ```text
//! step MODEL                                            a model folder
//! step --random 1024,8,16,16,2752,32000                 hidden, layers, heads, kv heads, ffn, vocabulary
//! ```
//!
//! Prints a line for each step and, last, one JSON object with medians. Rates count 4 FLOP for each projection and head
//! weight and token, beside the rate of a plain product taken between the steps: that of libtorch's own `mm`, and that of the
//! routine which the engine has for frozen weights.

mod step {
    pub(super) mod random_model;
}

use clap::Parser;
use engine::{Engine, ShardSetup, StepOutcome};
use engine_tch::{TchEngine, plain_product};
use recipe::{Batch, Pruning, Recipe};
use serde_json::json;
use std::error::Error;
use std::path::PathBuf;
use std::time::{Duration, Instant};
use step::random_model::{self, ModelShape};
use tch::{Device, Kind, Tensor};

/// Times optimizer steps of one rank.
#[derive(Parser)]
struct Options {
    /// Model folder
    #[arg(required_unless_present = "random")]
    model: Option<PathBuf>,
    /// Random weights instead: hidden,layers,heads,kv_heads,ffn,vocabulary
    #[arg(long, value_name = "SHAPE", conflicts_with = "model")]
    random: Option<ModelShape>,
    /// Head tied to the embedding (with --random)
    #[arg(long)]
    tied: bool,
    /// Windows in a micro-batch
    #[arg(long, default_value_t = 4)]
    rows: usize,
    /// Tokens in a window
    #[arg(long, default_value_t = 256)]
    window: usize,
    /// Micro-batches in a step
    #[arg(long, default_value_t = 1)]
    micro: usize,
    #[arg(long, default_value_t = 2)]
    threads: usize,
    /// Steps timed, after one that is not
    #[arg(long, default_value_t = 3)]
    steps: u64,
    /// cpu, cuda or cuda:N
    #[arg(long, default_value = "cpu", value_parser = device)]
    device: Device,
    /// As `precision.compute` in a recipe
    #[arg(long)]
    compute: Option<String>,
    /// As `precision.storage` in a recipe
    #[arg(long)]
    storage: Option<String>,
    /// As `recompute` in a recipe
    #[arg(long)]
    recompute: Option<String>,
    /// As `pruning.criterion` in a recipe, in JSON; `none` for tuning alone
    #[arg(long)]
    criterion: Option<String>,
    #[arg(long, default_value_t = 0.0)]
    dropout: f64,
    #[arg(long, default_value_t = 8)]
    lora_rank: usize,
}

fn device(text: &str) -> Result<Device, String> {
    match text.split_once(':') {
        None if text == "cpu" => Ok(Device::Cpu),
        None if text == "cuda" => Ok(Device::Cuda(0)),
        Some(("cuda", index)) => Ok(Device::Cuda(index.parse().map_err(|_| "expected cuda:N")?)),
        _ => Err("expected cpu, cuda or cuda:N".into()),
    }
}

impl Options {
    fn recipe(&self) -> Result<Recipe, Box<dyn Error>> {
        let mut recipe = Recipe {
            batch: Batch { rows: self.rows, window_tokens: self.window, micro_batches: self.micro },
            pruning: Some(Pruning::published()),
            ..Recipe::default()
        };
        recipe.lora.dropout = self.dropout;
        recipe.lora.alpha *= self.lora_rank as f64 / recipe.lora.rank as f64;
        recipe.lora.rank = self.lora_rank;
        let named = |name: &String| serde_json::Value::String(name.clone());
        if let Some(name) = &self.compute {
            recipe.precision.compute = serde_json::from_value(named(name))?;
        }
        if let Some(name) = &self.storage {
            recipe.precision.storage = serde_json::from_value(named(name))?;
        }
        if let Some(name) = &self.recompute {
            recipe.recompute = serde_json::from_value(named(name))?;
        }
        match (self.criterion.as_deref(), &mut recipe.pruning) {
            (Some("none"), pruning) => *pruning = None,
            (Some(text), Some(pruning)) => pruning.criterion = serde_json::from_str(text)?,
            (Some(_), None) | (None, _) => {}
        }
        Ok(recipe)
    }
}

/// What one step took.
struct Timed {
    seconds: f64,
    cpu_seconds: f64,
    products: [ProductTime; 2],
    outcome: StepOutcome,
}

fn main() -> Result<(), Box<dyn Error>> {
    let options = Options::parse();
    let random = match &options.random {
        Some(shape) => Some(random_model::write(shape, options.tied)?),
        None => None,
    };
    let model = match (&random, &options.model) {
        (Some(folder), _) => folder.path().to_owned(),
        (None, Some(model)) => model.clone(),
        (None, None) => return Err("name a model folder, or a shape with --random".into()),
    };
    let recipe = options.recipe()?;
    let (batch, compute) = (recipe.batch, recipe.precision.compute);
    let engine = TchEngine::new(options.device, options.threads, "worker".into());
    let spec = checkpoint::ModelFolder::open(&model)?.spec().clone();
    let started = Instant::now();
    let setup = ShardSetup {
        model,
        recipe,
        tp_rank: 0,
        tp_degree: 1,
        collective_timeout: Duration::from_secs(5),
        restore: None,
        progress: std::sync::Arc::default(),
    };
    let mut shard = engine.load(setup)?;
    let load_seconds = started.elapsed().as_secs_f64();
    println!("load {load_seconds:.2} s, {:.0} MB resident", shard.memory_bytes() as f64 / 1e6);

    let rows: Vec<Vec<u32>> = (0..batch.rows)
        .map(|row| {
            (0..batch.window_tokens)
                .map(|token| ((row * 977 + token * 131) % spec.vocab_size) as u32)
                .collect()
        })
        .collect();
    let micro: Vec<Vec<&[u32]>> =
        (0..batch.micro_batches).map(|_| rows.iter().map(Vec::as_slice).collect()).collect();
    let weights = spec.projection_weight_count() + (spec.vocab_size * spec.hidden_size) as u64;
    let flop = 4.0 * weights as f64 * batch.tokens_per_step() as f64;
    let product = Product::new(options.device, compute == recipe::Compute::Bf16);
    let mut steps = Vec::new();
    for step in 0..=options.steps {
        let products = product.times()?;
        synchronize(options.device);
        let (started, cpu) = (Instant::now(), cpu_seconds());
        let outcome = shard.train_step(step, &micro)?;
        synchronize(options.device);
        let (seconds, cpu_seconds) = (started.elapsed().as_secs_f64(), cpu_seconds() - cpu);
        println!(
            "step {step}: {seconds:.3} s ({cpu_seconds:.2} CPU s), loss {:.4}, {:.1} GFLOP/s, a product {:.1} GFLOP/s, by mm \
             {:.1}, {}; {:.0} MB resident",
            outcome.loss,
            flop / seconds / 1e9,
            product.flop / products[0].seconds / 1e9,
            product.flop / products[1].seconds / 1e9,
            phases(&outcome).map(|(name, seconds)| format!("{name} {:.1} ms", seconds * 1e3)).join(", "),
            shard.memory_bytes() as f64 / 1e6,
        );
        if step > 0 {
            steps.push(Timed { seconds, cpu_seconds, products, outcome });
        }
    }
    let median_of = |value: &dyn Fn(&Timed) -> f64| median(steps.iter().map(value).collect());
    let seconds = median_of(&|step| step.seconds);
    let [product_seconds, mm_seconds] = [0, 1].map(|place| median_of(&|step| step.products[place].seconds));
    let product_per_cpu = product.flop / median_of(&|step| step.products[0].cpu_seconds);
    let phases: serde_json::Map<String, serde_json::Value> = (0..5)
        .filter_map(|place| {
            let (name, _) = phases(&steps.first()?.outcome)[place];
            Some((format!("{name}_s"), median_of(&|step| phases(&step.outcome)[place].1).into()))
        })
        .collect();
    println!(
        "{}",
        json!({
            "weights": weights,
            "tokens_per_step": batch.tokens_per_step(),
            "threads": options.threads,
            "load_s": load_seconds,
            "step_s": seconds,
            "step_cpu_s": median_of(&|step| step.cpu_seconds),
            "phases": phases,
            "tokens_per_s": batch.tokens_per_step() as f64 / seconds,
            "gflop_per_s": flop / seconds / 1e9,
            "product_gflop_per_s": product.flop / product_seconds / 1e9,
            "mm_gflop_per_s": product.flop / mm_seconds / 1e9,
            "share_of_product": flop / seconds * product_seconds / product.flop,
            "share_of_product_in_cpu_seconds":
                flop / median_of(&|step| step.cpu_seconds) / product_per_cpu,
            "resident_bytes": shard.memory_bytes(),
            "peak_resident_bytes": peak_resident_bytes(),
            "loss": steps.last().map(|step| step.outcome.loss),
        })
    );
    Ok(())
}

fn phases(outcome: &StepOutcome) -> [(&'static str, f64); 5] {
    let times = &outcome.phase_times;
    [
        ("forward", times.forward),
        ("loss", times.loss),
        ("backward", times.backward),
        ("scores", outcome.score_time),
        ("optimizer", times.optimizer),
    ]
    .map(|(name, time)| (name, time.as_secs_f64()))
}

/// By the clock, and of all threads.
#[derive(Debug, Clone, Copy)]
struct ProductTime {
    seconds: f64,
    cpu_seconds: f64,
}

/// The plain product that rates are held against.
struct Product {
    factor: Tensor,
    device: Device,
    flop: f64,
}

impl Product {
    fn new(device: Device, bf16: bool) -> Self {
        let size: i64 = if device == Device::Cpu { 2048 } else { 8192 };
        let kind = if bf16 { Kind::BFloat16 } else { Kind::Float };
        let factor = Tensor::ones([size, size], (kind, device));
        Self { factor, device, flop: 2.0 * (size as f64).powi(3) }
    }

    /// Of one product by the engine's routine, and of one by `mm`.
    fn times(&self) -> Result<[ProductTime; 2], Box<dyn Error>> {
        Ok([
            self.time(|factor| Ok(plain_product(factor, factor)?))?,
            self.time(|factor| Ok(factor.f_mm(factor)?))?,
        ])
    }

    fn time(
        &self,
        multiply: impl Fn(&Tensor) -> Result<Tensor, Box<dyn Error>>,
    ) -> Result<ProductTime, Box<dyn Error>> {
        synchronize(self.device);
        let (started, cpu) = (Instant::now(), cpu_seconds());
        let _ = multiply(&self.factor)?;
        synchronize(self.device);
        Ok(ProductTime { seconds: started.elapsed().as_secs_f64(), cpu_seconds: cpu_seconds() - cpu })
    }
}

/// Waits until a GPU has done what it was given.
fn synchronize(device: Device) {
    if let Device::Cuda(index) = device {
        tch::Cuda::synchronize(index as i64);
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    match values.len() {
        0 => 0.0,
        count if count % 2 == 1 => values[count / 2],
        count => (values[count / 2 - 1] + values[count / 2]) / 2.0,
    }
}

fn usage() -> libc::rusage {
    let mut usage = std::mem::MaybeUninit::<libc::rusage>::zeroed();
    // SAFETY: fills a struct of the caller's; the zeroed one is valid should it fail.
    unsafe {
        libc::getrusage(libc::RUSAGE_SELF, usage.as_mut_ptr());
        usage.assume_init()
    }
}

fn cpu_seconds() -> f64 {
    let usage = usage();
    let seconds = |time: libc::timeval| time.tv_sec as f64 + time.tv_usec as f64 * 1e-6;
    seconds(usage.ru_utime) + seconds(usage.ru_stime)
}

fn peak_resident_bytes() -> i64 {
    usage().ru_maxrss * 1024
}
