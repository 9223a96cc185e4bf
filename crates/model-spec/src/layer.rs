use serde::{Deserialize, Serialize};
use std::fmt;

/// 0-based position of a decoder layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct LayerIndex(pub usize);

impl fmt::Display for LayerIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// The widths of one decoder layer. They may differ from layer to layer once a model has been pruned.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerSpec {
    pub query_head_count: usize,
    pub kv_head_count: usize,
    pub intermediate_size: usize,
}

impl LayerSpec {
    /// Query heads that share one key/value head; 1 for plain multi-head attention.
    #[must_use]
    pub fn query_heads_per_kv_head(&self) -> usize {
        self.query_head_count.checked_div(self.kv_head_count).unwrap_or(0)
    }

    /// Whether nothing of the layer is left: what comes in goes out.
    #[must_use]
    pub fn is_removed(&self) -> bool {
        *self == Self { query_head_count: 0, kv_head_count: 0, intermediate_size: 0 }
    }

    /// The key/value head that `query_head` attends with: `h / (heads per kv head)`, as `transformers` repeats them.
    #[must_use]
    pub fn kv_head_of(&self, query_head: usize) -> usize {
        query_head / self.query_heads_per_kv_head()
    }
}
