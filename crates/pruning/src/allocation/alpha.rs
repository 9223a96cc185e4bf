use crate::linear_algebra::{MatrixError, gram, symmetric_eigenvalues};
use crate::slices::{SliceError, check_finite, check_matrix};
use serde::{Deserialize, Serialize};

/// Which eigenvalues are the tail that the exponent is fitted to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HillTail {
    /// The upper half.
    Mid,
    /// From near the peak of the spectrum on, where the tail fits a power law best, as published.
    Peak(PeakBound),
}

/// The least eigenvalue from which a tail may begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PeakBound {
    /// `log10(0.95 peak)`, compared with eigenvalues that are no logarithms: as the published code has it, mostly no
    /// bound.
    Faithful,
    /// `0.95 peak`.
    Fixed,
}

/// Why a spectrum has no exponent.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum AlphaError {
    #[error("eigenvalue {index} is {value}; squares of singular values are not negative")]
    Negative { index: usize, value: f64 },
    #[error("eigenvalue {index} is {value}; each must be above 0 and none below the one before it")]
    NotAscending { index: usize, value: f64 },
    #[error("{left} eigenvalues are above {zero_threshold}; a tail needs at least 2 of different size")]
    NoTail { left: usize, zero_threshold: f64 },
    #[error("`zero_threshold` must be a number of at least 0; got {value}")]
    Threshold { value: f64 },
    #[error(
        "the tail begins at place {first} of {count} eigenvalues; of those from there on at least two must differ"
    )]
    First { first: usize, count: usize },
    #[error("the spectrum cannot be computed")]
    Matrix(#[from] MatrixError),
    #[error(transparent)]
    Slice(#[from] SliceError),
}

/// Bins of the histogram of `log10` eigenvalues.
const BINS: usize = 100;

/// The exponent of the density of a weight's eigenvalues, by Hill's estimator (AlphaPruning, arXiv:2410.10912,
/// `PL_Alpha_Hill`). A small one says a heavy tail: a layer that learned much, of which less may go.
///
/// ```text
/// alpha = 1 + m / (sum_{j >= i} ln l_j - m ln l_i)      l ascending, m = n - i
/// mid:   i = floor(n / 2)
/// peak:  of the l_i up to 1.5 times the peak, the one from which the tail is nearest to its power law:
///        least over i of  max_{j >= i} |1 - (l_j / l_i)^(1 - alpha_i) - (j - i) / m|
/// ```
///
/// The peak is the lower edge of the fullest of 100 equal bins of `log10 l`. The threshold `l_i` counts among the `m`,
/// as in the published code; Hill's own estimator has `m - 1` above the same sum.
///
/// `eigenvalues`: of `W^T W`, the `min(out, in)` squared singular values, in any order. Those up to `zero_threshold`
/// are left out: they are the zeros of a weight of lower rank, which have no logarithm (1e-5 is usual in `f32`; at 0
/// exact zeros go).
///
/// # Errors
/// When a value is negative or not finite, or all that are left are equal.
pub fn hill_alpha(eigenvalues: &[f64], tail: HillTail, zero_threshold: f64) -> Result<f64, AlphaError> {
    check_finite("eigenvalues", eigenvalues)?;
    if !(0.0..f64::INFINITY).contains(&zero_threshold) {
        return Err(AlphaError::Threshold { value: zero_threshold });
    }
    if let Some(index) = eigenvalues.iter().position(|value| *value < -zero_threshold) {
        return Err(AlphaError::Negative { index, value: eigenvalues[index] });
    }
    let mut ascending: Vec<f64> =
        eigenvalues.iter().copied().filter(|value| *value > zero_threshold).collect();
    ascending.sort_by(f64::total_cmp);
    let no_tail = AlphaError::NoTail { left: ascending.len(), zero_threshold };
    match (ascending.first(), ascending.last()) {
        (Some(least), Some(greatest)) if least < greatest => {}
        _ => return Err(no_tail),
    }
    let logarithms: Vec<f64> = ascending.iter().map(|value| value.ln()).collect();
    let found = match tail {
        HillTail::Mid => alpha_at(&logarithms, ascending.len() / 2),
        HillTail::Peak(bound) => best_alpha(&ascending, &logarithms, bound),
    };
    found.ok_or(no_tail)
}

/// The exponent of the tail from place `first` of `ascending` on.
///
/// # Errors
/// When the values do not ascend from above zero, or those of the tail are equal.
pub fn hill_alpha_from(ascending: &[f64], first: usize) -> Result<f64, AlphaError> {
    check_finite("ascending", ascending)?;
    if let Some(index) = (0..ascending.len())
        .find(|&index| ascending[index] <= 0.0 || index > 0 && ascending[index] < ascending[index - 1])
    {
        return Err(AlphaError::NotAscending { index, value: ascending[index] });
    }
    let logarithms: Vec<f64> = ascending.iter().map(|value| value.ln()).collect();
    alpha_at(&logarithms, first).ok_or(AlphaError::First { first, count: ascending.len() })
}

/// Eigenvalues of `W^T W`, ascending, `min(rows, columns)` of them: squared singular values, by the Gram of the shorter
/// side. For small matrices: the plain form.
///
/// # Errors
/// When the weight, `[rows, columns]`, has another length or holds a number that is not finite.
pub fn spectrum(weight: &[f64], rows: usize, columns: usize) -> Result<Vec<f64>, AlphaError> {
    check_matrix("weight", weight, [rows, columns])?;
    let eigenvalues = if columns <= rows {
        symmetric_eigenvalues(&gram(weight, rows, columns), columns)
    } else {
        let transposed: Vec<f64> =
            (0..rows * columns).map(|place| weight[place % rows * columns + place / rows]).collect();
        symmetric_eigenvalues(&gram(&transposed, columns, rows), rows)
    };
    // Round-off may leave a zero a little below zero.
    Ok(eigenvalues?.into_iter().map(|value| value.max(0.0)).collect())
}

/// None where the tail is empty or all of it is one value.
fn alpha_at(logarithms: &[f64], first: usize) -> Option<f64> {
    let tail = logarithms.get(first..)?;
    let start = *tail.first()?;
    let above: f64 = tail.iter().map(|logarithm| logarithm - start).sum();
    (above > 0.0).then(|| 1.0 + tail.len() as f64 / above)
}

/// Of the tails that may be, the one at the least distance from its power law; of equal ones the longest.
fn best_alpha(ascending: &[f64], logarithms: &[f64], bound: PeakBound) -> Option<f64> {
    let peak = peak(logarithms);
    let least = match bound {
        PeakBound::Faithful => (0.95 * peak).log10(),
        PeakBound::Fixed => 0.95 * peak,
    };
    let candidates = (0..ascending.len() - 1)
        .skip_while(|&first| ascending[first] < least)
        .take_while(|&first| ascending[first] <= 1.5 * peak);
    let mut best: Option<(f64, f64)> = None;
    for first in candidates {
        let Some(alpha) = alpha_at(logarithms, first) else { continue };
        let most = best.map_or(f64::INFINITY, |(distance, _)| distance);
        if let Some(distance) = distance_below(&logarithms[first..], alpha, most) {
            best = Some((distance, alpha));
        }
    }
    best.map(|(_, alpha)| alpha)
}

/// Kolmogorov-Smirnov distance between a tail and the power law of its exponent, where it is less than `most`.
fn distance_below(tail: &[f64], alpha: f64, most: f64) -> Option<f64> {
    let mut distance = 0.0f64;
    for (place, logarithm) in tail.iter().enumerate() {
        let law = 1.0 - ((1.0 - alpha) * (logarithm - tail[0])).exp();
        distance = distance.max((law - place as f64 / tail.len() as f64).abs());
        if distance >= most {
            return None;
        }
    }
    Some(distance)
}

/// Lower edge of the first of the fullest bins of the logarithms to base 10.
fn peak(logarithms: &[f64]) -> f64 {
    let (low, high) = (logarithms[0], logarithms[logarithms.len() - 1]);
    let mut counts = [0usize; BINS];
    for logarithm in logarithms {
        let bin = (BINS as f64 * (logarithm - low) / (high - low)) as usize;
        counts[bin.min(BINS - 1)] += 1;
    }
    let mut fullest = 0;
    for bin in 1..BINS {
        if counts[bin] > counts[fullest] {
            fullest = bin;
        }
    }
    (low + (high - low) * fullest as f64 / BINS as f64).exp()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::numbers;
    use proptest::prelude::*;

    const PEAKS: [HillTail; 2] = [HillTail::Peak(PeakBound::Faithful), HillTail::Peak(PeakBound::Fixed)];

    /// Quantiles of a Pareto law whose density falls with exponent `alpha`.
    fn pareto(count: usize, alpha: f64) -> Vec<f64> {
        let quantile = |place| 1.0 - (place as f64 + 0.5) / count as f64;
        (0..count).map(|place| quantile(place).powf(-1.0 / (alpha - 1.0))).collect()
    }

    fn assert_near(found: f64, expected: f64, tolerance: f64) {
        assert!((found - expected).abs() < tolerance, "{found} is not {expected}");
    }

    #[test]
    fn the_threshold_counts_among_the_tail() {
        let alpha = hill_alpha_from(&[1.0, 2.0, 4.0, 8.0], 0).unwrap();
        assert_near(alpha, 1.961_80, 5e-6);
        // Hill's own estimator has one less above the same sum.
        assert_near(1.0 + (alpha - 1.0) * 3.0 / 4.0, 1.721_35, 5e-6);
    }

    #[test]
    fn quantiles_of_a_power_law_give_its_exponent_back() {
        for (alpha, count, expected) in [
            (2.0, 256, 2.0033),
            (2.0, 4096, 2.0002),
            (3.0, 256, 3.0066),
            (3.0, 4096, 3.0004),
            (4.5, 256, 4.5116),
            (4.5, 4096, 4.5007),
        ] {
            assert_near(hill_alpha_from(&pareto(count, alpha), 0).unwrap(), expected, 6e-5);
        }
        for (count, expected) in [(256, 3.0133), (4096, 3.0008)] {
            assert_near(hill_alpha(&pareto(count, 3.0), HillTail::Mid, 0.0).unwrap(), expected, 6e-5);
        }
    }

    #[test]
    fn the_tail_is_found_above_a_body_that_follows_no_power_law() {
        for (alpha, expected) in [(2.0, 2.0007), (3.0, 3.0013), (4.5, 4.5058)] {
            let body = (0..512).map(|place| (place as f64 + 0.5) / 512.0);
            let spectrum: Vec<f64> = body.chain(pareto(512, alpha)).collect();
            for tail in PEAKS {
                assert_near(hill_alpha(&spectrum, tail, 0.0).unwrap(), expected, 6e-5);
            }
        }
    }

    #[test]
    fn spectra_without_a_tail_are_refused() {
        for tail in [HillTail::Mid, PEAKS[0], PEAKS[1]] {
            for flat in [&[][..], &[1.0], &[2.0; 6], &[0.0, 0.0, 3.0]] {
                assert!(matches!(hill_alpha(flat, tail, 0.0), Err(AlphaError::NoTail { .. })), "{flat:?}");
            }
            let error = hill_alpha(&[1.0, f64::NAN], tail, 0.0).unwrap_err();
            assert_eq!(error.to_string(), "`eigenvalues` holds NaN at place 1; it must hold finite numbers");
            assert_eq!(
                hill_alpha(&[3.0, 1.0, -1.0], tail, 1e-5),
                Err(AlphaError::Negative { index: 2, value: -1.0 })
            );
            // The zeros of a lower rank, exact or by round-off.
            let whole = hill_alpha(&[1.0, 2.0, 4.0, 8.0], tail, 0.0).unwrap();
            assert_eq!(hill_alpha(&[0.0, 1.0, 8.0, 2.0, 0.0, 4.0], tail, 0.0), Ok(whole));
            assert_eq!(hill_alpha(&[1e-9, 1.0, 8.0, 2.0, -1e-12, 4.0], tail, 1e-5), Ok(whole));
        }
        assert!(matches!(
            hill_alpha(&[1.0, 2.0], HillTail::Mid, f64::NAN),
            Err(AlphaError::Threshold { .. })
        ));
        assert_eq!(hill_alpha_from(&[1.0, 2.0], 1), Err(AlphaError::First { first: 1, count: 2 }));
        assert_eq!(hill_alpha_from(&[1.0, 2.0], 9), Err(AlphaError::First { first: 9, count: 2 }));
        assert_eq!(hill_alpha_from(&[2.0, 1.0], 0), Err(AlphaError::NotAscending { index: 1, value: 1.0 }));
    }

    proptest! {
        #[test]
        fn shards_add_up_to_the_spectrum_of_the_whole(seed: u64, rows in 4usize..12, columns in 2usize..4) {
            let weight = numbers(seed, rows * columns);
            let whole = spectrum(&weight, rows, columns).unwrap();
            prop_assert_eq!(whole.len(), columns.min(rows));
            for ranks in [1usize, 2, 4] {
                let mut sum = vec![0.0; columns * columns];
                for shard in weight.chunks(rows.div_ceil(ranks) * columns) {
                    let own = gram(shard, shard.len() / columns, columns);
                    sum.iter_mut().zip(own).for_each(|(sum, own)| *sum += own);
                }
                for (found, whole) in symmetric_eigenvalues(&sum, columns).unwrap().iter().zip(&whole) {
                    prop_assert!((found - whole).abs() < 1e-9 * (1.0 + whole));
                }
            }
            let transposed: Vec<f64> =
                (0..rows * columns).map(|place| weight[place % rows * columns + place / rows]).collect();
            for (found, whole) in spectrum(&transposed, columns, rows).unwrap().iter().zip(&whole) {
                prop_assert!((found - whole).abs() < 1e-9 * (1.0 + whole));
            }
        }

        #[test]
        fn the_exponent_knows_neither_order_nor_scale(seed: u64, exponent in -3i32..4) {
            let spectrum: Vec<f64> = numbers(seed, 40).iter().map(|value| (3.0 * value).exp()).collect();
            let scaled: Vec<f64> = spectrum.iter().rev().map(|value| value * 4f64.powi(exponent)).collect();
            // The bound of the published code is the one thing that scale moves.
            for tail in [HillTail::Mid, HillTail::Peak(PeakBound::Fixed)] {
                let (one, other) = (hill_alpha(&spectrum, tail, 0.0), hill_alpha(&scaled, tail, 0.0));
                match (one, other) {
                    (Ok(one), Ok(other)) => prop_assert!((one - other).abs() < 1e-6 * one),
                    (one, other) => prop_assert_eq!(one, other),
                }
            }
        }
    }
}
