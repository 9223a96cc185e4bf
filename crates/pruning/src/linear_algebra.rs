//! Small dense matrices in plain loops, row-major: what the layer-wise methods solve with.

use crate::slices::{SliceError, check_matrix};

/// Why a matrix cannot be used.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum MatrixError {
    #[error(
        "pivot {pivot} of {size} is {value}: the matrix is not positive definite; dampen it or give more tokens"
    )]
    NotPositiveDefinite { pivot: usize, size: usize, value: f64 },
    #[error("entries ({row}, {column}) and ({column}, {row}) differ: the matrix must be symmetric")]
    NotSymmetric { row: usize, column: usize },
    #[error(transparent)]
    Slice(#[from] SliceError),
}

/// `H = L L^T` of a symmetric positive definite matrix.
#[derive(Debug, Clone, PartialEq)]
pub struct Cholesky {
    size: usize,
    /// `[size, size]`, zero above the diagonal.
    lower: Vec<f64>,
}

impl Cholesky {
    /// Only the lower triangle of `matrix`, `[size, size]`, is looked at.
    ///
    /// # Errors
    /// When a pivot is not positive.
    pub fn factor(matrix: &[f64], size: usize) -> Result<Self, MatrixError> {
        check_matrix("matrix", matrix, [size, size])?;
        let mut lower = vec![0.0; size * size];
        for row in 0..size {
            for column in 0..=row {
                let (of_row, of_column) = (row * size, column * size);
                let known: f64 =
                    (0..column).map(|inner| lower[of_row + inner] * lower[of_column + inner]).sum();
                let rest = matrix[of_row + column] - known;
                lower[of_row + column] = if column < row {
                    rest / lower[of_column + column]
                } else if rest > 0.0 && rest.is_finite() {
                    rest.sqrt()
                } else {
                    return Err(MatrixError::NotPositiveDefinite { pivot: row, size, value: rest });
                };
            }
        }
        Ok(Self { size, lower })
    }

    /// `L`, row-major.
    #[must_use]
    pub fn lower(&self) -> &[f64] {
        &self.lower
    }

    /// Turns `b` into the solution of `H x = b`.
    ///
    /// # Errors
    /// When `values` is not as long as the matrix is wide.
    pub fn solve(&self, values: &mut [f64]) -> Result<(), MatrixError> {
        check_matrix("right-hand side", values, [1, self.size])?;
        self.solve_checked(values);
        Ok(())
    }

    /// `H^-1`, row-major and exactly symmetric.
    #[must_use]
    pub fn inverse(&self) -> Vec<f64> {
        let size = self.size;
        let mut inverse = vec![0.0; size * size];
        for column in 0..size {
            let mut unit = vec![0.0; size];
            unit[column] = 1.0;
            self.solve_checked(&mut unit);
            for row in column..size {
                inverse[row * size + column] = unit[row];
                inverse[column * size + row] = unit[row];
            }
        }
        inverse
    }

    fn solve_checked(&self, values: &mut [f64]) {
        let size = self.size;
        for row in 0..size {
            let known: f64 = (0..row).map(|inner| self.lower[row * size + inner] * values[inner]).sum();
            values[row] = (values[row] - known) / self.lower[row * size + row];
        }
        for row in (0..size).rev() {
            let known: f64 =
                (row + 1..size).map(|inner| self.lower[inner * size + row] * values[inner]).sum();
            values[row] = (values[row] - known) / self.lower[row * size + row];
        }
    }
}

/// Sweeps of Jacobi's method at most; it converges quadratically, so that ten are many.
const MOST_SWEEPS: usize = 60;

/// Eigenvalues of a symmetric matrix, ascending, by Jacobi's rotations: for small matrices, and exact to rounding.
///
/// # Errors
/// When the matrix is not symmetric to rounding.
pub fn symmetric_eigenvalues(matrix: &[f64], size: usize) -> Result<Vec<f64>, MatrixError> {
    check_matrix("matrix", matrix, [size, size])?;
    let largest = matrix.iter().fold(0.0f64, |largest, value| largest.max(value.abs()));
    for row in 0..size {
        for column in 0..row {
            if (matrix[row * size + column] - matrix[column * size + row]).abs() > 1e-9 * largest {
                return Err(MatrixError::NotSymmetric { row, column });
            }
        }
    }
    // Of the size of one, whatever the scale: squares then neither vanish nor overflow.
    let scale = if largest > 0.0 { largest } else { 1.0 };
    let mut work: Vec<f64> = matrix.iter().map(|value| value / scale).collect();
    for _ in 0..MOST_SWEEPS {
        let mut off_diagonal = 0.0f64;
        for row in 0..size {
            for column in row + 1..size {
                off_diagonal = off_diagonal.max(work[row * size + column].abs());
                rotate(&mut work, size, row, column);
            }
        }
        if off_diagonal < 1e-17 {
            break;
        }
    }
    let mut eigenvalues: Vec<f64> = (0..size).map(|place| work[place * size + place] * scale).collect();
    eigenvalues.sort_by(f64::total_cmp);
    Ok(eigenvalues)
}

/// Makes entry `(p, q)` zero.
fn rotate(work: &mut [f64], size: usize, p: usize, q: usize) {
    let entry = work[p * size + q];
    if entry == 0.0 {
        return;
    }
    let theta = (work[q * size + q] - work[p * size + p]) / (2.0 * entry);
    let tangent = theta.signum() / (theta.abs() + theta.hypot(1.0));
    let cosine = 1.0 / tangent.hypot(1.0);
    let sine = tangent * cosine;
    for other in 0..size {
        let (one, two) = (work[other * size + p], work[other * size + q]);
        work[other * size + p] = cosine * one - sine * two;
        work[other * size + q] = sine * one + cosine * two;
    }
    for other in 0..size {
        let (one, two) = (work[p * size + other], work[q * size + other]);
        work[p * size + other] = cosine * one - sine * two;
        work[q * size + other] = sine * one + cosine * two;
    }
}

