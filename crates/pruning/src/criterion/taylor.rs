use super::{AdaptedWeight, ShapeMismatch, WeightSums, check_shape};

/// First-order Taylor with the true gradient `G = dL/dW` (LLM-Pruner, arXiv:2305.11627, `param_first`): `|G * W|`.
///
/// `gradient` is `[rows, columns]`, row-major.
///
/// # Errors
/// When a slice does not have its shape.
pub fn taylor_sums(weight: &AdaptedWeight<'_>, gradient: &[f64]) -> Result<WeightSums, ShapeMismatch> {
    weight.check()?;
    check_shape("gradient", gradient, [weight.rows, weight.columns])?;
    Ok(weight
        .sums(|row, column| (gradient[row * weight.columns + column] * weight.merged(row, column)).abs()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_weight_counts_by_the_size_of_its_product_with_the_gradient() {
        let weight = AdaptedWeight {
            rows: 2,
            columns: 2,
            lora_rank: 1,
            scaling: 0.5,
            weight: &[1.0, -2.0, -3.0, 4.0],
            lora_a: &[2.0, 4.0],
            lora_b: &[0.0, 1.0],
        };
        // W = [[1, -2], [-2, 6]], G W = [[3, 2], [-4, 0]]
        assert_eq!(
            taylor_sums(&weight, &[3.0, -1.0, 2.0, 0.0]).unwrap(),
            WeightSums { rows: vec![5.0, 4.0], columns: vec![7.0, 2.0] }
        );
    }
}
