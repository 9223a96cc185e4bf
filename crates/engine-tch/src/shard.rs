//! One rank's shard: the optimizer step, evaluation and checkpoints, over the pieces of the other modules.

use crate::communicator::{Alone, Communicator, Gloo, Meeting, Nccl, ReduceOp, Store, Watched, unique_id};
use crate::device;
use crate::dropout::{Dropout, splitmix};
use crate::export;
use crate::factors::{Factor, FactorLayout, is_replicated};
use crate::fault::{Fault, Result};
use crate::flap;
use crate::frozen::FrozenFormat;
use crate::importance::{self, LiveGroups, ScoreInputs};
use crate::memory;
use crate::model::{Adapters, Model, Training};
use crate::observed::Observed;
use crate::optimizer::Moments;
use crate::optimizer::lora_rite::{self, Rule, Side};
use crate::restore::Restored;
use crate::source::{Source, compute_kind};
use crate::state_file::{self, ledger_prefix};
use crate::tangent;
use crate::teacher::Teacher;
use engine::{
    Calibration, CollectiveBackend, Engine, EngineError, ExportJob, ExportWritten, MOST_SKIPPED, MaskApplied,
    NllSum, PhaseTimes, ProjectionScores, Prompt, Rendezvous, Report, ShardEngine, ShardSetup, Snapshot,
    StepOutcome,
};
use model_spec::{ModelSpec, Projection};
use pruning::KeepMask;
use recipe::{Compute, Criterion, Optimizer};
use sharding::{Placement, vocabulary_rows};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tch::{Device, Kind, Tensor};

/// The engine on libtorch.
pub struct TchEngine {
    device: Device,
    threads: usize,
    /// Program whose sub-command `logits` reloads an exported folder (see [`crate::write_logits`]).
    logits_program: PathBuf,
    backend: Option<CollectiveBackend>,
    random: Option<ModelSpec>,
}

impl TchEngine {
    /// Computes on `device` with `threads` threads of its own for each thread that asks. `logits_program` is run as
    /// `PROGRAM logits --model DIR --tokens-file FILE --out FILE` to check exports in a process of their own.
    ///
    /// Sets the process's allocator to keep freed memory (see `memory`).
    #[must_use]
    pub fn new(device: Device, threads: usize, logits_program: PathBuf) -> Self {
        memory::keep_freed_memory();
        Self { device, threads, logits_program, backend: None, random: None }
    }

    /// Groups of this engine's shards use `backend`, whatever is chosen for them: Gloo where two ranks share a GPU.
    #[must_use]
    pub fn with_backend(self, backend: CollectiveBackend) -> Self {
        Self { backend: Some(backend), ..self }
    }

    /// Shards hold random weights of shape `spec`, made on the device, and read no model: for measurements.
    #[must_use]
    pub fn with_random_weights(self, spec: ModelSpec) -> Self {
        Self { random: Some(spec), ..self }
    }

    fn use_threads(&self) {
        tch::set_num_threads(i32::try_from(self.threads.max(1)).unwrap_or(i32::MAX));
    }
}

impl Engine for TchEngine {
    fn load(&self, setup: ShardSetup) -> std::result::Result<Box<dyn ShardEngine>, EngineError> {
        self.use_threads();
        let source = match &self.random {
            Some(spec) => Source::random(spec.clone(), self.device),
            None => Source::open(&setup.model)?,
        };
        check_compute(&setup, self.device)?;
        let mut shard = Shard::load_from(setup, source, self.device)?;
        shard.fixed_backend = self.backend;
        Ok(Box::new(shard))
    }

    fn export(&self, job: &ExportJob) -> std::result::Result<ExportWritten, EngineError> {
        self.use_threads();
        let _no_grad = tch::no_grad_guard();
        Ok(export::export(job, &self.logits_program)?)
    }
}

