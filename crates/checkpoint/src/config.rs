use crate::Dtype;
use crate::fields::{Fields, brief};
use model_spec::{Family, InvalidModelSpec, LayerSpec, ModelSpec, Rope, RopeScaling};
use serde_json::{Map, Value};
use std::fmt::Debug;
use std::path::{Path, PathBuf};

/// Beyond any published model, and small enough that no product of two widths and the layer count leaves 64 bits.
const MAX_WIDTH: usize = 1 << 22;
const MAX_LAYER_COUNT: usize = 4096;
/// What `transformers` takes for a Mistral whose `config.json` says nothing about the window.
const MISTRAL_DEFAULT_WINDOW: usize = 4096;
/// What `transformers` takes when `config.json` says nothing, as those of LLaMA 1 and 2.
const DEFAULT_ROPE_THETA: f64 = 10_000.0;

/// `config.json`, understood.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    pub spec: ModelSpec,
    /// The file as it was, for exports that must keep what we do not interpret.
    pub raw: Map<String, Value>,
    /// `torch_dtype` or `dtype`, when it is one that we read.
    pub stored_dtype: Option<Dtype>,
    pub bos_token_id: Option<u32>,
    /// Some models end a text with any of several tokens.
    pub eos_token_ids: Vec<u32>,
}

/// Why a `config.json` describes no model that we can work on.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error(
        "`{path}` is not valid JSON at line {line}, column {column}; restore the file from the original model"
    )]
    BrokenJson {
        path: PathBuf,
        line: usize,
        column: usize,
        #[source]
        cause: serde_json::Error,
    },
    #[error("`{path}` holds {actual}, expected a JSON object")]
    NotAnObject { path: PathBuf, actual: String },
    #[error("`{path}` lacks the field `{field}`, expected {expected}; add it or fetch the complete file")]
    MissingField { path: PathBuf, field: String, expected: &'static str },
    #[error("`{path}`: field `{field}` is {actual}, expected {expected}; correct the file")]
    WrongValue { path: PathBuf, field: String, actual: String, expected: String },
    #[error("`{path}`: field `{field}` is {actual}, supported is {expected}; {advice}")]
    Unsupported { path: PathBuf, field: String, actual: String, expected: &'static str, advice: &'static str },
    #[error("`{path}`: field `{field}` is {actual} but `{other}` says {other_actual}; make them agree")]
    Contradiction { path: PathBuf, field: String, actual: String, other: String, other_actual: String },
    #[error("`{path}`: the dimensions make no model; correct the file")]
    Invalid {
        path: PathBuf,
        #[source]
        cause: InvalidModelSpec,
    },
}

impl ModelConfig {
    /// Reads the text of a `config.json`; `path` is only for messages.
    ///
    /// # Errors
    /// Names file, field, what was found, what was expected and what to do.
    pub fn parse(path: &Path, text: &[u8]) -> Result<Self, ConfigError> {
        let value: Value = serde_json::from_slice(text).map_err(|cause| ConfigError::BrokenJson {
            path: path.to_owned(),
            line: cause.line(),
            column: cause.column(),
            cause,
        })?;
        match value {
            Value::Object(raw) => Self::from_object(path, raw),
            Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) | Value::Array(_) => {
                Err(ConfigError::NotAnObject { path: path.to_owned(), actual: brief(&value) })
            }
        }
    }

    /// As [`ModelConfig::parse`], for JSON already parsed.
    ///
    /// # Errors
    /// As [`ModelConfig::parse`].
    pub fn from_object(path: &Path, raw: Map<String, Value>) -> Result<Self, ConfigError> {
        let fields = Fields { path, prefix: "", object: &raw };
        let family = family(&fields)?;
        refuse_unsupported(&fields)?;
        let layer_count = fields.count("num_hidden_layers", MAX_LAYER_COUNT)?;
        let hidden_size = fields.count("hidden_size", MAX_WIDTH)?;
        let query_head_count = fields.count("num_attention_heads", MAX_WIDTH)?;
        let kv_head_count =
            fields.optional_count("num_key_value_heads", MAX_WIDTH)?.unwrap_or(query_head_count);
        let intermediate_size = fields.count("intermediate_size", MAX_WIDTH)?;
        let head_dim = head_dim(&fields, hidden_size, query_head_count)?;
        let max_position_embeddings = match fields
            .optional_count("max_position_embeddings", u32::MAX as usize)?
        {
            Some(count) => count,
            // Some conversions of LLaMA 1 say it in this word only.
            None => fields
                .optional_count("max_sequence_length", u32::MAX as usize)?
                .ok_or_else(|| fields.missing("max_position_embeddings", "a whole number of at least 1"))?,
        };
        if family == Family::Mistral {
            refuse_window(&fields, max_position_embeddings)?;
        }
        let uniform = LayerSpec { query_head_count, kv_head_count, intermediate_size };
        let spec = ModelSpec {
            family,
            hidden_size,
            head_dim,
            vocab_size: fields.count("vocab_size", MAX_WIDTH)?,
            max_position_embeddings,
            rms_norm_eps: fields.positive("rms_norm_eps")?,
            rope: rope(&fields)?,
            tie_word_embeddings: fields.bool_or("tie_word_embeddings", false)?,
            layers: layers(&fields, uniform, layer_count)?,
        };
        spec.validate().map_err(|cause| ConfigError::Invalid { path: path.to_owned(), cause })?;
        for (layer, widths) in spec.layers.iter().enumerate() {
            if widths.query_head_count * head_dim > MAX_WIDTH {
                return Err(ConfigError::WrongValue {
                    path: path.to_owned(),
                    field: "head_dim".to_owned(),
                    actual: format!("{head_dim} with {} heads in layer {layer}", widths.query_head_count),
                    expected: format!("a product with `num_attention_heads` of at most {MAX_WIDTH}"),
                });
            }
        }
        let stored_dtype = match fields.optional_text("dtype")? {
            Some(name) => Some(name),
            None => fields.optional_text("torch_dtype")?,
        };
        Ok(Self {
            spec,
            stored_dtype: stored_dtype.and_then(Dtype::from_torch_name),
            bos_token_id: token_ids(&fields, "bos_token_id")?.first().copied(),
            eos_token_ids: token_ids(&fields, "eos_token_id")?,
            raw,
        })
    }
}

