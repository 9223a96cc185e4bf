//! A run as a YAML file: what `create --file` sends and `prune --recipe` starts from.

use crate::failure::{Failure, OrBadInput};
use anyhow::Context;
use clap::ValueEnum;
use recipe::Recipe;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use wire::pb;

/// Everything that a run is told. Paths are as the workers see them.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct RunFile {
    /// Human-readable name.
    pub name: String,
    /// Model folder in Hugging Face layout.
    pub(crate) model: Option<PathBuf>,
    /// Text to tune on.
    pub data: Vec<TextFile>,
    pub recipe: Recipe,
    /// Workers that share the model.
    pub workers: Option<u32>,
    /// Held-out text, measured before and after.
    pub evaluation: Option<Evaluation>,
    /// Multiple-choice tasks, measured before and after.
    pub tasks: Option<Tasks>,
    /// Where the pruned model goes.
    pub export: Option<Export>,
    /// Fewest workers to go on with once one was lost; by default as many as at first.
    pub min_workers: Option<u32>,
    /// Pool that the workers are taken from.
    pub worker_pool: Option<String>,
    /// When state is written and how often the run may start anew.
    pub durability: Option<Durability>,
    /// Pruning stops while the held-out text suffers more than this allows.
    pub guard: Option<Guard>,
}

/// When state is written and how often a run may start anew.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Durability {
    /// Optimizer steps between checkpoints; one is also written after every decision. By default 25.
    pub checkpoint_every_steps: Option<u32>,
    /// Latest checkpoints that are kept. By default 2.
    pub keep_last: Option<u32>,
    /// Do not keep the checkpoint after each decision.
    pub forget_decisions: bool,
    /// Restarts without a new checkpoint between them. By default 3; 0 for `prune`, whose workers do not come back.
    pub max_restarts: Option<u32>,
}

/// Prune on only while perplexity stays within a budget.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Guard {
    /// Highest perplexity.
    #[serde(default)]
    pub max_perplexity: Option<f64>,
    /// Highest perplexity, as a multiple of the dense model's.
    #[serde(default)]
    pub max_ratio: Option<f64>,
    pub action: GuardAction,
}

/// What happens when a guard's bound is exceeded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum GuardAction {
    /// Keep the mask in force and prune no further.
    Hold,
    /// Go back to the decision before and prune no further.
    Revert,
}

impl Durability {
    fn to_pb(self) -> pb::DurabilitySpec {
        pb::DurabilitySpec {
            checkpoint_every_steps: self.checkpoint_every_steps,
            keep_last: self.keep_last,
            forget_decisions: self.forget_decisions,
            max_restarts: self.max_restarts,
        }
    }
}

impl Guard {
    fn to_pb(self) -> pb::QualityGuard {
        use pb::quality_guard::Bound;
        let action = match self.action {
            GuardAction::Hold => pb::GuardAction::Hold,
            GuardAction::Revert => pb::GuardAction::Revert,
        };
        let bound = self.max_perplexity.map(Bound::MaxPerplexity).or(self.max_ratio.map(Bound::MaxRatio));
        pb::QualityGuard { bound, action: action.into() }
    }
}

/// One file of text.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct TextFile {
    pub path: PathBuf,
    /// Field or column with the text; by default `text`, or `input_ids` for token ids.
    #[serde(default)]
    pub field: Option<String>,
    /// By default known from the extension.
    #[serde(default)]
    pub format: Option<TextFormat>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum TextFormat {
    /// UTF-8 text
    Plain,
    /// One JSON object a line
    JsonLines,
    /// Parquet with a string column
    Parquet,
    /// One JSON object a line, token ids in an integer array
    TokensJsonLines,
    /// Little-endian 16-bit token ids
    TokensU16,
    /// Little-endian 32-bit token ids
    TokensU32,
}

/// How perplexity is measured.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Evaluation {
    pub data: Vec<TextFile>,
    /// Tokens of a window.
    pub window_tokens: u32,
    /// Further lengths, measured one after the other.
    pub more_window_tokens: Vec<u32>,
    pub(crate) mode: EvaluationMode,
    /// Only the first so many tokens; 0 means all.
    pub max_tokens: u64,
    /// Windows in one forward pass; does not change the result.
    pub rows: u32,
}

/// Multiple-choice tasks.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Tasks {
    /// One file a task.
    pub files: Vec<PathBuf>,
    /// Only the first so many rows of each; 0 means all.
    pub max_rows: u64,
    /// Tokens in one forward pass; does not change the result.
    pub pass_tokens: u32,
    /// Whether each choice's log-likelihood is returned.
    pub log_likelihoods: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum EvaluationMode {
    /// One stream without special tokens, cut into windows that do not overlap
    Stream,
    /// Documents separated by `<|endoftext|>`, each alone, cut to one window
    Stories,
}

