use super::RecipeFlags;
use crate::run_file::{Evaluation, EvaluationMode, ExportDtype, Tasks, TextFile, TextFormat};
use clap::Args;
use std::path::PathBuf;

#[derive(Debug, Args)]
pub(crate) struct PruneArgs {
    /// Model folder in Hugging Face layout (config.json, safetensors, tokenizer.json)
    #[arg(long, value_name = "DIR", required_unless_present = "recipe")]
    pub(crate) model: Option<PathBuf>,
    #[command(flatten)]
    pub text: TextArgs,
    /// Empty or new folder for everything that the run leaves
    #[arg(long, value_name = "DIR", required_unless_present = "dry_run")]
    pub out: Option<PathBuf>,
    /// YAML file with a recipe, or with a whole run (deploy/runs/*.yaml), whose paths are relative to the current folder
    #[arg(long, value_name = "FILE")]
    pub recipe: Option<PathBuf>,
    /// Worker processes that share the model, 1 to its number of key/value heads [default: 1]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub workers: Option<u32>,
    /// Compute threads of each worker [default: cores / workers]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub threads: Option<u32>,
    /// Where workers compute: cpu, cuda (each on a GPU of its own) or cuda:N (all on that one)
    #[arg(long, value_name = "DEVICE", default_value = "cpu")]
    pub device: String,
    /// Only check everything and print what the run would do
    #[arg(long)]
    pub dry_run: bool,
    #[command(flatten)]
    pub recipe_flags: RecipeFlags,
    /// Held-out text, measured before the first step and after the last
    #[arg(long, value_name = "FILE", num_args = 1.., help_heading = "Evaluation")]
    pub eval_data: Vec<PathBuf>,
    /// Tokens of an evaluation window [default: 256]
    #[arg(long, value_name = "N", help_heading = "Evaluation")]
    pub eval_window: Option<u32>,
    /// Measure on the first N tokens only; 0 means all [default: 0]
    #[arg(long, value_name = "N", help_heading = "Evaluation")]
    pub eval_max_tokens: Option<u64>,
    /// How the held-out text is cut into windows [default: stream]
    #[arg(long, value_name = "MODE", help_heading = "Evaluation")]
    pub eval_mode: Option<EvaluationMode>,
    /// Format of the written weights [default: source]
    #[arg(long, value_name = "DTYPE", help_heading = "Export")]
    pub export_dtype: Option<ExportDtype>,
}

/// The text that a command reads.
#[derive(Debug, Args)]
pub(crate) struct TextArgs {
    /// Text files: .txt, .jsonl, .parquet, or token ids as .tokens.jsonl, .u16, .u32
    #[arg(long, value_name = "FILE", num_args = 1.., required_unless_present = "recipe")]
    pub data: Vec<PathBuf>,
    /// Field or column that holds the text [default: text, or input_ids for token ids]
    #[arg(long, value_name = "NAME")]
    pub data_field: Option<String>,
    /// Format of the text files [default: by extension]
    #[arg(long, value_name = "FORMAT")]
    pub data_format: Option<TextFormat>,
}

impl TextArgs {
    /// `paths` with the field and format that apply to all text of a command.
    pub(crate) fn files(&self, paths: &[PathBuf]) -> Vec<TextFile> {
        let file = |path: &PathBuf| TextFile {
            path: path.clone(),
            field: self.data_field.clone(),
            format: self.data_format,
        };
        paths.iter().map(file).collect()
    }
}

