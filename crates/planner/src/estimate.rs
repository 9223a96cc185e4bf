use crate::activations::{fullest_moment, kept_by_heap, kept_bytes};
use crate::course::{Course, WidthsFrom};
use crate::decision_memory::fullest_decision;
use crate::device::{Device, Platform, Rates};
use crate::formats::{compute_bytes, master_bytes, vocabulary_bytes};
use crate::heap;
use crate::memory::Memory;
use crate::rank_shape::RankShape;
use crate::refusal::Refusal;
use crate::traffic::Traffic;
use crate::work::{DecisionWork, StepWork};
use model_spec::{LayerSpec, ModelSpec, Projection};
use recipe::{Compute, Recipe, Storage};
use serde::{Deserialize, Serialize};
use sharding::Placement;
use std::fmt;

/// Resident bytes of a worker on a CPU that holds no model: libtorch's libraries as far as a run touches them, its threads
/// and the worker's own code. Measured (`docs/planning.md`).
const CPU_PROCESS_BYTES: u64 = 180_000_000;
/// Device memory that a CUDA rank has before it holds anything: context, kernels, cuBLAS workspace, NCCL's channels. Not
/// measured: an assumption on the safe side.
const CUDA_PROCESS_BYTES: u64 = 2 << 30;
/// What holes cost a CPU's heap, as a share of the blocks in it. Fitted to the medians of repeated runs, which differ among
/// themselves by 7 % of the whole process either way (`docs/planning.md`).
const HEAP_SLACK: f64 = 0.15;
/// Bytes of a weight in the files that are read: 16 bits is what checkpoints come in.
const SOURCE_BYTES: u64 = 2;

/// What is asked.
#[derive(Debug, Clone, Copy)]
pub struct Question<'a> {
    pub dense: &'a ModelSpec,
    pub recipe: &'a Recipe,
    pub tp_degree: usize,
    pub device: &'a Device,
}

/// A part of a run that has a fullest moment of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stage {
    /// Reading and quantising the weights.
    Loading,
    /// An optimizer step of the unpruned model.
    FirstStep,
    /// Putting a mask into force: compensation and slicing.
    Decision,
    /// An optimizer step after the last decision.
    LastStep,
    /// A step beside the copy of the state that a checkpoint is written from.
    Checkpoint,
}

impl Stage {
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Loading => "loading",
            Self::FirstStep => "a step before pruning",
            Self::Decision => "a mask decision",
            Self::LastStep => "a step after pruning",
            Self::Checkpoint => "a step beside a checkpoint",
        }
    }
}

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What a run will take.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Estimate {
    pub tp_degree: usize,
    /// The most ranks that the model can be spread over.
    pub largest_degree: usize,
    pub dense_parameters: u64,
    pub pruned_parameters: u64,
    /// Fraction of the projection weights that goes.
    pub sparsity: f64,
    /// Parameters of the fullest rank, before pruning and after.
    pub rank_parameters: [u64; 2],
    /// Trained numbers of the fullest rank, before pruning and after.
    pub rank_lora: [u64; 2],
    /// Widths of the result's layers; absent where the scores decide them.
    pub layers: Option<Vec<LayerSpec>>,
    /// Memory of the fullest rank, by stage.
    pub stages: Vec<(Stage, Memory)>,
    /// Memory of each rank in a step before pruning.
    pub ranks: Vec<Memory>,
    /// Before pruning and after, of the fullest rank.
    pub steps: [StepFigures; 2],
    pub run: Option<RunTime>,
    pub checkpoint: CheckpointSize,
    pub notes: Vec<String>,
}

/// Work, traffic and time of one optimizer step.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct StepFigures {
    pub work: StepWork,
    pub traffic: Traffic,
    pub time: Option<StepTime>,
}

/// Seconds of one optimizer step. Nothing overlaps: the engine waits for its sums.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct StepTime {
    /// Forward and backward passes: by operations or by bytes, whichever takes longer.
    pub passes: f64,
    pub scores_and_update: f64,
    pub sums_over_ranks: f64,
}

impl StepTime {
    #[must_use]
    pub fn total(&self) -> f64 {
        self.passes + self.scores_and_update + self.sums_over_ranks
    }
}

/// Seconds of a whole run, without loading, evaluation and export.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct RunTime {
    pub steps: f64,
    /// Compensation at the decisions.
    pub decisions: f64,
    /// The unpruned model's reading of the windows, where the recipe distils.
    pub teaching: f64,
    /// Hours of all devices together.
    pub device_hours: f64,
}

impl RunTime {
    #[must_use]
    pub fn total(&self) -> f64 {
        self.steps + self.decisions + self.teaching
    }
}

/// Bytes of a checkpoint before pruning, when it is largest: factors and moments, what compensation changes, and what the
/// unpruned model has taught.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckpointSize {
    /// Of the rank with most.
    pub rank: u64,
    pub total: u64,
}

