//! The command line.

mod local;
mod plan;
mod recipe_flags;
mod remote;
mod security;
mod token;

pub(crate) use local::{
    EvalArgs, ImportArgs, ImportDtype, LogitsArgs, MeasureArgs, MethodsArgs, PruneArgs, ReportArgs,
};
pub(crate) use plan::{DeviceArgs, PlanArgs};
pub(crate) use recipe_flags::{
    CompensationName, CriterionName, DepthName, HeadGroupingName, OptimizerName, RampShapeName, RecipeFlags,
    ShapeName, StorageName,
};
pub(crate) use remote::{
    CancelArgs, CreateArgs, DownloadArgs, DrainArgs, EvaluateArgs, ExportArgs, ForkArgs, ListArgs, MaskArgs,
    RemoteArgs, RunIdArgs, WatchArgs, WhatIfArgs, WorkersArgs,
};

pub(crate) use token::{TokenArgs, TokenCommand};

use clap::{Parser, Subcommand};

/// Prunes LLaMA-family models while it fine-tunes them with LoRA, on tensor-parallel workers.
///
/// `prune`, `plan`, `eval`, `import`, `logits` and `report` work on this machine alone. The other commands talk to a running
/// coordinator. Exit codes: 0 done, 1 a run failed, 2 wrong input, 130 interrupted.
#[derive(Debug, Parser)]
#[command(name = "espalier", version, propagate_version = true, arg_required_else_help = true)]
pub(crate) struct Args {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    // On this machine.
    /// Prune a model on this machine: starts a coordinator and workers, shows progress, leaves a smaller checkpoint
    ///
    /// Writes OUT/model (a checkpoint that stock `transformers` loads), OUT/report.html, OUT/report.svg, OUT/run.json,
    /// OUT/events.jsonl and OUT/logs. Flags override the recipe file; what neither says takes the default. Steps become
    /// faster while the model shrinks, so the time left is an upper bound. Ctrl-C cancels the run and stops the
    /// workers; a second one kills them. The workers run the program `worker` beside this one, or $ESPALIER_WORKER_BIN;
    /// $RUST_LOG says what goes to OUT/logs, $OTEL_EXPORTER_OTLP_ENDPOINT where traces go.
    Prune(Box<PruneArgs>),
    /// Say what a run will take, before anything starts: parameters, memory by worker and kind, work, traffic, time
    ///
    /// Reads a model's config.json alone. Ends with exit code 2 and what to change when the run cannot fit the device or its
    /// result cannot be exported. Memory on a CPU is held against measured runs; times are computed from the rates given and
    /// measured nowhere (docs/planning.md).
    Plan(Box<PlanArgs>),
    /// List the methods that a recipe can choose: source, what each costs, and what it does not go with
    Methods(MethodsArgs),
    /// Measure a model's perplexity on a text and its answers to multiple-choice tasks, on this machine
    ///
    /// Perplexity by the published protocol: one stream of tokens, windows that do not overlap, each window alone,
    /// exp(negative log likelihood / predicted tokens). Tasks by the rules of lm-evaluation-harness, zero-shot: the choice
    /// with the highest log-likelihood, plain and divided by its characters.
    Eval(EvalArgs),
    /// Turn a GGUF file into a model folder in Hugging Face layout
    ///
    /// Reads F32, F16, BF16, Q4_0, Q4_1, Q8_0, Q4_K and Q6_K tensors and the tokenizer of LLaMA-family files.
    Import(ImportArgs),
    /// Write a model's logits for given token ids to a safetensors file
    ///
    /// The file holds `input_ids` [1, tokens] and `logits` [1, tokens, vocabulary] in f32.
    Logits(LogitsArgs),
    /// Draw a run's events as one self-contained HTML page
    ///
    /// The page needs no other file and no network. What the events do not say (recipe, plan) is read from --run.
    Report(ReportArgs),
    // At a coordinator.
    /// Create a run from a YAML file
    Create(CreateArgs),
    /// Show a run
    Get(RunIdArgs),
    /// List runs, newest first unless ordered otherwise
    List(ListArgs),
    /// Follow a run's events until it ends
    Watch(WatchArgs),
    /// Checkpoint a run after the step under way and give its workers back
    Pause(RunIdArgs),
    /// Let a paused run go on from its checkpoint
    Resume(RunIdArgs),
    /// End a run after a checkpoint
    Cancel(CancelArgs),
    /// Forget a run that has ended, with its checkpoints; what it exported stays
    Delete(RunIdArgs),
    /// Start a run that goes on from a decision of another
    Fork(ForkArgs),
    /// Say what another budget would keep, from the importance of a decision
    WhatIf(WhatIfArgs),
    /// Print the averaged importance that each decision was made on, as JSON lines
    Importance(WatchArgs),
    /// List the files that a run has exported
    Artifacts(RunIdArgs),
    /// Fetch the files that a run has exported, and check their digests
    Download(DownloadArgs),
    /// Measure the exported model of a run on another text, or on tasks
    Evaluate(EvaluateArgs),
    /// Write the pruned model of a run to another folder or in another format
    Export(ExportArgs),
    /// List a run's mask decisions
    Decisions(RunIdArgs),
    /// Show which heads and channels a decision keeps
    Mask(MaskArgs),
    /// List the workers that the coordinator knows
    Workers(WorkersArgs),
    /// Take a worker out of service: its run is checkpointed and goes on with other workers
    Drain(DrainArgs),
    // Of access.
    /// Make tokens for people and programs that call a coordinator
    Token(TokenArgs),
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Args::command().debug_assert();
    }

    #[test]
    fn wrong_values_are_named() {
        let cases: [(&[&str], &str); 5] = [
            (
                &["espalier", "prune", "--model", "m", "--data", "d", "--out", "o", "--criterion", "best"],
                "best",
            ),
            (&["espalier", "prune", "--model", "m", "--data", "d", "--out", "o", "--workers", "0"], "0"),
            (&["espalier", "prune", "--data", "d", "--out", "o"], "--model"),
            (&["espalier", "eval", "--model", "m"], "--data"),
            (&["espalier", "prune", "--model", "m", "--data", "d"], "--out"),
        ];
        for (line, word) in cases {
            let message = Args::try_parse_from(line).unwrap_err().to_string();
            assert!(message.contains(word), "{line:?} gives {message}");
        }
    }
}
