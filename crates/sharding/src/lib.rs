//! Which rank holds what: heads, channels and vocabulary rows under tensor parallelism, before and after a mask decision.

mod moves;
mod placement;

pub use moves::{LayerMoves, Move, Moves};
pub use placement::{Placement, PlacementError, RankLayer, vocabulary_rows};

#[cfg(test)]
mod tests;
