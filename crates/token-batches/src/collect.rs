//! Files to one sequence of token ids, or to one row for each story.

use std::ops::ControlFlow;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::error::{DataError, Place};
use crate::joining::{Joining, STORY_SEPARATOR, strip};
use crate::source::{Record, TextSource};
use crate::tokenize::TextTokenizer;

/// Longest text that is tokenised at once: the tokenizer takes some 130 bytes of memory for each of its bytes.
pub(crate) const TEXT_LIMIT_BYTES: u64 = 128 << 20;
/// Documents are tokenised together up to this size.
const BATCH_BYTES: usize = 4 << 20;

/// Files, and all that decides which tokens come out of them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Corpus {
    /// Read in this order.
    pub sources: Vec<TextSource>,
    /// Only opened if a source holds text.
    pub tokenizer_json: PathBuf,
    /// Ids of the model: `0..vocab_size`.
    pub vocab_size: u32,
    pub joining: Joining,
}

impl Corpus {
    /// The tokens of all files, one after the other; no more than the first `limit_tokens`.
    pub(crate) fn token_stream(&self, limit_tokens: Option<usize>) -> Result<Vec<u32>, DataError> {
        let limit_tokens = limit_tokens.unwrap_or(usize::MAX);
        let tokenizer = self.prepare()?;
        let mut token_ids = Vec::new();
        for source in &self.sources {
            if token_ids.len() >= limit_tokens {
                break;
            }
            let before = token_ids.len();
            match self.joining {
                Joining::Stream => {
                    self.append_text_stream(source, tokenizer.as_ref(), limit_tokens, &mut token_ids)?;
                }
                Joining::Documents { begin, end } => {
                    self.for_each_document(source, tokenizer.as_ref(), &mut |document| {
                        document.append_to(&mut token_ids, begin, end);
                        Ok(flow(token_ids.len() < limit_tokens))
                    })?;
                }
                Joining::Stories { begin } => {
                    self.for_each_document(source, tokenizer.as_ref(), &mut |story| {
                        story.append_to(&mut token_ids, Some(begin), None);
                        Ok(flow(token_ids.len() < limit_tokens))
                    })?;
                }
            }
            if token_ids.len() == before {
                return Err(DataError::NoText { path: source.path.clone() });
            }
        }
        token_ids.truncate(limit_tokens);
        Ok(token_ids)
    }

    /// One row a story: `begin` and its tokens, cut to `window_tokens`. Ends behind the row that
    /// fills `limit_tokens`.
    pub(crate) fn story_rows(
        &self,
        begin: u32,
        window_tokens: usize,
        limit_tokens: Option<usize>,
    ) -> Result<Vec<Vec<u32>>, DataError> {
        let limit_tokens = limit_tokens.unwrap_or(usize::MAX);
        let tokenizer = self.prepare()?;
        let (mut rows, mut token_count) = (Vec::new(), 0);
        for source in &self.sources {
            if token_count >= limit_tokens {
                break;
            }
            let before = rows.len();
            self.for_each_document(source, tokenizer.as_ref(), &mut |story| {
                let mut row = Vec::new();
                story.append_to(&mut row, Some(begin), None);
                row.truncate(window_tokens);
                token_count += row.len();
                rows.push(row);
                Ok(flow(token_count < limit_tokens))
            })?;
            if rows.len() == before {
                return Err(DataError::NoText { path: source.path.clone() });
            }
        }
        Ok(rows)
    }

    /// Looks at every option and file before the long work begins, and loads the tokenizer if
    /// there is text.
    fn prepare(&self) -> Result<Option<TextTokenizer>, DataError> {
        if self.sources.is_empty() {
            return Err(DataError::NoSources);
        }
        self.joining.check(self.vocab_size)?;
        for source in &self.sources {
            source.check_file()?;
        }
        let any_text = self.sources.iter().any(|source| source.format.is_text());
        any_text.then(|| TextTokenizer::load(&self.tokenizer_json, self.vocab_size)).transpose()
    }

