//! llama.cpp stores the rope scaling of Llama 3.1 as one divisor per frequency; `config.json` wants its parameters.

use model_spec::{Rope, RopeScaling};

/// What every published Llama 3.1 and later was trained with; only the factor differs (8 or 32).
const LOW_FREQ_FACTOR: f64 = 1.0;
const HIGH_FREQ_FACTOR: f64 = 4.0;
const ORIGINAL_CONTEXT: usize = 8192;
/// The divisors are f32.
const TOLERANCE: f64 = 1e-4;

/// The scaling whose frequencies are the plain ones divided by `divisors`, if it is one we know.
pub(super) fn recognise(divisors: &[f32], theta: f64, head_dim: usize) -> Option<RopeScaling> {
    let plain = Rope { theta, scaling: RopeScaling::None }.inverse_frequencies(head_dim);
    if plain.len() != divisors.len() {
        return None;
    }
    if divisors.iter().all(|divisor| *divisor == 1.0) {
        return Some(RopeScaling::None);
    }
    // The slowest waves are divided by the whole factor.
    let scaling = RopeScaling::Llama3 {
        factor: f64::from(*divisors.last()?),
        low_freq_factor: LOW_FREQ_FACTOR,
        high_freq_factor: HIGH_FREQ_FACTOR,
        original_max_position_embeddings: ORIGINAL_CONTEXT,
    };
    let scaled = Rope { theta, scaling }.inverse_frequencies(head_dim);
    let agrees = plain
        .iter()
        .zip(scaled)
        .zip(divisors)
        .all(|((plain, scaled), &divisor)| (plain / scaled / f64::from(divisor) - 1.0).abs() < TOLERANCE);
    agrees.then_some(scaling)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_scaling_of_llama_3_1_is_recognised_and_another_is_not() {
        let scaling = RopeScaling::Llama3 {
            factor: 32.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: 8192,
        };
        let plain = Rope { theta: 500_000.0, scaling: RopeScaling::None }.inverse_frequencies(64);
        let scaled = Rope { theta: 500_000.0, scaling }.inverse_frequencies(64);
        let mut divisors: Vec<f32> =
            plain.iter().zip(scaled).map(|(plain, scaled)| (plain / scaled) as f32).collect();
        assert_eq!(recognise(&divisors, 500_000.0, 64), Some(scaling));
        assert_eq!(recognise(&divisors, 10_000.0, 64), None);
        assert_eq!(recognise(&divisors, 500_000.0, 128), None);
        divisors[20] *= 1.5;
        assert_eq!(recognise(&divisors, 500_000.0, 64), None);
        assert_eq!(recognise(&[1.0; 32], 500_000.0, 64), Some(RopeScaling::None));
    }
}