/// What one rank holds of a run.
pub(crate) struct Shard {
    pub(crate) setup: ShardSetup,
    pub(crate) source: Source,
    pub(crate) placement: Placement,
    pub(crate) keep_mask: KeepMask,
    pub(crate) generation: u64,
    pub(crate) model: Model,
    pub(crate) layout: FactorLayout,
    /// Master copy, in f32 or f64.
    pub(crate) factors: Tensor,
    /// Pairs that knots have frozen, oldest first, laid out like the factors.
    pub(crate) ledger: Vec<Tensor>,
    pub(crate) moments: Moments,
    pub(crate) gradients: Tensor,
    pub(crate) observed: Option<Vec<Observed>>,
    pub(crate) live: Vec<LiveGroups>,
    /// Empty without distillation.
    pub(crate) teacher: Teacher,
    /// Steps skipped in a row.
    pub(crate) skipped: u32,
    pub(crate) communicator: Box<dyn Communicator>,
    pub(crate) device: Device,
    rendezvous: Option<Store>,
    /// Whatever the group is told.
    fixed_backend: Option<CollectiveBackend>,
    chosen_backend: CollectiveBackend,
    _no_grad: tch::NoGradGuard,
}

impl Shard {
    #[cfg(test)]
    pub(crate) fn load(setup: ShardSetup, device: Device) -> Result<Self> {
        check_compute(&setup, device)?;
        let source = Source::open(&setup.model)?;
        Self::load_from(setup, source, device)
    }

    pub(crate) fn load_from(setup: ShardSetup, source: Source, device: Device) -> Result<Self> {
        let no_grad = tch::no_grad_guard();
        device::make_current(device)?;
        if let Some(violation) = setup.recipe.violations().first() {
            return Err(Fault::Refused(violation.to_string()));
        }
        let precision = setup.recipe.precision;
        let spec = source.spec();
        if let Some(violation) = setup.recipe.violations_on(spec.vocab_size).first() {
            return Err(Fault::Refused(violation.to_string()));
        }
        let restored =
            setup.restore.as_ref().map(|restore| Restored::read(restore, &setup, spec)).transpose()?;
        let placement = match &restored {
            Some(restored) => restored.placement.clone(),
            None => {
                Placement::dense(spec, setup.tp_degree).map_err(|error| Fault::Refused(error.to_string()))?
            }
        };
        let Some(held) = placement.ranks.get(setup.tp_rank) else {
            return Err(Fault::Refused(format!(
                "tensor-parallel rank {} is not below the degree {}",
                setup.tp_rank, setup.tp_degree
            )));
        };
        let (storage, compute) = (FrozenFormat::of(precision.storage), compute_kind(precision.compute));
        let vocabulary = vocabulary_rows(spec.vocab_size, setup.tp_degree, setup.tp_rank);
        let model = Model::load(&source, held, vocabulary, storage, compute, device, &setup.progress)?;
        source.release_pages();
        let layout = FactorLayout::new(spec, held, setup.recipe.lora.rank);
        let master = if compute == Kind::Double { Kind::Double } else { Kind::Float };
        let lora_rank = setup.recipe.lora.rank as i64;
        let factors = layout.fresh(spec, held, setup.recipe.seed, master, device)?;
        let live = held.iter().map(|_| LiveGroups::default()).collect();
        let keep_mask = KeepMask::full(spec);
        let mut shard = Self {
            moments: Moments::zeros(&setup.recipe.optimizer, &factors, layout.pair_count(), lora_rank)?,
            gradients: factors.f_zeros_like()?,
            observed: None,
            source,
            placement,
            keep_mask,
            generation: 0,
            model,
            layout,
            factors,
            ledger: Vec::new(),
            live,
            teacher: Teacher::default(),
            skipped: 0,
            communicator: Box::new(Watched::new(Box::new(Alone), setup.progress.clone())),
            device,
            rendezvous: None,
            fixed_backend: None,
            chosen_backend: default_backend(device),
            setup,
            _no_grad: no_grad,
        };
        if let Some(restored) = restored {
            restored.put_into(&mut shard)?;
        }
        Ok(shard)
    }

    /// Layers that have gone as a whole, by place.
    pub(crate) fn removed_layers(&self) -> Vec<bool> {
        self.keep_mask.layers.iter().map(pruning::LayerKeep::is_removed).collect()
    }

    pub(crate) fn held(&self) -> &[sharding::RankLayer] {
        &self.placement.ranks[self.setup.tp_rank]
    }

    /// The factors in the format of the products.
    pub(crate) fn compute_factors(&self) -> Result<Tensor> {
        Ok(self.factors.f_to_kind(compute_kind(self.setup.recipe.precision.compute))?)
    }

