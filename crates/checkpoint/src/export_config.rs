//! Which `config.json` says to stock `transformers` what a pruned model is.
//!
//! `transformers` 5 refuses a `llama` whose head count does not divide `hidden_size`, whatever `head_dim` says;
//! the same tensors load as `mistral` with `sliding_window: null` and give the same logits.
//! Widths that differ between layers cannot be said at all: such a model is padded with zeros to its widest layer.

use crate::Dtype;
use model_spec::{Family, InvalidModelSpec, LayerSpec, ModelSpec};
use serde_json::{Map, Value, json};

/// How a model is to be written so that stock `transformers` loads it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExportForm {
    /// The `model_type` that admits its dimensions.
    pub family: Family,
    /// The layers differ: write the tensors of [`padded_spec`], zero where the model has no head or channel.
    pub padded: bool,
}

/// Why a model has no form that stock `transformers` loads.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NotExportable {
    #[error("the dimensions make no model")]
    Invalid(#[source] InvalidModelSpec),
    #[error(
        "layer {layer} has {actual:?}, layer 0 has {expected:?}; `config.json` has one set of widths, pad the model first"
    )]
    LayersDiffer { layer: usize, actual: LayerSpec, expected: LayerSpec },
}

/// # Errors
/// When the dimensions make no model.
pub fn export_form(spec: &ModelSpec) -> Result<ExportForm, NotExportable> {
    spec.validate().map_err(NotExportable::Invalid)?;
    let padded = spec.uniform_layer().is_none();
    Ok(ExportForm { family: export_family(&padded_spec(spec)), padded })
}

/// The smallest uniform model that holds every layer of `spec`.
///
/// Query heads are padded inside their groups: every layer gets the most kv heads of any, and each kv head the most
/// query heads. With zeros in `v_proj`, `o_proj` and `down_proj` for what was added, the function is the same.
#[must_use]
pub fn padded_spec(spec: &ModelSpec) -> ModelSpec {
    let most = |width: fn(&LayerSpec) -> usize| spec.layers.iter().map(width).max().unwrap_or(0);
    let kv_head_count = most(|layer| layer.kv_head_count);
    let widest = LayerSpec {
        query_head_count: kv_head_count * most(LayerSpec::query_heads_per_kv_head),
        kv_head_count,
        intermediate_size: most(|layer| layer.intermediate_size),
    };
    ModelSpec { layers: vec![widest; spec.layers.len()], ..spec.clone() }
}

/// The source's `config.json` changed to say `spec`, for stock `transformers`. What we do not interpret is kept.
///
/// # Errors
/// When the layers differ (see [`padded_spec`]) or the dimensions make no model.
pub fn export_config(
    source: &Map<String, Value>,
    spec: &ModelSpec,
    dtype: Dtype,
) -> Result<Map<String, Value>, NotExportable> {
    spec.validate().map_err(NotExportable::Invalid)?;
    let expected = spec.layers[0];
    if let Some(layer) = spec.layers.iter().position(|layer| *layer != expected) {
        return Err(NotExportable::LayersDiffer { layer, actual: spec.layers[layer], expected });
    }
    let family = export_family(spec);
    let mut config = source.clone();
    // Of another layout, of code that is not exported, or true of the source alone.
    for field in ["espalier_layers", "auto_map", "_name_or_path", "quantization_config"] {
        config.remove(field);
    }
    match family {
        Family::Llama => {
            config.insert("model_type".to_owned(), json!("llama"));
            config.insert("architectures".to_owned(), json!(["LlamaForCausalLM"]));
            config.remove("sliding_window");
        }
        Family::Mistral => {
            config.insert("model_type".to_owned(), json!("mistral"));
            config.insert("architectures".to_owned(), json!(["MistralForCausalLM"]));
            config.insert("sliding_window".to_owned(), Value::Null);
            for field in ["attention_bias", "mlp_bias", "pretraining_tp"] {
                config.remove(field);
            }
        }
    }
    for (field, value) in [
        ("hidden_size", spec.hidden_size),
        ("head_dim", spec.head_dim),
        ("vocab_size", spec.vocab_size),
        ("max_position_embeddings", spec.max_position_embeddings),
        ("num_hidden_layers", spec.layers.len()),
        ("num_attention_heads", expected.query_head_count),
        ("num_key_value_heads", expected.kv_head_count),
        ("intermediate_size", expected.intermediate_size),
    ] {
        config.insert(field.to_owned(), json!(value));
    }
    config.insert("tie_word_embeddings".to_owned(), json!(spec.tie_word_embeddings));
    // The new spelling stays where it is used; older releases understand only the old one.
    let dtype_field = if config.contains_key("dtype") { "dtype" } else { "torch_dtype" };
    config.insert(dtype_field.to_owned(), json!(dtype.torch_name()));
    if dtype_field == "dtype" {
        config.remove("torch_dtype");
    }
    Ok(config)
}

/// A `config.json` for our own reading that also says widths which differ between layers.
///
/// # Errors
/// When the dimensions make no model.
pub fn espalier_config(
    source: &Map<String, Value>,
    spec: &ModelSpec,
    dtype: Dtype,
) -> Result<Map<String, Value>, NotExportable> {
    let mut config = export_config(source, &padded_spec(spec), dtype)?;
    if spec.uniform_layer().is_none() {
        let layers: Vec<Value> = spec
            .layers
            .iter()
            .map(|layer| {
                json!({
                    "num_attention_heads": layer.query_head_count,
                    "num_key_value_heads": layer.kv_head_count,
                    "intermediate_size": layer.intermediate_size,
                })
            })
            .collect();
        config.insert("espalier_layers".to_owned(), Value::Array(layers));
    }
    Ok(config)
}

/// A Mistral stays one; a LLaMA becomes one when `transformers` would refuse it as what it is.
fn export_family(uniform: &ModelSpec) -> Family {
    let divides = |layer: &LayerSpec| uniform.hidden_size.is_multiple_of(layer.query_head_count);
    match uniform.family {
        Family::Llama if uniform.layers.first().is_some_and(divides) => Family::Llama,
        Family::Llama | Family::Mistral => Family::Mistral,
    }
}
