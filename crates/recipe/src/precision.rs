use crate::Violations;
use serde::{Deserialize, Serialize};

/// Number formats of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Precision {
    /// What products are computed in.
    pub compute: Compute,
    /// What the frozen weights are held in.
    pub storage: Storage,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Compute {
    F32,
    /// For checking the engine against references.
    F64,
    /// On CUDA devices only.
    Bf16,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Storage {
    F32,
    F64,
    Bf16,
    /// One byte a weight, one scale for each output row.
    Int8,
    /// Half a byte a weight, one scale for 64 (arXiv:2305.14314).
    Nf4,
}

/// What is kept of the forward pass for the backward pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Recompute {
    /// Keep what the backward pass reads.
    #[default]
    None,
    /// Keep each layer's input alone and run the layer forward again: a third more work, a fraction of the memory.
    Layer,
}

impl Default for Precision {
    fn default() -> Self {
        Self { compute: Compute::F32, storage: Storage::F32 }
    }
}

impl Precision {
    pub(crate) fn check(&self, found: &mut Violations) {
        let narrower_compute = match (self.storage, self.compute) {
            (Storage::F64, Compute::F32 | Compute::Bf16) | (Storage::F32, Compute::Bf16) => true,
            (Storage::F32 | Storage::Bf16, Compute::F32 | Compute::F64)
            | (Storage::F64, Compute::F64)
            | (Storage::Bf16, Compute::Bf16)
            | (Storage::Int8 | Storage::Nf4, Compute::F32 | Compute::F64 | Compute::Bf16) => false,
        };
        found.require(!narrower_compute, "precision.storage", || {
            "must not be wider than `precision.compute`: the extra bits would never be used".into()
        });
    }
}
