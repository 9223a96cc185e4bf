use super::{AdaptedWeight, ShapeMismatch, WeightSums, check_shape};

/// Sums of `W^2 x^2`: a weight's square times the summed square of the input it multiplies (Wanda, arXiv:2306.11695, in its
/// structured form), which is what removing the weight alone adds to the squared error of the output.
///
/// `input_squares`: by input feature, the sum over tokens of its square.
///
/// # Errors
/// When a slice is not as long as its dimensions say.
pub fn wanda_sums(weight: &AdaptedWeight<'_>, input_squares: &[f64]) -> Result<WeightSums, ShapeMismatch> {
    weight.check()?;
    check_shape("input_squares", input_squares, [1, weight.columns])?;
    Ok(weight.sums(|row, column| weight.merged(row, column).powi(2) * input_squares[column]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_column_counts_by_its_weights_and_by_what_flows_through_it() {
        let weight = AdaptedWeight {
            rows: 2,
            columns: 2,
            lora_rank: 1,
            scaling: 2.0,
            weight: &[1.0, -2.0, 3.0, 4.0],
            lora_a: &[1.0, 0.0],
            lora_b: &[0.5, 0.0],
        };
        // W = [[2, -2], [3, 4]]
        let sums = wanda_sums(&weight, &[10.0, 0.5]).unwrap();
        assert_eq!(sums.columns, [130.0, 10.0]);
        assert_eq!(sums.rows, [42.0, 98.0]);
        assert_eq!(wanda_sums(&weight, &[1.0]).unwrap_err().what, "input_squares");
    }
}