    /// Appends a file read as one text, or token ids as they stand.
    fn append_text_stream(
        &self,
        source: &TextSource,
        tokenizer: Option<&TextTokenizer>,
        limit_tokens: usize,
        token_ids: &mut Vec<u32>,
    ) -> Result<(), DataError> {
        let (mut rows, mut text_bytes) = (Vec::new(), 0);
        source.read(self.vocab_size, &mut |record, _| {
            match record {
                Record::Text(row) => {
                    // Room for what is put between rows.
                    text_bytes += row.len() as u64 + 2;
                    rows.push(row);
                    if text_bytes > TEXT_LIMIT_BYTES + 2 {
                        return Err(DataError::TextTooLong {
                            path: source.path.clone(),
                            limit_bytes: TEXT_LIMIT_BYTES,
                        });
                    }
                }
                Record::Tokens(ids) | Record::TokenPiece(ids) => token_ids.extend(ids),
            }
            Ok(flow(token_ids.len() < limit_tokens))
        })?;
        let any_text = rows.iter().any(|row| !row.is_empty());
        if let (Some(tokenizer), true) = (tokenizer, any_text) {
            let text = source.row_joining.join(&rows);
            drop(rows);
            token_ids.extend(tokenizer.encode(&text, &source.path, Place::WholeFile)?);
        }
        Ok(())
    }

    /// Hands every document of a file (for stories, every story) to `each` as tokens. Empty ones
    /// are left out.
    fn for_each_document(
        &self,
        source: &TextSource,
        tokenizer: Option<&TextTokenizer>,
        each: &mut dyn FnMut(Document) -> Result<ControlFlow<()>, DataError>,
    ) -> Result<(), DataError> {
        let mut batch = TextBatch::default();
        let mut stopped = false;
        source.read(self.vocab_size, &mut |record, place| {
            let next = match record {
                Record::Tokens(ids) if ids.is_empty() => ControlFlow::Continue(()),
                Record::Tokens(ids) => each(Document::AsItStands(ids))?,
                Record::TokenPiece(ids) => match self.joining {
                    Joining::Documents { .. } | Joining::Stream => each(Document::AsItStands(ids))?,
                    Joining::Stories { .. } => {
                        return Err(DataError::NoDocumentBorders { path: source.path.clone() });
                    }
                },
                Record::Text(text) => {
                    match self.joining {
                        Joining::Documents { .. } | Joining::Stream => batch.push(text, place),
                        Joining::Stories { .. } => {
                            for story in text.split(STORY_SEPARATOR) {
                                batch.push(strip(story).to_owned(), place);
                            }
                        }
                    }
                    if batch.text_bytes < BATCH_BYTES {
                        ControlFlow::Continue(())
                    } else {
                        batch.drain(source, tokenizer, each)?
                    }
                }
            };
            stopped = next.is_break();
            Ok(next)
        })?;
        if !stopped {
            // The file is at its end: whether `each` wants more makes no difference.
            let _ = batch.drain(source, tokenizer, each)?;
        }
        Ok(())
    }
}

/// The tokens of one document.
enum Document {
    Text(Vec<u32>),
    /// Given as token ids, to which nothing is added.
    AsItStands(Vec<u32>),
}

impl Document {
    fn append_to(self, token_ids: &mut Vec<u32>, begin: Option<u32>, end: Option<u32>) {
        match self {
            Self::Text(ids) => {
                token_ids.extend(begin);
                token_ids.extend(ids);
                token_ids.extend(end);
            }
            Self::AsItStands(ids) => token_ids.extend(ids),
        }
    }
}

/// Texts waiting to be tokenised together.
#[derive(Default)]
struct TextBatch {
    texts: Vec<String>,
    text_bytes: usize,
    first_place: Option<Place>,
}

impl TextBatch {
    fn push(&mut self, text: String, place: Place) {
        if !text.is_empty() {
            self.text_bytes += text.len();
            self.texts.push(text);
            self.first_place.get_or_insert(place);
        }
    }

    fn drain(
        &mut self,
        source: &TextSource,
        tokenizer: Option<&TextTokenizer>,
        each: &mut dyn FnMut(Document) -> Result<ControlFlow<()>, DataError>,
    ) -> Result<ControlFlow<()>, DataError> {
        let batch = std::mem::take(self);
        let (Some(tokenizer), Some(place)) = (tokenizer, batch.first_place) else {
            return Ok(ControlFlow::Continue(()));
        };
        for ids in tokenizer.encode_each(batch.texts, &source.path, place)? {
            if each(Document::Text(ids))?.is_break() {
                return Ok(ControlFlow::Break(()));
            }
        }
        Ok(ControlFlow::Continue(()))
    }
}

fn flow(more: bool) -> ControlFlow<()> {
    if more { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
}
