//! Whether an exported folder is the model that the run had: a process of its own reloads it, and its logits are compared
//! with those that the ranks wrote down.

use crate::communicator::Alone;
use crate::dropout::Dropout;
use crate::factors::FactorLayout;
use crate::fault::{Fault, Result, chain};
use crate::frozen::FrozenFormat;
use crate::model::{Adapters, Model};
use crate::source::{Source, kind_of};
use crate::state_file::{PROBE_LOGITS, RankState, to_bytes};
use checkpoint::{Dtype, TensorRef};
use sharding::Placement;
use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use tch::{Device, Kind, Tensor};

/// Longest that reloading an exported folder may take.
const CHECK_TIMEOUT: Duration = Duration::from_secs(20 * 60);
/// Largest mean KL divergence, in nats, that rounding the merged weights to 16 bits may cause.
const MAX_ROUNDING_KL: f64 = 0.05;
/// Largest logit difference, relative to the largest logit, of an export that does not round below f32.
const MAX_F32_DIFFERENCE: f64 = 1e-3;
/// The same where distributions agree to [`MAX_AMPLIFIED_KL`] nats.
const MAX_AMPLIFIED_DIFFERENCE: f64 = 1e-2;
const MAX_AMPLIFIED_KL: f64 = 1e-5;

/// How far the reloaded folder is from the run.
pub(crate) struct LogitCheck {
    pub(crate) prompts: usize,
    pub(crate) max_difference: f64,
    pub(crate) max_logit: f64,
    pub(crate) top_token_agreement: f64,
    /// In nats.
    pub(crate) mean_kl: f64,
}

impl LogitCheck {
    /// Whether what was written computes what the run did, but for rounding to `dtype`. A badly damaged model can amplify
    /// rounding to more than a sound one would; its distributions then still agree.
    fn is_of_the_run(&self, dtype: Dtype) -> bool {
        let finite =
            self.max_difference.is_finite() && self.max_logit.is_finite() && self.mean_kl.is_finite();
        finite
            && match dtype {
                Dtype::F32 | Dtype::F64 => {
                    self.max_difference <= MAX_F32_DIFFERENCE * self.max_logit.max(1.0)
                        || (self.max_difference <= MAX_AMPLIFIED_DIFFERENCE * self.max_logit
                            && self.mean_kl <= MAX_AMPLIFIED_KL)
                }
                Dtype::Bf16 | Dtype::F16 => self.mean_kl <= MAX_ROUNDING_KL,
            }
    }
}

/// Reloads the folder in a process of its own and compares its logits with those that the ranks wrote down.
pub(crate) fn check_folder(
    folder: &Path,
    ranks: &[RankState],
    dtype: Dtype,
    program: &Path,
) -> Result<LogitCheck> {
    let prompts = match ranks.first() {
        Some(rank) if !rank.prompts.is_empty() => &rank.prompts,
        Some(_) | None => {
            return Err(Fault::Refused("the checkpoint holds no prompts to check the export with".into()));
        }
    };
    let parts = ranks.iter().map(|rank| rank.tensor(PROBE_LOGITS)).collect::<Result<Vec<_>>>()?;
    let expected = Tensor::f_cat(&parts, 1)?.f_to_kind(Kind::Double)?;
    let work = tempfile::tempdir()
        .map_err(|error| Fault::Unwritten(format!("failed to make a temporary folder: {error}")))?;
    let (tokens, out) = (work.path().join("prompts.json"), work.path().join("logits.safetensors"));
    let text = serde_json::to_vec(prompts).map_err(|error| Fault::File(error.to_string()))?;
    std::fs::write(&tokens, text)
        .map_err(|error| Fault::Unwritten(format!("failed to write prompts: {error}")))?;
    run_logits(program, folder, &tokens, &out)?;
    let reloaded = checkpoint::read_tensors(&out, None).map_err(|error| Fault::File(chain(&error)))?;
    let mut actual = Vec::with_capacity(prompts.len());
    for index in 0..prompts.len() {
        let name = format!("logits.{index}");
        let tensor = reloaded
            .tensors
            .get(&name)
            .ok_or_else(|| Fault::File(format!("the check wrote no tensor `{name}`")))?;
        let shape: Vec<i64> = tensor.shape.iter().map(|size| *size as i64).collect();
        actual.push(Tensor::f_from_data_size(&tensor.bytes, &shape, kind_of(tensor.dtype))?);
    }
    let actual = Tensor::f_cat(&actual, 0)?.f_to_kind(Kind::Double)?;
    if actual.size() != expected.size() {
        let (actual, expected) = (actual.size(), expected.size());
        return Err(Fault::Refused(format!(
            "the reloaded logits have shape {actual:?}, the run's {expected:?}"
        )));
    }
    let check = compare(&expected, &actual, prompts.len())?;
    if !check.is_of_the_run(dtype) {
        return Err(Fault::Refused(format!(
            "the exported model is not the run's: largest logit difference {:.3e} (largest logit {:.3e}), \
             mean KL divergence {:.3e} nats",
            check.max_difference, check.max_logit, check.mean_kl
        )));
    }
    Ok(check)
}

