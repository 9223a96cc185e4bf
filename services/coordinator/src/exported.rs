//! The files of an exported model, on a disk or in an object store.

use crate::context::Context;
use crate::stores::hex;
use blob_store::{BlobError, BlobStore, Limits};
use bytes::Bytes;
use checkpoint::{ExportManifest, FileDigest, MANIFEST_FILE, digest_file};
use service_kit::{Location, Roots};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokio::io::AsyncReadExt;
use wire::pb;
use wire::status::{Failure, Reason, chain};

/// Bytes that are read at once.
const FILE_PART_BYTES: usize = 256 << 10;
const BLOB_PART_BYTES: u64 = 8 << 20;
const MOST_MANIFEST_BYTES: u64 = 256 << 20;

/// What a run has exported.
#[derive(Debug)]
pub(crate) struct Exported {
    place: Place,
    /// By name.
    pub(crate) artifacts: Vec<pb::Artifact>,
}

#[derive(Debug)]
enum Place {
    Folder(PathBuf),
    Bucket(Bucket),
}

/// A folder in an object store.
#[derive(Debug, Clone)]
struct Bucket {
    store: BlobStore,
    folder: String,
}

/// The bytes of one file, in order.
pub(crate) enum Source {
    File { file: tokio::fs::File, name: String },
    Blob { store: BlobStore, name: String, place: u64, size: u64 },
}

/// Why a folder is no place to write to, if it is none: it must not exist, or be empty. Blocks on the file system.
pub(crate) fn writing_problem(path: &str, roots: &Roots) -> Option<String> {
    match roots.output_url(path) {
        Err(refused) => Some(chain(&refused)),
        Ok(Location::Path(real)) => folder_problem(path, &real),
        Ok(Location::S3 { bucket, prefix }) => {
            let look = async {
                match Bucket::open(bucket, prefix)?.files().await {
                    Ok(files) if files.is_empty() => Ok(()),
                    Ok(_) => {
                        Err(format!("`{path}` is not empty; give a folder that does not exist or is empty"))
                    }
                    Err(error) => Err(chain(&error)),
                }
            };
            tokio::runtime::Handle::current().block_on(look).err()
        }
    }
}

fn folder_problem(path: &str, real: &Path) -> Option<String> {
    match real.read_dir().map(|mut entries| entries.next().is_none()) {
        Ok(true) => None,
        Ok(false) => Some(format!("`{path}` is not empty; give a folder that does not exist or is empty")),
        Err(cause) if cause.kind() == std::io::ErrorKind::NotFound => None,
        Err(cause) if cause.kind() == std::io::ErrorKind::NotADirectory => {
            Some(format!("`{path}` is not a folder"))
        }
        Err(cause) => Some(format!("`{path}` cannot be looked at: {cause}")),
    }
}

impl Exported {
    /// # Errors
    /// When the folder is not there any more, lacks files, or cannot be read.
    pub(crate) async fn open(context: &Arc<Context>, path: &str) -> Result<Self, Failure> {
        let (context, path) = (context.clone(), path.to_owned());
        let looking = tokio::task::spawn_blocking(move || -> Result<_, Failure> {
            let lost = |problem: String| Failure::new(Reason::DataLoss, problem);
            let located = context.roots.input_url(&path).map_err(|refused| lost(chain(&refused)))?;
            match located {
                Location::Path(folder) => {
                    let folder =
                        context.roots.input_folder(folder).map_err(|refused| lost(chain(&refused)))?;
                    let artifacts = files_of(&folder).map_err(lost)?;
                    Ok((Place::Folder(folder), artifacts))
                }
                Location::S3 { bucket, prefix } => {
                    let bucket = Bucket::open(bucket, prefix).map_err(lost)?;
                    Ok((Place::Bucket(bucket), Vec::new()))
                }
            }
        });
        let looked = looking.await.map_err(|error| Failure::from_error(Reason::Internal, &error))?;
        let (place, mut artifacts) = looked?;
        if let Place::Bucket(bucket) = &place {
            artifacts = bucket.artifacts().await?;
        }
        Ok(Self { place, artifacts })
    }

    /// # Errors
    /// When the file cannot be opened.
    pub(crate) async fn source(&self, artifact: &pb::Artifact) -> Result<Source, Failure> {
        let name = artifact.name.clone();
        match &self.place {
            Place::Folder(folder) => {
                let file = tokio::fs::File::open(folder.join(&name)).await;
                let file = file.map_err(|error| unreadable(&name, &error))?;
                Ok(Source::File { file, name })
            }
            Place::Bucket(bucket) => Ok(bucket.source(&name, artifact.size_bytes)),
        }
    }
}

impl Source {
    /// The bytes that follow; none at the end.
    pub(crate) async fn next(&mut self) -> Result<Bytes, Failure> {
        match self {
            Self::File { file, name } => {
                let mut part = vec![0; FILE_PART_BYTES];
                let count = file.read(&mut part).await.map_err(|error| unreadable(name, &error))?;
                part.truncate(count);
                Ok(part.into())
            }
            Self::Blob { place, size, .. } if *place >= *size => Ok(Bytes::new()),
            Self::Blob { store, name, place, size } => {
                let end = (*size).min(*place + BLOB_PART_BYTES);
                let part = store.get_range(name, *place..end).await.map_err(|error| blob_failure(&error))?;
                *place = end;
                Ok(part)
            }
        }
    }
}

