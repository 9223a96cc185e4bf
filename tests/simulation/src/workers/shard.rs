//! What a rank holds, and the arithmetic on it: every figure hangs on all that came before, so that a state restored
//! wrongly, a step left out or done twice, or another mask shows in every figure after it.

use crate::chance::{mix, unit_interval};
use crate::scenario::Plan;
use model_spec::Projection;
use pruning::KeepMask;
use pruning_run::{CalibrationFound, Event, Generation, RankReport, RunSetup, SavedState};
use recipe::Shrink;
use sharding::Placement;
use std::time::Duration;

#[derive(Debug, Clone)]
pub struct Shard {
    pub steps_done: u64,
    pub generation: Generation,
    pub keep_mask: KeepMask,
    placement: Placement,
    /// A hash chain over all steps, batches and masks so far.
    pub trajectory: u64,
}

/// A rank's file in a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShardCopy {
    pub tp_rank: usize,
    pub steps_done: u64,
    pub generation: Generation,
    pub trajectory: u64,
}

impl ShardCopy {
    #[must_use]
    pub fn digest(&self) -> String {
        let place = mix(mix(self.steps_done) ^ self.generation.0) ^ self.tp_rank as u64;
        format!("{:016x}", mix(mix(place) ^ self.trajectory))
    }
}

/// A hash of what a mask keeps.
#[must_use]
pub fn digest(keep_mask: &KeepMask) -> u64 {
    let mut hash = 0;
    for layer in &keep_mask.layers {
        for units in [&layer.query_heads, &layer.kv_heads, &layer.channels] {
            hash = mix(hash ^ units.len() as u64);
            units.iter().for_each(|&unit| hash = mix(hash ^ unit as u64));
        }
    }
    hash
}

impl Shard {
    pub(super) fn dense(plan: &Plan, tp_degree: usize) -> Self {
        let dense = plan.setup.dense();
        Self {
            steps_done: 0,
            generation: Generation(0),
            keep_mask: KeepMask::full(dense),
            placement: Placement::dense(dense, tp_degree).expect("enough heads"),
            trajectory: mix(plan.seed),
        }
    }

    pub(super) fn restored(setup: &RunSetup, state: &SavedState, copy: &ShardCopy, tp_degree: usize) -> Self {
        let placement = if state.placement.tp_degree() == tp_degree {
            state.placement.clone()
        } else {
            let dense = Placement::dense(setup.dense(), tp_degree).expect("enough heads");
            follow(setup, &dense.restricted_to(&state.keep_mask))
        };
        Self {
            steps_done: copy.steps_done,
            generation: copy.generation,
            keep_mask: state.keep_mask.clone(),
            placement,
            trajectory: copy.trajectory,
        }
    }

    pub(super) fn copy(&self, tp_rank: usize) -> ShardCopy {
        let Self { steps_done, generation, trajectory, .. } = *self;
        ShardCopy { tp_rank, steps_done, generation, trajectory }
    }

    pub(super) fn apply(&mut self, setup: &RunSetup, generation: Generation, keep_mask: &KeepMask) {
        self.placement = follow(setup, &self.placement.restricted_to(keep_mask));
        self.keep_mask = keep_mask.clone();
        self.generation = generation;
        self.trajectory = mix(self.trajectory ^ digest(keep_mask));
    }

    /// One optimizer step: its scores and its report.
    pub(super) fn step(&mut self, plan: &Plan, tp_rank: usize) -> Vec<Event> {
        let (step, generation) = (self.steps_done, self.generation);
        let skipped = plan.skip_every > 0 && step % plan.skip_every == 2;
        self.steps_done += 1;
        let mut events = Vec::new();
        if !skipped {
            self.trajectory = mix(self.trajectory ^ mix(plan.seed ^ mix(step)));
            for (layer, held) in self.placement.ranks[tp_rank].iter().enumerate() {
                for projection in Projection::ALL {
                    let units = match projection {
                        Projection::Q | Projection::O => &held.query_heads,
                        Projection::K | Projection::V => &held.kv_heads,
                        Projection::Gate | Projection::Up | Projection::Down => &held.channels,
                    };
                    let values =
                        units.iter().map(|&unit| self.score(plan, layer, projection, unit)).collect();
                    events.push(Event::Scores {
                        tp_rank,
                        step,
                        generation,
                        layer,
                        projection,
                        first_unit: 0,
                        values,
                    });
                }
            }
        }
        let report = RankReport {
            step,
            loss: if skipped { f64::NAN } else { 2.0 + unit_interval(self.trajectory) },
            grad_norm: 1.0,
            learning_rate: 1e-3,
            tokens: 64,
            duration: Duration::from_micros(plan.step_time),
            score_duration: Duration::ZERO,
            memory_bytes: 1,
            generation,
            skipped: if skipped { "the loss is NaN".into() } else { String::new() },
        };
        events.push(Event::StepEnded { tp_rank, report });
        events
    }

    /// Mostly the unit's own worth, a part of it hanging on all that came before.
    fn score(&self, plan: &Plan, layer: usize, projection: Projection, unit: usize) -> f64 {
        let place = mix(plan.seed ^ ((layer * 7 + projection.index()) * 1000 + unit) as u64);
        0.1 + unit_interval(place) + 0.5 * unit_interval(mix(place ^ self.trajectory))
    }

    /// Of the held-out text, in nats over ten tokens.
    /// A score for each block; the same on every rank.
    pub(super) fn calibrate(&self, plan: &Plan) -> CalibrationFound {
        let layers = 0..plan.setup.dense().layers.len() as u64;
        let score = |layer: u64| unit_interval(mix(self.trajectory ^ mix(layer)));
        CalibrationFound { block_scores: layers.map(score).collect(), block_order: Vec::new() }
    }

    pub(super) fn nats(&self, plan: &Plan) -> f64 {
        20.0 + 4.0 * self.keep_mask.sparsity(plan.setup.dense()) + 0.001 * unit_interval(self.trajectory)
    }
}

fn follow(setup: &RunSetup, restricted: &Placement) -> Placement {
    match setup.recipe().pruning.as_ref().map(|pruning| pruning.shrink) {
        Some(Shrink::Live) => restricted.rebalanced(setup.dense()),
        Some(Shrink::Never) | None => restricted.clone(),
    }
}