    /// Frozen pairs in the format of the products.
    pub(crate) fn compute_ledger(&self) -> Result<Vec<Tensor>> {
        let kind = compute_kind(self.setup.recipe.precision.compute);
        self.ledger.iter().map(|frozen| Ok(frozen.f_to_kind(kind)?)).collect()
    }

    /// Freezes the pair that was tuned and begins a fresh one, where a knot is due before `step` and not tied yet.
    pub(crate) fn tie_knot(&mut self, step: u64) -> Result<()> {
        let recipe = &self.setup.recipe;
        let due = recipe.chain.as_ref().map_or(0, |chain| chain.frozen_pairs(step));
        if self.ledger.len() >= due {
            return Ok(());
        }
        let held = self.placement.ranks[self.setup.tp_rank].clone();
        // Keyed by the knot, so that no two pairs begin alike.
        let seed = splitmix(recipe.seed ^ (due as u64) << 32);
        let fresh = self.layout.fresh(self.source.spec(), &held, seed, self.factors.kind(), self.device)?;
        let lora_rank = recipe.lora.rank as i64;
        self.moments = Moments::zeros(&recipe.optimizer, &fresh, self.layout.pair_count(), lora_rank)?;
        self.ledger.push(std::mem::replace(&mut self.factors, fresh));
        tracing::info!(step, knot = due, "knot tied");
        Ok(())
    }

    fn step(&mut self, step: u64, micro_batches: &[Vec<&[u32]>]) -> Result<StepOutcome> {
        let recipe = self.setup.recipe.clone();
        let predictions: usize = micro_batches.iter().flatten().map(|row| row.len().saturating_sub(1)).sum();
        if predictions == 0 {
            return Err(Fault::Refused(format!("step {step} has no token to predict")));
        }
        let _ = self.gradients.f_zero_()?;
        let criterion = recipe.pruning.as_ref().map(|pruning| pruning.criterion);
        self.prepare_observed(criterion)?;
        self.tie_knot(step)?;
        let (factors, ledger) = (self.compute_factors()?, self.compute_ledger()?);
        let mut total = 0.0;
        let mut first_token = 0;
        let mut times = PhaseTimes::default();
        for rows in micro_batches {
            let adapters = Adapters {
                layout: &self.layout,
                factors: &factors,
                ledger: &ledger,
                lora_rank: recipe.lora.rank,
                scaling: recipe.lora.scaling(),
                dropout: Dropout { probability: recipe.lora.dropout, seed: recipe.seed, step },
            };
            let soft_targets = match &recipe.distillation {
                Some(distillation) => Some(self.teacher.targets(rows, distillation.weight)?),
                None => None,
            };
            let training = Training {
                gradients: &self.gradients,
                observed: self.observed.as_deref_mut(),
                loss_scale: 1.0 / predictions as f64,
                first_token,
                recompute: recipe.recompute,
                soft_targets,
                times: &mut times,
            };
            let (nll, _) = self.model.negative_log_likelihood(
                rows,
                &adapters,
                Some(training),
                self.communicator.as_mut(),
            )?;
            total += nll;
            first_token += rows.iter().map(|row| row.len() as i64).sum::<i64>();
        }
        drop(factors);
        let loss = total / predictions as f64;
        // Both numbers are the same on all ranks, so all skip the step or none does.
        if !loss.is_finite() {
            let fault = Fault::NotFinite { what: "loss".into(), step, value: loss };
            return self.skip(step, loss, f64::NAN, fault, times);
        }
        let passed = Instant::now();
        self.communicator.all_reduce_sum(&mut self.layout.replicated(&self.gradients)?)?;
        let grad_norm = self.gradient_norm()?;
        if !grad_norm.is_finite() {
            let fault = self.name_bad_gradient(step, grad_norm)?;
            return self.skip(step, loss, grad_norm, fault, times);
        }
        // LoRA-RITE bounds another norm.
        if let (Some(max_norm), Optimizer::AdamW(_)) = (recipe.max_grad_norm, &recipe.optimizer) {
            let _ = self.gradients.f_mul_scalar_((max_norm / (grad_norm + 1e-6)).min(1.0))?;
        }
        let started = Instant::now();
        let scores = match criterion {
            Some(criterion) => self.scores(step, criterion, importance::tile_elements(self.device))?,
            None => Vec::new(),
        };
        let score_time = started.elapsed();
        let learning_rate = recipe.learning_rate_at(step);
        self.update(step, learning_rate)?;
        times.optimizer = passed.elapsed().saturating_sub(score_time);
        self.skipped = 0;
        Ok(StepOutcome {
            loss,
            grad_norm,
            learning_rate,
            scores,
            skipped: None,
            score_time,
            phase_times: times,
        })
    }

