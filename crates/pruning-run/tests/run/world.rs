//! Workers that answer every effect as real ones would, in an order of the test's choosing.

use model_spec::{Family, LayerSpec, ModelSpec, Projection, Rope, RopeScaling};
use pruning::KeepMask;
use pruning_run::{
    CalibrationFound, CheckpointRef, Decision, Effect, Event, ExportResult, Generation, GuardVerdict,
    History, Measurement, RankReport, Restart, Restore, Retention, Run, RunEvent, RunEventKind, RunId,
    RunOptions, RunSetup, RunState, SavedState, ShardFile, StepReport, TaskScore, WorkerId, transition,
};
use recipe::{Pruning, Ramp, Recipe, Shape, Shrink};
use sharding::Placement;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
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

/// One window measured, a result written, no restart.
pub(crate) fn options() -> RunOptions {
    RunOptions {
        windows: 1,
        exports: true,
        blame_grace: Duration::from_secs(5),
        max_restarts: 0,
        ..RunOptions::default()
    }
}

/// The same with three restarts and a checkpoint at every other step, all of them kept.
pub(crate) fn durable() -> RunOptions {
    let retention = Retention { last: 100, decisions: true };
    RunOptions { max_restarts: 3, checkpoint_every: 2, retention, ..options() }
}

pub(crate) fn id() -> RunId {
    RunId("run".into())
}

pub(crate) fn setup(recipe: Recipe, tp_degree: usize, options: RunOptions) -> Arc<RunSetup> {
    Arc::new(RunSetup::new(model(), recipe, tp_degree, options).expect("a good setup"))
}

/// The group sum that every worker would compute.
pub(crate) fn score(step: u64, layer: usize, projection: Projection, unit: usize) -> f64 {
    let mixed = (step + 1) * 7919 + (layer * 104_729 + projection.index() * 1299 + unit * 15_485) as u64;
    1.0 + (mixed.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 40) as f64 / 1e5
}