fn compare(expected: &Tensor, actual: &Tensor, prompts: usize) -> Result<LogitCheck> {
    let value = |tensor: Tensor| tensor.f_double_value(&[]);
    let (log_p, log_q) = (expected.f_log_softmax(-1, None)?, actual.f_log_softmax(-1, None)?);
    let kl = log_p
        .f_exp()?
        .f_mul(&log_p.f_sub(&log_q)?)?
        .f_sum_dim_intlist(&[1i64][..], false, None)?
        .f_mean(None)?;
    let same = expected.f_argmax(-1, false)?.f_eq_tensor(&actual.f_argmax(-1, false)?)?;
    Ok(LogitCheck {
        prompts,
        max_difference: value(expected.f_sub(actual)?.f_abs()?.f_max()?)?,
        max_logit: value(expected.f_abs()?.f_max()?)?,
        top_token_agreement: value(same.f_to_kind(Kind::Double)?.f_mean(None)?)?,
        mean_kl: value(kl)?,
    })
}

fn run_logits(program: &Path, folder: &Path, tokens: &Path, out: &Path) -> Result<()> {
    let failed = |text: String| {
        Fault::Unwritten(format!("failed to check the export with `{}`: {text}", program.display()))
    };
    let mut child = Command::new(program)
        .arg("logits")
        .arg("--model")
        .arg(folder)
        .arg("--tokens-file")
        .arg(tokens)
        .arg("--out")
        .arg(out)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| failed(error.to_string()))?;
    let deadline = Instant::now() + CHECK_TIMEOUT;
    loop {
        match child.try_wait().map_err(|error| failed(error.to_string()))? {
            Some(status) if status.success() => return Ok(()),
            Some(status) => {
                let mut text = String::new();
                if let Some(mut stderr) = child.stderr.take() {
                    let _ = std::io::Read::read_to_string(&mut stderr, &mut text);
                }
                return Err(failed(format!("{status}: {}", text.trim())));
            }
            None if Instant::now() > deadline => {
                let _ = child.kill();
                let _ = child.wait();
                return Err(failed(format!("it took longer than {CHECK_TIMEOUT:?}")));
            }
            None => std::thread::sleep(Duration::from_millis(20)),
        }
    }
}

/// Loads a model folder on one rank and writes its f32 logits for each prompt: tensors `logits.0`, `logits.1`, …, each
/// `[tokens, vocabulary]`.
///
/// # Errors
/// When the folder or a prompt is at fault, or `out` cannot be written.
pub fn write_logits(
    model: &Path,
    prompts: &[Vec<u32>],
    out: &Path,
) -> std::result::Result<(), engine::EngineError> {
    let _no_grad = tch::no_grad_guard();
    Ok(logits_of_folder(model, prompts, out)?)
}

fn logits_of_folder(model: &Path, prompts: &[Vec<u32>], out: &Path) -> Result<()> {
    let source = Source::open(model)?;
    let spec = source.spec();
    let placement = Placement::dense(spec, 1).map_err(|error| Fault::Refused(error.to_string()))?;
    let held = &placement.ranks[0];
    // Held as the file has it, half the memory for a 16-bit one; each product widens what it needs.
    let storage = match source.view(checkpoint::EMBEDDING)?.dtype {
        Dtype::F64 => Kind::Float,
        narrow @ (Dtype::F32 | Dtype::Bf16 | Dtype::F16) => kind_of(narrow),
    };
    let mut loaded = Model::load(
        &source,
        held,
        0..spec.vocab_size,
        FrozenFormat::Dense(storage),
        Kind::Float,
        Device::Cpu,
        &engine::Progress::default(),
    )?;
    let layout = FactorLayout::new(spec, held, 1);
    let factors = layout.zeros(Kind::Float, Device::Cpu)?;
    let adapters = Adapters {
        layout: &layout,
        factors: &factors,
        ledger: &[],
        lora_rank: 1,
        scaling: 1.0,
        dropout: Dropout::off(),
    };
    let mut tensors = Vec::with_capacity(prompts.len());
    for (index, prompt) in prompts.iter().enumerate() {
        let logits = loaded.logits(&[prompt.as_slice()], &adapters, &mut Alone)?;
        tensors.push((format!("logits.{index}"), to_bytes(&logits)?));
    }
    let refs: Vec<TensorRef> = tensors
        .iter()
        .map(|(name, (shape, dtype, bytes))| TensorRef { name, dtype: *dtype, shape, bytes })
        .collect();
    checkpoint::write_tensors(out, &refs, &BTreeMap::new()).map_err(|error| Fault::File(chain(&error)))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounding_is_told_from_another_model() {
        for (dtype, max_difference, max_logit, mean_kl, expected) in [
            (Dtype::F32, 1e-4, 20.0, 1e-10, true),
            (Dtype::F32, 1e-4, 0.01, 1e-10, true),
            // Measured on a model with a perplexity of 15,000.
            (Dtype::F32, 4.375e-2, 42.6, 5.395e-7, true),
            (Dtype::F32, 4.375e-2, 42.6, 1e-3, false),
            (Dtype::F32, 2.0, 42.6, 1e-7, false),
            (Dtype::F32, f64::NAN, 42.6, 1e-7, false),
            (Dtype::F32, 1e-4, 20.0, f64::NAN, false),
            (Dtype::Bf16, 0.3, 20.0, 1e-3, true),
            (Dtype::Bf16, 0.3, 20.0, 0.06, false),
            (Dtype::F16, f64::INFINITY, 20.0, 1e-3, false),
        ] {
            let check =
                LogitCheck { prompts: 4, max_difference, max_logit, top_token_agreement: 1.0, mean_kl };
            assert_eq!(
                check.is_of_the_run(dtype),
                expected,
                "{dtype:?} {max_difference} of {max_logit}, {mean_kl} nats"
            );
        }
    }
}
