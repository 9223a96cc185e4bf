use super::{AdaptedWeight, ShapeMismatch, WeightSums};

/// L1 norm of the adapted weight: `|W|`, which needs no gradient.
///
/// # Errors
/// When a slice does not have its shape.
pub fn magnitude_sums(weight: &AdaptedWeight<'_>) -> Result<WeightSums, ShapeMismatch> {
    weight.check()?;
    Ok(weight.sums(|row, column| weight.merged(row, column).abs()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_low_rank_product_counts_with_its_scaling() {
        let weight = AdaptedWeight {
            rows: 2,
            columns: 2,
            lora_rank: 1,
            scaling: 0.5,
            weight: &[1.0, -2.0, -3.0, 4.0],
            lora_a: &[2.0, 4.0],
            lora_b: &[0.0, 1.0],
        };
        // W = [[1, -2], [-2, 6]]
        assert_eq!(
            magnitude_sums(&weight).unwrap(),
            WeightSums { rows: vec![3.0, 8.0], columns: vec![3.0, 8.0] }
        );
    }
}
