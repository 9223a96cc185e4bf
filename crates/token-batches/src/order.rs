//! Which window a training step sees: a pure function of seed and place, so that resuming, adding
//! ranks or changing thread counts can never change it.

use std::num::NonZeroU64;

const FEISTEL_ROUNDS: u64 = 6;

/// How a run walks over its windows: `rows_per_micro_batch` at a time, epoch after epoch, each
/// epoch in another pseudo-random order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BatchOrder {
    pub seed: u64,
    /// Micro-batches accumulated into one optimizer step.
    pub micro_batches_per_step: u32,
    pub rows_per_micro_batch: u32,
}

impl BatchOrder {
    /// Number of the sample at (`step`, `micro_batch`, `row`), each counted from 0, over the run.
    #[must_use]
    pub fn sample(&self, step: u64, micro_batch: u32, row: u32) -> u64 {
        step.wrapping_mul(u64::from(self.micro_batches_per_step))
            .wrapping_add(u64::from(micro_batch))
            .wrapping_mul(u64::from(self.rows_per_micro_batch))
            .wrapping_add(u64::from(row))
    }

    /// Window indices of the rows of one micro-batch, in row order.
    pub fn window_indices(
        &self,
        step: u64,
        micro_batch: u32,
        window_count: NonZeroU64,
    ) -> impl Iterator<Item = u64> + use<> {
        let order = *self;
        (0..order.rows_per_micro_batch)
            .map(move |row| window_index(order.seed, order.sample(step, micro_batch, row), window_count))
    }
}

/// The window that sample number `sample` of a run reads: `0 <= index < window_count`.
///
/// Samples `e * window_count .. (e + 1) * window_count` are epoch `e` and hold every window once.
/// The permutation of an epoch is a Feistel network keyed by (seed, epoch) over the smallest even
/// number of bits that holds `window_count`, walked along its cycle until the value is in range
/// (Black & Rogaway 2002, "Ciphers with arbitrary finite domains", method 2).
#[must_use]
pub fn window_index(seed: u64, sample: u64, window_count: NonZeroU64) -> u64 {
    let epoch_key = mix(mix(seed) ^ (sample / window_count));
    let half_bits = (64 - (window_count.get() - 1).leading_zeros()).div_ceil(2).max(1);
    let mut value = sample % window_count;
    loop {
        value = permute(value, half_bits, epoch_key);
        if value < window_count.get() {
            return value;
        }
    }
}

/// A permutation of the numbers of `2 * half_bits` bits.
fn permute(value: u64, half_bits: u32, key: u64) -> u64 {
    let low_bits = (1_u64 << half_bits) - 1;
    let (mut left, mut right) = (value >> half_bits, value & low_bits);
    for round in 0..FEISTEL_ROUNDS {
        let round_key = mix(key ^ round.wrapping_mul(0xD6E8_FEB8_6659_FD93));
        (left, right) = (right, left ^ (mix(round_key ^ right) & low_bits));
    }
    (left << half_bits) | right
}

/// The finaliser of SplitMix64 (Steele, Lea & Flood 2014) after its additive step.
fn mix(value: u64) -> u64 {
    let value = value.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let value = (value ^ (value >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    value ^ (value >> 31)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn count(windows: u64) -> NonZeroU64 {
        NonZeroU64::new(windows).unwrap()
    }

    proptest! {
        #[test]
        fn every_epoch_sees_each_window_exactly_once(
            seed: u64, windows in 1_u64..2000, epoch in 0_u64..1 << 40,
        ) {
            let mut seen: Vec<u64> = (0..windows)
                .map(|position| window_index(seed, epoch * windows + position, count(windows)))
                .collect();
            seen.sort_unstable();
            prop_assert!(seen.iter().copied().eq(0..windows));
        }

        #[test]
        fn an_index_is_in_range_for_any_arguments(seed: u64, sample: u64, windows in 1_u64..) {
            prop_assert!(window_index(seed, sample, count(windows)) < windows);
        }

        #[test]
        fn samples_number_the_rows_without_gap_or_overlap(
            micro_batches_per_step in 1_u32..9, rows_per_micro_batch in 1_u32..9,
        ) {
            let order = BatchOrder { seed: 1, micro_batches_per_step, rows_per_micro_batch };
            let mut expected = 0;
            for step in 0..4 {
                for micro_batch in 0..micro_batches_per_step {
                    for row in 0..rows_per_micro_batch {
                        prop_assert_eq!(order.sample(step, micro_batch, row), expected);
                        expected += 1;
                    }
                }
            }
        }

        #[test]
        fn the_windows_of_a_step_do_not_depend_on_how_it_is_cut_into_micro_batches(
            seed: u64, step in 0_u64..1000, windows in 1_u64..500,
        ) {
            let of_step = |micro_batches_per_step, rows_per_micro_batch| -> Vec<u64> {
                let order = BatchOrder { seed, micro_batches_per_step, rows_per_micro_batch };
                (0..micro_batches_per_step)
                    .flat_map(|micro_batch| order.window_indices(step, micro_batch, count(windows)))
                    .collect()
            };
            prop_assert_eq!(of_step(1, 12), of_step(4, 3));
            prop_assert_eq!(of_step(1, 12), of_step(12, 1));
        }
    }

    #[test]
    fn epochs_and_seeds_differ_and_no_order_is_the_identity() {
        let order = |seed, epoch: u64| -> Vec<u64> {
            (0..100).map(|position| window_index(seed, epoch * 100 + position, count(100))).collect()
        };
        let orders: std::collections::HashSet<Vec<u64>> =
            (0..20).flat_map(|seed| (0..20).map(move |epoch| order(seed, epoch))).collect();
        assert_eq!(orders.len(), 400);
        assert!(!orders.contains(&(0..100).collect::<Vec<u64>>()));
    }

    #[test]
    fn each_position_of_an_epoch_is_spread_over_all_windows() {
        let mut hits = [0_u32; 8];
        for seed in 0..8000 {
            hits[usize::try_from(window_index(seed, 3, count(8))).unwrap()] += 1;
        }
        assert!(hits.iter().all(|hit| (850..1150).contains(hit)), "{hits:?}");
    }

    /// A run must resume into the same order under a later version: these numbers never change.
    #[test]
    fn the_order_of_seed_42_is_pinned() {
        let order: Vec<u64> = (0..20).map(|sample| window_index(42, sample, count(10))).collect();
        assert_eq!(order, [2, 3, 1, 0, 4, 6, 9, 7, 5, 8, 6, 9, 5, 1, 3, 2, 0, 4, 7, 8]);
    }
}
