//! A small deterministic engine without tensors, for testing the services.
//!
//! Losses and scores are functions of seed, step, the groups' places in the unpruned model and a chain of digests over all
//! steps and masks so far, so that any tensor-parallel degree gives the same masks and a state that was restored wrongly
//! other ones. Ranks do not talk to each other.

use crate::{
    Calibration, CalibrationProgress, Engine, EngineError, ExportJob, ExportWritten, MOST_SKIPPED,
    MaskApplied, NllSum, PhaseTimes, ProjectionScores, Prompt, Rendezvous, Report, Restore, ShardEngine,
    ShardSetup, Snapshot, StepOutcome,
};
use model_spec::{ModelSpec, Projection};
use pruning::{DepthGoal, KeepMask};
use recipe::Shrink;
use sha2::{Digest, Sha256};
use sharding::Placement;
use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

const RENDEZVOUS: &str = "toy:";

/// What goes wrong at a step of a [`ToyEngine`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ToyFault {
    /// The loss is NaN, at that step and all that follow.
    NotFinite,
    /// The loss is NaN at that step alone.
    NotFiniteOnce,
    /// The thread hangs until its session is over.
    Stuck,
    /// A peer is gone, which is noticed at once.
    PeerLost,
    /// A peer is silent until the collective's timeout.
    PeerSilent,
    /// The tensor library fails.
    DeviceFailed,
    /// The engine panics.
    Panic,
}

/// See the module.
#[derive(Debug, Clone)]
pub struct ToyEngine {
    spec: ModelSpec,
    step_time: Duration,
    load_time: Duration,
    fault: Option<(u64, ToyFault)>,
    /// Set once the fault has happened, where it is to happen but once.
    spent: Option<Arc<AtomicBool>>,
}

impl ToyEngine {
    /// An engine for models of these dimensions; it never opens `ShardSetup::model`.
    #[must_use]
    pub fn new(spec: ModelSpec) -> Self {
        Self { spec, step_time: Duration::ZERO, load_time: Duration::ZERO, fault: None, spent: None }
    }

    /// Every step takes so long, and every pass over a task.
    #[must_use]
    pub fn with_step_time(mut self, step_time: Duration) -> Self {
        self.step_time = step_time;
        self
    }

    /// Loading takes so long.
    #[must_use]
    pub fn with_load_time(mut self, load_time: Duration) -> Self {
        self.load_time = load_time;
        self
    }

    /// `fault` happens at `step`, every time.
    #[must_use]
    pub fn with_fault(mut self, step: u64, fault: ToyFault) -> Self {
        self.fault = Some((step, fault));
        self
    }

    /// `fault` happens when `step` is first reached, and never again in this process.
    #[must_use]
    pub fn with_passing_fault(mut self, step: u64, fault: ToyFault) -> Self {
        self.fault = Some((step, fault));
        self.spent = Some(Arc::default());
        self
    }
}

impl Engine for ToyEngine {
    fn load(&self, setup: ShardSetup) -> Result<Box<dyn ShardEngine>, EngineError> {
        std::thread::sleep(self.load_time);
        let placement = Placement::dense(&self.spec, setup.tp_degree)
            .map_err(|error| EngineError::Refused(error.to_string()))?;
        if setup.tp_rank >= setup.tp_degree {
            return Err(EngineError::Refused(format!(
                "tensor-parallel rank {} is not below the degree {}",
                setup.tp_rank, setup.tp_degree
            )));
        }
        setup.progress.tick();
        let mut shard = ToyShard {
            spec: self.spec.clone(),
            step_time: self.step_time,
            fault: self.fault,
            spent: self.spent.clone(),
            joined: setup.tp_degree == 1,
            keep_mask: KeepMask::full(&self.spec),
            placement,
            generation: 0,
            chain: 0,
            skipped: 0,
            taught: BTreeSet::new(),
            setup,
        };
        if let Some(restore) = shard.setup.restore.clone() {
            shard.restore(&restore)?;
        }
        Ok(Box::new(shard))
    }

