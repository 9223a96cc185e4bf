//! Pieces of the block, each forward with its backward: fused kernels on the CPU, compositions of libtorch operators
//! elsewhere.
//!
//! Shapes: n tokens of all rows · d hidden · t tokens of a row · h query heads · g key/value heads · k head_dim ·
//! i channels. Everything on this rank.

pub(crate) mod causal;
mod fused;
pub(crate) mod low_rank;
pub(crate) mod matmul;
pub(crate) mod on_cuda;
pub(crate) mod plain;
pub(crate) mod scores;

use crate::fault::Result;
use tch::{Device, Kind, Tensor};

pub(crate) use fused::dropout as fused_dropout;
pub(crate) use fused::takes as fused_takes;

/// Root mean square norm (arXiv:1910.07467) as `transformers` computes it.
///
/// ```text
/// rstd = 1 / sqrt(mean(x^2) + eps)     y = x * rstd * weight
/// ```
///
/// Returns `rstd` `[n, 1]` and `y`; [`rms_norm_apply`] makes `y` again when the backward pass needs it.
pub(crate) fn rms_norm(x_nd: &Tensor, weight_d: &Tensor, eps: f64) -> Result<(Tensor, Tensor)> {
    if fused::takes(x_nd) {
        fused::rms_norm(x_nd, weight_d, eps)
    } else {
        plain::rms_norm(x_nd, weight_d, eps)
    }
}

pub(crate) fn rms_norm_apply(x_nd: &Tensor, rstd_n1: &Tensor, weight_d: &Tensor) -> Result<Tensor> {
    if fused::takes(x_nd) {
        fused::rms_norm_apply(x_nd, rstd_n1, weight_d)
    } else {
        plain::rms_norm_apply(x_nd, rstd_n1, weight_d)
    }
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
    if fused::takes(x_nd) {
        fused::rms_norm_backward_add(grad_x_nd, grad_y_nd, x_nd, rstd_n1, weight_d)
    } else {
        plain::rms_norm_backward_add(grad_x_nd, grad_y_nd, x_nd, rstd_n1, weight_d)
    }
}

/// Cosines and sines `[t, k/2]` of the rotary embedding.
pub(crate) struct RotaryTable {
    cos: Tensor,
    sin: Tensor,
}

impl RotaryTable {
    /// For positions `0 .. tokens`, on the device and in the format of `like`.
    pub(crate) fn new(inverse_frequencies: &[f64], tokens: i64, like: &Tensor) -> Result<Self> {
        Self::of(inverse_frequencies, &Tensor::f_arange(tokens, (Kind::Double, tch::Device::Cpu))?, like)
    }

    /// For tokens that stand at `positions`, one by one.
    pub(crate) fn at(inverse_frequencies: &[f64], positions: &[i64], like: &Tensor) -> Result<Self> {
        Self::of(inverse_frequencies, &Tensor::f_from_slice(positions)?.f_to_kind(Kind::Double)?, like)
    }

    #[cfg(test)]
    pub(crate) fn tables(&self) -> (&Tensor, &Tensor) {
        (&self.cos, &self.sin)
    }

    fn of(inverse_frequencies: &[f64], positions: &Tensor, like: &Tensor) -> Result<Self> {
        let frequencies = Tensor::f_from_slice(inverse_frequencies)?;
        let angles = positions.f_unsqueeze(1)?.f_mul(&frequencies.f_unsqueeze(0)?)?;
        let place = |table: Tensor| -> Result<Tensor> {
            Ok(table.f_to_device(like.device())?.f_to_kind(like.kind())?)
        };
        Ok(Self { cos: place(angles.f_cos()?)?, sin: place(angles.f_sin()?)? })
    }

    /// `x` `[n, heads * k]`, columns contiguous, with every pair `(j, j + k/2)` of a head turned by its position's angle:
    /// a new contiguous tensor.
    pub(crate) fn rotate(&self, x: &Tensor, heads: i64) -> Result<Tensor> {
        self.turn(x, 1.0, heads)
    }

    /// The transpose of [`Self::rotate`]: rotation by the opposite angle.
    pub(crate) fn rotate_back(&self, grad: &Tensor, heads: i64) -> Result<Tensor> {
        self.turn(grad, -1.0, heads)
    }

    /// Turns a CPU tensor in f32 or f64 where it lies.
    fn turn_in_place(&self, x: &Tensor, sign: f64, heads: i64) -> Result<()> {
        fused::rotate_in_place(x, &self.cos, &self.sin, sign, heads)
    }

    fn turn(&self, x: &Tensor, sign: f64, heads: i64) -> Result<Tensor> {
        if fused::takes(x) {
            fused::rotate(x, &self.cos, &self.sin, sign, heads)
        } else {
            plain::rotate(x, &self.cos, &self.sin, sign, heads)
        }
    }
}

/// SwiGLU: `silu(gate) * up` from `[n, 2i]` holding gate, then up.
pub(crate) fn swiglu(gate_up: &Tensor) -> Result<Tensor> {
    if fused::takes(gate_up) { fused::swiglu(gate_up) } else { plain::swiglu(gate_up) }
}

/// Gradient `[n, 2i]` of [`swiglu`].
pub(crate) fn swiglu_backward(grad_act: &Tensor, gate_up: &Tensor) -> Result<Tensor> {
    if fused::takes(gate_up) {
        fused::swiglu_backward(grad_act, gate_up)
    } else {
        plain::swiglu_backward(grad_act, gate_up)
    }
}

/// Largest value of every row, `[n, 1]`.
pub(crate) fn row_max(x: &Tensor) -> Result<Tensor> {
    if fused::takes(x) { fused::row_max(x) } else { Ok(x.f_amax([1i64], true)?) }
}

