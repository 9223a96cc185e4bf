//! What outlives the process: runs and their events in the run store, checkpoints in the blob store.

use crate::records::{CheckpointManifest, ManifestFile, RecordError, StoredEvent, StoredRun, pack, unpack};
use blob_store::{BlobError, BlobStore};
use pruning::{KeepMask, LayerKeep, MovingAverage};
use pruning_run::{
    CheckpointRef, ExportResult, Generation, History, RunEvent, RunEventKind, RunId, SavedState,
};
use run_store::{
    AuditEntry, Created, NewRun, RunStore, StoreError, StoredCheckpoint, StoredDecision, StoredRunRow,
};
use sha2::{Digest, Sha256};
use std::collections::BTreeSet;
use std::time::Duration;
use tracing::warn;
use wire::status::{Failure, Reason};

/// The coordinator's own part of a checkpoint.
const STATE_FILE: &str = "coordinator.bin";
/// Written last: a checkpoint without it does not exist.
const MANIFEST_FILE: &str = "manifest.json";
const MOST_MANIFEST_BYTES: u64 = 16 << 20;
const MOST_STATE_BYTES: u64 = 1 << 30;
const EVENT_PAGE: u32 = 1000;
/// How often a coordinator that writes nothing looks whether the store is still its own.
const FENCE_CHECK: Duration = Duration::from_secs(2);

/// Why something was not stored or found.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StoresError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Blob(#[from] BlobError),
    #[error(transparent)]
    Record(#[from] RecordError),
    #[error("the checkpoint `{name}` is of another run or another place")]
    OtherCheckpoint { name: String },
}

impl StoresError {
    /// Whether what was stored is at fault, so that reading it again cannot help.
    pub(crate) fn is_damage(&self) -> bool {
        match self {
            Self::Store(_) => false,
            Self::Blob(error) => error.is_damage(),
            Self::Record(_) | Self::OtherCheckpoint { .. } => true,
        }
    }
}

/// Both stores.
#[derive(Debug, Clone)]
pub(crate) struct Stores {
    runs: RunStore,
    blobs: BlobStore,
}

/// A run that is to be stored.
pub(crate) struct Creation<'a> {
    pub(crate) id: &'a RunId,
    pub(crate) request_id: Option<&'a str>,
    /// What the request asked for, to tell it from another under the same id.
    pub(crate) request: &'a [u8],
    pub(crate) create_time: std::time::SystemTime,
    pub(crate) run: &'a StoredRun,
    pub(crate) events: &'a [RunEvent],
}

/// Events to be appended, with what comes with them.
pub(crate) struct Append<'a> {
    pub(crate) run_id: &'a RunId,
    pub(crate) events: &'a [RunEvent],
    /// What the one decision among the events was made on.
    pub(crate) importance: Option<&'a MovingAverage>,
}

impl Stores {
    pub(crate) fn new(runs: RunStore, blobs: BlobStore) -> Self {
        Self { runs, blobs }
    }

    pub(crate) async fn create(&self, creation: &Creation<'_>) -> Result<Created, StoresError> {
        let mut decisions = Vec::new();
        for event in creation.events {
            decisions.extend(decision_row(event, None)?);
        }
        let events = creation.events.iter().map(|event| StoredEvent::of(event).encode());
        let new = NewRun {
            id: creation.id.0.clone(),
            request_id: creation.request_id.map(str::to_owned),
            request_digest: Sha256::digest(creation.request).to_vec(),
            create_time: creation.create_time,
            record: creation.run.encode()?,
            events: events.collect::<Result<_, _>>()?,
            decisions,
        };
        match self.runs.create_run(&new).await {
            // It may have happened all the same: then this says so.
            Err(error) if error.may_pass() => Ok(self.runs.create_run(&new).await?),
            other => Ok(other?),
        }
    }

    /// Notes what was exported after a run's end.
    pub(crate) async fn set_late_export(
        &self,
        run_id: &RunId,
        result: &ExportResult,
    ) -> Result<(), StoresError> {
        let payload = serde_json::to_vec(result)
            .map_err(|error| RecordError::Unwritable { what: "an export", cause: error.to_string() })?;
        Ok(self.runs.set_late_export(&run_id.0, &payload).await?)
    }

    /// Notes calls that changed something.
    pub(crate) async fn audit(&self, entries: &[AuditEntry]) -> Result<(), StoresError> {
        Ok(self.runs.audit(entries).await?)
    }

