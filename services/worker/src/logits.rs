//! The token windows that `worker logits` is given.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

const MOST_BYTES: u64 = 64 << 20;

/// Why a file of token windows cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TokensFileError {
    #[error("failed to read `{path}`")]
    Read {
        path: PathBuf,
        #[source]
        cause: io::Error,
    },
    #[error("`{path}` is longer than {MOST_BYTES} bytes")]
    TooLong { path: PathBuf },
    #[error("`{path}` is not a JSON array of arrays of token ids")]
    Json {
        path: PathBuf,
        #[source]
        cause: serde_json::Error,
    },
    #[error("`{path}` has no tokens in row {row}; every row needs at least one")]
    EmptyRow { path: PathBuf, row: usize },
    #[error("`{path}` has no rows")]
    NoRows { path: PathBuf },
}

/// Reads windows of token ids: a JSON array of arrays of numbers.
///
/// # Errors
/// When the file is missing, is not such an array, or a row is empty.
pub fn read_tokens_file(path: &Path) -> Result<Vec<Vec<u32>>, TokensFileError> {
    let path_of = || path.to_owned();
    let read = |cause| TokensFileError::Read { path: path_of(), cause };
    if fs::metadata(path).map_err(read)?.len() > MOST_BYTES {
        return Err(TokensFileError::TooLong { path: path_of() });
    }
    let text = fs::read(path).map_err(read)?;
    let rows: Vec<Vec<u32>> =
        serde_json::from_slice(&text).map_err(|cause| TokensFileError::Json { path: path_of(), cause })?;
    if rows.is_empty() {
        return Err(TokensFileError::NoRows { path: path_of() });
    }
    match rows.iter().position(Vec::is_empty) {
        Some(row) => Err(TokensFileError::EmptyRow { path: path_of(), row }),
        None => Ok(rows),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_of_token_ids_are_read_and_anything_else_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tokens.json");
        for (text, expected) in [
            ("[[1, 2], [3]]", Ok(vec![vec![1, 2], vec![3]])),
            ("[]", Err("no rows")),
            ("[[1], []]", Err("row 1")),
            ("[[-1]]", Err("token ids")),
            ("{", Err("token ids")),
        ] {
            fs::write(&path, text).unwrap();
            match (read_tokens_file(&path), expected) {
                (Ok(rows), Ok(expected)) => assert_eq!(rows, expected),
                (Err(error), Err(part)) => assert!(error.to_string().contains(part), "{error}"),
                (read, _) => panic!("{text}: {read:?}"),
            }
        }
        assert!(matches!(read_tokens_file(&folder.path().join("none")), Err(TokensFileError::Read { .. })));
    }
}
