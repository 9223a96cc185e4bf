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
pub(crate) struct WorkersArgs {
    #[command(flatten)]
    pub remote: RemoteArgs,
}
