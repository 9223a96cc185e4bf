use model_spec::Block;

/// A number in `(0, 1)` that depends on nothing but its arguments: the importance of a group under `random`.
///
/// Four rounds of the splitmix64 finaliser (Steele, Lea, Flood 2014), one per argument.
#[must_use]
pub fn random_importance(seed: u64, layer: usize, block: Block, unit: usize) -> f64 {
    unit_interval(keyed(seed, [layer as u64, block_key(block), unit as u64]))
}

/// A block as a part of a key.
pub(crate) fn block_key(block: Block) -> u64 {
    match block {
        Block::Attention => 0,
        Block::Mlp => 1,
    }
}

/// Rounds of the finaliser, one for the seed and one for each part: a random number that a counter names.
pub(crate) fn keyed<const N: usize>(seed: u64, parts: [u64; N]) -> u64 {
    parts.into_iter().fold(splitmix64(seed), and_then)
}

/// One more part of the key.
pub(crate) fn and_then(state: u64, part: u64) -> u64 {
    splitmix64(state ^ part)
}

/// The top 52 bits and a half: strictly between 0 and 1.
pub(crate) fn unit_interval(state: u64) -> f64 {
    ((state >> 12) as f64 + 0.5) / (1u64 << 52) as f64
}

fn splitmix64(state: u64) -> u64 {
    let mut mixed = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_finaliser_is_splitmix64() {
        // First output of the published generator seeded with 0 and with 1234567.
        assert_eq!(splitmix64(0), 0xe220_a839_7b1d_cdaf);
        assert_eq!(splitmix64(1_234_567), 6_457_827_717_110_365_317);
    }

    #[test]
    fn values_spread_evenly_and_every_argument_matters() {
        let values: Vec<f64> = (0..10_000).map(|unit| random_importance(3, 5, Block::Mlp, unit)).collect();
        assert!(values.iter().all(|value| *value > 0.0 && *value < 1.0));
        for decile in 0..10 {
            let count = values.iter().filter(|value| (**value * 10.0) as usize == decile).count();
            assert!((900..1100).contains(&count), "{count} values in decile {decile}");
        }
        let one = random_importance(3, 5, Block::Mlp, 7);
        for other in [
            random_importance(4, 5, Block::Mlp, 7),
            random_importance(3, 6, Block::Mlp, 7),
            random_importance(3, 5, Block::Attention, 7),
            random_importance(3, 5, Block::Mlp, 8),
        ] {
            assert_ne!(one, other);
        }
    }
}
