use crate::slices::{SliceError, check_finite};
use serde::{Deserialize, Serialize};

/// Which second moments are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Moments {
    /// Of each input with itself.
    Diagonal,
    /// Of each with every other as well: the Gram matrix, `columns^2` numbers.
    Full,
}

/// Why statistics cannot be taken.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum StatisticsError {
    #[error("`inputs` holds {actual} numbers, which are no whole tokens of {columns} inputs each")]
    Tokens { actual: usize, columns: usize },
    #[error("statistics of {other} inputs cannot join those of {own}")]
    Columns { own: usize, other: usize },
    #[error("statistics without a Gram matrix cannot join those with one, nor the other way round")]
    Moments,
    #[error("the inputs are finite but the sum of their squares is not, at input {column}")]
    Overflow { column: usize },
    #[error(transparent)]
    Slice(#[from] SliceError),
}

/// What is known about the inputs of a linear, token by token. Parts that saw different sequences may be merged in any
/// order; the whole is that of one pass, to rounding.
///
/// ```text
/// x: [tokens, columns]
/// sums      sum x              square_sums  sum x^2             gram  sum x x^T
/// deviations  sum (x - mean)^2, merged by Chan, Golub and LeVeque (1979): nothing large is subtracted from something large
/// within_sequences  over sequences, sum (x - mean of the sequence)^2
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct InputStatistics {
    columns: usize,
    token_count: u64,
    sequence_count: u64,
    sums: Vec<f64>,
    square_sums: Vec<f64>,
    deviations: Vec<f64>,
    within_sequences: Vec<f64>,
    gram: Option<Vec<f64>>,
}

impl InputStatistics {
    /// Of a linear with `columns` input features, before any token.
    #[must_use]
    pub fn new(columns: usize, moments: Moments) -> Self {
        let gram = match moments {
            Moments::Diagonal => None,
            Moments::Full => Some(vec![0.0; columns * columns]),
        };
        let zeros = || vec![0.0; columns];
        Self {
            columns,
            token_count: 0,
            sequence_count: 0,
            sums: zeros(),
            square_sums: zeros(),
            deviations: zeros(),
            within_sequences: zeros(),
            gram,
        }
    }

    /// Adds one sequence: `inputs` is `[tokens, columns]`.
    ///
    /// # Errors
    /// When the inputs are no whole tokens or not finite. The statistics then stay as they were.
    pub fn add_sequence(&mut self, inputs: &[f64]) -> Result<(), StatisticsError> {
        let columns = self.columns;
        if columns == 0 || !inputs.len().is_multiple_of(columns) {
            return Err(StatisticsError::Tokens { actual: inputs.len(), columns });
        }
        check_finite("inputs", inputs)?;
        let moments = if self.gram.is_some() { Moments::Full } else { Moments::Diagonal };
        let mut sequence = Self::new(columns, moments);
        sequence.token_count = (inputs.len() / columns) as u64;
        sequence.sequence_count = u64::from(sequence.token_count > 0);
        for token in inputs.chunks_exact(columns) {
            for (column, input) in token.iter().enumerate() {
                sequence.sums[column] += input;
                sequence.square_sums[column] += input * input;
            }
        }
        let means = sequence.means();
        for token in inputs.chunks_exact(columns) {
            for (column, input) in token.iter().enumerate() {
                sequence.deviations[column] += (input - means[column]).powi(2);
            }
        }
        sequence.within_sequences.clone_from(&sequence.deviations);
        if let Some(gram) = &mut sequence.gram {
            *gram = crate::linear_algebra::gram(inputs, inputs.len() / columns, columns);
        }
        self.merge(&sequence)
    }

