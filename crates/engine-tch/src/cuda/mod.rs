//! What a CUDA device needs: libraries found at run time, streams, kernels compiled on the spot. Nothing of it is
//! needed to build, or to compute on a CPU.

pub(crate) mod compiler;
pub(crate) mod launch;
pub(crate) mod library;
pub(crate) mod stream;
