//! Folders that a request names by path or URL: below a root of this machine, or below one in an object store.

use blob_store::{BlobError, BlobStore, Limits};
use service_kit::{Location, Roots};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tempfile::TempDir;
use wire::status::{Failure, Reason, chain};

/// Written last, here and there: a folder with it is whole.
const LAST: [&str; 2] = [checkpoint::MANIFEST_FILE, "manifest.json"];

/// A folder, as this process reaches it.
#[derive(Debug, Clone)]
pub(crate) struct Place {
    local: PathBuf,
    /// Where the files really belong; `local` is only for a while then.
    remote: Option<Remote>,
}

#[derive(Debug, Clone)]
struct Remote {
    store: BlobStore,
    /// Within the bucket.
    folder: String,
    _scratch: Arc<TempDir>,
}

impl Place {
    /// The folder at `url`, for reading. Blocks on the file system.
    pub(crate) fn input(roots: &Roots, url: &str) -> Result<Self, String> {
        match roots.input_url(url).map_err(|refused| chain(&refused))? {
            Location::Path(path) => {
                let local = roots.input_folder(path).map_err(|refused| chain(&refused))?;
                Ok(Self { local, remote: None })
            }
            Location::S3 { bucket, prefix } => Self::remote(bucket, prefix),
        }
    }

    /// The folder at `url`, for writing; it need not exist. Blocks on the file system.
    pub(crate) fn output(roots: &Roots, url: &str) -> Result<Self, String> {
        match roots.output_url(url).map_err(|refused| chain(&refused))? {
            Location::Path(local) => Ok(Self { local, remote: None }),
            Location::S3 { bucket, prefix } => Self::remote(bucket, prefix),
        }
    }

    fn remote(bucket: String, folder: String) -> Result<Self, String> {
        if folder.is_empty() {
            return Err(format!(
                "`s3://{bucket}` is a whole bucket; name a folder in it, as s3://{bucket}/NAME"
            ));
        }
        let whole = blob_store::Location::S3 { bucket, prefix: String::new() };
        let store = BlobStore::open(&whole, Limits::default()).map_err(|error| chain(&error))?;
        let scratch = tempfile::tempdir().map_err(|error| format!("no temporary folder: {error}"))?;
        let local = scratch.path().join("files");
        std::fs::create_dir(&local).map_err(|error| format!("no temporary folder: {error}"))?;
        Ok(Self { local, remote: Some(Remote { store, folder, _scratch: Arc::new(scratch) }) })
    }

    /// Where the files are, or are to be written, on this machine. Of an object store it lasts as long as this value.
    pub(crate) fn local(&self) -> &Path {
        &self.local
    }

    /// Makes the folder where there is none. Blocks on the file system.
    pub(crate) fn create(&self) -> Result<(), String> {
        std::fs::create_dir_all(&self.local)
            .map_err(|error| format!("`{}` cannot be made: {error}", self.local.display()))
    }

    /// A file to be read, on this machine. Its digest is for the engine to check.
    pub(crate) async fn fetch(&self, file: &str) -> Result<PathBuf, Failure> {
        let path = self.local.join(file);
        if let Some(Remote { store, folder, .. }) = &self.remote {
            store
                .fetch_file(&format!("{folder}/{file}"), &path, None)
                .await
                .map_err(|error| failed(&error))?;
        }
        Ok(path)
    }

    /// Brings all files right in the folder to this machine.
    pub(crate) async fn fetch_all(&self) -> Result<(), Failure> {
        let Some(remote) = &self.remote else { return Ok(()) };
        let files = remote.files().await?;
        if files.is_empty() {
            let message = format!("there is nothing in `{}/{}`", remote.store.location(), remote.folder);
            return Err(Failure::new(Reason::BadFile, message));
        }
        for file in files {
            self.fetch(&file).await?;
        }
        Ok(())
    }

    /// Brings a file that was written to where it belongs.
    pub(crate) async fn deliver(&self, file: &str) -> Result<(), Failure> {
        let Some(Remote { store, folder, .. }) = &self.remote else { return Ok(()) };
        let written = store.put_file(&format!("{folder}/{file}"), &self.local.join(file)).await;
        written.map_err(|error| Failure::from_error(Reason::StoreFailed, &error))
    }

    /// Brings all files that were written to where they belong, the manifest last.
    pub(crate) async fn deliver_all(&self) -> Result<(), Failure> {
        if self.remote.is_none() {
            return Ok(());
        }
        let unreadable = |error: std::io::Error| {
            Failure::new(Reason::BadFile, format!("`{}` cannot be read: {error}", self.local.display()))
        };
        let mut files = Vec::new();
        let mut entries = tokio::fs::read_dir(&self.local).await.map_err(unreadable)?;
        while let Some(entry) = entries.next_entry().await.map_err(unreadable)? {
            files.push(entry.file_name().to_string_lossy().into_owned());
        }
        files.sort_by_key(|file| (LAST.contains(&file.as_str()), file.clone()));
        for file in files {
            self.deliver(&file).await?;
        }
        Ok(())
    }

    /// Refuses to write where something is already, or removes it when it may be replaced: what an export that was cut
    /// off has left. On a disk the engine refuses what is not empty, and nothing but a whole export is removed.
    pub(crate) async fn make_room(&self, replace: bool) -> Result<(), Failure> {
        let Some(remote) = &self.remote else {
            return if replace { remove_export(&self.local) } else { Ok(()) };
        };
        if remote.files().await?.is_empty() {
            return Ok(());
        }
        if !replace {
            let message = format!(
                "`{}/{}` is not empty; give another folder or remove it",
                remote.store.location(),
                remote.folder
            );
            return Err(Failure::new(Reason::BadFile, message));
        }
        remote.store.delete_folder(&remote.folder).await.map_err(|error| failed(&error))
    }
}

impl Remote {
    /// Names right in the folder.
    async fn files(&self) -> Result<Vec<String>, Failure> {
        let names = self.store.list(&self.folder).await.map_err(|error| failed(&error))?;
        let start = format!("{}/", self.folder);
        let files = names.iter().filter_map(|name| name.strip_prefix(&start));
        Ok(files.filter(|name| !name.contains('/')).map(str::to_owned).collect())
    }
}

fn failed(error: &BlobError) -> Failure {
    let reason = if error.is_damage() { Reason::BadFile } else { Reason::StoreFailed };
    Failure::from_error(reason, error)
}

/// Removes what an export that was cut off after its last rename has left. Nothing but a whole export is touched.
fn remove_export(out: &Path) -> Result<(), Failure> {
    if !LAST.iter().any(|name| out.join(name).is_file()) {
        return Ok(());
    }
    std::fs::remove_dir_all(out).map_err(|error| {
        let message = format!("`{}` of the export before cannot be removed: {error}", out.display());
        Failure::new(Reason::BadFile, message)
    })
}
