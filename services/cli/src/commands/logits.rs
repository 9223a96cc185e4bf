use crate::args::LogitsArgs;
use crate::children::worker_binary;
use crate::failure::{Failure, OrBadInput};
use crate::interrupts::Interrupts;
use crate::local_paths;
use anyhow::Context;
use std::process::Stdio;
use tokio::process::Command;

/// # Errors
/// When the input is wrong, or the worker that computes the logits fails.
pub(crate) async fn run(args: &LogitsArgs) -> Result<(), Failure> {
    let (model, spec) = local_paths::model(&args.model)?;
    if let Some(token) = args.tokens.iter().find(|token| **token as usize >= spec.vocab_size) {
        let message = format!("token id {token} is outside the model's vocabulary of {}", spec.vocab_size);
        return Err(Failure::bad_input(message));
    }
    let binary = worker_binary().or_bad_input()?;
    let mut interrupts = Interrupts::listen()?;
    let tokens =
        tempfile::NamedTempFile::with_suffix(".json").context("failed to create a file for the tokens")?;
    let text = serde_json::to_string(&[&args.tokens]).context("failed to write the tokens")?;
    std::fs::write(tokens.path(), text).context("failed to write the tokens")?;
    let mut command = Command::new(binary);
    command
        .arg("logits")
        .arg("--model")
        .arg(model)
        .arg("--tokens-file")
        .arg(tokens.path())
        .arg("--out")
        .arg(&args.out);
    command.stdin(Stdio::null()).process_group(0).kill_on_drop(true);
    let output = tokio::select! {
        output = command.output() => output.context("failed to start the worker")?,
        () = interrupts.reach(1) => return Err(Failure::Interrupted("no logits were written".into())),
    };
    if output.status.success() {
        return Ok(());
    }
    let words = String::from_utf8_lossy(&output.stderr);
    Err(Failure::failed(format!("the worker ended with {}", output.status)).with_note(words.trim_end()))
}
