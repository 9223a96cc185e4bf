//! Workers: processes that hold one shard each and meet at every step.

mod calls;
mod meeting;
mod shard;

pub use calls::{OpenCall, Work};
pub use shard::{Shard, ShardCopy, digest};

use crate::coordinator::Session;
use pruning::KeepMask;
use pruning_run::{CheckpointRef, Generation, Measurement, Restore, ShardFile};
use std::sync::Arc;

/// One worker's place: a process that may be down, and comes back as another.
#[derive(Debug, Clone, Default)]
pub struct Worker {
    pub process: u64,
    pub is_up: bool,
    /// It answers heartbeats and does nothing else.
    pub is_stuck: bool,
    /// The newest session that was begun here; calls of older ones are refused.
    pub newest: Session,
    pub held: Option<Held>,
    /// Its next step gives a loss that is not a number.
    pub glitches: bool,
    /// Calls served, steps done: what shows that it moves.
    pub progress: u64,
}

/// A session that a worker serves.
#[derive(Debug, Clone)]
pub struct Held {
    pub session: Session,
    pub tp_rank: usize,
    /// Workers by rank.
    pub group: Vec<usize>,
    pub shard: Shard,
    /// Number of the next meeting with the other ranks.
    pub meeting: u64,
    pub doing: Option<Doing>,
}

/// A call that is being served.
#[derive(Debug, Clone)]
pub struct Doing {
    pub call: u64,
    pub what: Call,
    /// It waits for the other ranks.
    pub waits: bool,
}

/// What a coordinator asks of a worker.
#[derive(Debug, Clone)]
pub enum Call {
    Load { tp_rank: usize, group: Vec<usize>, restore: Option<Restore> },
    OpenRendezvous,
    Join,
    Evaluate(Measurement),
    Train { step: u64, end_step: u64, generation: Generation },
    Calibrate { generation: Generation },
    ApplyMask { generation: Generation, keep_mask: Arc<KeepMask> },
    Checkpoint { name: String },
    Export { checkpoint: CheckpointRef, shards: Vec<ShardFile>, keep_mask: Arc<KeepMask> },
    Abort,
}
