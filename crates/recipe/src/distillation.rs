use crate::{Violations, in_unit_interval};
use serde::{Deserialize, Serialize};

/// Training also towards the next-token distribution of the unpruned model, its `top_k` likeliest tokens renormalised.
///
/// ```text
/// loss = (1 - weight) * -ln q(next token) + weight * sum over its tokens of -p ln q      q: the model that is trained
/// ```
///
/// Before the first step the unpruned model reads every window of the run once. What it says stays in host memory:
/// `8 * top_k` bytes for each predicted token of these windows, on every rank.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Distillation {
    /// Share of the unpruned model's distribution in the loss, in `[0, 1]`; the text's next token has the rest.
    pub weight: f64,
    /// Tokens of its distribution that are kept at each position.
    pub top_k: usize,
}

impl Default for Distillation {
    fn default() -> Self {
        Self { weight: 0.5, top_k: 64 }
    }
}

impl Distillation {
    pub(crate) fn check(&self, found: &mut Violations) {
        found.require(in_unit_interval(self.weight, true), "distillation.weight", || {
            format!("must lie in [0, 1]; got {}", self.weight)
        });
        found.require(self.top_k >= 1, "distillation.top_k", || "must be at least 1".into());
    }
}

#[cfg(test)]
mod tests {
    use crate::{Distillation, Recipe};

    #[test]
    fn what_cannot_be_distilled_is_refused_by_its_field() {
        for (weight, top_k, expected) in [
            (0.0, 1, vec![]),
            (1.0, 100, vec![]),
            (-0.1, 1, vec!["distillation.weight"]),
            (1.5, 0, vec!["distillation.weight", "distillation.top_k"]),
            (f64::NAN, 1, vec!["distillation.weight"]),
            (0.5, 101, vec!["distillation.top_k"]),
        ] {
            let recipe = Recipe { distillation: Some(Distillation { weight, top_k }), ..Recipe::default() };
            let found = [recipe.violations(), recipe.violations_on(100)].concat();
            let fields: Vec<&str> = found.iter().map(|violation| violation.field.as_str()).collect();
            assert_eq!(fields, expected, "{weight} {top_k}");
        }
        assert_eq!(Recipe::default().violations_on(1), []);
    }
}
