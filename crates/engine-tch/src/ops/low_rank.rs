//! Products of a tall activation and a thin factor. General matrix routines do these at a fifth of their rate, so the CPU
//! has kernels of its own (`shim/low_rank.cpp`).
//!
//! `thin` matrices are `[r, width]`: `lora_a` as it lies, `lora_b` transposed (a view will do).

use crate::fault::{Fault, Result};
use crate::ffi::{self, raw};
use tch::{Device, Kind, Tensor};

/// Whether the kernels know these tensors' device and format.
fn takes(tensors: [&Tensor; 3]) -> bool {
    let kind = tensors[0].kind();
    matches!(kind, Kind::Float | Kind::Double)
        && tensors.iter().all(|tensor| tensor.device() == Device::Cpu && tensor.kind() == kind)
}

/// `scale x thin^T` `[n, r]` of `x` `[n, width]`, whose columns are contiguous.
pub(crate) fn project(x: &Tensor, thin: &Tensor, scale: f64) -> Result<Tensor> {
    if !takes([x, x, thin]) {
        return Ok(x.f_mm(&thin.f_tr()?)?.f_mul_scalar_(scale)?);
    }
    let y = Tensor::f_empty([x.size()[0], thin.size()[0]], (x.kind(), x.device()))?;
    let thin = thin.f_contiguous()?;
    // SAFETY: live tensors; the shim checks shapes, devices, formats and strides.
    ffi::check(unsafe { ffi::esp_project(raw(x), raw(&thin), scale, raw(&y)) }, Fault::Refused)?;
    Ok(y)
}

/// `y += low thin`, `y` `[n, width]` with contiguous columns, `low` `[n, r]`.
pub(crate) fn expand_add(y: &mut Tensor, low: &Tensor, thin: &Tensor) -> Result<()> {
    if !takes([y, low, thin]) {
        let _ = y.f_addmm_(low, thin)?;
        return Ok(());
    }
    let thin = thin.f_contiguous()?;
    // SAFETY: as above.
    ffi::check(unsafe { ffi::esp_expand_add(raw(low), raw(&thin), raw(y)) }, Fault::Refused)
}

/// `sum += low^T x`, `sum` thin, in a format that may be wider than the product's.
pub(crate) fn outer_add(sum: &mut Tensor, low: &Tensor, x: &Tensor) -> Result<()> {
    if !takes([sum, low, x]) {
        return add_product(sum, &low.f_tr()?, x);
    }
    if sum.is_contiguous() {
        // SAFETY: as above.
        return ffi::check(unsafe { ffi::esp_outer_add(raw(low), raw(x), raw(sum)) }, Fault::Refused);
    }
    let part = Tensor::f_zeros(sum.size(), (sum.kind(), sum.device()))?;
    // SAFETY: as above.
    ffi::check(unsafe { ffi::esp_outer_add(raw(low), raw(x), raw(&part)) }, Fault::Refused)?;
    let _ = sum.f_add_(&part)?;
    Ok(())
}

/// `sum += left right`, whose format may be wider than the product's.
pub(crate) fn add_product(sum: &mut Tensor, left: &Tensor, right: &Tensor) -> Result<()> {
    if sum.kind() == left.kind() {
        let _ = sum.f_addmm_(left, right)?;
    } else {
        let _ = sum.f_add_(&left.f_mm(right)?.f_to_kind(sum.kind())?)?;
    }
    Ok(())
}
