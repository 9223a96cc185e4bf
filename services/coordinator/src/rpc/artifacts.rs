//! ListArtifacts and DownloadArtifact: the files that a run has exported.

use super::run_service::Runs;
use crate::exported::{Exported, Source};
use crate::run_book::RunRecord;
use crate::stores::hex;
use sha2::{Digest, Sha256};
use std::sync::Arc;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;
use wire::pb;
use wire::status::{Failure, Reason};

/// Most bytes of a file in one message.
const CHUNK_BYTES: usize = 256 << 10;
const BUFFER: usize = 4;

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
        Exported::open(&self.context, &export.path).await
    }

    pub(super) async fn download(
        &self,
        request: pb::DownloadArtifactRequest,
    ) -> Result<ReceiverStream<Result<pb::DownloadArtifactResponse, Status>>, Failure> {
        let pb::DownloadArtifactRequest { id, name, offset } = request;
        let record = self.find(&id)?;
        let exported = self.exported(&record).await?;
        let Some(artifact) = exported.artifacts.iter().find(|artifact| artifact.name == name).cloned() else {
            let shown: String = name.chars().take(64).collect();
            let message = format!("run `{}` has exported no file `{shown}`", record.id);
            return Err(Failure::new(Reason::ArtifactNotFound, message));
        };
        if offset > artifact.size_bytes {
            let problem = format!("must not exceed the file's {} bytes; got {offset}", artifact.size_bytes);
            return Err(Failure::invalid_field("offset", problem));
        }
        let source = exported.source(&artifact).await?;
        let (sender, receiver) = mpsc::channel(BUFFER);
        tokio::spawn(async move {
            if let Err(failure) = send(source, artifact, offset, &sender).await {
                let _ = sender.send(Err(failure.into())).await;
            }
        });
        Ok(ReceiverStream::new(receiver))
    }
}

/// Sends a file from `offset` on. All of it is digested, so that a file that was changed is noticed at its end.
async fn send(
    mut source: Source,
    artifact: pb::Artifact,
    offset: u64,
    sender: &mpsc::Sender<Result<pb::DownloadArtifactResponse, Status>>,
) -> Result<(), Failure> {
    let changed = || {
        let problem = format!("`{}` is not what was exported; export the run again", artifact.name);
        Failure::new(Reason::DataLoss, problem)
    };
    let mut hasher = Sha256::new();
    let mut place = 0_u64;
    let mut first = Some(artifact.clone());
    loop {
        let mut part = source.next().await?;
        let ends = part.is_empty();
        if place + part.len() as u64 > artifact.size_bytes
            || (ends && (place != artifact.size_bytes || hex(&hasher.clone().finalize()) != artifact.sha256))
        {
            return Err(changed());
        }
        loop {
            let chunk = part.split_to(part.len().min(CHUNK_BYTES));
            hasher.update(&chunk);
            let skipped =
                usize::try_from(offset.saturating_sub(place)).unwrap_or(usize::MAX).min(chunk.len());
            place += chunk.len() as u64;
            if skipped < chunk.len() || (ends && first.is_some()) {
                let data = chunk.slice(skipped..);
                let message = pb::DownloadArtifactResponse {
                    offset: place - data.len() as u64,
                    data,
                    artifact: first.take(),
                };
                if sender.send(Ok(message)).await.is_err() {
                    return Ok(());
                }
            }
            if part.is_empty() {
                break;
            }
        }
        if ends {
            return Ok(());
        }
    }
}
