//! From scores to one global keep mask: normalise, combine, average, decide. One place and one order, so that the mask
//! depends neither on the order in which scores arrive nor on how the ranks are split.
//!
//! ```text
//! chunks ─ ScoreAssembly ─▶ StepScores ─ combine ─▶ GroupImportance ─ MovingAverage ─ decide ─▶ KeepMask
//!                           recipe ─ Target::resolve ─▶ Target ───────────────────────┘
//! ```
//!
//! Beside this course stand plain forms of methods that no recipe chooses yet, held to published numbers: single weights of a
//! linear ([`layerwise`]), sparsity by layer from the weights alone ([`allocation`]), masks searched by their losses ([`search`]).

pub mod allocation;
pub mod criterion;
mod decide;
mod depth;
mod global_ranking;
mod importance;
mod keep_mask;
pub mod layerwise;
mod legal_counts;
pub mod linear_algebra;
mod moving_average;
mod scores;
pub mod search;
mod slices;
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
pub use slices::SliceError;
pub use target::{Target, TargetSummary};
pub use what_if::{WhatIf, WhatIfError, what_if};
