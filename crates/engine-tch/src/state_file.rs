//! A rank's part of a checkpoint: LoRA factors, moments, o and down where compensation changes them, what it holds, and its part of the logits that an export is
//! checked against.

use crate::compensation::as_stored;
use crate::factors::Factor;
use crate::fault::{Fault, Result, chain};
use crate::layer::Narrowing;
use crate::shard::Shard;
use crate::source::kind_of;
use checkpoint::{Dtype, Sha256Digest, TensorFile, TensorRef};
use model_spec::Projection;
use recipe::Compensation;
use sharding::RankLayer;
use std::collections::BTreeMap;
use std::path::Path;
use tch::{Device, Tensor};

/// Raised when a name or a meaning changes.
const FORMAT: &str = "1";
pub(crate) const PROBE_LOGITS: &str = "probe.logits";

/// Name of a factor or moment: `lora.layers.3.q_proj.lora_a`.
pub(crate) fn factor_name(prefix: &str, layer: usize, projection: Projection, factor: Factor) -> String {
    format!("{prefix}.layers.{layer}.{projection}.{}", factor.name())
}

/// Name of a frozen matrix that compensation changes: `base.layers.3.o_proj`.
pub(crate) fn base_name(layer: usize, projection: Projection) -> String {
    format!("base.layers.{layer}.{projection}")
}

/// Writes `file` and returns its SHA-256 in hex.
pub(crate) fn write(shard: &mut Shard, file: &Path, prompts: &[Vec<u32>]) -> Result<String> {
    let mut tensors: Vec<(String, Vec<usize>, Dtype, Vec<u8>)> = Vec::new();
    let flats = [
        ("lora", &shard.factors),
        ("exp_avg", &shard.moments.exp_avg),
        ("exp_avg_sq", &shard.moments.exp_avg_sq),
    ];
    for (prefix, flat) in flats {
        for layer in 0..shard.layout.layer_count() {
            for projection in Projection::ALL {
                for factor in Factor::BOTH {
                    let view = shard.layout.view(flat, layer, projection, factor)?;
                    let (shape, dtype, bytes) = to_bytes(&view)?;
                    tensors.push((factor_name(prefix, layer, projection, factor), shape, dtype, bytes));
                }
            }
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
        ("espalier.held".into(), json(serde_json::to_string(&held))?),
        ("espalier.prompts".into(), json(serde_json::to_string(prompts))?),
    ]);
    let refs: Vec<TensorRef> = tensors
        .iter()
        .map(|(name, shape, dtype, bytes)| TensorRef { name, dtype: *dtype, shape, bytes })
        .collect();
    let digest =
        checkpoint::write_tensors(file, &refs, &metadata).map_err(|error| Fault::File(chain(&error)))?;
    Ok(digest.to_string())
}

/// A rank's part of a checkpoint, read back.
pub(crate) struct RankState {
    file: TensorFile,
    pub(crate) held: Vec<RankLayer>,
    pub(crate) prompts: Vec<Vec<u32>>,
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
        let held: Vec<[Vec<usize>; 3]> = serde_json::from_str(&field("espalier.held")?).map_err(broken)?;
        let prompts = serde_json::from_str(&field("espalier.prompts")?).map_err(broken)?;
        let held = held
            .into_iter()
            .map(|[query_heads, kv_heads, channels]| RankLayer { query_heads, kv_heads, channels })
            .collect();
        Ok(Self { file, held, prompts })
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
