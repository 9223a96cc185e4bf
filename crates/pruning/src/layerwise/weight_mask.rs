use super::LayerwiseError;
use crate::criterion::ShapeMismatch;
use crate::slices::{check_matrix, lowest_places};
use serde::{Deserialize, Serialize};

/// How many weights go, and where.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Pattern {
    /// `floor(columns * sparsity)` weights of each row.
    Unstructured { sparsity: f64 },
    /// `pruned` of every `of` consecutive weights of each row: 2 of 4 is what sparse tensor cores take.
    Grouped { pruned: usize, of: usize },
}

/// Which weights of a linear are gone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WeightMask {
    rows: usize,
    columns: usize,
    is_pruned: Vec<bool>,
}

/// Guards the floor against the last bit of a product such as `0.3 * 10`.
const SLACK: f64 = 1e-9;

impl Pattern {
    pub(super) fn check(self, columns: usize) -> Result<(), LayerwiseError> {
        match self {
            Self::Unstructured { sparsity } if !(0.0..=1.0).contains(&sparsity) => {
                Err(LayerwiseError::Sparsity { sparsity })
            }
            Self::Grouped { pruned, of } if pruned == 0 || pruned > of => {
                Err(LayerwiseError::Group { pruned, of })
            }
            Self::Grouped { of, .. } if !columns.is_multiple_of(of) => {
                Err(LayerwiseError::Columns { columns, of })
            }
            Self::Unstructured { .. } | Self::Grouped { .. } => Ok(()),
        }
    }
}

/// `floor(count * sparsity)`.
pub(super) fn due(count: usize, sparsity: f64) -> usize {
    ((count as f64 * sparsity + SLACK) as usize).min(count)
}

impl WeightMask {
    /// `is_pruned`: `[rows, columns]`, row-major.
    ///
    /// # Errors
    /// When there are not as many flags as places.
    pub fn new(rows: usize, columns: usize, is_pruned: Vec<bool>) -> Result<Self, LayerwiseError> {
        if rows.checked_mul(columns) != Some(is_pruned.len()) {
            let mismatch =
                ShapeMismatch { what: "is_pruned", shape: [rows, columns], actual: is_pruned.len() };
            return Err(mismatch.into());
        }
        Ok(Self { rows, columns, is_pruned })
    }

    /// Nothing is gone.
    pub(super) fn none(rows: usize, columns: usize) -> Self {
        Self { rows, columns, is_pruned: vec![false; rows * columns] }
    }

    /// Every row loses the same inputs.
    #[must_use]
    pub fn of_columns(rows: usize, is_pruned: &[bool]) -> Self {
        Self { rows, columns: is_pruned.len(), is_pruned: is_pruned.repeat(rows) }
    }

    /// The lowest scores of each row go, or of each group in it; of equal ones the first.
    ///
    /// `scores`: `[rows, columns]`.
    ///
    /// # Errors
    /// When the pattern does not fit the columns, or a score is not finite.
    pub fn lowest_of_rows(
        scores: &[f64],
        rows: usize,
        columns: usize,
        pattern: Pattern,
    ) -> Result<Self, LayerwiseError> {
        check_matrix("scores", scores, [rows, columns])?;
        pattern.check(columns)?;
        let (width, count) = match pattern {
            Pattern::Unstructured { sparsity } => (columns.max(1), due(columns, sparsity)),
            Pattern::Grouped { pruned, of } => (of, pruned),
        };
        let mut mask = Self::none(rows, columns);
        for (scores, is_pruned) in scores.chunks(width).zip(mask.is_pruned.chunks_mut(width)) {
            lowest_places(scores, count).into_iter().for_each(|place| is_pruned[place] = true);
        }
        Ok(mask)
    }

    /// The lowest `floor(rows * columns * sparsity)` scores of the whole matrix go; of equal ones the first.
    ///
    /// # Errors
    /// When the sparsity is none, or a score is not finite.
    pub fn lowest_of_matrix(
        scores: &[f64],
        rows: usize,
        columns: usize,
        sparsity: f64,
    ) -> Result<Self, LayerwiseError> {
        check_matrix("scores", scores, [rows, columns])?;
        Pattern::Unstructured { sparsity }.check(columns)?;
        let mut mask = Self::none(rows, columns);
        let lowest = lowest_places(scores, due(scores.len(), sparsity));
        lowest.into_iter().for_each(|place| mask.is_pruned[place] = true);
        Ok(mask)
    }

