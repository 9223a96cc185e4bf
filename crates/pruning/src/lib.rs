//! From scores to one global keep mask: normalise, combine, average, decide. One place and one order, so that the mask
//! depends neither on the order in which scores arrive nor on how the ranks are split.

mod keep_mask;

pub use keep_mask::{KeepMask, LayerKeep, NotASubset};
