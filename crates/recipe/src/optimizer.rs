use crate::{Violations, in_unit_interval};
use serde::{Deserialize, Serialize};

/// What turns gradients of the LoRA factors into steps.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Optimizer {
    #[serde(rename = "adamw")]
    AdamW(AdamW),
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

impl Default for AdamW {
    fn default() -> Self {
        Self { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.0 }
    }
}

impl Default for Optimizer {
    fn default() -> Self {
        Self::AdamW(AdamW::default())
    }
}

impl Optimizer {
    pub(crate) fn check(&self, found: &mut Violations) {
        let Self::AdamW(adamw) = self;
        for (field, value) in [("optimizer.beta1", adamw.beta1), ("optimizer.beta2", adamw.beta2)] {
            found.require(in_unit_interval(value, false), field, || {
                format!("must lie in [0, 1); got {value}")
            });
        }
        found.require(adamw.eps.is_finite() && adamw.eps > 0.0, "optimizer.eps", || {
            format!("must be a positive number; got {}", adamw.eps)
        });
        found.require(
            adamw.weight_decay.is_finite() && adamw.weight_decay >= 0.0,
            "optimizer.weight_decay",
            || format!("must be zero or positive; got {}", adamw.weight_decay),
        );
    }
}
