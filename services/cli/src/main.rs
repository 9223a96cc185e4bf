//! `espalier`: prunes on this machine, or talks to a coordinator.

mod args;
mod children;
mod commands;
mod failure;
mod follow;
mod interrupts;
mod local_cluster;
mod local_paths;
mod local_run;
mod measured;
mod out_folder;
mod output;
mod plan_tables;
mod progress;
mod proto_json;
mod report;
mod run_file;
mod tables;
mod telemetry;
mod units;

use clap::Parser;
use std::process::ExitCode;

#[tokio::main]
async fn main() -> ExitCode {
    // A wrong command line ends here, with exit code 2.
    let args = args::Args::parse();
    match commands::run(args.command).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            output::tell(failure.to_string());
            failure.exit_code()
        }
    }
}