    /// Steps the factors by their gradients.
    fn update(&mut self, step: u64, learning_rate: f64) -> Result<()> {
        let recipe = self.setup.recipe.clone();
        match &recipe.optimizer {
            Optimizer::AdamW(adamw) => {
                self.moments.adamw_step(&mut self.factors, &self.gradients, learning_rate, adamw)
            }
            Optimizer::LoraRite(choice) => {
                let pairs = self.pairs()?;
                self.moments.updates += 1;
                let Some(moments) = &mut self.moments.pairs else {
                    return Err(Fault::Refused("the shard was loaded for another optimizer".into()));
                };
                let rule = Rule {
                    choice,
                    escaped_mass: choice.escaped_mass.unwrap_or(recipe.pruning.is_some()),
                    learning_rate,
                    max_norm: recipe.max_grad_norm,
                    update: self.moments.updates,
                };
                let taken = lora_rite::step(&pairs, moments, &rule, self.communicator.as_mut())?;
                tracing::debug!(step, norm = taken.norm, "unmagnified gradients");
                if taken.left_out > 0 {
                    tracing::warn!(
                        step,
                        factors = taken.left_out,
                        "no step: the RMS exceeds optimizer.max_rms"
                    );
                }
                Ok(())
            }
        }
    }

    /// The factors of all projections with what LoRA-RITE remembers of them.
    fn pairs(&self) -> Result<Vec<lora_rite::Pair>> {
        let spec = self.source.spec();
        let [moments, bases] = &self.moments.flats;
        let mut pairs = Vec::new();
        for (layer, kept) in self.keep_mask.layers.iter().enumerate() {
            for projection in Projection::ALL {
                let kept = match projection {
                    Projection::Q | Projection::O => kept.query_heads.len() * spec.head_dim,
                    Projection::K | Projection::V => kept.kv_heads.len() * spec.head_dim,
                    Projection::Gate | Projection::Up | Projection::Down => kept.channels.len(),
                };
                let side = |factor| -> Result<Side> {
                    let view = |flat| -> Result<Tensor> {
                        let view = self.layout.view(flat, layer, projection, factor)?;
                        Ok(match factor {
                            Factor::A => view.f_tr()?,
                            Factor::B => view,
                        })
                    };
                    let split = !is_replicated(projection, factor);
                    Ok(Side {
                        factor: view(&self.factors)?,
                        gradient: view(&self.gradients)?,
                        moment: view(moments)?,
                        basis: view(bases)?,
                        rows: if split { kept } else { spec.hidden_size },
                        split,
                    })
                };
                pairs.push([side(Factor::B)?, side(Factor::A)?]);
            }
        }
        Ok(pairs)
    }

    /// The tensors that are laid out like the factors, by the prefix under which checkpoints keep them.
    pub(crate) fn flats(&self) -> Vec<(String, &Tensor)> {
        let [first, second] = Moments::names(&self.setup.recipe.optimizer);
        let [of_first, of_second] = &self.moments.flats;
        let mut flats = vec![("lora".to_owned(), &self.factors)];
        flats.extend([(first.to_owned(), of_first), (second.to_owned(), of_second)]);
        flats.extend(self.ledger.iter().enumerate().map(|(knot, frozen)| (ledger_prefix(knot), frozen)));
        flats
    }

    /// Ends a step that cannot be taken, unless too many before it could not be either.
    fn skip(
        &mut self,
        step: u64,
        loss: f64,
        grad_norm: f64,
        fault: Fault,
        phase_times: PhaseTimes,
    ) -> Result<StepOutcome> {
        if self.skipped >= MOST_SKIPPED {
            return Err(fault);
        }
        self.skipped += 1;
        Ok(StepOutcome {
            loss,
            grad_norm,
            learning_rate: self.setup.recipe.learning_rate_at(step),
            scores: Vec::new(),
            skipped: Some(EngineError::from(fault).to_string()),
            score_time: Duration::ZERO,
            phase_times,
        })
    }

