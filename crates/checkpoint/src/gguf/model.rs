use super::header::{Header, Tensor};
use super::rope_factors;
use super::values::Value;
use crate::tensor_name::{
    EMBEDDING, FINAL_NORM, LM_HEAD, input_norm, post_attention_norm, projection_weight,
};
use crate::{ConfigError, Dtype, ModelConfig, NotExportable, export_config};
use model_spec::{ModelSpec, Projection, RopeScaling};
use serde_json::{Map, json};
use std::collections::BTreeSet;
use std::path::Path;

const ROPE_FACTORS: &str = "rope_freqs.weight";
const SUPPORTED: &str = "llama";

/// Why the metadata and tensors of a GGUF file make no model that we work on.
#[derive(Debug, thiserror::Error)]
pub enum ModelMetadataError {
    #[error("`general.architecture` is {actual}, supported is \"{SUPPORTED}\"; give a LLaMA or Mistral")]
    Architecture { actual: String },
    #[error(
        "`split.count` is {count}: the model is in several files; join them first with `llama-gguf-split --merge`"
    )]
    Split { count: u64 },
    #[error("`{key}` is {actual}, supported is {expected}; give a plain LLaMA or Mistral")]
    Unsupported { key: String, actual: String, expected: &'static str },
    #[error("`{key}` is missing, expected {expected}; convert the file with a current llama.cpp")]
    Missing { key: String, expected: &'static str },
    #[error("`{key}` is {actual}, expected {expected}; convert the file with a current llama.cpp")]
    WrongValue { key: String, actual: String, expected: &'static str },
    #[error("tensor `{tensor}` is missing; fetch the file again")]
    MissingTensor { tensor: String },
    #[error("tensor `{tensor}` has shape {actual:?}, the metadata say {expected:?}; fetch the file again")]
    ShapeMismatch { tensor: String, expected: Vec<usize>, actual: Vec<usize> },
    #[error(
        "tensor `{tensor}` belongs to no plain LLaMA; models with biases, experts or further norms are not supported"
    )]
    UnexpectedTensor { tensor: String },
    #[error(
        "tensor `{ROPE_FACTORS}` is not the rope scaling of a Llama 3.1 (factors 1 and 4, context 8192); other scalings cannot be carried over"
    )]
    RopeFactors,
    #[error("the metadata make no model")]
    Config(#[source] ConfigError),
    #[error("the metadata make no model")]
    NotExportable(#[source] NotExportable),
}

/// A tensor to be written and where it comes from.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct PlannedTensor<'a> {
    /// Name in Hugging Face checkpoints.
    pub(super) name: String,
    pub(super) source: &'a Tensor<'a>,
    /// Heads whose rows are interleaved in the file, for `q_proj` and `k_proj`.
    pub(super) interleaved_heads: Option<usize>,
}

/// The model in a GGUF file: its `config.json` and its tensors in the order we write them.
#[derive(Debug)]
pub(super) struct Model<'a> {
    pub(super) config: ModelConfig,
    pub(super) tensors: Vec<PlannedTensor<'a>>,
}

pub(super) fn read_model<'a>(
    path: &Path,
    header: &'a Header<'a>,
    dtype: Dtype,
) -> Result<Model<'a>, ModelMetadataError> {
    let metadata = Metadata { header };
    match metadata.text("general.architecture")? {
        Some(SUPPORTED) => {}
        Some(actual) => return Err(ModelMetadataError::Architecture { actual: format!("{actual:?}") }),
        None => return Err(ModelMetadataError::Architecture { actual: "missing".to_owned() }),
    }
    if let Some(count) = metadata.optional_count("split.count")?.filter(|count| *count > 1) {
        return Err(ModelMetadataError::Split { count });
    }
    for key in ["llama.expert_count", "llama.attention.sliding_window"] {
        if let Some(count) = metadata.optional_count(key)?.filter(|count| *count > 0) {
            let (key, actual) = (key.to_owned(), count.to_string());
            return Err(ModelMetadataError::Unsupported { key, actual, expected: "none" });
        }
    }
    let raw = config_fields(header, &metadata)?;
    let spec = ModelConfig::from_object(path, raw.clone()).map_err(ModelMetadataError::Config)?.spec;
    let tensors = plan(header, &spec)?;
    let config = export_config(&raw, &spec, dtype).map_err(ModelMetadataError::NotExportable)?;
    let config = ModelConfig::from_object(path, config).map_err(ModelMetadataError::Config)?;
    Ok(Model { config, tensors })
}

