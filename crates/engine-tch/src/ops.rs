//! Element-wise pieces of the block, each forward with its backward, composed of libtorch operators.
//!
//! Shapes: n tokens of all rows · d hidden · t tokens of a row · h query heads · g key/value heads · k head_dim ·
//! i channels. Everything on this rank.

use crate::fault::Result;
use tch::{Kind, Tensor};

/// Root mean square norm (arXiv:1910.07467) as `transformers` computes it.
///
/// ```text
/// rstd = 1 / sqrt(mean(x^2) + eps)     y = x * rstd * weight
/// ```
///
/// Returns `rstd` `[n, 1]`; [`rms_norm_apply`] makes `y` from it, again when the backward pass needs it.
pub(crate) fn rms_norm_rstd(x_nd: &Tensor, eps: f64) -> Result<Tensor> {
    let mean_square = x_nd.f_square()?.f_mean_dim(&[-1i64][..], true, None)?;
    Ok(mean_square.f_add_scalar(eps)?.f_rsqrt()?)
}

pub(crate) fn rms_norm_apply(x_nd: &Tensor, rstd_n1: &Tensor, weight_d: &Tensor) -> Result<Tensor> {
    Ok(x_nd.f_mul(rstd_n1)?.f_mul_(weight_d)?)
}

/// Adds the norm's input gradient to `grad_x_nd`. The weight is frozen.
///
/// ```text
/// e = dy * weight     dx = rstd * (e - xhat * mean(e * xhat))     xhat = x * rstd
/// ```
pub(crate) fn rms_norm_backward_add(
    grad_x_nd: &mut Tensor,
    grad_y_nd: &Tensor,
    x_nd: &Tensor,
    rstd_n1: &Tensor,
    weight_d: &Tensor,
) -> Result<()> {
    let scaled = grad_y_nd.f_mul(weight_d)?;
    let normal = x_nd.f_mul(rstd_n1)?;
    let along = scaled.f_mul(&normal)?.f_mean_dim(&[-1i64][..], true, None)?;
    let grad = scaled.f_sub(&normal.f_mul(&along)?)?.f_mul_(rstd_n1)?;
    let _ = grad_x_nd.f_add_(&grad)?;
    Ok(())
}

/// Cosines and sines `[t, 1, k]` of the rotary embedding, each half repeated as `transformers` lays them out.
pub(crate) struct RotaryTable {
    cos: Tensor,
    sin: Tensor,
}

impl RotaryTable {
    pub(crate) fn new(inverse_frequencies: &[f64], tokens: i64, like: &Tensor) -> Result<Self> {
        let positions = Tensor::f_arange(tokens, (Kind::Double, tch::Device::Cpu))?;
        let frequencies = Tensor::f_from_slice(inverse_frequencies)?;
        let angles = positions.f_unsqueeze(1)?.f_mul(&frequencies.f_unsqueeze(0)?)?;
        let angles = Tensor::f_cat(&[&angles, &angles], 1)?.f_unsqueeze(1)?;
        let place = |table: Tensor| -> Result<Tensor> {
            Ok(table.f_to_device(like.device())?.f_to_kind(like.kind())?)
        };
        Ok(Self { cos: place(angles.f_cos()?)?, sin: place(angles.f_sin()?)? })
    }

    /// `x * cos + rotate_half(x) * sin` for `x` `[.., t, heads, k]`, into a new contiguous tensor.
    pub(crate) fn rotate(&self, x: &Tensor) -> Result<Tensor> {
        Ok(x.f_mul(&self.cos)?.f_add_(&rotate_half(x)?.f_mul_(&self.sin)?)?)
    }

    /// The transpose of [`Self::rotate`]: rotation by the opposite angle.
    pub(crate) fn rotate_back(&self, grad: &Tensor) -> Result<Tensor> {
        Ok(grad.f_mul(&self.cos)?.f_sub_(&rotate_half(grad)?.f_mul_(&self.sin)?)?)
    }
}

/// `(-x2, x1)` for the halves of the last dimension.
fn rotate_half(x: &Tensor) -> Result<Tensor> {
    let halves = x.f_chunk(2, -1)?;
    Ok(Tensor::f_cat(&[&halves[1].f_neg()?, &halves[0]], -1)?)
}

