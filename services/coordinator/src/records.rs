//! What the coordinator writes into its store, and reads back after a start: runs, events, masks, averages.

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use model_spec::{LayerSpec, ModelSpec};
use prost::Message;
use pruning::KeepMask;
use pruning_run::{CheckpointRef, Decision, Generation, RunEvent, RunEventKind, RunId};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use wire::{RunSpec, Violations, pb};

/// Why something that was stored cannot be read.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RecordError {
    #[error("{what} cannot be read; it was written by another version or is damaged: {cause}")]
    Unreadable { what: &'static str, cause: String },
    #[error("{what} cannot be encoded: {cause}")]
    Unwritable { what: &'static str, cause: String },
}

/// A run as it was created: all that is fixed about it.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct StoredRun {
    pub(crate) spec: RunSpec,
    pub(crate) plan: pb::RunPlan,
    /// Dimensions of the model, so that a run can be shown when its folder is gone.
    pub(crate) dense: ModelSpec,
    pub(crate) fork: Option<Fork>,
}

/// Where a run was forked from another.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Fork {
    pub(crate) run_id: RunId,
    pub(crate) generation: Generation,
    pub(crate) checkpoint: CheckpointRef,
    pub(crate) stop_pruning: bool,
}

/// The JSON of a [`StoredRun`]; messages are in base64, since their fields may grow.
#[derive(Serialize, Deserialize)]
struct RunJson {
    spec: String,
    plan: String,
    dense: ModelSpec,
    #[serde(default)]
    fork: Option<Fork>,
}

impl StoredRun {
    pub(crate) fn encode(&self) -> Result<Vec<u8>, RecordError> {
        let spec = wire::convert::run::to_pb(&self.spec).encode_to_vec();
        json(
            "a run",
            &RunJson {
                spec: BASE64_STANDARD.encode(spec),
                plan: BASE64_STANDARD.encode(self.plan.encode_to_vec()),
                dense: self.dense.clone(),
                fork: self.fork.clone(),
            },
        )
    }

    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, RecordError> {
        const WHAT: &str = "a run";
        let read: RunJson = from_json(WHAT, bytes)?;
        let unreadable = |cause: String| RecordError::Unreadable { what: WHAT, cause };
        let message =
            |text: &str| BASE64_STANDARD.decode(text).map_err(|error| unreadable(error.to_string()));
        let spec = pb::RunSpec::decode(message(&read.spec)?.as_slice())
            .map_err(|error| unreadable(error.to_string()))?;
        let plan = pb::RunPlan::decode(message(&read.plan)?.as_slice())
            .map_err(|error| unreadable(error.to_string()))?;
        let mut found = Violations::default();
        let spec = wire::convert::run::from_pb(Some(spec), "spec", &mut found);
        let spec = found.finish(spec).map_err(|error| unreadable(error.to_string()))?;
        Ok(Self { spec, plan, dense: read.dense, fork: read.fork })
    }
}

/// An event as it is stored and shown. The mask of a decision is kept apart: it can have millions of indices.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct StoredEvent {
    pub(crate) event: RunEvent,
    /// Of a decision, by layer.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) widths: Vec<LayerSpec>,
}

impl StoredEvent {
    pub(crate) fn of(event: &RunEvent) -> Self {
        match &event.kind {
            RunEventKind::Decision(decision) => {
                let widths = decision.widths();
                let bare =
                    Decision { keep_mask: KeepMask { layers: Vec::new() }, ..decision.as_ref().clone() };
                let kind = RunEventKind::Decision(Arc::new(bare));
                Self { event: RunEvent { kind, ..event.clone() }, widths }
            }
            RunEventKind::StateChange { .. }
            | RunEventKind::Step(_)
            | RunEventKind::Evaluation(_)
            | RunEventKind::Task(_)
            | RunEventKind::Export(_)
            | RunEventKind::Checkpoint(_)
            | RunEventKind::Restart(_)
            | RunEventKind::Guard(_)
            | RunEventKind::Calibration(_) => Self { event: event.clone(), widths: Vec::new() },
        }
    }

