//! The pieces on a CUDA device: kernels of `cuda/kernels.cu`, and libtorch's flash attention.
//!
//! Every function takes the launcher that runs its kernel, so that the tests run the same kernels on a CPU.

use crate::cuda::launch::{Args, Launcher, THREADS, elements_grid, rows_grid, suffix};
use crate::fault::{Fault, Result};
use crate::ffi::{self, raw};
use std::ffi::c_void;
use tch::{Kind, Tensor};

fn run(on: &dyn Launcher, kernel: &str, kind: Kind, grid: [u32; 2], args: &Args) -> Result<()> {
    on.launch(&format!("{kernel}_{}", suffix(kind)?), grid, THREADS, args)
}

fn new(like: &Tensor, rows: i64, columns: i64) -> Result<Tensor> {
    Ok(Tensor::f_empty([rows, columns], (like.kind(), like.device()))?)
}

/// What kernels may read by rows without strides.
fn flat(x: &Tensor) -> Result<Tensor> {
    Ok(x.f_contiguous()?)
}

fn same_kind(what: &str, x: &Tensor, others: &[&Tensor]) -> Result<()> {
    match others.iter().find(|other| other.kind() != x.kind()) {
        Some(other) => {
            Err(Fault::Refused(format!("{what} got tensors of {:?} and {:?}", x.kind(), other.kind())))
        }
        None => Ok(()),
    }
}

/// `rstd` is f32 whatever the format.
pub(crate) fn rms_norm(on: &dyn Launcher, x: &Tensor, weight: &Tensor, eps: f64) -> Result<(Tensor, Tensor)> {
    same_kind("rms_norm", x, &[weight])?;
    let (rows, width) = x.size2()?;
    let rstd = Tensor::f_empty([rows, 1], (Kind::Float, x.device()))?;
    let y = new(x, rows, width)?;
    if rows > 0 {
        let x = flat(x)?;
        let args = Args::new(&[&x, weight, &rstd, &y], &[width], &[eps]);
        run(on, "rms_norm", x.kind(), rows_grid(rows)?, &args)?;
    }
    Ok((rstd, y))
}

pub(crate) fn rms_norm_apply(
    on: &dyn Launcher,
    x: &Tensor,
    rstd: &Tensor,
    weight: &Tensor,
) -> Result<Tensor> {
    same_kind("rms_norm", x, &[weight])?;
    let (rows, width) = x.size2()?;
    let y = new(x, rows, width)?;
    if rows > 0 {
        let x = flat(x)?;
        run(
            on,
            "rms_norm_apply",
            x.kind(),
            rows_grid(rows)?,
            &Args::new(&[&x, rstd, weight, &y], &[width], &[]),
        )?;
    }
    Ok(y)
}

pub(crate) fn rms_norm_backward_add(
    on: &dyn Launcher,
    grad_x: &mut Tensor,
    grad_y: &Tensor,
    x: &Tensor,
    rstd: &Tensor,
    weight: &Tensor,
) -> Result<()> {
    same_kind("rms_norm", x, &[weight, grad_x, grad_y])?;
    let (rows, width) = x.size2()?;
    if rows == 0 {
        return Ok(());
    }
    if !grad_x.is_contiguous() {
        return Err(Fault::Refused("a gradient that is added to must be contiguous".into()));
    }
    let (x, grad_y) = (flat(x)?, flat(grad_y)?);
    let args = Args::new(&[grad_x, &grad_y, &x, rstd, weight], &[width], &[]);
    run(on, "rms_norm_backward_add", x.kind(), rows_grid(rows)?, &args)
}

pub(crate) fn rotate(
    on: &dyn Launcher,
    x: &Tensor,
    cos: &Tensor,
    sin: &Tensor,
    sign: f64,
    heads: i64,
) -> Result<Tensor> {
    same_kind("rotation", x, &[cos, sin])?;
    let (rows, width) = x.size2()?;
    let (tokens, half) = cos.size2()?;
    if width != heads * 2 * half || tokens == 0 {
        return Err(Fault::Refused(format!("rotation of {heads} heads got {width} columns")));
    }
    let y = new(x, rows, width)?;
    if y.numel() > 0 {
        let x = if x.stride()[1] == 1 { x.shallow_clone() } else { flat(x)? };
        let args = Args::new(&[&x, &y, cos, sin], &[rows, x.stride()[0], tokens, heads, half], &[sign]);
        run(on, "rotate", x.kind(), elements_grid(rows * heads * half), &args)?;
    }
    Ok(y)
}