    /// Stores events for good. At most one of them may be a decision, and one a checkpoint.
    pub(crate) async fn append(&self, append: &Append<'_>) -> Result<(), StoresError> {
        let Some(first) = append.events.first() else { return Ok(()) };
        let mut decision = None;
        let mut checkpoint = None;
        let mut payloads = Vec::with_capacity(append.events.len());
        for event in append.events {
            if let Some(row) = decision_row(event, append.importance)? {
                decision = Some(row);
            }
            if let RunEventKind::Checkpoint(done) = &event.kind {
                checkpoint = Some(StoredCheckpoint {
                    name: done.place.name.clone(),
                    steps_done: done.place.steps_done,
                    generation: done.place.generation.0,
                    payload: serde_json::to_vec(&done.place).map_err(|error| RecordError::Unwritable {
                        what: "a checkpoint",
                        cause: error.to_string(),
                    })?,
                });
            }
            payloads.push(StoredEvent::of(event).encode()?);
        }
        let run_id = &append.run_id.0;
        self.runs.append(run_id, first.revision, &payloads, decision.as_ref(), checkpoint.as_ref()).await?;
        Ok(())
    }

    /// Up to `limit` events past `after_revision`.
    pub(crate) async fn events(
        &self,
        run_id: &RunId,
        after_revision: u64,
        limit: u32,
    ) -> Result<Vec<StoredEvent>, StoresError> {
        let rows = self.runs.events(&run_id.0, after_revision, limit).await?;
        Ok(rows.iter().map(|row| StoredEvent::decode(&row.payload)).collect::<Result<_, _>>()?)
    }

    /// All runs as they were created.
    pub(crate) async fn runs(&self) -> Result<Vec<StoredRunRow>, StoresError> {
        Ok(self.runs.runs().await?)
    }

    /// A run's events folded up, page by page handed to `seen` as they are shown.
    pub(crate) async fn history(
        &self,
        run_id: &RunId,
        mut seen: impl FnMut(StoredEvent),
    ) -> Result<History, StoresError> {
        let mut history = History::default();
        loop {
            let events = self.events(run_id, history.revision(), EVENT_PAGE).await?;
            let last = events.len() < EVENT_PAGE as usize;
            for stored in events {
                seen(stored.clone());
                let mask = match &stored.event.kind {
                    // One at a time: all of them can be gigabytes.
                    RunEventKind::Decision(decision) => self.keep_mask(run_id, decision.generation).await?,
                    RunEventKind::StateChange { .. }
                    | RunEventKind::Step(_)
                    | RunEventKind::Evaluation(_)
                    | RunEventKind::Task(_)
                    | RunEventKind::Export(_)
                    | RunEventKind::Checkpoint(_)
                    | RunEventKind::Restart(_)
                    | RunEventKind::Guard(_)
                    | RunEventKind::Calibration(_) => None,
                };
                history.take_in(&stored.with_mask(mask));
            }
            if last {
                return Ok(history);
            }
        }
    }

    /// What a decision keeps.
    pub(crate) async fn keep_mask(
        &self,
        run_id: &RunId,
        generation: Generation,
    ) -> Result<Option<KeepMask>, StoresError> {
        let row = self.runs.decision(&run_id.0, generation.0).await?;
        row.as_ref().map(mask_of).transpose()
    }

    /// What a decision was made on, where that was kept.
    pub(crate) async fn importance(
        &self,
        run_id: &RunId,
        generation: Generation,
    ) -> Result<Option<MovingAverage>, StoresError> {
        let bytes = self.runs.importance(&run_id.0, generation.0).await?;
        Ok(bytes.map(|bytes| unpack("importance", &bytes)).transpose()?)
    }

    /// Writes the coordinator's part of a checkpoint, then the manifest; returns the bytes of the whole.
    pub(crate) async fn commit(&self, place: &CheckpointRef, state: &SavedState) -> Result<u64, StoresError> {
        let packed = pack("a checkpoint", state)?;
        let size_bytes = packed.len() as u64;
        let sha256 = hex(&Sha256::digest(&packed));
        let file = |file: &str, sha256: String, size_bytes| ManifestFile {
            file: file.to_owned(),
            sha256,
            size_bytes,
        };
        let manifest = CheckpointManifest {
            place: place.clone(),
            state: file(STATE_FILE, sha256, size_bytes),
            shards: state
                .shards
                .iter()
                .map(|shard| file(&shard.file, shard.sha256.clone(), shard.size_bytes))
                .collect(),
        };
        self.blobs.put_bytes(&blob(place, STATE_FILE), packed).await?;
        self.blobs.put_bytes(&blob(place, MANIFEST_FILE), manifest.encode()?).await?;
        Ok(size_bytes + state.shards.iter().map(|shard| shard.size_bytes).sum::<u64>())
    }

