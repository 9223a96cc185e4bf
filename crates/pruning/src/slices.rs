//! What every plain form asks of its slices: the length that their shape says, and numbers in them.

use crate::criterion::{ShapeMismatch, check_shape};

/// A slice that no computation can use.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum SliceError {
    #[error(transparent)]
    Shape(#[from] ShapeMismatch),
    #[error("`{what}` holds {value} at place {index}; it must hold finite numbers")]
    NotFinite { what: &'static str, index: usize, value: f64 },
}

/// # Errors
/// Names the first number that is none.
pub(crate) fn check_finite(what: &'static str, values: &[f64]) -> Result<(), SliceError> {
    match values.iter().position(|value| !value.is_finite()) {
        Some(index) => Err(SliceError::NotFinite { what, index, value: values[index] }),
        None => Ok(()),
    }
}

/// # Errors
/// When there are not `count` values or one of them is not finite.
pub(crate) fn check_vector(what: &'static str, values: &[f64], count: usize) -> Result<(), SliceError> {
    check_matrix(what, values, [1, count])
}

/// # Errors
/// When the values do not have the shape or one of them is not finite.
pub(crate) fn check_matrix(what: &'static str, values: &[f64], shape: [usize; 2]) -> Result<(), SliceError> {
    check_shape(what, values, shape)?;
    check_finite(what, values)
}

/// Places of the `count` lowest values, ascending; of equal ones the first. All places when there are no more.
///
/// The values must be finite.
pub(crate) fn lowest_places(values: &[f64], count: usize) -> Vec<usize> {
    let mut ranked: Vec<_> = (0..values.len()).map(|place| crate::decide::ranked(place, values)).collect();
    if let Some(last) = count.min(ranked.len()).checked_sub(1) {
        ranked.select_nth_unstable(last);
    }
    let mut places: Vec<usize> = ranked.into_iter().take(count).map(|(_, place)| place).collect();
    places.sort_unstable();
    places
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lowest_are_taken_and_of_equal_ones_the_first() {
        let values = [2.0, -1.0, 2.0, -0.0, 0.0, 2.0];
        for (count, expected) in [
            (0, vec![]),
            (1, vec![1]),
            (2, vec![1, 3]),
            (3, vec![1, 3, 4]),
            (4, vec![0, 1, 3, 4]),
            (9, vec![0, 1, 2, 3, 4, 5]),
        ] {
            assert_eq!(lowest_places(&values, count), expected);
        }
        assert!(lowest_places(&[], 3).is_empty());
    }

    #[test]
    fn wrong_slices_are_named_with_the_place() {
        let bad = check_vector("input_means", &[0.0, f64::NAN], 2).unwrap_err();
        assert_eq!(bad.to_string(), "`input_means` holds NaN at place 1; it must hold finite numbers");
        let short = check_matrix("weight", &[0.0], [usize::MAX, 2]).unwrap_err();
        assert!(short.to_string().starts_with("`weight` holds 1 numbers"), "{short}");
    }
}