    fn export(&self, job: &ExportJob) -> Result<ExportWritten, EngineError> {
        if job.keep_mask.layers.len() != self.spec.layers.len() {
            return Err(EngineError::Refused("the keep mask is of another model".into()));
        }
        for (file, sha256) in &job.shards {
            let bytes = fs::read(file).map_err(|error| file_error(file, &error))?;
            if &hex(&Sha256::digest(&bytes)) != sha256 {
                return Err(EngineError::File(format!(
                    "`{}` has another digest than recorded",
                    file.display()
                )));
            }
        }
        if fs::read_dir(&job.out).is_ok_and(|mut entries| entries.next().is_some()) {
            return Err(EngineError::Refused(format!("`{}` is not empty", job.out.display())));
        }
        fs::create_dir_all(&job.out).map_err(|error| file_error(&job.out, &error))?;
        let pruned = job.keep_mask.pruned_spec(&self.spec);
        let mut manifest = format!("{{\"run_id\": {:?}, \"layers\": [", job.run_id);
        for (layer, widths) in pruned.layers.iter().enumerate() {
            let separator = if layer == 0 { "" } else { ", " };
            // Writing to a String cannot fail.
            let _ = write!(
                manifest,
                "{separator}[{}, {}, {}]",
                widths.query_head_count, widths.kv_head_count, widths.intermediate_size
            );
        }
        manifest.push_str("]}");
        for (name, text) in
            [("config.json", "{\"model_type\": \"llama\"}"), ("manifest.json", manifest.as_str())]
        {
            let file = job.out.join(name);
            fs::write(&file, text).map_err(|error| file_error(&file, &error))?;
        }
        Ok(ExportWritten {
            parameters: pruned.parameter_count(),
            weight_bytes: 4 * pruned.parameter_count(),
            model_type: "llama".into(),
            manifest_sha256: hex(&Sha256::digest(manifest.as_bytes())),
            max_logit_difference: 0.0,
            max_logit: 1.0,
            top_token_agreement: 1.0,
            mean_kl: 0.0,
        })
    }
}

struct ToyShard {
    spec: ModelSpec,
    step_time: Duration,
    fault: Option<(u64, ToyFault)>,
    spent: Option<Arc<AtomicBool>>,
    setup: ShardSetup,
    placement: Placement,
    keep_mask: KeepMask,
    generation: u64,
    joined: bool,
    /// Over all steps and masks so far; the same on every rank.
    chain: u64,
    /// Steps skipped in a row.
    skipped: u32,
    /// Windows that were taught.
    taught: BTreeSet<Vec<u32>>,
}

/// A rank's state as text.
struct ToySnapshot(String);

impl Snapshot for ToySnapshot {
    fn size_bytes(&self) -> u64 {
        self.0.len() as u64
    }

    fn write(self: Box<Self>, file: &Path) -> Result<String, EngineError> {
        let error = |error: &std::io::Error| file_error(file, error);
        let partial = file.with_extension("partial");
        fs::write(&partial, &self.0).map_err(|cause| error(&cause))?;
        fs::rename(&partial, file).map_err(|cause| error(&cause))?;
        Ok(hex(&Sha256::digest(self.0.as_bytes())))
    }
}

impl ToyShard {
    fn fail(&self, step: u64, fault: ToyFault) -> EngineError {
        match fault {
            ToyFault::NotFinite | ToyFault::NotFiniteOnce => {
                EngineError::NotFinite { what: "loss".into(), step, value: f64::NAN }
            }
            ToyFault::Stuck => {
                while !self.setup.progress.gives_up() {
                    std::thread::sleep(Duration::from_millis(5));
                }
                EngineError::Collective("the toy was stuck until it was told to give up".into())
            }
            ToyFault::PeerLost => EngineError::Collective("a peer closed its connection".into()),
            ToyFault::PeerSilent => {
                std::thread::sleep(self.setup.collective_timeout);
                EngineError::Collective(format!("no answer within {:?}", self.setup.collective_timeout))
            }
            ToyFault::DeviceFailed => EngineError::Device("the toy device has failed".into()),
            ToyFault::Panic => panic!("the toy engine panics at step {step}, as it was told"),
        }
    }

