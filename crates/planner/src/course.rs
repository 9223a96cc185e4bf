use model_spec::{LayerSpec, ModelSpec};
use pruning::Target;
use recipe::{FieldViolation, Recipe, Shrink};

/// Where the widths after a decision come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WidthsFrom {
    /// The recipe and the model fix them.
    Recipe,
    /// The scores decide them (`shape: global`); these are the same share of every layer.
    EvenShares,
}

/// Widths of the layers over a run.
#[derive(Debug, Clone, PartialEq)]
pub struct Course {
    pub dense: Vec<LayerSpec>,
    /// The step after which each decision is made, and the widths that it leaves.
    pub decisions: Vec<(u64, Vec<LayerSpec>)>,
    pub widths_from: WidthsFrom,
    /// Whether a decision slices the tensors.
    pub shrinks: bool,
    pub steps: u64,
    target: Option<Target>,
}

impl Course {
    /// # Errors
    /// What of the recipe's pruning the model cannot meet.
    pub fn new(dense: &ModelSpec, recipe: &Recipe) -> Result<Self, Vec<FieldViolation>> {
        let mut course = Self {
            dense: dense.layers.clone(),
            decisions: Vec::new(),
            widths_from: WidthsFrom::Recipe,
            shrinks: false,
            steps: recipe.steps,
            target: None,
        };
        let Some(pruning) = &recipe.pruning else { return Ok(course) };
        let target = Target::resolve(dense, pruning)?;
        course.shrinks = pruning.shrink == Shrink::Live;
        for step in recipe.pruning_steps() {
            let share = pruning.ramp.share_at(step, recipe.steps);
            let widths = target.counts_at(share).unwrap_or_else(|| {
                course.widths_from = WidthsFrom::EvenShares;
                even_shares(dense, &target, recipe, share)
            });
            course.decisions.push((step, target.with_blocks_gone(widths)));
        }
        course.target = Some(target);
        Ok(course)
    }

    /// What the run must arrive at; none without pruning.
    #[must_use]
    pub fn target(&self) -> Option<&Target> {
        self.target.as_ref()
    }

    /// Widths of the result.
    #[must_use]
    pub fn last(&self) -> &[LayerSpec] {
        self.decisions.last().map_or(&self.dense, |(_, widths)| widths)
    }

    /// Widths of the tensors that are there at the end: those of the result where decisions slice.
    #[must_use]
    pub fn held_last(&self) -> &[LayerSpec] {
        if self.shrinks { self.last() } else { &self.dense }
    }

    /// Steps at each width of the tensors, in order. A decision made after a step counts from the next one on.
    #[must_use]
    pub fn stretches(&self) -> Vec<(u64, &[LayerSpec])> {
        let mut stretches = Vec::new();
        let (mut first, mut widths): (u64, &[LayerSpec]) = (0, &self.dense);
        for (step, after) in self.decisions.iter().filter(|_| self.shrinks) {
            let end = (step + 1).min(self.steps);
            stretches.push((end.saturating_sub(first), widths));
            (first, widths) = (end, after);
        }
        stretches.push((self.steps.saturating_sub(first), widths));
        stretches
    }

    /// Widths before and after each decision, as masks have them.
    pub(crate) fn changes(&self) -> impl Iterator<Item = (&[LayerSpec], &[LayerSpec])> {
        let before =
            std::iter::once(&self.dense[..]).chain(self.decisions.iter().map(|(_, widths)| &widths[..]));
        before.zip(self.decisions.iter().map(|(_, widths)| &widths[..]))
    }
}

/// The layers with heads and channels cut alike, where the scores will decide: what goes is `share` of the target.
fn even_shares(dense: &ModelSpec, target: &Target, recipe: &Recipe, share: f64) -> Vec<LayerSpec> {
    let removed = target.summary().sparsity_of_prunable * share;
    let (count, pruning) = (dense.layers.len(), recipe.pruning.as_ref());
    let is_protected =
        |layer| pruning.is_some_and(|pruning| pruning.protection.covers(layer, count, pruning.shape));
    let stays = |groups: usize| ((groups as f64 * (1.0 - removed)).round() as usize).clamp(1, groups.max(1));
    let cut = |(layer, widths): (usize, &LayerSpec)| {
        if is_protected(layer) {
            return *widths;
        }
        let kv_head_count = stays(widths.kv_head_count);
        LayerSpec {
            query_head_count: kv_head_count * widths.query_heads_per_kv_head(),
            kv_head_count,
            intermediate_size: stays(widths.intermediate_size),
        }
    };
    dense.layers.iter().enumerate().map(cut).collect()
}
