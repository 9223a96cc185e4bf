use super::LayerwiseError;
use crate::linear_algebra::Cholesky;
use crate::slices::{check_matrix, check_vector};

/// The second moments of a linear's inputs, made fit to be solved with: half the Hessian of the squared error by a row
/// of `W`.
///
/// ```text
/// H = X X^T + damping mean(diag X X^T) I
/// ```
///
/// An input that was always zero (`H_jj = 0`) is dead: its weights count as zero. It gets the mean of the others'
/// moments, so that it stands apart from them and their scale does not matter; the published codes of this family put
/// 1.
#[derive(Debug, Clone, PartialEq)]
pub struct Hessian {
    size: usize,
    is_dead: Vec<bool>,
    matrix: Vec<f64>,
    inverse: Vec<f64>,
}

impl Hessian {
    /// `gram`: `X X^T`, `[size, size]`, up to a positive factor. `damping`: relative, 0.01 is usual and 0.1 the cure
    /// where there are fewer tokens than inputs.
    ///
    /// # Errors
    /// When the moments cannot be those of any inputs, or are not positive definite even dampened.
    pub fn new(gram: &[f64], size: usize, damping: f64) -> Result<Self, LayerwiseError> {
        check_matrix("gram", gram, [size, size])?;
        if !(0.0..f64::INFINITY).contains(&damping) {
            let rule = "a number of at least 0";
            return Err(LayerwiseError::Setting { what: "damping", rule, value: damping });
        }
        let mut matrix = gram.to_vec();
        let is_dead: Vec<bool> = (0..size).map(|place| gram[place * size + place] == 0.0).collect();
        let live = is_dead.iter().filter(|is_dead| !**is_dead).count();
        let trace: f64 = (0..size).map(|place| gram[place * size + place]).sum();
        let mean = if live > 0 { trace / live as f64 } else { 1.0 };
        for place in 0..size {
            if is_dead[place] {
                for other in 0..size {
                    matrix[place * size + other] = 0.0;
                    matrix[other * size + place] = 0.0;
                }
                matrix[place * size + place] = mean;
            }
            matrix[place * size + place] += damping * mean;
        }
        let inverse = Cholesky::factor(&matrix, size)?.inverse();
        check_matrix("inverse of the Hessian", &inverse, [size, size])?;
        Ok(Self { size, is_dead, matrix, inverse })
    }

    /// Input features.
    #[must_use]
    pub fn size(&self) -> usize {
        self.size
    }

    /// By input, whether it was always zero.
    #[must_use]
    pub fn is_dead(&self) -> &[bool] {
        &self.is_dead
    }

    /// `H`, dampened, `[size, size]`.
    #[must_use]
    pub fn matrix(&self) -> &[f64] {
        &self.matrix
    }

    /// `H^-1`, `[size, size]`.
    #[must_use]
    pub fn inverse(&self) -> &[f64] {
        &self.inverse
    }

    /// A weight with zeros at its dead inputs.
    pub(super) fn without_dead(&self, weight: &[f64]) -> Vec<f64> {
        let live = |place: usize| if self.is_dead[place % self.size] { 0.0 } else { weight[place] };
        (0..weight.len()).map(live).collect()
    }

    /// The rows and columns of `matrix` at `places`, `[places, places]`.
    pub(super) fn part(matrix: &[f64], size: usize, places: &[usize]) -> Vec<f64> {
        let of = |&row: &usize| places.iter().map(move |&column| matrix[row * size + column]);
        places.iter().flat_map(of).collect()
    }

    /// `d H d^T` of a change `d` of one row: what it costs.
    ///
    /// # Errors
    /// When the change has another size or holds a number that is not finite.
    pub fn loss(&self, change: &[f64]) -> Result<f64, LayerwiseError> {
        check_vector("change", change, self.size)?;
        let at = |row: usize| -> f64 {
            (0..self.size).map(|column| self.matrix[row * self.size + column] * change[column]).sum()
        };
        Ok((0..self.size).map(|row| change[row] * at(row)).sum())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linear_algebra::{MatrixError, gram};
    use crate::testing::numbers;

    #[test]
    fn damping_is_relative_and_dead_inputs_stand_apart() {
        let hessian = Hessian::new(&[4.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 2.0], 3, 0.1).unwrap();
        assert_eq!(hessian.is_dead(), [false, true, false]);
        for (found, expected) in hessian.matrix().iter().zip([4.3, 0.0, 1.0, 0.0, 3.3, 0.0, 1.0, 0.0, 2.3]) {
            assert!((found - expected).abs() < 1e-15);
        }
        assert_eq!(hessian.without_dead(&[1.0, 2.0, 3.0]), [1.0, 0.0, 3.0]);
        let none = Hessian::new(&[0.0; 4], 2, 0.0).unwrap();
        assert_eq!(none.inverse(), [1.0, 0.0, 0.0, 1.0]);
    }

    #[test]
    fn fewer_tokens_than_inputs_need_damping() {
        let moments = gram(&numbers(3, 2 * 5), 2, 5);
        let error = Hessian::new(&moments, 5, 0.0).unwrap_err();
        assert!(matches!(error, LayerwiseError::Matrix(MatrixError::NotPositiveDefinite { .. })));
        Hessian::new(&moments, 5, 0.01).unwrap();
    }

    #[test]
    fn moments_that_are_none_are_refused() {
        assert!(matches!(Hessian::new(&[-1.0], 1, 0.1), Err(LayerwiseError::Matrix(_))));
        for damping in [-0.1, f64::NAN, f64::INFINITY] {
            assert!(matches!(Hessian::new(&[1.0], 1, damping), Err(LayerwiseError::Setting { .. })));
        }
        assert!(matches!(Hessian::new(&[1.0, f64::NAN, 0.0, 1.0], 2, 0.1), Err(LayerwiseError::Slice(_))));
        assert!(matches!(Hessian::new(&[1.0; 3], 2, 0.1), Err(LayerwiseError::Slice(_))));
    }
}
