use crate::slices::{SliceError, check_finite};

/// Why nothing can be projected.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum ProjectionError {
    #[error("the budget of kept units must be at least 0; got {budget}")]
    Budget { budget: f64 },
    #[error(transparent)]
    Slice(#[from] SliceError),
}

/// Passes over the values at most; some ten are usual, and each third halves the bracket.
const MOST_PASSES: usize = 400;

/// The nearest point (Euclidean) of `{0 <= s <= 1, sum s <= budget}`, in place (arXiv:2406.10576).
///
/// ```text
/// s_i <- clamp(s_i - v, 0, 1)    v = 0 when sum clamp(s, 0, 1) <= budget, else the root of sum clamp(s - v, 0, 1) = budget
/// ```
///
/// Returns the shift `v`. The published code halves the bracket some twenty times and leaves `v` within 1e-3; here it is
/// exact but for rounding, by Newton steps along the piecewise linear sum, kept inside a bracket that is halved as well.
///
/// # Errors
/// When a value is not finite or the budget is negative or not a number. An infinite budget asks for nothing but the
/// box.
pub fn project_to_budget(values: &mut [f64], budget: f64) -> Result<f64, ProjectionError> {
    check_finite("values", values)?;
    if budget.is_nan() || budget < 0.0 {
        return Err(ProjectionError::Budget { budget });
    }
    let shift = shift(values, budget);
    for value in values {
        *value = (*value - shift).clamp(0.0, 1.0);
    }
    Ok(shift)
}

fn shift(values: &[f64], budget: f64) -> f64 {
    if at(values, 0.0).0 <= budget {
        return 0.0;
    }
    // The sum falls with the shift: too large at `low`, none left at `high`.
    let (mut low, mut high) = (0.0, values.iter().copied().fold(0.0, f64::max));
    let mut shift = 0.0;
    for pass in 0..MOST_PASSES {
        let (sum, slope) = at(values, shift);
        if (sum - budget).abs() <= 1e-14 * budget {
            return shift;
        }
        if sum > budget {
            low = shift
        } else {
            high = shift
        }
        let newton = shift + (sum - budget) / slope as f64;
        let middle = low + (high - low) / 2.0;
        let is_inside = low < newton && newton < high;
        let next = if is_inside && pass % 3 < 2 { newton } else { middle };
        if next <= low || next >= high {
            // Neighbouring numbers: of the two, the one that keeps to the budget.
            return high;
        }
        shift = next;
    }
    high
}

/// `sum clamp(s - v, 0, 1)` and how fast it falls: the number of values strictly between the bounds.
fn at(values: &[f64], shift: f64) -> (f64, usize) {
    let (mut sum, mut between) = (0.0, 0);
    for value in values {
        let moved = value - shift;
        sum += moved.clamp(0.0, 1.0);
        between += usize::from(moved > 0.0 && moved < 1.0);
    }
    (sum, between)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn projected(values: &[f64], budget: f64) -> (Vec<f64>, f64) {
        let mut values = values.to_vec();
        let shift = project_to_budget(&mut values, budget).unwrap();
        (values, shift)
    }

    #[test]
    fn five_values_go_where_they_were_worked_out_by_hand() {
        let (values, shift) = projected(&[1.3, 0.9, 0.2, -0.1, 0.7], 2.0);
        assert!((shift - 0.3).abs() < 1e-12);
        for (value, expected) in values.iter().zip([1.0, 0.6, 0.0, 0.0, 0.4]) {
            assert!((value - expected).abs() < 1e-12);
        }
    }

    #[test]
    fn what_is_within_the_budget_only_meets_the_box() {
        for budget in [2.0, 3.0, f64::INFINITY] {
            assert_eq!(projected(&[1.5, 0.25, -3.0, 0.75], budget), (vec![1.0, 0.25, 0.0, 0.75], 0.0));
        }
        assert_eq!(projected(&[], 0.0), (vec![], 0.0));
    }

    #[test]
    fn an_empty_budget_keeps_nothing_and_a_wrong_one_is_refused() {
        assert_eq!(projected(&[2.0, 0.5], 0.0).0, [0.0, 0.0]);
        for budget in [-1.0, f64::NAN] {
            assert!(matches!(project_to_budget(&mut [0.5], budget), Err(ProjectionError::Budget { .. })));
        }
        let error = project_to_budget(&mut [0.5, f64::NAN], 1.0).unwrap_err();
        assert_eq!(error.to_string(), "`values` holds NaN at place 1; it must hold finite numbers");
        let mut huge = [1e300, 1e300, 1.0];
        project_to_budget(&mut huge, 1.0).unwrap();
        assert!(huge.iter().sum::<f64>() <= 1.0 + 1e-9);
    }

    proptest! {
        #[test]
        fn the_result_is_feasible_optimal_and_its_own_projection(
            values in prop::collection::vec(-2.0f64..3.0, 1..60), share in 0.0f64..1.0,
        ) {
            let budget = share * values.len() as f64;
            let (found, shift) = projected(&values, budget);
            let sum: f64 = found.iter().sum();
            prop_assert!(found.iter().all(|value| (0.0..=1.0).contains(value)));
            prop_assert!(sum <= budget + 1e-9);
            // Karush-Kuhn-Tucker: one multiplier for all, none where the budget is not used up.
            prop_assert!(shift >= 0.0);
            prop_assert!(shift == 0.0 || (sum - budget).abs() < 1e-9);
            for (before, after) in values.iter().zip(&found) {
                prop_assert_eq!(*after, (before - shift).clamp(0.0, 1.0));
            }
            let (again, _) = projected(&found, budget);
            for (one, other) in found.iter().zip(&again) {
                prop_assert!((one - other).abs() < 1e-9);
            }
        }

        #[test]
        fn no_point_of_a_grid_is_nearer(values in prop::collection::vec(-1.0f64..2.0, 3), budget in 0.0f64..3.0) {
            let (found, _) = projected(&values, budget);
            let distance = |point: &[f64]| -> f64 {
                point.iter().zip(&values).map(|(point, value)| (point - value).powi(2)).sum()
            };
            for place in 0..11 * 11 * 11 {
                let point = [place % 11, place / 11 % 11, place / 121].map(|tenth| tenth as f64 / 10.0);
                if point.iter().sum::<f64>() <= budget {
                    prop_assert!(distance(&found) <= distance(&point) + 1e-9);
                }
            }
        }
    }
}
