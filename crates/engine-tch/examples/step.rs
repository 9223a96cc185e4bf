//! Times optimizer steps of one rank on a model folder: `step MODEL [rows] [window_tokens] [micro_batches] [threads]`.
//!
//! Prints seconds a step and GFLOP/s at 4 FLOP per projection and head weight and token, beside a plain product's rate.

use engine::{Engine, ShardSetup};
use engine_tch::TchEngine;
use recipe::{Batch, Recipe};
use std::time::{Duration, Instant};
use tch::{Device, Kind, Tensor};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let model = std::path::PathBuf::from(
        arguments.first().ok_or("usage: step MODEL [rows] [window] [micro] [threads]")?,
    );
    let number = |place: usize, default: usize| -> Result<usize, std::num::ParseIntError> {
        arguments.get(place).map_or(Ok(default), |text| text.parse())
    };
    let batch = Batch { rows: number(1, 4)?, window_tokens: number(2, 256)?, micro_batches: number(3, 1)? };
    let threads = number(4, 2)?;
    let engine = TchEngine::new(Device::Cpu, threads, "worker".into());
    let spec = checkpoint::ModelFolder::open(&model)?.spec().clone();
    let mut recipe = Recipe { batch, ..Recipe::default() };
    recipe.lora.dropout = if std::env::var_os("DROPOUT").is_some() { 0.05 } else { 0.0 };
    let started = Instant::now();
    let setup =
        ShardSetup { model, recipe, tp_rank: 0, tp_degree: 1, collective_timeout: Duration::from_secs(5) };
    let mut shard = engine.load(setup)?;
    println!(
        "load {:.2} s, {:.0} MB resident",
        started.elapsed().as_secs_f64(),
        shard.memory_bytes() as f64 / 1e6
    );
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
    for step in 0..4 {
        let (product, rate) = (Instant::now(), gemm_gflops());
        let product = product.elapsed();
        let started = Instant::now();
        let cpu = cpu_seconds();
        let outcome = shard.train_step(step, &micro)?;
        let seconds = started.elapsed().as_secs_f64();
        let cpu = cpu_seconds() - cpu;
        let flop = 4.0 * weights as f64 * batch.tokens_per_step() as f64;
        println!(
            "step {step}: {seconds:.3} s ({cpu:.2} CPU s), loss {:.4}, scores {:.1} ms, {:.0} GFLOP/s; a product runs at \
             {rate:.0} GFLOP/s ({:.0} ms); {:.0} MB resident",
            outcome.loss,
            outcome.score_time.as_secs_f64() * 1e3,
            flop / seconds / 1e9,
            product.as_secs_f64() * 1e3,
            shard.memory_bytes() as f64 / 1e6,
        );
    }
    Ok(())
}

fn gemm_gflops() -> f64 {
    let a = Tensor::ones([2048, 2048], (Kind::Float, Device::Cpu));
    let _ = a.matmul(&a);
    let started = Instant::now();
    let _ = a.matmul(&a);
    2.0 * 2048f64.powi(3) / started.elapsed().as_secs_f64() / 1e9
}

fn cpu_seconds() -> f64 {
    let mut usage = std::mem::MaybeUninit::<libc::rusage>::zeroed();
    // SAFETY: fills a struct of the caller's; the zeroed one is valid should it fail.
    let usage = unsafe {
        libc::getrusage(libc::RUSAGE_SELF, usage.as_mut_ptr());
        usage.assume_init()
    };
    let seconds = |time: libc::timeval| time.tv_sec as f64 + time.tv_usec as f64 * 1e-6;
    seconds(usage.ru_utime) + seconds(usage.ru_stime)
}
