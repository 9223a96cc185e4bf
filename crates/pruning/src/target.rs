use crate::DepthGoal;
use crate::legal_counts::{LegalCounts, violation};
use model_spec::{Family, LayerSpec, ModelSpec};
use recipe::{Budget, Criterion, FieldViolation, Pruning, Shape};
use serde::{Deserialize, Serialize};

/// What the last decision of a run must arrive at, worked out from the recipe and the unpruned model.
///
/// - `uniform`: the legal head count nearest to `(1 - s) n` (of two equally near the larger), then the most channels
///   that keep the weights within the budget; fewer heads where no channel count does.
/// - `paper`: `floor(n s)` groups go from each unprotected layer and block, at least one stays. Counts that must be
///   legal (`channel_multiple`, `serve_tp`) are rounded up to the next one, or down where there is none above.
/// - `global`: a number of weights; which groups they are is the scores' business (see `global_ranking`).
#[derive(Debug, Clone, PartialEq)]
pub struct Target {
    pub(crate) legal: LegalCounts,
    pub(crate) dense_layers: Vec<LayerSpec>,
    pub(crate) goal: Goal,
    depth: Option<DepthGoal>,
    summary: TargetSummary,
}

#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Goal {
    Counts { removals: Vec<Removal>, last: Vec<LayerSpec>, rounding: Rounding },
    Weights(WeightGoal),
}

/// Heads and channels due to go from a layer at the end, before rounding: the ramp takes shares of these.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Removal {
    attention: f64,
    channels: f64,
}

/// How many whole groups are due of a share of them, before the last decision.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Rounding {
    /// As published.
    Down,
    /// Of few groups none waits for the last decision: one that goes alone does so halfway.
    Nearest,
}

impl Rounding {
    fn groups(self, due: f64) -> usize {
        match self {
            Self::Down => (due + SLACK).floor() as usize,
            Self::Nearest => (due + SLACK).round() as usize,
        }
    }
}

/// The goal of the global ranking.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct WeightGoal {
    pub(crate) removed_weights: u64,
    pub(crate) prunable: Vec<bool>,
    pub(crate) density: Density,
}

/// How the ranking makes groups of unequal kind comparable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Density {
    /// Importance by weight: the criterion measures a change of the loss (or a mass of weights) in one unit everywhere.
    ByWeight,
    /// Importance itself: the criterion has made it comparable.
    Itself,
    /// Importance over the mean of the group's block: the criterion has erased the scale between blocks.
    ByBlockMean,
}

/// What the target comes to in figures. Under `global` the kept figures are upper bounds, less than one group away.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct TargetSummary {
    /// Weights in the projections of unprotected layers.
    pub prunable_weights: u64,
    pub kept_prunable_weights: u64,
    /// Fraction of the prunable weights that goes.
    pub sparsity_of_prunable: f64,
    /// Fraction of all projection weights that goes, protected layers included.
    pub sparsity_of_projections: f64,
    pub dense_parameters: u64,
    /// Of the whole model, embeddings and norms included.
    pub kept_parameters: u64,
}

/// Guards `floor` and comparisons against the last bit of a product such as `0.3 * 10`.
const SLACK: f64 = 1e-9;

impl Target {
    /// # Errors
    /// All that cannot be met, as recipe fields: what is asked, why it is impossible and what is possible nearby.
    pub fn resolve(dense: &ModelSpec, pruning: &Pruning) -> Result<Self, Vec<FieldViolation>> {
        let legal = LegalCounts::new(pruning).map_err(|violation| vec![violation])?;
        let prunable = prunable_layers(dense, pruning)?;
        let mut found = Vec::new();
        legal.check(dense, &prunable, pruning.channel_multiple, &mut found);
        if !found.is_empty() {
            return Err(found);
        }
        let depth = match &pruning.depth {
            Some(depth) => {
                Some(DepthGoal::resolve(dense, pruning, depth).map_err(|violation| vec![violation])?)
            }
            None => None,
        };
        let removed_blocks = depth.as_ref().map_or(0, |depth| depth.count);
        if let (Some(depth), Some(recipe::Depth { blocks: None, .. })) = (&depth, &pruning.depth) {
            return Ok(Self::of_blocks_alone(dense, legal, &prunable, depth.clone()));
        }
        let budget = WeightBudget::resolve(dense, pruning, &prunable, &legal, removed_blocks)
            .map_err(|violation| vec![violation])?;
        let goal = match pruning.shape {
            Shape::Uniform => uniform(dense, &legal, &budget, dense.layers.len() - removed_blocks),
            Shape::Paper => paper(dense, &legal, &prunable, budget.sparsity),
            Shape::Global => Goal::Weights(WeightGoal {
                removed_weights: budget.prunable_weights - budget.kept_weights,
                prunable: prunable.clone(),
                density: density(pruning.criterion),
            }),
        };
        let kept_prunable_weights = match &goal {
            // All layers are alike where some go.
            Goal::Counts { last, .. } => {
                let there = dense.layers.len() - removed_blocks;
                weights_of(dense, &last[..there], &prunable[..there])
            }
            Goal::Weights(_) => budget.kept_weights,
        };
        let summary =
            TargetSummary::new(dense, budget.prunable_weights, kept_prunable_weights, removed_blocks);
        Ok(Self { legal, dense_layers: dense.layers.clone(), goal, depth, summary })
    }