    /// What goes wrong at `step`.
    fn fault_at(&self, step: u64) -> Option<ToyFault> {
        let (at, fault) = self.fault?;
        let lasts = fault == ToyFault::NotFinite && self.spent.is_none();
        let due = step == at || (lasts && step > at);
        let spent = || self.spent.as_ref().is_some_and(|spent| spent.swap(true, Ordering::Relaxed));
        (due && !spent()).then_some(fault)
    }

    fn restore(&mut self, restore: &Restore) -> Result<(), EngineError> {
        let mut states = Vec::new();
        for (tp_rank, (file, sha256)) in restore.shards.iter().enumerate() {
            let text = fs::read_to_string(file).map_err(|error| file_error(file, &error))?;
            let bad = |what: &str| EngineError::File(format!("`{}` {what}", file.display()));
            if hex(&Sha256::digest(text.as_bytes())) != *sha256 {
                return Err(bad("has another digest than recorded"));
            }
            let mut lines = text.lines();
            let head =
                format!("toy rank {tp_rank} of {}, generation {}", restore.shards.len(), restore.generation);
            if lines.next() != Some(head.as_str()) {
                return Err(bad("is not the part of that rank and generation"));
            }
            let mut number = |name: &str| {
                let line = lines.next().and_then(|line| line.strip_prefix(name));
                line.and_then(|line| line.trim().parse::<u64>().ok()).ok_or_else(|| bad("is broken"))
            };
            let (chain, skipped) = (number("chain")?, number("skipped")?);
            let placement = lines.next().and_then(|line| line.strip_prefix("placement "));
            let placement: Option<Placement> = placement.and_then(|text| serde_json::from_str(text).ok());
            let placement = placement.ok_or_else(|| bad("is broken"))?;
            let taught = lines.filter_map(|line| line.strip_prefix("taught "));
            let taught: BTreeSet<Vec<u32>> =
                taught.map(|line| line.split(' ').filter_map(|token| token.parse().ok()).collect()).collect();
            states.push((chain, skipped, placement, taught));
        }
        let Some((chain, skipped, placement, taught)) = states.first().cloned() else {
            return Err(EngineError::File("the checkpoint has no files".into()));
        };
        if states.iter().any(|state| (state.0, state.1) != (chain, skipped)) {
            return Err(EngineError::File("the ranks' files are of different places".into()));
        }
        restore.keep_mask.check_fits(&self.spec).map_err(|error| EngineError::Refused(error.to_string()))?;
        // Who holds what depends on the masks before this one, so the same degree takes it over.
        self.placement = if placement.tp_degree() == self.setup.tp_degree {
            placement
        } else {
            let restricted = self.placement.restricted_to(&restore.keep_mask);
            match self.setup.recipe.pruning.as_ref().map(|pruning| pruning.shrink) {
                Some(Shrink::Live) => restricted.rebalanced(&self.spec),
                Some(Shrink::Never) | None => restricted,
            }
        };
        self.keep_mask = restore.keep_mask.clone();
        self.generation = restore.generation;
        self.chain = chain;
        self.skipped = u32::try_from(skipped).unwrap_or(0);
        self.taught = taught;
        Ok(())
    }

    fn require_group(&self) -> Result<(), EngineError> {
        if self.joined {
            return Ok(());
        }
        Err(EngineError::Refused("the group has not been joined".into()))
    }

