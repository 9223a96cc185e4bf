//! Tiny valid model folders for the tests of this crate and of those above it.
//!
//! The weights are random but the same on every machine, run and thread count.

mod gguf;

pub use gguf::{GgufBuilder, GgufTensor, tiny_gguf};

use crate::{Dtype, FolderWriter, TensorHeader, WriteFolderError, espalier_config, required_tensors};
use model_spec::{Family, LayerSpec, ModelSpec, Rope, RopeScaling};
use serde_json::{Map, Value, json};
use std::path::Path;

/// Two layers, hidden 16, 4 query heads on 2 kv heads of dimension 4, 24 channels, vocabulary 32, tied embeddings.
#[must_use]
pub fn tiny_spec() -> ModelSpec {
    let layer = LayerSpec { query_head_count: 4, kv_head_count: 2, intermediate_size: 24 };
    ModelSpec {
        family: Family::Llama,
        hidden_size: 16,
        head_dim: 4,
        vocab_size: 32,
        max_position_embeddings: 64,
        rms_norm_eps: 1e-5,
        rope: Rope { theta: 10_000.0, scaling: RopeScaling::None },
        tie_word_embeddings: true,
        layers: vec![layer; 2],
    }
}

/// The `config.json` of `spec`, with `espalier_layers` when its layers differ.
///
/// # Panics
/// When `spec` is not valid: a mistake in the test.
#[must_use]
pub fn config_of(spec: &ModelSpec, dtype: Dtype) -> Map<String, Value> {
    let mut base = Map::new();
    base.insert("hidden_act".to_owned(), json!("silu"));
    base.insert("rms_norm_eps".to_owned(), json!(spec.rms_norm_eps));
    base.insert("rope_theta".to_owned(), json!(spec.rope.theta));
    base.insert("rope_scaling".to_owned(), rope_scaling(spec.rope.scaling));
    base.insert("bos_token_id".to_owned(), json!(1));
    base.insert("eos_token_id".to_owned(), json!(2));
    espalier_config(&base, spec, dtype).expect("the spec of a test is valid")
}

fn rope_scaling(scaling: RopeScaling) -> Value {
    match scaling {
        RopeScaling::None => Value::Null,
        RopeScaling::Linear { factor } => json!({ "rope_type": "linear", "factor": factor }),
        RopeScaling::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            original_max_position_embeddings,
        } => json!({
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": low_freq_factor,
            "high_freq_factor": high_freq_factor,
            "original_max_position_embeddings": original_max_position_embeddings,
        }),
    }
}

/// Writes a whole model folder: configuration, tokenizer, weights in shards of at most `max_shard_bytes`.
///
/// Matrices are uniform with standard deviation `1 / sqrt(columns)`, norms between 0.9 and 1.1.
///
/// # Errors
/// As [`FolderWriter`].
///
/// # Panics
/// When `spec` is not valid: a mistake in the test.
pub fn write_tiny_model(
    folder: &Path,
    spec: &ModelSpec,
    dtype: Dtype,
    seed: u64,
    max_shard_bytes: u64,
) -> Result<(), WriteFolderError> {
    let headers = required_tensors(spec).into_iter().map(|(name, shape)| TensorHeader { name, dtype, shape });
    let headers: Vec<_> = headers.collect();
    let mut writer = FolderWriter::create(folder, headers.clone(), max_shard_bytes)?;
    for (index, header) in headers.iter().enumerate() {
        let values = random_weights(&header.shape, seed.wrapping_add(index as u64));
        let mut bytes = Vec::new();
        dtype.encode(&values, &mut bytes);
        writer.add_tensor(&header.name, &bytes)?;
    }
    writer.write_file("tokenizer.json", tiny_tokenizer(spec.vocab_size).as_bytes())?;
    writer.write_file("tokenizer_config.json", br#"{"tokenizer_class": "PreTrainedTokenizerFast"}"#)?;
    writer.finish(&config_of(spec, dtype), &[])?;
    Ok(())
}

/// Row-major values of a tensor of this shape.
#[must_use]
pub fn random_weights(shape: &[usize], seed: u64) -> Vec<f32> {
    let mut state = seed;
    let (centre, half_width) = match shape {
        [_] => (1.0, 0.1),
        _ => (0.0, (3.0 / shape.last().copied().unwrap_or(1) as f64).sqrt()),
    };
    (0..shape.iter().product::<usize>())
        .map(|_| {
            let unit = (split_mix(&mut state) >> 11) as f64 / (1_u64 << 53) as f64;
            (centre + half_width * (2.0 * unit - 1.0)) as f32
        })
        .collect()
}

/// A byte-level tokenizer without merges: `<unk>`, `<s>`, `</s>`, then bytes from the blank on, as far as they fit;
/// ids without a byte are `<filler_N>`.
#[must_use]
pub fn tiny_tokenizer(vocab_size: usize) -> String {
    let specials = ["<unk>", "<s>", "</s>"];
    // The byte-level alphabet shows the blank as Ġ and printable ASCII as itself; the rest is not needed in tests.
    let alphabet = std::iter::once('Ġ')
        .chain('a'..='z')
        .chain('A'..='Z')
        .chain('0'..='9')
        .chain("Ċ.,!?'\"-:;()".chars());
    let tokens = specials.iter().map(ToString::to_string).chain(alphabet.map(String::from));
    let fillers = (0..).map(|number| format!("<filler_{number}>"));
    let vocab: Map<String, Value> =
        tokens.chain(fillers).take(vocab_size).enumerate().map(|(id, token)| (token, json!(id))).collect();
    let added: Vec<Value> = specials
        .iter()
        .enumerate()
        .map(|(id, content)| {
            json!({
                "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": true,
            })
        })
        .collect();
    let byte_level = json!({
        "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true,
    });
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": null,
        "pre_tokenizer": byte_level, "post_processor": null, "decoder": byte_level,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": vocab, "merges": [],
        },
    });
    tokenizer.to_string()
}

/// SplitMix64 (Steele, Lea, Flood 2014).
fn split_mix(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut mixed = *state;
    mixed = (mixed ^ mixed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ mixed >> 31
}
