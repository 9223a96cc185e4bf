//! Searching for a mask by trying masks: losses come in, the next masks to try go out. No gradient of the model is
//! needed.

mod budget_projection;
mod estimator;
mod policy_gradient;
mod warm_start;

pub use budget_projection::{ProjectionError, project_to_budget};
pub use estimator::Estimator;
pub use policy_gradient::{PolicyError, PolicyGradient, PolicySettings, SampledLayer, SampledMask, Scope};
pub use warm_start::{WarmStartError, keep_probabilities};