    /// Adds what `other` has seen.
    ///
    /// # Errors
    /// When the two are not of one kind, or a sum overflows. The statistics then stay as they were.
    pub fn merge(&mut self, other: &Self) -> Result<(), StatisticsError> {
        if self.columns != other.columns {
            return Err(StatisticsError::Columns { own: self.columns, other: other.columns });
        }
        if self.gram.is_some() != other.gram.is_some() {
            return Err(StatisticsError::Moments);
        }
        let mut merged = self.clone();
        let (own, others) = (self.token_count as f64, other.token_count as f64);
        if self.token_count > 0 && other.token_count > 0 {
            for (column, deviations) in merged.deviations.iter_mut().enumerate() {
                let apart = other.sums[column] / others - self.sums[column] / own;
                *deviations += apart * apart * (own / (own + others)) * others;
            }
        }
        for (sums, others) in [
            (&mut merged.sums, &other.sums),
            (&mut merged.square_sums, &other.square_sums),
            (&mut merged.deviations, &other.deviations),
            (&mut merged.within_sequences, &other.within_sequences),
        ] {
            sums.iter_mut().zip(others).for_each(|(sum, other)| *sum += other);
        }
        if let (Some(gram), Some(other)) = (&mut merged.gram, &other.gram) {
            gram.iter_mut().zip(other).for_each(|(sum, other)| *sum += other);
        }
        let overflows = |column: &usize| {
            [&merged.sums, &merged.square_sums, &merged.deviations]
                .iter()
                .any(|sums| !sums[*column].is_finite())
        };
        if let Some(column) = (0..self.columns).find(overflows) {
            return Err(StatisticsError::Overflow { column });
        }
        merged.token_count += other.token_count;
        merged.sequence_count += other.sequence_count;
        *self = merged;
        Ok(())
    }

    #[must_use]
    pub fn columns(&self) -> usize {
        self.columns
    }

    #[must_use]
    pub fn token_count(&self) -> u64 {
        self.token_count
    }

    #[must_use]
    pub fn sequence_count(&self) -> u64 {
        self.sequence_count
    }

    /// `sum x` by input.
    #[must_use]
    pub fn sums(&self) -> &[f64] {
        &self.sums
    }

    /// `sum x^2` by input.
    #[must_use]
    pub fn square_sums(&self) -> &[f64] {
        &self.square_sums
    }

    /// `sum x x^T`, `[columns, columns]`, where it was asked for.
    #[must_use]
    pub fn gram(&self) -> Option<&[f64]> {
        self.gram.as_deref()
    }

    /// Mean over tokens by input; 0 before any token.
    #[must_use]
    pub fn means(&self) -> Vec<f64> {
        over(&self.sums, self.token_count)
    }

    /// Mean over sequences of their sums: what DSnoT calls the expected input.
    #[must_use]
    pub fn sequence_sums(&self) -> Vec<f64> {
        over(&self.sums, self.sequence_count)
    }

    /// Population variance over all tokens by input.
    #[must_use]
    pub fn variances(&self) -> Vec<f64> {
        over(&self.deviations, self.token_count)
    }

    /// Population variance within a sequence by input, averaged over tokens.
    #[must_use]
    pub fn variances_within_sequences(&self) -> Vec<f64> {
        over(&self.within_sequences, self.token_count)
    }
}

