//! Which rank holds what: heads, channels and vocabulary rows under tensor parallelism, before and after a mask decision.

mod placement;

pub use placement::{Placement, PlacementError, RankLayer, vocabulary_rows};
