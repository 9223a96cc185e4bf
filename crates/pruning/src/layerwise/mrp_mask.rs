use super::mrp::removal_loss;
use super::{Hessian, LayerwiseError, LinearWeight, Pattern, WeightMask};
use crate::linear_algebra::Cholesky;
use crate::slices::check_finite;

/// What losing each weight alone costs at best: `w_j^2 / (H^-1)_jj` (MRP's single removal, as in the optimal brain
/// surgeon). `[rows, columns]`.
///
/// # Errors
/// When the Hessian is of another size, or a score is not finite.
pub fn mrp_single_scores(weight: &LinearWeight<'_>, hessian: &Hessian) -> Result<Vec<f64>, LayerwiseError> {
    weight.check_hessian(hessian)?;
    let size = hessian.size();
    let live = hessian.without_dead(weight.weight);
    let score = |(place, weight): (usize, f64)| {
        let column = place % size;
        weight * weight / hessian.inverse()[column * size + column]
    };
    let scores: Vec<f64> = live.into_iter().enumerate().map(score).collect();
    check_finite("scores", &scores)?;
    Ok(scores)
}

/// MRP's mask "S": the lowest [`mrp_single_scores`] of each row, or of each group in it.
///
/// # Errors
/// As [`mrp_single_scores`], and when the pattern does not fit.
pub fn mrp_mask_by_single(
    weight: &LinearWeight<'_>,
    hessian: &Hessian,
    pattern: Pattern,
) -> Result<WeightMask, LayerwiseError> {
    let scores = mrp_single_scores(weight, hessian)?;
    WeightMask::lowest_of_rows(&scores, weight.rows, weight.columns, pattern)
}

/// Subsets of a group that are tried at most: 12870 are those of 8 in 16.
const MOST_SUBSETS: u128 = 20_000;

/// MRP's mask "M": of all subsets of `pruned` weights in a group of `of`, the one whose joint removal costs least; of
/// equal ones the first.
///
/// ```text
/// argmin over P of  w_P [(H^-1)_PP]^-1 w_P^T
/// ```
///
/// It is the best for each group by itself. What all groups together cost is mostly, but not always, less than with "S".
///
/// # Errors
/// When the groups do not fit or have too many subsets.
pub fn mrp_mask_by_group(
    weight: &LinearWeight<'_>,
    hessian: &Hessian,
    pruned: usize,
    of: usize,
) -> Result<WeightMask, LayerwiseError> {
    weight.check_hessian(hessian)?;
    let LinearWeight { rows, columns, .. } = *weight;
    Pattern::Grouped { pruned, of }.check(columns)?;
    let subsets = subset_count(pruned, of);
    if subsets > MOST_SUBSETS {
        return Err(LayerwiseError::Subsets { pruned, of, subsets, most: MOST_SUBSETS });
    }
    let subsets = subsets_of(pruned, of);
    let live = hessian.without_dead(weight.weight);
    let mut mask = WeightMask::none(rows, columns);
    for start in (0..columns).step_by(of) {
        let mut best: Vec<Option<(f64, usize)>> = vec![None; rows];
        for (number, subset) in subsets.iter().enumerate() {
            let places: Vec<usize> = subset.iter().map(|place| start + place).collect();
            let factor = Cholesky::factor(&Hessian::part(hessian.inverse(), columns, &places), pruned)?;
            for (row, best) in best.iter_mut().enumerate() {
                let gone: Vec<f64> = places.iter().map(|&place| live[row * columns + place]).collect();
                let loss = removal_loss(&factor, &gone)?;
                if !loss.is_finite() {
                    return Err(LayerwiseError::Overflow { row });
                }
                if best.is_none_or(|(least, _)| loss < least) {
                    *best = Some((loss, number));
                }
            }
        }
        for (row, best) in best.into_iter().enumerate() {
            if let Some((_, number)) = best {
                subsets[number].iter().for_each(|place| mask.set(row, start + place, true));
            }
        }
    }
    Ok(mask)
}

/// `of` choose `pruned`, or more than can be tried.
fn subset_count(pruned: usize, of: usize) -> u128 {
    let mut count: u128 = 1;
    for taken in 0..pruned.min(of - pruned) as u128 {
        count = count.saturating_mul(of as u128 - taken) / (taken + 1);
        if count > 1 << 64 {
            break;
        }
    }
    count
}

/// All ascending choices of `pruned` places below `of`, in the order of a dictionary.
fn subsets_of(pruned: usize, of: usize) -> Vec<Vec<usize>> {
    let mut subsets = vec![Vec::new()];
    for taken in 0..pruned {
        // Enough places must be left for those that are still to be taken.
        let last = of - (pruned - taken);
        let longer = |subset: Vec<usize>| {
            let first = subset.last().map_or(0, |last| last + 1);
            (first..=last).map(move |place| [&subset[..], &[place]].concat())
        };
        subsets = subsets.into_iter().flat_map(longer).collect();
    }
    subsets
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn subsets_are_all_there_once_and_in_order() {
        assert_eq!(subsets_of(2, 4), [[0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3]]);
        for (pruned, of) in [(1, 1), (2, 4), (4, 8), (3, 7), (8, 8)] {
            let subsets = subsets_of(pruned, of);
            assert_eq!(subsets.len() as u128, subset_count(pruned, of));
            assert!(subsets.windows(2).all(|pair| pair[0] < pair[1]));
        }
        assert_eq!(subset_count(4, 8), 70);
        assert_eq!(subset_count(8, 16), 12_870);
        assert!(subset_count(5000, 10_000) > MOST_SUBSETS);
    }
}
