use crate::Progress;
use model_spec::Projection;
use pruning::KeepMask;
use recipe::Recipe;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// What a shard is made of.
#[derive(Debug, Clone)]
pub struct ShardSetup {
    /// Hugging Face model folder.
    pub model: PathBuf,
    pub recipe: Recipe,
    pub tp_rank: usize,
    pub tp_degree: usize,
    /// Longest a collective may wait for its peers.
    pub collective_timeout: Duration,
    /// What the shard goes on from; absent for a fresh start.
    pub restore: Option<Restore>,
    /// Where the shard says how far it is, and is told to give up.
    pub progress: Arc<Progress>,
}

/// A checkpoint of a whole group, which may have been of another degree.
#[derive(Debug, Clone)]
pub struct Restore {
    /// The files by rank of the group that wrote them, each with its SHA-256 in hex.
    pub shards: Vec<(PathBuf, String)>,
    /// Mask in force.
    pub generation: u64,
    /// The next optimizer step.
    pub next_step: u64,
    pub keep_mask: KeepMask,
}

/// What the ranks need to find each other: an address for Gloo, a unique id for NCCL.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rendezvous(pub Vec<u8>);

/// The library that reduces between ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CollectiveBackend {
    /// Over TCP, through the host's memory.
    Gloo,
    /// Between CUDA devices, one rank each.
    Nccl,
}

/// What one optimizer step did on this rank. Loss and norm are equal on all ranks.
#[derive(Debug, Clone)]
pub struct StepOutcome {
    /// Mean negative log likelihood over the step's predictions, in nats.
    pub loss: f64,
    /// Global L2 norm of the gradients before clipping.
    pub grad_norm: f64,
    pub learning_rate: f64,
    /// Empty when the recipe does not prune, its criterion needs no scores, or the step was skipped.
    pub scores: Vec<ProjectionScores>,
    /// Why the optimizer took no step: the place of a number that is not finite. Equal on all ranks.
    pub skipped: Option<String>,
    /// Part of the step spent on scores.
    pub score_time: Duration,
    pub phase_times: PhaseTimes,
}

/// Where the rest of an optimizer step's time went, summed over its micro-batches. On a GPU: until the work was queued.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PhaseTimes {
    /// Embedding and layers.
    pub forward: Duration,
    /// Final norm, head and cross-entropy, with their gradient.
    pub loss: Duration,
    pub backward: Duration,
    /// The sum over ranks, clipping and the update.
    pub optimizer: Duration,
}

/// Raw group sums of one projection for the live groups that this rank holds, in ascending order of their indices in
/// the unpruned model: by query head for q and o, by key/value head for k and v, by channel for gate, up and down.
#[derive(Debug, Clone, PartialEq)]
pub struct ProjectionScores {
    pub layer: usize,
    pub projection: Projection,
    pub values: Vec<f64>,
}

/// What passes over calibration windows found, for a decision that wants them. Equal on all ranks, but for `scores`.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Calibration {
    /// One score for each block, the lowest to go first; empty where no blocks go.
    pub blocks: Vec<f64>,
    /// Blocks in the order in which they go, where each was judged without those before it; else empty.
    pub block_order: Vec<usize>,
}

/// How far a calibration is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CalibrationProgress {
    pub passes: u64,
    pub total_passes: u64,
}

/// Hears how far a calibration is; its error ends it.
pub type Report<'a> = dyn FnMut(CalibrationProgress) -> Result<(), EngineError> + 'a;

/// What applying a decision did on this rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MaskApplied {
    /// Groups that came here from other ranks.
    pub received_groups: u64,
}

/// A sum of negative log likelihoods, in nats, and how many predictions it is over.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct NllSum {
    pub negative_log_likelihood: f64,
    pub predicted: u64,
}

impl NllSum {
    #[must_use]
    pub fn perplexity(&self) -> f64 {
        (self.negative_log_likelihood / self.predicted as f64).exp()
    }
}