/// The fields of a `config.json` of type `llama`, not yet checked against one another.
fn config_fields(
    header: &Header<'_>,
    metadata: &Metadata<'_>,
) -> Result<Map<String, serde_json::Value>, ModelMetadataError> {
    let embedding = header
        .tensors
        .get("token_embd.weight")
        .ok_or_else(|| ModelMetadataError::MissingTensor { tensor: "token_embd.weight".to_owned() })?;
    let hidden_size = metadata.count("llama.embedding_length")?;
    let heads = metadata.count("llama.attention.head_count")?;
    let kv_heads = metadata.optional_count("llama.attention.head_count_kv")?.unwrap_or(heads);
    let head_dim = match metadata.optional_count("llama.attention.key_length")? {
        Some(length) => Some(length),
        None if heads > 0 && hidden_size.is_multiple_of(heads) => Some(hidden_size / heads),
        None => metadata.optional_count("llama.rope.dimension_count")?,
    };
    for key in ["llama.attention.value_length", "llama.rope.dimension_count"] {
        if let Some(length) = metadata.optional_count(key)?.filter(|length| Some(*length) != head_dim) {
            let (key, actual) = (key.to_owned(), length.to_string());
            return Err(ModelMetadataError::Unsupported {
                key,
                actual,
                expected: "the length of a whole head",
            });
        }
    }
    let theta = metadata.optional_number("llama.rope.freq_base")?.unwrap_or(10_000.0);
    let epsilon = metadata.number("llama.attention.layer_norm_rms_epsilon")?;
    let fields = json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": false,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "mlp_bias": false,
        "pretraining_tp": 1,
        "use_cache": true,
        "hidden_size": hidden_size,
        "intermediate_size": metadata.count("llama.feed_forward_length")?,
        "num_hidden_layers": metadata.count("llama.block_count")?,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": embedding.shape.first(),
        "max_position_embeddings": metadata.count("llama.context_length")?,
        "rms_norm_eps": six_digits(epsilon),
        "rope_theta": theta,
        "rope_scaling": rope_scaling(header, metadata, theta, head_dim)?,
        "tie_word_embeddings": !header.tensors.contains_key("output.weight"),
        "bos_token_id": metadata.optional_count("tokenizer.ggml.bos_token_id")?,
        "eos_token_id": metadata.optional_count("tokenizer.ggml.eos_token_id")?,
    });
    Ok(fields.as_object().cloned().unwrap_or_default())
}

/// The file has it as f32; 1e-5 there is 9.99999974e-6, which nobody meant.
fn six_digits(number: f64) -> f64 {
    format!("{number:.5e}").parse().unwrap_or(number)
}

/// `rope_scaling` of `config.json`.
fn rope_scaling(
    header: &Header<'_>,
    metadata: &Metadata<'_>,
    theta: f64,
    head_dim: Option<u64>,
) -> Result<serde_json::Value, ModelMetadataError> {
    let kind = metadata.text("llama.rope.scaling.type")?.unwrap_or("none");
    let factors = header.tensors.get(ROPE_FACTORS);
    match (kind, factors) {
        ("none", None) => match metadata.optional_number("llama.rope.scale_linear")? {
            Some(factor) if factor != 1.0 => Ok(json!({ "rope_type": "linear", "factor": factor })),
            Some(_) | None => Ok(serde_json::Value::Null),
        },
        ("linear", None) => {
            Ok(json!({ "rope_type": "linear", "factor": metadata.number("llama.rope.scaling.factor")? }))
        }
        ("none", Some(factors)) => {
            let divisors = factors.kind.decode(factors.bytes).unwrap_or_default();
            let head_dim = head_dim.and_then(|length| usize::try_from(length).ok());
            // A lying length would make us compute as many frequencies.
            let head_dim = head_dim.filter(|length| length / 2 == divisors.len());
            match head_dim.and_then(|head_dim| rope_factors::recognise(&divisors, theta, head_dim)) {
                None => Err(ModelMetadataError::RopeFactors),
                Some(RopeScaling::Llama3 {
                    factor,
                    low_freq_factor,
                    high_freq_factor,
                    original_max_position_embeddings,
                }) => Ok(json!({
                    "rope_type": "llama3",
                    "factor": factor,
                    "low_freq_factor": low_freq_factor,
                    "high_freq_factor": high_freq_factor,
                    "original_max_position_embeddings": original_max_position_embeddings,
                })),
                Some(RopeScaling::None | RopeScaling::Linear { .. }) => Ok(serde_json::Value::Null),
            }
        }
        (kind, _) => Err(ModelMetadataError::Unsupported {
            key: "llama.rope.scaling.type".to_owned(),
            actual: format!("{kind:?}"),
            expected: "\"none\" or \"linear\"",
        }),
    }
}

