use crate::gguf::blocks::BlockType;
use crate::tensor_name::required_tensors;
use crate::testing::random_weights;
use candle_core::{Device, Tensor, quantized::QTensor};
use model_spec::{ModelSpec, Projection};

const ALIGNMENT: usize = 32;

/// Puts a GGUF version 3 file together, right or wrong: nothing is checked.
#[derive(Debug, Clone, Default)]
pub struct GgufBuilder {
    pub metadata: Vec<(String, Vec<u8>)>,
    pub tensors: Vec<GgufTensor>,
}

/// A tensor of a [`GgufBuilder`].
#[derive(Debug, Clone)]
pub struct GgufTensor {
    pub name: String,
    /// Innermost first.
    pub dimensions: Vec<u64>,
    pub type_tag: u32,
    pub bytes: Vec<u8>,
}

impl GgufBuilder {
    /// Sets a metadata entry to the bytes of a value, after its type tag.
    #[must_use]
    pub fn value(mut self, key: &str, tag: u32, bytes: &[u8]) -> Self {
        let value = [&tag.to_le_bytes(), bytes].concat();
        match self.metadata.iter_mut().find(|(name, _)| name == key) {
            Some((_, old)) => *old = value,
            None => self.metadata.push((key.to_owned(), value)),
        }
        self
    }

    #[must_use]
    pub fn text(self, key: &str, text: &str) -> Self {
        self.value(key, 8, &sized(text))
    }

    #[must_use]
    pub fn u32(self, key: &str, number: u32) -> Self {
        self.value(key, 4, &number.to_le_bytes())
    }

    #[must_use]
    pub fn f32(self, key: &str, number: f32) -> Self {
        self.value(key, 6, &number.to_le_bytes())
    }

    #[must_use]
    pub fn bool(self, key: &str, value: bool) -> Self {
        self.value(key, 7, &[u8::from(value)])
    }

    #[must_use]
    pub fn texts<T: AsRef<str>>(self, key: &str, texts: &[T]) -> Self {
        let elements: Vec<u8> = texts.iter().flat_map(|text| sized(text.as_ref())).collect();
        self.array(key, 8, texts.len(), &elements)
    }

    #[must_use]
    pub fn i32s(self, key: &str, numbers: &[i32]) -> Self {
        let elements: Vec<u8> = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
        self.array(key, 5, numbers.len(), &elements)
    }

    #[must_use]
    pub fn f32s(self, key: &str, numbers: &[f32]) -> Self {
        let elements: Vec<u8> = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
        self.array(key, 6, numbers.len(), &elements)
    }

    fn array(self, key: &str, tag: u32, count: usize, elements: &[u8]) -> Self {
        let bytes = [&tag.to_le_bytes(), &(count as u64).to_le_bytes()[..], elements].concat();
        self.value(key, 9, &bytes)
    }

    #[must_use]
    pub fn without(mut self, key: &str) -> Self {
        self.metadata.retain(|(name, _)| name != key);
        self
    }

    /// The bytes of the file.
    #[must_use]
    pub fn build(&self) -> Vec<u8> {
        let mut file = b"GGUF".to_vec();
        file.extend(3_u32.to_le_bytes());
        file.extend((self.tensors.len() as u64).to_le_bytes());
        file.extend((self.metadata.len() as u64).to_le_bytes());
        for (key, value) in &self.metadata {
            file.extend(sized(key));
            file.extend(value);
        }
        let mut data = Vec::new();
        for tensor in &self.tensors {
            file.extend(sized(&tensor.name));
            file.extend((tensor.dimensions.len() as u32).to_le_bytes());
            tensor.dimensions.iter().for_each(|width| file.extend(width.to_le_bytes()));
            file.extend(tensor.type_tag.to_le_bytes());
            file.extend((data.len() as u64).to_le_bytes());
            data.extend(&tensor.bytes);
            data.resize(data.len().next_multiple_of(ALIGNMENT), 0);
        }
        file.resize(file.len().next_multiple_of(ALIGNMENT), 0);
        file.extend(data);
        file
    }
}

