use crate::{Generation, RunEvent, ShardFile};
use pruning::KeepMask;
use std::sync::Arc;
use std::time::SystemTime;

/// What must be done, in order. Effects that start a call are answered by events, or by a failure of their rank.
#[derive(Debug, Clone, PartialEq)]
pub enum Effect {
    /// Store and publish an event of the run's log. It comes before the effects that depend on it.
    Record(RunEvent),
    /// Load the shard on every rank.
    Load,
    /// Open the meeting point on rank 0. A group of one rank needs none and does not join.
    OpenRendezvous,
    /// Let every rank join.
    JoinGroup { rendezvous: Vec<u8> },
    /// Measure the held-out text, or a task, on every rank.
    Evaluate(Measurement),
    /// Run steps `first_step..end_step` on every rank under `generation`.
    Train { first_step: u64, end_step: u64, generation: Generation },
    /// Put a decision into force on every rank.
    ApplyMask { generation: Generation, keep_mask: Arc<KeepMask> },
    /// Write every rank's state.
    Checkpoint,
    /// End the sessions of all ranks and drop every call in flight. Answered by `SessionsAborted` unless the run has
    /// ended.
    AbortSessions,
    /// Give back all workers but rank 0's.
    ReleaseAllButFirst,
    /// Write the result on rank 0's worker.
    Export { shards: Vec<ShardFile>, keep_mask: Arc<KeepMask> },
    /// Send `Woken` at this time.
    WakeAt(SystemTime),
    /// An event was out of place and changed nothing; worth a line in the log.
    Refuse(Refusal),
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