    /// Blocks go, and no head or channel besides.
    fn of_blocks_alone(dense: &ModelSpec, legal: LegalCounts, prunable: &[bool], depth: DepthGoal) -> Self {
        let layers = dense.layers.len();
        let goal = Goal::Counts {
            removals: vec![Removal { attention: 0.0, channels: 0.0 }; layers],
            last: dense.layers.clone(),
            rounding: Rounding::Nearest,
        };
        let prunable_weights = weights_of(dense, &dense.layers, prunable);
        let of_block = dense.projection_weight_count() / layers as u64;
        let kept = prunable_weights - depth.count as u64 * of_block;
        let summary = TargetSummary::new(dense, prunable_weights, kept, depth.count);
        Self { legal, dense_layers: dense.layers.clone(), goal, depth: Some(depth), summary }
    }

    /// Blocks that go as a whole at the first decision.
    #[must_use]
    pub fn depth(&self) -> Option<&DepthGoal> {
        self.depth.as_ref()
    }

    /// The counts due when `share` of the target is due; at 1 the final ones. They never rise with `share`, and before 1
    /// they need not be legal. None under `global`, whose counts follow from the scores.
    #[must_use]
    pub fn counts_at(&self, share: f64) -> Option<Vec<LayerSpec>> {
        let Goal::Counts { removals, last, rounding } = &self.goal else {
            return None;
        };
        if share >= 1.0 {
            return Some(last.clone());
        }
        let due = |removal: f64| rounding.groups(removal * share.max(0.0));
        let layers = self.dense_layers.iter().zip(removals).zip(last);
        Some(
            layers
                .map(|((dense, removal), last)| {
                    let attention = self.legal.attention_steps(dense).saturating_sub(due(removal.attention));
                    let channels = dense.intermediate_size.saturating_sub(due(removal.channels));
                    let attention = attention.max(self.legal.attention_steps(last));
                    self.legal.widths(dense, attention, channels.max(last.intermediate_size))
                })
                .collect(),
        )
    }

    /// Widths with some blocks gone, for plans made before it is known which: the last of those that may.
    #[must_use]
    pub fn with_blocks_gone(&self, mut widths: Vec<LayerSpec>) -> Vec<LayerSpec> {
        let Some(depth) = &self.depth else { return widths };
        let may_go = (0..widths.len()).rev().filter(|layer| depth.removable.get(*layer) == Some(&true));
        for layer in may_go.take(depth.count).collect::<Vec<_>>() {
            widths[layer] = LayerSpec { query_head_count: 0, kv_head_count: 0, intermediate_size: 0 };
        }
        widths
    }

    /// Weights of the largest step from one legal count of a block to the next.
    pub(crate) fn largest_quantum(&self, dense: &ModelSpec) -> u64 {
        let of_layer = |layer: &LayerSpec| {
            let weights = |attention, channels| {
                weights_of(dense, &[self.legal.widths(layer, attention, channels)], &[true])
            };
            let mut counts = self.legal.legal_attention(layer);
            counts.push(self.legal.attention_steps(layer));
            let step = counts.windows(2).map(|pair| pair[1] - pair[0]).max().unwrap_or(0).max(1);
            weights(step, 0).max(weights(0, self.legal.channel_quantum()))
        };
        self.dense_layers.iter().map(of_layer).max().unwrap_or(0)
    }

    #[must_use]
    pub fn summary(&self) -> &TargetSummary {
        &self.summary
    }

    /// The stock architecture whose `config.json` can describe the result; none when layers end up with different widths,
    /// which takes padding or modelling code of one's own.
    ///
    /// `LlamaConfig` refuses head counts that do not divide `hidden_size`; `MistralConfig` takes them.
    #[must_use]
    pub fn stock_family(&self, dense: &ModelSpec) -> Option<Family> {
        let last = self.counts_at(1.0)?;
        let first = *last.first()?;
        let equal = last.iter().all(|layer| *layer == first);
        let divides = dense.hidden_size.is_multiple_of(first.query_head_count);
        equal.then_some(if divides { dense.family } else { Family::Mistral })
    }
}

