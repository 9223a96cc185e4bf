use serde::{Deserialize, Serialize};

/// Groups that are alike: one block of one layer.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct GroupPool {
    pub group_count: usize,
    /// Parameters or bytes of one group.
    pub group_size: f64,
    /// Groups go so many at once: what `channel_multiple` and `serve_tp` ask for.
    pub quantum: usize,
    /// Groups that stay whatever is asked.
    pub least_kept: usize,
    /// The fraction of groups that shall go.
    pub sparsity: f64,
}

/// Why fractions cannot become groups.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum WholeGroupsError {
    #[error("pool {pool}: sparsity must lie in [0, 1]; got {sparsity}")]
    Sparsity { pool: usize, sparsity: f64 },
    #[error("pool {pool}: a group's size must be a positive number; got {size}")]
    Size { pool: usize, size: f64 },
    #[error("pool {pool}: groups go at least one at once; `quantum` is 0")]
    Quantum { pool: usize },
    #[error("a size of {wanted} shall go, but what may go comes to {possible} only")]
    BeyondMost { wanted: f64, possible: f64 },
}

/// Guards comparisons against the last bit of a sum of products, relative to what is compared.
const SLACK: f64 = 1e-9;

/// How many groups go from each pool: whole quanta, at least the size that the fractions come to in all, and less than
/// the largest quantum more.
///
/// Each pool loses its fraction rounded down; what is missing then goes one quantum at a time, from the pools of the
/// largest remainder first (in groups' share of a quantum; of equal ones the first).
///
/// # Errors
/// Names the pool whose figures cannot be, or says that not enough may go.
pub fn whole_groups(pools: &[GroupPool]) -> Result<Vec<usize>, WholeGroupsError> {
    for (pool, GroupPool { group_size, quantum, sparsity, .. }) in pools.iter().enumerate() {
        if !(0.0..=1.0).contains(sparsity) {
            return Err(WholeGroupsError::Sparsity { pool, sparsity: *sparsity });
        }
        if !(*group_size > 0.0 && group_size.is_finite()) {
            return Err(WholeGroupsError::Size { pool, size: *group_size });
        }
        if *quantum == 0 {
            return Err(WholeGroupsError::Quantum { pool });
        }
    }
    let due = |pool: &GroupPool| pool.sparsity * pool.group_count as f64 / pool.quantum as f64;
    let most = |pool: &GroupPool| pool.group_count.saturating_sub(pool.least_kept) / pool.quantum;
    let size = |pool: &GroupPool| pool.quantum as f64 * pool.group_size;
    let wanted: f64 = pools.iter().map(|pool| due(pool) * size(pool)).sum();
    let possible: f64 = pools.iter().map(|pool| most(pool) as f64 * size(pool)).sum();
    if wanted > possible * (1.0 + SLACK) {
        return Err(WholeGroupsError::BeyondMost { wanted, possible });
    }
    let mut quanta: Vec<usize> =
        pools.iter().map(|pool| ((due(pool) + SLACK) as usize).min(most(pool))).collect();
    let mut gone: f64 = pools.iter().zip(&quanta).map(|(pool, quanta)| *quanta as f64 * size(pool)).sum();
    let mut order: Vec<usize> = (0..pools.len()).collect();
    while gone < wanted * (1.0 - SLACK) {
        let remainder = |&pool: &usize| quanta[pool] as f64 - due(&pools[pool]);
        order.sort_by(|one, other| remainder(one).total_cmp(&remainder(other)));
        let next = order.iter().copied().find(|&pool| quanta[pool] < most(&pools[pool]));
        // All that may go has gone: what is missing is rounding.
        let Some(pool) = next else { break };
        quanta[pool] += 1;
        gone += size(&pools[pool]);
    }
    Ok(pools.iter().zip(quanta).map(|(pool, quanta)| quanta * pool.quantum).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn pool(group_count: usize, sparsity: f64) -> GroupPool {
        GroupPool { group_count, group_size: 1.0, quantum: 1, least_kept: 1, sparsity }
    }

    #[test]
    fn what_is_missing_goes_where_the_remainder_is_largest() {
        // 3.5, 5.2 and 4.3: 13 in all.
        let pools = [pool(10, 0.35), pool(10, 0.52), pool(10, 0.43)];
        assert_eq!(whole_groups(&pools), Ok(vec![4, 5, 4]));
        let alike = [pool(4, 0.375); 2];
        assert_eq!(whole_groups(&alike), Ok(vec![2, 1]));
        let exact = [pool(10, 0.3), pool(10, 0.7)];
        assert_eq!(whole_groups(&exact), Ok(vec![3, 7]));
        // In fours, 7.2 channels are 1.8 quanta, and 5 are 1.25: together 3.05, so that four go.
        let in_fours = |sparsity| GroupPool { quantum: 4, ..pool(20, sparsity) };
        assert_eq!(whole_groups(&[in_fours(0.36), in_fours(0.25)]), Ok(vec![8, 8]));
        assert_eq!(whole_groups(&[]), Ok(vec![]));
    }

    #[test]
    fn what_stays_in_one_pool_goes_from_another() {
        let full = GroupPool { least_kept: 8, ..pool(10, 0.5) };
        assert_eq!(whole_groups(&[full, pool(10, 0.5)]), Ok(vec![2, 8]));
        assert_eq!(
            whole_groups(&[full, GroupPool { least_kept: 3, ..pool(10, 0.5) }]),
            Err(WholeGroupsError::BeyondMost { wanted: 10.0, possible: 9.0 })
        );
    }

    #[test]
    fn figures_that_cannot_be_are_refused_by_pool() {
        let refuse = |bad| whole_groups(&[pool(4, 0.5), bad]).unwrap_err();
        assert_eq!(refuse(pool(4, 1.5)), WholeGroupsError::Sparsity { pool: 1, sparsity: 1.5 });
        assert!(matches!(refuse(pool(4, f64::NAN)), WholeGroupsError::Sparsity { .. }));
        assert_eq!(
            refuse(GroupPool { group_size: 0.0, ..pool(4, 0.5) }),
            WholeGroupsError::Size { pool: 1, size: 0.0 }
        );
        assert_eq!(refuse(GroupPool { quantum: 0, ..pool(4, 0.5) }), WholeGroupsError::Quantum { pool: 1 });
    }

    proptest! {
        #[test]
        fn the_budget_is_met_and_missed_by_less_than_the_largest_quantum(
            picked in prop::collection::vec((1usize..40, 0.5f64..9.0, 1usize..4, 0.0f64..0.8), 1..12),
        ) {
            let pools: Vec<GroupPool> = picked
                .into_iter()
                .map(|(group_count, group_size, quantum, sparsity)| GroupPool { group_count, group_size, quantum, least_kept: 0, sparsity })
                .collect();
            let wanted: f64 = pools.iter().map(|pool| pool.sparsity * pool.group_count as f64 * pool.group_size).sum();
            let Ok(removed) = whole_groups(&pools) else {
                // Quanta that do not divide the groups leave some that cannot go.
                prop_assert!(pools.iter().any(|pool| pool.group_count % pool.quantum > 0));
                return Ok(());
            };
            let gone: f64 = removed.iter().zip(&pools).map(|(removed, pool)| *removed as f64 * pool.group_size).sum();
            let largest = pools.iter().map(|pool| pool.quantum as f64 * pool.group_size).fold(0.0, f64::max);
            prop_assert!(gone >= wanted * (1.0 - 1e-8) && gone < wanted + largest * (1.0 + 1e-8));
            for (removed, pool) in removed.iter().zip(&pools) {
                prop_assert!(removed % pool.quantum == 0 && *removed <= pool.group_count);
            }
        }
    }
}
