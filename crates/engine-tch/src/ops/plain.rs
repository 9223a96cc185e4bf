//! The element-wise pieces composed of libtorch operators: the references of the fused kernels, and what runs on devices
//! and formats that those do not know.

use crate::fault::Result;
use tch::{Kind, Tensor};

/// 16-bit numbers are reduced in f32.
fn wide(x: &Tensor) -> Result<Tensor> {
    let narrow = matches!(x.kind(), Kind::BFloat16 | Kind::Half);
    Ok(if narrow { x.f_to_kind(Kind::Float)? } else { x.shallow_clone() })
}

/// `rstd` `[n, 1]` and `y`.
pub(crate) fn rms_norm(x_nd: &Tensor, weight_d: &Tensor, eps: f64) -> Result<(Tensor, Tensor)> {
    let mean_square = wide(x_nd)?.f_square()?.f_mean_dim(&[-1i64][..], true, None)?;
    let rstd = mean_square.f_add_scalar(eps)?.f_rsqrt()?;
    let y = rms_norm_apply(x_nd, &rstd, weight_d)?;
    Ok((rstd, y))
}

pub(crate) fn rms_norm_apply(x_nd: &Tensor, rstd_n1: &Tensor, weight_d: &Tensor) -> Result<Tensor> {
    Ok(x_nd.f_mul(rstd_n1)?.f_mul_(weight_d)?.f_to_kind(x_nd.kind())?)
}

pub(crate) fn rms_norm_backward_add(
    grad_x_nd: &mut Tensor,
    grad_y_nd: &Tensor,
    x_nd: &Tensor,
    rstd_n1: &Tensor,
    weight_d: &Tensor,
) -> Result<()> {
    let scaled = wide(grad_y_nd)?.f_mul(weight_d)?;
    let normal = x_nd.f_mul(rstd_n1)?;
    let along = scaled.f_mul(&normal)?.f_mean_dim(&[-1i64][..], true, None)?;
    let grad = scaled.f_sub(&normal.f_mul(&along)?)?.f_mul_(rstd_n1)?;
    let _ = grad_x_nd.f_add_(&grad)?;
    Ok(())
}

/// Pairs `(j, j + k/2)` of `x` `[n, heads * k]` turned by `sign` times the angles whose cosines and sines are given,
/// `[t, k/2]` each; row `j` has position `j % t`.
pub(crate) fn rotate(x: &Tensor, cos: &Tensor, sin: &Tensor, sign: f64, heads: i64) -> Result<Tensor> {
    let (tokens, half) = cos.size2()?;
    let rows = x.size()[0];
    let x = x.f_reshape([rows / tokens, tokens, heads, 2 * half])?;
    let (cos, sin) = (cos.f_unsqueeze(1)?, sin.f_unsqueeze(1)?.f_mul_scalar(sign)?);
    let (left, right) = (x.f_narrow(3, 0, half)?, x.f_narrow(3, half, half)?);
    let turned_left = left.f_mul(&cos)?.f_sub_(&right.f_mul(&sin)?)?;
    let turned_right = right.f_mul(&cos)?.f_add_(&left.f_mul(&sin)?)?;
    Ok(Tensor::f_cat(&[turned_left, turned_right], 3)?.f_view([rows, heads * 2 * half])?)
}

pub(crate) fn swiglu(gate_up: &Tensor) -> Result<Tensor> {
    let halves = gate_up.f_chunk(2, -1)?;
    Ok(halves[0].f_silu()?.f_mul_(&halves[1])?)
}

pub(crate) fn swiglu_backward(grad_act: &Tensor, gate_up: &Tensor) -> Result<Tensor> {
    let halves = gate_up.f_chunk(2, -1)?;
    let grad_gate = halves[0].f_silu_backward(&grad_act.f_mul(&halves[1])?)?;
    let grad_up = halves[0].f_silu()?.f_mul_(grad_act)?;
    Ok(Tensor::f_cat(&[grad_gate, grad_up], -1)?)
}

/// `exp(logits - highest)` in place, and its row sums `[n, 1]`.
pub(crate) fn exp_sum(logits: &mut Tensor, highest: &Tensor) -> Result<Tensor> {
    let _ = logits.f_sub_(highest)?.f_exp_()?;
    Ok(logits.f_sum_dim_intlist(&[1i64][..], true, None)?)
}

/// Rows times `scale / sum`, in place.
pub(crate) fn scale_rows(values: &mut Tensor, sum: &Tensor, scale: f64) -> Result<()> {
    let _ = values.f_div_(sum)?.f_mul_scalar_(scale)?;
    Ok(())
}

/// Causal attention of `[b, h, t, k]` tensors and the rows' log-sum-exp `[b, h, t, 1]`, in f32 or wider.
pub(crate) fn attention(q: &Tensor, k: &Tensor, v: &Tensor) -> Result<(Tensor, Tensor)> {
    let scores = causal_scores(q, k)?;
    let log_sum_exp = scores.f_logsumexp(&[-1i64][..], true)?;
    let probabilities = scores.f_sub(&log_sum_exp)?.f_exp()?;
    Ok((probabilities.f_matmul(&wide(v)?)?.f_to_kind(q.kind())?, log_sum_exp))
}

/// ```text
/// P = exp(S - lse)   dV = P^T dO   dP = dO V^T   dS = P (dP - rowsum(dO O))   dQ = dS K / sqrt(k)   dK = dS^T Q / sqrt(k)
/// ```
pub(crate) fn attention_backward(
    grad_out: &Tensor,
    [q, k, v]: [&Tensor; 3],
    out: &Tensor,
    log_sum_exp: &Tensor,
) -> Result<(Tensor, Tensor, Tensor)> {
    let scale = 1.0 / (q.size()[3] as f64).sqrt();
    let probabilities = causal_scores(q, k)?.f_sub_(log_sum_exp)?.f_exp_()?;
    let (grad, kind) = (wide(grad_out)?, q.kind());
    let grad_v = probabilities.f_transpose(2, 3)?.f_matmul(&grad)?;
    let along = grad.f_mul(&wide(out)?)?.f_sum_dim_intlist(&[-1i64][..], true, None)?;
    let grad_probabilities = grad.f_matmul(&wide(v)?.f_transpose(2, 3)?)?;
    let grad_scores = grad_probabilities.f_sub(&along)?.f_mul_(&probabilities)?.f_mul_scalar_(scale)?;
    let grad_q = grad_scores.f_matmul(&wide(k)?)?;
    let grad_k = grad_scores.f_transpose(2, 3)?.f_matmul(&wide(q)?)?;
    Ok((grad_q.f_to_kind(kind)?, grad_k.f_to_kind(kind)?, grad_v.f_to_kind(kind)?))
}

/// `q k^T / sqrt(k)` with later tokens at minus infinity.
fn causal_scores(q: &Tensor, k: &Tensor) -> Result<Tensor> {
    let (tokens, width) = (q.size()[2], q.size()[3]);
    let mut scores = wide(q)?.f_matmul(&wide(k)?.f_transpose(2, 3)?)?;
    let _ = scores.f_mul_scalar_(1.0 / (width as f64).sqrt())?;
    let later = Tensor::f_ones([tokens, tokens], (Kind::Bool, q.device()))?.f_triu(1)?;
    Ok(scores.f_masked_fill_(&later, f64::NEG_INFINITY)?)
}
