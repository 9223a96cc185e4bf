use crate::{Violations, in_unit_interval};
use serde::{Deserialize, Serialize};

/// LoRA (arXiv:2106.09685) on the seven projections of every layer.
///
/// ```text
/// y = x W^T + (alpha / rank) * (dropout(x) A^T) B^T        A: [rank, in]   B: [out, rank]
/// ```
///
/// `A` starts uniform in `±1/sqrt(in)`, `B` at zero. Projections that read the same input share its dropout mask.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Lora {
    pub rank: usize,
    pub alpha: f64,
    /// Chance that an input feature of the low-rank path is dropped in training.
    pub dropout: f64,
}

impl Lora {
    #[must_use]
    pub fn scaling(&self) -> f64 {
        self.alpha / self.rank as f64
    }

    pub(crate) fn check(&self, found: &mut Violations) {
        found.require((1..=1024).contains(&self.rank), "lora.rank", || {
            format!("must lie in 1..=1024; got {}", self.rank)
        });
        found.require(self.alpha.is_finite() && self.alpha > 0.0, "lora.alpha", || {
            format!("must be a positive number; got {}", self.alpha)
        });
        found.require(in_unit_interval(self.dropout, false), "lora.dropout", || {
            format!("must lie in [0, 1); got {}", self.dropout)
        });
    }
}

impl Default for Lora {
    fn default() -> Self {
        Self { rank: 8, alpha: 16.0, dropout: 0.05 }
    }
}