/// `X^T X` of `values`, `[rows, columns]`: `[columns, columns]`.
pub(crate) fn gram(values: &[f64], rows: usize, columns: usize) -> Vec<f64> {
    let mut gram = vec![0.0; columns * columns];
    for row in values.chunks_exact(columns.max(1)).take(rows) {
        for (one, of_one) in row.iter().zip(gram.chunks_exact_mut(columns.max(1))) {
            for (sum, other) in of_one.iter_mut().zip(row) {
                *sum += one * other;
            }
        }
    }
    gram
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::numbers;
    use proptest::prelude::*;

    fn product(left: &[f64], right: &[f64], size: usize) -> Vec<f64> {
        let at = |place: usize| {
            (0..size).map(|k| left[place / size * size + k] * right[k * size + place % size]).sum()
        };
        (0..size * size).map(at).collect()
    }

    #[test]
    fn a_three_by_three_matrix_inverts_as_worked_out_by_hand() {
        let inverse = Cholesky::factor(&[2.0, 1.0, 0.0, 1.0, 2.0, 1.0, 0.0, 1.0, 2.0], 3).unwrap().inverse();
        let expected = [3.0, -2.0, 1.0, -2.0, 4.0, -2.0, 1.0, -2.0, 3.0].map(|value: f64| value / 4.0);
        for (found, expected) in inverse.iter().zip(expected) {
            assert!((found - expected).abs() < 1e-15);
        }
    }

    #[test]
    fn matrices_that_cannot_be_factored_are_refused_by_place() {
        let error = Cholesky::factor(&[1.0, 2.0, 2.0, 1.0], 2).unwrap_err();
        assert_eq!(error, MatrixError::NotPositiveDefinite { pivot: 1, size: 2, value: -3.0 });
        assert!(matches!(Cholesky::factor(&[1.0; 3], 2), Err(MatrixError::Slice(SliceError::Shape(_)))));
        assert!(matches!(
            Cholesky::factor(&[f64::NAN], 1),
            Err(MatrixError::Slice(SliceError::NotFinite { .. }))
        ));
        let factor = Cholesky::factor(&[4.0], 1).unwrap();
        assert!(factor.solve(&mut [1.0, 2.0]).is_err());
        assert!(Cholesky::factor(&[], 0).unwrap().inverse().is_empty());
    }

    #[test]
    fn eigenvalues_are_those_known_in_closed_form() {
        let eigenvalues = symmetric_eigenvalues(&[2.0, 1.0, 0.0, 1.0, 2.0, 1.0, 0.0, 1.0, 2.0], 3).unwrap();
        let root = 2.0f64.sqrt();
        for (found, expected) in eigenvalues.iter().zip([2.0 - root, 2.0, 2.0 + root]) {
            assert!((found - expected).abs() < 1e-14);
        }
        assert_eq!(symmetric_eigenvalues(&[0.0; 4], 2), Ok(vec![0.0, 0.0]));
        assert_eq!(symmetric_eigenvalues(&[], 0), Ok(vec![]));
        assert!(symmetric_eigenvalues(&[1e300, 1e300, 1e300, -1e300], 2).unwrap()[0] < -1e300);
        let error = symmetric_eigenvalues(&[1.0, 2.0, 3.0, 1.0], 2).unwrap_err();
        assert_eq!(error, MatrixError::NotSymmetric { row: 1, column: 0 });
    }

    proptest! {
        #[test]
        fn factor_solution_inverse_and_eigenvalues_agree(seed: u64, size in 1usize..9) {
            let mut matrix = gram(&numbers(seed, (size + 5) * size), size + 5, size);
            (0..size).for_each(|place| matrix[place * size + place] += 0.1);
            let factor = Cholesky::factor(&matrix, size).unwrap();
            let transposed: Vec<f64> =
                (0..size * size).map(|place| factor.lower()[place % size * size + place / size]).collect();
            for (found, expected) in product(factor.lower(), &transposed, size).iter().zip(&matrix) {
                prop_assert!((found - expected).abs() < 1e-12);
            }
            let inverse = factor.inverse();
            for (place, found) in product(&inverse, &matrix, size).iter().enumerate() {
                let expected = f64::from(u8::from(place / size == place % size));
                prop_assert!((found - expected).abs() < 1e-9);
            }
            let right = numbers(seed ^ 1, size);
            let mut solution = right.clone();
            factor.solve(&mut solution).unwrap();
            for (row, right) in right.iter().enumerate() {
                let found: f64 = (0..size).map(|k| matrix[row * size + k] * solution[k]).sum();
                prop_assert!((found - right).abs() < 1e-9);
            }
            let eigenvalues = symmetric_eigenvalues(&matrix, size).unwrap();
            let trace: f64 = (0..size).map(|place| matrix[place * size + place]).sum();
            let determinant: f64 = (0..size).map(|place| factor.lower()[place * size + place].powi(2)).product();
            prop_assert!((eigenvalues.iter().sum::<f64>() - trace).abs() < 1e-12 * trace);
            prop_assert!((eigenvalues.iter().product::<f64>() / determinant - 1.0).abs() < 1e-9);
        }
    }
}
