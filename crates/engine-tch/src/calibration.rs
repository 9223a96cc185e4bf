//! Passes of their own that a decision is calibrated on, over windows of training text; the shard stays as it is.

mod blocks;

use crate::fault::{Fault, Result};
use crate::shard::Shard;
use engine::{Calibration, CalibrationProgress, EngineError, Report};

impl Shard {
    pub(crate) fn calibrate_on(
        &mut self,
        rows: &[&[u32]],
        report: &mut Report<'_>,
    ) -> std::result::Result<Calibration, EngineError> {
        let Some(pruning) = self.setup.recipe.pruning.clone().filter(recipe::Pruning::calibrates) else {
            return Err(Fault::Refused("the recipe's decisions need no calibration".into()).into());
        };
        if rows.is_empty() {
            return Err(Fault::Refused("there is no window to calibrate on".into()).into());
        }
        let _span = tracing::info_span!("calibration").entered();
        let mut calibration = Calibration::default();
        if let Some(depth) = &pruning.depth {
            self.score_blocks(depth, rows, report, &mut calibration)?;
        }
        Ok(calibration)
    }
}

/// Passes of a calibration that are done, of how many.
struct Passes<'a, 'b> {
    done: u64,
    total: u64,
    report: &'a mut Report<'b>,
}

impl Passes<'_, '_> {
    fn step(&mut self) -> std::result::Result<(), EngineError> {
        self.done += 1;
        (self.report)(CalibrationProgress { passes: self.done, total_passes: self.total })
    }
}

/// Errors of a tensor where an engine's are wanted.
fn engine<T>(found: Result<T>) -> std::result::Result<T, EngineError> {
    Ok(found?)
}
