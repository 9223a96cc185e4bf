//! Pruning one linear at a time against what flows into it: single weights of `W: [out, in]`, row by row, and what the
//! weights that stay must become. No gradient, no other layer.
//!
//! ```text
//! inputs ─ InputStatistics ─▶ mask (magnitude, Wanda, SparseGPT, MRP) ─ DSnoT ─▶ compensation (SparseGPT, MRP) ─▶ W
//! ```
//!
//! Rows are problems of their own, but for the two masks that choose over rows: by magnitude, and SparseGPT's by block.

mod dsnot;
mod hessian;
mod input_statistics;
mod mrp;
mod mrp_mask;
mod single_scores;
mod sparse_gpt;
mod weight_mask;

pub use dsnot::{Dsnot, DsnotOutcome, DsnotSettings, Ending, SignRule, Swaps};
pub use hessian::Hessian;
pub use input_statistics::{InputStatistics, Moments, StatisticsError};
pub use mrp::{mrp_compensate, mrp_compensate_columns, mrp_group_losses};
pub use mrp_mask::{mrp_mask_by_group, mrp_mask_by_single, mrp_single_scores};
pub use single_scores::{magnitude_mask, wanda_mask, wanda_scores};
pub use sparse_gpt::{SparseGptSettings, Threshold, sparse_gpt, sparse_gpt_sweep};
pub use weight_mask::{Pattern, WeightMask};

use crate::criterion::ShapeMismatch;
use crate::linear_algebra::MatrixError;
use crate::slices::{SliceError, check_matrix};

/// The weight of a linear, row-major: `y = W x`.
#[derive(Debug, Clone, Copy)]
pub struct LinearWeight<'a> {
    /// Output features.
    pub rows: usize,
    /// Input features.
    pub columns: usize,
    /// `[rows, columns]`
    pub weight: &'a [f64],
}

/// A weight after pruning, with exact zeros where it was pruned.
#[derive(Debug, Clone, PartialEq)]
pub struct Compensated {
    /// `[rows, columns]`
    pub weight: Vec<f64>,
    /// By row, `d H d^T` of the change `d`, `H` being dampened: without damping the squared error over all tokens.
    pub row_losses: Vec<f64>,
}

/// Why a linear cannot be pruned.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum LayerwiseError {
    #[error("a linear of shape [{rows}, {columns}] has no weight")]
    Empty { rows: usize, columns: usize },
    #[error("sparsity must lie in [0, 1]; got {sparsity}")]
    Sparsity { sparsity: f64 },
    #[error("{pruned} of {of} cannot go in each group: at least 1 and at most all of them must be meant")]
    Group { pruned: usize, of: usize },
    #[error("{columns} inputs do not divide into groups of {of}")]
    Columns { columns: usize, of: usize },
    #[error("choosing {pruned} of {of} in every group takes {subsets} subsets; the most is {most}")]
    Subsets { pruned: usize, of: usize, subsets: u128, most: u128 },
    #[error("`{what}` must be {rule}; got {value}")]
    Setting { what: &'static str, rule: &'static str, value: f64 },
    #[error("`{what}` is for {actual} inputs, the weight has {expected}")]
    InputCount { what: &'static str, expected: usize, actual: usize },
    #[error("the weight mask is of shape {actual:?}, the weight of {expected:?}")]
    MaskShape { expected: [usize; 2], actual: [usize; 2] },
    #[error("row {row}: the compensated weights are not finite; dampen the Hessian more")]
    Overflow { row: usize },
    #[error("the inputs' second moments cannot be solved with")]
    Matrix(#[from] MatrixError),
    #[error(transparent)]
    Slice(#[from] SliceError),
}

impl From<ShapeMismatch> for LayerwiseError {
    fn from(mismatch: ShapeMismatch) -> Self {
        Self::Slice(mismatch.into())
    }
}

impl LinearWeight<'_> {
    fn check(&self) -> Result<(), LayerwiseError> {
        let Self { rows, columns, .. } = *self;
        if rows == 0 || columns == 0 {
            return Err(LayerwiseError::Empty { rows, columns });
        }
        Ok(check_matrix("weight", self.weight, [self.rows, self.columns])?)
    }

    fn check_hessian(&self, hessian: &Hessian) -> Result<(), LayerwiseError> {
        self.check()?;
        let (expected, actual) = (self.columns, hessian.size());
        if expected == actual {
            Ok(())
        } else {
            Err(LayerwiseError::InputCount { what: "hessian", expected, actual })
        }
    }

    fn check_mask(&self, weight_mask: &WeightMask) -> Result<(), LayerwiseError> {
        let (expected, actual) = ([self.rows, self.columns], [weight_mask.rows(), weight_mask.columns()]);
        if expected == actual { Ok(()) } else { Err(LayerwiseError::MaskShape { expected, actual }) }
    }

    fn row(&self, row: usize) -> &[f64] {
        &self.weight[row * self.columns..(row + 1) * self.columns]
    }
}

#[cfg(test)]
mod combination_tests;
#[cfg(test)]
mod tests;