    #[must_use]
    pub fn rows(&self) -> usize {
        self.rows
    }

    #[must_use]
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Row-major.
    #[must_use]
    pub fn is_pruned(&self) -> &[bool] {
        &self.is_pruned
    }

    /// One row's flags; empty for a row that does not exist.
    #[must_use]
    pub fn row(&self, row: usize) -> &[bool] {
        let start = row.saturating_mul(self.columns);
        self.is_pruned.get(start..start.saturating_add(self.columns)).unwrap_or(&[])
    }

    /// Places of a row that are gone, ascending.
    #[must_use]
    pub fn pruned_of(&self, row: usize) -> Vec<usize> {
        let flags = self.row(row);
        (0..flags.len()).filter(|&column| flags[column]).collect()
    }

    /// Fraction that is gone; 0 where there is nothing.
    #[must_use]
    pub fn sparsity(&self) -> f64 {
        let gone = self.is_pruned.iter().filter(|gone| **gone).count();
        gone as f64 / self.is_pruned.len().max(1) as f64
    }

    pub(super) fn set(&mut self, row: usize, column: usize, is_pruned: bool) {
        self.is_pruned[row * self.columns + column] = is_pruned;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pruned(mask: &WeightMask) -> Vec<Vec<usize>> {
        (0..mask.rows()).map(|row| mask.pruned_of(row)).collect()
    }

    #[test]
    fn rows_groups_and_matrices_lose_their_lowest() {
        let scores = [4.0, 1.0, 3.0, 2.0, 9.0, 8.0, 7.0, 7.0];
        let rows = |pattern| pruned(&WeightMask::lowest_of_rows(&scores, 2, 4, pattern).unwrap());
        assert_eq!(rows(Pattern::Unstructured { sparsity: 0.5 }), [vec![1, 3], vec![2, 3]]);
        assert_eq!(rows(Pattern::Unstructured { sparsity: 0.49 }), [vec![1], vec![2]]);
        assert_eq!(rows(Pattern::Unstructured { sparsity: 0.0 }), [Vec::<usize>::new(), vec![]]);
        assert_eq!(rows(Pattern::Unstructured { sparsity: 1.0 }), [[0, 1, 2, 3]; 2]);
        assert_eq!(rows(Pattern::Grouped { pruned: 1, of: 2 }), [vec![1, 3], vec![1, 2]]);
        assert_eq!(rows(Pattern::Grouped { pruned: 3, of: 4 }), [vec![1, 2, 3], vec![1, 2, 3]]);
        let matrix = WeightMask::lowest_of_matrix(&scores, 2, 4, 0.7).unwrap();
        assert_eq!(pruned(&matrix), [vec![0, 1, 2, 3], vec![2]]);
        assert_eq!(matrix.sparsity(), 5.0 / 8.0);
        assert_eq!(pruned(&WeightMask::of_columns(2, &[true, false])), [[0], [0]]);
    }

    #[test]
    fn patterns_and_flags_that_do_not_fit_are_refused() {
        let refuse = |pattern| WeightMask::lowest_of_rows(&[0.0; 6], 1, 6, pattern).unwrap_err();
        assert_eq!(
            refuse(Pattern::Unstructured { sparsity: 1.5 }),
            LayerwiseError::Sparsity { sparsity: 1.5 }
        );
        assert!(matches!(
            refuse(Pattern::Unstructured { sparsity: f64::NAN }),
            LayerwiseError::Sparsity { .. }
        ));
        assert_eq!(
            refuse(Pattern::Grouped { pruned: 2, of: 4 }),
            LayerwiseError::Columns { columns: 6, of: 4 }
        );
        for (pruned, of) in [(0, 2), (3, 2), (0, 0)] {
            assert_eq!(refuse(Pattern::Grouped { pruned, of }), LayerwiseError::Group { pruned, of });
        }
        let error = WeightMask::new(2, 3, vec![true; 5]).unwrap_err();
        assert_eq!(error.to_string(), "`is_pruned` holds 5 numbers; its shape [2, 3] needs 6");
        let error = WeightMask::lowest_of_matrix(&[0.0, f64::NAN], 1, 2, 0.5).unwrap_err();
        assert_eq!(error.to_string(), "`scores` holds NaN at place 1; it must hold finite numbers");
        let none = WeightMask::lowest_of_rows(&[], 0, 0, Pattern::Unstructured { sparsity: 0.5 }).unwrap();
        assert!(none.row(3).is_empty());
        assert_eq!(none.sparsity(), 0.0);
    }
}
