//! The LoRA-guided score pass by the CPU's own kernel (`shim/scores.cpp`): one read of the weight, nothing of its size
//! stored.

use crate::fault::{Fault, Result};
use crate::ffi::{self, raw};
use model_spec::Split;
use recipe::LoraPruneForm;
use tch::{Device, Kind, Tensor};

/// The factors of a projection and their gradients, `a` `[r, columns]` and `b` `[rows, r]`, contiguous.
pub(crate) struct GuidedFactors<'a> {
    pub(crate) a: &'a Tensor,
    /// What `grad_b` is multiplied by.
    pub(crate) stepped_a: &'a Tensor,
    pub(crate) grad_a: &'a Tensor,
    pub(crate) b: &'a Tensor,
    pub(crate) grad_b: &'a Tensor,
    pub(crate) scaling: f64,
}

/// Whether the kernel knows this device and format of factors.
pub(crate) fn takes(factors: &Tensor) -> bool {
    factors.device() == Device::Cpu && factors.kind() == Kind::Float
}

/// Sums in f64 over each row (`Split::Column`) or column (`Split::Row`) of `|Ghat W|` or its square, `Ghat` being
/// `grad_b stepped_a + b grad_a` and `W` the weight with its adapter.
///
/// `tile(start, len)` gives rows of the frozen weight in f32 or bf16, contiguous; `tile_rows` of them are asked for at a
/// time.
pub(crate) fn guided_sums(
    factors: &GuidedFactors,
    form: LoraPruneForm,
    split: Split,
    tile_rows: i64,
    tile: &dyn Fn(i64, i64) -> Result<Tensor>,
) -> Result<Tensor> {
    let (rows, columns) = (factors.b.size()[0], factors.a.size()[1]);
    let by_column = match split {
        Split::Column => false,
        Split::Row => true,
    };
    let sums = Tensor::f_zeros([if by_column { columns } else { rows }], (Kind::Double, Device::Cpu))?;
    let square = match form {
        LoraPruneForm::Code => false,
        LoraPruneForm::Paper => true,
    };
    let mut start = 0;
    while start < rows {
        let len = tile_rows.clamp(1, rows - start);
        let weight = tile(start, len)?;
        let (b, grad_b) = (factors.b.f_narrow(0, start, len)?, factors.grad_b.f_narrow(0, start, len)?);
        let part = if by_column { sums.shallow_clone() } else { sums.f_narrow(0, start, len)? };
        // SAFETY: live tensors; the shim checks shapes, devices and formats.
        let message = unsafe {
            ffi::esp_low_rank_scores(
                raw(&weight),
                raw(factors.a),
                raw(factors.stepped_a),
                raw(factors.grad_a),
                raw(&b),
                raw(&grad_b),
                factors.scaling,
                square,
                by_column,
                raw(&part),
            )
        };
        ffi::check(message, Fault::Refused)?;
        start += len;
    }
    Ok(sums)
}