/// SwiGLU: `silu(gate) * up` from `[n, 2i]` holding gate, then up.
pub(crate) fn swiglu(gate_up: &Tensor) -> Result<Tensor> {
    let halves = gate_up.f_chunk(2, -1)?;
    Ok(halves[0].f_silu()?.f_mul_(&halves[1])?)
}

/// Gradient `[n, 2i]` of [`swiglu`].
pub(crate) fn swiglu_backward(grad_act: &Tensor, gate_up: &Tensor) -> Result<Tensor> {
    let halves = gate_up.f_chunk(2, -1)?;
    let grad_gate = halves[0].f_silu_backward(&grad_act.f_mul(&halves[1])?)?;
    let grad_up = halves[0].f_silu()?.f_mul_(grad_act)?;
    Ok(Tensor::f_cat(&[grad_gate, grad_up], -1)?)
}

/// What attention keeps for its backward pass, beside its inputs.
pub(crate) struct Attended {
    /// `[b, t, h, k]`, contiguous.
    pub(crate) out: Tensor,
    log_sum_exp: Tensor,
}

/// Causal softmax attention, scaled by `1 / sqrt(k)`, by libtorch's fused operator.
/// `q` `[b, t, h, k]`, `k` and `v` `[b, t, g, k]`; each key/value head serves `h / g` consecutive query heads.
pub(crate) fn attention(q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Attended> {
    let shared = q.size()[2] / k.size()[2];
    let (k, v) = (repeat_heads(k, shared)?, repeat_heads(v, shared)?);
    let (out, log_sum_exp) = Tensor::f_internal_scaled_dot_product_flash_attention_for_cpu::<Tensor>(
        &q.f_transpose(1, 2)?,
        &k.f_transpose(1, 2)?,
        &v.f_transpose(1, 2)?,
        0.0,
        true,
        None,
        None,
    )?;
    Ok(Attended { out: out.f_transpose(1, 2)?.f_contiguous()?, log_sum_exp })
}

/// Gradients of q, k and v, shaped like them.
pub(crate) fn attention_backward(
    grad_out: &Tensor,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    attended: &Attended,
) -> Result<(Tensor, Tensor, Tensor)> {
    let shared = q.size()[2] / k.size()[2];
    let (k, v) = (repeat_heads(k, shared)?, repeat_heads(v, shared)?);
    let (grad_q, grad_k, grad_v) =
        Tensor::f_internal_scaled_dot_product_flash_attention_for_cpu_backward::<Tensor>(
            &grad_out.f_transpose(1, 2)?,
            &q.f_transpose(1, 2)?,
            &k.f_transpose(1, 2)?,
            &v.f_transpose(1, 2)?,
            &attended.out.f_transpose(1, 2)?,
            &attended.log_sum_exp,
            0.0,
            true,
            None,
            None,
        )?;
    Ok((
        grad_q.f_transpose(1, 2)?,
        sum_shared(&grad_k.f_transpose(1, 2)?, shared)?,
        sum_shared(&grad_v.f_transpose(1, 2)?, shared)?,
    ))
}

/// `[b, t, g, k]` to `[b, t, g * shared, k]`, each head repeated in place.
fn repeat_heads(x: &Tensor, shared: i64) -> Result<Tensor> {
    if shared == 1 {
        return Ok(x.shallow_clone());
    }
    let (rows, tokens, heads, width) = x.size4()?;
    let wide = x.f_unsqueeze(3)?.f_expand([rows, tokens, heads, shared, width], false)?;
    Ok(wide.f_reshape([rows, tokens, heads * shared, width])?)
}

/// The transpose of [`repeat_heads`].
fn sum_shared(grad: &Tensor, shared: i64) -> Result<Tensor> {
    if shared == 1 {
        return Ok(grad.shallow_clone());
    }
    let (rows, tokens, heads, width) = grad.size4()?;
    let split = grad.f_reshape([rows, tokens, heads / shared, shared, width])?;
    Ok(split.f_sum_dim_intlist(&[3i64][..], false, None)?)
}
