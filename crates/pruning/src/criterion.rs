//! The criteria in their plain reference form, over row-major f64 slices: what the engine's kernels are checked against.
//!
//! ```text
//! W = W0 + s B A          W0: [out, in]   A: [rank, in]   B: [out, rank]   s = alpha / rank
//! ```
//!
//! Every form sums its per-weight score over rows and over columns; [`unit_sums`] picks the one that a projection's
//! groups lie along and gathers `head_dim` neighbours into a head.

mod lora_guided;
mod magnitude;
pub(crate) mod random;
mod taylor;
mod wanda;

pub use lora_guided::{LoraGradients, lora_guided_sums};
pub use magnitude::magnitude_sums;
pub use random::random_importance;
pub use taylor::taylor_sums;
pub use wanda::wanda_sums;

use model_spec::{Block, Projection, Split};

/// A frozen weight with its LoRA factors, all row-major.
#[derive(Debug, Clone, Copy)]
pub struct AdaptedWeight<'a> {
    /// Output features: rows of `weight` and of `lora_b`.
    pub rows: usize,
    /// Input features: columns of `weight` and of `lora_a`.
    pub columns: usize,
    pub lora_rank: usize,
    /// `alpha / lora_rank`.
    pub scaling: f64,
    /// `[rows, columns]`
    pub weight: &'a [f64],
    /// `[lora_rank, columns]`
    pub lora_a: &'a [f64],
    /// `[rows, lora_rank]`
    pub lora_b: &'a [f64],
}

/// A projection's per-weight scores, summed both ways.
#[derive(Debug, Clone, PartialEq)]
pub struct WeightSums {
    /// By output feature.
    pub rows: Vec<f64>,
    /// By input feature.
    pub columns: Vec<f64>,
}

/// A slice is not as long as its dimensions say.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{what}` holds {actual} numbers; its shape {shape:?} needs {}", shape[0].saturating_mul(shape[1]))]
pub struct ShapeMismatch {
    pub what: &'static str,
    pub shape: [usize; 2],
    pub actual: usize,
}

/// Sums per unit of `projection`: rows where its output is split, columns where its input is; whole heads in attention.
#[must_use]
pub fn unit_sums(sums: &WeightSums, projection: Projection, head_dim: usize) -> Vec<f64> {
    let features = match projection.split() {
        Split::Column => &sums.rows,
        Split::Row => &sums.columns,
    };
    let per_unit = match projection.block() {
        Block::Attention => head_dim.max(1),
        Block::Mlp => 1,
    };
    features.chunks(per_unit).map(|unit| unit.iter().sum()).collect()
}

impl AdaptedWeight<'_> {
    /// # Errors
    /// Names the first slice of the wrong length.
    pub(crate) fn check(&self) -> Result<(), ShapeMismatch> {
        check_shape("weight", self.weight, [self.rows, self.columns])?;
        check_shape("lora_a", self.lora_a, [self.lora_rank, self.columns])?;
        check_shape("lora_b", self.lora_b, [self.rows, self.lora_rank])
    }

    /// `W0 + s B A` at one place.
    pub(crate) fn merged(&self, row: usize, column: usize) -> f64 {
        self.weight[row * self.columns + column]
            + self.scaling * product_at(self.lora_b, self.lora_a, self.lora_rank, self.columns, row, column)
    }

    /// Sums `score(row, column)` both ways.
    pub(crate) fn sums(&self, score: impl Fn(usize, usize) -> f64) -> WeightSums {
        let mut sums = WeightSums { rows: vec![0.0; self.rows], columns: vec![0.0; self.columns] };
        for row in 0..self.rows {
            for column in 0..self.columns {
                let score = score(row, column);
                sums.rows[row] += score;
                sums.columns[column] += score;
            }
        }
        sums
    }
}

pub(crate) fn check_shape(
    what: &'static str,
    values: &[f64],
    shape: [usize; 2],
) -> Result<(), ShapeMismatch> {
    if shape[0].checked_mul(shape[1]) == Some(values.len()) {
        Ok(())
    } else {
        Err(ShapeMismatch { what, shape, actual: values.len() })
    }
}

/// Entry `(row, column)` of `left: [_, inner]` times `right: [inner, columns]`.
pub(crate) fn product_at(
    left: &[f64],
    right: &[f64],
    inner: usize,
    columns: usize,
    row: usize,
    column: usize,
) -> f64 {
    (0..inner).map(|k| left[row * inner + k] * right[k * columns + column]).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heads_lie_along_rows_of_q_k_v_and_columns_of_o_and_channels_along_gate_up_and_down() {
        let sums = WeightSums { rows: vec![1.0, 2.0, 3.0, 4.0], columns: vec![5.0, 6.0, 7.0, 8.0] };
        for (projection, expected) in [
            (Projection::Q, vec![3.0, 7.0]),
            (Projection::K, vec![3.0, 7.0]),
            (Projection::V, vec![3.0, 7.0]),
            (Projection::O, vec![11.0, 15.0]),
            (Projection::Gate, vec![1.0, 2.0, 3.0, 4.0]),
            (Projection::Up, vec![1.0, 2.0, 3.0, 4.0]),
            (Projection::Down, vec![5.0, 6.0, 7.0, 8.0]),
        ] {
            assert_eq!(unit_sums(&sums, projection, 2), expected, "{projection}");
        }
    }

    #[test]
    fn slices_of_the_wrong_length_are_named() {
        let good = AdaptedWeight {
            rows: 2,
            columns: 3,
            lora_rank: 1,
            scaling: 2.0,
            weight: &[0.0; 6],
            lora_a: &[0.0; 3],
            lora_b: &[0.0; 2],
        };
        for (weight, message) in [
            (
                AdaptedWeight { weight: &[0.0; 5], ..good },
                "`weight` holds 5 numbers; its shape [2, 3] needs 6",
            ),
            (
                AdaptedWeight { lora_a: &[0.0; 2], ..good },
                "`lora_a` holds 2 numbers; its shape [1, 3] needs 3",
            ),
            (
                AdaptedWeight { lora_b: &[0.0; 3], ..good },
                "`lora_b` holds 3 numbers; its shape [2, 1] needs 2",
            ),
        ] {
            assert_eq!(magnitude_sums(&weight).unwrap_err().to_string(), message);
        }
        let short = LoraGradients { grad_a: &[0.0; 2], grad_b: &[0.0; 2] };
        let error = lora_guided_sums(&good, &short, recipe::LoraPruneForm::Code).unwrap_err();
        assert_eq!(error.what, "grad_a");
        assert_eq!(taylor_sums(&good, &[0.0; 7]).unwrap_err().what, "gradient");
    }
}