/// A run, its workers and its store.
#[derive(Clone)]
pub(crate) struct World {
    pub(crate) setup: Arc<RunSetup>,
    pub(crate) origin: Option<CheckpointRef>,
    pub(crate) run: Run,
    pub(crate) now: SystemTime,
    /// What each rank has answered but the coordinator has not yet read.
    pub(crate) outboxes: Vec<VecDeque<Event>>,
    /// The same of the coordinator's own tasks: queue, store, ends of sessions.
    pub(crate) own: VecDeque<Event>,
    wakes: Vec<SystemTime>,
    pub(crate) log: Vec<RunEvent>,
    /// Every event delivered, in order.
    pub(crate) delivered: Vec<Event>,
    /// Complete checkpoints, by run and name.
    pub(crate) saved: BTreeMap<(RunId, String), Arc<SavedState>>,
    /// Names of checkpoints that cannot be read any more.
    pub(crate) damaged: BTreeSet<String>,
    /// Workers that can be had.
    pub(crate) available: usize,
    /// Fewest and most workers that the run queues for, while there are too few.
    pub(crate) queued: Option<(usize, usize)>,
    pub(crate) holds_workers: bool,
    /// So many of the next checkpoints fail on the last rank.
    pub(crate) failing_checkpoints: usize,
    /// Steps after which no optimizer step is taken.
    pub(crate) skipped: BTreeSet<u64>,
    /// Likelihood of the held-out text, in nats over ten tokens, by generation; of the last for all after it.
    pub(crate) nats: Vec<f64>,
    /// What the ranks were told to load, in order.
    pub(crate) loads: Vec<Option<Restore>>,
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
        let mut world = Self::queued(setup, None, chunk);
        world.step(0);
        world
    }

    /// A run that waits for its workers.
    pub(crate) fn queued(setup: &Arc<RunSetup>, origin: Option<CheckpointRef>, chunk: usize) -> Self {
        let (run, effects) = Run::new(id(), setup.clone(), origin.clone(), NOW);
        let tp_degree = setup.tp_degree();
        let mut world = Self {
            setup: setup.clone(),
            origin,
            run,
            now: NOW,
            outboxes: vec![VecDeque::new(); tp_degree],
            own: VecDeque::new(),
            wakes: Vec::new(),
            log: Vec::new(),
            delivered: Vec::new(),
            saved: BTreeMap::new(),
            damaged: BTreeSet::new(),
            available: tp_degree,
            queued: None,
            holds_workers: false,
            failing_checkpoints: 0,
            skipped: BTreeSet::new(),
            nats: vec![20.0],
            loads: Vec::new(),
            acknowledged: vec![Generation(0); tp_degree],
            placement: setup.placement().clone(),
            keep_mask: KeepMask::full(setup.dense()),
            chunk,
        };
        world.perform(effects);
        world
    }

    /// Kills the coordinator and starts another, which knows the log and the store and nothing else.
    pub(crate) fn kill(&mut self) {
        let mut history = History::default();
        self.log.iter().for_each(|event| history.take_in(event));
        self.own.clear();
        self.wakes.clear();
        self.outboxes.iter_mut().for_each(VecDeque::clear);
        (self.queued, self.holds_workers) = (None, false);
        let (run, effects) = Run::resumed(id(), self.setup.clone(), self.origin.clone(), history, self.now);
        self.run = run;
        self.perform(effects);
    }

    /// Lets the machine see an event, then checks what must always hold.
    pub(crate) fn deliver(&mut self, event: Event) {
        let had_ended = self.run.state().has_ended();
        if let Event::MaskApplied { tp_rank, generation } = &event
            && *generation == self.run.generation()
            && let Some(acknowledged) = self.acknowledged.get_mut(*tp_rank)
        {
            *acknowledged = *generation;
        }
        if let Event::WorkersAssigned { workers } = &event
            && !self.holds_workers
            && !had_ended
        {
            self.outboxes = vec![VecDeque::new(); workers.len().max(1)];
        }
        self.delivered.push(event.clone());
        let (run, effects) = transition(self.run.clone(), event, self.now);
        self.run = run;
        assert!(!had_ended || effects.is_empty(), "after the end came {effects:?}");
        self.holds_workers |= self.run.holds_workers();
        self.perform(effects);
        assert_eq!(self.holds_workers, self.run.holds_workers(), "workers are given back once");
    }

    /// Reads the next answer of the first that has one, from `preferred` on: 0 is the coordinator, then come the ranks.
    /// The time of a timer comes when nobody has. False when nothing will happen any more.
    pub(crate) fn step(&mut self, preferred: usize) -> bool {
        let count = self.outboxes.len() + 1;
        for place in (0..count).map(|offset| (preferred + offset) % count) {
            let event = match place.checked_sub(1) {
                Some(tp_rank) => self.outboxes[tp_rank].pop_front(),
                None => self.own.pop_front(),
            };
            if let Some(event) = event {
                self.deliver(event);
                return true;
            }
        }
        let Some(first) = (0..self.wakes.len()).min_by_key(|&place| self.wakes[place]) else { return false };
        self.now = self.now.max(self.wakes.swap_remove(first));
        self.deliver(Event::Woken);
        true
    }

    /// Goes on until nobody has anything to say.
    pub(crate) fn settle(&mut self) {
        while self.step(0) {}
    }

    /// The world as it is after each event up to the end of the run, but for those amid a step's scores.
    pub(crate) fn at_every_event(mut self) -> Vec<(usize, Self)> {
        let mut worlds = Vec::new();
        while !self.run.state().has_ended() {
            if !matches!(self.delivered.last(), Some(Event::Scores { .. })) {
                worlds.push((self.delivered.len(), self.clone()));
            }
            self.step(0);
        }
        worlds
    }

    /// Goes on until something holds.
    pub(crate) fn until(&mut self, holds: impl Fn(&Self) -> bool) {
        while !holds(self) {
            assert!(self.step(0), "it never came: {}", self.last_message());
        }
    }

    /// What of a kind was recorded, in order.
    pub(crate) fn recorded_as<T>(&self, of: impl Fn(&RunEventKind) -> Option<T>) -> Vec<T> {
        self.log.iter().filter_map(|event| of(&event.kind)).collect()
    }

    pub(crate) fn decisions(&self) -> Vec<Arc<Decision>> {
        self.recorded_as(|kind| if let RunEventKind::Decision(it) = kind { Some(it.clone()) } else { None })
    }

    pub(crate) fn restarts(&self) -> Vec<Restart> {
        self.recorded_as(|kind| if let RunEventKind::Restart(it) = kind { Some(it.clone()) } else { None })
    }

    pub(crate) fn verdicts(&self) -> Vec<GuardVerdict> {
        self.recorded_as(|kind| if let RunEventKind::Guard(it) = kind { Some(it.clone()) } else { None })
    }

    pub(crate) fn checkpoints(&self) -> Vec<CheckpointRef> {
        self.recorded_as(
            |kind| if let RunEventKind::Checkpoint(it) = kind { Some(it.place.clone()) } else { None },
        )
    }

    /// The last report of each step.
    pub(crate) fn steps(&self) -> BTreeMap<u64, StepReport> {
        let reports =
            self.recorded_as(|kind| if let RunEventKind::Step(it) = kind { Some(it.clone()) } else { None });
        reports.into_iter().map(|report| (report.step, report)).collect()
    }

    pub(crate) fn evaluations(&self) -> Vec<(String, u64)> {
        self.recorded_as(|kind| {
            if let RunEventKind::Evaluation(it) = kind {
                Some((it.label.clone(), it.step))
            } else if let RunEventKind::Task(it) = kind {
                Some((format!("{} {}", it.label, it.score.task), it.step))
            } else {
                None
            }
        })
    }

    pub(crate) fn states(&self) -> Vec<(RunState, String)> {
        self.recorded_as(|kind| {
            if let RunEventKind::StateChange { state, message } = kind {
                Some((*state, message.clone()))
            } else {
                None
            }
        })
    }

    pub(crate) fn last_message(&self) -> String {
        self.states().pop().expect("a run starts with a state").1
    }

    fn perform(&mut self, effects: Vec<Effect>) {
        let mut kept_importance = None;
        for effect in effects {
            match effect {
                Effect::Record(event) => {
                    if let RunEventKind::Decision(decision) = &event.kind {
                        assert_eq!(kept_importance.take(), Some(decision.generation));
                    }
                    self.recorded(event);
                }
                Effect::KeepImportance { generation, .. } => kept_importance = Some(generation),
                Effect::Enqueue { workers, at_least } => {
                    assert!(!self.holds_workers, "it queues with workers in hand");
                    assert!(self.queued.is_none(), "it queues once");
                    self.queued = Some((at_least, workers));
                    self.assign();
                }
                Effect::LeaveQueue => {
                    self.queued = None;
                    self.own.retain(|event| !matches!(event, Event::WorkersAssigned { .. }));
                }
                Effect::Restore(place) => {
                    let saved = self.saved.get(&(place.run_id.clone(), place.name.clone()));
                    self.own.push_back(match saved {
                        Some(state) if !self.damaged.contains(&place.name) => {
                            Event::Restored { state: state.clone() }
                        }
                        Some(_) | None => {
                            Event::RestoreFailed { cause: "its digest differs".into(), damaged: true }
                        }
                    });
                }
                Effect::Load { restore } => self.load(restore),
                Effect::OpenRendezvous => {
                    self.outboxes[0].push_back(Event::RendezvousOpened { rendezvous: b"here".to_vec() });
                }
                Effect::JoinGroup { rendezvous } => {
                    assert_eq!(rendezvous, b"here");
                    self.all(|tp_rank| Event::Joined { tp_rank });
                }
                Effect::Evaluate(measurement) => self.evaluate(measurement),
                Effect::Calibrate { generation } => {
                    let found = CalibrationFound {
                        block_scores: (0..self.run.setup().dense().layers.len())
                            .map(|layer| 5.0 - layer as f64)
                            .collect(),
                        block_order: Vec::new(),
                    };
                    self.all(|tp_rank| Event::Calibrated {
                        tp_rank,
                        generation,
                        found: found.clone(),
                        duration: Duration::from_secs(2),
                    });
                }
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
                Effect::Checkpoint { name, .. } => self.checkpoint(&name),
                Effect::Commit { name, state } => {
                    assert_eq!(state.shards.len(), self.outboxes.len());
                    assert_eq!(state.keep_mask, self.keep_mask);
                    let new = self.saved.insert((id(), name.clone()), state).is_none();
                    assert!(new, "no two checkpoints share a name");
                    self.own.push_back(Event::CheckpointWritten { name, size_bytes: 8 });
                }
                Effect::Retain(kept) => {
                    self.saved.retain(|(run_id, name), _| {
                        *run_id != id() || kept.iter().any(|place| place.name == *name)
                    });
                }
                Effect::AbortSessions => {
                    self.outboxes.iter_mut().for_each(VecDeque::clear);
                    self.own.retain(|event| matches!(event, Event::CheckpointWritten { .. }));
                    if !self.run.state().has_ended() {
                        self.own.push_back(Event::SessionsAborted);
                    }
                }
                Effect::ReleaseWorkers => {
                    assert!(self.holds_workers, "there are workers to give back");
                    self.holds_workers = false;
                }
                Effect::Export { shards, keep_mask, checkpoint } => {
                    let state = &self.saved[&(checkpoint.run_id, checkpoint.name)];
                    assert_eq!(shards, state.shards);
                    assert_eq!(*keep_mask, state.keep_mask);
                    assert!(state.with_logits);
                    self.outboxes[0].push_back(Event::Exported { result: exported() });
                }
                Effect::WakeAt(time) => self.wakes.push(time),
                Effect::ReleaseAllButFirst | Effect::Refuse(_) => {}
            }
        }
        assert_eq!(kept_importance, None, "it goes with a decision");
    }

    /// Assigns workers when the run queues and there are enough.
    pub(crate) fn assign(&mut self) {
        let enough = |(at_least, _): &mut (usize, usize)| *at_least <= self.available;
        if let Some((_, most)) = self.queued.take_if(enough) {
            let count = most.min(self.available);
            let workers = (0..count).map(|rank| WorkerId(format!("w{rank}"))).collect();
            self.own.push_back(Event::WorkersAssigned { workers });
        }
    }

    fn load(&mut self, restore: Option<Restore>) {
        let dense = self.setup.dense();
        let count = self.outboxes.len();
        let placement = Placement::dense(dense, count).expect("enough heads");
        let (generation, keep_mask, placement) = match &restore {
            None => (Generation(0), KeepMask::full(dense), placement),
            Some(Restore { state, .. }) if state.placement.tp_degree() == count => {
                (state.generation, state.keep_mask.clone(), state.placement.clone())
            }
            Some(Restore { state, .. }) => {
                let moved = placement.restricted_to(&state.keep_mask).rebalanced(dense);
                (state.generation, state.keep_mask.clone(), moved)
            }
        };
        (self.placement, self.keep_mask) = (placement, keep_mask);
        self.acknowledged = vec![generation; count];
        self.loads.push(restore);
        self.all(|tp_rank| Event::Loaded { tp_rank, data_sha256: "d".into() });
    }

    fn evaluate(&mut self, measurement: Measurement) {
        let generation = self.run.generation().0 as usize;
        let nats = self.nats[generation.min(self.nats.len() - 1)];
        self.all(|tp_rank| match measurement {
            Measurement::Window { index } => Event::Evaluated {
                tp_rank,
                window_index: index,
                negative_log_likelihood: nats,
                predicted_tokens: 10,
                window_tokens: 64,
                duration: Duration::from_secs(1),
            },
            Measurement::Task { index } => Event::TaskEvaluated {
                tp_rank,
                task_index: index,
                score: task_score(&format!("task-{index}")),
                duration: Duration::from_secs(1),
            },
        });
    }

    fn checkpoint(&mut self, name: &str) {
        let fails = self.failing_checkpoints > 0;
        self.failing_checkpoints = self.failing_checkpoints.saturating_sub(1);
        let last = self.outboxes.len() - 1;
        for (tp_rank, outbox) in self.outboxes.iter_mut().enumerate() {
            let name = name.to_owned();
            if fails && tp_rank == last {
                outbox.push_back(Event::CheckpointFailed { name: name.clone(), cause: "disk full".into() });
                outbox.push_back(Event::Snapshotted { tp_rank, name });
            } else {
                outbox.push_back(Event::Snapshotted { tp_rank, name: name.clone() });
                let shard =
                    ShardFile { file: format!("{name}/rank-{tp_rank}"), sha256: "s".into(), size_bytes: 1 };
                outbox.push_back(Event::Checkpointed { tp_rank, name, shard });
            }
        }
    }

    fn recorded(&mut self, event: RunEvent) {
        assert_eq!(event.revision, self.log.len() as u64 + 1, "revisions rise by one");
        if let RunEventKind::Decision(decision) = &event.kind {
            let earlier = self.decisions().pop();
            let before = self.origin.as_ref().map_or(Generation(0), |origin| origin.generation);
            let (generation, sparsity) =
                earlier.map_or((before, 0.0), |earlier| (earlier.generation, earlier.sparsity));
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
        if self.skipped.contains(&step) {
            let report =
                RankReport { skipped: "the loss is NaN".into(), loss: f64::NAN, ..report(step, generation) };
            self.outboxes[tp_rank].push_back(Event::StepEnded { tp_rank, report });
            return;
        }
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
        skipped: String::new(),
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
