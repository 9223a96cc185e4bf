//! The optimizers of the flat factors, and what they remember.

pub(crate) mod lora_rite;

use crate::fault::{Fault, Result};
use crate::ffi;
use lora_rite::PairMoments;
use recipe::{AdamW, Optimizer};
use tch::{Device, Kind, Tensor};

/// What an optimizer remembers from step to step.
pub(crate) struct Moments {
    /// Two tensors, flat like the factors, so that they are sliced and moved as the factors are: AdamW's first and second
    /// moments; LoRA-RITE's first moments and the bases that they are in.
    pub(crate) flats: [Tensor; 2],
    /// LoRA-RITE's second moments.
    pub(crate) pairs: Option<PairMoments>,
    /// Updates taken.
    pub(crate) updates: u64,
}

impl Moments {
    /// Those of no step yet, for `pair_count` pairs of factors of `lora_rank`.
    pub(crate) fn zeros(
        optimizer: &Optimizer,
        factors: &Tensor,
        pair_count: i64,
        lora_rank: i64,
    ) -> Result<Self> {
        let pairs = match optimizer {
            Optimizer::AdamW(_) => None,
            Optimizer::LoraRite(_) => Some(PairMoments::zeros(pair_count, lora_rank, factors.device())?),
        };
        Ok(Self { flats: [factors.f_zeros_like()?, factors.f_zeros_like()?], pairs, updates: 0 })
    }

    /// Prefixes under which checkpoints keep the flat tensors.
    pub(crate) fn names(optimizer: &Optimizer) -> [&'static str; 2] {
        match optimizer {
            Optimizer::AdamW(_) => ["exp_avg", "exp_avg_sq"],
            Optimizer::LoraRite(_) => ["rite_moment", "rite_basis"],
        }
    }

    /// By libtorch's fused operator.
    ///
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
        let [first, second] = &self.flats;
        // SAFETY: all five are live tensors; the operator works in place on the first, third and fourth.
        let message = unsafe {
            ffi::esp_fused_adamw(
                ffi::raw(factors),
                ffi::raw(gradients),
                ffi::raw(first),
                ffi::raw(second),
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
