//! A run as a state machine: `transition(run, event, now) -> (run, effects)`.
//!
//! Pure: it reads no clock, waits for nothing and talks to nobody. The coordinator's driver performs the effects and
//! brings their outcomes back as events; given the same events the same decisions follow, bit for bit.
//!
//! What it guards, after every event:
//! 1. No decision without exactly one score for every live group and projection of every step up to it.
//! 2. Arrival order, chunking and the split over ranks do not change a decision.
//! 3. Kept sets only shrink; sparsity never falls; protected layers are never touched.
//! 4. A repeated acknowledgement is harmless, one of another generation is refused.
//! 5. No rank trains while ranks hold different generations.
//! 6. Nothing happens after a run has ended.
//! 7. One generation has one mask for ever: a decision that was logged before a fault is applied again, not made anew.
//! 8. A checkpoint is of one place between two steps, on all ranks; it counts once its manifest is written.

mod calibrating;
mod checkpointing;
mod effect;
mod event;
mod history;
mod ids;
mod leaving;
mod log;
mod masks;
mod measuring;
mod run;
mod saved;
mod setup;
mod steps;
mod training;
mod transition;

pub use effect::{Effect, Measurement, Refusal, Restore};
pub use event::{CalibrationFound, Event, Fault, RankReport, ShardFile, TaskScore};
pub use history::History;
pub use ids::{Generation, RunId, WorkerId};
pub use log::{
    Accuracy, Calibration, Checkpoint, Decision, Evaluation, ExportResult, GuardVerdict, Restart, RunEvent,
    RunEventKind, RunState, StepReport, TaskResult,
};
pub use run::Run;
pub use saved::{CheckpointRef, SavedState};
pub use setup::{Guard, GuardAction, GuardBound, Retention, RunOptions, RunSetup, SetupError};
pub use transition::transition;
