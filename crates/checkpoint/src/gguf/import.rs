use super::header::{GgufHeaderError, Header};
use super::model::{ModelMetadataError, PlannedTensor, read_model};
use super::tokenizer::{TokenizerError, read_tokenizer};
use crate::mapped_file::map_file;
use crate::{
    Dtype, FileDigest, FolderWriter, MapFileError, NonFinite, TensorHeader, TensorView, WriteFolderError,
    check_finite,
};
use model_spec::ModelSpec;
use serde_json::{Map, json};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Elements decoded at a time: 1 MiB as f32.
const CHUNK_ELEMENTS: usize = 1 << 18;
const MAX_SHARD_BYTES: u64 = 5_000_000_000;

/// Why a GGUF file could not be imported. Nothing is left at the output.
#[derive(Debug, thiserror::Error)]
pub enum ImportError {
    #[error(transparent)]
    File(#[from] MapFileError),
    #[error("`{path}` is no GGUF file that we read")]
    Header {
        path: PathBuf,
        #[source]
        cause: GgufHeaderError,
    },
    #[error("`{path}` holds no model that we work on")]
    Model {
        path: PathBuf,
        #[source]
        cause: Box<ModelMetadataError>,
    },
    #[error("the tokenizer of `{path}` cannot be carried over")]
    Tokenizer {
        path: PathBuf,
        #[source]
        cause: TokenizerError,
    },
    #[error("tensor `{tensor}` of `{path}` cannot be decoded from {block_type}; fetch the file again")]
    Decode { path: PathBuf, tensor: String, block_type: &'static str },
    #[error(transparent)]
    NonFinite(#[from] NonFinite),
    #[error(
        "tensor `{tensor}` holds {value} at flat index {flat_index}, which {dtype} cannot hold; import as BF16 or F32"
    )]
    Overflow { tensor: String, flat_index: usize, value: f32, dtype: Dtype },
    #[error(transparent)]
    Write(#[from] WriteFolderError),
}

/// What was imported.
#[derive(Debug, Clone, PartialEq)]
pub struct ImportReport {
    pub spec: ModelSpec,
    pub parameter_count: u64,
    /// Tensors by their type in the file, such as `Q4_1`.
    pub tensors_by_block_type: BTreeMap<&'static str, usize>,
    /// The files written.
    pub files: Vec<FileDigest>,
}

/// Converts a GGUF file of a LLaMA or Mistral to a model folder `out`, which must not exist or be empty.
///
/// The weights are decoded a piece at a time and rounded once to `dtype`; the rows of `q_proj` and `k_proj` go from
/// GGUF's interleaved rotary pairs back to the half-split order of `transformers`.
///
/// # Errors
/// Says what in the file cannot be read or is not supported, or why `out` cannot be written.
pub fn import_gguf(gguf: &Path, out: &Path, dtype: Dtype) -> Result<ImportReport, ImportError> {
    let file = map_file(gguf)?;
    let path = || gguf.to_owned();
    let header = Header::parse(&file).map_err(|cause| ImportError::Header { path: path(), cause })?;
    let model = read_model(gguf, &header, dtype)
        .map_err(|cause| ImportError::Model { path: path(), cause: Box::new(cause) })?;
    let spec = model.config.spec;
    let tokenizer = read_tokenizer(&header, spec.vocab_size)
        .map_err(|cause| ImportError::Tokenizer { path: path(), cause })?;
    let tensors = model.tensors.iter().map(|tensor| TensorHeader {
        name: tensor.name.clone(),
        dtype,
        shape: tensor.source.shape.clone(),
    });
    let mut writer = FolderWriter::create(out, tensors.collect(), MAX_SHARD_BYTES)?;
    for tensor in &model.tensors {
        convert(gguf, tensor, spec.head_dim, dtype, |bytes| Ok(writer.append(&tensor.name, bytes)?))?;
    }
    let mut generation_config = Map::new();
    for (field, id) in [("bos_token_id", tokenizer.bos_token_id), ("eos_token_id", tokenizer.eos_token_id)] {
        generation_config.extend(id.map(|id| (field.to_owned(), json!(id))));
    }
    writer.write_json("config.json", &model.config.raw)?;
    writer.write_json("generation_config.json", &generation_config)?;
    writer.write_file("tokenizer.json", tokenizer.tokenizer.as_bytes())?;
    writer.write_json("tokenizer_config.json", &tokenizer.tokenizer_config)?;
    writer.write_json("special_tokens_map.json", &tokenizer.special_tokens_map)?;
    let files = writer.commit()?;
    let mut tensors_by_block_type = BTreeMap::new();
    for tensor in &model.tensors {
        *tensors_by_block_type.entry(tensor.source.kind.name()).or_default() += 1;
    }
    Ok(ImportReport { parameter_count: spec.parameter_count(), spec, tensors_by_block_type, files })
}

/// Decodes a tensor piece by piece and gives each piece's bytes to `write`, in row order.
pub(super) fn convert(
    path: &Path,
    tensor: &PlannedTensor<'_>,
    head_dim: usize,
    dtype: Dtype,
    mut write: impl FnMut(&[u8]) -> Result<(), ImportError>,
) -> Result<(), ImportError> {
    let source = tensor.source;
    let columns = source.shape.last().copied().unwrap_or(1).max(1);
    let row_bytes = columns / source.kind.block_elements() * source.kind.block_bytes();
    let rows_per_chunk = match tensor.interleaved_heads {
        Some(_) => head_dim,
        None => (CHUNK_ELEMENTS / columns).max(1),
    };
    let mut flat_index = 0;
    let mut encoded = Vec::new();
    for chunk in source.bytes.chunks(rows_per_chunk * row_bytes) {
        let mut values = source.kind.decode(chunk).ok_or_else(|| ImportError::Decode {
            path: path.to_owned(),
            tensor: tensor.name.clone(),
            block_type: source.kind.name(),
        })?;
        if let Some(index) = values.iter().position(|value| !value.is_finite()) {
            return Err(ImportError::NonFinite(NonFinite {
                tensor: tensor.name.clone(),
                flat_index: flat_index + index,
                value: f64::from(values[index]),
            }));
        }
        if tensor.interleaved_heads.is_some() {
            values = half_split(&values, columns);
        }
        encoded.clear();
        dtype.encode(&values, &mut encoded);
        let view = TensorView { name: &tensor.name, dtype, shape: &[values.len()], bytes: &encoded };
        if let Err(NonFinite { flat_index: index, .. }) = check_finite(&view) {
            return Err(ImportError::Overflow {
                tensor: tensor.name.clone(),
                flat_index: flat_index + index,
                value: values[index],
                dtype,
            });
        }
        write(&encoded)?;
        flat_index += values.len();
    }
    Ok(())
}

/// Rows of one head `[head_dim, columns]` from interleaved rotary pairs (0, 1), (2, 3), … to the pairs
/// (0, head_dim / 2), (1, head_dim / 2 + 1), … of `transformers`: first the even rows, then the odd ones.
fn half_split(head: &[f32], columns: usize) -> Vec<f32> {
    let rows = || head.chunks_exact(columns);
    rows().step_by(2).chain(rows().skip(1).step_by(2)).flatten().copied().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn even_rows_of_a_head_come_before_odd_ones() {
        let head = [0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5];
        assert_eq!(half_split(&head, 2), [0.0, 0.5, 2.0, 2.5, 1.0, 1.5, 3.0, 3.5]);
    }
}
