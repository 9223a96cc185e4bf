use crate::{ExportResult, Generation, SavedState, WorkerId};
use model_spec::Projection;
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use std::time::Duration;

/// What can happen to a run: outcomes of its effects, and the world breaking in.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Event {
    /// The run is still queued: `idle` of `registered` workers could take it, after the `ahead` runs before it.
    WorkersShort { idle: usize, registered: usize, ahead: usize },
    /// A whole group was taken, by tensor-parallel rank.
    WorkersAssigned { workers: Vec<WorkerId> },
    /// A rank has loaded its shard.
    Loaded { tp_rank: usize, data_sha256: String },
    /// Rank 0 has opened the meeting point.
    RendezvousOpened { rendezvous: Vec<u8> },
    /// A rank's communicator stands.
    Joined { tp_rank: usize },
    /// Some raw group sums of one projection.
    ///
    /// The values are of the units that this rank holds under `generation`, ascending, from place `first_unit` of that
    /// list on.
    Scores {
        tp_rank: usize,
        step: u64,
        generation: Generation,
        layer: usize,
        projection: Projection,
        first_unit: usize,
        values: Vec<f64>,
    },
    /// A rank has ended a step; all of the step's scores came before.
    StepEnded { tp_rank: usize, report: RankReport },
    /// A rank's stream of steps has ended in good order.
    TrainEnded { tp_rank: usize },
    /// A rank has made the passes that a decision is calibrated on.
    Calibrated { tp_rank: usize, generation: Generation, found: CalibrationFound, duration: Duration },
    /// A rank has put a decision into force.
    MaskApplied { tp_rank: usize, generation: Generation },
    /// A rank has measured the held-out text.
    Evaluated {
        tp_rank: usize,
        window_index: usize,
        negative_log_likelihood: f64,
        predicted_tokens: u64,
        window_tokens: u32,
        duration: Duration,
    },
    /// A rank has measured a task.
    TaskEvaluated { tp_rank: usize, task_index: usize, score: TaskScore, duration: Duration },
    /// A rank has copied its state aside for checkpoint `name` and can go on.
    Snapshotted { tp_rank: usize, name: String },
    /// A rank has written its copy for checkpoint `name`.
    Checkpointed { tp_rank: usize, name: String, shard: ShardFile },
    /// A rank could not write its copy, or the coordinator its own part: checkpoint `name` will never be. A rank that
    /// has not yet answered `Snapshotted`, and never will, fails as a whole: `RankFailed`.
    CheckpointFailed { name: String, cause: String },
    /// All files of checkpoint `name` are in the store, the manifest last.
    CheckpointWritten { name: String, size_bytes: u64 },
    /// A checkpoint was read back.
    Restored { state: Arc<SavedState> },
    /// A checkpoint cannot be read; `damaged` ones never will be.
    RestoreFailed { cause: String, damaged: bool },
    /// All sessions have ended and their memory is free.
    SessionsAborted,
    /// The result is written and checked.
    Exported { result: ExportResult },
    /// A call to a rank failed, or its deadline passed.
    RankFailed { tp_rank: usize, fault: Fault },
    /// A worker's lease ran out, or it came back as another process.
    WorkerLost { worker: WorkerId, cause: String },
    /// The coordinator itself cannot go on, for instance because its disk is full.
    CoordinatorFailed { cause: String },
    /// Someone asked for the end, at once where `discard` is set, else after a checkpoint.
    CancelRequested { reason: String, discard: bool },
    /// Someone asked the run to wait.
    PauseRequested { reason: String },
    /// Someone asked a paused run to go on.
    ResumeRequested { reason: String },
    /// The workers are needed back, after a checkpoint. The run then queues again, or rests until the coordinator's next
    /// start.
    YieldRequested { reason: String, requeue: bool },
    /// The time asked for with [`crate::Effect::WakeAt`] has come.
    Woken,
}

/// Why a call to a rank failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Fault {
    /// The rank's own; another try may do better.
    Own(String),
    /// The rank's own, and any other try would end alike, as with a file that is not there.
    Lasting(String),
    /// A peer did not answer it: some other rank is to blame.
    PeerLost(String),
}

/// What one rank says of one step.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RankReport {
    pub step: u64,
    pub loss: f64,
    pub grad_norm: f64,
    pub learning_rate: f64,
    pub tokens: u64,
    pub duration: Duration,
    pub score_duration: Duration,
    pub memory_bytes: u64,
    pub generation: Generation,
    /// Why the optimizer took no step; empty when it did.
    pub skipped: String,
}

/// What passes over calibration windows have found; the same on every rank.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct CalibrationFound {
    /// One score for each block, where blocks go; the lowest go first.
    pub block_scores: Vec<f64>,
    /// Blocks in the order in which they go, where each was judged without those before it.
    pub block_order: Vec<usize>,
}

/// One rank's measurement of a task.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TaskScore {
    /// Name of the task.
    pub task: String,
    /// Rows.
    pub count: u64,
    /// Rows whose likeliest choice is the right one.
    pub correct: u64,
    /// The same by log-likelihoods divided by the choices' characters; absent where contexts are compared.
    pub correct_normalized: Option<u64>,
    /// Sum over all choices of all rows, in nats.
    pub log_likelihood: f64,
    /// Tokens that went through the model.
    pub tokens: u64,
    /// Of each choice, row by row; empty unless asked for.
    pub log_likelihoods: Vec<f64>,
}

/// One rank's checkpoint file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShardFile {
    /// Name within the checkpoint folder.
    pub file: String,
    /// SHA-256 in hex.
    pub sha256: String,
    pub size_bytes: u64,
}
