use crate::location::name_problem;
use crate::{BlobError, Location};
use bytes::Bytes;
use futures_util::{StreamExt, TryStreamExt};
use object_store::aws::AmazonS3Builder;
use object_store::buffered::BufWriter;
use object_store::local::LocalFileSystem;
use object_store::path::Path as BlobPath;
use object_store::prefix::PrefixStore;
use object_store::{BackoffConfig, ClientOptions, ObjectStore, ObjectStoreExt, RetryConfig};
use sha2::{Digest, Sha256};
use std::fmt::Write as _;
use std::future::Future;
use std::io::{Read, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::AsyncWriteExt;

/// What is moved at once.
const PART_BYTES: usize = 8 << 20;

/// How long things may take.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Of a call that moves little.
    pub call: Duration,
    /// Of moving a whole file.
    pub transfer: Duration,
    /// Times that a request of S3 is made again.
    pub retries: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { call: Duration::from_secs(30), transfer: Duration::from_secs(30 * 60), retries: 5 }
    }
}

/// A folder of blobs that is open. Clones share it.
#[derive(Debug, Clone)]
pub struct BlobStore {
    inner: Arc<dyn ObjectStore>,
    location: Location,
    limits: Limits,
}

impl BlobStore {
    /// Opens a location; a folder is made where there is none.
    ///
    /// # Errors
    /// When the folder cannot be made, or the variables of S3 make no sense.
    pub fn open(location: &Location, limits: Limits) -> Result<Self, BlobError> {
        let open = |cause| BlobError::Open { store: location.to_string(), cause };
        let inner: Arc<dyn ObjectStore> = match location {
            Location::Folder(path) => {
                std::fs::create_dir_all(path)
                    .map_err(|cause| BlobError::Local { path: path.clone(), cause })?;
                Arc::new(LocalFileSystem::new_with_prefix(path).map_err(open)?.with_fsync(true))
            }
            Location::S3 { bucket, prefix } => {
                let retry = RetryConfig {
                    backoff: BackoffConfig::default(),
                    max_retries: limits.retries,
                    retry_timeout: limits.call,
                };
                let client = ClientOptions::new()
                    .with_connect_timeout(limits.call.min(Duration::from_secs(5)))
                    .with_timeout(limits.call);
                let bucket = AmazonS3Builder::from_env()
                    .with_client_options(client.with_allow_http(allows_http()))
                    .with_bucket_name(bucket)
                    .with_retry(retry)
                    .build()
                    .map_err(open)?;
                Arc::new(PrefixStore::new(bucket, prefix.as_str()))
            }
        };
        Ok(Self { inner, location: location.clone(), limits })
    }

    #[must_use]
    pub fn location(&self) -> &Location {
        &self.location
    }

    /// Where a blob is as a local file, if this is a folder.
    ///
    /// # Errors
    /// When the name leads elsewhere.
    pub fn local_path(&self, name: &str) -> Result<Option<PathBuf>, BlobError> {
        self.path(name)?;
        match &self.location {
            Location::Folder(folder) => Ok(Some(folder.join(name))),
            Location::S3 { .. } => Ok(None),
        }
    }

    /// Puts a small blob.
    ///
    /// # Errors
    /// When the store fails or the deadline passes.
    pub async fn put_bytes(&self, name: &str, bytes: Vec<u8>) -> Result<(), BlobError> {
        let path = self.path(name)?;
        if bytes.len() > PART_BYTES {
            let mut reader = bytes.as_slice();
            return self.put_from(name, &path, &mut reader).await;
        }
        let putting = async { self.inner.put(&path, bytes.into()).await };
        self.within("write", name, self.limits.call, putting).await.map(drop)
    }

    /// Puts a file of this machine.
    ///
    /// # Errors
    /// When it cannot be read, the store fails or the deadline passes.
    pub async fn put_file(&self, name: &str, file: &Path) -> Result<(), BlobError> {
        let path = self.path(name)?;
        let local = |cause| BlobError::Local { path: file.to_owned(), cause };
        let mut reader = std::fs::File::open(file).map_err(local)?;
        self.put_from(name, &path, &mut reader).await
    }

    async fn put_from(
        &self,
        name: &str,
        path: &BlobPath,
        reader: &mut (dyn Read + Send),
    ) -> Result<(), BlobError> {
        let putting = async {
            let generic = |cause: std::io::Error| object_store::Error::Generic {
                store: "upload",
                source: Box::new(cause),
            };
            let mut writer = BufWriter::with_capacity(self.inner.clone(), path.clone(), PART_BYTES);
            let mut part = vec![0; PART_BYTES];
            loop {
                let count = reader.read(&mut part).map_err(generic)?;
                if count == 0 {
                    break;
                }
                if let Err(cause) = writer.write_all(&part[..count]).await {
                    // Nothing of it becomes visible.
                    let _ = writer.abort().await;
                    return Err(generic(cause));
                }
            }
            writer.shutdown().await.map_err(generic)
        };
        self.within("write", name, self.limits.transfer, putting).await
    }

