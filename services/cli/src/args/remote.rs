use super::MeasureArgs;
use super::security::SecurityArgs;
use crate::run_file::ExportDtype;
use clap::Args;
use std::path::PathBuf;

/// Which coordinator, and for whom the answer is.
#[derive(Debug, Clone, Args)]
pub(crate) struct RemoteArgs {
    /// Coordinator
    #[arg(
        long,
        value_name = "URL",
        env = "ESPALIER_COORDINATOR_URL",
        default_value = "http://127.0.0.1:7070",
        help_heading = "Connection"
    )]
    pub coordinator: String,
    #[command(flatten)]
    pub security: SecurityArgs,
    /// Print JSON by the proto schema instead of tables
    #[arg(long, help_heading = "Connection")]
    pub json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct CreateArgs {
    /// Run file; deploy/runs holds examples. Paths in it are as the workers see them
    #[arg(long, value_name = "FILE")]
    pub file: PathBuf,
    /// Only check the run and print its plan
    #[arg(long)]
    pub validate_only: bool,
    /// Name of this request: repeating it returns the run that it made [default: random]
    #[arg(long, value_name = "ID")]
    pub request_id: Option<String>,
    /// Follow the run until it ends
    #[arg(long, conflicts_with = "validate_only")]
    pub watch: bool,
    #[command(flatten)]
    pub remote: RemoteArgs,
}

#[derive(Debug, Args)]
pub(crate) struct RunIdArgs {
    /// Identifier of the run
    pub id: String,
    #[command(flatten)]
    pub remote: RemoteArgs,
}

#[derive(Debug, Args)]
pub(crate) struct ListArgs {
    /// At most so many
    #[arg(long, value_name = "N", default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub limit: u32,
    /// Which runs, such as 'state = RUNNING AND display_name : half'
    #[arg(long, value_name = "CONDITION", default_value = "")]
    pub filter: String,
    /// Fields to order by, such as 'display_name, create_time desc'
    #[arg(long, value_name = "FIELDS", default_value = "")]
    pub order_by: String,
    #[command(flatten)]
    pub remote: RemoteArgs,
}

#[derive(Debug, Args)]
pub(crate) struct WatchArgs {
    /// Identifier of the run
    pub id: String,
    /// Only events after this revision
    #[arg(long, value_name = "REVISION", default_value_t = 0)]
    pub from: u64,
    #[command(flatten)]
    pub remote: RemoteArgs,
}

#[derive(Debug, Args)]
pub(crate) struct EvaluateArgs {
    /// Identifier of the run
    pub id: String,
    /// Paths are as the workers see them.
    #[command(flatten)]
    pub measure: MeasureArgs,
    #[command(flatten)]
    pub remote: RemoteArgs,
}

#[derive(Debug, Args)]
pub(crate) struct ExportArgs {
    /// Identifier of the run
    pub id: String,
    /// Empty or new folder for the model, as the workers see it
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// Format of the written weights
    #[arg(long, value_enum, default_value_t = ExportDtype::Source)]
    pub dtype: ExportDtype,
    /// Largest weight file [default: 5 GiB]
    #[arg(long, value_name = "BYTES")]
    pub max_shard_bytes: Option<u64>,
    #[command(flatten)]
    pub remote: RemoteArgs,
}

#[derive(Debug, Args)]
pub(crate) struct MaskArgs {
    /// Identifier of the run
    pub id: String,
    /// Number of the decision [default: the one in force]
    #[arg(long, value_name = "N")]
    pub generation: Option<u64>,
    #[command(flatten)]
    pub remote: RemoteArgs,
}

#[derive(Debug, Args)]
pub(crate) struct CancelArgs {
    /// Identifier of the run
    pub id: String,
    /// End at once, without a checkpoint
    #[arg(long)]
    pub discard: bool,
    #[command(flatten)]
    pub remote: RemoteArgs,
}

#[derive(Debug, Args)]
pub(crate) struct ForkArgs {
    /// Identifier of the run to fork
    pub id: String,
    /// Decision to go on from
    #[arg(long, value_name = "N")]
    pub generation: u64,
    /// Run file of the new run [default: what the other run was to do, without its export]
    #[arg(long, value_name = "FILE")]
    pub file: Option<PathBuf>,
    /// Keep the decision's mask and only tune on
    #[arg(long)]
    pub stop_pruning: bool,
    /// Only check the run and print its plan
    #[arg(long)]
    pub validate_only: bool,
    /// Name of this request: repeating it returns the run that it made [default: random]
    #[arg(long, value_name = "ID")]
    pub request_id: Option<String>,
    #[command(flatten)]
    pub remote: RemoteArgs,
}

#[derive(Debug, Args)]
pub(crate) struct WhatIfArgs {
    /// Identifier of the run
    pub id: String,
    /// Decision whose importance is asked [default: the latest]
    #[arg(long, value_name = "N")]
    pub generation: Option<u64>,
    /// Fraction of the prunable weights that goes
    #[arg(long, value_name = "FRACTION", group = "budget")]
    pub sparsity: Option<f64>,
    /// Parameters of the whole model that stay
    #[arg(long, value_name = "N", group = "budget")]
    pub parameters: Option<u64>,
    /// Bytes of the exported weights
    #[arg(long, value_name = "BYTES", group = "budget")]
    pub memory_bytes: Option<u64>,
    /// Tensor-parallel degree that it will be served at
    #[arg(long, value_name = "N")]
    pub serve_tp: Option<u32>,
    /// Kept channels are a multiple of this
    #[arg(long, value_name = "N")]
    pub multiple_of: Option<u32>,
    #[command(flatten)]
    pub remote: RemoteArgs,
}

#[derive(Debug, Args)]
pub(crate) struct DownloadArgs {
    /// Identifier of the run
    pub id: String,
    /// Folder for the files; what is there already is gone on with
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    #[command(flatten)]
    pub remote: RemoteArgs,
}

#[derive(Debug, Args)]
pub(crate) struct DrainArgs {
    /// Name of the worker
    pub worker_id: String,
    #[command(flatten)]
    pub remote: RemoteArgs,
}

#[derive(Debug, Args)]
pub(crate) struct WorkersArgs {
    #[command(flatten)]
    pub remote: RemoteArgs,
}
