//! Files that hold nothing but token ids of a fixed width, little-endian.

use std::fs::File;
use std::io::{BufReader, Read};
use std::path::Path;

use super::{Record, RecordSink, token_in_vocabulary};
use crate::error::{DataError, Place};

const PIECE_TOKENS: u64 = 1 << 18;

pub(super) fn read<const TOKEN_BYTES: usize>(
    path: &Path,
    file: File,
    file_bytes: u64,
    vocab_size: u32,
    sink: &mut RecordSink<'_>,
) -> Result<(), DataError> {
    let token_bytes = TOKEN_BYTES as u64;
    if !file_bytes.is_multiple_of(token_bytes) {
        return Err(DataError::PartialToken { path: path.to_owned(), file_bytes, token_bytes });
    }
    let token_count = file_bytes / token_bytes;
    let mut reader = BufReader::new(file);
    let mut first = 0;
    while first < token_count {
        let end = token_count.min(first + PIECE_TOKENS);
        let mut piece = Vec::new();
        for index in first..end {
            let mut bytes = [0; TOKEN_BYTES];
            reader
                .read_exact(&mut bytes)
                .map_err(|cause| DataError::Read { path: path.to_owned(), cause })?;
            let token_id = bytes.iter().rev().fold(0_i128, |id, byte| id << 8 | i128::from(*byte));
            piece.push(token_in_vocabulary(path, Place::TokenIndex(index), token_id, vocab_size)?);
        }
        if sink(Record::TokenPiece(piece), Place::TokenIndex(first))?.is_break() {
            return Ok(());
        }
        first = end;
    }
    Ok(())
}
