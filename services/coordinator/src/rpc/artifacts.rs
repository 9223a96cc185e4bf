//! ListArtifacts and DownloadArtifact: the files that a run has exported.

use super::run_service::Runs;
use crate::run_book::RunRecord;
use checkpoint::{ExportManifest, Sha256Digest, digest_file};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;
use wire::pb;
use wire::status::{Failure, Reason, chain};

/// Bytes of a file in one message.
const CHUNK_BYTES: usize = 256 << 10;
const BUFFER: usize = 4;

/// What a run has exported.
#[derive(Debug)]
struct Exported {
    folder: PathBuf,
    artifacts: Vec<pb::Artifact>,
}

impl Runs {
    pub(super) async fn artifacts(&self, id: &str) -> Result<Vec<pb::Artifact>, Failure> {
        let record = self.find(id)?;
        Ok(self.exported(&record).await?.artifacts)
    }

    async fn exported(&self, record: &Arc<RunRecord>) -> Result<Exported, Failure> {
        let Some(export) = record.shown().export else {
            let message = format!("run `{}` has not exported a model yet", record.id);
            return Err(Failure::new(Reason::RunNotReady, message));
        };
        self.check(move |context| {
            let lost = |problem: String| Failure::new(Reason::DataLoss, problem);
            let folder = context.roots.input_folder(&export.path).map_err(|error| lost(chain(&error)))?;
            let artifacts = files_of(&folder).map_err(lost)?;
            Ok(Exported { folder, artifacts })
        })
        .await
    }

    pub(super) async fn download(
        &self,
        request: pb::DownloadArtifactRequest,
    ) -> Result<ReceiverStream<Result<pb::DownloadArtifactResponse, Status>>, Failure> {
        let pb::DownloadArtifactRequest { id, name, offset } = request;
        let record = self.find(&id)?;
        let Exported { folder, artifacts } = self.exported(&record).await?;
        let Some(artifact) = artifacts.into_iter().find(|artifact| artifact.name == name) else {
            let shown: String = name.chars().take(64).collect();
            let message = format!("run `{}` has exported no file `{shown}`", record.id);
            return Err(Failure::new(Reason::ArtifactNotFound, message));
        };
        if offset > artifact.size_bytes {
            let problem = format!("must not exceed the file's {} bytes; got {offset}", artifact.size_bytes);
            return Err(Failure::invalid_field("offset", problem));
        }
        let (sender, receiver) = mpsc::channel(BUFFER);
        tokio::task::spawn_blocking(move || {
            if let Err(failure) = send_file(&folder.join(&artifact.name), artifact, offset, &sender) {
                let _ = sender.blocking_send(Err(failure.into()));
            }
        });
        Ok(ReceiverStream::new(receiver))
    }
}

/// The plain files of an exported folder, by name, with the digests of its manifest where that has them.
fn files_of(folder: &Path) -> Result<Vec<pb::Artifact>, String> {
    let unreadable = |error: std::io::Error| format!("`{}` cannot be read: {error}", folder.display());
    let known: BTreeMap<String, (u64, Sha256Digest)> = ExportManifest::read(folder)
        .map(|manifest| {
            manifest.files.into_iter().map(|file| (file.name, (file.size_bytes, file.sha256))).collect()
        })
        .unwrap_or_default();
    let mut artifacts = Vec::new();
    for entry in folder.read_dir().map_err(unreadable)? {
        let entry = entry.map_err(unreadable)?;
        if !entry.file_type().map_err(unreadable)?.is_file() {
            continue;
        }
        let name = entry.file_name().to_string_lossy().into_owned();
        let (size_bytes, sha256) = match known.get(&name) {
            Some(known) => *known,
            None => digest_file(&entry.path()).map_err(unreadable)?,
        };
        artifacts.push(pb::Artifact { name, size_bytes, sha256: sha256.to_string() });
    }
    if let Some(name) = known.keys().find(|name| !artifacts.iter().any(|artifact| artifact.name == **name)) {
        return Err(format!("`{name}` is missing in `{}`; export the run again", folder.display()));
    }
    artifacts.sort_by(|one, other| one.name.cmp(&other.name));
    Ok(artifacts)
}

/// Sends a file from `offset` on. All of it is digested, so that a file that was changed is noticed at its end.
fn send_file(
    path: &Path,
    artifact: pb::Artifact,
    offset: u64,
    sender: &mpsc::Sender<Result<pb::DownloadArtifactResponse, Status>>,
) -> Result<(), Failure> {
    use sha2::{Digest, Sha256};
    let lost = |problem: String| Failure::new(Reason::DataLoss, problem);
    let unreadable = |error: std::io::Error| lost(format!("`{}` cannot be read: {error}", artifact.name));
    let mut file = File::open(path).map_err(unreadable)?;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; CHUNK_BYTES];
    let mut place = 0_u64;
    let mut first = Some(artifact.clone());
    loop {
        let count = file.read(&mut buffer).map_err(unreadable)?;
        hasher.update(&buffer[..count]);
        let skipped = usize::try_from(offset.saturating_sub(place)).unwrap_or(usize::MAX).min(count);
        place += count as u64;
        let ends = count == 0;
        if place > artifact.size_bytes
            || (ends && (place != artifact.size_bytes || hex(&hasher.clone().finalize()) != artifact.sha256))
        {
            return Err(lost(format!("`{}` is not what was exported; export the run again", artifact.name)));
        }
        if skipped < count || (ends && first.is_some()) {
            let message = pb::DownloadArtifactResponse {
                offset: place - (count - skipped) as u64,
                data: buffer[skipped..count].to_vec().into(),
                artifact: first.take(),
            };
            if sender.blocking_send(Ok(message)).is_err() {
                return Ok(());
            }
        }
        if ends {
            return Ok(());
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::new(), |mut text, byte| {
        // Writing to a String cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}
