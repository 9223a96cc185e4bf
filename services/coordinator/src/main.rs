//! The coordinator's process.

use clap::Parser;
use coordinator::CoordinatorConfig;
use service_kit::{ListenArgs, LogArgs, shutdown, telemetry};
use std::net::{Ipv4Addr, SocketAddr};
use std::process::ExitCode;

/// Admits workers, drives pruning runs on them, and serves RunService and RegistryService.
#[derive(Debug, Parser)]
#[command(name = "coordinator", version)]
struct Args {
    #[command(flatten)]
    listen: ListenArgs,
    #[command(flatten)]
    config: CoordinatorConfig,
    #[command(flatten)]
    logs: LogArgs,
}

/// Where it listens unless told otherwise.
const DEFAULT_ADDRESS: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 7070);

#[tokio::main]
async fn main() -> ExitCode {
    match run(Args::parse()).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run(args: Args) -> anyhow::Result<()> {
    let _telemetry = telemetry::init("espalier-coordinator", &args.logs)?;
    let shutdown = shutdown::on_signals()?;
    let listener = args.listen.bind(DEFAULT_ADDRESS).await?;
    coordinator::serve(args.config, listener, shutdown).await
}
