use crate::location::name_problem;
use crate::{BlobError, Location};
use bytes::Bytes;
use futures_util::stream::{self, FuturesUnordered};
use futures_util::{Stream, StreamExt, TryStreamExt};
use object_store::aws::AmazonS3Builder;
use object_store::local::LocalFileSystem;
use object_store::path::Path as BlobPath;
use object_store::prefix::PrefixStore;
use object_store::{
    BackoffConfig, ClientOptions, GetOptions, ObjectMeta, ObjectStore, ObjectStoreExt, RetryConfig,
    UploadPart,
};
use sha2::{Digest, Sha256};
use std::fmt::Write as _;
use std::future::Future;
use std::io::Write;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt};

/// What one request moves.
const PART_BYTES: u64 = 8 << 20;
/// Requests under way for one blob.
const AT_ONCE: usize = 4;
/// S3 takes 10000 parts: larger files are cut into larger ones.
const MOST_PARTS: u64 = 9000;

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
        Self::open_with(location, limits, std::iter::empty())
    }

    /// Opens a location as `open` does, with some of the `AWS_*` variables in place of those of the process.
    ///
    /// # Errors
    /// When the folder cannot be made, or the variables of S3 make no sense.
    pub fn open_with<'a>(
        location: &Location,
        limits: Limits,
        variables: impl IntoIterator<Item = (&'a str, &'a str)>,
    ) -> Result<Self, BlobError> {
        let open = |cause| BlobError::Open { store: location.to_string(), cause: Box::new(cause) };
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
                let mut settings =
                    AmazonS3Builder::from_env().with_client_options(client.with_allow_http(allows_http()));
                for (variable, value) in variables {
                    let key = variable.to_ascii_lowercase().parse().map_err(open)?;
                    settings = settings.with_config(key, value);
                }
                let bucket = settings.with_bucket_name(bucket).with_retry(retry).build().map_err(open)?;
                let prefix = BlobPath::parse(prefix).map_err(|cause| open(cause.into()))?;
                Arc::new(PrefixStore::new(bucket, prefix))
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
        let source = Source { size: bytes.len() as u64, file: None };
        self.put_from(name, source, bytes.as_slice()).await
    }

    /// Puts a file of this machine.
    ///
    /// # Errors
    /// When it cannot be read, the store fails or the deadline passes.
    pub async fn put_file(&self, name: &str, file: &Path) -> Result<(), BlobError> {
        let local = |cause| BlobError::Local { path: file.to_owned(), cause };
        let reader = tokio::fs::File::open(file).await.map_err(local)?;
        let size = reader.metadata().await.map_err(local)?.len();
        self.put_from(name, Source { size, file: Some(file) }, reader).await
    }

    async fn put_from(
        &self,
        name: &str,
        source: Source<'_>,
        mut reader: impl AsyncRead + Unpin,
    ) -> Result<(), BlobError> {
        let path = self.path(name)?;
        let part_bytes = PART_BYTES.max(source.size.div_ceil(MOST_PARTS));
        let first = source.read_part(&mut reader, part_bytes).await?;
        if (first.len() as u64) < part_bytes {
            let putting = async { self.inner.put(&path, first.into()).await };
            return self.within("write", name, self.limits.call, putting).await.map(drop);
        }
        let starting = async { self.inner.put_multipart(&path).await };
        let mut upload = self.within("write", name, self.limits.call, starting).await?;
        let failed = |cause| self.failed("write", name, cause);
        let putting = async {
            let mut under_way: FuturesUnordered<UploadPart> = FuturesUnordered::new();
            let mut part = first;
            while !part.is_empty() {
                if under_way.len() >= AT_ONCE
                    && let Some(done) = under_way.next().await
                {
                    done.map_err(failed)?;
                }
                under_way.push(upload.put_part(part.into()));
                part = source.read_part(&mut reader, part_bytes).await?;
            }
            while let Some(done) = under_way.next().await {
                done.map_err(failed)?;
            }
            upload.complete().await.map(drop).map_err(failed)
        };
        let done = self.in_time("write", name, self.limits.transfer, putting).await;
        if done.is_err() {
            // What has been sent was never visible; it only takes up room until it is given up.
            let _ = tokio::time::timeout(self.limits.call, upload.abort()).await;
        }
        done
    }

    /// Reads a blob of at most `most` bytes.
    ///
    /// # Errors
    /// When it is not there or larger, the store fails or the deadline passes.
    pub async fn get_bytes(&self, name: &str, most: u64) -> Result<Vec<u8>, BlobError> {
        let path = self.path(name)?;
        let reading = async {
            let found = self.look(name, &path).await?;
            if found.size > most {
                let (store, name) = (self.location.to_string(), name.to_owned());
                return Err(BlobError::TooLarge { store, name, actual: found.size, most });
            }
            let mut parts = pin!(self.parts(name, &path, &found));
            let mut bytes = Vec::new();
            while let Some(part) = parts.next().await {
                bytes.extend_from_slice(&part?);
            }
            Ok(bytes)
        };
        self.in_time("read", name, self.limits.transfer, reading).await
    }

    /// Reads a small part of a blob.
    ///
    /// # Errors
    /// When it is not there, the store fails or the deadline passes.
    pub async fn get_range(&self, name: &str, range: Range<u64>) -> Result<Bytes, BlobError> {
        let path = self.path(name)?;
        let getting = async { self.inner.get_range(&path, range).await };
        self.within("read", name, self.limits.call, getting).await
    }

    /// Size in bytes.
    ///
    /// # Errors
    /// When it is not there, the store fails or the deadline passes.
    pub async fn size(&self, name: &str) -> Result<u64, BlobError> {
        let path = self.path(name)?;
        Ok(self.look(name, &path).await?.size)
    }

    async fn look(&self, name: &str, path: &BlobPath) -> Result<ObjectMeta, BlobError> {
        let asking = async { self.inner.head(path).await };
        self.within("look at", name, self.limits.call, asking).await
    }

    /// The bytes of a blob as it was `found`, in order. Each part is a request with a deadline of its own: the time of one
    /// request does not bound the size of what can be read.
    fn parts(
        &self,
        name: &str,
        path: &BlobPath,
        found: &ObjectMeta,
    ) -> impl Stream<Item = Result<Bytes, BlobError>> {
        let starts = (0..found.size).step_by(PART_BYTES as usize);
        let ranges: Vec<Range<u64>> = starts.map(|start| start..found.size.min(start + PART_BYTES)).collect();
        let requests = ranges.into_iter().map(move |range| async move {
            let options = GetOptions {
                range: Some(range.into()),
                if_match: found.e_tag.clone(),
                ..GetOptions::default()
            };
            let getting = async { self.inner.get_opts(path, options).await?.bytes().await };
            self.within("read", name, self.limits.call, getting).await
        });
        stream::iter(requests).buffered(AT_ONCE)
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
        let reading = async {
            let found = self.look(name, &path).await?;
            let mut parts = pin!(self.parts(name, &path, &found));
            while let Some(part) = parts.next().await {
                let part = part?;
                hasher.update(&part);
                file.write_all(&part).map_err(local)?;
            }
            Ok(())
        };
        self.in_time("read", name, self.limits.transfer, reading).await?;
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

    /// Names of the folders right below `folder`, in order; of a local one also those without a blob that is whole.
    ///
    /// # Errors
    /// When the store fails or the deadline passes.
    pub async fn folders(&self, folder: &str) -> Result<Vec<String>, BlobError> {
        let path = self.path(folder)?;
        let listing = async {
            match self.inner.list_with_delimiter(Some(&path)).await {
                Err(object_store::Error::NotFound { .. }) => Ok(Vec::new()),
                other => Ok(other?.common_prefixes),
            }
        };
        let found = self.within("list", folder, self.limits.call, listing).await?;
        let mut names: Vec<String> =
            found.iter().filter_map(|path| path.filename()).map(str::to_owned).collect();
        names.sort();
        Ok(names)
    }

    /// Removes all blobs below `folder`; none is no error.
    ///
    /// # Errors
    /// When the store fails or the deadline passes.
    pub async fn delete_folder(&self, folder: &str) -> Result<(), BlobError> {
        for name in self.list(folder).await? {
            let path = self.path(&name)?;
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

    /// The name as it is: what S3 advises against is not spelt in another way than in a local folder.
    fn path(&self, name: &str) -> Result<BlobPath, BlobError> {
        let bad = |problem| BlobError::BadName {
            store: self.location.to_string(),
            name: name.chars().take(100).collect(),
            problem,
        };
        match name_problem(name) {
            None => BlobPath::parse(name).map_err(|_| bad("it is not a plain relative path")),
            Some(problem) => Err(bad(problem)),
        }
    }

    fn failed(&self, doing: &'static str, name: &str, cause: object_store::Error) -> BlobError {
        let (store, name) = (self.location.to_string(), name.to_owned());
        if let object_store::Error::NotFound { .. } = cause {
            BlobError::Missing { store, name }
        } else {
            BlobError::Failed { store, name, doing, cause: Box::new(cause) }
        }
    }

    async fn within<T>(
        &self,
        doing: &'static str,
        name: &str,
        deadline: Duration,
        work: impl Future<Output = Result<T, object_store::Error>>,
    ) -> Result<T, BlobError> {
        let work = async { work.await.map_err(|cause| self.failed(doing, name, cause)) };
        self.in_time(doing, name, deadline, work).await
    }

    async fn in_time<T>(
        &self,
        doing: &'static str,
        name: &str,
        after: Duration,
        work: impl Future<Output = Result<T, BlobError>>,
    ) -> Result<T, BlobError> {
        let late = |_| {
            let (store, name) = (self.location.to_string(), name.to_owned());
            Err(BlobError::Deadline { store, name, doing, after })
        };
        tokio::time::timeout(after, work).await.unwrap_or_else(late)
    }
}

/// Where the bytes of a blob come from.
struct Source<'a> {
    size: u64,
    /// None: from memory.
    file: Option<&'a Path>,
}

impl Source<'_> {
    /// The next `part_bytes`, less only at the end.
    async fn read_part(
        &self,
        reader: &mut (impl AsyncRead + Unpin),
        part_bytes: u64,
    ) -> Result<Vec<u8>, BlobError> {
        let mut part = Vec::with_capacity(usize::try_from(part_bytes.min(self.size)).unwrap_or(0));
        let path = self.file.unwrap_or(Path::new("memory"));
        let local = |cause| BlobError::Local { path: path.to_owned(), cause };
        reader.take(part_bytes).read_to_end(&mut part).await.map_err(local)?;
        Ok(part)
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