    /// Reads a blob of at most `most` bytes.
    ///
    /// # Errors
    /// When it is not there or larger, the store fails or the deadline passes.
    pub async fn get_bytes(&self, name: &str, most: u64) -> Result<Vec<u8>, BlobError> {
        let size = self.size(name).await?;
        if size > most {
            let (store, name) = (self.location.to_string(), name.to_owned());
            return Err(BlobError::TooLarge { store, name, actual: size, most });
        }
        let path = self.path(name)?;
        let getting = async { self.inner.get(&path).await?.bytes().await };
        Ok(self.within("read", name, self.limits.transfer, getting).await?.to_vec())
    }

    /// Reads part of a blob.
    ///
    /// # Errors
    /// When it is not there, the store fails or the deadline passes.
    pub async fn get_range(&self, name: &str, range: Range<u64>) -> Result<Bytes, BlobError> {
        let path = self.path(name)?;
        let getting = async { self.inner.get_range(&path, range).await };
        self.within("read", name, self.limits.transfer, getting).await
    }

    /// Size in bytes.
    ///
    /// # Errors
    /// When it is not there, the store fails or the deadline passes.
    pub async fn size(&self, name: &str) -> Result<u64, BlobError> {
        let path = self.path(name)?;
        let asking = async { self.inner.head(&path).await };
        Ok(self.within("look at", name, self.limits.call, asking).await?.size)
    }

    /// Reads a blob into a local file, which appears when it is whole and has the digest expected (hex).
    ///
    /// # Errors
    /// When it is not there or another, the store fails or the deadline passes.
    pub async fn fetch_file(&self, name: &str, to: &Path, sha256: Option<&str>) -> Result<(), BlobError> {
        let path = self.path(name)?;
        let local = |cause| BlobError::Local { path: to.to_owned(), cause };
        let folder = to.parent().unwrap_or(Path::new("."));
        let mut file = tempfile::Builder::new().prefix(".partial-").tempfile_in(folder).map_err(local)?;
        let mut hasher = Sha256::new();
        let opening = async { self.inner.get(&path).await };
        let mut stream = self.within("read", name, self.limits.call, opening).await?.into_stream();
        loop {
            let next = async { stream.next().await.transpose() };
            let Some(part) = self.within("read", name, self.limits.transfer, next).await? else { break };
            hasher.update(&part);
            file.write_all(&part).map_err(local)?;
        }
        let actual = hex(&hasher.finalize());
        if let Some(expected) = sha256.filter(|expected| !expected.eq_ignore_ascii_case(&actual)) {
            return Err(BlobError::WrongDigest {
                store: self.location.to_string(),
                name: name.to_owned(),
                actual,
                expected: expected.to_owned(),
            });
        }
        file.as_file().sync_all().map_err(local)?;
        file.persist(to).map_err(|error| local(error.error))?;
        Ok(())
    }

    /// Names of all blobs below `folder`, relative to the store, in order.
    ///
    /// # Errors
    /// When the store fails or the deadline passes.
    pub async fn list(&self, folder: &str) -> Result<Vec<String>, BlobError> {
        let path = self.path(folder)?;
        let listing = async { self.inner.list(Some(&path)).try_collect::<Vec<_>>().await };
        let found = self.within("list", folder, self.limits.call, listing).await?;
        let mut names: Vec<String> = found.into_iter().map(|blob| blob.location.to_string()).collect();
        names.sort();
        Ok(names)
    }

    /// Removes all blobs below `folder`; none is no error.
    ///
    /// # Errors
    /// When the store fails or the deadline passes.
    pub async fn delete_folder(&self, folder: &str) -> Result<(), BlobError> {
        for name in self.list(folder).await? {
            let path = BlobPath::from(name.as_str());
            let deleting = async {
                match self.inner.delete(&path).await {
                    Err(object_store::Error::NotFound { .. }) => Ok(()),
                    other => other,
                }
            };
            self.within("delete", &name, self.limits.call, deleting).await?;
        }
        if let Location::Folder(root) = &self.location {
            // What is left are empty folders; S3 has none.
            let _ = std::fs::remove_dir_all(root.join(folder));
        }
        Ok(())
    }

    fn path(&self, name: &str) -> Result<BlobPath, BlobError> {
        match name_problem(name) {
            None => Ok(BlobPath::from(name)),
            Some(problem) => Err(BlobError::BadName {
                store: self.location.to_string(),
                name: name.chars().take(100).collect(),
                problem,
            }),
        }
    }

    async fn within<T>(
        &self,
        doing: &'static str,
        name: &str,
        deadline: Duration,
        work: impl Future<Output = Result<T, object_store::Error>>,
    ) -> Result<T, BlobError> {
        let (store, name) = (self.location.to_string(), name.to_owned());
        match tokio::time::timeout(deadline, work).await {
            Ok(Ok(done)) => Ok(done),
            Ok(Err(object_store::Error::NotFound { .. })) => Err(BlobError::Missing { store, name }),
            Ok(Err(cause)) => Err(BlobError::Failed { store, name, doing, cause }),
            Err(_) => Err(BlobError::Deadline { store, name, doing, after: deadline }),
        }
    }
}

/// Servers of S3 within a cluster, and those of tests, often speak plain HTTP.
fn allows_http() -> bool {
    std::env::var("AWS_ALLOW_HTTP").is_ok_and(|value| value.eq_ignore_ascii_case("true") || value == "1")
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        // Writing to a String cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}
