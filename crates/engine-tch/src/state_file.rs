//! A rank's part of a checkpoint: LoRA factors, moments, o and down where compensation changes them, what the unpruned
//! model has taught, what the rank holds, and its part of the logits that an export is checked against.

use crate::compensation::as_stored;
use crate::factors::Factor;
use crate::fault::{Fault, Result, chain};
use crate::layer::Narrowing;
use crate::shard::Shard;
use crate::source::kind_of;
use checkpoint::{Dtype, Sha256Digest, TensorFile, TensorRef};
use engine::{EngineError, Snapshot};
use model_spec::Projection;
use recipe::Compensation;
use sharding::RankLayer;
use std::collections::BTreeMap;
use std::path::Path;
use tch::{Device, Tensor};

/// Raised when a name or a meaning changes.
const FORMAT: &str = "2";
pub(crate) const PROBE_LOGITS: &str = "probe.logits";

/// Name of a factor or moment: `lora.layers.3.q_proj.lora_a`.
pub(crate) fn factor_name(prefix: &str, layer: usize, projection: Projection, factor: Factor) -> String {
    format!("{prefix}.layers.{layer}.{projection}.{}", factor.name())
}

/// Prefix of the pair that a knot, from 0, has frozen.
pub(crate) fn ledger_prefix(knot: usize) -> String {
    format!("ledger.{knot}")
}

/// Name of a frozen matrix that compensation changes: `base.layers.3.o_proj`.
pub(crate) fn base_name(layer: usize, projection: Projection) -> String {
    format!("base.layers.{layer}.{projection}")
}

/// A rank's state in host memory.
pub(crate) struct State {
    /// Name, shape, format and row-major bytes.
    tensors: Vec<(String, Vec<usize>, Dtype, Vec<u8>)>,
    metadata: BTreeMap<String, String>,
}

impl Snapshot for State {
    fn size_bytes(&self) -> u64 {
        self.tensors.iter().map(|(_, _, _, bytes)| bytes.len() as u64).sum()
    }

    fn write(self: Box<Self>, file: &Path) -> std::result::Result<String, EngineError> {
        let refs: Vec<TensorRef> = self
            .tensors
            .iter()
            .map(|(name, shape, dtype, bytes)| TensorRef { name, dtype: *dtype, shape, bytes })
            .collect();
        let digest = checkpoint::write_tensors(file, &refs, &self.metadata)
            .map_err(|error| Fault::File(chain(&error)))?;
        Ok(digest.to_string())
    }
}

impl State {
    /// The state that `shard` is in now, with its logits on `prompts`.
    pub(crate) fn of(shard: &mut Shard, prompts: &[Vec<u32>]) -> Result<Self> {
        taken(shard, prompts)
    }
}

fn taken(shard: &mut Shard, prompts: &[Vec<u32>]) -> Result<State> {
    let mut tensors: Vec<(String, Vec<usize>, Dtype, Vec<u8>)> = Vec::new();
    for (prefix, flat) in shard.flats() {
        for layer in 0..shard.layout.layer_count() {
            for projection in Projection::ALL {
                for factor in Factor::BOTH {
                    let view = shard.layout.view(flat, layer, projection, factor)?;
                    let (shape, dtype, bytes) = to_bytes(&view)?;
                    tensors.push((factor_name(&prefix, layer, projection, factor), shape, dtype, bytes));
                }
            }
        }
    }
    if let Some(pairs) = &mut shard.moments.pairs {
        for (name, tensor) in pairs.named() {
            let (shape, dtype, bytes) = to_bytes(tensor)?;
            tensors.push((name.into(), shape, dtype, bytes));
        }
    }
    match shard.setup.recipe.pruning.as_ref().map(|pruning| pruning.compensation) {
        Some(Compensation::LeastSquares(_)) => {
            for (layer, weights) in shard.model.layers.iter().enumerate() {
                for which in Narrowing::BOTH {
                    let (shape, dtype, bytes) = to_bytes(as_stored(weights.narrowing(which))?)?;
                    tensors.push((base_name(layer, which.projection()), shape, dtype, bytes));
                }
            }
        }
        // The model's folder has them.
        Some(Compensation::None) | None => {}
    }
    for (name, tensor) in shard.teacher.tensors()? {
        let (shape, dtype, bytes) = to_bytes(&tensor)?;
        tensors.push((name.to_owned(), shape, dtype, bytes));
    }
    if !prompts.is_empty() {
        let (shape, dtype, bytes) = to_bytes(&shard.prompt_logits(prompts)?)?;
        tensors.push((PROBE_LOGITS.into(), shape, dtype, bytes));
    }
    let held: Vec<[&[usize]; 3]> = shard
        .held()
        .iter()
        .map(|layer| [layer.query_heads.as_slice(), layer.kv_heads.as_slice(), layer.channels.as_slice()])
        .collect();
    let json = |value: serde_json::Result<String>| {
        value.map_err(|error| Fault::File(format!("failed to encode checkpoint metadata: {error}")))
    };
    let metadata = BTreeMap::from([
        ("espalier.format".into(), FORMAT.into()),
        ("espalier.tp_rank".into(), shard.setup.tp_rank.to_string()),
        ("espalier.tp_degree".into(), shard.setup.tp_degree.to_string()),
        ("espalier.generation".into(), shard.generation.to_string()),
        ("espalier.updates".into(), shard.moments.updates.to_string()),
        ("espalier.skipped".into(), shard.skipped.to_string()),
        ("espalier.held".into(), json(serde_json::to_string(&held))?),
        ("espalier.prompts".into(), json(serde_json::to_string(prompts))?),
    ]);
    Ok(State { tensors, metadata })
}