impl Bucket {
    fn open(bucket: String, folder: String) -> Result<Self, String> {
        if folder.is_empty() {
            return Err(format!(
                "`s3://{bucket}` is a whole bucket; name a folder in it, as s3://{bucket}/NAME"
            ));
        }
        let whole = blob_store::Location::S3 { bucket, prefix: String::new() };
        let store = BlobStore::open(&whole, Limits::default()).map_err(|error| chain(&error))?;
        Ok(Self { store, folder })
    }

    /// Names right in the folder.
    async fn files(&self) -> Result<Vec<String>, BlobError> {
        let start = format!("{}/", self.folder);
        let names = self.store.list(&self.folder).await?;
        let files = names.iter().filter_map(|name| name.strip_prefix(&start));
        Ok(files.filter(|name| !name.contains('/')).map(str::to_owned).collect())
    }

    fn source(&self, name: &str, size: u64) -> Source {
        Source::Blob { store: self.store.clone(), name: format!("{}/{name}", self.folder), place: 0, size }
    }

    async fn artifacts(&self) -> Result<Vec<pb::Artifact>, Failure> {
        let manifest = format!("{}/{MANIFEST_FILE}", self.folder);
        let known = match self.store.get_bytes(&manifest, MOST_MANIFEST_BYTES).await {
            Ok(text) => known_files(ExportManifest::from_json(Path::new(&manifest), &text).ok()),
            Err(BlobError::Missing { .. }) => BTreeMap::new(),
            Err(error) => return Err(blob_failure(&error)),
        };
        let mut artifacts = Vec::new();
        for name in self.files().await.map_err(|error| blob_failure(&error))? {
            let (size_bytes, sha256) = match known.get(&name) {
                Some(file) => (file.size_bytes, file.sha256.to_string()),
                None => self.digest(&name).await?,
            };
            artifacts.push(pb::Artifact { name, size_bytes, sha256 });
        }
        let shown = format!("{}/{}", self.store.location(), self.folder);
        check_whole(&known, &artifacts, &shown).map_err(|problem| Failure::new(Reason::DataLoss, problem))?;
        Ok(artifacts)
    }

    async fn digest(&self, name: &str) -> Result<(u64, String), Failure> {
        let size = self.store.size(&format!("{}/{name}", self.folder)).await;
        let size = size.map_err(|error| blob_failure(&error))?;
        let (mut source, mut hasher) = (self.source(name, size), Sha256::new());
        loop {
            let part = source.next().await?;
            if part.is_empty() {
                return Ok((size, hex(&hasher.finalize())));
            }
            hasher.update(&part);
        }
    }
}

/// The plain files of an exported folder, by name, with the digests of its manifest where that has them.
fn files_of(folder: &Path) -> Result<Vec<pb::Artifact>, String> {
    let unreadable = |error: std::io::Error| format!("`{}` cannot be read: {error}", folder.display());
    let known = known_files(ExportManifest::read(folder).ok());
    let mut artifacts = Vec::new();
    for entry in folder.read_dir().map_err(unreadable)? {
        let entry = entry.map_err(unreadable)?;
        if !entry.file_type().map_err(unreadable)?.is_file() {
            continue;
        }
        let name = entry.file_name().to_string_lossy().into_owned();
        let (size_bytes, sha256) = match known.get(&name) {
            Some(file) => (file.size_bytes, file.sha256),
            None => digest_file(&entry.path()).map_err(unreadable)?,
        };
        artifacts.push(pb::Artifact { name, size_bytes, sha256: sha256.to_string() });
    }
    artifacts.sort_by(|one, other| one.name.cmp(&other.name));
    check_whole(&known, &artifacts, &folder.display().to_string())?;
    Ok(artifacts)
}

/// What a manifest says of the files beside it, by name.
fn known_files(manifest: Option<ExportManifest>) -> BTreeMap<String, FileDigest> {
    let files = manifest.into_iter().flat_map(|manifest| manifest.files);
    files.map(|file| (file.name.clone(), file)).collect()
}

fn check_whole(
    known: &BTreeMap<String, FileDigest>,
    artifacts: &[pb::Artifact],
    folder: &str,
) -> Result<(), String> {
    match known.keys().find(|name| !artifacts.iter().any(|artifact| artifact.name == **name)) {
        Some(name) => Err(format!("`{name}` is missing in `{folder}`; export the run again")),
        None => Ok(()),
    }
}

fn unreadable(name: &str, error: &std::io::Error) -> Failure {
    Failure::new(Reason::DataLoss, format!("`{name}` cannot be read: {error}"))
}

fn blob_failure(error: &BlobError) -> Failure {
    let reason = if error.is_damage() { Reason::DataLoss } else { Reason::StoreFailed };
    Failure::from_error(reason, error)
}