/// What is measured on a model as it is.
#[derive(Debug, Args)]
pub(crate) struct MeasureArgs {
    /// Text files: .txt, .jsonl, .parquet, or token ids as .tokens.jsonl, .u16, .u32
    #[arg(long, value_name = "FILE", num_args = 1.., required_unless_present = "tasks")]
    pub data: Vec<PathBuf>,
    /// Field or column that holds the text [default: text, or input_ids for token ids]
    #[arg(long, value_name = "NAME")]
    pub data_field: Option<String>,
    /// Format of the text files [default: by extension]
    #[arg(long, value_name = "FORMAT")]
    pub data_format: Option<TextFormat>,
    /// Tokens of a window; several, separated by commas, are measured one after the other
    #[arg(long, value_name = "N", value_delimiter = ',', default_value = "256")]
    pub window: Vec<u32>,
    /// How the text is cut into windows
    #[arg(long, value_enum, default_value_t = EvaluationMode::Stream)]
    pub(crate) mode: EvaluationMode,
    /// Read the first N tokens only; 0 means all
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub max_tokens: u64,
    /// Windows in one forward pass; does not change the result
    #[arg(long, value_name = "N", default_value_t = 8)]
    pub rows: u32,
    /// Multiple-choice questions, one file a task, one JSON object a line: `query`, `choices` and `gold`, or
    /// `context_options`, `continuation` and `gold`
    #[arg(long, value_name = "FILE", num_args = 1.., help_heading = "Tasks")]
    pub tasks: Vec<PathBuf>,
    /// Ask the first N questions of each task only; 0 means all
    #[arg(long, value_name = "N", default_value_t = 0, help_heading = "Tasks")]
    pub task_limit: u64,
    /// Tokens in one forward pass; does not change the result
    #[arg(long, value_name = "N", default_value_t = 512, help_heading = "Tasks")]
    pub pass_tokens: u32,
    /// Print each choice's log-likelihood too (with --json)
    #[arg(long, requires = "json", help_heading = "Tasks")]
    pub log_likelihoods: bool,
}

impl MeasureArgs {
    /// The text to measure perplexity on, if there is any.
    pub(crate) fn evaluation(&self) -> Option<Evaluation> {
        let file = |path: &PathBuf| TextFile {
            path: path.clone(),
            field: self.data_field.clone(),
            format: self.data_format,
        };
        let (first, more) = self.window.split_first()?;
        (!self.data.is_empty()).then(|| Evaluation {
            data: self.data.iter().map(file).collect(),
            window_tokens: *first,
            more_window_tokens: more.to_vec(),
            mode: self.mode,
            max_tokens: self.max_tokens,
            rows: self.rows,
        })
    }

    /// The tasks, if there are any.
    pub(crate) fn tasks(&self) -> Option<Tasks> {
        (!self.tasks.is_empty()).then(|| Tasks {
            files: self.tasks.clone(),
            max_rows: self.task_limit,
            pass_tokens: self.pass_tokens,
            log_likelihoods: self.log_likelihoods,
        })
    }
}

#[derive(Debug, Args)]
pub(crate) struct EvalArgs {
    /// Model folder in Hugging Face layout
    #[arg(long, value_name = "DIR")]
    pub(crate) model: PathBuf,
    #[command(flatten)]
    pub measure: MeasureArgs,
    /// Worker processes that share the model
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub workers: u32,
    /// Compute threads of each worker [default: cores / workers]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub threads: Option<u32>,
    /// Where workers compute: cpu, cuda (each on a GPU of its own) or cuda:N (all on that one)
    #[arg(long, value_name = "DEVICE", default_value = "cpu")]
    pub device: String,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct ImportArgs {
    /// GGUF file
    #[arg(long, value_name = "FILE")]
    pub gguf: PathBuf,
    /// Empty or new folder for the model
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// Format of the written weights
    #[arg(long, value_enum, default_value_t = ImportDtype::Bf16)]
    pub dtype: ImportDtype,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum ImportDtype {
    /// bfloat16
    Bf16,
    /// 16-bit floating point
    F16,
    /// 32-bit floating point
    F32,
}

#[derive(Debug, Args)]
pub(crate) struct LogitsArgs {
    /// Model folder in Hugging Face layout
    #[arg(long, value_name = "DIR")]
    pub(crate) model: PathBuf,
    /// Token ids, separated by commas
    #[arg(long, value_name = "IDS", value_delimiter = ',', required = true, num_args = 1..)]
    pub tokens: Vec<u32>,
    /// Safetensors file to write
    #[arg(long, value_name = "FILE")]
    pub out: PathBuf,
}

#[derive(Debug, Args)]
pub(crate) struct ReportArgs {
    /// Events of a run, one JSON object a line, as `prune` writes them and `watch --json` prints them
    #[arg(long, value_name = "FILE")]
    pub events: PathBuf,
    /// HTML file to write
    #[arg(long, value_name = "FILE")]
    pub out: PathBuf,
    /// The run as JSON [default: run.json beside the events, where there is one]
    #[arg(long, value_name = "FILE")]
    pub run: Option<PathBuf>,
    /// Also write the overview picture as SVG
    #[arg(long, value_name = "FILE")]
    pub svg: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct MethodsArgs {
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}
