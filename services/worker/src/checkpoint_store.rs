//! Where a checkpoint's files are: below a root of this machine, or in an object store that the worker was told of.

use blob_store::{BlobStore, Limits, Location};
use service_kit::Roots;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tempfile::TempDir;
use wire::status::{Failure, Reason, chain};

/// What a URL of a checkpoint may name.
#[derive(Debug, Clone)]
pub(crate) struct Allowed {
    pub(crate) roots: Roots,
    /// Object stores, each with what is below it.
    pub(crate) stores: Vec<Location>,
}

/// A checkpoint's folder, as this process reaches it.
#[derive(Debug, Clone)]
pub(crate) struct CheckpointFolder {
    local: PathBuf,
    /// Where the files really belong; `local` is only for a while then.
    remote: Option<(BlobStore, Arc<TempDir>)>,
}

impl Allowed {
    /// The folder at `url`, for reading.
    pub(crate) fn input(&self, url: &str) -> Result<CheckpointFolder, String> {
        self.open(url, |path| self.roots.input_folder(path).map_err(|refused| chain(&refused)))
    }

    /// The folder at `url`, for writing; it is made where there is none.
    pub(crate) fn output(&self, url: &str) -> Result<CheckpointFolder, String> {
        self.open(url, |path| {
            let path = self.roots.output(path).map_err(|refused| chain(&refused))?;
            std::fs::create_dir_all(&path)
                .map_err(|error| format!("`{}` cannot be made: {error}", path.display()))?;
            Ok(path)
        })
    }

    fn open(
        &self,
        url: &str,
        local: impl FnOnce(&Path) -> Result<PathBuf, String>,
    ) -> Result<CheckpointFolder, String> {
        let location: Location = url.parse().map_err(|error| format!("{error}"))?;
        match &location {
            Location::Folder(path) => Ok(CheckpointFolder { local: local(path)?, remote: None }),
            Location::S3 { .. } => {
                if !self.stores.iter().any(|allowed| allowed.holds(&location)) {
                    return Err(format!(
                        "{location} is not below an object store that this worker may use; start it with --object-store"
                    ));
                }
                let store = BlobStore::open(&location, Limits::default()).map_err(|error| chain(&error))?;
                let folder = tempfile::tempdir().map_err(|error| format!("no temporary folder: {error}"))?;
                let local = folder.path().to_owned();
                Ok(CheckpointFolder { local, remote: Some((store, Arc::new(folder))) })
            }
        }
    }
}

impl CheckpointFolder {
    /// A file to be read, on this machine. Its digest is for the engine to check.
    pub(crate) async fn fetch(&self, file: &str) -> Result<PathBuf, Failure> {
        let path = self.local.join(file);
        if let Some((store, _)) = &self.remote {
            store.fetch_file(file, &path, None).await.map_err(|error| {
                let reason = if error.is_damage() { Reason::BadFile } else { Reason::StoreFailed };
                Failure::from_error(reason, &error)
            })?;
        }
        Ok(path)
    }

    /// Where to write a file, on this machine.
    pub(crate) fn place(&self, file: &str) -> PathBuf {
        self.local.join(file)
    }

    /// Brings a file that was written to where it belongs.
    pub(crate) async fn deliver(&self, file: &str) -> Result<(), Failure> {
        match &self.remote {
            None => Ok(()),
            Some((store, _)) => store
                .put_file(file, &self.local.join(file))
                .await
                .map_err(|error| Failure::from_error(Reason::StoreFailed, &error)),
        }
    }
}
