//! A model folder of a given shape with random weights in bf16, which goes when it is dropped.

use serde_json::{Map, json};
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::str::FromStr;

/// Widths of a LLaMA-shaped model: `hidden,layers,heads,kv_heads,ffn,vocabulary`.
#[derive(Debug, Clone)]
pub(crate) struct ModelShape {
    hidden: usize,
    layers: usize,
    heads: usize,
    kv_heads: usize,
    ffn: usize,
    vocabulary: usize,
}

impl FromStr for ModelShape {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wanted = "expected six numbers: hidden,layers,heads,kv_heads,ffn,vocabulary";
        let numbers: Vec<usize> = text
            .split(',')
            .map(|number| number.trim().parse().map_err(|_| wanted))
            .collect::<Result<_, _>>()?;
        match numbers[..] {
            [hidden, layers, heads, kv_heads, ffn, vocabulary] if heads > 0 && hidden % heads == 0 => {
                Ok(Self { hidden, layers, heads, kv_heads, ffn, vocabulary })
            }
            [_, _, _, _, _, _] => Err("heads must divide hidden".into()),
            _ => Err(wanted.into()),
        }
    }
}

/// Writes `config.json` and `model.safetensors`.
pub(crate) fn write(shape: &ModelShape, tied: bool) -> io::Result<tempfile::TempDir> {
    let folder = tempfile::tempdir()?;
    let head_dim = shape.hidden / shape.heads;
    let config = json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "head_dim": head_dim,
        "intermediate_size": shape.ffn,
        "max_position_embeddings": 1 << 16,
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": tied,
        "vocab_size": shape.vocabulary,
    });
    std::fs::write(folder.path().join("config.json"), config.to_string())?;

    let (hidden, kv_width) = (shape.hidden, shape.kv_heads * head_dim);
    let mut tensors: Vec<(String, Vec<usize>)> = vec![
        (checkpoint::EMBEDDING.into(), vec![shape.vocabulary, hidden]),
        (checkpoint::FINAL_NORM.into(), vec![hidden]),
    ];
    if !tied {
        tensors.push((checkpoint::LM_HEAD.into(), vec![shape.vocabulary, hidden]));
    }
    for layer in 0..shape.layers {
        tensors.push((checkpoint::input_norm(layer), vec![hidden]));
        tensors.push((checkpoint::post_attention_norm(layer), vec![hidden]));
        for projection in model_spec::Projection::ALL {
            use model_spec::Projection;
            let [rows, columns] = match projection {
                Projection::Q | Projection::O => [hidden, hidden],
                Projection::K | Projection::V => [kv_width, hidden],
                Projection::Gate | Projection::Up => [shape.ffn, hidden],
                Projection::Down => [hidden, shape.ffn],
            };
            tensors.push((checkpoint::projection_weight(layer, projection), vec![rows, columns]));
        }
    }
    let mut header = Map::new();
    let mut offset = 0;
    for (name, shape) in &tensors {
        let end = offset + 2 * shape.iter().product::<usize>();
        header.insert(name.clone(), json!({"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}));
        offset = end;
    }
    let mut header = serde_json::Value::Object(header).to_string().into_bytes();
    header.resize(header.len().next_multiple_of(8), b' ');
    let mut file = BufWriter::with_capacity(1 << 20, File::create(folder.path().join("model.safetensors"))?);
    file.write_all(&(header.len() as u64).to_le_bytes())?;
    file.write_all(&header)?;
    let mut state = 1u64;
    for (_, shape) in &tensors {
        let mut rest: usize = shape.iter().product();
        let mut bytes = Vec::with_capacity(1 << 16);
        while rest > 0 {
            let count = rest.min(1 << 15);
            bytes.clear();
            for _ in 0..count {
                // Norms are one, weights uniform with the deviation 0.02 of a fresh model.
                let value = if shape.len() == 1 { 1.0 } else { uniform(&mut state) * 0.02 * 3f32.sqrt() };
                bytes.extend_from_slice(&((value.to_bits() >> 16) as u16).to_le_bytes());
            }
            file.write_all(&bytes)?;
            rest -= count;
        }
    }
    file.flush()?;
    Ok(folder)
}

/// In [-1, 1), by a linear congruential generator.
fn uniform(state: &mut u64) -> f32 {
    *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    ((*state >> 40) as f32) / (1u64 << 23) as f32 - 1.0
}
