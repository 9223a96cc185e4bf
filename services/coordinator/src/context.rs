use crate::config::CoordinatorConfig;
use crate::deadlines::Deadlines;
use crate::registry::Registry;
use crate::run_book::RunBook;
use crate::stores::Stores;
use anyhow::Context as _;
use blob_store::{BlobStore, Limits, Location};
use run_store::{RunStore, StoreOptions, StoreUrl};
use service_kit::Roots;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Mutex;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use wire::client::ClientSecurity;

/// What all parts of a coordinator share.
#[derive(Debug)]
pub(crate) struct Context {
    pub(crate) book: RunBook,
    pub(crate) stores: Stores,
    pub(crate) registry: Arc<Registry>,
    pub(crate) roots: Roots,
    /// What workers are shown.
    pub(crate) peers: ClientSecurity,
    pub(crate) deadlines: Deadlines,
    pub(crate) drain: Duration,
    /// Held while a run is created, so that two creations see each other.
    pub(crate) creating: Mutex<()>,
    /// Drivers, sessions and writes under way.
    pub(crate) tasks: TaskTracker,
    /// Cancelled when nothing new may start.
    pub(crate) stopping: CancellationToken,
    /// Cancelled when all runs rest and only streams are left.
    pub(crate) closing: CancellationToken,
    /// Cancelled when another coordinator has taken the store.
    pub(crate) fenced: CancellationToken,
}

impl Context {
    /// # Errors
    /// When a folder is missing or cannot be made, or the database cannot be opened.
    pub(crate) async fn open(config: &CoordinatorConfig, peers: ClientSecurity) -> anyhow::Result<Arc<Self>> {
        let roots = config.roots.open()?;
        let data_dir = folder(&config.data_dir, "--data-dir")?;
        let location = checkpoint_location(config, &data_dir, &roots)?;
        let url = config.store.clone().unwrap_or_else(|| StoreUrl::file(data_dir.join("espalier.db")));
        let runs = RunStore::open(&url, StoreOptions::default())
            .await
            .with_context(|| format!("--store {url} cannot be opened"))?;
        let blobs =
            BlobStore::open(&location, Limits::default()).context("--checkpoint-dir cannot be used")?;
        Ok(Arc::new(Self {
            book: RunBook::default(),
            stores: Stores::new(runs, blobs),
            registry: Registry::new(config.patience()),
            roots,
            peers,
            deadlines: config.deadlines(),
            drain: config.drain(),
            creating: Mutex::new(()),
            tasks: TaskTracker::new(),
            stopping: CancellationToken::new(),
            closing: CancellationToken::new(),
            fenced: CancellationToken::new(),
        }))
    }

    /// How long a rank that has lost a peer waits for the culprit to be found: its lease must have had time to run out.
    pub(crate) fn blame_grace(&self) -> Duration {
        self.registry.lease() + Duration::from_secs(2)
    }
}

fn folder(path: &Path, flag: &str) -> anyhow::Result<PathBuf> {
    let at = || format!("{flag} `{}` cannot be made", path.display());
    std::fs::create_dir_all(path).with_context(at)?;
    path.canonicalize().with_context(at)
}

fn checkpoint_location(
    config: &CoordinatorConfig,
    data_dir: &Path,
    roots: &Roots,
) -> anyhow::Result<Location> {
    if let Some(url) = config.checkpoint_dir.as_ref().filter(|place| place.contains("://")) {
        let location: Location =
            url.parse().map_err(|error| anyhow::anyhow!("--checkpoint-dir `{url}` {error}"))?;
        match location {
            Location::S3 { .. } => return Ok(location),
            Location::Folder(path) => return local(&path, roots),
        }
    }
    let path = config.checkpoint_dir.as_ref().map_or_else(|| data_dir.join("checkpoints"), PathBuf::from);
    local(&path, roots)
}

fn local(path: &Path, roots: &Roots) -> anyhow::Result<Location> {
    let path = folder(path, "--checkpoint-dir")?;
    // Workers write there and look at their own roots; better said now than after the first step.
    roots.output(&path).context(
        "workers could not write the runs' checkpoints; pass --checkpoint-dir DIR below one of the --root folders",
    )?;
    Ok(Location::Folder(path))
}