/// Where and how the pruned model is written.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Export {
    /// Left out in files for `prune`, which writes below its own folder.
    #[serde(default)]
    pub path: Option<PathBuf>,
    #[serde(default)]
    pub dtype: ExportDtype,
    /// Largest weight file; by default 5 GiB.
    #[serde(default)]
    pub max_shard_bytes: Option<u64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum ExportDtype {
    /// That of the model pruned
    #[default]
    Source,
    /// bfloat16
    Bf16,
    /// 16-bit floating point
    F16,
    /// 32-bit floating point
    F32,
}

impl Default for Evaluation {
    fn default() -> Self {
        Self {
            data: Vec::new(),
            window_tokens: 256,
            more_window_tokens: Vec::new(),
            mode: EvaluationMode::Stream,
            max_tokens: 0,
            rows: 8,
        }
    }
}

impl Default for Tasks {
    fn default() -> Self {
        Self { files: Vec::new(), max_rows: 0, pass_tokens: 512, log_likelihoods: false }
    }
}

impl Default for Export {
    fn default() -> Self {
        Self { path: None, dtype: ExportDtype::Source, max_shard_bytes: None }
    }
}

impl RunFile {
    /// Reads a run file, or a file that holds a recipe alone.
    ///
    /// A file with any of the keys `model`, `data`, `recipe`, `workers`, `evaluation`, `tasks`, `export` and `name` is a run.
    ///
    /// # Errors
    /// When it cannot be read, is no YAML, or has a key or value that is not known: with its path, line and column.
    pub(crate) fn read(path: &Path) -> Result<Self, Failure> {
        let text = std::fs::read_to_string(path)
            .with_context(|| format!("failed to read the run file `{}`", path.display()))
            .or_bad_input()?;
        Self::parse(&text).with_context(|| format!("`{}` is not a run file", path.display())).or_bad_input()
    }

    fn parse(text: &str) -> anyhow::Result<Self> {
        const RUN_KEYS: [&str; 8] =
            ["name", "model", "data", "recipe", "workers", "evaluation", "tasks", "export"];
        let value: serde_yaml_ng::Value = serde_yaml_ng::from_str(text).context("this is not YAML")?;
        anyhow::ensure!(!value.is_null(), "it is empty");
        let is_run =
            value.as_mapping().is_none_or(|mapping| RUN_KEYS.iter().any(|key| mapping.contains_key(key)));
        if is_run { from_yaml(text) } else { Ok(Self { recipe: from_yaml(text)?, ..Self::default() }) }
    }

    /// The run in the words of the API.
    #[must_use]
    pub(crate) fn to_spec(&self) -> pb::RunSpec {
        pb::RunSpec {
            model: self.model.as_deref().map(path_text).unwrap_or_default(),
            training_data: self.data.iter().map(TextFile::to_pb).collect(),
            recipe: Some(wire::convert::recipe::to_pb(&self.recipe)),
            tp_degree: self.workers,
            evaluation: self
                .evaluation
                .as_ref()
                .filter(|evaluation| !evaluation.data.is_empty())
                .map(Evaluation::to_pb),
            tasks: self.tasks.as_ref().filter(|tasks| !tasks.files.is_empty()).map(Tasks::to_pb),
            export: self.export.as_ref().map(Export::to_pb),
            display_name: self.name.clone(),
            min_tp_degree: self.min_workers,
            durability: self.durability.map(Durability::to_pb),
            guard: self.guard.map(Guard::to_pb),
            worker_pool: self.worker_pool.clone().unwrap_or_default(),
        }
    }
}

/// Enums with a value are written as a map of one key: `budget: {sparsity: 0.5}`.
fn from_yaml<T: serde::de::DeserializeOwned>(text: &str) -> anyhow::Result<T> {
    let deserializer = serde_yaml_ng::Deserializer::from_str(text);
    Ok(serde_yaml_ng::with::singleton_map_recursive::deserialize(deserializer)?)
}

fn path_text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

impl TextFile {
    pub(crate) fn to_pb(&self) -> pb::TextSource {
        let format = match self.format {
            None => pb::TextFormat::Unspecified,
            Some(TextFormat::Plain) => pb::TextFormat::Plain,
            Some(TextFormat::JsonLines) => pb::TextFormat::JsonLines,
            Some(TextFormat::Parquet) => pb::TextFormat::Parquet,
            Some(TextFormat::TokensJsonLines) => pb::TextFormat::TokensJsonLines,
            Some(TextFormat::TokensU16) => pb::TextFormat::TokensU16,
            Some(TextFormat::TokensU32) => pb::TextFormat::TokensU32,
        };
        pb::TextSource {
            path: path_text(&self.path),
            format: format.into(),
            field: self.field.clone().unwrap_or_default(),
        }
    }
}

impl Evaluation {
    #[must_use]
    pub(crate) fn to_pb(&self) -> pb::EvaluationSpec {
        let mode = match self.mode {
            EvaluationMode::Stream => pb::EvaluationMode::Stream,
            EvaluationMode::Stories => pb::EvaluationMode::Stories,
        };
        pb::EvaluationSpec {
            sources: self.data.iter().map(TextFile::to_pb).collect(),
            window_tokens: Some(self.window_tokens),
            more_window_tokens: self.more_window_tokens.clone(),
            max_tokens: self.max_tokens,
            mode: Some(mode.into()),
            rows: Some(self.rows),
        }
    }
}

