//! Why text could not become windows of token ids, with the file and the place in it.

use std::fmt;
use std::io;
use std::path::PathBuf;

/// Where in a file something stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// The file as one text.
    WholeFile,
    /// A line, counted from 1 as editors do.
    Line(u64),
    /// A row of a table, counted from 0.
    RowIndex(u64),
    /// A token of a token file, counted from 0.
    TokenIndex(u64),
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::WholeFile => write!(f, "its text"),
            Self::Line(line) => write!(f, "line {line}"),
            Self::RowIndex(row) => write!(f, "row index {row}"),
            Self::TokenIndex(token) => write!(f, "token index {token}"),
        }
    }
}

/// Why text could not become windows of token ids.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    #[error("no data files are given: name at least one")]
    NoSources,
    #[error(
        "the format of `{path}` is not known from its name: give it explicitly, or use one of .txt, .jsonl, .parquet, .tokens.jsonl, .tokens.parquet, .u16, .u32"
    )]
    UnknownFormat { path: PathBuf },
    #[error("`{path}` is read as {format}, which has no field `{field}` to choose")]
    NoFields { path: PathBuf, format: &'static str, field: String },
    #[error("failed to open `{path}`")]
    Open {
        path: PathBuf,
        #[source]
        cause: io::Error,
    },
    #[error("`{path}` is {found}, a regular file is needed")]
    NotAFile { path: PathBuf, found: &'static str },
    #[error("`{path}` is empty")]
    EmptyFile { path: PathBuf },
    #[error("failed to read `{path}`")]
    Read {
        path: PathBuf,
        #[source]
        cause: io::Error,
    },
    #[error("`{path}` holds no text: every document in it is empty")]
    NoText { path: PathBuf },
    #[error(
        "`{path}` gives more than {limit_bytes} bytes to tokenise as one text: split it into several files, join by documents, or give token ids"
    )]
    TextTooLong { path: PathBuf, limit_bytes: u64 },
    #[error("`{path}` is not UTF-8 text: bad byte at offset {byte_offset}, line {line}")]
    NotUtf8 { path: PathBuf, byte_offset: u64, line: u64 },
    #[error("`{path}` line {line} is longer than {limit_bytes} bytes")]
    LineTooLong { path: PathBuf, line: u64, limit_bytes: u64 },
    #[error("`{path}` line {line} is not JSON: {reason}, column {column}")]
    BrokenJson { path: PathBuf, line: u64, column: usize, reason: String },
    #[error("`{path}` line {line} holds {found}, one JSON object a line is needed")]
    NotAnObject { path: PathBuf, line: u64, found: &'static str },
    #[error("`{path}` line {line} has no field `{field}`, its fields are: {present}")]
    MissingField { path: PathBuf, line: u64, field: String, present: String },
    #[error("`{path}` line {line}: field `{field}` holds {found}, {expected} is needed")]
    WrongFieldType { path: PathBuf, line: u64, field: String, expected: &'static str, found: &'static str },
    #[error("`{path}` has no column `{column}`, its columns are: {present}")]
    MissingColumn { path: PathBuf, column: String, present: String },
    #[error("`{path}`: column `{column}` holds {found}, {expected} is needed")]
    WrongColumnType { path: PathBuf, column: String, expected: &'static str, found: String },
    #[error("`{path}`: column `{column}` is null at row index {row_index}")]
    NullRow { path: PathBuf, column: String, row_index: u64 },
    #[error(
        "`{path}`: column `{column}` is not UTF-8 text at row index {row_index}, byte {byte_index} of the row"
    )]
    RowNotUtf8 { path: PathBuf, column: String, row_index: u64, byte_index: usize },
    #[error("`{path}` is not a sound Parquet file: {reason}")]
    CorruptParquet { path: PathBuf, reason: String },
    #[error("`{path}` has {file_bytes} bytes, not a whole number of {token_bytes}-byte token ids")]
    PartialToken { path: PathBuf, file_bytes: u64, token_bytes: u64 },
    #[error(
        "`{path}`, {place}: token id {token_id} is outside the model's vocabulary of {vocab_size}; were the ids made with another tokenizer?"
    )]
    TokenOutOfVocabulary { path: PathBuf, place: Place, token_id: i128, vocab_size: u32 },
    #[error("`{path}` has no borders between documents, which joining by stories needs: join as a stream")]
    NoDocumentBorders { path: PathBuf },
    #[error("failed to load the tokenizer `{path}`: {reason}")]
    Tokenizer { path: PathBuf, reason: String },
    #[error(
        "the tokenizer `{path}` gives token id {token_id}, the model's vocabulary has {vocab_size}: they do not belong together"
    )]
    TokenizerVocabulary { path: PathBuf, token_id: u32, vocab_size: u32 },
    #[error("failed to tokenise `{path}`, {place}: {reason}")]
    Encode { path: PathBuf, place: Place, reason: String },
    #[error("the {role} token id {token_id} is outside the model's vocabulary of {vocab_size}")]
    JoiningToken { role: &'static str, token_id: u32, vocab_size: u32 },
    #[error("a window of {window_tokens} tokens predicts nothing: at least 2 are needed")]
    WindowTooShort { window_tokens: usize },
    #[error(
        "the data give {token_count} tokens, fewer than one window of {window_tokens}: add text or choose a shorter window"
    )]
    TooFewTokens { token_count: usize, window_tokens: usize },
    #[error("`{path}` holds no row: a task has one JSON object a line")]
    NoTaskRows { path: PathBuf },
    #[error("`{path}` line {line} is no row of a task: {reason}")]
    UnusableTaskRow { path: PathBuf, line: u64, reason: String },
    #[error("the data leave no token to predict: every row is shorter than 2 tokens")]
    NothingToPredict,
}
