use super::{LayerwiseError, LinearWeight, Pattern, WeightMask};
use crate::slices::{check_finite, check_vector};

/// By size alone: the smallest `|W|` of the whole matrix, or of each group.
///
/// # Errors
/// When the pattern does not fit, or a weight is not finite.
pub fn magnitude_mask(weight: &LinearWeight<'_>, pattern: Pattern) -> Result<WeightMask, LayerwiseError> {
    weight.check()?;
    let LinearWeight { rows, columns, .. } = *weight;
    let sizes: Vec<f64> = weight.weight.iter().map(|weight| weight.abs()).collect();
    match pattern {
        Pattern::Unstructured { sparsity } => WeightMask::lowest_of_matrix(&sizes, rows, columns, sparsity),
        Pattern::Grouped { .. } => WeightMask::lowest_of_rows(&sizes, rows, columns, pattern),
    }
}

/// `|W_ij| |X_j|_2`: a weight's size times the norm of the input it multiplies (Wanda, arXiv:2306.11695).
/// `[rows, columns]`.
///
/// `square_sums`: by input, the sum over tokens of its square. Its scale does not matter to a mask.
///
/// # Errors
/// Names the slice that has the wrong length or holds a number that is not finite.
pub fn wanda_scores(weight: &LinearWeight<'_>, square_sums: &[f64]) -> Result<Vec<f64>, LayerwiseError> {
    weight.check()?;
    check_vector("square_sums", square_sums, weight.columns)?;
    if let Some(&value) = square_sums.iter().find(|sum| **sum < 0.0) {
        return Err(LayerwiseError::Setting { what: "square_sums", rule: "at least 0", value });
    }
    let norms: Vec<f64> = square_sums.iter().map(|sum| sum.sqrt()).collect();
    let columns = weight.columns.max(1);
    let scores: Vec<f64> = weight
        .weight
        .iter()
        .enumerate()
        .map(|(place, weight)| weight.abs() * norms[place % columns])
        .collect();
    check_finite("scores", &scores)?;
    Ok(scores)
}

/// The lowest [`wanda_scores`] of each row, or of each group in it.
///
/// # Errors
/// As [`wanda_scores`], and when the pattern does not fit.
pub fn wanda_mask(
    weight: &LinearWeight<'_>,
    square_sums: &[f64],
    pattern: Pattern,
) -> Result<WeightMask, LayerwiseError> {
    let scores = wanda_scores(weight, square_sums)?;
    WeightMask::lowest_of_rows(&scores, weight.rows, weight.columns, pattern)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn magnitude_compares_over_the_matrix_and_wanda_within_a_row() {
        let weight =
            LinearWeight { rows: 2, columns: 4, weight: &[1.0, -2.0, 3.0, -4.0, 50.0, 20.0, -30.0, 40.0] };
        let half = Pattern::Unstructured { sparsity: 0.5 };
        let by_size = magnitude_mask(&weight, half).unwrap();
        assert_eq!((by_size.pruned_of(0), by_size.pruned_of(1)), (vec![0, 1, 2, 3], vec![]));
        // Norms 4, 1, 1, 1: scores 4 2 3 4 and 200 20 30 40.
        let by_inputs = wanda_mask(&weight, &[16.0, 1.0, 1.0, 1.0], half).unwrap();
        assert_eq!((by_inputs.pruned_of(0), by_inputs.pruned_of(1)), (vec![1, 2], vec![1, 2]));
        let grouped = Pattern::Grouped { pruned: 1, of: 2 };
        let by_size = magnitude_mask(&weight, grouped).unwrap();
        assert_eq!((by_size.pruned_of(0), by_size.pruned_of(1)), (vec![0, 2], vec![1, 2]));
        let by_inputs = wanda_mask(&weight, &[16.0, 1.0, 1.0, 1.0], grouped).unwrap();
        assert_eq!(by_inputs.pruned_of(0), [1, 2]);
    }

    #[test]
    fn wrong_moments_are_named() {
        let weight = LinearWeight { rows: 1, columns: 2, weight: &[1.0, 2.0] };
        for (square_sums, message) in [
            (&[1.0][..], "`square_sums` holds 1 numbers; its shape [1, 2] needs 2"),
            (&[1.0, f64::INFINITY], "`square_sums` holds inf at place 1; it must hold finite numbers"),
            (&[1.0, -1.0], "`square_sums` must be at least 0; got -1"),
        ] {
            assert_eq!(wanda_scores(&weight, square_sums).unwrap_err().to_string(), message);
        }
        let short = LinearWeight { rows: 2, ..weight };
        assert!(magnitude_mask(&short, Pattern::Unstructured { sparsity: 0.5 }).is_err());
    }
}