    /// The event with the mask that it decided.
    pub(crate) fn with_mask(self, keep_mask: Option<KeepMask>) -> RunEvent {
        match (self.event.kind, keep_mask) {
            (RunEventKind::Decision(decision), Some(keep_mask)) => {
                let whole = Decision { keep_mask, ..decision.as_ref().clone() };
                RunEvent { kind: RunEventKind::Decision(Arc::new(whole)), ..self.event }
            }
            (kind, _) => RunEvent { kind, ..self.event },
        }
    }

    pub(crate) fn encode(&self) -> Result<Vec<u8>, RecordError> {
        json("an event", self)
    }

    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, RecordError> {
        from_json("an event", bytes)
    }
}

/// What a checkpoint consists of.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct CheckpointManifest {
    pub(crate) place: CheckpointRef,
    /// The coordinator's own part.
    pub(crate) state: ManifestFile,
    /// By tensor-parallel rank.
    pub(crate) shards: Vec<ManifestFile>,
}

/// A file of a checkpoint.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct ManifestFile {
    pub(crate) file: String,
    pub(crate) sha256: String,
    pub(crate) size_bytes: u64,
}

/// The JSON of a [`CheckpointManifest`].
#[derive(Serialize, Deserialize)]
struct ManifestJson {
    format_version: u32,
    place: CheckpointRef,
    state: ManifestFile,
    shards: Vec<ManifestFile>,
}

const MANIFEST_VERSION: u32 = 1;

impl CheckpointManifest {
    pub(crate) fn encode(&self) -> Result<Vec<u8>, RecordError> {
        let Self { place, state, shards } = self.clone();
        json("a manifest", &ManifestJson { format_version: MANIFEST_VERSION, place, state, shards })
    }

    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, RecordError> {
        const WHAT: &str = "a checkpoint's manifest";
        let ManifestJson { format_version, place, state, shards } = from_json(WHAT, bytes)?;
        if format_version != MANIFEST_VERSION {
            let cause = format!("it has version {format_version}, expected {MANIFEST_VERSION}");
            return Err(RecordError::Unreadable { what: WHAT, cause });
        }
        Ok(Self { place, state, shards })
    }
}

fn json<T: Serialize>(what: &'static str, value: &T) -> Result<Vec<u8>, RecordError> {
    serde_json::to_vec(value).map_err(|error| RecordError::Unwritable { what, cause: error.to_string() })
}

fn from_json<T: DeserializeOwned>(what: &'static str, bytes: &[u8]) -> Result<T, RecordError> {
    serde_json::from_slice(bytes).map_err(|error| RecordError::Unreadable { what, cause: error.to_string() })
}

/// Raised when the layout of what is packed changes; a reader refuses other values.
const PACKED_VERSION: u8 = 1;

/// Bulk numbers, such as masks and averages: a byte of version, then postcard.
pub(crate) fn pack<T: Serialize>(what: &'static str, value: &T) -> Result<Vec<u8>, RecordError> {
    postcard::to_extend(value, vec![PACKED_VERSION])
        .map_err(|error| RecordError::Unwritable { what, cause: error.to_string() })
}

pub(crate) fn unpack<T: DeserializeOwned>(what: &'static str, bytes: &[u8]) -> Result<T, RecordError> {
    let unreadable = |cause: String| RecordError::Unreadable { what, cause };
    match bytes.split_first() {
        Some((&PACKED_VERSION, packed)) => {
            postcard::from_bytes(packed).map_err(|error| unreadable(error.to_string()))
        }
        Some((version, _)) => Err(unreadable(format!("it has version {version}, expected {PACKED_VERSION}"))),
        None => Err(unreadable("it is empty".to_owned())),
    }
}
