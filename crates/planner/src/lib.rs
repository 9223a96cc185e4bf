//! What a run will take, known before anything starts: parameters, memory by rank and kind, work, communication, time and
//! checkpoint size, and whether it fits and can be exported at all.
//!
//! Pure arithmetic over a model's dimensions and a recipe. Memory follows what `engine-tch` really holds, tensor by tensor,
//! and is held against measured processes (`tests/processes/tests/planned_memory.rs`). Times are computed from a device's
//! rates and never measured.
//!
//! ```text
//! ModelSpec, Recipe, degree ─▶ Course (widths over the run) ─▶ RankShape ─▶ Memory, StepWork, Traffic ─▶ Estimate
//! ```

mod activations;
mod course;
mod decision_memory;
mod device;
mod estimate;
mod formats;
mod heap;
mod memory;
mod page;
mod rank_shape;
mod refusal;
mod traffic;
mod work;

pub use course::{Course, WidthsFrom};
pub use device::{Device, GPU_EFFICIENCY, KNOWN_DEVICES, KnownDevice, Platform, Rates, known_device};
pub use estimate::{CheckpointSize, Estimate, Question, RunTime, Stage, StepFigures, StepTime, estimate};
pub use memory::{Kind, Memory};
pub use page::{PAGE_RECIPE, page};
pub use rank_shape::{RankShape, RankWidths};
pub use refusal::{Refusal, refusals};
pub use traffic::Traffic;
pub use work::StepWork;
