use crate::{Storage, Violations};
use serde::{Deserialize, Serialize};

/// What happens to the columns of o and down that stay when a mask decision removes others.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Compensation {
    /// Nothing: tuning alone makes up for what went.
    None,
    /// They change so that the matrix gives what it gave before, as nearly as calibration text allows.
    LeastSquares(LeastSquares),
}

/// One shared solve a matrix (arXiv:2410.15567, the structured case), layer by layer.
///
/// ```text
/// dW_K^T = (S^T S + damping * mean(diag S^T S) I)^-1 S^T E        S: inputs that stay   E: what is missing of the output
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LeastSquares {
    /// Windows of training text that are calibrated on; all of them where there are fewer.
    pub windows: usize,
    pub damping: f64,
    pub target: CompensationTarget,
}

/// What the output of o and of down shall come close to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CompensationTarget {
    /// What the layer itself would have given for the same input with nothing removed by this decision.
    Layer,
    /// What makes the residual stream the one before this decision: errors of earlier layers are corrected too.
    Stream,
}

impl Default for Compensation {
    fn default() -> Self {
        Self::LeastSquares(LeastSquares::default())
    }
}

impl Default for LeastSquares {
    fn default() -> Self {
        Self { windows: 48, damping: 0.01, target: CompensationTarget::Layer }
    }
}

impl Compensation {
    #[must_use]
    pub fn least_squares(self) -> Option<LeastSquares> {
        match self {
            Self::None => None,
            Self::LeastSquares(choice) => Some(choice),
        }
    }

    pub(crate) fn check(self, storage: Storage, found: &mut Violations) {
        let Self::LeastSquares(LeastSquares { windows, damping, target: _ }) = self else { return };
        found.require(windows >= 1, "pruning.compensation.windows", || "must be at least 1".into());
        found.require(damping.is_finite() && damping > 0.0, "pruning.compensation.damping", || {
            format!("must be a positive number; got {damping}")
        });
        let quantised = match storage {
            Storage::F32 | Storage::F64 | Storage::Bf16 => false,
            Storage::Int8 | Storage::Nf4 => true,
        };
        found.require(!quantised, "pruning.compensation", || {
            "changes weights, which a quantised `precision.storage` could not hold as they come out; store in f32 or bf16, \
             or choose no compensation"
                .into()
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Precision, Pruning, Recipe};

    #[test]
    fn what_cannot_be_compensated_is_refused_by_its_field() {
        let recipe = |choice, storage| Recipe {
            pruning: Some(Pruning { compensation: Compensation::LeastSquares(choice), ..Pruning::default() }),
            precision: Precision { storage, ..Precision::default() },
            ..Recipe::default()
        };
        let good = LeastSquares::default();
        for (choice, storage, expected) in [
            (good, Storage::F32, None),
            (good, Storage::Bf16, None),
            (good, Storage::Int8, Some("pruning.compensation")),
            (good, Storage::Nf4, Some("pruning.compensation")),
            (LeastSquares { windows: 0, ..good }, Storage::F32, Some("pruning.compensation.windows")),
            (LeastSquares { damping: 0.0, ..good }, Storage::F32, Some("pruning.compensation.damping")),
            (LeastSquares { damping: f64::NAN, ..good }, Storage::F32, Some("pruning.compensation.damping")),
        ] {
            let found = recipe(choice, storage).violations();
            let fields: Vec<&str> = found.iter().map(|violation| violation.field.as_str()).collect();
            assert_eq!(fields, Vec::from_iter(expected), "{choice:?} {storage:?}");
        }
    }
}
