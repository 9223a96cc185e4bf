//! Input files: their formats, and reading them record by record.

use std::fs::{self, File};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::{DataError, Place};
use crate::joining::RowJoining;

pub(crate) mod json_lines;
mod parquet_table;
mod plain_text;
mod raw_tokens;

/// One file of text or of token ids, and how it is read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TextSource {
    pub path: PathBuf,
    pub format: TextFormat,
    /// What stands between rows when they are joined into one text.
    #[serde(default)]
    pub row_joining: RowJoining,
}

/// What a file holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TextFormat {
    /// UTF-8 text; the file is one document.
    PlainText,
    /// One JSON object a line, the text in the string field `field`. Blank lines are left out.
    JsonLines { field: String },
    /// A table with the text in the string column `column` (nested ones as `outer.inner`);
    /// uncompressed, Snappy, gzip or Zstandard.
    Parquet { column: String },
    /// One JSON object a line, token ids in the array `field`.
    TokenJsonLines { field: String },
    /// A table with token ids in the column `column`, a list of integers.
    TokenParquet { column: String },
    /// Nothing but token ids of 2 bytes, little-endian.
    TokensU16,
    /// Nothing but token ids of 4 bytes, little-endian.
    TokensU32,
}

impl TextFormat {
    const EXTENSIONS: [(&str, Self); 3] =
        [(".txt", Self::PlainText), (".u16", Self::TokensU16), (".u32", Self::TokensU32)];

    /// The format that the end of a file's name stands for, whatever its case: `.txt`; `.jsonl`,
    /// `.ndjson` or `.json` (field `text`); `.parquet` (column `text`); `.tokens.jsonl` and
    /// `.tokens.parquet` (`input_ids`); `.u16`; `.u32`.
    #[must_use]
    pub fn from_file_name(path: &Path) -> Option<Self> {
        let name = path.file_name()?.to_string_lossy().to_ascii_lowercase();
        let (text, token_ids) = (|| "text".to_owned(), || "input_ids".to_owned());
        if name.ends_with(".tokens.jsonl") {
            Some(Self::TokenJsonLines { field: token_ids() })
        } else if name.ends_with(".tokens.parquet") {
            Some(Self::TokenParquet { column: token_ids() })
        } else if [".jsonl", ".ndjson", ".json"].iter().any(|end| name.ends_with(end)) {
            Some(Self::JsonLines { field: text() })
        } else if name.ends_with(".parquet") {
            Some(Self::Parquet { column: text() })
        } else {
            let known = Self::EXTENSIONS.into_iter().find(|(end, _)| name.ends_with(end));
            known.map(|(_, format)| format)
        }
    }

    /// Whether a file of this format holds text, which needs a tokenizer.
    #[must_use]
    pub fn is_text(&self) -> bool {
        match self {
            Self::PlainText | Self::JsonLines { .. } | Self::Parquet { .. } => true,
            Self::TokenJsonLines { .. } | Self::TokenParquet { .. } | Self::TokensU16 | Self::TokensU32 => {
                false
            }
        }
    }
}

impl TextSource {
    #[must_use]
    pub fn new(path: impl Into<PathBuf>, format: TextFormat) -> Self {
        Self { path: path.into(), format, row_joining: RowJoining::default() }
    }

    /// A source whose format is known from its name, see [`TextFormat::from_file_name`].
    ///
    /// # Errors
    /// When the name ends in nothing that is known.
    pub fn from_path(path: impl Into<PathBuf>) -> Result<Self, DataError> {
        let path = path.into();
        match TextFormat::from_file_name(&path) {
            Some(format) => Ok(Self::new(path, format)),
            None => Err(DataError::UnknownFormat { path }),
        }
    }

    /// The same source read from another field or column.
    ///
    /// # Errors
    /// When the format has neither fields nor columns.
    pub fn with_field(mut self, name: impl Into<String>) -> Result<Self, DataError> {
        let no_fields = match &mut self.format {
            TextFormat::JsonLines { field: chosen }
            | TextFormat::TokenJsonLines { field: chosen }
            | TextFormat::Parquet { column: chosen }
            | TextFormat::TokenParquet { column: chosen } => {
                *chosen = name.into();
                return Ok(self);
            }
            TextFormat::PlainText => "plain text",
            TextFormat::TokensU16 | TextFormat::TokensU32 => "bare token ids",
        };
        Err(DataError::NoFields { path: self.path, format: no_fields, field: name.into() })
    }

    /// The same source with another text between its rows.
    #[must_use]
    pub fn with_row_joining(mut self, row_joining: RowJoining) -> Self {
        self.row_joining = row_joining;
        self
    }

