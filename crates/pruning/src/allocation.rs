//! How much goes from each layer, decided from the weights before any mask: more where less was learned.

mod alpha;
mod by_alpha;
mod whole_groups;

pub use alpha::{AlphaError, HillTail, PeakBound, hill_alpha, hill_alpha_from, spectrum};
pub use by_alpha::{AllocationError, AlphaAllocation, allocate_by_alpha};
pub use whole_groups::{GroupPool, WholeGroupsError, whole_groups};