    fn scores(&self, step: u64) -> Vec<ProjectionScores> {
        let wanted = self
            .setup
            .recipe
            .pruning
            .as_ref()
            .is_some_and(|pruning| pruning.criterion.is_scored_by_workers());
        if !wanted {
            return Vec::new();
        }
        let held = &self.placement.ranks[self.setup.tp_rank];
        let of_layer = |(layer, held): (usize, &sharding::RankLayer)| {
            Projection::ALL.map(|projection| {
                let units = match projection {
                    Projection::Q | Projection::O => &held.query_heads,
                    Projection::K | Projection::V => &held.kv_heads,
                    Projection::Gate | Projection::Up | Projection::Down => &held.channels,
                };
                let values = units
                    .iter()
                    .map(|&unit| {
                        score(
                            self.setup.recipe.seed ^ self.chain,
                            self.setup.recipe.seed,
                            step,
                            layer,
                            projection,
                            unit,
                        )
                    })
                    .collect();
                ProjectionScores { layer, projection, values }
            })
        };
        held.iter().enumerate().flat_map(of_layer).collect()
    }
}

impl ShardEngine for ToyShard {
    fn open_rendezvous(&mut self, host: &str) -> Result<Rendezvous, EngineError> {
        Ok(Rendezvous(format!("{RENDEZVOUS}{host}").into_bytes()))
    }

    fn join_group(&mut self, rendezvous: &Rendezvous, _host: &str) -> Result<(), EngineError> {
        if !rendezvous.0.starts_with(RENDEZVOUS.as_bytes()) {
            return Err(EngineError::Refused("the rendezvous is not of this engine".into()));
        }
        self.joined = true;
        Ok(())
    }

    fn teach(&mut self, rows: &[&[u32]]) -> Result<(), EngineError> {
        self.require_group()?;
        if self.setup.recipe.distillation.is_none() {
            return Err(EngineError::Refused("the recipe does not distil".into()));
        }
        if self.generation > 0 {
            return Err(EngineError::Refused(format!("generation {} is in force", self.generation)));
        }
        std::thread::sleep(self.step_time);
        self.setup.progress.tick();
        self.taught.extend(rows.iter().map(|row| row.to_vec()));
        Ok(())
    }

    fn calibrate(&mut self, rows: &[&[u32]], report: &mut Report<'_>) -> Result<Calibration, EngineError> {
        self.require_group()?;
        let depth = self.setup.recipe.pruning.as_ref().and_then(|pruning| pruning.depth);
        let Some(depth) = depth else {
            return Err(EngineError::Refused("the recipe's decisions need no calibration".into()));
        };
        if rows.is_empty() {
            return Err(EngineError::Refused("there is no window to calibrate on".into()));
        }
        let layers = self.spec.layers.len();
        for pass in 1..=layers as u64 {
            std::thread::sleep(self.step_time);
            self.setup.progress.tick();
            report(CalibrationProgress { passes: pass, total_passes: layers as u64 })?;
        }
        let seed = self.setup.recipe.seed ^ self.chain;
        let blocks = (0..layers).map(|layer| unit_interval(mix(seed ^ mix(layer as u64)))).collect();
        let mut calibration = Calibration { blocks, block_order: Vec::new() };
        if depth.iterative {
            let pruning = self.setup.recipe.pruning.as_ref();
            let goal = pruning.and_then(|pruning| DepthGoal::resolve(&self.spec, pruning, &depth).ok());
            calibration.block_order =
                goal.and_then(|goal| goal.select(&calibration.blocks).ok()).unwrap_or_default();
        }
        Ok(calibration)
    }