    /// Global L2 norm: split factors add up over ranks, replicated ones count once.
    fn gradient_norm(&mut self) -> Result<f64> {
        let square =
            |part: Tensor| -> Result<Tensor> { Ok(part.f_to_kind(Kind::Double)?.f_square()?.f_sum(None)?) };
        let replicated = square(self.layout.replicated(&self.gradients)?)?;
        let mut split = square(self.layout.split(&self.gradients)?)?.f_view([1i64])?;
        self.communicator.all_reduce_sum(&mut split)?;
        Ok((replicated.f_double_value(&[])? + split.f_double_value(&[0])?).sqrt())
    }

    /// The first gradient that is not finite on any rank: all ranks name the same.
    pub(crate) fn name_bad_gradient(&mut self, step: u64, norm: f64) -> Result<Fault> {
        let places: Vec<(usize, Projection, Factor)> = (0..self.layout.layer_count())
            .flat_map(|layer| Projection::ALL.map(|projection| (layer, projection)))
            .flat_map(|(layer, projection)| Factor::BOTH.map(|factor| (layer, projection, factor)))
            .collect();
        let mut first = places.len();
        for (place, (layer, projection, factor)) in places.iter().enumerate() {
            let gradient = self.layout.view(&self.gradients, *layer, *projection, *factor)?;
            if gradient.f_isfinite()?.f_all()?.f_int64_value(&[])? == 0 {
                first = place;
                break;
            }
        }
        let mut highest = Tensor::f_full([1i64], -(first as f64), (Kind::Double, self.device))?;
        self.communicator.all_reduce(&mut highest, ReduceOp::Max)?;
        let what = match places.get(-highest.f_double_value(&[0])? as usize) {
            Some((layer, projection, factor)) => {
                format!("gradient of layer {layer} {projection} {}", factor.name())
            }
            None => "gradient norm".into(),
        };
        Ok(Fault::NotFinite { what, step, value: norm })
    }

    pub(crate) fn scores(
        &mut self,
        step: u64,
        criterion: Criterion,
        tile_elements: i64,
    ) -> Result<Vec<ProjectionScores>> {
        let _span = tracing::info_span!("score pass", step).entered();
        let gradients = match criterion {
            Criterion::Tangent => {
                tangent::gradients(&self.layout, &self.factors, &self.gradients, self.communicator.as_mut())?
            }
            Criterion::LoraPrune { .. }
            | Criterion::Taylor
            | Criterion::Magnitude
            | Criterion::Wanda
            | Criterion::Flap
            | Criterion::Random => self.gradients.shallow_clone(),
        };
        let inputs = ScoreInputs {
            layout: &self.layout,
            factors: &self.factors,
            gradients: &gradients,
            observed: self.observed.as_deref(),
            ledger: &self.ledger,
            scaling: self.setup.recipe.lora.scaling(),
            head_dim: self.source.spec().head_dim as i64,
            step,
            tile_elements,
        };
        if criterion == Criterion::Flap {
            return flap::scores(&self.model.layers, &self.live, &inputs, self.communicator.as_mut());
        }
        let mut all = Vec::new();
        for (layer, (shard, live)) in self.model.layers.iter().zip(&self.live).enumerate() {
            all.extend(importance::score_layer(criterion, layer, shard, live, &inputs)?);
        }
        Ok(all)
    }

    /// Zero sums of what the criterion wants beside the factors' gradients; those of the step before go first.
    fn prepare_observed(&mut self, criterion: Option<Criterion>) -> Result<()> {
        self.observed = None;
        let Some(criterion) = criterion else { return Ok(()) };
        let kind = self.factors.kind();
        let layers = self.model.layers.iter();
        self.observed = layers.map(|layer| Observed::zeros(criterion, layer, kind)).collect::<Result<_>>()?;
        Ok(())
    }

    /// Has the unpruned model read those of `rows` that it has not read yet.
    fn teach_rows(&mut self, rows: &[&[u32]]) -> Result<()> {
        let Some(distillation) = self.setup.recipe.distillation else {
            return Err(Fault::Refused("the recipe does not distil".into()));
        };
        if self.generation > 0 {
            return Err(Fault::Refused(format!(
                "generation {} is in force: only the unpruned model teaches",
                self.generation
            )));
        }
        let unread = self.teacher.unread(rows);
        if unread.is_empty() {
            return Ok(());
        }
        let no_factors = self.compute_factors()?.f_zeros_like()?;
        let adapters = Adapters::evaluating(&self.layout, &no_factors, &[], &self.setup.recipe.lora);
        let read =
            self.model.likeliest(&unread, &adapters, distillation.top_k, self.communicator.as_mut())?;
        self.teacher.keep(&unread, &read)
    }

