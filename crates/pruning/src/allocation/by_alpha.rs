use crate::slices::{SliceError, check_vector};

/// Why a budget cannot be dealt out.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum AllocationError {
    #[error("`{what}` must lie in [0, 1]; got {value}")]
    NoFraction { what: &'static str, value: f64 },
    #[error("size of layer {layer} is {size}; sizes must be positive")]
    Size { layer: usize, size: f64 },
    #[error("a sparsity of {sparsity} is asked for, but no layer may lose more than {most}")]
    BeyondMost { sparsity: f64, most: f64 },
    #[error(transparent)]
    Slice(#[from] SliceError),
}

/// A budget dealt out over layers.
#[derive(Debug, Clone, PartialEq)]
pub struct AlphaAllocation {
    /// By layer, the fraction removed.
    pub sparsities: Vec<f64>,
    /// What the brackets were multiplied by, before any layer reached the most that it may lose.
    pub factor: f64,
}

/// Sparsity by layer from the exponents of its weights' spectra, more where they are larger (AlphaPruning,
/// arXiv:2410.10912).
///
/// ```text
/// bracket_b = (m_b - min m) / (max m - min m) * 2 spread + 1 - spread
/// r_b       = factor * bracket_b         factor = sparsity * sum d / sum d bracket
/// ```
///
/// `alphas`: one a layer, such as the mean over its projections. The sizes `d`, in parameters or in bytes, meet the
/// budget exactly: `sum d r = sparsity sum d`. The published code lets `r` exceed 1 (a sparsity of 0.8 with a spread of
/// 0.3 does so for LLaMA-7B). Here a layer loses `most` at most, and what it cannot lose goes to the others in
/// proportion to their brackets. Equal exponents give equal sparsities. Layers that are not pruned are not to be among
/// those given.
///
/// # Errors
/// When a number is none, a size is not positive, or not even `most` everywhere meets the budget.
pub fn allocate_by_alpha(
    alphas: &[f64],
    sizes: &[f64],
    sparsity: f64,
    spread: f64,
    most: f64,
) -> Result<AlphaAllocation, AllocationError> {
    check_vector("alphas", alphas, alphas.len())?;
    check_vector("sizes", sizes, alphas.len())?;
    for (what, value) in [("sparsity", sparsity), ("spread", spread), ("most", most)] {
        if !(0.0..=1.0).contains(&value) {
            return Err(AllocationError::NoFraction { what, value });
        }
    }
    if let Some(layer) = sizes.iter().position(|size| *size <= 0.0) {
        return Err(AllocationError::Size { layer, size: sizes[layer] });
    }
    if sparsity > most {
        return Err(AllocationError::BeyondMost { sparsity, most });
    }
    let brackets = brackets(alphas, spread);
    let weighted: f64 = sizes.iter().zip(&brackets).map(|(size, bracket)| size * bracket).sum();
    let budget = sparsity * sizes.iter().sum::<f64>();
    let factor = if weighted > 0.0 { budget / weighted } else { 0.0 };
    Ok(AlphaAllocation { sparsities: capped(&brackets, sizes, budget, most), factor })
}

/// Between `1 - spread` and `1 + spread`, linear in the exponent; 1 where all are equal.
fn brackets(alphas: &[f64], spread: f64) -> Vec<f64> {
    let low = alphas.iter().copied().fold(f64::INFINITY, f64::min);
    let high = alphas.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    // Halves, so that the range of finite numbers is finite.
    let range = high / 2.0 - low / 2.0;
    let place = |alpha: f64| if range > 0.0 { (alpha / 2.0 - low / 2.0) / range } else { 0.5 };
    alphas.iter().map(|alpha| 1.0 - spread + 2.0 * spread * place(*alpha)).collect()
}

/// Multiples of the brackets, none above `most`, that use up the budget.
fn capped(brackets: &[f64], sizes: &[f64], budget: f64, most: f64) -> Vec<f64> {
    let mut is_full = vec![false; brackets.len()];
    loop {
        let (mut left, mut weighted) = (budget, 0.0);
        for (layer, bracket) in brackets.iter().enumerate() {
            if is_full[layer] {
                left -= sizes[layer] * most;
            } else {
                weighted += sizes[layer] * bracket;
            }
        }
        let factor = if weighted > 0.0 { left.max(0.0) / weighted } else { 0.0 };
        let over: Vec<usize> =
            (0..brackets.len()).filter(|&layer| !is_full[layer] && factor * brackets[layer] > most).collect();
        if over.is_empty() {
            let share = |layer: usize| if is_full[layer] { most } else { factor * brackets[layer] };
            let mut shares: Vec<f64> = (0..brackets.len()).map(share).collect();
            // A spread of 1 leaves the least exponent a bracket of 0; what all others cannot lose it must lose after
            // all.
            if weighted <= 0.0 && left > 0.0 {
                let open: f64 =
                    (0..sizes.len()).filter(|&layer| !is_full[layer]).map(|layer| sizes[layer]).sum();
                for layer in (0..sizes.len()).filter(|&layer| !is_full[layer]) {
                    shares[layer] = (left / open).min(most);
                }
            }
            return shares;
        }
        over.into_iter().for_each(|layer| is_full[layer] = true);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Mean exponents of the blocks of LLaMA-7B and LLaMA-2-7B, as published with AlphaPruning's code.
    const LLAMA_7B: [f64; 32] = [
        2.622, 2.890, 2.969, 2.964, 3.090, 3.064, 2.961, 2.746, 2.775, 2.609, 2.717, 2.730, 2.784, 2.852,
        2.897, 3.177, 3.123, 3.446, 3.872, 3.606, 3.894, 4.066, 3.755, 3.715, 3.994, 4.220, 4.102, 4.160,
        3.851, 4.093, 4.160, 3.537,
    ];
    #[expect(clippy::approx_constant, reason = "one of the published numbers lies near pi")]
    const LLAMA_2_7B: [f64; 32] = [
        2.136, 2.706, 3.123, 3.124, 3.142, 3.133, 3.013, 3.072, 2.808, 2.910, 2.714, 2.676, 2.844, 3.013,
        3.052, 3.121, 3.439, 3.688, 3.976, 3.805, 4.334, 4.274, 4.197, 4.121, 4.195, 4.093, 3.699, 4.244,
        4.158, 4.085, 4.278, 3.483,
    ];

    #[test]
    fn the_blocks_of_llama_7b_lose_what_was_worked_out() {
        let expected = [
            0.5704, 0.6176, 0.6315, 0.6307, 0.6529, 0.6482, 0.6301, 0.5922, 0.5974, 0.5680, 0.5871, 0.5894,
            0.5990, 0.6109, 0.6188, 0.6681, 0.6587, 0.7156, 0.7906, 0.7438, 0.7946, 0.8248, 0.7701, 0.7629,
            0.8122, 0.8521, 0.8313, 0.8415, 0.7869, 0.8297, 0.8414, 0.7317,
        ];
        let found = allocate_by_alpha(&LLAMA_7B, &[202_375_168.0; 32], 0.7, 0.2, 1.0).unwrap();
        assert!((found.factor - 0.71).abs() < 5e-5, "{}", found.factor);
        // The exponents are printed to three places.
        for (found, expected) in found.sparsities.iter().zip(expected) {
            assert!((found - expected).abs() < 2e-4, "{found} is not {expected}");
        }
    }

    #[test]
    fn small_cases_are_those_worked_out_by_hand() {
        let found = allocate_by_alpha(&[2.0, 3.0, 4.0, 3.0], &[1.0; 4], 0.5, 0.3, 1.0).unwrap();
        assert!((found.factor - 0.5).abs() < 1e-15);
        for (found, expected) in found.sparsities.iter().zip([0.35, 0.5, 0.65, 0.5]) {
            assert!((found - expected).abs() < 1e-15);
        }
        let sized = allocate_by_alpha(&[2.0, 3.0, 4.0], &[1.0, 1.0, 2.0], 0.5, 0.3, 1.0).unwrap();
        for (found, expected) in sized.sparsities.iter().zip([0.325_58, 0.465_12, 0.604_65]) {
            assert!((found - expected).abs() < 5e-6);
        }
    }

    #[test]
    fn a_layer_that_would_lose_more_than_all_loses_the_most_and_the_others_the_rest() {
        let sizes = [1.0; 32];
        let found = allocate_by_alpha(&LLAMA_7B, &sizes, 0.8, 0.3, 0.99).unwrap();
        // What the published rule would take from the block of the largest exponent.
        assert!((found.factor * 1.3 - 1.0625).abs() < 5e-4, "{}", found.factor * 1.3);
        assert_eq!(found.sparsities.iter().copied().fold(0.0, f64::max), 0.99);
        assert!((found.sparsities.iter().sum::<f64>() / 32.0 - 0.8).abs() < 1e-12);
        let all = allocate_by_alpha(&LLAMA_7B, &sizes, 0.9, 1.0, 0.9).unwrap();
        assert!(all.sparsities.iter().all(|sparsity| (sparsity - 0.9).abs() < 1e-12));
    }

    #[test]
    fn equal_exponents_and_no_layers_at_all_are_no_special_case() {
        let found = allocate_by_alpha(&[3.0; 4], &[1.0, 2.0, 3.0, 4.0], 0.3, 0.2, 1.0).unwrap();
        assert!(found.sparsities.iter().all(|sparsity| (sparsity - 0.3).abs() < 1e-15));
        assert!(allocate_by_alpha(&[], &[], 0.3, 0.2, 1.0).unwrap().sparsities.is_empty());
        let huge = allocate_by_alpha(&[-1.7e308, 1.7e308], &[1.0; 2], 0.5, 0.2, 1.0).unwrap();
        assert!((huge.sparsities[1] - 0.6).abs() < 1e-12);
    }

    #[test]
    fn what_cannot_be_dealt_out_is_refused() {
        let deal = |sizes: &[f64], sparsity, spread, most| {
            allocate_by_alpha(&[1.0, 2.0], sizes, sparsity, spread, most).unwrap_err().to_string()
        };
        assert_eq!(deal(&[1.0, 1.0], 1.1, 0.2, 1.0), "`sparsity` must lie in [0, 1]; got 1.1");
        assert_eq!(deal(&[1.0, 1.0], 0.5, f64::NAN, 1.0), "`spread` must lie in [0, 1]; got NaN");
        assert_eq!(deal(&[1.0, 0.0], 0.5, 0.2, 1.0), "size of layer 1 is 0; sizes must be positive");
        assert_eq!(
            deal(&[1.0, 1.0], 0.9, 0.2, 0.8),
            "a sparsity of 0.9 is asked for, but no layer may lose more than 0.8"
        );
        assert_eq!(deal(&[1.0], 0.5, 0.2, 1.0), "`sizes` holds 1 numbers; its shape [1, 2] needs 2");
        let nan = allocate_by_alpha(&[f64::NAN], &[1.0], 0.5, 0.2, 1.0).unwrap_err();
        assert_eq!(nan.to_string(), "`alphas` holds NaN at place 0; it must hold finite numbers");
    }

    proptest! {
        #[test]
        fn the_budget_is_met_and_more_goes_where_the_exponent_is_larger(
            picked in prop::collection::vec((1.0f64..6.0, 0.5f64..4.0), 2..20),
            sparsity in 0.0f64..0.95, spread in 0.0f64..1.0, factor in 0.1f64..10.0, offset in -5.0f64..5.0,
        ) {
            let (alphas, sizes): (Vec<f64>, Vec<f64>) = picked.into_iter().unzip();
            let found = allocate_by_alpha(&alphas, &sizes, sparsity, spread, 0.95).unwrap();
            let lost: f64 = found.sparsities.iter().zip(&sizes).map(|(sparsity, size)| sparsity * size).sum();
            prop_assert!((lost - sparsity * sizes.iter().sum::<f64>()).abs() < 1e-9);
            let order = |one: usize, other: usize| alphas[one] < alphas[other];
            for one in 0..alphas.len() {
                prop_assert!((0.0..=0.95 + 1e-12).contains(&found.sparsities[one]));
                for other in 0..alphas.len() {
                    prop_assert!(!order(one, other) || found.sparsities[one] <= found.sparsities[other] + 1e-12);
                }
            }
            let (low, high) = found.sparsities.iter().fold((1.0f64, 0.0f64), |(low, high), sparsity| (low.min(*sparsity), high.max(*sparsity)));
            if high < 0.95 && spread < 0.99 && sparsity > 0.0 {
                prop_assert!((high / low - (1.0 + spread) / (1.0 - spread)).abs() < 1e-6 * high / low);
            }
            let moved: Vec<f64> = alphas.iter().map(|alpha| factor * alpha + offset).collect();
            let moved = allocate_by_alpha(&moved, &sizes, sparsity, spread, 0.95).unwrap();
            for (one, other) in moved.sparsities.iter().zip(&found.sparsities) {
                prop_assert!((one - other).abs() < 1e-9);
            }
        }

        #[test]
        fn both_published_models_meet_every_budget(sparsity in 0.0f64..0.99, spread in 0.0f64..0.5) {
            for alphas in [LLAMA_7B, LLAMA_2_7B] {
                let found = allocate_by_alpha(&alphas, &[1.0; 32], sparsity, spread, 0.99).unwrap();
                prop_assert!((found.sparsities.iter().sum::<f64>() / 32.0 - sparsity).abs() < 1e-9);
            }
        }
    }
}
