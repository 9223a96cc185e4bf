//! What a run trains on.

use std::collections::BTreeMap;

use crate::collect::Corpus;
use crate::digest::digest;
use crate::error::DataError;
use crate::order::BatchOrder;
use crate::windows::{Windows, check_window};

/// Windows of text, dealt out batch by batch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TrainingSet {
    windows: Windows,
    digest: String,
}

impl TrainingSet {
    /// Reads the corpus and cuts it into windows of `window_tokens`.
    ///
    /// # Errors
    /// When a file, the tokenizer or an option is wrong, or there is no full window.
    pub fn load(corpus: &Corpus, window_tokens: usize) -> Result<Self, DataError> {
        check_window(window_tokens)?;
        let windows = Windows::cut(corpus.token_stream(None)?, window_tokens)?;
        let options = BTreeMap::from([
            ("joining", corpus.joining.to_string()),
            ("use", "training".to_owned()),
            ("vocab_size", corpus.vocab_size.to_string()),
            ("window_tokens", window_tokens.to_string()),
        ]);
        let digest = digest(&options, windows.iter());
        Ok(Self { windows, digest })
    }

    #[must_use]
    pub fn windows(&self) -> &Windows {
        &self.windows
    }

    /// Rows of micro-batch `micro_batch` of optimizer step `step`, both counted from 0: each a
    /// window. Depends on nothing but the arguments and the text.
    #[must_use]
    pub fn micro_batch(&self, order: &BatchOrder, step: u64, micro_batch: u32) -> Vec<&[u32]> {
        let indices = order.window_indices(step, micro_batch, self.windows.count());
        indices.filter_map(|index| self.windows.get(index)).collect()
    }

    /// SHA-256 over the options and all token ids: equal digests mean equal training data.
    #[must_use]
    pub fn digest(&self) -> &str {
        &self.digest
    }
}
