//! One rank's shard: the optimizer step, evaluation and checkpoints, over the pieces of the other modules.

use crate::communicator::{Alone, Communicator, Gloo, Store};
use crate::dropout::Dropout;
use crate::export;
use crate::factors::{Factor, FactorLayout};
use crate::fault::{Fault, Result};
use crate::importance::{self, LiveGroups, ScoreInputs};
use crate::layer::WeightGradients;
use crate::memory;
use crate::model::{Adapters, Model, Training};
use crate::optimizer::Moments;
use crate::source::{Source, compute_kind, storage_kind};
use crate::state_file;
use engine::{
    Engine, EngineError, ExportJob, ExportWritten, MaskApplied, NllSum, ProjectionScores, Rendezvous,
    ShardEngine, ShardSetup, StepOutcome,
};
use model_spec::Projection;
use pruning::KeepMask;
use recipe::{Compute, Criterion, Optimizer};
use sharding::{Placement, vocabulary_rows};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use tch::{Device, Kind, Tensor};

/// The engine on libtorch.
pub struct TchEngine {
    device: Device,
    threads: usize,
    /// Program whose sub-command `logits` reloads an exported folder (see [`crate::write_logits`]).
    logits_program: PathBuf,
}

impl TchEngine {
    /// Computes on `device` with `threads` threads of its own for each thread that asks. `logits_program` is run as
    /// `PROGRAM logits --model DIR --tokens-file FILE --out FILE` to check exports in a process of their own.
    ///
    /// Sets the process's allocator to keep freed memory (see `memory`).
    #[must_use]
    pub fn new(device: Device, threads: usize, logits_program: PathBuf) -> Self {
        memory::keep_freed_memory();
        Self { device, threads, logits_program }
    }

    fn use_threads(&self) {
        tch::set_num_threads(i32::try_from(self.threads.max(1)).unwrap_or(i32::MAX));
    }
}

impl Engine for TchEngine {
    fn load(&self, setup: ShardSetup) -> std::result::Result<Box<dyn ShardEngine>, EngineError> {
        self.use_threads();
        Ok(Box::new(Shard::load(setup, self.device)?))
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
    pub(crate) moments: Moments,
    pub(crate) gradients: Tensor,
    pub(crate) weight_gradients: Option<Vec<WeightGradients>>,
    pub(crate) live: Vec<LiveGroups>,
    pub(crate) communicator: Box<dyn Communicator>,
    pub(crate) device: Device,
    rendezvous: Option<Store>,
    _no_grad: tch::NoGradGuard,
}

impl Shard {
    pub(crate) fn load(setup: ShardSetup, device: Device) -> Result<Self> {
        let no_grad = tch::no_grad_guard();
        if let Some(violation) = setup.recipe.violations().first() {
            return Err(Fault::Refused(violation.to_string()));
        }
        let precision = setup.recipe.precision;
        if precision.compute == Compute::Bf16 && device == Device::Cpu {
            return Err(Fault::Refused(
                "`precision.compute: bf16` needs a CUDA device; use f32 on a CPU".into(),
            ));
        }
        let source = Source::open(&setup.model)?;
        let spec = source.spec();
        let placement =
            Placement::dense(spec, setup.tp_degree).map_err(|error| Fault::Refused(error.to_string()))?;
        let Some(held) = placement.ranks.get(setup.tp_rank) else {
            return Err(Fault::Refused(format!(
                "tensor-parallel rank {} is not below the degree {}",
                setup.tp_rank, setup.tp_degree
            )));
        };
        let (storage, compute) = (storage_kind(precision.storage), compute_kind(precision.compute));
        let vocabulary = vocabulary_rows(spec.vocab_size, setup.tp_degree, setup.tp_rank);
        let model = Model::load(&source, held, vocabulary, storage, compute, device)?;
        let layout = FactorLayout::new(spec, held, setup.recipe.lora.rank);
        let master = if compute == Kind::Double { Kind::Double } else { Kind::Float };
        let factors = layout.fresh(spec, held, setup.recipe.seed, master, device)?;
        let live = held.iter().map(|_| LiveGroups::default()).collect();
        let keep_mask = KeepMask::full(spec);
        Ok(Self {
            moments: Moments::zeros_like(&factors)?,
            gradients: factors.f_zeros_like()?,
            weight_gradients: None,
            source,
            placement,
            keep_mask,
            generation: 0,
            model,
            layout,
            factors,
            live,
            communicator: Box::new(Alone),
            device,
            rendezvous: None,
            setup,
            _no_grad: no_grad,
        })
    }

