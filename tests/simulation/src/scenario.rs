//! What a seed decides before anything happens: runs, workers, and how rough the weather is.

use crate::chance::Chance;
use model_spec::{Family, LayerSpec, ModelSpec, Rope, RopeScaling};
use pruning_run::{Guard, GuardAction, GuardBound, Retention, RunOptions, RunSetup};
use recipe::{Depth, Pruning, Ramp, Recipe, Shrink};
use std::sync::Arc;
use std::time::Duration;

/// Microseconds since the simulation began.
pub type Time = u64;
pub const MILLISECOND: Time = 1_000;
pub const SECOND: Time = 1_000_000;

/// One run of the scenario.
#[derive(Debug, Clone)]
pub struct Plan {
    pub setup: Arc<RunSetup>,
    pub created_at: Time,
    /// Of one optimizer step.
    pub step_time: Time,
    /// One of so many steps is skipped for a loss that is not finite; 0 for none.
    pub skip_every: u64,
    pub seed: u64,
}

/// All that a seed decides at the start.
#[derive(Debug, Clone)]
pub struct Scenario {
    pub plans: Vec<Plan>,
    pub workers: usize,
    /// Mean time between two faults.
    pub fault_interval: Time,
    /// Faults stop then.
    pub horizon: Time,
    /// Share of messages that are lost while faults last.
    pub loss: f64,
}

fn model() -> ModelSpec {
    ModelSpec {
        family: Family::Llama,
        hidden_size: 8,
        head_dim: 2,
        vocab_size: 16,
        max_position_embeddings: 32,
        rms_norm_eps: 1e-6,
        rope: Rope { theta: 10_000.0, scaling: RopeScaling::None },
        tie_word_embeddings: true,
        layers: vec![LayerSpec { query_head_count: 8, kv_head_count: 4, intermediate_size: 12 }; 2],
    }
}

impl Scenario {
    #[must_use]
    pub fn of(seed: u64) -> Self {
        let mut chance = Chance::new(seed ^ 0x5CE7);
        let workers = 2 + chance.index(4);
        let plans = (0..1 + chance.index(3)).map(|_| Plan::by(&mut chance, workers)).collect();
        Self {
            plans,
            workers,
            fault_interval: chance.between(2, 15) * SECOND,
            horizon: chance.between(20, 90) * SECOND,
            loss: if chance.happens(0.5) { 0.0 } else { 0.002 },
        }
    }
}

impl Plan {
    fn by(chance: &mut Chance, workers: usize) -> Self {
        let tp_degree = 1 + chance.index(workers.min(4));
        let steps = 6 + chance.between(0, 9);
        let ramp = Ramp { warmup: 0.1, cooldown: 0.2, every: 2 + chance.between(0, 2), ..Ramp::published() };
        let shrink = if chance.happens(0.5) { Shrink::Live } else { Shrink::Never };
        let depth = Depth { blocks: Some(1), protect_ends: false, ..Depth::default() };
        let depth = chance.happens(0.3).then_some(depth);
        let pruning = Pruning { ramp, shrink, depth, ..Pruning::published() };
        let recipe = Recipe {
            steps,
            pruning: chance.happens(0.9).then_some(pruning),
            seed: chance.bits(),
            ..Recipe::default()
        };
        let guard = chance.happens(0.3).then(|| Guard {
            bound: GuardBound::Ratio(1.02 + 0.01 * chance.between(0, 20) as f64),
            action: if chance.happens(0.5) { GuardAction::Hold } else { GuardAction::Revert },
        });
        let options = RunOptions {
            windows: 1,
            tasks: chance.index(2),
            exports: chance.happens(0.8),
            blame_grace: Duration::from_secs(3),
            min_tp_degree: 1 + chance.index(tp_degree),
            checkpoint_every: chance.between(1, 8),
            retention: Retention { last: 1 + chance.index(3), decisions: chance.happens(0.5) },
            max_restarts: 3 + chance.between(0, 20) as u32,
            guard,
            stop_pruning: false,
        };
        let seed = recipe.seed;
        let setup = RunSetup::new(model(), recipe, tp_degree, options).expect("the plan is sound");
        Self {
            setup: Arc::new(setup),
            created_at: chance.between(0, 5 * SECOND),
            step_time: chance.between(50, 1500) * MILLISECOND,
            skip_every: if chance.happens(0.3) { 5 } else { 0 },
            seed,
        }
    }
}
