//! Computing on one rank's shard: the port between the services and a tensor library.

pub mod conformance;
mod shard_engine;
pub mod toy;

pub use shard_engine::{
    CollectiveBackend, Engine, EngineError, ExportDtype, ExportJob, ExportWritten, MaskApplied, NllSum,
    PhaseTimes, ProjectionScores, Prompt, Rendezvous, ShardEngine, ShardSetup, StepOutcome,
};
