//! How documents and rows become one sequence of tokens.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::error::DataError;

/// The line that parts stories in a plain text file, as TinyStories ships.
pub const STORY_SEPARATOR: &str = "<|endoftext|>";

/// How the documents of a corpus become one sequence of tokens.
///
/// Rows that already hold token ids are taken as they stand: nothing is put between them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Joining {
    /// Each document is tokenised alone, `begin` put before it and `end` after it. A plain text
    /// file is one document, else each row is one; empty documents are left out.
    Documents { begin: Option<u32>, end: Option<u32> },
    /// The rows of a file are joined by its [`RowJoining`] into one text, which is tokenised at
    /// once without special tokens: the published perplexity protocol. Several files follow one
    /// another, each tokenised by itself.
    Stream,
    /// Each text is cut at [`STORY_SEPARATOR`]; each story, freed of white space at its ends, is
    /// tokenised alone behind `begin`. For evaluation each story is a row of its own.
    Stories { begin: u32 },
}

impl Joining {
    /// # Errors
    /// When a token that this puts between documents is not in the vocabulary.
    pub(crate) fn check(&self, vocab_size: u32) -> Result<(), DataError> {
        let tokens = match self {
            Self::Documents { begin, end } => [("begin", *begin), ("end", *end)],
            Self::Stream => [("begin", None), ("end", None)],
            Self::Stories { begin } => [("begin", Some(*begin)), ("end", None)],
        };
        for (role, token) in tokens {
            if let Some(token_id) = token.filter(|token| *token >= vocab_size) {
                return Err(DataError::JoiningToken { role, token_id, vocab_size });
            }
        }
        Ok(())
    }
}

impl fmt::Display for Joining {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Documents { begin, end } => write!(f, "documents {begin:?} {end:?}"),
            Self::Stream => write!(f, "stream"),
            Self::Stories { begin } => write!(f, "stories {begin}"),
        }
    }
}

/// What stands between the rows of one file when they are read as a stream.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RowJoining {
    /// [`RowJoining::Lines`] if every row that is not empty ends in a newline (WikiText), else
    /// the rows are documents with a blank line between them.
    #[default]
    Auto,
    /// Rows are the lines of one text and bring their newline. An empty row stands for a line of
    /// one blank: so WikiText's own files write it, and the tables made of them drop it.
    Lines,
    /// This text stands between rows; it may be empty.
    Separator(String),
}

impl RowJoining {
    /// The rows as one text.
    pub(crate) fn join(&self, rows: &[String]) -> String {
        let lines = match self {
            Self::Auto => rows.iter().all(|row| row.is_empty() || row.ends_with('\n')),
            Self::Lines => true,
            Self::Separator(separator) => return rows.join(separator),
        };
        if !lines {
            return rows.join("\n\n");
        }
        rows.iter().map(|row| if row.is_empty() { " \n" } else { row.as_str() }).collect()
    }
}

/// Text without white space at its ends, by Python's notion of it (which adds four separators of
/// ASCII to Unicode's), so that rows agree with the reference scripts.
pub(crate) fn strip(text: &str) -> &str {
    text.trim_matches(|c: char| c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn join(joining: &RowJoining, rows: &[&str]) -> String {
        joining.join(&rows.iter().map(|row| (*row).to_owned()).collect::<Vec<_>>())
    }

    #[test]
    fn rows_that_end_in_a_newline_are_lines_and_others_are_documents() {
        let separator = |text: &str| RowJoining::Separator(text.to_owned());
        for (joining, rows, expected) in [
            (RowJoining::Auto, ["", " = A = \n", "", " b \n"], " \n = A = \n \n b \n"),
            (RowJoining::Auto, ["a", "b\n", "", "c"], "a\n\nb\n\n\n\n\nc"),
            (RowJoining::Lines, ["a\n", "", "b", "c"], "a\n \nbc"),
            (separator(""), ["a", "b\n", "", "c"], "ab\nc"),
            (separator(" | "), ["a", "b", "", "c"], "a | b |  | c"),
        ] {
            assert_eq!(join(&joining, &rows), expected, "{joining:?}");
        }
    }

    #[test]
    fn a_single_plain_text_stays_as_it_is() {
        for text in ["a", "a\n", "\n a \n\n"] {
            assert_eq!(join(&RowJoining::Auto, &[text]), text);
        }
    }

    #[test]
    fn strip_takes_what_python_calls_white_space() {
        assert_eq!(strip("\u{1c}\n\u{3000} a b \u{a0}\u{1f}\r\n"), "a b");
    }
}