/// A context and what may follow it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prompt<'a> {
    pub context: &'a [u32],
    pub continuations: Vec<&'a [u32]>,
}

impl Prompt<'_> {
    /// Tokens that go through the model: the context once, and all of each continuation but its last token, which is
    /// only predicted.
    #[must_use]
    pub fn pass_tokens(&self) -> usize {
        self.continuations.iter().map(|tokens| tokens.len().saturating_sub(1)).sum::<usize>()
            + self.context.len()
    }
}

/// A pruned model to be written.
#[derive(Debug, Clone)]
pub struct ExportJob {
    /// The model that was pruned.
    pub model: PathBuf,
    pub recipe: Recipe,
    /// The ranks' checkpoint files, by rank, each with its SHA-256 in hex.
    pub shards: Vec<(PathBuf, String)>,
    pub keep_mask: KeepMask,
    /// Must not exist or be empty.
    pub out: PathBuf,
    pub dtype: ExportDtype,
    pub max_shard_bytes: u64,
    pub run_id: String,
}

/// Format of exported weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExportDtype {
    Source,
    Bf16,
    F16,
    F32,
}

/// What an export wrote and what its check found: the folder is reloaded in a process of its own, and its logits on the
/// checkpoint's prompts are compared with those of the run.
#[derive(Debug, Clone, PartialEq)]
pub struct ExportWritten {
    /// Parameters written, padding included.
    pub parameters: u64,
    pub weight_bytes: u64,
    pub model_type: String,
    pub manifest_sha256: String,
    pub max_logit_difference: f64,
    pub max_logit: f64,
    /// Share of positions whose most likely token is the same.
    pub top_token_agreement: f64,
    /// Mean KL divergence from the run's distribution to the reloaded one, in nats.
    pub mean_kl: f64,
}

/// Why a shard could not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The caller asked for something that cannot be; nothing has changed.
    #[error("{0}")]
    Refused(String),
    /// A model, checkpoint or output file is at fault.
    #[error("{0}")]
    File(String),
    /// Something was not written or checked, as for a full disk: the same may succeed later.
    #[error("{0}")]
    Unwritten(String),
    /// A number is not finite.
    #[error("{what} at step {step} is {value}")]
    NotFinite { what: String, step: u64, value: f64 },
    /// A peer did not answer in time or is gone; the group must be formed anew.
    #[error("collective failed: {0}")]
    Collective(String),
    /// The tensor library failed.
    #[error("{0}")]
    Device(String),
}

/// Makes shards and finished models. One implementation a tensor library.
pub trait Engine: Send + Sync {
    /// Loads a rank's shard: frozen weights, and either fresh LoRA factors and empty moments or those of a checkpoint. At the
    /// degree that the checkpoint was written at, the shard goes on bit for bit as the one that wrote it.
    ///
    /// # Errors
    /// When the folder, the recipe, the degree or the checkpoint does not fit.
    fn load(&self, setup: ShardSetup) -> Result<Box<dyn ShardEngine>, EngineError>;

    /// Merges, slices, writes and checks a pruned model.
    ///
    /// # Errors
    /// When a file cannot be read or written or the check fails; nothing is left at `job.out` then.
    fn export(&self, job: &ExportJob) -> Result<ExportWritten, EngineError>;
}

/// One rank's shard. It lives on the thread that made it. All ranks of a group call the same methods in the same order.
pub trait ShardEngine {
    /// Says which library the group is to use, before its rendezvous is opened. An engine that has no choice ignores it.
    ///
    /// # Errors
    /// When this rank's device cannot use it.
    fn choose_backend(&mut self, _backend: CollectiveBackend) -> Result<(), EngineError> {
        Ok(())
    }

    /// Opens the group's meeting point on `host`; rank 0 only, before the others join.
    ///
    /// # Errors
    /// When the address cannot be bound.
    fn open_rendezvous(&mut self, host: &str) -> Result<Rendezvous, EngineError>;

