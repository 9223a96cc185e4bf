//! What `scripts/gpu_check.py` asks of a device, one question a call. Every answer is one line of JSON, the last printed.
//!
//! ```text
//! gpu_check probe --device cuda:0                        is it there; do its kernels compile; does NCCL work with it
//! gpu_check run --device cuda:0 --model DIR --ranks 2    a small pruning run on ranks that share the device, by Gloo
//! gpu_check step --device cuda:0 --random SHAPE          timed steps on random weights, then over a short ramp
//! ```

#[path = "gpu_check/run.rs"]
mod run;
#[path = "gpu_check/step.rs"]
mod step;

use clap::{Parser, Subcommand};
use engine_tch::{Device, open_device};
use recipe::{Precision, Recipe, Recompute};
use serde_json::json;
use std::error::Error;
use std::process::ExitCode;
use std::time::Duration;

/// Longest that ranks wait for each other.
const TIMEOUT: Duration = Duration::from_secs(60);

#[derive(Parser)]
struct Options {
    #[command(subcommand)]
    question: Question,
}

#[derive(Subcommand)]
enum Question {
    /// Is the device there, and what works with it
    Probe {
        #[arg(long, default_value = "cpu")]
        device: String,
    },
    /// A small pruning run
    Run(run::RunOptions),
    /// Timed steps
    Step(step::StepOptions),
}

/// How a shard computes.
#[derive(clap::Args)]
struct Formats {
    #[arg(long, default_value = "cpu")]
    device: String,
    /// As `precision.compute` in a recipe
    #[arg(long, default_value = "f32")]
    compute: String,
    /// As `precision.storage` in a recipe
    #[arg(long, default_value = "f32")]
    storage: String,
    #[arg(long, default_value_t = 1)]
    threads: usize,
    /// Keep each layer's input alone, and run it forward again
    #[arg(long)]
    recompute: bool,
}

impl Formats {
    fn open(&self) -> Result<Device, Box<dyn Error>> {
        Ok(open_device(&self.device)?)
    }

    fn set(&self, recipe: &mut Recipe) -> Result<(), Box<dyn Error>> {
        recipe.precision = Precision {
            compute: serde_json::from_value(json!(self.compute))?,
            storage: serde_json::from_value(json!(self.storage))?,
        };
        recipe.recompute = if self.recompute { Recompute::Layer } else { Recompute::None };
        Ok(())
    }
}

fn main() -> ExitCode {
    let answer = match Options::parse().question {
        Question::Probe { device } => probe(&device),
        Question::Run(options) => run::answer(&options),
        Question::Step(options) => step::answer(&options),
    };
    match answer {
        Ok(answer) => {
            println!("{answer}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("gpu_check: {error}");
            ExitCode::FAILURE
        }
    }
}

fn probe(name: &str) -> Result<serde_json::Value, Box<dyn Error>> {
    let device = open_device(name)?;
    // The first tensor makes the device's context.
    let four = tch::Tensor::f_ones([2, 2], (tch::Kind::Float, device))?.f_sum(None)?.f_double_value(&[])?;
    if four != 4.0 {
        return Err(format!("the sum of four ones is {four} on {name}").into());
    }
    let memory = engine_tch::device_memory(device)?;
    let nccl = if device.is_cuda() {
        match engine_tch::check_nccl(device, TIMEOUT) {
            Ok(()) => json!({"works": true}),
            Err(error) => json!({"works": false, "why": error.to_string()}),
        }
    } else {
        json!({"works": false, "why": "not a CUDA device"})
    };
    Ok(json!({
        "device": name,
        "kernels": engine_tch::has_kernels(device),
        "nccl": nccl,
        "free_bytes": memory.free,
        "total_bytes": memory.total,
    }))
}
