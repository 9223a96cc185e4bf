use crate::deadlines::Deadlines;
use service_kit::RootArgs;
use std::path::PathBuf;
use std::time::Duration;

/// How a coordinator is set up.
#[derive(Debug, Clone, clap::Args)]
pub struct CoordinatorConfig {
    #[command(flatten)]
    pub roots: RootArgs,
    /// Folder for what the coordinator keeps: the runs' events
    #[arg(long, env = "ESPALIER_DATA_DIR", value_name = "DIR")]
    pub data_dir: PathBuf,
    /// Folder for the runs' checkpoints, below a root and at the same path on all workers
    /// [default: DATA_DIR/checkpoints]
    #[arg(long, env = "ESPALIER_CHECKPOINT_DIR", value_name = "DIR")]
    pub checkpoint_dir: Option<PathBuf>,
    /// How long a worker stays registered without renewing its lease
    #[arg(long, env = "ESPALIER_LEASE_SECONDS", value_name = "SECONDS", default_value_t = 10,
          value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub lease_seconds: u64,
    /// How long a worker may be silent within an optimizer step before the run fails
    #[arg(long, env = "ESPALIER_STEP_DEADLINE_SECONDS", value_name = "SECONDS", default_value_t = 600,
          value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub step_deadline_seconds: u64,
}

impl CoordinatorConfig {
    /// Where the ranks of the runs write their state.
    pub(crate) fn checkpoint_dir(&self) -> PathBuf {
        self.checkpoint_dir.clone().unwrap_or_else(|| self.data_dir.join("checkpoints"))
    }

    pub(crate) fn lease(&self) -> Duration {
        Duration::from_secs(self.lease_seconds)
    }

    pub(crate) fn deadlines(&self) -> Deadlines {
        Deadlines::with_step(Duration::from_secs(self.step_deadline_seconds))
    }
}
