//! Text to token ids by a `tokenizer.json`.

use std::fs;
use std::path::{Path, PathBuf};

use tokenizers::{Encoding, Tokenizer};

use crate::error::{DataError, Place};
use crate::guard::guard;

const TOKENIZER_LIMIT_BYTES: u64 = 512 << 20;

/// A tokenizer in Hugging Face's format, tied to the vocabulary of a model.
#[derive(Debug)]
pub struct TextTokenizer {
    path: PathBuf,
    tokenizer: Tokenizer,
    vocab_size: u32,
}

impl TextTokenizer {
    /// Reads the `tokenizer.json` at `path`. Truncation and padding that it may ask for are left
    /// out, since text is cut into windows here.
    ///
    /// # Errors
    /// When the file cannot be read or is no tokenizer that the library knows.
    pub fn load(path: &Path, vocab_size: u32) -> Result<Self, DataError> {
        let unusable = |reason: String| DataError::Tokenizer { path: path.to_owned(), reason };
        let metadata = fs::metadata(path).map_err(|error| unusable(error.to_string()))?;
        if !metadata.is_file() {
            return Err(unusable("it is not a regular file".to_owned()));
        }
        if metadata.len() > TOKENIZER_LIMIT_BYTES {
            return Err(unusable(format!("it is larger than {TOKENIZER_LIMIT_BYTES} bytes")));
        }
        let bytes = fs::read(path).map_err(|error| unusable(error.to_string()))?;
        let mut tokenizer = guard(|| Tokenizer::from_bytes(bytes))
            .map_err(unusable)?
            .map_err(|error| unusable(error.to_string()))?;
        tokenizer.with_truncation(None).map_err(|error| unusable(error.to_string()))?;
        tokenizer.with_padding(None);
        Ok(Self { path: path.to_owned(), tokenizer, vocab_size })
    }

    /// The ids of one text, without special tokens around it. `file` and `place` say in an error
    /// where the text came from.
    ///
    /// # Errors
    /// When the tokenizer refuses the text or gives an id outside the model's vocabulary.
    pub fn encode(&self, text: &str, file: &Path, place: Place) -> Result<Vec<u32>, DataError> {
        let encoding = guard(|| self.tokenizer.encode_fast(text, false));
        let encoding = encoding.map(|result| result.map_err(|error| error.to_string()));
        let encoding = flatten(encoding).map_err(|reason| refused(file, place, reason))?;
        self.ids(&encoding)
    }

    /// The ids of several texts, each alone, in their order. `place` is that of the first.
    pub(crate) fn encode_each(
        &self,
        texts: Vec<String>,
        file: &Path,
        place: Place,
    ) -> Result<Vec<Vec<u32>>, DataError> {
        let encodings = guard(|| self.tokenizer.encode_batch_fast(texts, false));
        let encodings = encodings.map(|result| result.map_err(|error| error.to_string()));
        let encodings = flatten(encodings).map_err(|reason| refused(file, place, reason))?;
        encodings.iter().map(|encoding| self.ids(encoding)).collect()
    }

    fn ids(&self, encoding: &Encoding) -> Result<Vec<u32>, DataError> {
        let ids = encoding.get_ids();
        match ids.iter().find(|id| **id >= self.vocab_size) {
            Some(token_id) => Err(DataError::TokenizerVocabulary {
                path: self.path.clone(),
                token_id: *token_id,
                vocab_size: self.vocab_size,
            }),
            None => Ok(ids.to_vec()),
        }
    }
}

fn flatten<T>(result: Result<Result<T, String>, String>) -> Result<T, String> {
    result.and_then(|inner| inner)
}

fn refused(file: &Path, place: Place, reason: String) -> DataError {
    DataError::Encode { path: file.to_owned(), place, reason }
}
