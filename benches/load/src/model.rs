//! A model folder in the shape of LLaMA-65B whose weights take no space: the coordinator reads their names and shapes alone.

use anyhow::Context as _;
use serde_json::{Map, Value, json};
use std::fs::File;
use std::io::Write;
use std::path::Path;

const HIDDEN: u64 = 8192;
const CHANNELS: u64 = 22_016;
const HEADS: u64 = 64;
const VOCABULARY: u64 = 32_000;
const BYTES_OF_A_WEIGHT: u64 = 2;

/// Writes `config.json` and one sparse file of zeros.
pub(crate) fn write(folder: &Path, layers: u64) -> anyhow::Result<()> {
    std::fs::create_dir_all(folder).with_context(|| format!("`{}` cannot be made", folder.display()))?;
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "hidden_size": HIDDEN, "intermediate_size": CHANNELS, "num_hidden_layers": layers,
        "num_attention_heads": HEADS, "num_key_value_heads": HEADS, "vocab_size": VOCABULARY,
        "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 10_000.0, "tie_word_embeddings": false,
    });
    std::fs::write(folder.join("config.json"), config.to_string())?;
    let mut header = Map::new();
    let mut end = 0;
    let mut tensor = |name: String, shape: &[u64]| {
        let start = end;
        end += shape.iter().product::<u64>() * BYTES_OF_A_WEIGHT;
        header.insert(name, json!({"dtype": "F16", "shape": shape, "data_offsets": [start, end]}));
    };
    tensor("model.embed_tokens.weight".to_owned(), &[VOCABULARY, HIDDEN]);
    tensor("lm_head.weight".to_owned(), &[VOCABULARY, HIDDEN]);
    tensor("model.norm.weight".to_owned(), &[HIDDEN]);
    for layer in 0..layers {
        let mut part =
            |name: &str, shape: &[u64]| tensor(format!("model.layers.{layer}.{name}.weight"), shape);
        part("input_layernorm", &[HIDDEN]);
        part("post_attention_layernorm", &[HIDDEN]);
        for name in ["q_proj", "k_proj", "v_proj", "o_proj"] {
            part(&format!("self_attn.{name}"), &[HIDDEN, HIDDEN]);
        }
        part("mlp.gate_proj", &[CHANNELS, HIDDEN]);
        part("mlp.up_proj", &[CHANNELS, HIDDEN]);
        part("mlp.down_proj", &[HIDDEN, CHANNELS]);
    }
    let mut header = Value::Object(header).to_string().into_bytes();
    header.resize(header.len().next_multiple_of(8), b' ');
    let mut file = File::create(folder.join("model.safetensors"))?;
    let length = header.len() as u64;
    file.write_all(&length.to_le_bytes())?;
    file.write_all(&header)?;
    file.set_len(8 + length + end).context("the file system has no sparse files of this size")?;
    Ok(())
}
