//! The rows over which perplexity is measured.

use std::collections::BTreeMap;

use crate::collect::Corpus;
use crate::digest::digest;
use crate::error::DataError;
use crate::joining::Joining;
use crate::windows::{Windows, check_window};

/// Rows of token ids, each alone in the model: in each the tokens from the second on are
/// predicted from those before them.
///
/// ```text
/// perplexity = exp(sum of -ln p(row[i] | row[..i]), over all rows and 1 <= i < row length, / predicted_count)
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EvaluationSet {
    rows: Rows,
    digest: String,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Rows {
    Windows(Windows),
    /// Rows of differing length, each at least 2 tokens.
    Stories(Vec<Vec<u32>>),
}

impl EvaluationSet {
    /// Reads the corpus. Joined by stories, each story is a row cut to `window_tokens`; else the
    /// tokens are cut into windows of that length, the rest dropped. With `limit_tokens` only so
    /// many tokens from the beginning are read (stories are read whole).
    ///
    /// # Errors
    /// When a file, the tokenizer or an option is wrong, or there is nothing to predict.
    pub fn load(
        corpus: &Corpus,
        window_tokens: usize,
        limit_tokens: Option<usize>,
    ) -> Result<Self, DataError> {
        check_window(window_tokens)?;
        let rows = match corpus.joining {
            Joining::Stream | Joining::Documents { .. } => {
                Rows::Windows(Windows::cut(corpus.token_stream(limit_tokens)?, window_tokens)?)
            }
            Joining::Stories { begin } => {
                let mut stories = corpus.story_rows(begin, window_tokens, limit_tokens)?;
                stories.retain(|row| row.len() > 1);
                if stories.is_empty() {
                    return Err(DataError::NothingToPredict);
                }
                Rows::Stories(stories)
            }
        };
        let options = BTreeMap::from([
            ("joining", corpus.joining.to_string()),
            ("use", "evaluation".to_owned()),
            ("vocab_size", corpus.vocab_size.to_string()),
            ("window_tokens", window_tokens.to_string()),
        ]);
        let digest = digest(&options, rows.to_vec().into_iter());
        Ok(Self { rows, digest })
    }

    /// The rows in the order of the text.
    #[must_use]
    pub fn rows(&self) -> Vec<&[u32]> {
        self.rows.to_vec()
    }

    /// Tokens predicted over all rows.
    #[must_use]
    pub fn predicted_count(&self) -> usize {
        self.rows.to_vec().iter().map(|row| row.len() - 1).sum()
    }

    /// SHA-256 over the options and all token ids: equal digests mean equal evaluation data.
    #[must_use]
    pub fn digest(&self) -> &str {
        &self.digest
    }
}

impl Rows {
    fn to_vec(&self) -> Vec<&[u32]> {
        match self {
            Self::Windows(windows) => windows.iter().collect(),
            Self::Stories(stories) => stories.iter().map(Vec::as_slice).collect(),
        }
    }
}