    pub(crate) fn evaluate_rows(&mut self, rows: &[&[u32]], rows_per_pass: usize) -> Result<NllSum> {
        let (factors, ledger) = (self.compute_factors()?, self.compute_ledger()?);
        let mut sum = NllSum::default();
        for rows in rows.chunks(rows_per_pass.max(1)) {
            let adapters = Adapters::evaluating(&self.layout, &factors, &ledger, &self.setup.recipe.lora);
            let (nll, predicted) =
                self.model.negative_log_likelihood(rows, &adapters, None, self.communicator.as_mut())?;
            sum.negative_log_likelihood += nll;
            sum.predicted += predicted;
        }
        Ok(sum)
    }

    fn judge(&mut self, prompts: &[Prompt<'_>]) -> Result<Vec<Vec<f64>>> {
        let (factors, ledger) = (self.compute_factors()?, self.compute_ledger()?);
        let adapters = Adapters::evaluating(&self.layout, &factors, &ledger, &self.setup.recipe.lora);
        self.model.continuation_log_likelihoods(prompts, &adapters, self.communicator.as_mut())
    }

    /// Logits `[tokens of all prompts, vocabulary on this rank]`.
    pub(crate) fn prompt_logits(&mut self, prompts: &[Vec<u32>]) -> Result<Tensor> {
        let (factors, ledger) = (self.compute_factors()?, self.compute_ledger()?);
        let adapters = Adapters::evaluating(&self.layout, &factors, &ledger, &self.setup.recipe.lora);
        let logits = prompts
            .iter()
            .map(|prompt| self.model.logits(&[prompt.as_slice()], &adapters, self.communicator.as_mut()))
            .collect::<Result<Vec<_>>>()?;
        Ok(Tensor::f_cat(&logits, 0)?)
    }

    fn choose(&mut self, backend: CollectiveBackend) -> Result<()> {
        let backend = self.fixed_backend.unwrap_or(backend);
        if backend == CollectiveBackend::Nccl && !self.device.is_cuda() {
            return Err(Fault::Refused(format!(
                "NCCL needs a CUDA device, this rank computes on {:?}; use Gloo",
                self.device
            )));
        }
        self.chosen_backend = backend;
        Ok(())
    }

    fn open_meeting(&mut self, host: &str) -> Result<Meeting> {
        match self.fixed_backend.unwrap_or(self.chosen_backend) {
            CollectiveBackend::Gloo => {
                let store = Store::serve(host, self.setup.collective_timeout.max(Duration::from_secs(1)))?;
                let port = store.port();
                self.rendezvous = Some(store);
                Ok(Meeting::Gloo { host: host.to_owned(), port })
            }
            CollectiveBackend::Nccl => Ok(Meeting::Nccl(unique_id()?)),
        }
    }

    /// By the library that rank 0 chose.
    fn join(&mut self, rendezvous: &Rendezvous, host: &str) -> Result<()> {
        let (rank, degree) = (self.setup.tp_rank, self.setup.tp_degree);
        if degree == 1 {
            return Ok(());
        }
        let timeout = self.setup.collective_timeout;
        let served = self.rendezvous.take();
        let progress = self.setup.progress.clone();
        let watched = progress.clone();
        let joined: Box<dyn Communicator> = match (Meeting::parse(&rendezvous.0)?, served) {
            (Meeting::Gloo { .. }, Some(store)) => {
                Box::new(Gloo::join(store, host, rank, degree, timeout, progress)?)
            }
            (Meeting::Gloo { host: address, port }, None) => {
                let store = Store::connect(&address, port, timeout, &progress)?;
                Box::new(Gloo::join(store, host, rank, degree, timeout, progress)?)
            }
            (Meeting::Nccl(id), _) => {
                Box::new(Nccl::join(&id, self.device, rank, degree, timeout, progress)?)
            }
        };
        self.communicator = Box::new(Watched::new(joined, watched));
        Ok(())
    }
}

/// Refuses what libtorch does not compute well on `device`.
fn check_compute(setup: &ShardSetup, device: Device) -> Result<()> {
    if setup.recipe.precision.compute == Compute::Bf16 && device == Device::Cpu {
        return Err(Fault::Refused("`precision.compute: bf16` needs a CUDA device; use f32 on a CPU".into()));
    }
    Ok(())
}

fn default_backend(device: Device) -> CollectiveBackend {
    if device.is_cuda() { CollectiveBackend::Nccl } else { CollectiveBackend::Gloo }
}

/// Whether the kernels of this program run on `device`; without them libtorch's operators do the same, slower.
#[must_use]
pub fn has_kernels(device: Device) -> bool {
    match device {
        Device::Cuda(_) => crate::cuda::compiler::elementwise(device).is_some(),
        Device::Cpu => true,
        Device::Mps | Device::Vulkan => false,
    }
}

/// One rank of NCCL alone on `device`: makes a group of one, sums over it and takes it down again. What an installation
/// is checked with before it is given a run.
///
/// # Errors
/// When the library is missing or does not work with the device.
pub fn check_nccl(device: Device, timeout: Duration) -> std::result::Result<(), EngineError> {
    let mut group = Nccl::join(&unique_id()?, device, 0, 1, timeout, Arc::default())?;
    for kind in [Kind::Float, Kind::BFloat16] {
        let ones = || Tensor::f_ones([1 << 20], (kind, device)).map_err(Fault::from);
        for op in [ReduceOp::Sum, ReduceOp::Max] {
            let mut values = ones()?;
            group.all_reduce(&mut values, op)?;
            if values
                .f_eq_tensor(&ones()?)
                .and_then(|same| same.f_all())
                .map_err(Fault::from)?
                .int64_value(&[])
                == 0
            {
                return Err(
                    Fault::Collective(format!("NCCL: {op:?} of one rank changed {kind:?} values")).into()
                );
            }
        }
    }
    Ok(())
}

impl ShardEngine for Shard {
    fn choose_backend(&mut self, backend: CollectiveBackend) -> std::result::Result<(), EngineError> {
        Ok(self.choose(backend)?)
    }