/// The model that `write_tiny_model` writes for the same spec and seed, as a GGUF file with a byte-level tokenizer.
///
/// Matrices are stored as `matrix_type` (such as `F32` or `Q8_0`), whose block must divide every row; norms as F32.
///
/// # Panics
/// When the spec has layers of different widths, or the type is unknown or does not divide: a mistake in the test.
#[must_use]
pub fn tiny_gguf(spec: &ModelSpec, matrix_type: &str, seed: u64) -> GgufBuilder {
    let kind =
        BlockType::ALL.into_iter().find(|kind| kind.name() == matrix_type).expect("a known block type");
    let layer = spec.uniform_layer().expect("a GGUF file has one set of widths");
    let tokens: Vec<String> = ["<unk>", "<s>", "</s>", "Ġ", "a", "b", "ab", "Ġab"]
        .map(str::to_owned)
        .into_iter()
        .chain((0..).map(|number| format!("<filler_{number}>")))
        .take(spec.vocab_size)
        .collect();
    let mut kinds = vec![1; spec.vocab_size];
    kinds[..3].copy_from_slice(&[3, 3, 3]);
    let mut builder = GgufBuilder::default()
        .text("general.architecture", "llama")
        .u32("llama.block_count", spec.layers.len() as u32)
        .u32("llama.embedding_length", spec.hidden_size as u32)
        .u32("llama.feed_forward_length", layer.intermediate_size as u32)
        .u32("llama.attention.head_count", layer.query_head_count as u32)
        .u32("llama.attention.head_count_kv", layer.kv_head_count as u32)
        .u32("llama.attention.key_length", spec.head_dim as u32)
        .u32("llama.context_length", spec.max_position_embeddings as u32)
        .f32("llama.attention.layer_norm_rms_epsilon", spec.rms_norm_eps as f32)
        .f32("llama.rope.freq_base", spec.rope.theta as f32)
        .text("tokenizer.ggml.model", "gpt2")
        .text("tokenizer.ggml.pre", "smollm")
        .texts("tokenizer.ggml.tokens", &tokens)
        .i32s("tokenizer.ggml.token_type", &kinds)
        .texts("tokenizer.ggml.merges", &["a b", "Ġ ab"])
        .u32("tokenizer.ggml.bos_token_id", 1)
        .u32("tokenizer.ggml.eos_token_id", 2)
        .u32("tokenizer.ggml.unknown_token_id", 0);
    for (index, (name, shape)) in required_tensors(spec).into_iter().enumerate() {
        let mut values = random_weights(&shape, seed.wrapping_add(index as u64));
        for (suffix, heads) in
            [("q_proj.weight", layer.query_head_count), ("k_proj.weight", layer.kv_head_count)]
        {
            if name.ends_with(suffix) {
                values = interleaved(&values, heads, spec.head_dim);
            }
        }
        let kind = if shape.len() == 2 { kind } else { BlockType::F32 };
        let tensor = Tensor::from_slice(&values, shape.clone(), &Device::Cpu).expect("values fill the shape");
        let quantised = QTensor::quantize(&tensor, kind.ggml()).expect("the block divides a row");
        builder.tensors.push(GgufTensor {
            name: gguf_name(&name),
            dimensions: shape.iter().rev().map(|&width| width as u64).collect(),
            type_tag: kind.tag(),
            bytes: quantised.data().expect("the data lie on the CPU").into_owned(),
        });
    }
    builder
}

/// Half-split rotary rows to interleaved ones, one row at a time: row `(half, pair)` of a head goes to `2 * pair + half`.
fn interleaved(values: &[f32], heads: usize, head_dim: usize) -> Vec<f32> {
    let columns = values.len() / (heads * head_dim);
    let mut rows = vec![0.0; values.len()];
    for head in 0..heads {
        for half in 0..2 {
            for pair in 0..head_dim / 2 {
                let from = (head * head_dim + half * head_dim / 2 + pair) * columns;
                let to = (head * head_dim + 2 * pair + half) * columns;
                rows[to..to + columns].copy_from_slice(&values[from..from + columns]);
            }
        }
    }
    rows
}

fn gguf_name(name: &str) -> String {
    let modules = [
        (Projection::Q, "attn_q"),
        (Projection::K, "attn_k"),
        (Projection::V, "attn_v"),
        (Projection::O, "attn_output"),
        (Projection::Gate, "ffn_gate"),
        (Projection::Up, "ffn_up"),
        (Projection::Down, "ffn_down"),
    ];
    let name = modules
        .into_iter()
        .fold(name.to_owned(), |name, (projection, gguf)| name.replace(projection.module_path(), gguf));
    name.replace("model.layers.", "blk.")
        .replace("post_attention_layernorm", "ffn_norm")
        .replace("input_layernorm", "attn_norm")
        .replace("model.embed_tokens", "token_embd")
        .replace("model.norm", "output_norm")
        .replace("lm_head", "output")
}

fn sized(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat()
}