fn family(fields: &Fields<'_>) -> Result<Family, ConfigError> {
    match fields.optional_text("model_type")? {
        Some("llama") => Ok(Family::Llama),
        Some("mistral") => Ok(Family::Mistral),
        Some(other) => Err(ConfigError::Unsupported {
            path: fields.path.to_owned(),
            field: "model_type".to_owned(),
            actual: format!("{other:?}"),
            expected: "\"llama\" or \"mistral\"",
            advice: "give a model of one of these architectures",
        }),
        None => Err(fields.missing("model_type", "\"llama\" or \"mistral\"")),
    }
}

/// Refuses what would change the function computed, rather than ignore it.
fn refuse_unsupported(fields: &Fields<'_>) -> Result<(), ConfigError> {
    let unsupported = |field: &str, actual: String, expected, advice| ConfigError::Unsupported {
        path: fields.path.to_owned(),
        field: fields.name(field),
        actual,
        expected,
        advice,
    };
    if let Some(activation) = fields.optional_text("hidden_act")?.filter(|name| *name != "silu") {
        let advice = "give a model with a SwiGLU MLP";
        return Err(unsupported("hidden_act", format!("{activation:?}"), "\"silu\"", advice));
    }
    for field in ["attention_bias", "mlp_bias"] {
        if fields.bool_or(field, false)? {
            return Err(unsupported(field, "true".to_owned(), "false", "give a model without biases"));
        }
    }
    if let Some(scheme) = fields.get("quantization_config") {
        let advice = "give the model in bf16, f16 or f32";
        return Err(unsupported("quantization_config", brief(scheme), "none", advice));
    }
    Ok(())
}

fn refuse_partial_rotation(fields: &Fields<'_>) -> Result<(), ConfigError> {
    match fields.optional_positive("partial_rotary_factor")?.filter(|factor| *factor != 1.0) {
        None => Ok(()),
        Some(factor) => Err(ConfigError::Unsupported {
            path: fields.path.to_owned(),
            field: fields.name("partial_rotary_factor"),
            actual: factor.to_string(),
            expected: "1",
            advice: "give a model that rotates whole heads",
        }),
    }
}

/// A window at least as long as the context hides nothing; any other changes what a token sees.
fn refuse_window(fields: &Fields<'_>, max_position_embeddings: usize) -> Result<(), ConfigError> {
    let window = match fields.object.get("sliding_window") {
        Some(Value::Null) => return Ok(()),
        Some(_) => fields.count("sliding_window", usize::MAX)?,
        None => MISTRAL_DEFAULT_WINDOW,
    };
    if window >= max_position_embeddings {
        return Ok(());
    }
    let absent = if fields.object.contains_key("sliding_window") { "" } else { " (absent means that)" };
    Err(ConfigError::Unsupported {
        path: fields.path.to_owned(),
        field: "sliding_window".to_owned(),
        actual: format!("{window}{absent}"),
        expected: "null",
        advice: "give a Mistral without a window (v0.2 or later), or set it to null to work with full attention",
    })
}

fn head_dim(fields: &Fields<'_>, hidden_size: usize, query_head_count: usize) -> Result<usize, ConfigError> {
    if let Some(head_dim) = fields.optional_count("head_dim", MAX_WIDTH)? {
        return Ok(head_dim);
    }
    if hidden_size.is_multiple_of(query_head_count) {
        return Ok(hidden_size / query_head_count);
    }
    Err(ConfigError::WrongValue {
        path: fields.path.to_owned(),
        field: "num_attention_heads".to_owned(),
        actual: query_head_count.to_string(),
        expected: format!("a divisor of `hidden_size` {hidden_size}, since `head_dim` is not given"),
    })
}

