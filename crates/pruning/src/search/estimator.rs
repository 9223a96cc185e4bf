use serde::{Deserialize, Serialize};

/// Which estimate moves the probabilities.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Estimator {
    /// Unbiased: the baseline is that of the steps before.
    ///
    /// ```text
    /// g = 1/K sum_j (L_j - b) (m_j - s) / (s (1 - s))
    /// ```
    ///
    /// The first step has no baseline yet: each sample takes the mean of the others. A single sample then only sets it.
    Strict,
    /// As the published code has it: the baseline takes in this step's mean loss before it is used, the divisor is
    /// `K - 1`, and `s (1 - s)` stands under a root, which is a diagonal preconditioner.
    ///
    /// ```text
    /// g = 1/(K-1) sum_j (L_j - b) (m_j - s) / sqrt((s + 1e-7) (1 - s + 1e-7))
    /// ```
    ///
    /// On average `(K - w) / (K - 1) * sqrt(s (1 - s))` times the gradient, `w` being the weight of the newest loss in
    /// the baseline; on the first step `sqrt(s (1 - s))` times.
    Faithful,
}

/// What the losses of a step say, before it is shared out among the units.
pub(super) struct Signal {
    estimator: Estimator,
    /// `L_j - b` over the divisor.
    advantages: Vec<f64>,
    pub(super) next_baseline: f64,
}

impl Signal {
    /// `share`: the weight of this step's mean loss in the baseline.
    pub(super) fn new(estimator: Estimator, losses: &[f64], baseline: Option<f64>, share: f64) -> Self {
        let count = losses.len() as f64;
        let mean: f64 = losses.iter().map(|loss| loss / count).sum();
        let next_baseline = baseline.map_or(mean, |baseline| (1.0 - share) * baseline + share * mean);
        let (baseline, divisor) = match (estimator, baseline) {
            (Estimator::Strict, Some(baseline)) => (baseline, count),
            // Over `K - 1`, the distance from the mean of all is the one from the mean of the others, over `K`.
            (Estimator::Strict, None) => (mean, (count - 1.0).max(1.0)),
            (Estimator::Faithful, _) => (next_baseline, count - 1.0),
        };
        let advantages = losses.iter().map(|loss| (loss - baseline) / divisor).collect();
        Self { estimator, advantages, next_baseline }
    }

    /// The estimate for a unit kept with `probability`, given which samples kept it. A unit whose probability is 0 or 1
    /// says nothing.
    pub(super) fn gradient(&self, probability: f64, kept: impl Iterator<Item = bool>) -> f64 {
        let sum: f64 = self
            .advantages
            .iter()
            .zip(kept)
            .map(|(advantage, kept)| advantage * (f64::from(u8::from(kept)) - probability))
            .sum();
        let scale = match self.estimator {
            Estimator::Strict => probability * (1.0 - probability),
            Estimator::Faithful => ((probability + 1e-7) * (1.0 - probability + 1e-7)).sqrt(),
        };
        if sum == 0.0 { 0.0 } else { sum / scale }
    }
}
