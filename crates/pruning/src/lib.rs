//! From scores to one global keep mask: normalise, combine, average, decide. One place and one order, so that the mask
//! depends neither on the order in which scores arrive nor on how the ranks are split.
//!
//! ```text
//! chunks ─ ScoreAssembly ─▶ StepScores ─ combine ─▶ GroupImportance ─ MovingAverage ─ decide ─▶ KeepMask
//!                           recipe ─ Target::resolve ─▶ Target ───────────────────────┘
//! ```

pub mod criterion;
mod decide;
mod depth;
mod global_ranking;
mod importance;
mod keep_mask;
mod legal_counts;
mod moving_average;
mod scores;
mod target;
#[cfg(test)]
mod testing;
mod what_if;

pub use criterion::random_importance;
pub use decide::{DecideError, decide};
pub use depth::{DepthError, DepthGoal, block_parameters};
pub use importance::{GroupImportance, combine, random_importances};
pub use keep_mask::{InvalidKeepMask, KeepMask, LayerKeep, NotASubset};
pub use moving_average::{ImportanceMismatch, MovingAverage};
pub use scores::{ScoreAssembly, ScoreError, StepScores, unit_count};
pub use target::{Target, TargetSummary};
pub use what_if::{WhatIf, WhatIfError, what_if};