impl Tasks {
    #[must_use]
    pub(crate) fn to_pb(&self) -> pb::TaskSpec {
        pb::TaskSpec {
            files: self.files.iter().map(|file| path_text(file)).collect(),
            max_rows: self.max_rows,
            pass_tokens: Some(self.pass_tokens),
            log_likelihoods: self.log_likelihoods,
        }
    }
}

impl Export {
    #[must_use]
    pub(crate) fn to_pb(&self) -> pb::ExportSpec {
        let dtype = match self.dtype {
            ExportDtype::Source => pb::ExportDtype::Source,
            ExportDtype::Bf16 => pb::ExportDtype::Bf16,
            ExportDtype::F16 => pb::ExportDtype::F16,
            ExportDtype::F32 => pb::ExportDtype::F32,
        };
        pb::ExportSpec {
            path: self.path.as_deref().map(path_text).unwrap_or_default(),
            dtype: Some(dtype.into()),
            max_shard_bytes: self.max_shard_bytes,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use recipe::{Budget, Criterion, LoraPruneForm, Protection, Shape};

    #[test]
    fn a_run_file_says_it_all() {
        let run = RunFile::parse(
            "name: small\nmodel: models/small\ndata: [{path: a.jsonl, field: body}]\nworkers: 2\n\
             recipe:\n  steps: 50\n  optimizer: {kind: adamw, weight_decay: 0.01}\n  pruning:\n\
             \x20   criterion: {kind: lora_prune, form: paper}\n    budget: {parameters: 9000}\n    shape: paper\n\
             \x20   protection: {layers: [0, 3]}\nevaluation: {data: [{path: b.txt, format: plain}], mode: stories, more_window_tokens: [512]}\n\
             tasks: {files: [boolq.jsonl], max_rows: 5}\nexport: {path: out, dtype: bf16}\n",
        )
        .unwrap();
        let pruning = run.recipe.pruning.clone().unwrap();
        assert_eq!(pruning.criterion, Criterion::LoraPrune { form: LoraPruneForm::Paper });
        assert_eq!(pruning.budget, Budget::Parameters(9000));
        assert_eq!(pruning.shape, Shape::Paper);
        assert_eq!(pruning.protection, Protection::Layers(vec![0, 3]));
        let spec = run.to_spec();
        assert_eq!((spec.model.as_str(), spec.tp_degree), ("models/small", Some(2)));
        assert_eq!(spec.training_data[0].field, "body");
        let evaluation = spec.evaluation.unwrap();
        assert_eq!(evaluation.mode(), pb::EvaluationMode::Stories);
        assert_eq!(evaluation.more_window_tokens, [512]);
        let tasks = spec.tasks.unwrap();
        assert_eq!(
            (tasks.files, tasks.max_rows, tasks.pass_tokens),
            (vec!["boolq.jsonl".into()], 5, Some(512))
        );
        assert_eq!(spec.export.unwrap().dtype(), pb::ExportDtype::Bf16);
    }

    #[test]
    fn a_recipe_alone_is_read_too() {
        let run =
            RunFile::parse("steps: 7\npruning: {budget: {sparsity: 0.25}, protection: by_shape}\n").unwrap();
        assert_eq!(run.recipe.steps, 7);
        assert_eq!(run.recipe.pruning.unwrap().budget, Budget::Sparsity(0.25));
        assert_eq!(run.model, None);
    }

    #[test]
    fn a_wrong_file_is_refused_with_the_place() {
        let cases = [
            ("model: m\ncolour: red\n", ["colour", "unknown field"]),
            ("model: m\nrecipe: {batch: {row: 3}}\n", ["recipe.batch", "row"]),
            ("steps: 3\npruning: {shape: round}\n", ["pruning.shape", "round"]),
            ("recipe: {pruning: {budget: {ratio: 1}}}\n", ["ratio", "sparsity"]),
            ("model: [\n", ["not YAML", "line"]),
            ("", ["empty", ""]),
            ("- 1\n", ["invalid type", "sequence"]),
            ("steps: -1\n", ["steps", "-1"]),
        ];
        for (text, words) in cases {
            let message = format!("{:#}", RunFile::parse(text).unwrap_err());
            for word in words {
                assert!(message.contains(word), "{text:?} gives {message:?}, which lacks {word:?}");
            }
        }
    }

    #[test]
    fn the_example_run_files_are_read_and_sound() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../deploy/runs");
        let mut count = 0;
        for entry in std::fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            let run = RunFile::read(&path).unwrap_or_else(|failure| panic!("{failure}"));
            assert_eq!(run.recipe.violations(), [], "{}", path.display());
            assert!(run.model.is_some() && !run.data.is_empty(), "{}", path.display());
            count += 1;
        }
        assert!(count >= 3);
    }
}