    pub(crate) fn held(&self) -> &[sharding::RankLayer] {
        &self.placement.ranks[self.setup.tp_rank]
    }

    /// The factors in the format of the products.
    fn compute_factors(&self) -> Result<Tensor> {
        Ok(self.factors.f_to_kind(compute_kind(self.setup.recipe.precision.compute))?)
    }

    fn step(&mut self, step: u64, micro_batches: &[Vec<&[u32]>]) -> Result<StepOutcome> {
        let recipe = self.setup.recipe.clone();
        let predictions: usize = micro_batches.iter().flatten().map(|row| row.len().saturating_sub(1)).sum();
        if predictions == 0 {
            return Err(Fault::Refused(format!("step {step} has no token to predict")));
        }
        let _ = self.gradients.f_zero_()?;
        let criterion = recipe.pruning.as_ref().map(|pruning| pruning.criterion);
        self.prepare_weight_gradients(criterion)?;
        let factors = self.compute_factors()?;
        let mut total = 0.0;
        let mut first_token = 0;
        for rows in micro_batches {
            let adapters = Adapters {
                layout: &self.layout,
                factors: &factors,
                lora_rank: recipe.lora.rank,
                scaling: recipe.lora.scaling(),
                dropout: Dropout { probability: recipe.lora.dropout, seed: recipe.seed, step },
            };
            let training = Training {
                gradients: &self.gradients,
                weight_gradients: self.weight_gradients.as_deref_mut(),
                loss_scale: 1.0 / predictions as f64,
                first_token,
                recompute: recipe.recompute,
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
        if !loss.is_finite() {
            return Err(Fault::NotFinite { what: "loss".into(), step, value: loss });
        }
        self.communicator.all_reduce_sum(&mut self.layout.replicated(&self.gradients)?)?;
        let grad_norm = self.gradient_norm()?;
        if !grad_norm.is_finite() {
            return Err(self.name_bad_gradient(step, grad_norm)?);
        }
        if let Some(max_norm) = recipe.max_grad_norm {
            let _ = self.gradients.f_mul_scalar_((max_norm / (grad_norm + 1e-6)).min(1.0))?;
        }
        let started = Instant::now();
        let scores = match criterion {
            Some(criterion) => self.scores(step, criterion, importance::TILE_ELEMENTS)?,
            None => Vec::new(),
        };
        let score_time = started.elapsed();
        let learning_rate = recipe.learning_rate.at(step, recipe.steps);
        let Optimizer::AdamW(adamw) = &recipe.optimizer;
        self.moments.adamw_step(&mut self.factors, &self.gradients, learning_rate, adamw)?;
        Ok(StepOutcome { loss, grad_norm, learning_rate, scores, score_time })
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

    fn name_bad_gradient(&self, step: u64, norm: f64) -> Result<Fault> {
        for layer in 0..self.layout.layer_count() {
            for projection in Projection::ALL {
                for factor in Factor::BOTH {
                    let gradient = self.layout.view(&self.gradients, layer, projection, factor)?;
                    if gradient.f_isfinite()?.f_all()?.f_int64_value(&[])? == 0 {
                        let what = format!("gradient of layer {layer} {projection} {}", factor.name());
                        return Ok(Fault::NotFinite { what, step, value: norm });
                    }
                }
            }
        }
        Ok(Fault::NotFinite { what: "gradient norm".into(), step, value: norm })
    }

    pub(crate) fn scores(
        &self,
        step: u64,
        criterion: Criterion,
        tile_elements: i64,
    ) -> Result<Vec<ProjectionScores>> {
        let inputs = ScoreInputs {
            layout: &self.layout,
            factors: &self.factors,
            gradients: &self.gradients,
            weight_gradients: self.weight_gradients.as_deref(),
            scaling: self.setup.recipe.lora.scaling(),
            head_dim: self.source.spec().head_dim as i64,
            step,
            tile_elements,
        };
        let mut all = Vec::new();
        for (layer, (shard, live)) in self.model.layers.iter().zip(&self.live).enumerate() {
            all.extend(importance::score_layer(criterion, layer, shard, live, &inputs)?);
        }
        Ok(all)
    }

    /// Zeroed sums for the true gradients of the weights, where the criterion wants them.
    fn prepare_weight_gradients(&mut self, criterion: Option<Criterion>) -> Result<()> {
        if criterion != Some(Criterion::Taylor) {
            return Ok(());
        }
        let kind = self.factors.kind();
        let zeros = |weight: &Tensor| weight.f_zeros_like()?.f_to_kind(kind);
        self.weight_gradients = None;
        self.weight_gradients = Some(
            self.model
                .layers
                .iter()
                .map(|layer| {
                    Ok(WeightGradients {
                        qkv: zeros(&layer.qkv)?,
                        o: zeros(&layer.o)?,
                        gate_up: zeros(&layer.gate_up)?,
                        down: zeros(&layer.down)?,
                    })
                })
                .collect::<Result<_>>()?,
        );
        Ok(())
    }

    fn evaluate_rows(&mut self, rows: &[&[u32]], rows_per_pass: usize) -> Result<NllSum> {
        let factors = self.compute_factors()?;
        let mut sum = NllSum::default();
        for rows in rows.chunks(rows_per_pass.max(1)) {
            let adapters = Adapters {
                layout: &self.layout,
                factors: &factors,
                lora_rank: self.setup.recipe.lora.rank,
                scaling: self.setup.recipe.lora.scaling(),
                dropout: Dropout::off(),
            };
            let (nll, predicted) =
                self.model.negative_log_likelihood(rows, &adapters, None, self.communicator.as_mut())?;
            sum.negative_log_likelihood += nll;
            sum.predicted += predicted;
        }
        Ok(sum)
    }

    /// Logits `[tokens of all prompts, vocabulary on this rank]`.
    pub(crate) fn prompt_logits(&mut self, prompts: &[Vec<u32>]) -> Result<Tensor> {
        let factors = self.compute_factors()?;
        let adapters = Adapters {
            layout: &self.layout,
            factors: &factors,
            lora_rank: self.setup.recipe.lora.rank,
            scaling: self.setup.recipe.lora.scaling(),
            dropout: Dropout::off(),
        };
        let logits = prompts
            .iter()
            .map(|prompt| self.model.logits(&[prompt.as_slice()], &adapters, self.communicator.as_mut()))
            .collect::<Result<Vec<_>>>()?;
        Ok(Tensor::f_cat(&logits, 0)?)
    }

    fn join(&mut self, rendezvous: &Rendezvous, host: &str) -> Result<()> {
        let (rank, degree) = (self.setup.tp_rank, self.setup.tp_degree);
        if degree == 1 {
            return Ok(());
        }
        let timeout = self.setup.collective_timeout;
        let store = match self.rendezvous.take() {
            Some(store) => store,
            None => {
                let (host, port) = parse_rendezvous(rendezvous)?;
                Store::connect(&host, port, timeout)?
            }
        };
        self.communicator = Box::new(Gloo::join(store, host, rank, degree, timeout)?);
        Ok(())
    }
}

/// `host:port`, as [`ShardEngine::open_rendezvous`] gives it out.
fn parse_rendezvous(rendezvous: &Rendezvous) -> Result<(String, u16)> {
    let text = String::from_utf8_lossy(&rendezvous.0);
    let parts = text.rsplit_once(':').and_then(|(host, port)| Some((host.to_owned(), port.parse().ok()?)));
    parts.ok_or_else(|| Fault::Refused(format!("rendezvous `{text}` is not `host:port`")))
}

impl ShardEngine for Shard {
    fn open_rendezvous(&mut self, host: &str) -> std::result::Result<Rendezvous, EngineError> {
        let store = Store::serve(host, self.setup.collective_timeout.max(Duration::from_secs(1)))?;
        let address = format!("{host}:{}", store.port());
        self.rendezvous = Some(store);
        Ok(Rendezvous(address.into_bytes()))
    }

    fn join_group(&mut self, rendezvous: &Rendezvous, host: &str) -> std::result::Result<(), EngineError> {
        Ok(self.join(rendezvous, host)?)
    }

    fn train_step(
        &mut self,
        step: u64,
        micro_batches: &[Vec<&[u32]>],
    ) -> std::result::Result<StepOutcome, EngineError> {
        Ok(self.step(step, micro_batches)?)
    }

    fn apply_mask(
        &mut self,
        generation: u64,
        keep_mask: &KeepMask,
    ) -> std::result::Result<MaskApplied, EngineError> {
        Ok(self.apply(generation, keep_mask)?)
    }

    fn evaluate(
        &mut self,
        rows: &[&[u32]],
        rows_per_pass: usize,
    ) -> std::result::Result<NllSum, EngineError> {
        Ok(self.evaluate_rows(rows, rows_per_pass)?)
    }

    fn checkpoint(&mut self, file: &Path, prompts: &[Vec<u32>]) -> std::result::Result<String, EngineError> {
        Ok(state_file::write(self, file, prompts)?)
    }

    fn memory_bytes(&self) -> u64 {
        memory::resident_bytes()
    }
}
