use crate::{Violations, in_unit_interval};
use serde::{Deserialize, Serialize};

/// What turns gradients of the LoRA factors into steps.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Optimizer {
    #[serde(rename = "adamw")]
    AdamW(AdamW),
    LoraRite(LoraRite),
}

/// AdamW (arXiv:1711.05101), the weight decay decoupled from the gradient.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AdamW {
    pub beta1: f64,
    pub beta2: f64,
    pub eps: f64,
    pub weight_decay: f64,
}

/// LoRA-RITE (arXiv:2410.20625): steps of the product `B A` that do not depend on how it is split into `A` and `B`.
///
/// The recipe's `max_grad_norm` bounds the norm of the unmagnified gradients over all pairs of factors, which does not depend
/// on the split either, instead of the plain gradients' norm. Its learning rate is the RMS of a step of `B A` in the basis of
/// the factors and is not on AdamW's scale; the first steps, with `B` near zero, want a warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LoraRite {
    pub beta1: f64,
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    pub weight_decay: f64,
    /// Whether second moments that are lost when the basis moves count on. Absent: where the recipe prunes.
    pub escaped_mass: Option<bool>,
    /// Whether `A` is stepped in the basis of the new `B`, which bounds a step of `B A` however small `B` is.
    pub guard: bool,
    /// A factor whose unmagnified gradient has a larger RMS takes no step. Absent: none is left out.
    pub max_rms: Option<f64>,
}

impl Default for AdamW {
    fn default() -> Self {
        Self { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.0 }
    }
}

impl Default for LoraRite {
    fn default() -> Self {
        Self {
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-6,
            weight_decay: 0.0,
            escaped_mass: None,
            guard: true,
            max_rms: None,
        }
    }
}

impl Default for Optimizer {
    fn default() -> Self {
        Self::AdamW(AdamW::default())
    }
}

impl Optimizer {
    pub(crate) fn check(&self, found: &mut Violations) {
        let (beta1, beta2, eps, weight_decay) = match *self {
            Self::AdamW(AdamW { beta1, beta2, eps, weight_decay })
            | Self::LoraRite(LoraRite { beta1, beta2, eps, weight_decay, .. }) => {
                (beta1, beta2, eps, weight_decay)
            }
        };
        for (field, value) in [("optimizer.beta1", beta1), ("optimizer.beta2", beta2)] {
            found.require(in_unit_interval(value, false), field, || {
                format!("must lie in [0, 1); got {value}")
            });
        }
        found.require(eps.is_finite() && eps > 0.0, "optimizer.eps", || {
            format!("must be a positive number; got {eps}")
        });
        found.require(weight_decay.is_finite() && weight_decay >= 0.0, "optimizer.weight_decay", || {
            format!("must be zero or positive; got {weight_decay}")
        });
        if let Self::LoraRite(LoraRite { max_rms: Some(most), .. }) = *self {
            found.require(most.is_finite() && most > 0.0, "optimizer.max_rms", || {
                format!("must be a positive number, or absent for no limit; got {most}")
            });
        }
    }
}
