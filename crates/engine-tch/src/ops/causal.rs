//! Causal attention by the CPU's own kernels (`shim/attention.cpp`): query heads that share a key/value head are worked on
//! together, nothing is repeated or transposed in memory, and only what is seen is computed.

use super::{Attended, RotaryTable};
use crate::fault::{Fault, Result};
use crate::ffi::{self, raw};
use tch::{Device, Kind, Tensor};

/// Whether the kernels know this device, format and width of heads.
pub(crate) fn takes(q: &Tensor) -> bool {
    let bytes = match (q.device(), q.kind()) {
        (Device::Cpu, Kind::Float) => 4,
        (Device::Cpu, Kind::Double) => 8,
        _ => return false,
    };
    // SAFETY: answers with a constant of this machine.
    let lanes = unsafe { ffi::esp_attention_lanes(bytes) };
    q.size().last().is_some_and(|width| width % lanes == 0)
}

pub(crate) fn attention(q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Attended> {
    let (rows, tokens, heads, _) = q.size4()?;
    let options = (q.kind(), q.device());
    let out = Tensor::f_empty(q.size(), options)?;
    let log_sum_exp = Tensor::f_empty([rows, heads, tokens], options)?;
    // SAFETY: live tensors; the shim checks shapes, devices, formats and strides.
    let message = unsafe { ffi::esp_attention(raw(q), raw(k), raw(v), raw(&out), raw(&log_sum_exp)) };
    ffi::check(message, Fault::Refused)?;
    Ok(Attended { out, log_sum_exp, flash: None })
}

/// The gradient `[n, (h + 2g) k]` of q, k and v side by side, and its parts, views shaped like them.
pub(crate) fn attention_backward(
    grad_out: &Tensor,
    [q, k, v]: [&Tensor; 3],
    attended: &Attended,
) -> Result<(Tensor, [Tensor; 3])> {
    let (rows, tokens, heads, width) = q.size4()?;
    let shared = k.size4()?.2;
    let joined = Tensor::f_empty([rows * tokens, (heads + 2 * shared) * width], (q.kind(), q.device()))?;
    let part = |first: i64, heads: i64| -> Result<Tensor> {
        Ok(joined.f_narrow(1, first * width, heads * width)?.f_view([rows, tokens, heads, width])?)
    };
    let parts = [part(0, heads)?, part(heads, shared)?, part(heads + shared, shared)?];
    // SAFETY: as above.
    let message = unsafe {
        ffi::esp_attention_backward(
            raw(grad_out),
            raw(q),
            raw(k),
            raw(v),
            raw(&attended.out),
            raw(&attended.log_sum_exp),
            raw(&parts[0]),
            raw(&parts[1]),
            raw(&parts[2]),
        )
    };
    ffi::check(message, Fault::Refused)?;
    Ok((joined, parts))
}

/// The gradient `[n, (h + 2g) k]` of what attention's inputs were before q and k were rotated.
pub(crate) fn unrotated_gradient(
    grad_out: &Tensor,
    inputs: [&Tensor; 3],
    attended: &Attended,
    rotary: &RotaryTable,
) -> Result<Tensor> {
    let (rows, tokens, heads, width) = inputs[0].size4()?;
    let shared = inputs[1].size4()?.2;
    if takes(inputs[0]) {
        let (joined, _) = attention_backward(grad_out, inputs, attended)?;
        let turned = joined.f_narrow(1, 0, (heads + shared) * width)?;
        rotary.turn_in_place(&turned, -1.0, heads + shared)?;
        return Ok(joined);
    }
    let (grad_q, grad_k, grad_v) =
        super::attention_backward(grad_out, inputs[0], inputs[1], inputs[2], attended)?;
    let flat = |grad: &Tensor| grad.f_reshape([rows * tokens, -1]);
    Ok(Tensor::f_cat(
        &[
            rotary.rotate_back(&flat(&grad_q)?, heads)?,
            rotary.rotate_back(&flat(&grad_k)?, shared)?,
            flat(&grad_v)?,
        ],
        1,
    )?)
}

/// q `[b, t, h, k]`, k and v `[b, t, g, k]` from their product `[n, (h + 2g) k]`, q and k rotated: views of it where the
/// kernels take them.
pub(crate) fn rotated_parts(
    qkv: &Tensor,
    [rows, tokens, heads, shared, width]: [i64; 5],
    rotary: &RotaryTable,
) -> Result<[Tensor; 3]> {
    let part = |first: i64, heads: i64| qkv.f_narrow(1, first * width, heads * width);
    let shaped = |x: Tensor, heads: i64| -> Result<Tensor> { Ok(x.f_view([rows, tokens, heads, width])?) };
    let q = shaped(part(0, heads)?, heads)?;
    if takes(&q) {
        rotary.turn_in_place(&part(0, heads + shared)?, 1.0, heads + shared)?;
        return Ok([
            q,
            shaped(part(heads, shared)?, shared)?,
            shaped(part(heads + shared, shared)?, shared)?,
        ]);
    }
    Ok([
        shaped(rotary.rotate(&part(0, heads)?, heads)?, heads)?,
        shaped(rotary.rotate(&part(heads, shared)?, shared)?, shared)?,
        shaped(part(heads + shared, shared)?.f_contiguous()?, shared)?,
    ])
}
