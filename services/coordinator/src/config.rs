use crate::deadlines::Deadlines;
use crate::registry::Patience;
use run_store::StoreUrl;
use service_kit::RootArgs;
use std::path::PathBuf;
use std::time::Duration;

/// How a coordinator is set up.
#[derive(Debug, Clone, clap::Args)]
pub struct CoordinatorConfig {
    #[command(flatten)]
    pub roots: RootArgs,
    /// Folder for what the coordinator keeps: the runs and their events
    #[arg(long, env = "ESPALIER_DATA_DIR", value_name = "DIR")]
    pub data_dir: PathBuf,
    /// Database of the runs: sqlite:///FILE or postgres://USER@HOST/DATABASE [default: DATA_DIR/espalier.db]
    #[arg(long, env = "ESPALIER_STORE", value_name = "URL", hide_env_values = true)]
    pub store: Option<StoreUrl>,
    /// Folder for the runs' checkpoints, below a root and at the same path on all workers, or s3://BUCKET/PREFIX
    /// [default: DATA_DIR/checkpoints]
    #[arg(long, env = "ESPALIER_CHECKPOINT_DIR", value_name = "DIR|URL")]
    pub checkpoint_dir: Option<String>,
    /// How long a worker stays registered without renewing its lease
    #[arg(long, env = "ESPALIER_LEASE_SECONDS", value_name = "SECONDS", default_value_t = 10,
          value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub lease_seconds: u64,
    /// How long a worker may be silent within an optimizer step before the run fails
    #[arg(long, env = "ESPALIER_STEP_DEADLINE_SECONDS", value_name = "SECONDS", default_value_t = 600,
          value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub step_deadline_seconds: u64,
    /// How long a worker at work may make no progress before it counts as stuck
    #[arg(long, env = "ESPALIER_STALL_SECONDS", value_name = "SECONDS", default_value_t = 7,
          value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub stall_seconds: u64,
    /// How long a run that may go on with fewer workers waits for as many as before
    #[arg(long, env = "ESPALIER_REGROUP_SECONDS", value_name = "SECONDS", default_value_t = 30,
          value_parser = clap::value_parser!(u64).range(0..=86_400))]
    pub regroup_seconds: u64,
    /// How long checkpoints and sessions have to end once the coordinator is told to stop
    #[arg(long, env = "ESPALIER_DRAIN_SECONDS", value_name = "SECONDS", default_value_t = 25,
          value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub drain_seconds: u64,
}

impl CoordinatorConfig {
    /// What the flags mean where they are left out.
    #[must_use]
    pub fn new(roots: RootArgs, data_dir: PathBuf) -> Self {
        Self {
            roots,
            data_dir,
            store: None,
            checkpoint_dir: None,
            lease_seconds: 10,
            step_deadline_seconds: 600,
            stall_seconds: 7,
            regroup_seconds: 30,
            drain_seconds: 25,
        }
    }

    pub(crate) fn patience(&self) -> Patience {
        Patience {
            lease: Duration::from_secs(self.lease_seconds),
            stall: Duration::from_secs(self.stall_seconds),
            regroup: Duration::from_secs(self.regroup_seconds),
        }
    }

    pub(crate) fn drain(&self) -> Duration {
        Duration::from_secs(self.drain_seconds)
    }

    pub(crate) fn deadlines(&self) -> Deadlines {
        Deadlines::with_step(Duration::from_secs(self.step_deadline_seconds))
    }
}