pub(crate) fn swiglu(on: &dyn Launcher, gate_up: &Tensor) -> Result<Tensor> {
    let (rows, both) = gate_up.size2()?;
    let act = new(gate_up, rows, both / 2)?;
    if act.numel() > 0 {
        let gate_up = flat(gate_up)?;
        let args = Args::new(&[&gate_up, &act], &[rows, both / 2], &[]);
        run(on, "swiglu", act.kind(), elements_grid(rows * both / 2), &args)?;
    }
    Ok(act)
}

pub(crate) fn swiglu_backward(on: &dyn Launcher, grad_act: &Tensor, gate_up: &Tensor) -> Result<Tensor> {
    same_kind("swiglu", gate_up, &[grad_act])?;
    let (rows, both) = gate_up.size2()?;
    let grad = new(gate_up, rows, both)?;
    if grad.numel() > 0 {
        let (grad_act, gate_up) = (flat(grad_act)?, flat(gate_up)?);
        let args = Args::new(&[&grad_act, &gate_up, &grad], &[rows, both / 2], &[]);
        run(on, "swiglu_backward", grad.kind(), elements_grid(rows * both / 2), &args)?;
    }
    Ok(grad)
}

/// See [`crate::dropout`].
pub(crate) fn dropout(
    on: &dyn Launcher,
    x: &Tensor,
    features: &Tensor,
    key: u32,
    first_token: u32,
    threshold: u64,
    scale: f64,
) -> Result<Tensor> {
    let (rows, width) = x.size2()?;
    let y = new(x, rows, width)?;
    if y.numel() > 0 {
        let x = flat(x)?;
        let integers = [rows, width, i64::from(key), i64::from(first_token), threshold as i64];
        run(
            on,
            "dropout",
            x.kind(),
            elements_grid(rows * width),
            &Args::new(&[&x, &y, features], &integers, &[scale]),
        )?;
    }
    Ok(y)
}

/// `q` int8 `[rows, columns]` times `scale` f32 `[rows, 1]`, both contiguous.
pub(crate) fn widen_int8(on: &dyn Launcher, q: &Tensor, scale: &Tensor, kind: Kind) -> Result<Tensor> {
    let (rows, width) = q.size2()?;
    let out = Tensor::f_empty([rows, width], (kind, q.device()))?;
    if out.numel() > 0 {
        let args = Args::new(&[&flat(q)?, &flat(scale)?, &out], &[rows, width], &[]);
        run(on, "widen_int8", kind, elements_grid(rows * width), &args)?;
    }
    Ok(out)
}

/// See [`crate::frozen`]: `codes` u8 `[lines, bytes]` and `scale` f32 `[lines, bytes / 32]`, rows with strides.
pub(crate) fn widen_nf4(
    on: &dyn Launcher,
    codes: &Tensor,
    scale: &Tensor,
    table: &Tensor,
    kind: Kind,
) -> Result<Tensor> {
    let (lines, bytes) = codes.size2()?;
    let out = Tensor::f_empty([lines, bytes * 2], (kind, codes.device()))?;
    if out.numel() > 0 {
        let integers = [lines, bytes, codes.stride()[0], scale.stride()[0]];
        let args = Args::new(&[codes, scale, table, &out], &integers, &[]);
        run(on, "widen_nf4", kind, elements_grid(lines * bytes), &args)?;
    }
    Ok(out)
}

/// Which sums of a score pass are wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum SumsOf {
    Rows,
    Columns,
}

/// The matrices of one score pass; factors and gradients in f32, contiguous.
pub(crate) struct ScoredWeight<'a> {
    /// `[rows, columns]`
    pub(crate) weight: &'a Tensor,
    /// `[rank, columns]`
    pub(crate) a: &'a Tensor,
    pub(crate) grad_a: &'a Tensor,
    /// `[rows, rank]`
    pub(crate) b: &'a Tensor,
    pub(crate) grad_b: &'a Tensor,
    pub(crate) scaling: f64,
}

/// Rows that a block of the score pass goes down.
const SCORED_ROWS: i64 = 256;

