//! The bearer token that a client sends, which no log, error or `Debug` shows.

use crate::reloading::Reloading;
use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tonic::metadata::{Ascii, MetadataValue};

/// Largest file that is taken for a token's.
const MOST_BYTES: u64 = 4096;

/// Why a token cannot be sent.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    #[error("the token file `{path}` cannot be read")]
    Unreadable {
        path: PathBuf,
        #[source]
        cause: io::Error,
    },
    #[error("the token file `{path}` must hold one token and nothing else")]
    File { path: PathBuf },
    #[error("the token must be one word of letters, digits and `-._~+/=`")]
    Form,
}

/// A token, read from a file anew when that changes.
#[derive(Clone)]
pub struct Token(Source);

#[derive(Clone)]
enum Source {
    Given(MetadataValue<Ascii>),
    File(Arc<Reloading<MetadataValue<Ascii>>>),
}

impl Token {
    /// # Errors
    /// When `text` is not one word that a header can carry.
    pub fn new(text: &str) -> Result<Self, TokenError> {
        header(text).map(Source::Given).map(Self).ok_or(TokenError::Form)
    }

    /// # Errors
    /// When the file cannot be read or does not hold one word.
    pub fn from_file(path: &Path) -> Result<Self, TokenError> {
        let file = path.to_owned();
        let reloading = Reloading::new(vec![path.to_owned()], move || read(&file))?;
        Ok(Self(Source::File(Arc::new(reloading))))
    }

    /// The value of the `authorization` header, marked as secret.
    pub(crate) fn authorization(&self) -> MetadataValue<Ascii> {
        match &self.0 {
            Source::Given(value) => value.clone(),
            Source::File(file) => MetadataValue::clone(&file.current()),
        }
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(secret)")
    }
}

fn read(path: &Path) -> Result<MetadataValue<Ascii>, TokenError> {
    let unreadable = |cause| TokenError::Unreadable { path: path.to_owned(), cause };
    if fs::metadata(path).map_err(unreadable)?.len() > MOST_BYTES {
        return Err(TokenError::File { path: path.to_owned() });
    }
    let text = fs::read_to_string(path).map_err(unreadable)?;
    header(&text).ok_or_else(|| TokenError::File { path: path.to_owned() })
}

/// `Bearer` and a token of the form of RFC 6750.
fn header(text: &str) -> Option<MetadataValue<Ascii>> {
    let word = text.trim();
    let fits = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~+/=".contains(&byte);
    if word.is_empty() || !word.bytes().all(fits) {
        return None;
    }
    let mut value = MetadataValue::try_from(format!("Bearer {word}")).ok()?;
    value.set_sensitive(true);
    Some(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_one_word_and_shown_by_nothing() {
        let token = Token::new(" espalier_0123abcd\n").unwrap();
        assert_eq!(token.authorization().to_str().unwrap(), "Bearer espalier_0123abcd");
        let header = token.authorization();
        for shown in [format!("{token:?}"), format!("{header:?}")] {
            assert!(!shown.contains("0123abcd"), "{shown}");
        }
        for text in ["", "two words", "line\nline", "é", "a\0b"] {
            let error = Token::new(text).unwrap_err().to_string();
            assert!(text.is_empty() || !error.contains(text), "{error}");
        }
    }

    #[test]
    fn a_token_file_is_read_anew_when_it_changes() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("token");
        assert!(matches!(Token::from_file(&path), Err(TokenError::Unreadable { .. })));
        fs::write(&path, "two words").unwrap();
        assert!(matches!(Token::from_file(&path), Err(TokenError::File { .. })));
        fs::write(&path, "first\n").unwrap();
        let token = Token::from_file(&path).unwrap();
        fs::write(&path, "the-second\n").unwrap();
        assert_eq!(token.authorization().to_str().unwrap(), "Bearer the-second");
    }
}
