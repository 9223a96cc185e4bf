//! The `worker` binary: the worker's server over libtorch, and the clean process of the export check.

use anyhow::Context;
use clap::Parser;
use engine::CollectiveBackend;
use engine_tch::TchEngine;
use service_kit::{shutdown, telemetry};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;
use worker::{CollectivesName, Parent, ServeArgs, WorkerConfig, WorkerError};

/// Exit code that asks whoever started the worker to start it anew: EX_SOFTWARE of sysexits.h.
const RESTART: u8 = 70;
/// Longest that tasks may take to end after the server has.
const RUNTIME_GRACE: Duration = Duration::from_secs(1);

/// Holds one tensor-parallel shard of a model on one device, and trains and prunes it as the coordinator tells
#[derive(Debug, Parser)]
#[command(name = "worker", version, subcommand_negates_reqs = true)]
struct Cli {
    #[command(flatten)]
    serve: ServeArgs,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Serve; the same as no command
    Serve(Box<ServeArgs>),
    /// Write the logits of a model folder on given tokens
    Logits(LogitsArgs),
}

#[derive(Debug, clap::Args)]
struct LogitsArgs {
    /// Model folder in Hugging Face layout
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// JSON array of arrays of token ids
    #[arg(long, value_name = "FILE")]
    tokens_file: PathBuf,
    /// Safetensors file to write: `logits.<row>` is [tokens, vocabulary] in f32
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
}

fn main() -> ExitCode {
    let Cli { serve, command } = Cli::parse();
    let done = match command {
        None => run_server(serve),
        Some(Command::Serve(serve)) => run_server(*serve),
        Some(Command::Logits(args)) => write_logits(&args),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("worker: {error:#}");
            match error.downcast_ref::<WorkerError>() {
                Some(WorkerError::DeviceHung) => ExitCode::from(RESTART),
                Some(_) | None => ExitCode::FAILURE,
            }
        }
    }
}

fn run_server(args: ServeArgs) -> anyhow::Result<()> {
    let parent = args.exit_with_parent.map(Parent::arm).transpose()?;
    let device = engine_tch::open_device(&args.device).context("--device cannot be used")?;
    let log = args.log.clone();
    if args.coordinator.as_ref().is_none_or(|url| url.is_empty()) {
        anyhow::bail!("no coordinator is given: pass --coordinator URL or set ESPALIER_COORDINATOR");
    }
    let backend = args.collectives.map(backend);
    if backend == Some(CollectiveBackend::Nccl) && !device.is_cuda() {
        anyhow::bail!("--collectives nccl needs a CUDA device; this worker computes on {}", args.device);
    }
    let mut config = WorkerConfig::from(args);
    if device.is_cuda() {
        config.device_memory_bytes = Some(engine_tch::device_memory(device)?.total);
    }
    // A check of an export runs this same program.
    let program = std::env::current_exe().context("failed to find this program's own path")?;
    let engine = TchEngine::new(device, config.threads as usize, program);
    let engine = Arc::new(match backend {
        Some(backend) => engine.with_backend(backend),
        None => engine,
    });
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("failed to start the async runtime")?;
    let done = runtime.block_on(async {
        let _telemetry = telemetry::init("espalier-worker", &log)?;
        let stop = shutdown::on_signals().context("failed to listen for signals")?;
        if let Some(parent) = parent {
            tokio::spawn(parent.watch(stop.clone()));
        }
        worker::run(config, engine, stop).await?;
        Ok(())
    });
    // An export at work, or a collective that waits for a lost peer, must not keep the process.
    runtime.shutdown_timeout(RUNTIME_GRACE);
    done
}

fn write_logits(args: &LogitsArgs) -> anyhow::Result<()> {
    let rows = worker::read_tokens_file(&args.tokens_file)?;
    engine_tch::write_logits(&args.model, &rows, &args.out)
        .with_context(|| format!("failed to write the logits of `{}`", args.model.display()))
}

fn backend(name: CollectivesName) -> CollectiveBackend {
    match name {
        CollectivesName::Gloo => CollectiveBackend::Gloo,
        CollectivesName::Nccl => CollectiveBackend::Nccl,
    }
}