impl Estimate {
    /// The fullest stage and its memory.
    #[must_use]
    pub fn peak(&self) -> (Stage, Memory) {
        let first = (Stage::Loading, Memory::default());
        self.stages
            .iter()
            .copied()
            .fold(first, |most, stage| if stage.1.total() > most.1.total() { stage } else { most })
    }

    /// Memory of the fullest rank in a stage.
    #[must_use]
    pub fn stage(&self, wanted: Stage) -> Option<Memory> {
        self.stages.iter().find(|(stage, _)| *stage == wanted).map(|(_, memory)| *memory)
    }
}

/// What the run that is asked about will take.
///
/// # Errors
/// Everything that makes it impossible, whatever the device: a recipe or a degree that the model cannot meet.
pub fn estimate(question: &Question<'_>) -> Result<Estimate, Vec<Refusal>> {
    let Question { dense, recipe, tp_degree, device } = *question;
    let mut found: Vec<Refusal> = recipe.violations().into_iter().map(Refusal::Recipe).collect();
    found.extend(recipe.violations_on(dense.vocab_size).into_iter().map(Refusal::Recipe));
    if device.platform == Platform::Cpu && recipe.precision.compute == Compute::Bf16 {
        found.push(Refusal::Recipe(recipe::FieldViolation {
            field: "precision.compute".into(),
            problem: "bf16 needs a CUDA device; use f32 on a CPU".into(),
        }));
    }
    if let Err(error) = Placement::dense(dense, tp_degree) {
        found.push(Refusal::Degree(error.to_string()));
    }
    if !found.is_empty() {
        return Err(found);
    }
    let course = Course::new(dense, recipe)
        .map_err(|found| found.into_iter().map(Refusal::Recipe).collect::<Vec<_>>())?;
    Ok(Planner { dense, recipe, tp_degree, device, course: &course }.estimate())
}

struct Planner<'a> {
    dense: &'a ModelSpec,
    recipe: &'a Recipe,
    tp_degree: usize,
    device: &'a Device,
    course: &'a Course,
}

