//! Published shapes and runs that stand before a decision, for the benches of what the coordinator computes.

use model_spec::{Family, LayerSpec, ModelSpec, Projection, Rope, RopeScaling};
use pruning::{KeepMask, ScoreAssembly, ScoreError, StepScores, random_importance};
use pruning_run::{
    Effect, Event, Generation, RankReport, Run, RunId, RunOptions, RunSetup, SetupError, WorkerId, transition,
};
use recipe::{Budget, Pruning, Ramp, Recipe, Shape};
use sharding::RankLayer;
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

/// A LLaMA whose layers are all alike, without grouped queries.
#[must_use]
pub fn llama(hidden_size: usize, layers: usize, heads: usize, channels: usize) -> ModelSpec {
    let widths = LayerSpec { query_head_count: heads, kv_head_count: heads, intermediate_size: channels };
    ModelSpec {
        family: Family::Llama,
        hidden_size,
        head_dim: hidden_size / heads,
        vocab_size: 32_000,
        max_position_embeddings: 2048,
        rms_norm_eps: 1e-6,
        rope: Rope { theta: 10_000.0, scaling: RopeScaling::None },
        tie_word_embeddings: false,
        layers: vec![widths; layers],
    }
}

/// LLaMA-7B.
#[must_use]
pub fn llama_7b() -> ModelSpec {
    llama(4096, 32, 32, 11_008)
}

/// LLaMA-65B.
#[must_use]
pub fn llama_65b() -> ModelSpec {
    llama(8192, 80, 64, 22_016)
}

/// A group sum with the long tail of real ones: exponential, of another scale in every projection and layer.
#[must_use]
pub fn score(seed: u64, layer: usize, projection: Projection, unit: usize) -> f64 {
    let uniform =
        random_importance(seed ^ (projection.index() as u64) << 32, layer, projection.block(), unit);
    -uniform.ln() * (1.0 + layer as f64 * 0.05 + projection.index() as f64)
}

/// A score for every unit of the unpruned model.
///
/// # Errors
/// Never for a model that is one.
pub fn step_scores(dense: &ModelSpec, seed: u64) -> Result<StepScores, ScoreError> {
    let keep = KeepMask::full(dense);
    let mut assembly = ScoreAssembly::new(dense, &keep);
    for (layer, kept) in keep.layers.iter().enumerate() {
        for projection in Projection::ALL {
            let units = kept.units(projection);
            let values: Vec<f64> = units.iter().map(|&unit| score(seed, layer, projection, unit)).collect();
            assembly.add(layer, projection, units, &values)?;
        }
    }
    assembly.finish()
}

/// Half of the projection weights go, in this shape.
#[must_use]
pub fn half(shape: Shape) -> Pruning {
    Pruning { shape, budget: Budget::Sparsity(0.5), ..Pruning::published() }
}