    fn train_step(&mut self, step: u64, micro_batches: &[Vec<&[u32]>]) -> Result<StepOutcome, EngineError> {
        self.require_group()?;
        if self.setup.recipe.distillation.is_some()
            && micro_batches.iter().flatten().any(|row| !self.taught.contains(*row))
        {
            return Err(EngineError::Refused(format!("step {step} has a window that was not taught")));
        }
        let mut skipped = None;
        match self.fault_at(step) {
            Some(fault @ (ToyFault::NotFinite | ToyFault::NotFiniteOnce)) => {
                if self.skipped == MOST_SKIPPED {
                    return Err(self.fail(step, fault));
                }
                skipped = Some("the loss is NaN".to_owned());
            }
            Some(
                fault @ (ToyFault::PeerLost
                | ToyFault::PeerSilent
                | ToyFault::DeviceFailed
                | ToyFault::Panic
                | ToyFault::Stuck),
            ) => return Err(self.fail(step, fault)),
            None => {}
        }
        std::thread::sleep(self.step_time);
        self.setup.progress.tick();
        let predicted: usize = micro_batches.iter().flatten().map(|row| row.len().saturating_sub(1)).sum();
        if predicted == 0 {
            return Err(EngineError::Refused(format!("step {step} has no token to predict")));
        }
        let started = Instant::now();
        let scores = if skipped.is_some() { Vec::new() } else { self.scores(step) };
        let loss = match skipped {
            Some(_) => f64::NAN,
            None => {
                let noise = 0.01 * unit_interval(mix(self.chain));
                2.0 + 3.0 / (1.0 + step as f64) + self.keep_mask.sparsity(&self.spec) + noise
            }
        };
        self.skipped = if skipped.is_some() { self.skipped + 1 } else { 0 };
        if skipped.is_none() {
            let tokens = micro_batches.iter().flatten().flat_map(|row| row.iter());
            let read = tokens.fold(0, |read, token| mix(read ^ u64::from(*token)));
            self.chain = mix(self.chain ^ mix(step) ^ read);
        }
        let recipe = &self.setup.recipe;
        Ok(StepOutcome {
            loss,
            skipped,
            grad_norm: 0.5 + unit_interval(mix(recipe.seed ^ mix(step))),
            learning_rate: recipe.learning_rate_at(step),
            scores,
            score_time: started.elapsed(),
            phase_times: PhaseTimes::default(),
        })
    }

    fn apply_mask(
        &mut self,
        generation: u64,
        keep_mask: &KeepMask,
        calibration: &[&[u32]],
    ) -> Result<MaskApplied, EngineError> {
        let Some(pruning) = &self.setup.recipe.pruning else {
            return Err(EngineError::Refused("the recipe does not prune".into()));
        };
        if generation == self.generation {
            return Ok(MaskApplied { received_groups: 0 });
        }
        if generation != self.generation + 1 || keep_mask.layers.len() != self.keep_mask.layers.len() {
            return Err(EngineError::Refused(format!(
                "generation {generation} does not follow {}",
                self.generation
            )));
        }
        keep_mask
            .check_subset_of(&self.keep_mask)
            .map_err(|error| EngineError::Refused(error.to_string()))?;
        if pruning.compensation.least_squares().is_some() && calibration.is_empty() {
            return Err(EngineError::Refused("there are no windows to calibrate on".into()));
        }
        let stays = self.placement.restricted_to(keep_mask);
        let next = match pruning.shrink {
            Shrink::Live => stays.rebalanced(&self.spec),
            Shrink::Never => stays,
        };
        let rank = self.setup.tp_rank;
        let received =
            |now: &[usize], then: &[usize]| then.iter().filter(|unit| !now.contains(unit)).count() as u64;
        let received_groups = self.placement.ranks[rank]
            .iter()
            .zip(&next.ranks[rank])
            .map(|(now, then)| {
                received(&now.kv_heads, &then.kv_heads) + received(&now.channels, &then.channels)
            })
            .sum();
        self.placement = next;
        self.keep_mask = keep_mask.clone();
        self.generation = generation;
        let kept = keep_mask.layers.iter().flat_map(|layer| layer.kv_heads.iter().chain(&layer.channels));
        self.chain = kept.fold(mix(self.chain ^ generation), |chain, unit| mix(chain ^ *unit as u64));
        self.setup.progress.tick();
        Ok(MaskApplied { received_groups })
    }