/// `exp(logits - highest)` in place, and its row sums `[n, 1]`.
pub(crate) fn exp_sum(logits: &mut Tensor, highest: &Tensor) -> Result<Tensor> {
    if fused::takes(logits) { fused::exp_sum(logits, highest) } else { plain::exp_sum(logits, highest) }
}

/// Rows times `scale / sum`, in place.
pub(crate) fn scale_rows(values: &mut Tensor, sum: &Tensor, scale: f64) -> Result<()> {
    if fused::takes(values) {
        fused::scale_rows(values, sum, scale)
    } else {
        plain::scale_rows(values, sum, scale)
    }
}

/// What attention keeps for its backward pass, beside its inputs.
pub(crate) struct Attended {
    /// `[b, t, h, k]`, contiguous.
    pub(crate) out: Tensor,
    log_sum_exp: Tensor,
    /// Of the CUDA operator.
    flash: Option<on_cuda::FlashState>,
}

/// Causal softmax attention, scaled by `1 / sqrt(k)`, by kernels of our own on a CPU, else by libtorch's fused operator.
/// `q` `[b, t, h, k]`, `k` and `v` `[b, t, g, k]`; each key/value head serves `h / g` consecutive query heads.
pub(crate) fn attention(q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Attended> {
    if causal::takes(q) {
        return causal::attention(q, k, v);
    }
    let shared = q.size()[2] / k.size()[2];
    let (k, v) = (repeat_heads(k, shared)?, repeat_heads(v, shared)?);
    if q.device() != Device::Cpu {
        return attention_on_device(q, &k, &v);
    }
    let (out, log_sum_exp) = Tensor::f_internal_scaled_dot_product_flash_attention_for_cpu::<Tensor>(
        &q.f_transpose(1, 2)?,
        &k.f_transpose(1, 2)?,
        &v.f_transpose(1, 2)?,
        0.0,
        true,
        None,
        None,
    )?;
    Ok(Attended { out: out.f_transpose(1, 2)?.f_contiguous()?, log_sum_exp, flash: None })
}

/// [`attention`] where a token sees what `sees` `[b, 1, t, t]` says. Not for a backward pass.
pub(crate) fn attention_where(q: &Tensor, k: &Tensor, v: &Tensor, sees: &Tensor) -> Result<Attended> {
    let shared = q.size()[2] / k.size()[2];
    let (k, v) = (repeat_heads(k, shared)?, repeat_heads(v, shared)?);
    let out = Tensor::f_scaled_dot_product_attention(
        &q.f_transpose(1, 2)?,
        &k.f_transpose(1, 2)?,
        &v.f_transpose(1, 2)?,
        Some(sees),
        0.0,
        false,
        None,
        false,
    )?;
    Ok(Attended { out: out.f_transpose(1, 2)?.f_contiguous()?, log_sum_exp: Tensor::new(), flash: None })
}

/// Gradients of q, k and v, shaped like them.
pub(crate) fn attention_backward(
    grad_out: &Tensor,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    attended: &Attended,
) -> Result<(Tensor, Tensor, Tensor)> {
    if causal::takes(q) {
        let (_, [grad_q, grad_k, grad_v]) = causal::attention_backward(grad_out, [q, k, v], attended)?;
        return Ok((grad_q, grad_k, grad_v));
    }
    let shared = q.size()[2] / k.size()[2];
    let (k, v) = (repeat_heads(k, shared)?, repeat_heads(v, shared)?);
    if q.device() != Device::Cpu {
        let (grad_q, grad_k, grad_v) = attention_backward_on_device(grad_out, q, &k, &v, attended)?;
        return Ok((grad_q, sum_shared(&grad_k, shared)?, sum_shared(&grad_v, shared)?));
    }
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

/// Causal attention of `[b, t, h, k]` tensors: libtorch's flash kernels where they take the format, else plain products.
fn attention_on_device(q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Attended> {
    let heads_first = |x: &Tensor| x.f_transpose(1, 2);
    let (q, k, v) = (heads_first(q)?, heads_first(k)?, heads_first(v)?);
    let (out, log_sum_exp, flash) = if on_cuda::flash_takes(&q) {
        let (out, log_sum_exp, state) = on_cuda::flash_attention(&q, &k, &v)?;
        (out, log_sum_exp, Some(state))
    } else {
        let (out, log_sum_exp) = plain::attention(&q, &k, &v)?;
        (out, log_sum_exp, None)
    };
    Ok(Attended { out: out.f_transpose(1, 2)?.f_contiguous()?, log_sum_exp, flash })
}

fn attention_backward_on_device(
    grad_out: &Tensor,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    attended: &Attended,
) -> Result<(Tensor, Tensor, Tensor)> {
    let heads_first = |x: &Tensor| x.f_transpose(1, 2);
    let (q, k, v) = (heads_first(q)?, heads_first(k)?, heads_first(v)?);
    let (grad_out, out) = (heads_first(grad_out)?, heads_first(&attended.out)?);
    let log_sum_exp = &attended.log_sum_exp;
    let (grad_q, grad_k, grad_v) = match &attended.flash {
        Some(state) => on_cuda::flash_attention_backward(&grad_out, [&q, &k, &v], &out, log_sum_exp, state)?,
        None => plain::attention_backward(&grad_out, [&q, &k, &v], &out, log_sum_exp)?,
    };
    Ok((grad_q.f_transpose(1, 2)?, grad_k.f_transpose(1, 2)?, grad_v.f_transpose(1, 2)?))
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
