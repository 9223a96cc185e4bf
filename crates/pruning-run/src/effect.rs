use crate::{CheckpointRef, Generation, RunEvent, SavedState, ShardFile};
use pruning::{KeepMask, MovingAverage};
use std::sync::Arc;
use std::time::SystemTime;

/// What must be done, in order. Effects that start a call are answered by events, or by a failure of their rank.
#[derive(Debug, Clone, PartialEq)]
pub enum Effect {
    /// Store and publish an event of the run's log. It comes before the effects that depend on it.
    Record(RunEvent),
    /// Keep what the decision that is recorded next was made on; both are stored together.
    KeepImportance { generation: Generation, importance: Arc<MovingAverage> },
    /// Wait in the queue for `workers` of them; `at_least` so many will do when no more come.
    Enqueue { workers: usize, at_least: usize },
    /// Leave the queue. A group that was taken meanwhile, but of which the run has not heard, is given back.
    LeaveQueue,
    /// Read a checkpoint back. Answered by `Restored` or `RestoreFailed`.
    Restore(CheckpointRef),
    /// Load the shard on every rank, fresh or from a checkpoint.
    Load { restore: Option<Restore> },
    /// Open the meeting point on rank 0. A group of one rank needs none and does not join.
    OpenRendezvous,
    /// Let every rank join.
    JoinGroup { rendezvous: Vec<u8> },
    /// Measure the held-out text, or a task, on every rank.
    Evaluate(Measurement),
    /// Run steps `first_step..end_step` on every rank under `generation`.
    Train { first_step: u64, end_step: u64, generation: Generation },
    /// Make the passes that the next decision is calibrated on, on every rank under `generation`.
    Calibrate { generation: Generation },
    /// Put a decision into force on every rank.
    ApplyMask { generation: Generation, keep_mask: Arc<KeepMask> },
    /// Write every rank's state under this name.
    Checkpoint { name: String, with_logits: bool },
    /// Write the coordinator's part of a checkpoint, then its manifest. Answered by `CheckpointWritten` or
    /// `CheckpointFailed`.
    Commit { name: String, state: Arc<SavedState> },
    /// All checkpoints of this run but these may go.
    Retain(Vec<CheckpointRef>),
    /// End the sessions of all ranks and drop every call in flight, but let a `Commit` end. Answered by
    /// `SessionsAborted` unless the run has ended.
    AbortSessions,
    /// Give back all workers.
    ReleaseWorkers,
    /// Give back all workers but rank 0's.
    ReleaseAllButFirst,
    /// Write the result on rank 0's worker.
    Export { checkpoint: CheckpointRef, shards: Vec<ShardFile>, keep_mask: Arc<KeepMask> },
    /// Send `Woken` at this time.
    WakeAt(SystemTime),
    /// An event was out of place and changed nothing; worth a line in the log.
    Refuse(Refusal),
}

/// What the ranks go on from.
#[derive(Debug, Clone, PartialEq)]
pub struct Restore {
    pub checkpoint: CheckpointRef,
    pub state: Arc<SavedState>,
}

/// One of the things that are measured, by its place among those of its kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Measurement {
    /// Perplexity of the held-out text at one of the window lengths.
    Window { index: usize },
    /// Answers to one file of questions.
    Task { index: usize },
}

/// An event that changed nothing because it does not fit where the run stands.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    #[error("{event} from rank {tp_rank} does not belong to this phase")]
    OutOfPlace { event: &'static str, tp_rank: usize },
    #[error("rank {tp_rank} acknowledged generation {actual}; generation {expected} is awaited")]
    OtherGeneration { tp_rank: usize, expected: Generation, actual: Generation },
    #[error("{event} names rank {tp_rank}, but the group has {tp_degree}")]
    UnknownRank { event: &'static str, tp_rank: usize, tp_degree: usize },
}
