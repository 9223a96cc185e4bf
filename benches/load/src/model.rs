//! A model folder whose weights take no space: the coordinator reads their names and shapes alone.

use anyhow::Context as _;
use serde_json::{Map, Value, json};
use std::fs::File;
use std::io::Write;
use std::path::Path;

const VOCABULARY: u64 = 32_000;
const BYTES_OF_A_WEIGHT: u64 = 2;

/// Widths of the model, those of LLaMA-65B by default.
#[derive(Debug, Clone, Copy, clap::Args)]
pub(crate) struct Shape {
    #[arg(long, default_value_t = 80)]
    pub(crate) layers: u64,
    #[arg(long, default_value_t = 8192)]
    pub(crate) hidden: u64,
    #[arg(long, default_value_t = 64)]
    pub(crate) heads: u64,
    /// Channels of a layer
    #[arg(long, default_value_t = 22_016)]
    pub(crate) channels: u64,
}

/// Writes `config.json` and one sparse file of zeros.
pub(crate) fn write(folder: &Path, shape: Shape) -> anyhow::Result<()> {
    let Shape { layers, hidden, heads, channels } = shape;
    std::fs::create_dir_all(folder).with_context(|| format!("`{}` cannot be made", folder.display()))?;
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "hidden_size": hidden, "intermediate_size": channels, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": heads, "vocab_size": VOCABULARY,
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
    tensor("model.embed_tokens.weight".to_owned(), &[VOCABULARY, hidden]);
    tensor("lm_head.weight".to_owned(), &[VOCABULARY, hidden]);
    tensor("model.norm.weight".to_owned(), &[hidden]);
    for layer in 0..layers {
        let mut part =
            |name: &str, shape: &[u64]| tensor(format!("model.layers.{layer}.{name}.weight"), shape);
        part("input_layernorm", &[hidden]);
        part("post_attention_layernorm", &[hidden]);
        for name in ["q_proj", "k_proj", "v_proj", "o_proj"] {
            part(&format!("self_attn.{name}"), &[hidden, hidden]);
        }
        part("mlp.gate_proj", &[channels, hidden]);
        part("mlp.up_proj", &[channels, hidden]);
        part("mlp.down_proj", &[hidden, channels]);
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
