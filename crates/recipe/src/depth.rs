use crate::Violations;
use serde::{Deserialize, Serialize};

/// Whole blocks go: layers with their attention and MLP (Shortened LLaMA, arXiv:2402.02834).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Depth {
    pub criterion: BlockCriterion,
    /// Blocks that go; heads and channels make up the rest of the budget. Absent: as many as come nearest to the budget, and
    /// no head or channel besides.
    pub blocks: Option<usize>,
    /// The first four blocks and the last two stay.
    pub protect_ends: bool,
    /// Blocks are judged anew after each that goes.
    pub iterative: bool,
}

/// What a block is judged by. Those of the lowest score go.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BlockCriterion {
    /// Sum of the weights' magnitudes.
    Magnitude,
    /// Sum of `|w dL/dw|` over the weights, of the mean loss of the calibration windows.
    Taylor,
    /// Perplexity of the calibration windows without the block.
    #[default]
    Perplexity,
}

impl Default for Depth {
    fn default() -> Self {
        Self { criterion: BlockCriterion::default(), blocks: None, protect_ends: true, iterative: false }
    }
}

impl Depth {
    pub(crate) fn check(&self, found: &mut Violations) {
        found.require(self.blocks != Some(0), "pruning.depth.blocks", || {
            "must be at least 1; leave `depth` out to keep all blocks".into()
        });
        let judges_anew = self.criterion == BlockCriterion::Perplexity;
        found.require(!self.iterative || judges_anew, "pruning.depth.iterative", || {
            "goes with the perplexity criterion alone: the others' scores do not change when a block goes"
                .into()
        });
    }
}
