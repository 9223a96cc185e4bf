use crate::args::LogitsArgs;
use crate::children::worker_binary;
use crate::failure::{Failure, OrBadInput};
use crate::interrupts::Interrupts;
use crate::local_paths;
use anyhow::Context;
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use std::path::Path;
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
    let scratch = tempfile::tempdir().context("failed to create a folder for the tokens")?;
    let (tokens, computed) = (scratch.path().join("tokens.json"), scratch.path().join("logits.safetensors"));
    let text = serde_json::to_string(&[&args.tokens]).context("failed to write the tokens")?;
    std::fs::write(&tokens, text).context("failed to write the tokens")?;
    let mut command = Command::new(binary);
    command.arg("logits").arg("--model").arg(model);
    command.arg("--tokens-file").arg(&tokens).arg("--out").arg(&computed);
    command.stdin(Stdio::null()).process_group(0).kill_on_drop(true);
    let output = tokio::select! {
        output = command.output() => output.context("failed to start the worker")?,
        () = interrupts.reach(1) => return Err(Failure::Interrupted("no logits were written".into())),
    };
    if !output.status.success() {
        let words = String::from_utf8_lossy(&output.stderr);
        let message = format!("the worker ended with {}", output.status);
        return Err(Failure::failed(message).with_note(words.trim_end()));
    }
    write(&args.tokens, spec.vocab_size, &computed, &args.out)?;
    Ok(())
}

/// Writes `input_ids` [1, tokens] and `logits` [1, tokens, vocabulary], from the worker's `logits.0` of its one window.
fn write(tokens: &[u32], vocab_size: usize, computed: &Path, out: &Path) -> anyhow::Result<()> {
    let unreadable = || format!("failed to read `{}`", computed.display());
    let bytes = std::fs::read(computed).with_context(unreadable)?;
    let file = SafeTensors::deserialize(&bytes).with_context(unreadable)?;
    let logits = file.tensor("logits.0").with_context(unreadable)?;
    let logits = TensorView::new(Dtype::F32, vec![1, tokens.len(), vocab_size], logits.data())
        .context("the worker's logits are not those of the tokens")?;
    let ids: Vec<u8> = tokens.iter().flat_map(|token| i64::from(*token).to_le_bytes()).collect();
    let ids =
        TensorView::new(Dtype::I64, vec![1, tokens.len()], &ids).context("failed to lay out the tokens")?;
    safetensors::serialize_to_file([("input_ids", ids), ("logits", logits)], None, out)
        .with_context(|| format!("failed to write `{}`", out.display()))
}
