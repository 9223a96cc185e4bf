//! The command line.

mod local;
mod recipe_flags;
mod remote;

pub(crate) use local::{EvalArgs, ImportArgs, ImportDtype, LogitsArgs, PruneArgs, ReportArgs};
pub(crate) use recipe_flags::RecipeFlags;
pub(crate) use remote::{
    CreateArgs, EvaluateArgs, ExportArgs, ListArgs, MaskArgs, RemoteArgs, RunIdArgs, WatchArgs, WorkersArgs,
};

use clap::{Parser, Subcommand};

/// Prunes LLaMA-family models while it fine-tunes them with LoRA, on tensor-parallel workers.
///
/// `prune`, `eval`, `import`, `logits` and `report` work on this machine alone. The other commands talk to a running
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
    Prune(Box<PruneArgs>),
    /// Measure a model's perplexity on a text, on this machine
    Eval(EvalArgs),
    /// Turn a GGUF file into a model folder in Hugging Face layout
    Import(ImportArgs),
    /// Write a model's logits for given token ids to a safetensors file
    Logits(LogitsArgs),
    /// Draw a run's events as one self-contained HTML page
    Report(ReportArgs),
    // At a coordinator.
    /// Create a run from a YAML file
    Create(CreateArgs),
    /// Show a run
    Get(RunIdArgs),
    /// List runs, newest first
    List(ListArgs),
    /// Follow a run's events until it ends
    Watch(WatchArgs),
    /// End a run; its workers stop before their next step
    Cancel(RunIdArgs),
    /// Measure the exported model of a run on another text
    Evaluate(EvaluateArgs),
    /// Write the pruned model of a run to another folder or in another format
    Export(ExportArgs),
    /// List a run's mask decisions
    Decisions(RunIdArgs),
    /// Show which heads and channels a decision keeps
    Mask(MaskArgs),
    /// List the workers that the coordinator knows
    Workers(WorkersArgs),
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