/// A rank's part of a checkpoint, read back.
pub(crate) struct RankState {
    file: TensorFile,
    pub(crate) held: Vec<RankLayer>,
    pub(crate) prompts: Vec<Vec<u32>>,
    /// Mask in force.
    pub(crate) generation: u64,
    /// Updates that the optimizer has taken.
    pub(crate) updates: u64,
    /// Steps skipped in a row.
    pub(crate) skipped: u32,
}

impl RankState {
    /// Reads `path` after checking its digest, and that it is the part of `tp_rank` of `tp_degree`.
    pub(crate) fn read(path: &Path, sha256: &str, tp_rank: usize, tp_degree: usize) -> Result<Self> {
        let expected: Sha256Digest = sha256
            .parse()
            .map_err(|error| Fault::Refused(format!("digest of `{}`: {error}", path.display())))?;
        let file =
            checkpoint::read_tensors(path, Some(&expected)).map_err(|error| Fault::File(chain(&error)))?;
        let field = |name: &str| {
            file.metadata.get(name).cloned().ok_or_else(|| {
                Fault::File(format!("`{}` has no metadata `{name}`; it is no checkpoint", path.display()))
            })
        };
        for (name, expected) in [
            ("espalier.format", FORMAT.to_owned()),
            ("espalier.tp_rank", tp_rank.to_string()),
            ("espalier.tp_degree", tp_degree.to_string()),
        ] {
            let actual = field(name)?;
            if actual != expected {
                let path = path.display();
                return Err(Fault::File(format!("`{path}`: `{name}` is {actual}, expected {expected}")));
            }
        }
        let broken =
            |error: serde_json::Error| Fault::File(format!("`{}`: broken metadata: {error}", path.display()));
        let held = held_of(&field("espalier.held")?).map_err(broken)?;
        let generation = serde_json::from_str(&field("espalier.generation")?).map_err(broken)?;
        let updates = serde_json::from_str(&field("espalier.updates")?).map_err(broken)?;
        let skipped = serde_json::from_str(&field("espalier.skipped")?).map_err(broken)?;
        let prompts = serde_json::from_str(&field("espalier.prompts")?).map_err(broken)?;
        Ok(Self { file, held, prompts, generation, updates, skipped })
    }

    /// What another rank held, from the header of its file alone.
    pub(crate) fn held_by(path: &Path) -> Result<Vec<RankLayer>> {
        let metadata = checkpoint::read_tensors_metadata(path).map_err(|error| Fault::File(chain(&error)))?;
        let text = metadata.get("espalier.held").ok_or_else(|| {
            Fault::File(format!("`{}` has no metadata `espalier.held`; it is no checkpoint", path.display()))
        })?;
        held_of(text).map_err(|error| Fault::File(format!("`{}`: broken metadata: {error}", path.display())))
    }

    pub(crate) fn has(&self, name: &str) -> bool {
        self.file.tensors.contains_key(name)
    }

    /// A tensor by name, on the CPU, as it was written.
    pub(crate) fn tensor(&self, name: &str) -> Result<Tensor> {
        let tensor = self
            .file
            .tensors
            .get(name)
            .ok_or_else(|| Fault::File(format!("the checkpoint has no tensor `{name}`")))?;
        let shape: Vec<i64> = tensor.shape.iter().map(|size| *size as i64).collect();
        Ok(Tensor::f_from_data_size(&tensor.bytes, &shape, kind_of(tensor.dtype))?)
    }
}

fn held_of(text: &str) -> serde_json::Result<Vec<RankLayer>> {
    let held: Vec<[Vec<usize>; 3]> = serde_json::from_str(text)?;
    let layer =
        |[query_heads, kv_heads, channels]: [Vec<usize>; 3]| RankLayer { query_heads, kv_heads, channels };
    Ok(held.into_iter().map(layer).collect())
}

/// Shape, format and row-major bytes of a tensor.
pub(crate) fn to_bytes(tensor: &Tensor) -> Result<(Vec<usize>, Dtype, Vec<u8>)> {
    let kind = tensor.f_kind()?;
    // What no file has is written in f32.
    let dtype = [Dtype::F64, Dtype::Bf16, Dtype::F16]
        .into_iter()
        .find(|dtype| kind_of(*dtype) == kind)
        .unwrap_or(Dtype::F32);
    let tensor = tensor.f_to_kind(kind_of(dtype))?.f_to_device(Device::Cpu)?.f_contiguous()?;
    let mut bytes = vec![0; tensor.numel() * dtype.byte_width()];
    tensor.f_copy_data_u8(&mut bytes, tensor.numel())?;
    Ok((tensor.size().iter().map(|size| *size as usize).collect(), dtype, bytes))
}
