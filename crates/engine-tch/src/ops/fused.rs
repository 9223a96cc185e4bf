//! The fused kernels: one pass over memory each. On a CPU those of `shim/kernels.cpp`, spread over libtorch's threads; on a
//! CUDA device those of `cuda/kernels.cu`.

use super::{on_cuda, plain};
use crate::cuda::compiler::{Kernels, elementwise};
use crate::fault::{Fault, Result};
use crate::ffi::{self, raw};
use std::ffi::c_char;
use std::sync::Arc;
use tch::{Device, Kind, Tensor};

/// Whether the kernels know this tensor's device and format.
pub(crate) fn takes(x: &Tensor) -> bool {
    match x.device() {
        Device::Cpu => matches!(x.kind(), Kind::Float | Kind::Double),
        Device::Cuda(_) => {
            matches!(x.kind(), Kind::Float | Kind::BFloat16) && elementwise(x.device()).is_some()
        }
        Device::Mps | Device::Vulkan => false,
    }
}

/// The kernels of a tensor on a CUDA device.
fn on_device(x: &Tensor) -> Option<Arc<Kernels>> {
    elementwise(x.device())
}

fn done(message: *mut c_char) -> Result<()> {
    ffi::check(message, Fault::Refused)
}

/// A tensor that the kernel fills.
fn new(like: &Tensor, rows: i64, columns: i64) -> Result<Tensor> {
    Ok(Tensor::f_empty([rows, columns], (like.kind(), like.device()))?)
}

// SAFETY of every call below: the arguments are live tensors for the call; the shim checks devices, formats and strides
// and answers with an error text instead of reading what is not there.

pub(crate) fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<(Tensor, Tensor)> {
    if let Some(on) = on_device(x) {
        return on_cuda::rms_norm(on.as_ref(), x, weight, eps);
    }
    let (rows, width) = x.size2()?;
    let (rstd, y) = (new(x, rows, 1)?, new(x, rows, width)?);
    // SAFETY: see above.
    done(unsafe { ffi::esp_rms_norm(raw(x), raw(weight), eps, raw(&rstd), raw(&y)) })?;
    Ok((rstd, y))
}

pub(crate) fn rms_norm_apply(x: &Tensor, rstd: &Tensor, weight: &Tensor) -> Result<Tensor> {
    if let Some(on) = on_device(x) {
        return on_cuda::rms_norm_apply(on.as_ref(), x, rstd, weight);
    }
    let (rows, width) = x.size2()?;
    let y = new(x, rows, width)?;
    // SAFETY: see above.
    done(unsafe { ffi::esp_rms_norm_apply(raw(x), raw(rstd), raw(weight), raw(&y)) })?;
    Ok(y)
}

pub(crate) fn rms_norm_backward_add(
    grad_x: &mut Tensor,
    grad_y: &Tensor,
    x: &Tensor,
    rstd: &Tensor,
    weight: &Tensor,
) -> Result<()> {
    if let Some(on) = on_device(x) {
        return on_cuda::rms_norm_backward_add(on.as_ref(), grad_x, grad_y, x, rstd, weight);
    }
    // SAFETY: see above.
    done(unsafe { ffi::esp_rms_norm_backward_add(raw(grad_x), raw(grad_y), raw(x), raw(rstd), raw(weight)) })
}

pub(crate) fn rotate(x: &Tensor, cos: &Tensor, sin: &Tensor, sign: f64, heads: i64) -> Result<Tensor> {
    if let Some(on) = on_device(x) {
        return on_cuda::rotate(on.as_ref(), x, cos, sin, sign, heads);
    }
    let (rows, width) = x.size2()?;
    let y = new(x, rows, width)?;
    // SAFETY: see above.
    done(unsafe { ffi::esp_rotate(raw(x), raw(&y), raw(cos), raw(sin), sign, heads) })?;
    Ok(y)
}

/// On a CPU.
pub(crate) fn rotate_in_place(x: &Tensor, cos: &Tensor, sin: &Tensor, sign: f64, heads: i64) -> Result<()> {
    // SAFETY: see above; every pair is read before it is written.
    done(unsafe { ffi::esp_rotate(raw(x), raw(x), raw(cos), raw(sin), sign, heads) })
}

pub(crate) fn swiglu(gate_up: &Tensor) -> Result<Tensor> {
    if let Some(on) = on_device(gate_up) {
        return on_cuda::swiglu(on.as_ref(), gate_up);
    }
    let (rows, width) = gate_up.size2()?;
    let act = new(gate_up, rows, width / 2)?;
    // SAFETY: see above.
    done(unsafe { ffi::esp_swiglu(raw(gate_up), raw(&act)) })?;
    Ok(act)
}

pub(crate) fn swiglu_backward(grad_act: &Tensor, gate_up: &Tensor) -> Result<Tensor> {
    if let Some(on) = on_device(gate_up) {
        return on_cuda::swiglu_backward(on.as_ref(), grad_act, gate_up);
    }
    let (rows, width) = gate_up.size2()?;
    let grad = new(gate_up, rows, width)?;
    // SAFETY: see above.
    done(unsafe { ffi::esp_swiglu_backward(raw(grad_act), raw(gate_up), raw(&grad)) })?;
    Ok(grad)
}

pub(crate) fn row_max(x: &Tensor) -> Result<Tensor> {
    if x.device().is_cuda() {
        return Ok(x.f_amax([1i64], true)?);
    }
    let highest = new(x, x.size()[0], 1)?;
    // SAFETY: see above.
    done(unsafe { ffi::esp_row_max(raw(x), raw(&highest)) })?;
    Ok(highest)
}

pub(crate) fn exp_sum(x: &mut Tensor, highest: &Tensor) -> Result<Tensor> {
    if x.device().is_cuda() {
        return plain::exp_sum(x, highest);
    }
    let sum = new(x, x.size()[0], 1)?;
    // SAFETY: see above.
    done(unsafe { ffi::esp_exp_sum(raw(x), raw(highest), raw(&sum)) })?;
    Ok(sum)
}

pub(crate) fn scale_rows(x: &mut Tensor, sum: &Tensor, scale: f64) -> Result<()> {
    if x.device().is_cuda() {
        return plain::scale_rows(x, sum, scale);
    }
    // SAFETY: see above.
    done(unsafe { ffi::esp_scale_rows(raw(x), raw(sum), scale) })
}

/// See [`crate::dropout`].
pub(crate) fn dropout(
    x: &Tensor,
    features: &Tensor,
    key: u32,
    first_token: u32,
    threshold: u64,
    scale: f64,
) -> Result<Tensor> {
    if let Some(on) = on_device(x) {
        return on_cuda::dropout(on.as_ref(), x, features, key, first_token, threshold, scale);
    }
    let (rows, width) = x.size2()?;
    let y = new(x, rows, width)?;
    // SAFETY: see above.
    done(unsafe { ffi::esp_dropout(raw(x), raw(&y), raw(features), key, first_token, threshold, scale) })?;
    Ok(y)
}