/// Every tensor of the spec, found in the file in its shape; and nothing else in the file.
fn plan<'a>(header: &'a Header<'a>, spec: &ModelSpec) -> Result<Vec<PlannedTensor<'a>>, ModelMetadataError> {
    let mut used = BTreeSet::from([ROPE_FACTORS.to_owned()]);
    let mut planned = Vec::new();
    let mut add = |name: String, place: String, expected: Vec<usize>, interleaved_heads| {
        let Some(source) = header.tensors.get(place.as_str()) else {
            return Err(ModelMetadataError::MissingTensor { tensor: place });
        };
        if source.shape != expected {
            let actual = source.shape.clone();
            return Err(ModelMetadataError::ShapeMismatch { tensor: place, expected, actual });
        }
        used.insert(place);
        planned.push(PlannedTensor { name, source, interleaved_heads });
        Ok(())
    };
    let hidden = vec![spec.hidden_size];
    let vocabulary = vec![spec.vocab_size, spec.hidden_size];
    add(EMBEDDING.to_owned(), "token_embd.weight".to_owned(), vocabulary.clone(), None)?;
    for (layer, widths) in spec.layers.iter().enumerate() {
        add(input_norm(layer), format!("blk.{layer}.attn_norm.weight"), hidden.clone(), None)?;
        for projection in Projection::ALL {
            let (module, interleaved_heads) = match projection {
                Projection::Q => ("attn_q", Some(widths.query_head_count)),
                Projection::K => ("attn_k", Some(widths.kv_head_count)),
                Projection::V => ("attn_v", None),
                Projection::O => ("attn_output", None),
                Projection::Gate => ("ffn_gate", None),
                Projection::Up => ("ffn_up", None),
                Projection::Down => ("ffn_down", None),
            };
            let shape = spec.projection_shape(layer, projection).to_vec();
            let place = format!("blk.{layer}.{module}.weight");
            add(projection_weight(layer, projection), place, shape, interleaved_heads)?;
        }
        add(post_attention_norm(layer), format!("blk.{layer}.ffn_norm.weight"), hidden.clone(), None)?;
    }
    add(FINAL_NORM.to_owned(), "output_norm.weight".to_owned(), hidden, None)?;
    if !spec.tie_word_embeddings {
        add(LM_HEAD.to_owned(), "output.weight".to_owned(), vocabulary, None)?;
    }
    match header.tensors.keys().find(|name| !used.contains(**name)) {
        Some(name) => Err(ModelMetadataError::UnexpectedTensor { tensor: (*name).to_owned() }),
        None => Ok(planned),
    }
}

/// Typed access to the metadata.
struct Metadata<'a> {
    header: &'a Header<'a>,
}

impl<'a> Metadata<'a> {
    fn typed<T>(
        &self,
        key: &str,
        expected: &'static str,
        read: impl Fn(Value<'a>) -> Option<T>,
    ) -> Result<Option<T>, ModelMetadataError> {
        let Some(&value) = self.header.metadata.get(key) else { return Ok(None) };
        read(value).map(Some).ok_or_else(|| ModelMetadataError::WrongValue {
            key: key.to_owned(),
            actual: value.describe(),
            expected,
        })
    }

    fn text(&self, key: &str) -> Result<Option<&'a str>, ModelMetadataError> {
        self.typed(key, "a string", Value::as_text)
    }

    fn optional_count(&self, key: &str) -> Result<Option<u64>, ModelMetadataError> {
        self.typed(key, "a whole number, the same for all layers", Value::as_u64)
    }

    fn count(&self, key: &str) -> Result<u64, ModelMetadataError> {
        self.optional_count(key)?
            .ok_or_else(|| ModelMetadataError::Missing { key: key.to_owned(), expected: "a whole number" })
    }

    fn optional_number(&self, key: &str) -> Result<Option<f64>, ModelMetadataError> {
        self.typed(key, "a finite number", |value| value.as_f64().filter(|number| number.is_finite()))
    }

    fn number(&self, key: &str) -> Result<f64, ModelMetadataError> {
        self.optional_number(key)?
            .ok_or_else(|| ModelMetadataError::Missing { key: key.to_owned(), expected: "a number" })
    }
}