    /// Hands every record of the file to `sink`, in order, until that breaks off. Only one record
    /// (or one decoded page of a table) is in memory at a time.
    pub(crate) fn read(&self, vocab_size: u32, sink: &mut RecordSink<'_>) -> Result<(), DataError> {
        let path = self.path.as_path();
        let file_bytes = self.check_file()?;
        let file = File::open(path).map_err(|cause| DataError::Open { path: path.to_owned(), cause })?;
        match &self.format {
            TextFormat::PlainText => plain_text::read(path, file, file_bytes, sink),
            TextFormat::JsonLines { field } => json_lines::read_texts(path, file, field, sink),
            TextFormat::TokenJsonLines { field } => {
                json_lines::read_tokens(path, file, field, vocab_size, sink)
            }
            TextFormat::Parquet { column } => parquet_table::read_texts(path, file, column, sink),
            TextFormat::TokenParquet { column } => {
                parquet_table::read_tokens(path, file, column, vocab_size, sink)
            }
            TextFormat::TokensU16 => raw_tokens::read::<2>(path, file, file_bytes, vocab_size, sink),
            TextFormat::TokensU32 => raw_tokens::read::<4>(path, file, file_bytes, vocab_size, sink),
        }
    }

    /// Bytes of the file, which must be a regular one and not empty. Comes before anything opens
    /// it, since opening a pipe waits.
    pub(crate) fn check_file(&self) -> Result<u64, DataError> {
        let path = || self.path.clone();
        let metadata = fs::metadata(&self.path).map_err(|cause| DataError::Open { path: path(), cause })?;
        if metadata.is_dir() {
            return Err(DataError::NotAFile { path: path(), found: "a directory" });
        }
        if !metadata.is_file() {
            return Err(DataError::NotAFile { path: path(), found: "a device or pipe" });
        }
        if metadata.len() == 0 {
            return Err(DataError::EmptyFile { path: path() });
        }
        Ok(metadata.len())
    }
}

/// One unit of a file as it is read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Record {
    Text(String),
    /// Token ids, all of them in the vocabulary.
    Tokens(Vec<u32>),
    /// A piece of a file of bare token ids, which has no borders between documents.
    TokenPiece(Vec<u32>),
}

/// What takes the records of a file, each with its place in it.
pub(crate) type RecordSink<'a> = dyn FnMut(Record, Place) -> Result<ControlFlow<()>, DataError> + 'a;

/// A token id as a number of the vocabulary.
pub(crate) fn token_in_vocabulary(
    path: &Path,
    place: Place,
    token_id: i128,
    vocab_size: u32,
) -> Result<u32, DataError> {
    u32::try_from(token_id)
        .ok()
        .filter(|id| *id < vocab_size)
        .ok_or_else(|| DataError::TokenOutOfVocabulary { path: path.to_owned(), place, token_id, vocab_size })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_format_is_known_from_the_end_of_the_name() {
        let text = || "text".to_owned();
        let ids = || "input_ids".to_owned();
        for (name, expected) in [
            ("a/wiki.test.raw.txt", Some(TextFormat::PlainText)),
            ("A.TXT", Some(TextFormat::PlainText)),
            ("a.jsonl", Some(TextFormat::JsonLines { field: text() })),
            ("a.json", Some(TextFormat::JsonLines { field: text() })),
            ("a.ndjson", Some(TextFormat::JsonLines { field: text() })),
            ("a.tokens.jsonl", Some(TextFormat::TokenJsonLines { field: ids() })),
            ("train-00000-of-00002.parquet", Some(TextFormat::Parquet { column: text() })),
            ("a.tokens.parquet", Some(TextFormat::TokenParquet { column: ids() })),
            ("a.u16", Some(TextFormat::TokensU16)),
            ("a.u32", Some(TextFormat::TokensU32)),
            ("a.bin", None),
            ("a.json.gz", None),
            ("txt", None),
            ("a/..", None),
        ] {
            assert_eq!(TextFormat::from_file_name(Path::new(name)), expected, "{name}");
        }
    }

    #[test]
    fn a_field_is_chosen_where_there_are_fields() {
        let source = TextSource::from_path("a.jsonl").unwrap().with_field("body").unwrap();
        assert_eq!(source.format, TextFormat::JsonLines { field: "body".to_owned() });
        let error = TextSource::from_path("a.txt").unwrap().with_field("body").unwrap_err();
        assert_eq!(error.to_string(), "`a.txt` is read as plain text, which has no field `body` to choose");
    }
}
