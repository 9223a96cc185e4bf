use crate::{Generation, RankReport};
use model_spec::{ModelSpec, Projection};
use pruning::{KeepMask, ScoreAssembly, ScoreError, StepScores};
use sharding::{Placement, RankLayer};
use std::collections::BTreeMap;

/// Bookkeeping of one stretch of steps between two decisions: what each rank has said of which step.
#[derive(Debug, Clone)]
pub(crate) struct Segment {
    generation: Generation,
    /// The first step that not all ranks have ended.
    first_open_step: u64,
    end_step: u64,
    /// By tensor-parallel rank.
    ranks: Vec<RankProgress>,
    open_steps: BTreeMap<u64, OpenStep>,
}

#[derive(Debug, Clone, Copy)]
struct RankProgress {
    next_step: u64,
    stream_ended: bool,
}

#[derive(Debug, Clone)]
struct OpenStep {
    /// Absent where no scores are needed.
    assembly: Option<ScoreAssembly>,
    /// By rank.
    reports: Vec<Option<RankReport>>,
}

/// A step that all ranks have ended.
#[derive(Debug)]
pub(crate) struct EndedStep {
    /// By rank.
    pub(crate) reports: Vec<RankReport>,
    /// Absent where no scores are needed; else one for every live unit, or why not.
    pub(crate) scores: Option<Result<StepScores, ScoreError>>,
}

/// A chunk of scores as it came from a rank.
pub(crate) struct Chunk<'a> {
    pub(crate) step: u64,
    pub(crate) generation: Generation,
    pub(crate) layer: usize,
    pub(crate) projection: Projection,
    pub(crate) first_unit: usize,
    pub(crate) values: &'a [f64],
}

