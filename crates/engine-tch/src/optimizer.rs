//! AdamW on the flat factors, by libtorch's fused operator.

use crate::fault::{Fault, Result};
use crate::ffi;
use recipe::AdamW;
use tch::{Device, Kind, Tensor};

/// First and second moments, flat like the factors.
pub(crate) struct Moments {
    pub(crate) exp_avg: Tensor,
    pub(crate) exp_avg_sq: Tensor,
    /// Updates taken.
    pub(crate) updates: u64,
}

impl Moments {
    pub(crate) fn zeros_like(factors: &Tensor) -> Result<Self> {
        Ok(Self { exp_avg: factors.f_zeros_like()?, exp_avg_sq: factors.f_zeros_like()?, updates: 0 })
    }

    /// ```text
    /// p <- p (1 - lr wd)     m <- b1 m + (1 - b1) g     v <- b2 v + (1 - b2) g^2
    /// p <- p - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)
    /// ```
    pub(crate) fn adamw_step(
        &mut self,
        factors: &mut Tensor,
        gradients: &Tensor,
        learning_rate: f64,
        adamw: &AdamW,
    ) -> Result<()> {
        self.updates += 1;
        let step = Tensor::f_full([1i64; 0], self.updates as f64, (Kind::Float, Device::Cpu))?;
        let step = step.f_to_device(factors.device())?;
        // SAFETY: all five are live tensors; the operator works in place on the first, third and fourth.
        let message = unsafe {
            ffi::esp_fused_adamw(
                ffi::raw(factors),
                ffi::raw(gradients),
                ffi::raw(&self.exp_avg),
                ffi::raw(&self.exp_avg_sq),
                ffi::raw(&step),
                learning_rate,
                adamw.beta1,
                adamw.beta2,
                adamw.weight_decay,
                adamw.eps,
            )
        };
        ffi::check(message, |text| Fault::Refused(format!("AdamW failed: {text}")))
    }
}
