//! Workers that answer every effect as real ones would, in an order of the test's choosing.

use model_spec::{Family, LayerSpec, ModelSpec, Projection, Rope, RopeScaling};
use pruning::KeepMask;
use pruning_run::{
    Decision, Effect, Event, ExportResult, Generation, Measurement, RankReport, Run, RunEvent, RunEventKind,
    RunOptions, RunSetup, RunState, ShardFile, TaskScore, WorkerId, transition,
};
use recipe::{Pruning, Ramp, Recipe, Shape, Shrink};
use sharding::Placement;
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

pub(crate) const NOW: SystemTime = SystemTime::UNIX_EPOCH;

/// Three layers of 12 query heads on 6 key/value heads and 20 channels.
pub(crate) fn model() -> ModelSpec {
    ModelSpec {
        family: Family::Llama,
        hidden_size: 8,
        head_dim: 2,
        vocab_size: 16,
        max_position_embeddings: 32,
        rms_norm_eps: 1e-6,
        rope: Rope { theta: 10_000.0, scaling: RopeScaling::None },
        tie_word_embeddings: true,
        layers: vec![LayerSpec { query_head_count: 12, kv_head_count: 6, intermediate_size: 20 }; 3],
    }
}

/// Ten steps with decisions after steps 2, 4, 6 and 8.
pub(crate) fn recipe() -> Recipe {
    let ramp = Ramp { warmup: 0.1, cooldown: 0.2, every: 2, ..Ramp::published() };
    Recipe { steps: 10, pruning: Some(Pruning { ramp, ..Pruning::published() }), ..Recipe::default() }
}

/// Two of four rows right.
pub(crate) fn task_score(task: &str) -> TaskScore {
    TaskScore {
        task: task.into(),
        count: 4,
        correct: 2,
        correct_normalized: None,
        log_likelihood: -30.0,
        tokens: 90,
        log_likelihoods: Vec::new(),
    }
}

pub(crate) fn options() -> RunOptions {
    RunOptions { windows: 1, tasks: 0, exports: true, blame_grace: Duration::from_secs(5) }
}

pub(crate) fn setup(recipe: Recipe, tp_degree: usize, options: RunOptions) -> Arc<RunSetup> {
    Arc::new(RunSetup::new(model(), recipe, tp_degree, options).expect("a good setup"))
}

/// The group sum that every worker would compute.
pub(crate) fn score(step: u64, layer: usize, projection: Projection, unit: usize) -> f64 {
    let mixed = (step + 1) * 7919 + (layer * 104_729 + projection.index() * 1299 + unit * 15_485) as u64;
    1.0 + (mixed.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 40) as f64 / 1e5
}

/// A run and its workers.
pub(crate) struct World {
    pub(crate) run: Run,
    /// What each rank has answered but the coordinator has not yet read.
    pub(crate) outboxes: Vec<VecDeque<Event>>,
    pub(crate) log: Vec<RunEvent>,
    /// Every event delivered, in order.
    pub(crate) delivered: Vec<Event>,
    /// The generation that each rank has acknowledged.
    acknowledged: Vec<Generation>,
    placement: Placement,
    keep_mask: KeepMask,
    /// How many values a score chunk holds.
    chunk: usize,
}

impl World {
    /// A run whose workers have just been assigned.
    pub(crate) fn new(setup: &Arc<RunSetup>, chunk: usize) -> Self {
        let (run, effects) = Run::new(setup.clone(), NOW);
        let tp_degree = setup.tp_degree();
        let mut world = Self {
            run,
            outboxes: vec![VecDeque::new(); tp_degree],
            log: Vec::new(),
            delivered: Vec::new(),
            acknowledged: vec![Generation(0); tp_degree],
            placement: setup.placement().clone(),
            keep_mask: KeepMask::full(setup.dense()),
            chunk,
        };
        world.perform(effects);
        let workers = (0..tp_degree).map(|rank| WorkerId(format!("w{rank}"))).collect();
        world.deliver(Event::WorkersAssigned { workers });
        world
    }

    /// Lets the machine see an event, then checks what must always hold.
    pub(crate) fn deliver(&mut self, event: Event) {
        let had_ended = self.run.state().has_ended();
        if let Event::MaskApplied { tp_rank, generation } = &event
            && let Some(acknowledged) = self.acknowledged.get_mut(*tp_rank)
            && *generation == self.run.generation()
        {
            *acknowledged = *generation;
        }
        self.delivered.push(event.clone());
        let (run, effects) = transition(self.run.clone(), event, NOW);
        self.run = run;
        assert!(!had_ended || effects.is_empty(), "after the end came {effects:?}");
        self.perform(effects);
    }

