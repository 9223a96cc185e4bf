//! Starting kernels: what they get, and the device's own way of running them.

use crate::fault::{Fault, Result};
use std::ffi::c_void;
use tch::{Kind, Tensor};

/// What every kernel gets, by value; which place means what is said in `kernels.cu`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(crate) struct Args {
    pub(crate) pointers: [*mut c_void; 8],
    pub(crate) integers: [i64; 8],
    pub(crate) floats: [f32; 4],
}

impl Args {
    /// Tensors first, then numbers, in the order that the kernel says.
    pub(crate) fn new(tensors: &[&Tensor], integers: &[i64], floats: &[f64]) -> Self {
        let mut args = Self { pointers: [std::ptr::null_mut(); 8], integers: [0; 8], floats: [0.0; 4] };
        args.pointers.iter_mut().zip(tensors).for_each(|(place, tensor)| *place = tensor.data_ptr());
        args.integers.iter_mut().zip(integers).for_each(|(place, value)| *place = *value);
        args.floats.iter_mut().zip(floats).for_each(|(place, value)| *place = *value as f32);
        args
    }
}

/// Threads of a block where a block works on one row or on scattered elements.
pub(crate) const THREADS: u32 = 256;
/// Blocks that fill any device; each goes over its share of the elements.
const MOST_BLOCKS: i64 = 16_384;

/// Where kernels run.
pub(crate) trait Launcher {
    /// Queues `kernel` on `grid` blocks of `threads` threads.
    fn launch(&self, kernel: &str, grid: [u32; 2], threads: u32, args: &Args) -> Result<()>;

    /// Threads of a block, and of a warp, of `low_rank_scores`.
    fn score_threads(&self) -> (u32, u32) {
        (128, 32)
    }
}

/// Ending of the names of kernels that read and write `kind`; none where there are no such.
pub(crate) fn suffix(kind: Kind) -> Result<&'static str> {
    if kind == Kind::Float {
        Ok("f32")
    } else if kind == Kind::BFloat16 {
        Ok("bf16")
    } else {
        Err(Fault::Refused(format!("the CUDA kernels take f32 and bf16, not {kind:?}")))
    }
}

/// A grid for one block a row.
pub(crate) fn rows_grid(rows: i64) -> Result<[u32; 2]> {
    u32::try_from(rows)
        .ok()
        .filter(|rows| *rows <= i32::MAX as u32)
        .map(|rows| [rows, 1])
        .ok_or_else(|| Fault::Refused(format!("a kernel cannot go over {rows} rows")))
}

/// A grid for elements that threads go over with strides.
pub(crate) fn elements_grid(elements: i64) -> [u32; 2] {
    let blocks = (elements + i64::from(THREADS) - 1) / i64::from(THREADS);
    [blocks.clamp(1, MOST_BLOCKS) as u32, 1]
}
