//! What a LLaMA-shaped decoder is: its dimensions, its projections, and which parts of it stand or fall together.
//!
//! Pure data and arithmetic. Reading `config.json` is the business of the `checkpoint` crate.

mod layer;
mod projection;
mod rope;
mod spec;

pub use layer::{LayerIndex, LayerSpec};
pub use projection::{Block, Projection, Split};
pub use rope::{Rope, RopeScaling};
pub use spec::{Family, InvalidModelSpec, ModelSpec};