    /// Reads the next answer of the first rank from `preferred` on that has one; false when nobody has.
    pub(crate) fn step(&mut self, preferred: usize) -> bool {
        let count = self.outboxes.len();
        let ranks = (0..count).map(|offset| (preferred + offset) % count);
        let Some(event) = ranks.into_iter().find_map(|rank| self.outboxes[rank].pop_front()) else {
            return false;
        };
        self.deliver(event);
        true
    }

    /// Goes on until nobody has anything to say.
    pub(crate) fn settle(&mut self) {
        while self.step(0) {}
    }

    pub(crate) fn decisions(&self) -> Vec<Arc<Decision>> {
        let decision = |event: &RunEvent| match &event.kind {
            RunEventKind::Decision(decision) => Some(decision.clone()),
            RunEventKind::StateChange { .. }
            | RunEventKind::Step(_)
            | RunEventKind::Evaluation(_)
            | RunEventKind::Task(_)
            | RunEventKind::Export(_) => None,
        };
        self.log.iter().filter_map(decision).collect()
    }

    pub(crate) fn evaluations(&self) -> Vec<(String, u64)> {
        let evaluation = |event: &RunEvent| match &event.kind {
            RunEventKind::Evaluation(evaluation) => Some((evaluation.label.clone(), evaluation.step)),
            RunEventKind::Task(task) => Some((format!("{} {}", task.label, task.score.task), task.step)),
            RunEventKind::StateChange { .. }
            | RunEventKind::Step(_)
            | RunEventKind::Decision(_)
            | RunEventKind::Export(_) => None,
        };
        self.log.iter().filter_map(evaluation).collect()
    }

    pub(crate) fn states(&self) -> Vec<(RunState, String)> {
        let change = |event: &RunEvent| match &event.kind {
            RunEventKind::StateChange { state, message } => Some((*state, message.clone())),
            RunEventKind::Step(_)
            | RunEventKind::Decision(_)
            | RunEventKind::Evaluation(_)
            | RunEventKind::Task(_)
            | RunEventKind::Export(_) => None,
        };
        self.log.iter().filter_map(change).collect()
    }

    pub(crate) fn last_message(&self) -> String {
        self.states().pop().expect("a run starts with a state").1
    }

    fn perform(&mut self, effects: Vec<Effect>) {
        for effect in effects {
            match effect {
                Effect::Record(event) => self.recorded(event),
                Effect::Load => self.all(|tp_rank| Event::Loaded { tp_rank, data_sha256: "d".into() }),
                Effect::OpenRendezvous => {
                    self.outboxes[0].push_back(Event::RendezvousOpened { rendezvous: b"here".to_vec() });
                }
                Effect::JoinGroup { rendezvous } => {
                    assert_eq!(rendezvous, b"here");
                    self.all(|tp_rank| Event::Joined { tp_rank });
                }
                Effect::Evaluate(Measurement::Window { index }) => self.all(|tp_rank| Event::Evaluated {
                    tp_rank,
                    window_index: index,
                    negative_log_likelihood: 20.0,
                    predicted_tokens: 10,
                    window_tokens: 64,
                    duration: Duration::from_secs(1),
                }),
                Effect::Evaluate(Measurement::Task { index }) => self.all(|tp_rank| Event::TaskEvaluated {
                    tp_rank,
                    task_index: index,
                    score: task_score(&format!("task-{index}")),
                    duration: Duration::from_secs(1),
                }),
                Effect::Train { first_step, end_step, generation } => {
                    assert!(
                        self.acknowledged.iter().all(|acknowledged| *acknowledged == generation),
                        "training under {generation}, acknowledged {:?}",
                        self.acknowledged
                    );
                    for tp_rank in 0..self.outboxes.len() {
                        for step in first_step..end_step {
                            self.train(tp_rank, step, generation);
                        }
                        self.outboxes[tp_rank].push_back(Event::TrainEnded { tp_rank });
                    }
                }
                Effect::ApplyMask { generation, keep_mask } => {
                    let pruning = self.run.setup().recipe().pruning.as_ref().expect("a pruning run");
                    let restricted = self.placement.restricted_to(&keep_mask);
                    self.placement = match pruning.shrink {
                        Shrink::Live => restricted.rebalanced(self.run.setup().dense()),
                        Shrink::Never => restricted,
                    };
                    self.keep_mask = keep_mask.as_ref().clone();
                    self.all(|tp_rank| Event::MaskApplied { tp_rank, generation });
                }
                Effect::Checkpoint => self.all(|tp_rank| Event::Checkpointed {
                    tp_rank,
                    shard: ShardFile { file: format!("rank-{tp_rank}"), sha256: "s".into() },
                }),
                Effect::AbortSessions => {
                    self.outboxes.iter_mut().for_each(VecDeque::clear);
                    if !self.run.state().has_ended() {
                        self.outboxes[0].push_back(Event::SessionsAborted);
                    }
                }
                Effect::Export { shards, keep_mask } => {
                    assert_eq!(shards.len(), self.outboxes.len());
                    assert_eq!(*keep_mask, self.keep_mask);
                    self.outboxes[0].push_back(Event::Exported { result: exported() });
                }
                Effect::ReleaseAllButFirst | Effect::WakeAt(_) | Effect::Refuse(_) => {}
            }
        }
    }

