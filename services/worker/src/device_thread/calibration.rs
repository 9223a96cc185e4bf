//! The passes that a decision is calibrated on.

use super::{CalibrationItem, Fault, Reply, Shard, guarded, lose};
use engine::{Calibration, CalibrationProgress, EngineError};
use std::time::Instant;
use tokio::sync::mpsc;
use tracing::{info, warn};
use wire::pb;
use wire::pb::calibrate_response::Kind;
use wire::status::{Failure, Reason};

impl Shard<'_> {
    pub(super) fn calibrate(
        &mut self,
        generation: u64,
        accepted: Reply<()>,
        sink: &mpsc::Sender<CalibrationItem>,
    ) {
        let known = self.require_group().and_then(|()| match generation == self.generation {
            true => Ok(()),
            false => {
                let message = format!(
                    "generation {} is in force, not {generation}, which is to be calibrated under",
                    self.generation
                );
                Err(Failure::new(Reason::StaleGeneration, message).with_fact("generation", self.generation))
            }
        });
        let refused = known.is_err();
        // A caller that is gone already is noticed at the first sign of life.
        let _ = accepted.send(known);
        if refused {
            return;
        }
        let started = Instant::now();
        match guarded("a calibration", || self.passes(sink)) {
            Ok(Some(found)) => {
                info!(seconds = started.elapsed().as_secs_f64(), "calibrated");
                let result = pb::CalibrationResult {
                    block_scores: found.blocks,
                    block_order: found.block_order.into_iter().map(|block| block as u32).collect(),
                };
                let _ = self.send(sink, Ok(pb::CalibrateResponse { kind: Some(Kind::Result(result)) }));
            }
            Ok(None) => info!("the calibration stops: nobody listens any more"),
            // The stream ends with the reason of the session's end.
            Err(Fault { failure, ends_session: true }) => lose(&self.context.end, failure),
            Err(Fault { failure, ends_session: false }) => {
                warn!(error = %failure, "calibration failed");
                let _ = self.send(sink, Err(failure.into()));
            }
        }
    }

    /// Nothing when nobody listens any more or the session is over.
    fn passes(&mut self, sink: &mpsc::Sender<CalibrationItem>) -> Result<Option<Calibration>, Fault> {
        let recipe = &self.setup.recipe;
        let windows = recipe.pruning.as_ref().map_or(0, |pruning| pruning.calibration_windows);
        let rows = self.data.calibration(windows, recipe.seed);
        let (context, mut gone) = (self.context, false);
        let mut report = |CalibrationProgress { passes, total_passes }| {
            let progress = pb::CalibrationProgress { passes, total_passes };
            let item = Ok(pb::CalibrateResponse { kind: Some(Kind::Progress(progress)) });
            gone = super::send(context, sink, item).is_err();
            match gone {
                true => Err(EngineError::Refused("nobody listens any more".into())),
                false => Ok(()),
            }
        };
        let found = self.engine.calibrate(&rows, &mut report);
        match found {
            Err(_) if gone => Ok(None),
            found => {
                self.note_progress();
                Ok(Some(found?))
            }
        }
    }
}