/// A run all of whose ranks have sent the scores of the step before a decision, and all but the last have ended it.
///
/// The events that are left, of the last rank, lead to the decision: [`last_events`].
///
/// # Errors
/// When the model cannot be cut in so many.
pub fn before_the_decision(
    dense: &ModelSpec,
    shape: Shape,
    tp_degree: usize,
) -> Result<(Run, [Event; 2]), SetupError> {
    let ramp = Ramp { warmup: 0.0, cooldown: 0.5, every: 1, ..Ramp::published() };
    let recipe = Recipe { steps: 4, pruning: Some(Pruning { ramp, ..half(shape) }), ..Recipe::default() };
    let options = RunOptions { blame_grace: Duration::from_secs(5), ..RunOptions::default() };
    let setup = Arc::new(RunSetup::new(dense.clone(), recipe, tp_degree, options)?);
    let placement = setup.placement().clone();
    let mut run = Run::new(RunId("bench".into()), setup, None, SystemTime::UNIX_EPOCH).0;
    let first_decision = run.setup().pruning_steps().first().copied().unwrap_or(0);
    let workers = (0..tp_degree).map(|rank| WorkerId(format!("w{rank}"))).collect();
    let mut events = VecDeque::from([Event::WorkersAssigned { workers }]);
    events.extend((0..tp_degree).map(|tp_rank| Event::Loaded { tp_rank, data_sha256: String::new() }));
    if tp_degree > 1 {
        events.push_back(Event::RendezvousOpened { rendezvous: Vec::new() });
        events.extend((0..tp_degree).map(|tp_rank| Event::Joined { tp_rank }));
    }
    let last_rank = tp_degree - 1;
    while let Some(event) = events.pop_front() {
        let is_last = matches!(&event, Event::StepEnded { tp_rank, report }
            if *tp_rank == last_rank && report.step == first_decision);
        if is_last {
            return Ok((run, [event, Event::TrainEnded { tp_rank: last_rank }]));
        }
        let (next, effects) = transition(run, event, SystemTime::UNIX_EPOCH);
        run = next;
        for effect in effects {
            if let Effect::Train { first_step, end_step, generation } = effect {
                for step in first_step..end_step {
                    for (tp_rank, layers) in placement.ranks.iter().enumerate() {
                        events.extend(scores(tp_rank, layers, step, generation));
                        events.push_back(Event::StepEnded { tp_rank, report: report(step) });
                        if step + 1 == end_step {
                            events.push_back(Event::TrainEnded { tp_rank });
                        }
                    }
                }
            }
        }
    }
    let ended = Event::StepEnded { tp_rank: last_rank, report: report(0) };
    Ok((run, [ended, Event::TrainEnded { tp_rank: last_rank }]))
}

/// All that a rank sends of a step.
fn scores(
    tp_rank: usize,
    layers: &[RankLayer],
    step: u64,
    generation: Generation,
) -> impl Iterator<Item = Event> + '_ {
    layers.iter().enumerate().flat_map(move |(layer, held)| {
        Projection::ALL.map(|projection| {
            let values = units(held, projection).iter().map(|&unit| score(step, layer, projection, unit));
            let (first_unit, values) = (0, values.collect());
            Event::Scores { tp_rank, step, generation, layer, projection, first_unit, values }
        })
    })
}

/// From the last rank's report to the effect that has all ranks apply the mask.
#[must_use]
pub fn decide_all(mut run: Run, events: [Event; 2]) -> (Run, Vec<Effect>) {
    let mut all = Vec::new();
    for event in events {
        let (next, effects) = transition(run, event, SystemTime::UNIX_EPOCH);
        run = next;
        all.extend(effects);
    }
    (run, all)
}

fn units(held: &RankLayer, projection: Projection) -> &[usize] {
    match projection {
        Projection::Q | Projection::O => &held.query_heads,
        Projection::K | Projection::V => &held.kv_heads,
        Projection::Gate | Projection::Up | Projection::Down => &held.channels,
    }
}

fn report(step: u64) -> RankReport {
    RankReport {
        step,
        loss: 2.0,
        grad_norm: 1.0,
        learning_rate: 1e-3,
        tokens: 1024,
        duration: Duration::from_secs(1),
        score_duration: Duration::from_millis(10),
        memory_bytes: 1 << 30,
        generation: Generation::default(),
        skipped: String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_events_lead_to_a_decision() {
        for (shape, tp_degree) in [(Shape::Uniform, 1), (Shape::Paper, 2), (Shape::Global, 2)] {
            let (run, events) =
                before_the_decision(&llama(64, 12, 4, 40), shape, tp_degree).expect("a good setup");
            let (run, effects) = decide_all(run, events);
            assert_eq!(run.generation(), Generation(1));
            let masks: Vec<_> =
                effects.iter().filter(|effect| matches!(effect, Effect::ApplyMask { .. })).collect();
            assert_eq!(masks.len(), 1, "{effects:?}");
        }
    }
}