impl TargetSummary {
    fn new(
        dense: &ModelSpec,
        prunable_weights: u64,
        kept_prunable_weights: u64,
        removed_blocks: usize,
    ) -> Self {
        let removed = prunable_weights - kept_prunable_weights;
        let norms = removed_blocks as u64 * (2 * dense.hidden_size) as u64;
        Self {
            prunable_weights,
            kept_prunable_weights,
            sparsity_of_prunable: removed as f64 / prunable_weights as f64,
            sparsity_of_projections: removed as f64 / dense.projection_weight_count() as f64,
            dense_parameters: dense.parameter_count(),
            kept_parameters: dense.parameter_count() - removed - norms,
        }
    }
}

/// Which layers may be pruned.
fn prunable_layers(dense: &ModelSpec, pruning: &Pruning) -> Result<Vec<bool>, Vec<FieldViolation>> {
    let count = dense.layers.len();
    let mut found = Vec::new();
    if let recipe::Protection::Layers(layers) = &pruning.protection
        && let Some(layer) = layers.iter().find(|&&layer| layer >= count)
    {
        let last = count.saturating_sub(1);
        found.push(violation(
            "pruning.protection",
            format!("the model has no layer {layer}; its last is {last}"),
        ));
    }
    let prunable: Vec<bool> =
        (0..count).map(|layer| !pruning.protection.covers(layer, count, pruning.shape)).collect();
    if !prunable.contains(&true) {
        found.push(violation("pruning.protection", format!("none of the {count} layers is left to prune")));
    }
    if pruning.shape == Shape::Uniform {
        if dense.uniform_layer().is_none() {
            found.push(violation(
                "pruning.shape",
                "`uniform` needs a model whose layers have equal widths, which this one has not; use `global` or `paper`",
            ));
        }
        if prunable.contains(&false) {
            found.push(violation(
                "pruning.protection",
                "protected layers keep their widths, which `uniform` cannot express; use `paper` or `global`",
            ));
        }
    }
    if found.is_empty() { Ok(prunable) } else { Err(found) }
}

/// A budget in weights.
struct WeightBudget {
    /// Fraction of the prunable weights asked to go.
    sparsity: f64,
    prunable_weights: u64,
    /// Prunable weights that may stay.
    kept_weights: u64,
}

impl WeightBudget {
    fn resolve(
        dense: &ModelSpec,
        pruning: &Pruning,
        prunable: &[bool],
        legal: &LegalCounts,
        removed_blocks: usize,
    ) -> Result<Self, FieldViolation> {
        let prunable_weights = weights_of(dense, &dense.layers, prunable);
        let there = dense.layers.len() - removed_blocks;
        let least: Vec<LayerSpec> = dense.layers.iter().map(|layer| legal.least(layer)).collect();
        let least_weights = weights_of(dense, &least[..there], &prunable[..there]);
        let most_weights = weights_of(dense, &dense.layers[..there], &prunable[..there]);
        match pruning.budget {
            Budget::Sparsity(sparsity) => {
                let field = "pruning.budget.sparsity";
                if !(0.0..1.0).contains(&sparsity) {
                    return Err(violation(field, format!("must lie in [0, 1); got {sparsity}")));
                }
                let kept = (1.0 - sparsity) * prunable_weights as f64;
                // The product may be one weight short of a whole number that was meant.
                let kept_weights = (kept * (1.0 + 1e-12)).floor() as u64;
                if kept_weights < least_weights && pruning.shape != Shape::Paper {
                    let most = 1.0 - least_weights as f64 / prunable_weights as f64;
                    let most = (most * 1e4).floor() / 1e4;
                    return Err(violation(
                        field,
                        format!(
                            "{sparsity} is out of reach: the least heads and channels allowed give {most:.4}"
                        ),
                    ));
                }
                Ok(Self { sparsity, prunable_weights, kept_weights: kept_weights.min(most_weights) })
            }
            Budget::Parameters(parameters) => {
                let norms = removed_blocks as u64 * (2 * dense.hidden_size) as u64;
                let whole = dense.parameter_count() - norms;
                let most = whole - (prunable_weights - most_weights);
                let least = whole - (prunable_weights - least_weights);
                if !(least..=most).contains(&parameters) {
                    return Err(violation(
                        "pruning.budget.parameters",
                        format!(
                            "must lie in {least}..={most} for this model and these constraints; got {parameters}"
                        ),
                    ));
                }
                let kept_weights = prunable_weights - (whole - parameters);
                let sparsity = 1.0 - kept_weights as f64 / prunable_weights as f64;
                Ok(Self { sparsity, prunable_weights, kept_weights })
            }
        }
    }
}

