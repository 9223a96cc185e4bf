//! The engine on libtorch: the only crate that knows a tensor library.
//!
//! The backward pass is written by hand (`layer`, `loss`, `ops`): autograd is the oracle of the tests, not the engine.

mod communicator;
mod dropout;
mod export;
mod factors;
mod fault;
mod ffi;
mod importance;
mod layer;
mod loss;
mod memory;
mod model;
mod ops;
mod optimizer;
mod shard;
mod shrink;
mod source;
mod state_file;

pub use export::write_logits;
pub use shard::TchEngine;
pub use tch::Device;

#[cfg(test)]
mod tests;