fn over(sums: &[f64], count: u64) -> Vec<f64> {
    sums.iter().map(|sum| sum / count.max(1) as f64).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::numbers;
    use proptest::prelude::*;

    fn assert_near(found: &[f64], expected: &[f64]) {
        assert_eq!(found.len(), expected.len());
        for (found, expected) in found.iter().zip(expected) {
            assert!((found - expected).abs() < 1e-12, "{found} is not {expected}");
        }
    }

    #[test]
    fn two_sequences_count_as_worked_out_by_hand() {
        let mut statistics = InputStatistics::new(2, Moments::Full);
        statistics.add_sequence(&[1.0, 2.0, 3.0, -2.0]).unwrap();
        statistics.add_sequence(&[5.0, 3.0]).unwrap();
        statistics.add_sequence(&[]).unwrap();
        assert_eq!((statistics.token_count(), statistics.sequence_count()), (3, 2));
        assert_eq!(statistics.sums(), [9.0, 3.0]);
        assert_eq!(statistics.square_sums(), [35.0, 17.0]);
        assert_near(statistics.gram().unwrap(), &[35.0, 11.0, 11.0, 17.0]);
        assert_near(&statistics.means(), &[3.0, 1.0]);
        assert_near(&statistics.sequence_sums(), &[4.5, 1.5]);
        assert_near(&statistics.variances(), &[8.0 / 3.0, 14.0 / 3.0]);
        // The second sequence has one token, and so no spread.
        assert_near(&statistics.variances_within_sequences(), &[2.0 / 3.0, 8.0 / 3.0]);
    }

    #[test]
    fn a_small_spread_around_a_large_mean_is_not_lost() {
        let mut statistics = InputStatistics::new(1, Moments::Diagonal);
        for sequence in 0..4 {
            let inputs: Vec<f64> = (0..100).map(|token| 1e9 + f64::from((token + sequence) % 2)).collect();
            statistics.add_sequence(&inputs).unwrap();
        }
        assert_near(&statistics.variances(), &[0.25]);
    }

    #[test]
    fn what_is_no_input_or_of_another_kind_is_refused_and_changes_nothing() {
        let mut statistics = InputStatistics::new(2, Moments::Diagonal);
        statistics.add_sequence(&[1.0, 2.0]).unwrap();
        let before = statistics.clone();
        assert_eq!(
            statistics.add_sequence(&[1.0; 3]),
            Err(StatisticsError::Tokens { actual: 3, columns: 2 })
        );
        assert!(matches!(statistics.add_sequence(&[1.0, f64::NAN]), Err(StatisticsError::Slice(_))));
        assert_eq!(statistics.add_sequence(&[1.0, 1e200]), Err(StatisticsError::Overflow { column: 1 }));
        let other = InputStatistics::new(3, Moments::Diagonal);
        assert_eq!(statistics.merge(&other), Err(StatisticsError::Columns { own: 2, other: 3 }));
        let full = InputStatistics::new(2, Moments::Full);
        assert_eq!(statistics.merge(&full), Err(StatisticsError::Moments));
        assert_eq!(statistics, before);
        assert!(InputStatistics::new(0, Moments::Full).add_sequence(&[]).is_err());
    }

    proptest! {
        #[test]
        fn parts_merged_in_any_order_are_the_whole(seed: u64, parts in 1usize..5, columns in 1usize..5) {
            let sequences: Vec<Vec<f64>> = (0..12)
                .map(|sequence| {
                    let inputs = numbers(seed ^ (sequence << 20), columns * (1 + sequence as usize % 4));
                    inputs.into_iter().map(|input| 3.0 * input + sequence as f64).collect()
                })
                .collect();
            let of = |picked: &mut dyn Iterator<Item = usize>| {
                let mut statistics = InputStatistics::new(columns, Moments::Full);
                picked.for_each(|sequence| statistics.add_sequence(&sequences[sequence]).unwrap());
                statistics
            };
            let whole = of(&mut (0..12));
            let mut merged = InputStatistics::new(columns, Moments::Full);
            for part in (0..parts).rev() {
                merged.merge(&of(&mut (part..12).step_by(parts))).unwrap();
            }
            prop_assert_eq!(whole.token_count(), merged.token_count());
            prop_assert_eq!(whole.sequence_count(), merged.sequence_count());
            for (one, other) in [
                (whole.sums().to_vec(), merged.sums().to_vec()),
                (whole.square_sums().to_vec(), merged.square_sums().to_vec()),
                (whole.variances(), merged.variances()),
                (whole.variances_within_sequences(), merged.variances_within_sequences()),
                (whole.gram().unwrap().to_vec(), merged.gram().unwrap().to_vec()),
            ] {
                for (one, other) in one.iter().zip(&other) {
                    prop_assert!((one - other).abs() < 1e-10 * (1.0 + one.abs()));
                }
            }
            // The variance is what the definition says, over all tokens at once.
            for column in 0..columns {
                let values = || sequences.iter().flat_map(|inputs| inputs.iter().skip(column).step_by(columns));
                let mean = values().sum::<f64>() / values().count() as f64;
                let variance = values().map(|value| (value - mean).powi(2)).sum::<f64>() / values().count() as f64;
                prop_assert!((whole.variances()[column] - variance).abs() < 1e-10);
            }
        }
    }
}