/// The same legal counts for every layer. The least ones fit the budget, which has been checked.
///
/// `layer_count` layers are there to be narrowed; the others go as a whole.
fn uniform(dense: &ModelSpec, legal: &LegalCounts, budget: &WeightBudget, layer_count: usize) -> Goal {
    let layer = dense.layers[0];
    // The share of what is there, where whole blocks go besides.
    let share = match layer_count == dense.layers.len() {
        true => 1.0 - budget.sparsity,
        false => {
            budget.kept_weights as f64
                / weights_of(dense, &vec![layer; layer_count], &vec![true; layer_count]) as f64
        }
    };
    let wanted = share * legal.attention_steps(&layer) as f64;
    let steps = legal.legal_attention(&layer);
    let distance = |steps: usize| (steps as f64 - wanted).abs();
    let nearest =
        steps.iter().rev().copied().reduce(|nearest, fewer| {
            if distance(fewer) < distance(nearest) - SLACK { fewer } else { nearest }
        });
    let channels_beside = |attention: usize| {
        let with = |channels| {
            let one = legal.widths(&layer, attention, channels);
            weights_of(dense, &vec![one; layer_count], &vec![true; layer_count])
        };
        let (heads_alone, per_channel) = (with(0), with(1) - with(0));
        let channels = budget.kept_weights.checked_sub(heads_alone)? / per_channel;
        let channels = usize::try_from(channels).unwrap_or(usize::MAX).min(layer.intermediate_size);
        let legal_channels = channels - channels % legal.channel_quantum();
        (legal_channels > 0).then_some(legal_channels)
    };
    let last = steps
        .iter()
        .rev()
        .filter(|&&attention| Some(attention) <= nearest)
        .find_map(|&attention| Some(legal.widths(&layer, attention, channels_beside(attention)?)))
        .unwrap_or_else(|| legal.least(&layer));
    let removal = Removal {
        attention: (legal.attention_steps(&layer) - legal.attention_steps(&last)) as f64,
        channels: (layer.intermediate_size - last.intermediate_size) as f64,
    };
    Goal::Counts {
        removals: vec![removal; dense.layers.len()],
        last: vec![last; dense.layers.len()],
        rounding: Rounding::Nearest,
    }
}

/// The published rule, layer by layer.
fn paper(dense: &ModelSpec, legal: &LegalCounts, prunable: &[bool], sparsity: f64) -> Goal {
    let kept = |count: usize| count - ((count as f64 * sparsity + SLACK).floor() as usize).min(count - 1);
    let (removals, last) = dense
        .layers
        .iter()
        .zip(prunable)
        .map(|(layer, &prunable)| {
            if !prunable {
                return (Removal { attention: 0.0, channels: 0.0 }, *layer);
            }
            let (heads, channels) = (legal.attention_steps(layer), layer.intermediate_size);
            let steps = legal.legal_attention(layer);
            let kept_heads = kept(heads);
            let legal_heads = steps.iter().find(|&&steps| steps >= kept_heads).or(steps.last());
            let quantum = legal.channel_quantum();
            let most_channels = channels - channels % quantum;
            let legal_channels = kept(channels).next_multiple_of(quantum).min(most_channels);
            let removal =
                Removal { attention: heads as f64 * sparsity, channels: channels as f64 * sparsity };
            (removal, legal.widths(layer, legal_heads.copied().unwrap_or(heads), legal_channels))
        })
        .unzip();
    Goal::Counts { removals, last, rounding: Rounding::Down }
}

/// Normalised and random scores say nothing across blocks, standardised ones all; all others are in one unit everywhere.
fn density(criterion: Criterion) -> Density {
    match criterion {
        Criterion::Random => Density::ByBlockMean,
        Criterion::Flap => Density::Itself,
        Criterion::LoraPrune { .. }
        | Criterion::Tangent
        | Criterion::Taylor
        | Criterion::Magnitude
        | Criterion::Wanda => {
            if criterion.normalises_projections() {
                Density::ByBlockMean
            } else {
                Density::ByWeight
            }
        }
    }
}

/// Projection weights of the layers picked by `of`, were the layers of these widths.
fn weights_of(dense: &ModelSpec, layers: &[LayerSpec], of: &[bool]) -> u64 {
    let picked = layers.iter().zip(of).filter(|(_, of)| **of).map(|(layer, _)| *layer).collect();
    ModelSpec { layers: picked, ..dense.clone() }.projection_weight_count()
}

#[cfg(test)]
#[path = "target_tests.rs"]
mod tests;
