//! The engine on libtorch: the only crate that knows a tensor library.
//!
//! The backward pass is written by hand (`layer`, `loss`, `ops`): autograd is the oracle of the tests, not the engine.

mod calibration;
mod communicator;
mod compensation;
mod cuda;
mod device;
mod dropout;
mod export;
mod export_check;
mod factors;
mod fault;
mod ffi;
mod flap;
mod frozen;
mod gram;
mod importance;
mod layer;
mod loss;
mod memory;
mod model;
mod moved_columns;
mod observed;
mod ops;
mod optimizer;
mod restore;
mod shard;
mod shrink;
mod source;
mod state_file;
mod tangent;
mod teacher;

pub use device::{DeviceError, DeviceMemory, device_memory, open_device, reset_peak, synchronize};
pub use export_check::write_logits;
pub use ops::matmul::plain_product;
pub use shard::{TchEngine, check_nccl, has_kernels};
pub use tch::Device;

#[cfg(test)]
mod tests;
