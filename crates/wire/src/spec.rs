//! What a run is to do, as the services hold it once its message has been checked.

use pruning_run::{Guard, Retention};
use recipe::Recipe;

/// A checked `RunSpec`, defaults filled in.
#[derive(Debug, Clone, PartialEq)]
pub struct RunSpec {
    /// Model folder, as given: the services hold it against their roots.
    pub model: String,
    /// Text to tune on; not empty unless `recipe.steps` is 0.
    pub training_data: Vec<TextSource>,
    pub recipe: Recipe,
    pub tp_degree: usize,
    pub evaluation: Option<EvaluationSpec>,
    pub tasks: Option<TaskSpec>,
    pub export: Option<ExportSpec>,
    pub display_name: String,
    /// Fewest workers to go on with after a fault.
    pub min_tp_degree: usize,
    /// Where its workers are taken from; empty: any pool.
    pub worker_pool: String,
    pub durability: Durability,
    pub guard: Option<Guard>,
}

/// When state is written and how often a run may start anew.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Durability {
    /// Optimizer steps between checkpoints, beside those after decisions.
    pub checkpoint_every_steps: u64,
    pub retention: Retention,
    /// Restarts without a new checkpoint between them.
    pub max_restarts: u32,
}

/// One file of text or token ids.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TextSource {
    pub path: String,
    /// Absent: by the file's extension.
    pub format: Option<TextFormat>,
    /// Field or column; absent: that of the format.
    pub field: Option<String>,
}

/// Format of a text file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TextFormat {
    Plain,
    JsonLines,
    Parquet,
    TokensJsonLines,
    TokensU16,
    TokensU32,
}

/// How perplexity is measured.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EvaluationSpec {
    /// The held-out text; at least one file.
    pub sources: Vec<TextSource>,
    /// Window lengths, each measured by itself; at least one.
    pub windows: Vec<usize>,
    /// Only the first so many tokens; absent: all.
    pub max_tokens: Option<u64>,
    pub mode: EvaluationMode,
    /// Windows in one forward pass.
    pub rows: usize,
}

/// Multiple-choice questions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TaskSpec {
    /// One file a task; at least one.
    pub files: Vec<String>,
    /// Only the first so many rows of each file; absent: all.
    pub max_rows: Option<u64>,
    /// Tokens in one forward pass.
    pub pass_tokens: usize,
    /// Whether each choice's log-likelihood is returned.
    pub log_likelihoods: bool,
}

/// How a held-out text is cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EvaluationMode {
    /// One stream, windows that do not overlap.
    Stream,
    /// Each document alone behind BOS.
    Stories,
}

/// How a pruned model is written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExportSpec {
    /// Folder, as given: the services hold it against their roots.
    pub path: String,
    pub dtype: ExportDtype,
    pub max_shard_bytes: u64,
}

/// Format of exported weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExportDtype {
    /// That of the model pruned.
    Source,
    Bf16,
    F16,
    F32,
}