/// The widths layer by layer: our own `espalier_layers` where it is given, else the same for all.
fn layers(
    fields: &Fields<'_>,
    uniform: LayerSpec,
    layer_count: usize,
) -> Result<Vec<LayerSpec>, ConfigError> {
    let Some(value) = fields.get("espalier_layers") else { return Ok(vec![uniform; layer_count]) };
    let items = value.as_array().filter(|items| items.len() == layer_count).ok_or_else(|| {
        let expected = format!("an array of {layer_count} objects, one per layer (`num_hidden_layers`)");
        fields.wrong("espalier_layers", value, expected)
    })?;
    items
        .iter()
        .enumerate()
        .map(|(layer, item)| {
            let name = format!("espalier_layers[{layer}]");
            let object = item.as_object().ok_or_else(|| fields.wrong(&name, item, "an object"))?;
            let prefix = format!("{name}.");
            let fields = Fields { path: fields.path, prefix: &prefix, object };
            Ok(LayerSpec {
                query_head_count: fields.count("num_attention_heads", MAX_WIDTH)?,
                kv_head_count: fields.count("num_key_value_heads", MAX_WIDTH)?,
                intermediate_size: fields.count("intermediate_size", MAX_WIDTH)?,
            })
        })
        .collect()
}

/// Both spellings: `rope_theta` with `rope_scaling` (up to transformers 4), and `rope_parameters` (from 5).
fn rope(fields: &Fields<'_>) -> Result<Rope, ConfigError> {
    refuse_partial_rotation(fields)?;
    let mut thetas = Vec::new();
    let mut scalings = Vec::new();
    if let Some(theta) = fields.optional_positive("rope_theta")? {
        thetas.push(("rope_theta", theta));
    }
    for field in ["rope_scaling", "rope_parameters"] {
        if let Some(object) = fields.optional_object(field)? {
            let (theta, scaling) = rope_object(fields, &format!("{field}."), object)?;
            thetas.extend(theta.map(|theta| (field, theta)));
            scalings.push((field, scaling));
        }
    }
    Ok(Rope {
        theta: agreed(fields, &thetas)?.unwrap_or(DEFAULT_ROPE_THETA),
        scaling: agreed(fields, &scalings)?.unwrap_or(RopeScaling::None),
    })
}

/// The one value that all the places which give it agree on.
fn agreed<T: Copy + PartialEq + Debug>(
    fields: &Fields<'_>,
    given: &[(&str, T)],
) -> Result<Option<T>, ConfigError> {
    let Some(&(first_field, first)) = given.first() else { return Ok(None) };
    match given.iter().find(|(_, value)| *value != first) {
        None => Ok(Some(first)),
        Some((field, value)) => Err(ConfigError::Contradiction {
            path: fields.path.to_owned(),
            field: first_field.to_owned(),
            actual: format!("{first:?}"),
            other: (*field).to_owned(),
            other_actual: format!("{value:?}"),
        }),
    }
}

fn rope_object(
    outer: &Fields<'_>,
    prefix: &str,
    object: &Map<String, Value>,
) -> Result<(Option<f64>, RopeScaling), ConfigError> {
    let fields = Fields { path: outer.path, prefix, object };
    let kind = match fields.optional_text("rope_type")? {
        Some(kind) => kind,
        None => fields
            .optional_text("type")?
            .ok_or_else(|| fields.missing("rope_type", "\"default\", \"linear\" or \"llama3\""))?,
    };
    refuse_partial_rotation(&fields)?;
    let scaling = match kind {
        "default" => RopeScaling::None,
        "linear" => RopeScaling::Linear { factor: fields.positive("factor")? },
        "llama3" => {
            let low_freq_factor = fields.positive("low_freq_factor")?;
            let high_freq_factor = fields.positive("high_freq_factor")?;
            if high_freq_factor <= low_freq_factor {
                let value = Value::from(high_freq_factor);
                let expected = format!("more than `low_freq_factor` {low_freq_factor}");
                return Err(fields.wrong("high_freq_factor", &value, expected));
            }
            RopeScaling::Llama3 {
                factor: fields.positive("factor")?,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings: fields
                    .count("original_max_position_embeddings", u32::MAX as usize)?,
            }
        }
        other => {
            return Err(ConfigError::Unsupported {
                path: fields.path.to_owned(),
                field: fields.name("rope_type"),
                actual: format!("{other:?}"),
                expected: "\"default\", \"linear\" or \"llama3\"",
                advice: "give a model with one of these",
            });
        }
    };
    Ok((fields.optional_positive("rope_theta")?, scaling))
}

/// A token id, or an array of them.
fn token_ids(fields: &Fields<'_>, field: &str) -> Result<Vec<u32>, ConfigError> {
    let Some(value) = fields.get(field) else { return Ok(Vec::new()) };
    let items = value.as_array().map_or(std::slice::from_ref(value), Vec::as_slice);
    items
        .iter()
        // Some files say -1 for "none".
        .filter(|item| item.as_i64() != Some(-1))
        .map(|item| {
            item.as_u64()
                .and_then(|id| u32::try_from(id).ok())
                .ok_or_else(|| fields.wrong(field, value, "a token id or an array of them"))
        })
        .collect()
}
