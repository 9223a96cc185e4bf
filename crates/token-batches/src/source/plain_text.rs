//! A UTF-8 file as one text.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use super::{Record, RecordSink};
use crate::collect::TEXT_LIMIT_BYTES;
use crate::error::{DataError, Place};

pub(super) fn read(
    path: &Path,
    file: File,
    file_bytes: u64,
    sink: &mut RecordSink<'_>,
) -> Result<(), DataError> {
    let too_long = || DataError::TextTooLong { path: path.to_owned(), limit_bytes: TEXT_LIMIT_BYTES };
    if file_bytes > TEXT_LIMIT_BYTES {
        return Err(too_long());
    }
    let mut bytes = Vec::new();
    file.take(TEXT_LIMIT_BYTES + 1)
        .read_to_end(&mut bytes)
        .map_err(|cause| DataError::Read { path: path.to_owned(), cause })?;
    if bytes.len() as u64 > TEXT_LIMIT_BYTES {
        return Err(too_long());
    }
    let text = String::from_utf8(bytes).map_err(|error| {
        let sound = error.utf8_error().valid_up_to();
        let newlines = error.as_bytes()[..sound].iter().filter(|byte| **byte == b'\n').count();
        DataError::NotUtf8 { path: path.to_owned(), byte_offset: sound as u64, line: newlines as u64 + 1 }
    })?;
    sink(Record::Text(text), Place::WholeFile).map(|_| ())
}