/// How a rank broke the order of a training stream.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub(crate) enum StreamFault {
    #[error("it sent {what} of generation {actual}; generation {expected} is in force")]
    Generation { what: &'static str, expected: Generation, actual: Generation },
    #[error("it sent {what} of step {actual}; its step {expected} is due")]
    Step { what: &'static str, expected: u64, actual: u64 },
    #[error("it sent {what} after its stream had ended")]
    AfterEnd { what: &'static str },
    #[error("its stream ended before step {due} of {end_step}")]
    EndedEarly { due: u64, end_step: u64 },
    #[error("it sent scores of units {first}..{end} of layer {layer} `{projection}`, but holds {held}")]
    UnitRange { layer: usize, projection: Projection, first: usize, end: usize, held: usize },
    #[error("{what} of step {step} is {value}, not a finite number")]
    NotFinite { what: &'static str, step: u64, value: f64 },
    #[error("step {step}: {error}")]
    Score { step: u64, error: ScoreError },
}

impl StreamFault {
    /// Whether a number is to blame rather than the order of things.
    pub(crate) fn is_not_finite(&self) -> bool {
        match self {
            Self::NotFinite { .. }
            | Self::Score { error: ScoreError::NotFinite { .. } | ScoreError::Overflow { .. }, .. } => true,
            Self::Generation { .. }
            | Self::Step { .. }
            | Self::AfterEnd { .. }
            | Self::EndedEarly { .. }
            | Self::UnitRange { .. }
            | Self::Score {
                error:
                    ScoreError::UnknownLayer { .. }
                    | ScoreError::LengthMismatch { .. }
                    | ScoreError::NotLive { .. }
                    | ScoreError::Doubled { .. }
                    | ScoreError::Missing { .. },
                ..
            } => false,
        }
    }
}

impl Segment {
    pub(crate) fn new(steps: std::ops::Range<u64>, generation: Generation, tp_degree: usize) -> Self {
        let progress = RankProgress { next_step: steps.start, stream_ended: false };
        Self {
            generation,
            first_open_step: steps.start,
            end_step: steps.end,
            ranks: vec![progress; tp_degree],
            open_steps: BTreeMap::new(),
        }
    }

    pub(crate) fn end_step(&self) -> u64 {
        self.end_step
    }

    pub(crate) fn first_open_step(&self) -> u64 {
        self.first_open_step
    }

    /// Takes a chunk of scores, and puts it in its place when `needed`.
    pub(crate) fn scores(
        &mut self,
        tp_rank: usize,
        chunk: &Chunk<'_>,
        needed: Option<(&ModelSpec, &KeepMask, &Placement)>,
    ) -> Result<(), StreamFault> {
        self.check_due(tp_rank, "scores", chunk.step, chunk.generation)?;
        let Some((dense, keep, placement)) = needed else { return Ok(()) };
        let Chunk { step, layer, projection, first_unit, values, .. } = *chunk;
        let in_step = |error| StreamFault::Score { step, error };
        let held = placement.ranks[tp_rank]
            .get(layer)
            .map(|held| units(held, projection))
            .ok_or(in_step(ScoreError::UnknownLayer { layer, layer_count: dense.layers.len() }))?;
        let end = first_unit.saturating_add(values.len());
        let named = held.get(first_unit..end).ok_or(StreamFault::UnitRange {
            layer,
            projection,
            first: first_unit,
            end,
            held: held.len(),
        })?;
        let assembly = self.open(step).assembly.get_or_insert_with(|| ScoreAssembly::new(dense, keep));
        assembly.add(layer, projection, named, values).map_err(in_step)
    }

    /// Takes a rank's report of its due step.
    pub(crate) fn report(&mut self, tp_rank: usize, report: RankReport) -> Result<(), StreamFault> {
        let step = report.step;
        self.check_due(tp_rank, "a report", step, report.generation)?;
        for (what, value) in [("loss", report.loss), ("gradient norm", report.grad_norm)] {
            if !value.is_finite() && report.skipped.is_empty() {
                return Err(StreamFault::NotFinite { what, step, value });
            }
        }
        self.ranks[tp_rank].next_step += 1;
        self.open(step).reports[tp_rank] = Some(report);
        Ok(())
    }

    /// Takes the end of a rank's stream.
    pub(crate) fn stream_end(&mut self, tp_rank: usize) -> Result<(), StreamFault> {
        let rank = &mut self.ranks[tp_rank];
        if rank.next_step < self.end_step {
            return Err(StreamFault::EndedEarly { due: rank.next_step, end_step: self.end_step });
        }
        rank.stream_ended = true;
        Ok(())
    }

    /// The next step in order that all ranks have ended. `wants_scores(step)` says whether it needs them.
    pub(crate) fn next_ended(
        &mut self,
        dense: &ModelSpec,
        keep: &KeepMask,
        wants_scores: impl Fn(u64) -> bool,
    ) -> Option<EndedStep> {
        let step = self.first_open_step;
        let reports: Vec<RankReport> =
            self.open_steps.get(&step)?.reports.iter().cloned().collect::<Option<_>>()?;
        let open = self.open_steps.remove(&step)?;
        self.first_open_step += 1;
        let skipped = reports.iter().any(|report| !report.skipped.is_empty());
        let scores = (wants_scores(step) && !skipped)
            .then(|| open.assembly.unwrap_or_else(|| ScoreAssembly::new(dense, keep)).finish());
        Some(EndedStep { reports, scores })
    }

    /// Whether every rank has ended every step and its stream.
    pub(crate) fn is_complete(&self) -> bool {
        self.first_open_step == self.end_step && self.ranks.iter().all(|rank| rank.stream_ended)
    }

    fn open(&mut self, step: u64) -> &mut OpenStep {
        let tp_degree = self.ranks.len();
        self.open_steps
            .entry(step)
            .or_insert_with(|| OpenStep { assembly: None, reports: vec![None; tp_degree] })
    }

    fn check_due(
        &self,
        tp_rank: usize,
        what: &'static str,
        step: u64,
        generation: Generation,
    ) -> Result<(), StreamFault> {
        let rank = self.ranks[tp_rank];
        if generation != self.generation {
            return Err(StreamFault::Generation { what, expected: self.generation, actual: generation });
        }
        if rank.stream_ended || rank.next_step >= self.end_step {
            return Err(StreamFault::AfterEnd { what });
        }
        if step != rank.next_step {
            return Err(StreamFault::Step { what, expected: rank.next_step, actual: step });
        }
        Ok(())
    }
}

/// The units of `projection` that a rank holds of a layer, ascending.
fn units(held: &RankLayer, projection: Projection) -> &[usize] {
    match projection {
        Projection::Q | Projection::O => &held.query_heads,
        Projection::K | Projection::V => &held.kv_heads,
        Projection::Gate | Projection::Up | Projection::Down => &held.channels,
    }
}
