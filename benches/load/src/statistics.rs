//! What many samples come to, and numbers to draw by.

use std::time::Duration;

/// Durations, sorted.
#[derive(Debug, Clone, Default)]
pub(crate) struct Sorted(Vec<Duration>);

impl Sorted {
    pub(crate) fn of(mut samples: Vec<Duration>) -> Self {
        samples.sort_unstable();
        Self(samples)
    }

    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    pub(crate) fn into_inner(self) -> Vec<Duration> {
        self.0
    }

    /// The sample that this share of all does not exceed; zero without samples.
    pub(crate) fn quantile(&self, share: f64) -> Duration {
        let last = self.0.len().saturating_sub(1);
        let place = (share * self.0.len() as f64).ceil() as usize;
        self.0.get(place.saturating_sub(1).min(last)).copied().unwrap_or_default()
    }
}

/// Numbers that look drawn, the same for the same seed: SplitMix64 (Steele, Lea and Flood 2014).
#[derive(Debug, Clone)]
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let bits = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let bits = (bits ^ bits >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        bits ^ bits >> 31
    }

    /// At least 1, and `mean` on average; for 0 more than anything counts.
    pub(crate) fn around(&mut self, mean: u64) -> u64 {
        if mean == 0 { u64::MAX } else { 1 + self.next() % (2 * mean - 1) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quantile_is_a_sample_that_so_many_do_not_exceed() {
        let samples = Sorted::of((1..=100).rev().map(Duration::from_millis).collect());
        for (share, expected) in [(0.0, 1), (0.5, 50), (0.99, 99), (1.0, 100)] {
            assert_eq!(samples.quantile(share), Duration::from_millis(expected));
        }
        assert_eq!(Sorted::default().quantile(0.5), Duration::ZERO);
    }

    #[test]
    fn drawn_numbers_lie_around_their_mean() {
        let mut random = Random::new(1);
        let drawn: Vec<u64> = (0..10_000).map(|_| random.around(50)).collect();
        assert!(drawn.iter().all(|number| (1..100).contains(number)));
        let mean = drawn.iter().sum::<u64>() as f64 / drawn.len() as f64;
        assert!((49.0..51.0).contains(&mean), "{mean}");
        assert_eq!(random.around(0), u64::MAX);
    }
}