impl Planner<'_> {
    fn shape(&self, layers: &[LayerSpec], tp_rank: usize) -> RankShape {
        RankShape::new(self.dense, layers, self.tp_degree, tp_rank)
    }

    fn estimate(&self) -> Estimate {
        let ranks: Vec<Memory> =
            (0..self.tp_degree).map(|rank| self.step_memory(&self.shape(&self.course.dense, rank))).collect();
        let most = ranks.iter().map(Memory::total).max().unwrap_or(0);
        let fullest = ranks.iter().position(|memory| memory.total() == most).unwrap_or(0);
        let (first, last) =
            (self.shape(&self.course.dense, fullest), self.fullest_shape(self.course.held_last()));
        let target = self.course.target().map(pruning::Target::summary);
        let dense_parameters = self.dense.parameter_count();
        let checkpoints: Vec<u64> = (0..self.tp_degree)
            .map(|rank| self.checkpoint_bytes(&self.shape(&self.course.dense, rank)))
            .collect();
        let checkpoint = CheckpointSize {
            rank: checkpoints.iter().copied().max().unwrap_or(0),
            total: checkpoints.iter().sum(),
        };
        Estimate {
            tp_degree: self.tp_degree,
            largest_degree: self.dense.layers.iter().map(|layer| layer.kv_head_count).min().unwrap_or(1),
            dense_parameters,
            pruned_parameters: target.map_or(dense_parameters, |summary| summary.kept_parameters),
            sparsity: target.map_or(0.0, |summary| summary.sparsity_of_projections),
            rank_parameters: [first.parameters(), last.parameters()],
            rank_lora: [&first, &last].map(|shape| shape.lora(self.recipe.lora.rank as u64)),
            layers: match self.course.widths_from {
                WidthsFrom::Recipe => Some(self.course.last().to_vec()),
                WidthsFrom::EvenShares => None,
            },
            stages: self.stages(fullest, &first, &last, checkpoint.rank),
            ranks,
            steps: [&first, &last].map(|shape| self.step_figures(shape)),
            run: self.device.rates.map(|rates| self.run_time(&rates)),
            checkpoint,
            notes: self.notes(),
        }
    }

    /// The rank that holds most of these widths.
    fn fullest_shape(&self, layers: &[LayerSpec]) -> RankShape {
        let shapes = (0..self.tp_degree).map(|rank| self.shape(layers, rank));
        shapes.max_by_key(RankShape::parameters).unwrap_or_else(|| self.shape(layers, 0))
    }

    fn stages(
        &self,
        rank: usize,
        first: &RankShape,
        last: &RankShape,
        checkpoint: u64,
    ) -> Vec<(Stage, Memory)> {
        let mut stages = vec![(Stage::Loading, self.loading_memory(first))];
        if self.recipe.steps == 0 {
            return stages;
        }
        let step = self.step_memory(first);
        stages.push((Stage::FirstStep, step));
        let decision =
            fullest_decision(&|layers| self.shape(layers, rank), self.course, self.recipe, self.tp_degree);
        if let Some(moment) = decision {
            let lasting = self.lasting_memory(first);
            let memory = Memory {
                activations: moment.activations,
                buffers: moment.buffers + self.taught_bytes(),
                ..lasting
            };
            stages.push((Stage::Decision, self.with_process(memory, first, 0)));
            stages.push((Stage::LastStep, self.step_memory(last)));
        }
        if self.device.platform == Platform::Cpu {
            stages.push((Stage::Checkpoint, Memory { buffers: step.buffers + checkpoint, ..step }));
        }
        stages
    }

    /// Weights, factors, gradients and moments.
    fn lasting_memory(&self, shape: &RankShape) -> Memory {
        let precision = self.recipe.precision;
        let (lora, master) = (shape.lora(self.recipe.lora.rank as u64), master_bytes(precision.compute));
        let copy = match precision.compute {
            Compute::Bf16 => compute_bytes(precision.compute),
            Compute::F32 | Compute::F64 => 0,
        };
        Memory {
            weights: shape.frozen_bytes(precision),
            lora: (1 + self.recipe.frozen_pairs()) * lora * (master + copy),
            gradients: lora * master,
            moments: 2 * lora * master,
            ..Memory::default()
        }
    }

    fn step_memory(&self, shape: &RankShape) -> Memory {
        let moment = fullest_moment(shape, self.recipe, self.device.platform);
        let memory = Memory {
            activations: moment.activations,
            buffers: moment.buffers + self.taught_bytes(),
            ..self.lasting_memory(shape)
        };
        let (kept, in_heap) =
            (kept_bytes(shape, self.recipe, Platform::Cpu), heap::kept_bytes(shape, self.recipe));
        let memory = self.with_process(memory, shape, in_heap);
        let retained = match self.device.platform {
            Platform::Cpu => kept_by_heap(shape, self.recipe, in_heap as f64 / kept.max(1) as f64),
            Platform::Cuda => 0,
        };
        Memory { process: memory.process + retained, ..memory }
    }

    /// `kept` bytes of activations lie in the heap, beside the weights that do.
    fn with_process(&self, memory: Memory, shape: &RankShape, kept: u64) -> Memory {
        let precision = self.recipe.precision;
        let process = match self.device.platform {
            Platform::Cpu => {
                let in_heap = heap::frozen_bytes_in_heap(shape, precision) + kept;
                let holes = (in_heap as f64 * HEAP_SLACK) as u64;
                CPU_PROCESS_BYTES + holes + heap::left_by_quantising(shape, precision)
            }
            Platform::Cuda => CUDA_PROCESS_BYTES,
        };
        Memory { process, ..memory }
    }

    /// Weights, and what checking the largest table for numbers that are not finite, or quantising the largest matrix, takes
    /// beside them. On a CPU the pages of the files that are read count as well, a layer or both tables at a time.
    ///
    /// ```text
    /// check     a magnitude and three booleans for each number      w + 3
    /// nf4       padded, normal, code in 64 bits, half of them twice, byte 4 + 4 + 8 + 4 + 4 + 1
    /// int8      f32, divided, rounded, clamped, byte                4 + 4 + 4 + 4 + 1
    /// ```
    fn loading_memory(&self, shape: &RankShape) -> Memory {
        let precision = self.recipe.precision;
        let table = shape.vocabulary_weights();
        let tables = if shape.tied { 1 } else { 2 };
        let elements = |layer| {
            Projection::ALL.into_iter().map(move |projection| {
                let [rows, columns] = shape.matrix(layer, projection);
                rows * columns
            })
        };
        let largest = shape.layers.iter().flat_map(elements).max().unwrap_or(0);
        let layer = shape.layers.iter().map(|layer| elements(layer).sum::<u64>()).max().unwrap_or(0);
        let each = match precision.storage {
            Storage::Nf4 => 25,
            Storage::Int8 => 17,
            Storage::F32 | Storage::F64 | Storage::Bf16 => 2 * vocabulary_bytes(precision) + 3,
        };
        let tables_held = tables * table * vocabulary_bytes(precision);
        let all = shape.frozen_bytes(precision);
        let (check, quantise) = match self.device.platform {
            Platform::Cpu => (
                (vocabulary_bytes(precision) + 3 + tables * SOURCE_BYTES) * table,
                (each * largest + SOURCE_BYTES * layer).saturating_sub(tables_held),
            ),
            Platform::Cuda => (0, (each * largest).saturating_sub(tables_held)),
        };
        let process = match self.device.platform {
            Platform::Cpu => CPU_PROCESS_BYTES + heap::left_by_quantising(shape, precision),
            Platform::Cuda => CUDA_PROCESS_BYTES,
        };
        Memory { weights: all, buffers: check.max(quantise), process, ..Memory::default() }
    }

    /// What the unpruned model says: an id and a likelihood for each of its `top_k` tokens at each predicted position, and the
    /// windows themselves. Every window of the run counts as another. On a GPU it stays in the host's memory.
    fn taught_bytes(&self) -> u64 {
        match self.device.platform {
            Platform::Cpu => self.all_taught_bytes(),
            Platform::Cuda => 0,
        }
    }

    fn all_taught_bytes(&self) -> u64 {
        let Some(distillation) = self.recipe.distillation else { return 0 };
        let batch = self.recipe.batch;
        let windows = self.recipe.steps * (batch.rows * batch.micro_batches) as u64;
        let window = batch.window_tokens as u64;
        windows * (8 * distillation.top_k as u64 * window.saturating_sub(1) + 4 * window)
    }

    fn checkpoint_bytes(&self, shape: &RankShape) -> u64 {
        let lora = shape.lora(self.recipe.lora.rank as u64);
        let compensates = self
            .recipe
            .pruning
            .as_ref()
            .is_some_and(|pruning| pruning.compensation.least_squares().is_some());
        (3 + self.recipe.frozen_pairs()) * lora * master_bytes(self.recipe.precision.compute)
            + if compensates { shape.narrowing_bytes(self.recipe) } else { 0 }
            + self.all_taught_bytes()
    }

    fn step_figures(&self, shape: &RankShape) -> StepFigures {
        let kept = kept_bytes(shape, self.recipe, self.device.platform);
        let work = StepWork::of_step(shape, self.recipe, kept, shape.frozen_bytes(self.recipe.precision));
        let traffic = Traffic::of_step(shape, self.recipe, self.tp_degree);
        let time = self.device.rates.map(|rates| step_time(&work, &traffic, &rates, self.tp_degree));
        StepFigures { work, traffic, time }
    }

    fn run_time(&self, rates: &Rates) -> RunTime {
        let of_step = |layers: &[LayerSpec]| {
            self.step_figures(&self.fullest_shape(layers)).time.map_or(0.0, |time| time.total())
        };
        let steps =
            self.course.stretches().iter().map(|(count, layers)| *count as f64 * of_step(layers)).sum();
        let decisions = self
            .course
            .changes()
            .map(|(before, after)| {
                let held = self.fullest_shape(if self.course.shrinks { before } else { &self.course.dense });
                let work = DecisionWork::of(&held, before, after, self.recipe, self.tp_degree);
                let seconds = work.passes / rates.product_flops
                    + work.sums / rates.single_flops
                    + work.solves / rates.double_flops;
                seconds / rates.efficiency
            })
            .sum();
        let teaching = match self.recipe.distillation {
            None => 0.0,
            Some(_) => {
                let work = self.step_figures(&self.fullest_shape(&self.course.dense)).work;
                self.recipe.steps as f64 * work.forward / (rates.product_flops * rates.efficiency)
            }
        };
        let mut run = RunTime { steps, decisions, teaching, device_hours: 0.0 };
        run.device_hours = run.total() * self.tp_degree as f64 / 3600.0;
        run
    }

    fn notes(&self) -> Vec<String> {
        let mut notes = Vec::new();
        if self.course.widths_from == WidthsFrom::EvenShares {
            notes.push("the scores decide each layer's widths; figures after pruning are for equal shares of all layers".into());
        }
        if self.device.platform == Platform::Cuda {
            notes.push(format!(
                "{} of the process on each GPU is an assumption, as is all that follows from the GPU's rates: nothing has been \
                 measured on one",
                crate::refusal::gib(CUDA_PROCESS_BYTES)
            ));
            if self.recipe.distillation.is_some() {
                notes.push(format!(
                    "what the unpruned model teaches takes up to {} of the host's memory for each rank",
                    crate::refusal::gib(self.all_taught_bytes())
                ));
            }
        }
        notes
    }
}

fn step_time(work: &StepWork, traffic: &Traffic, rates: &Rates, tp_degree: usize) -> StepTime {
    let reached = rates.efficiency;
    let passes = (work.forward + work.backward) / rates.product_flops;
    let scores = work.scores / rates.single_flops;
    let sent = traffic.sent(tp_degree);
    StepTime {
        passes: passes.max(work.bytes / rates.memory_bytes) / reached,
        scores_and_update: scores.max(work.update_bytes / rates.memory_bytes) / reached,
        sums_over_ranks: if sent == 0.0 { 0.0 } else { sent / (rates.link_bytes * reached) },
    }
}