    fn open_rendezvous(&mut self, host: &str) -> std::result::Result<Rendezvous, EngineError> {
        Ok(Rendezvous(self.open_meeting(host)?.to_bytes()))
    }

    fn join_group(&mut self, rendezvous: &Rendezvous, host: &str) -> std::result::Result<(), EngineError> {
        Ok(self.join(rendezvous, host)?)
    }

    fn teach(&mut self, rows: &[&[u32]]) -> std::result::Result<(), EngineError> {
        Ok(self.teach_rows(rows)?)
    }

    fn train_step(
        &mut self,
        step: u64,
        micro_batches: &[Vec<&[u32]>],
    ) -> std::result::Result<StepOutcome, EngineError> {
        Ok(self.step(step, micro_batches)?)
    }

    fn calibrate(
        &mut self,
        rows: &[&[u32]],
        report: &mut Report<'_>,
    ) -> std::result::Result<Calibration, EngineError> {
        self.calibrate_on(rows, report)
    }

    fn apply_mask(
        &mut self,
        generation: u64,
        keep_mask: &KeepMask,
        calibration: &[&[u32]],
    ) -> std::result::Result<MaskApplied, EngineError> {
        Ok(self.apply(generation, keep_mask, calibration)?)
    }

    fn evaluate(
        &mut self,
        rows: &[&[u32]],
        rows_per_pass: usize,
    ) -> std::result::Result<NllSum, EngineError> {
        Ok(self.evaluate_rows(rows, rows_per_pass)?)
    }

    fn continuation_log_likelihoods(
        &mut self,
        prompts: &[Prompt<'_>],
    ) -> std::result::Result<Vec<Vec<f64>>, EngineError> {
        Ok(self.judge(prompts)?)
    }

    fn snapshot(&mut self, prompts: &[Vec<u32>]) -> std::result::Result<Box<dyn Snapshot>, EngineError> {
        Ok(Box::new(state_file::State::of(self, prompts)?))
    }

    fn memory_bytes(&self) -> u64 {
        device::memory_of(self.device).map_or(0, |memory| memory.reserved)
    }
}
