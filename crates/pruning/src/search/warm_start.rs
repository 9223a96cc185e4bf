use crate::slices::{SliceError, check_finite};

/// Why importances make no probabilities.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum WarmStartError {
    #[error("the share of units kept must lie in (0, 1]; got {keep_share}")]
    KeepShare { keep_share: f64 },
    #[error(transparent)]
    Slice(#[from] SliceError),
}

/// Keep probabilities from the importances of one layer's units, whatever the criterion (arXiv:2406.10576, `sigmap`).
///
/// ```text
/// z = (x - mean x) / std x         unbiased
/// s = sigmoid(z) + keep_share - mean sigmoid(z)         then into [0, 1]
/// ```
///
/// Importances that do not differ (or a single one) all give `keep_share`.
///
/// # Errors
/// When an importance is not finite or the share is none.
pub fn keep_probabilities(importances: &[f64], keep_share: f64) -> Result<Vec<f64>, WarmStartError> {
    if !(keep_share > 0.0 && keep_share <= 1.0) {
        return Err(WarmStartError::KeepShare { keep_share });
    }
    check_finite("importances", importances)?;
    Ok(unclamped(importances, keep_share)
        .into_iter()
        .map(|probability| probability.clamp(0.0, 1.0))
        .collect())
}

fn unclamped(importances: &[f64], keep_share: f64) -> Vec<f64> {
    let count = importances.len() as f64;
    // Standardising forgets the scale, so that it may be taken out first, before anything overflows.
    let largest = importances.iter().fold(0.0f64, |largest, value| largest.max(value.abs()));
    let scaled = || importances.iter().map(move |value| if largest > 0.0 { value / largest } else { 0.0 });
    let mean = scaled().sum::<f64>() / count;
    let squares: f64 = scaled().map(|value| (value - mean).powi(2)).sum();
    let deviation = (squares / (count - 1.0)).sqrt();
    // Of one importance there is none.
    if deviation.is_nan() || deviation <= f64::EPSILON {
        return vec![keep_share; importances.len()];
    }
    let sigmoids: Vec<f64> =
        scaled().map(|value| 1.0 / (1.0 + (-(value - mean) / deviation).exp())).collect();
    let shift = keep_share - sigmoids.iter().sum::<f64>() / count;
    sigmoids.into_iter().map(|sigmoid| sigmoid + shift).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn four_importances_map_as_worked_out() {
        let found = unclamped(&[1.0, 2.0, 3.0, 6.0], 0.7);
        for (found, expected) in found.iter().zip([0.491_159, 0.593_681, 0.707_385, 1.007_775]) {
            assert!((found - expected).abs() < 1e-6, "{found} is not {expected}");
        }
        assert_eq!(keep_probabilities(&[1.0, 2.0, 3.0, 6.0], 0.7).unwrap()[3], 1.0);
    }

    #[test]
    fn importances_that_do_not_differ_are_all_kept_alike() {
        for importances in [&[3.0; 5][..], &[0.0; 2], &[7.0], &[]] {
            assert_eq!(keep_probabilities(importances, 0.6), Ok(vec![0.6; importances.len()]));
        }
    }

    #[test]
    fn wrong_shares_and_numbers_are_refused() {
        for keep_share in [0.0, -0.5, 1.1, f64::NAN] {
            assert!(matches!(keep_probabilities(&[1.0], keep_share), Err(WarmStartError::KeepShare { .. })));
        }
        let error = keep_probabilities(&[1.0, f64::INFINITY], 0.5).unwrap_err();
        assert_eq!(error.to_string(), "`importances` holds inf at place 1; it must hold finite numbers");
        assert!(
            keep_probabilities(&[1e308, -1e308, 3.0], 0.5).unwrap().iter().all(|value| value.is_finite())
        );
    }

    proptest! {
        #[test]
        fn the_order_is_kept_the_mean_is_the_share_and_the_scale_does_not_matter(
            importances in prop::collection::vec(-5.0f64..5.0, 2..40), share in 0.05f64..1.0, factor in 0.01f64..100.0,
        ) {
            let found = unclamped(&importances, share);
            let mean = found.iter().sum::<f64>() / found.len() as f64;
            prop_assert!((mean - share).abs() < 1e-12);
            let scaled: Vec<f64> = importances.iter().map(|value| factor * value + 3.0).collect();
            for ((one, other), found) in unclamped(&scaled, share).iter().zip(&found).zip(&found) {
                prop_assert!((one - other).abs() < 1e-9);
                prop_assert!(found.is_finite());
            }
            for (low, high) in (0..found.len()).zip(1..found.len()) {
                prop_assert_eq!(importances[low] < importances[high], found[low] < found[high]);
            }
        }
    }
}