    /// Reads the coordinator's part of a checkpoint back.
    pub(crate) async fn restore(&self, place: &CheckpointRef) -> Result<SavedState, StoresError> {
        let text = self.blobs.get_bytes(&blob(place, MANIFEST_FILE), MOST_MANIFEST_BYTES).await?;
        let manifest = CheckpointManifest::decode(&text)?;
        if manifest.place != *place {
            return Err(StoresError::OtherCheckpoint { name: place.name.clone() });
        }
        let name = blob(place, STATE_FILE);
        let packed = self.blobs.get_bytes(&name, MOST_STATE_BYTES).await?;
        let actual = hex(&Sha256::digest(&packed));
        if actual != manifest.state.sha256 {
            return Err(StoresError::Blob(BlobError::WrongDigest {
                store: self.blobs.location().to_string(),
                name,
                actual,
                expected: manifest.state.sha256,
            }));
        }
        let state: SavedState = unpack("a checkpoint", &packed)?;
        if state.steps_done != place.steps_done || state.generation != place.generation {
            return Err(StoresError::OtherCheckpoint { name: place.name.clone() });
        }
        Ok(state)
    }

    /// URL of the folder that the ranks write a checkpoint into.
    pub(crate) fn folder(&self, place: &CheckpointRef) -> String {
        self.blobs.location().join(&format!("{}/{}", place.run_id.0, place.name)).to_string()
    }

    /// Whether a checkpoint was kept.
    pub(crate) async fn checkpoints(&self, run_id: &RunId) -> Result<Vec<CheckpointRef>, StoresError> {
        let rows = self.runs.checkpoints(&run_id.0).await?;
        let place = |row: &StoredCheckpoint| {
            serde_json::from_slice(&row.payload)
                .map_err(|error| RecordError::Unreadable { what: "a checkpoint", cause: error.to_string() })
        };
        Ok(rows.iter().map(place).collect::<Result<_, _>>()?)
    }

    /// Removes the complete checkpoints of a run but `kept`: first from the list, then their files.
    pub(crate) async fn retain(&self, run_id: &RunId, kept: &[CheckpointRef]) -> Result<(), StoresError> {
        for place in self.checkpoints(run_id).await? {
            if !kept.contains(&place) {
                self.runs.remove_checkpoint(&run_id.0, &place.name).await?;
                self.blobs.delete_folder(&format!("{}/{}", run_id.0, place.name)).await?;
            }
        }
        Ok(())
    }

    /// Removes the files of checkpoints that are neither listed nor `kept`: what a crash has left. Nobody may be writing
    /// one for this run.
    pub(crate) async fn sweep(&self, run_id: &RunId, kept: &[CheckpointRef]) -> Result<(), StoresError> {
        let listed = self.checkpoints(run_id).await?;
        let known: BTreeSet<&str> = listed.iter().chain(kept).map(|place| place.name.as_str()).collect();
        for folder in self.blobs.folders(&run_id.0).await? {
            if known.contains(folder.as_str()) {
                continue;
            }
            self.blobs.delete_folder(&format!("{}/{folder}", run_id.0)).await?;
        }
        Ok(())
    }

    /// Forgets a run with its checkpoints.
    pub(crate) async fn delete(&self, run_id: &RunId) -> Result<(), StoresError> {
        self.runs.delete_run(&run_id.0).await?;
        if let Err(error) = self.blobs.delete_folder(&run_id.0).await {
            warn!(%run_id, error = %wire::status::chain(&error), "files of a deleted run are left");
        }
        Ok(())
    }

    /// Waits until another coordinator has opened the store.
    pub(crate) async fn taken_over(&self) {
        loop {
            tokio::time::sleep(FENCE_CHECK).await;
            if let Err(StoreError::Fenced) = self.runs.check().await {
                return;
            }
        }
    }

    pub(crate) async fn check(&self) -> Result<(), StoresError> {
        Ok(self.runs.check().await?)
    }

    pub(crate) async fn close(&self) {
        self.runs.close().await;
    }
}

pub(crate) fn store_failure(error: StoresError) -> Failure {
    let reason = if error.is_damage() { Reason::DataLoss } else { Reason::StoreFailed };
    Failure::from_error(reason, &error)
}

fn blob(place: &CheckpointRef, file: &str) -> String {
    format!("{}/{}/{file}", place.run_id.0, place.name)
}

fn mask_of(row: &StoredDecision) -> Result<KeepMask, StoresError> {
    let layers: Vec<LayerKeep> = unpack("a mask", &row.payload)?;
    Ok(KeepMask { layers })
}

fn decision_row(
    event: &RunEvent,
    importance: Option<&MovingAverage>,
) -> Result<Option<StoredDecision>, StoresError> {
    let RunEventKind::Decision(decision) = &event.kind else { return Ok(None) };
    Ok(Some(StoredDecision {
        generation: decision.generation.0,
        revision: event.revision,
        payload: pack("a mask", &decision.keep_mask.layers)?,
        importance: importance.map(|average| pack("importance", average)).transpose()?,
    }))
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::new(), |mut text, byte| {
        // Writing to a String cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}
