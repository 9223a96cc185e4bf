//! Computing on one rank's shard: the port between the services and a tensor library.

pub mod conformance;
mod progress;
mod shard_engine;
pub mod toy;

pub use progress::{Progress, ProgressCounts};
pub use shard_engine::{
    Calibration, CalibrationProgress, CollectiveBackend, Engine, EngineError, ExportDtype, ExportJob,
    ExportWritten, MOST_SKIPPED, MaskApplied, NllSum, PhaseTimes, ProjectionScores, Prompt, Rendezvous,
    Report, Restore, ShardEngine, ShardSetup, Snapshot, StepOutcome,
};
