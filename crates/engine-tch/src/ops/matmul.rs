//! Products with frozen weights.

use crate::fault::{Fault, Result};
use crate::ffi::{self, raw};
use engine::EngineError;
use tch::{Device, Tensor};

/// `left right`, both `[n, n]`, by the routine that multiplies with frozen weights: what the rate of a step is held against.
///
/// # Errors
/// When shapes or formats do not fit.
pub fn plain_product(left: &Tensor, right: &Tensor) -> std::result::Result<Tensor, EngineError> {
    Ok(product(left, right)?)
}

/// `left right`; either may be the transposed view of a contiguous matrix.
pub(crate) fn product(left: &Tensor, right: &Tensor) -> Result<Tensor> {
    if left.device() != Device::Cpu {
        return Ok(left.f_mm(right)?);
    }
    let out = Tensor::f_empty([left.size2()?.0, right.size2()?.1], (left.kind(), left.device()))?;
    product_into(left, right, &out)?;
    Ok(out)
}

/// The same into `out`, which is contiguous.
pub(crate) fn product_into(left: &Tensor, right: &Tensor, out: &Tensor) -> Result<()> {
    // SAFETY: live tensors; libtorch and the shim check shapes and formats.
    ffi::check(unsafe { ffi::esp_matmul(raw(left), raw(right), raw(out)) }, Fault::Refused)
}