    /// Joins the group; `host` is the address at which this rank's collectives listen.
    ///
    /// # Errors
    /// When the others do not come in time.
    fn join_group(&mut self, rendezvous: &Rendezvous, host: &str) -> Result<(), EngineError>;

    /// Has the unpruned model, without adapters, read `rows` in one pass and keeps what it says of them, for a recipe that
    /// distils. Rows that it has read before cost nothing.
    ///
    /// # Errors
    /// When the recipe does not distil, a mask is in force, a logit is not finite, or a peer is lost.
    fn teach(&mut self, rows: &[&[u32]]) -> Result<(), EngineError>;

    /// One optimizer step over the micro-batches, each a list of windows of equal length.
    ///
    /// A step whose loss or gradient is not finite is skipped: on every rank alike the optimizer takes no step.
    ///
    /// # Errors
    /// The [`MOST_SKIPPED`]th skipped step in a row and one more, a score that is not finite, a lost peer, or, where the
    /// recipe distils, a window that was not taught; the optimizer step has then not been taken.
    fn train_step(&mut self, step: u64, micro_batches: &[Vec<&[u32]>]) -> Result<StepOutcome, EngineError>;

    /// Makes the passes over `rows`, of equal length and the same on all ranks, that the recipe's next decision is calibrated
    /// on, and tells `report` of them. Nothing of the shard changes.
    ///
    /// # Errors
    /// When the recipe needs none or there is nothing to calibrate on, a score is not finite, or a peer is lost.
    fn calibrate(&mut self, rows: &[&[u32]], report: &mut Report<'_>) -> Result<Calibration, EngineError>;

    /// Puts decision `generation` into force: compensates on the windows of `calibration`, of equal length and the same on
    /// all ranks, where the recipe says so; slices or masks, and moves groups between uneven ranks.
    ///
    /// # Errors
    /// When the mask would bring something back, or there is nothing to calibrate on.
    fn apply_mask(
        &mut self,
        generation: u64,
        keep_mask: &KeepMask,
        calibration: &[&[u32]],
    ) -> Result<MaskApplied, EngineError>;

    /// Negative log likelihood of all tokens but the first of every row, `rows_per_pass` rows at a time.
    ///
    /// # Errors
    /// A lost peer.
    fn evaluate(&mut self, rows: &[&[u32]], rows_per_pass: usize) -> Result<NllSum, EngineError>;

    /// Log likelihood of each continuation given its context, in nats, summed over its tokens: prompt by prompt, in one
    /// pass. Continuations do not see each other, nor do prompts.
    ///
    /// # Errors
    /// An empty context or continuation, a pair that is longer than the model's positions and one more, a lost peer.
    fn continuation_log_likelihoods(&mut self, prompts: &[Prompt<'_>]) -> Result<Vec<Vec<f64>>, EngineError>;

    /// Copies all that a continuation needs to the host's memory: LoRA factors, moments, what compensation has changed, what
    /// the unpruned model has taught, and this rank's part of the logits on `prompts`. The shard may go on at once.
    ///
    /// # Errors
    /// A lost peer, or too little memory.
    fn snapshot(&mut self, prompts: &[Vec<u32>]) -> Result<Box<dyn Snapshot>, EngineError>;

    /// Resident memory of this rank in bytes: of the device, or of the process on a CPU.
    fn memory_bytes(&self) -> u64;
}

/// Optimizer steps in a row that may be skipped.
pub const MOST_SKIPPED: u32 = 3;

/// A rank's state at one place between two steps, apart from its shard. It may be written from another thread.
pub trait Snapshot: Send {
    fn size_bytes(&self) -> u64;

    /// Writes `file`, complete and durable or not at all, and returns its SHA-256 in hex.
    ///
    /// # Errors
    /// When the file cannot be written.
    fn write(self: Box<Self>, file: &Path) -> Result<String, EngineError>;
}
