use crate::config::CoordinatorConfig;
use crate::deadlines::Deadlines;
use crate::registry::Registry;
use crate::run_book::RunBook;
use pruning_run::RunId;
use service_kit::Roots;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// What all parts of a coordinator share.
#[derive(Debug)]
pub(crate) struct Context {
    pub(crate) book: RunBook,
    pub(crate) registry: Arc<Registry>,
    pub(crate) roots: Roots,
    pub(crate) data_dir: PathBuf,
    checkpoint_dir: PathBuf,
    pub(crate) deadlines: Deadlines,
    /// Drivers and sessions under way.
    pub(crate) tasks: TaskTracker,
    /// Cancelled when nothing new may start.
    pub(crate) stopping: CancellationToken,
}

impl Context {
    /// # Errors
    /// When a folder is missing or cannot be made.
    pub(crate) fn open(config: &CoordinatorConfig) -> anyhow::Result<Arc<Self>> {
        use anyhow::Context as _;
        let roots = config.roots.open()?;
        let folder = |path: PathBuf, flag: &str| -> anyhow::Result<PathBuf> {
            let at = || format!("{flag} `{}` cannot be made", path.display());
            std::fs::create_dir_all(&path).with_context(at)?;
            path.canonicalize().with_context(at)
        };
        let checkpoint_dir = folder(config.checkpoint_dir(), "--checkpoint-dir")?;
        // Workers write there and look at their own roots; better said now than after the last step.
        roots.output(&checkpoint_dir).context(
            "workers could not write the runs' checkpoints; pass --checkpoint-dir DIR below one of the --root folders",
        )?;
        Ok(Arc::new(Self {
            book: RunBook::default(),
            registry: Registry::new(config.lease()),
            roots,
            data_dir: folder(config.data_dir.clone(), "--data-dir")?,
            checkpoint_dir,
            deadlines: config.deadlines(),
            tasks: TaskTracker::new(),
            stopping: CancellationToken::new(),
        }))
    }

    /// How long a rank that has lost a peer waits for the culprit to be found: its lease must have had time to run out.
    pub(crate) fn blame_grace(&self) -> Duration {
        self.registry.lease() + Duration::from_secs(2)
    }

    /// Where the ranks of a run write their state.
    pub(crate) fn checkpoint_folder(&self, run_id: &RunId) -> PathBuf {
        self.checkpoint_dir.join(&run_id.0)
    }

    /// # Errors
    /// When the folder cannot be made.
    pub(crate) fn make_checkpoint_folder(&self, run_id: &RunId) -> Result<PathBuf, String> {
        let folder = self.checkpoint_folder(run_id);
        std::fs::create_dir_all(&folder).map_err(|cause| {
            format!("the checkpoint folder `{}` cannot be made: {cause}", folder.display())
        })?;
        Ok(folder)
    }
}
