//! A small deterministic engine without tensors, for testing the services.
//!
//! Losses and scores are functions of seed, step and the groups' places in the unpruned model alone, so that any
//! tensor-parallel degree gives the same masks. Ranks do not talk to each other.

use crate::{
    Engine, EngineError, ExportJob, ExportWritten, MaskApplied, NllSum, PhaseTimes, ProjectionScores, Prompt,
    Rendezvous, ShardEngine, ShardSetup, StepOutcome,
};
use model_spec::{ModelSpec, Projection};
use pruning::KeepMask;
use recipe::Shrink;
use sha2::{Digest, Sha256};
use sharding::Placement;
use std::collections::HashSet;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

const RENDEZVOUS: &str = "toy:";

/// What goes wrong at a step of a [`ToyEngine`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ToyFault {
    /// The loss is NaN.
    NotFinite,
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
}

impl ToyEngine {
    /// An engine for models of these dimensions; it never opens `ShardSetup::model`.
    #[must_use]
    pub fn new(spec: ModelSpec) -> Self {
        Self { spec, step_time: Duration::ZERO, load_time: Duration::ZERO, fault: None }
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
        let keep_mask = KeepMask::full(&self.spec);
        Ok(Box::new(ToyShard {
            spec: self.spec.clone(),
            step_time: self.step_time,
            fault: self.fault,
            joined: setup.tp_degree == 1,
            setup,
            placement,
            keep_mask,
            generation: 0,
            taught: HashSet::new(),
        }))
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
    setup: ShardSetup,
    placement: Placement,
    keep_mask: KeepMask,
    generation: u64,
    joined: bool,
    /// Windows that were taught.
    taught: HashSet<Vec<u32>>,
}

impl ToyShard {
    fn fail(&self, step: u64, fault: ToyFault) -> EngineError {
        match fault {
            ToyFault::NotFinite => EngineError::NotFinite { what: "loss".into(), step, value: f64::NAN },
            ToyFault::PeerLost => EngineError::Collective("a peer closed its connection".into()),
            ToyFault::PeerSilent => {
                std::thread::sleep(self.setup.collective_timeout);
                EngineError::Collective(format!("no answer within {:?}", self.setup.collective_timeout))
            }
            ToyFault::DeviceFailed => EngineError::Device("the toy device has failed".into()),
            ToyFault::Panic => panic!("the toy engine panics at step {step}, as it was told"),
        }
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
                    .map(|&unit| score(self.setup.recipe.seed, step, layer, projection, unit))
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
        self.taught.extend(rows.iter().map(|row| row.to_vec()));
        Ok(())
    }

    fn train_step(&mut self, step: u64, micro_batches: &[Vec<&[u32]>]) -> Result<StepOutcome, EngineError> {
        self.require_group()?;
        if self.setup.recipe.distillation.is_some()
            && micro_batches.iter().flatten().any(|row| !self.taught.contains(*row))
        {
            return Err(EngineError::Refused(format!("step {step} has a window that was not taught")));
        }
        if let Some((at, fault)) = self.fault
            && at == step
        {
            return Err(self.fail(step, fault));
        }
        std::thread::sleep(self.step_time);
        let predicted: usize = micro_batches.iter().flatten().map(|row| row.len().saturating_sub(1)).sum();
        if predicted == 0 {
            return Err(EngineError::Refused(format!("step {step} has no token to predict")));
        }
        let started = Instant::now();
        let scores = self.scores(step);
        let recipe = &self.setup.recipe;
        Ok(StepOutcome {
            loss: 2.0 + 3.0 / (1.0 + step as f64) + self.keep_mask.sparsity(&self.spec),
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
        Ok(MaskApplied { received_groups })
    }

    fn evaluate(&mut self, rows: &[&[u32]], _rows_per_pass: usize) -> Result<NllSum, EngineError> {
        self.require_group()?;
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

    fn checkpoint(&mut self, file: &Path, prompts: &[Vec<u32>]) -> Result<String, EngineError> {
        self.require_group()?;
        let text = format!(
            "toy rank {} of {}, generation {}, prompts {prompts:?}\n",
            self.setup.tp_rank, self.setup.tp_degree, self.generation
        );
        fs::write(file, &text).map_err(|error| file_error(file, &error))?;
        Ok(hex(&Sha256::digest(text.as_bytes())))
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
fn score(seed: u64, step: u64, layer: usize, projection: Projection, unit: usize) -> f64 {
    let place = mix(mix(seed ^ mix(layer as u64)) ^ mix((projection.index() as u64) << 32 | unit as u64));
    let worth = unit_interval(place) + unit_interval(mix(place));
    worth * (1.0 + 0.1 * unit_interval(mix(place ^ mix(step))))
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
