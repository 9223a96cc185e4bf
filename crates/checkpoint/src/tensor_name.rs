//! What the tensors of a LLaMA are called in Hugging Face checkpoints.

use model_spec::{ModelSpec, Projection};

/// Token embedding `[vocab, hidden]`.
pub const EMBEDDING: &str = "model.embed_tokens.weight";
/// Weight of the last RMSNorm `[hidden]`.
pub const FINAL_NORM: &str = "model.norm.weight";
/// Output head `[vocab, hidden]`; absent when tied to the embedding.
pub const LM_HEAD: &str = "lm_head.weight";

/// Weight of the RMSNorm before the attention of `layer`, `[hidden]`.
#[must_use]
pub fn input_norm(layer: usize) -> String {
    format!("model.layers.{layer}.input_layernorm.weight")
}

/// Weight of the RMSNorm before the MLP of `layer`, `[hidden]`.
#[must_use]
pub fn post_attention_norm(layer: usize) -> String {
    format!("model.layers.{layer}.post_attention_layernorm.weight")
}

/// Weight `[out, in]` of a projection of `layer`.
#[must_use]
pub fn projection_weight(layer: usize, projection: Projection) -> String {
    format!("model.layers.{layer}.{}.weight", projection.module_path())
}

/// Every tensor that a model of this spec has, with its shape, in the order we write them: embedding, layers, norm, head.
#[must_use]
pub fn required_tensors(spec: &ModelSpec) -> Vec<(String, Vec<usize>)> {
    let mut tensors = vec![(EMBEDDING.to_owned(), vec![spec.vocab_size, spec.hidden_size])];
    for layer in 0..spec.layers.len() {
        tensors.push((input_norm(layer), vec![spec.hidden_size]));
        for projection in Projection::ALL {
            let shape = spec.projection_shape(layer, projection);
            tensors.push((projection_weight(layer, projection), shape.to_vec()));
        }
        tensors.push((post_attention_norm(layer), vec![spec.hidden_size]));
    }
    tensors.push((FINAL_NORM.to_owned(), vec![spec.hidden_size]));
    if !spec.tie_word_embeddings {
        tensors.push((LM_HEAD.to_owned(), vec![spec.vocab_size, spec.hidden_size]));
    }
    tensors
}