    fn recorded(&mut self, event: RunEvent) {
        assert_eq!(event.revision, self.log.len() as u64 + 1, "revisions rise by one");
        if let RunEventKind::Decision(decision) = &event.kind {
            let earlier = self.decisions().pop();
            let (generation, sparsity) =
                earlier.map_or((Generation(0), 0.0), |earlier| (earlier.generation, earlier.sparsity));
            assert_eq!(decision.generation, generation.next());
            assert!(decision.sparsity >= sparsity);
            decision.keep_mask.check_subset_of(&self.keep_mask).expect("kept sets only shrink");
        }
        self.log.push(event);
    }

    fn all(&mut self, answer: impl Fn(usize) -> Event) {
        for (tp_rank, outbox) in self.outboxes.iter_mut().enumerate() {
            outbox.push_back(answer(tp_rank));
        }
    }

    fn train(&mut self, tp_rank: usize, step: u64, generation: Generation) {
        let chunk = self.chunk;
        for (layer, held) in self.placement.ranks[tp_rank].iter().enumerate() {
            for projection in Projection::ALL {
                let units = match projection {
                    Projection::Q | Projection::O => &held.query_heads,
                    Projection::K | Projection::V => &held.kv_heads,
                    Projection::Gate | Projection::Up | Projection::Down => &held.channels,
                };
                for (place, units) in units.chunks(chunk).enumerate() {
                    let values = units.iter().map(|&unit| score(step, layer, projection, unit)).collect();
                    let first_unit = place * chunk;
                    self.outboxes[tp_rank].push_back(Event::Scores {
                        tp_rank,
                        step,
                        generation,
                        layer,
                        projection,
                        first_unit,
                        values,
                    });
                }
            }
        }
        self.outboxes[tp_rank].push_back(Event::StepEnded { tp_rank, report: report(step, generation) });
    }
}

pub(crate) fn report(step: u64, generation: Generation) -> RankReport {
    RankReport {
        step,
        loss: 3.0 - step as f64 / 10.0,
        grad_norm: 1.0,
        learning_rate: 1e-3,
        tokens: 1024,
        duration: Duration::from_millis(20),
        score_duration: Duration::from_millis(2),
        memory_bytes: 1 << 20,
        generation,
    }
}

fn exported() -> ExportResult {
    ExportResult {
        path: "/out".into(),
        parameters: 1,
        weight_bytes: 4,
        model_type: "llama".into(),
        manifest_sha256: "m".into(),
        max_logit_difference: 0.0,
        max_logit: 1.0,
        top_token_agreement: 1.0,
        mean_kl: 0.0,
    }
}

/// A run to its end under one order of delivery.
pub(crate) fn run_to_end(setup: &Arc<RunSetup>, chunk: usize, order: &[usize]) -> World {
    let mut world = World::new(setup, chunk);
    let mut turn = 0;
    while world.step(order.get(turn % order.len().max(1)).copied().unwrap_or(0)) {
        turn += 1;
    }
    world
}

/// The recipe with another shape of the result.
pub(crate) fn shaped(shape: Shape, shrink: Shrink) -> Recipe {
    let recipe = recipe();
    let pruning = recipe.pruning.clone().map(|pruning| Pruning { shape, shrink, ..pruning });
    Recipe { pruning, ..recipe }
}