/// `|([dB | B] [A - dA ; dA]) (W + s B A)|`, or its square, summed along rows or columns: f32.
pub(crate) fn low_rank_sums(
    on: &dyn Launcher,
    scored: &ScoredWeight,
    sums: SumsOf,
    square: bool,
) -> Result<Tensor> {
    let (rows, columns) = scored.weight.size2()?;
    let device = scored.weight.device();
    let len = match sums {
        SumsOf::Rows => rows,
        SumsOf::Columns => columns,
    };
    if rows == 0 || columns == 0 {
        return Ok(Tensor::f_zeros([len], (Kind::Float, device))?);
    }
    let factors = [scored.a, scored.grad_a, scored.b, scored.grad_b];
    if factors.iter().any(|factor| factor.kind() != Kind::Float || !factor.is_contiguous()) {
        return Err(Fault::Refused("the score kernel takes contiguous factors in f32".into()));
    }
    let (threads, lanes) = on.score_threads();
    let column_blocks = (columns + i64::from(threads) - 1) / i64::from(threads);
    let row_blocks = (rows + SCORED_ROWS - 1) / SCORED_ROWS;
    let parts = match sums {
        SumsOf::Rows => [column_blocks * i64::from(threads / lanes), rows],
        SumsOf::Columns => [row_blocks, columns],
    };
    let parts = Tensor::f_empty(parts, (Kind::Float, device))?;
    let weight = flat(scored.weight)?;
    let tensors = [&weight, scored.a, scored.grad_a, scored.b, scored.grad_b, &parts];
    let integers = [rows, columns, SCORED_ROWS, i64::from(sums == SumsOf::Columns), i64::from(square)];
    let args = Args::new(&tensors, &integers, &[scored.scaling]);
    let grid = [rows_grid(column_blocks)?[0], rows_grid(row_blocks)?[0]];
    on.launch(&format!("low_rank_scores_{}", suffix(weight.kind())?), grid, threads, &args)?;
    Ok(parts.f_sum_dim_intlist(&[0i64][..], false, Kind::Float)?)
}

/// What flash attention's backward pass needs beside its inputs, output and log-sum-exp.
pub(crate) struct FlashState {
    state: Tensor,
    offset: Tensor,
    max_q: i64,
    max_k: i64,
}

/// Whether libtorch's flash kernels take heads of this format and width.
pub(crate) fn flash_takes(q: &Tensor) -> bool {
    let width = q.size().last().copied().unwrap_or_default();
    q.device().is_cuda() && matches!(q.kind(), Kind::BFloat16 | Kind::Half) && width % 8 == 0 && width <= 256
}

/// Causal attention of `[b, h, t, k]` tensors: output, log-sum-exp and state.
pub(crate) fn flash_attention(q: &Tensor, k: &Tensor, v: &Tensor) -> Result<(Tensor, Tensor, FlashState)> {
    let mut out: [*mut c_void; 4] = [std::ptr::null_mut(); 4];
    let (mut max_q, mut max_k) = (0, 0);
    // SAFETY: three live tensors; four new ones come back, each owned here from now on.
    let [attended, log_sum_exp, state, offset] = unsafe {
        let [attended, log_sum_exp, state, offset] = &mut out;
        ffi::check(
            ffi::esp_flash_attention(
                raw(q),
                raw(k),
                raw(v),
                attended,
                log_sum_exp,
                state,
                offset,
                &raw mut max_q,
                &raw mut max_k,
            ),
            Fault::Refused,
        )?;
        out.map(|tensor| Tensor::from_ptr(tensor.cast()))
    };
    Ok((attended, log_sum_exp, FlashState { state, offset, max_q, max_k }))
}

/// Gradients of q, k and v, `[b, h, t, k]` each.
pub(crate) fn flash_attention_backward(
    grad_out: &Tensor,
    [q, k, v]: [&Tensor; 3],
    out: &Tensor,
    log_sum_exp: &Tensor,
    state: &FlashState,
) -> Result<(Tensor, Tensor, Tensor)> {
    let mut grads: [*mut c_void; 3] = [std::ptr::null_mut(); 3];
    // SAFETY: live tensors; three new ones come back, each owned here from now on.
    let [grad_q, grad_k, grad_v] = unsafe {
        let [grad_q, grad_k, grad_v] = &mut grads;
        ffi::check(
            ffi::esp_flash_attention_backward(
                raw(grad_out),
                raw(q),
                raw(k),
                raw(v),
                raw(out),
                raw(log_sum_exp),
                raw(&state.state),
                raw(&state.offset),
                state.max_q,
                state.max_k,
                grad_q,
                grad_k,
                grad_v,
            ),
            Fault::Refused,
        )?;
        grads.map(|tensor| Tensor::from_ptr(tensor.cast()))
    };
    Ok((grad_q, grad_k, grad_v))
}
