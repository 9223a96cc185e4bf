use super::weight_mask::due;
use super::{Compensated, Hessian, LayerwiseError, LinearWeight, Pattern, WeightMask};
use crate::linear_algebra::Cholesky;
use crate::slices::lowest_places;
use serde::{Deserialize, Serialize};

/// Over what SparseGPT compares scores when it prunes without a pattern.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Threshold {
    /// Over all rows of a block of columns, as published: rows may lose different numbers of weights.
    Block,
    /// Within each row of a block.
    Row,
}

/// How SparseGPT goes through the columns.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct SparseGptSettings {
    pub pattern: Pattern,
    pub threshold: Threshold,
    /// Columns whose mask is chosen at once, before any of them is pruned; 128 is usual.
    pub block_columns: usize,
}

/// SparseGPT (arXiv:2301.00774): from the first column to the last, each pruned weight's error is taken up by the
/// columns to its right.
///
/// ```text
/// U^T U = H^-1, U upper                            score_ij = w_ij^2 / U_jj^2, on the weights as they are by then
/// e_i = (w_ij - masked w_ij) / U_jj                w_i,j: <- w_i,j: - e_i U_j,j:              loss_i = sum e_i^2
/// ```
///
/// Of a block `[rows, columns b .. c]` as many go as bring the count up to `floor(rows c sparsity)`, so that all blocks
/// together lose exactly `floor(rows columns sparsity)`; under `row` likewise for each row. In groups the scores are
/// taken anew at the first column of each. The published code compares with the score at that place and prunes one
/// more.
///
/// # Errors
/// When the pattern, the Hessian or a number does not fit.
pub fn sparse_gpt(
    weight: &LinearWeight<'_>,
    hessian: &Hessian,
    settings: &SparseGptSettings,
) -> Result<(WeightMask, Compensated), LayerwiseError> {
    weight.check_hessian(hessian)?;
    settings.pattern.check(weight.columns)?;
    let block = match settings.pattern {
        Pattern::Unstructured { .. } => settings.block_columns,
        Pattern::Grouped { of, .. } => of,
    };
    if block == 0 {
        return Err(LayerwiseError::Setting { what: "block_columns", rule: "at least 1", value: 0.0 });
    }
    let mut weight_mask = WeightMask::none(weight.rows, weight.columns);
    let mut sweep = Sweep::new(weight, hessian)?;
    for start in (0..weight.columns).step_by(block) {
        let end = (start + block).min(weight.columns);
        choose(&sweep, settings, start..end, &mut weight_mask)?;
        (start..end).for_each(|column| sweep.prune_column(column, &weight_mask));
    }
    Ok((weight_mask, sweep.finish()?))
}

/// SparseGPT's sweep under a mask that is given.
///
/// # Errors
/// When the arguments are not of one shape.
pub fn sparse_gpt_sweep(
    weight: &LinearWeight<'_>,
    hessian: &Hessian,
    weight_mask: &WeightMask,
) -> Result<Compensated, LayerwiseError> {
    weight.check_hessian(hessian)?;
    weight.check_mask(weight_mask)?;
    let mut sweep = Sweep::new(weight, hessian)?;
    (0..weight.columns).for_each(|column| sweep.prune_column(column, weight_mask));
    sweep.finish()
}

/// Marks which weights of these columns go.
fn choose(
    sweep: &Sweep,
    settings: &SparseGptSettings,
    columns: std::ops::Range<usize>,
    weight_mask: &mut WeightMask,
) -> Result<(), LayerwiseError> {
    let (start, width) = (columns.start, columns.len());
    let rows = weight_mask.rows();
    let mut scores = Vec::with_capacity(rows * width);
    for row in 0..rows {
        for column in columns.clone() {
            let score = (sweep.weight[row * sweep.columns + column] / sweep.diagonal(column)).powi(2);
            if !score.is_finite() {
                return Err(LayerwiseError::Overflow { row });
            }
            scores.push(score);
        }
    }
    // Rows that are compared with one another, and how many of their weights go.
    let (rows_at_once, count) = match (settings.pattern, settings.threshold) {
        (Pattern::Grouped { pruned, .. }, Threshold::Block | Threshold::Row) => (1, pruned),
        (Pattern::Unstructured { sparsity }, Threshold::Row) => {
            (1, due(columns.end, sparsity) - due(start, sparsity))
        }
        (Pattern::Unstructured { sparsity }, Threshold::Block) => {
            (rows.max(1), due(rows * columns.end, sparsity) - due(rows * start, sparsity))
        }
    };
    for (part, scores) in scores.chunks(rows_at_once * width).enumerate() {
        for place in lowest_places(scores, count) {
            weight_mask.set(part * rows_at_once + place / width, start + place % width, true);
        }
    }
    Ok(())
}

/// The weights on their way from the first column to the last.
struct Sweep {
    columns: usize,
    weight: Vec<f64>,
    /// `[columns, columns]`, zero below the diagonal.
    upper: Vec<f64>,
    row_losses: Vec<f64>,
}

impl Sweep {
    fn new(weight: &LinearWeight<'_>, hessian: &Hessian) -> Result<Self, LayerwiseError> {
        let columns = weight.columns;
        let factor = Cholesky::factor(hessian.inverse(), columns)?;
        let transposed = |place: usize| factor.lower()[place % columns * columns + place / columns];
        Ok(Self {
            columns,
            weight: hessian.without_dead(weight.weight),
            upper: (0..columns * columns).map(transposed).collect(),
            row_losses: vec![0.0; weight.rows],
        })
    }

    fn diagonal(&self, column: usize) -> f64 {
        self.upper[column * self.columns + column]
    }

    /// Settles a column: what is pruned of it moves to the right.
    fn prune_column(&mut self, column: usize, weight_mask: &WeightMask) {
        let (columns, diagonal) = (self.columns, self.diagonal(column));
        let upper = &self.upper[column * columns + column..(column + 1) * columns];
        for (row, loss) in self.row_losses.iter_mut().enumerate() {
            if weight_mask.row(row)[column] {
                let weight = &mut self.weight[row * columns + column..(row + 1) * columns];
                let error = weight[0] / diagonal;
                weight.iter_mut().zip(upper).for_each(|(weight, upper)| *weight -= error * upper);
                weight[0] = 0.0;
                *loss += error * error;
            }
        }
    }

    fn finish(self) -> Result<Compensated, LayerwiseError> {
        let Self { columns, weight, row_losses, .. } = self;
        let is_bad = |row: &usize| {
            let own = &weight[row * columns..(row + 1) * columns];
            !row_losses[*row].is_finite() || own.iter().any(|weight| !weight.is_finite())
        };
        match (0..row_losses.len()).find(is_bad) {
            Some(row) => Err(LayerwiseError::Overflow { row }),
            None => Ok(Compensated { weight, row_losses }),
        }
    }
}