    fn evaluate(&mut self, rows: &[&[u32]], _rows_per_pass: usize) -> Result<NllSum, EngineError> {
        self.require_group()?;
        self.setup.progress.tick();
        let predicted: usize = rows.iter().map(|row| row.len().saturating_sub(1)).sum();
        let each = 2.0 + self.keep_mask.sparsity(&self.spec);
        Ok(NllSum { negative_log_likelihood: each * predicted as f64, predicted: predicted as u64 })
    }

    fn continuation_log_likelihoods(&mut self, prompts: &[Prompt<'_>]) -> Result<Vec<Vec<f64>>, EngineError> {
        self.require_group()?;
        std::thread::sleep(self.step_time);
        let each = 2.0 + self.keep_mask.sparsity(&self.spec);
        prompts
            .iter()
            .map(|prompt| {
                if prompt.context.is_empty() || prompt.continuations.iter().any(|tokens| tokens.is_empty()) {
                    return Err(EngineError::Refused("a context or continuation is empty".into()));
                }
                Ok(prompt.continuations.iter().map(|tokens| -each * tokens.len() as f64).collect())
            })
            .collect()
    }

    fn snapshot(&mut self, prompts: &[Vec<u32>]) -> Result<Box<dyn Snapshot>, EngineError> {
        self.require_group()?;
        let placement = serde_json::to_string(&self.placement)
            .map_err(|error| EngineError::File(format!("the placement cannot be written: {error}")))?;
        let mut text = format!(
            "toy rank {} of {}, generation {}\nchain {}\nskipped {}\nplacement {placement}\n",
            self.setup.tp_rank, self.setup.tp_degree, self.generation, self.chain, self.skipped
        );
        for window in &self.taught {
            let tokens: Vec<String> = window.iter().map(u32::to_string).collect();
            // Writing to a String cannot fail.
            let _ = writeln!(text, "taught {}", tokens.join(" "));
        }
        if !prompts.is_empty() {
            let _ = writeln!(text, "prompts {prompts:?}");
        }
        Ok(Box::new(ToySnapshot(text)))
    }

    /// As if every live weight of this rank took four bytes.
    fn memory_bytes(&self) -> u64 {
        let held = &self.placement.ranks[self.setup.tp_rank];
        let (head, hidden) = (self.spec.head_dim as u64, self.spec.hidden_size as u64);
        let rows: u64 = held
            .iter()
            .map(|layer| {
                2 * head * (layer.query_heads.len() + layer.kv_heads.len()) as u64
                    + 3 * layer.channels.len() as u64
            })
            .sum();
        4 * hidden * rows
    }
}

/// In `(0, 2.2)`: mostly the group's own worth, a tenth of it changing from step to step.
fn score(chained: u64, seed: u64, step: u64, layer: usize, projection: Projection, unit: usize) -> f64 {
    let place = mix(mix(seed ^ mix(layer as u64)) ^ mix((projection.index() as u64) << 32 | unit as u64));
    let worth = unit_interval(place) + unit_interval(mix(place));
    worth * (1.0 + 0.1 * unit_interval(mix(place ^ mix(step ^ chained))))
}

/// In `(0, 1]`.
fn unit_interval(bits: u64) -> f64 {
    ((bits >> 11) + 1) as f64 / (1_u64 << 53) as f64
}

/// The output function of SplitMix64 (Steele, Lea & Flood 2014).
fn mix(value: u64) -> u64 {
    let value = value.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let value = (value ^ (value >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    value ^ (value >> 31)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        // Writing to a String cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

fn file_error(path: &Path, error: &std::io::Error) -> EngineError {
    EngineError::File(format!("`{}`: {error}", path.display()))
}
