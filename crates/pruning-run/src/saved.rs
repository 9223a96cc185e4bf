use crate::{Generation, RunId, ShardFile};
use pruning::{KeepMask, MovingAverage};
use serde::{Deserialize, Serialize};
use sharding::Placement;

/// Where a checkpoint is, and of what.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckpointRef {
    /// The run that wrote it.
    pub run_id: RunId,
    /// Name of its folder among the run's: no two checkpoints of a run ever share one.
    pub name: String,
    /// Optimizer steps done.
    pub steps_done: u64,
    /// Mask in force.
    pub generation: Generation,
}

/// All that a run's continuation depends on, beside what the ranks' own files hold.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SavedState {
    pub steps_done: u64,
    pub generation: Generation,
    pub keep_mask: KeepMask,
    /// Who held what; it depends on the masks before this one.
    pub placement: Placement,
    /// Absent when nothing is averaged.
    pub average: Option<MovingAverage>,
    /// The ranks' files, by rank.
    pub shards: Vec<ShardFile>,
    /// The files hold the logits that an export is checked against.
    pub with_logits: bool,
}
