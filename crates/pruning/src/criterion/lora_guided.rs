use super::{AdaptedWeight, ShapeMismatch, WeightSums, check_shape, product_at};
use recipe::LoraPruneForm;

/// Gradients of the mean loss by the LoRA factors, after accumulation, reduction over ranks and clipping.
#[derive(Debug, Clone, Copy)]
pub struct LoraGradients<'a> {
    /// `dA: [lora_rank, columns]`
    pub grad_a: &'a [f64],
    /// `dB: [rows, lora_rank]`
    pub grad_b: &'a [f64],
}

/// The LoRA-guided criterion (LoRAPrune, arXiv:2305.18403, eq. 10), which never sees the gradient of `W`.
///
/// ```text
/// Ghat = dB A + B dA - dB dA
/// code:  |Ghat * W|       paper:  (Ghat * W)^2        elementwise
/// ```
///
/// `Ghat` is what one unit step of gradient descent on `A` and `B` would change in `B A`. It carries no `s`, `W` does:
/// as the published code has it (the paper has no `s` at all).
///
/// # Errors
/// When a slice does not have its shape.
pub fn lora_guided_sums(
    weight: &AdaptedWeight<'_>,
    gradients: &LoraGradients<'_>,
    form: LoraPruneForm,
) -> Result<WeightSums, ShapeMismatch> {
    let AdaptedWeight { rows, columns, lora_rank, lora_a, lora_b, .. } = *weight;
    let LoraGradients { grad_a, grad_b } = *gradients;
    weight.check()?;
    check_shape("grad_a", grad_a, [lora_rank, columns])?;
    check_shape("grad_b", grad_b, [rows, lora_rank])?;
    Ok(weight.sums(|row, column| {
        let product = |left, right| product_at(left, right, lora_rank, columns, row, column);
        let guided = product(grad_b, lora_a) + product(lora_b, grad_a) - product(grad_b, grad_a);
        let score = guided * weight.merged(row, column);
        match form {
            LoraPruneForm::Code => score.abs(),
            LoraPruneForm::Paper => score * score,
        }
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random_importance;
    use model_spec::Block;
    use proptest::prelude::*;

    const ROWS: usize = 4;
    const COLUMNS: usize = 5;
    const RANK: usize = 2;

    fn numbers(seed: u64, count: usize) -> Vec<f64> {
        (0..count).map(|unit| 2.0 * random_importance(seed, 0, Block::Mlp, unit) - 1.0).collect()
    }

    #[test]
    fn a_two_by_two_weight_scores_as_worked_out_by_hand() {
        // B A = [[2, 4], [3, 6]], W = W0 + 2 B A = [[5, 8], [7, 11]].
        let weight = AdaptedWeight {
            rows: 2,
            columns: 2,
            lora_rank: 1,
            scaling: 2.0,
            weight: &[1.0, 0.0, 1.0, -1.0],
            lora_a: &[1.0, 2.0],
            lora_b: &[2.0, 3.0],
        };
        // dB A = [[1, 2], [-1, -2]], B dA = [[2, 0], [3, 0]], dB dA = [[1, 0], [-1, 0]].
        // Ghat = [[2, 2], [3, -2]], Ghat * W = [[10, 16], [21, -22]].
        let gradients = LoraGradients { grad_a: &[1.0, 0.0], grad_b: &[1.0, -1.0] };
        let code = lora_guided_sums(&weight, &gradients, LoraPruneForm::Code).unwrap();
        assert_eq!(code, WeightSums { rows: vec![26.0, 43.0], columns: vec![31.0, 38.0] });
        let paper = lora_guided_sums(&weight, &gradients, LoraPruneForm::Paper).unwrap();
        assert_eq!(
            paper,
            WeightSums { rows: vec![100.0 + 256.0, 441.0 + 484.0], columns: vec![541.0, 740.0] }
        );
    }

    /// `Ghat` at every place, read off the score of an unadapted weight of ones (`scaling` 0).
    fn guided(lora_a: &[f64], lora_b: &[f64], grad_a: &[f64], grad_b: &[f64]) -> Vec<f64> {
        let mut found = Vec::new();
        for place in 0..ROWS * COLUMNS {
            let mut weight = vec![0.0; ROWS * COLUMNS];
            weight[place] = 1.0;
            let weight = AdaptedWeight {
                rows: ROWS,
                columns: COLUMNS,
                lora_rank: RANK,
                scaling: 0.0,
                weight: &weight,
                lora_a,
                lora_b,
            };
            let sums =
                lora_guided_sums(&weight, &LoraGradients { grad_a, grad_b }, LoraPruneForm::Code).unwrap();
            found.push(sums.rows.iter().sum());
        }
        found
    }

    proptest! {
        #[test]
        fn three_products_equal_the_one_product_of_twice_the_rank(seed: u64) {
            let (lora_a, lora_b) = (numbers(seed, RANK * COLUMNS), numbers(seed ^ 1, ROWS * RANK));
            let (grad_a, grad_b) = (numbers(seed ^ 2, RANK * COLUMNS), numbers(seed ^ 3, ROWS * RANK));
            let found = guided(&lora_a, &lora_b, &grad_a, &grad_b);
            for row in 0..ROWS {
                for column in 0..COLUMNS {
                    // [dB | B] [A - dA ; dA]
                    let expected: f64 = (0..RANK)
                        .map(|k| {
                            let (a, da) = (lora_a[k * COLUMNS + column], grad_a[k * COLUMNS + column]);
                            grad_b[row * RANK + k] * (a - da) + lora_b[row * RANK + k] * da
                        })
                        .sum();
                    prop_assert!((found[row * COLUMNS + column] - expected.abs()).abs() < 1e-12);
                }
            }
        }

        #[test]
        fn scaling_the_loss_scales_the_linear_terms_once_and_the_quadratic_one_twice(
            seed: u64, factor in 0.1f64..10.0,
        ) {
            let (lora_a, lora_b) = (numbers(seed, RANK * COLUMNS), numbers(seed ^ 1, ROWS * RANK));
            let (grad_a, grad_b) = (numbers(seed ^ 2, RANK * COLUMNS), numbers(seed ^ 3, ROWS * RANK));
            let by = |values: &[f64], factor: f64| -> Vec<f64> { values.iter().map(|value| value * factor).collect() };
            let scaled = guided(&lora_a, &lora_b, &by(&grad_a, factor), &by(&grad_b, factor));
            // The linear terms alone: A and B grow so large beside the gradients that the quadratic term is lost.
            let linear = guided(&by(&lora_a, 1e12), &by(&lora_b, 1e12), &grad_a, &grad_b);
            // The quadratic term alone: there are no factors to multiply.
            let none = (vec![0.0; RANK * COLUMNS], vec![0.0; ROWS * RANK]);
            let quadratic = guided(&none.0, &none.1, &grad_a, &grad_b);
            for place in 0..ROWS * COLUMNS {
                let (linear, quadratic) = (linear[place] * 1e-12, quadratic[place]);
                let sum = factor * linear + factor * factor * quadratic;
                let difference = (factor * linear - factor * factor * quadratic).abs();
                // Magnitudes are known, signs are not: the score is one of the two.
                let found = scaled[place];
                let near = |expected: f64| (found - expected).abs() < 1e-8 * (1.0 + expected);
                prop_assert!(near(sum) || near(difference), "{found} is neither {sum} nor {difference}");
            }
        }

        #[test]
        fn without_its_quadratic_term_the_score_is_proportional_to_the_loss(seed: u64, factor in 0.1f64..10.0) {
            // With `dA = 0` (as at the start, where B = 0) only `dB A` is left.
            let (lora_a, lora_b) = (numbers(seed, RANK * COLUMNS), numbers(seed ^ 1, ROWS * RANK));
            let grad_a = vec![0.0; RANK * COLUMNS];
            let grad_b = numbers(seed ^ 3, ROWS * RANK);
            let larger: Vec<f64> = grad_b.iter().map(|value| value * factor).collect();
            let one = guided(&lora_a, &lora_b, &grad_a, &grad_b);
            let other = guided(&lora_a, &lora_b, &grad_a, &larger);
            for (one, other) in one.iter().zip(&other) {
                prop_assert!((factor * one - other).abs() < 1e-12 * (1.0 + other));
            }
        }
    }
}
