use crate::Measurement;
use model_spec::ModelSpec;
use pruning::Target;
use recipe::{FieldViolation, Recipe};
use serde::{Deserialize, Serialize};
use sharding::{Placement, PlacementError};
use std::time::Duration;

/// What fixes the course of a run, checked once.
#[derive(Debug, Clone)]
pub struct RunSetup {
    dense: ModelSpec,
    recipe: Recipe,
    target: Option<Target>,
    placement: Placement,
    pruning_steps: Vec<u64>,
    options: RunOptions,
}

/// What a run does beside training.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RunOptions {
    /// Window lengths at which the held-out text is measured, before the first step and after the last.
    pub windows: usize,
    /// Tasks measured after them.
    pub tasks: usize,
    /// Write the result.
    pub exports: bool,
    /// How long a rank that has lost a peer waits for the culprit to be found, before it is named itself.
    pub blame_grace: Duration,
    /// Fewest workers to go on with after a fault.
    pub min_tp_degree: usize,
    /// Optimizer steps between checkpoints, beside those after decisions.
    pub checkpoint_every: u64,
    pub retention: Retention,
    /// Restarts, without a new checkpoint between them, that a run may take.
    pub max_restarts: u32,
    pub guard: Option<Guard>,
    /// Keep the mask that the run starts with.
    pub stop_pruning: bool,
}

/// Which checkpoints are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Retention {
    /// The latest so many.
    pub last: usize,
    /// And the first one under each mask, from which the run can be forked.
    pub decisions: bool,
}

/// A run prunes on only while the held-out text stays within a bound.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Guard {
    pub bound: GuardBound,
    pub action: GuardAction,
}

/// Highest perplexity that a guard allows.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum GuardBound {
    Perplexity(f64),
    /// As a multiple of the dense model's.
    Ratio(f64),
}

/// What happens when the bound is exceeded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GuardAction {
    /// The mask in force stays, and pruning ends.
    Hold,
    /// The run goes back to the checkpoint of the decision before, and pruning ends.
    Revert,
}

impl Default for RunOptions {
    /// Nothing measured or exported; a checkpoint every 25 steps, two kept and one for each decision; three restarts.
    fn default() -> Self {
        Self {
            windows: 0,
            tasks: 0,
            exports: false,
            blame_grace: Duration::from_secs(12),
            min_tp_degree: usize::MAX,
            checkpoint_every: 25,
            retention: Retention { last: 2, decisions: true },
            max_restarts: 3,
            guard: None,
            stop_pruning: false,
        }
    }
}

/// All that is wrong with a setup.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("the run cannot be set up: {} things are wrong", .recipe.len() + usize::from(.placement.is_some()))]
pub struct SetupError {
    /// By path within the recipe.
    pub recipe: Vec<FieldViolation>,
    pub placement: Option<PlacementError>,
}

impl RunSetup {
    /// # Errors
    /// Everything wrong with the recipe, alone and on this model, and with the degree.
    pub fn new(
        dense: ModelSpec,
        recipe: Recipe,
        tp_degree: usize,
        options: RunOptions,
    ) -> Result<Self, SetupError> {
        let mut violations = recipe.violations();
        violations.extend(recipe.violations_on(dense.vocab_size));
        let target = match &recipe.pruning {
            Some(pruning) if violations.is_empty() && recipe.steps > 0 => {
                Target::resolve(&dense, pruning).map_err(|more| violations.extend(more)).ok()
            }
            Some(_) | None => None,
        };
        match Placement::dense(&dense, tp_degree) {
            Ok(placement) if violations.is_empty() => {
                let pruning_steps = recipe.pruning_steps();
                Ok(Self { dense, recipe, target, placement, pruning_steps, options })
            }
            placement => Err(SetupError { recipe: violations, placement: placement.err() }),
        }
    }

    #[must_use]
    pub fn dense(&self) -> &ModelSpec {
        &self.dense
    }

    #[must_use]
    pub fn recipe(&self) -> &Recipe {
        &self.recipe
    }

    /// What the last decision arrives at; absent when nothing is pruned.
    #[must_use]
    pub fn target(&self) -> Option<&Target> {
        self.target.as_ref()
    }

    /// Who holds what of the dense model.
    #[must_use]
    pub fn placement(&self) -> &Placement {
        &self.placement
    }

    #[must_use]
    pub fn options(&self) -> RunOptions {
        self.options
    }

    #[must_use]
    pub fn tp_degree(&self) -> usize {
        self.placement.tp_degree()
    }

    /// Steps after which a mask is decided, in order.
    #[must_use]
    pub fn pruning_steps(&self) -> &[u64] {
        &self.pruning_steps
    }

    /// Whether the workers' scores of `step` enter a decision.
    pub(crate) fn wants_scores(&self, step: u64) -> bool {
        let scored =
            self.recipe.pruning.as_ref().is_some_and(|pruning| pruning.criterion.is_scored_by_workers());
        let settled = self.recipe.chain.as_ref().is_none_or(|chain| chain.has_settled(step));
        scored && settled && self.pruning_steps.last().is_some_and(|last| step <= *last)
    }

    /// All that is measured before the first step and again after the last.
    pub(crate) fn measurements(&self) -> Vec<Measurement> {
        let windows = (0..self.options.windows).map(|index| Measurement::Window { index });
        windows.chain((0..self.options.tasks).map(|index| Measurement::Task { index })).collect()
    }

    /// Fewest workers that the run starts with.
    pub(crate) fn min_tp_degree(&self) -> usize {
        self.options.min_tp_degree.clamp(1, self.tp_degree())
    }

    /// The step after the last of the stretch that starts at `first_step`: it ends with a decision or with the run.
    pub(crate) fn stretch_end(&self, first_step: u64) -> u64 {
        let decision = self.pruning_steps.iter().find(|step| **step >= first_step);
        decision.map_or(self.recipe.steps, |step| step + 1)
    }
}
