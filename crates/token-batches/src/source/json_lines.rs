//! One JSON object a line.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::ops::ControlFlow;
use std::path::Path;

use serde_json::{Map, Value};

use super::{Record, RecordSink, token_in_vocabulary};
use crate::error::{DataError, Place};

const LINE_LIMIT_BYTES: u64 = 256 << 20;
const BYTE_ORDER_MARK: &str = "\u{feff}";
/// Fields named in the complaint that one is missing.
const FIELDS_SHOWN: usize = 12;

pub(super) fn read_texts(
    path: &Path,
    file: File,
    field: &str,
    sink: &mut RecordSink<'_>,
) -> Result<(), DataError> {
    for_each_field(path, file, field, &mut |value, line| match value {
        Value::String(text) => sink(Record::Text(text), Place::Line(line)),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::Array(_) | Value::Object(_) => {
            Err(wrong_type(path, line, field, "a string", &value))
        }
    })
}

pub(super) fn read_tokens(
    path: &Path,
    file: File,
    field: &str,
    vocab_size: u32,
    sink: &mut RecordSink<'_>,
) -> Result<(), DataError> {
    let expected = "an array of token ids";
    for_each_field(path, file, field, &mut |value, line| {
        let Value::Array(items) = &value else {
            return Err(wrong_type(path, line, field, expected, &value));
        };
        let mut token_ids = Vec::with_capacity(items.len());
        for item in items {
            let number = item.as_i64().map(i128::from).or_else(|| item.as_u64().map(i128::from));
            let token_id = number.ok_or_else(|| DataError::WrongFieldType {
                path: path.to_owned(),
                line,
                field: field.to_owned(),
                expected,
                found: if item.is_number() {
                    "a number among its items that is no token id"
                } else {
                    "an item that is no number"
                },
            })?;
            token_ids.push(token_in_vocabulary(path, Place::Line(line), token_id, vocab_size)?);
        }
        sink(Record::Tokens(token_ids), Place::Line(line))
    })
}

type FieldSink<'a> = dyn FnMut(Value, u64) -> Result<ControlFlow<()>, DataError> + 'a;

/// Hands the field of every object to `each`, with the number of its line.
fn for_each_field(path: &Path, file: File, field: &str, each: &mut FieldSink<'_>) -> Result<(), DataError> {
    for_each_object(path, file, &mut |mut object, line| {
        let value = object.remove(field).ok_or_else(|| DataError::MissingField {
            path: path.to_owned(),
            line,
            field: field.to_owned(),
            present: field_names(&object),
        })?;
        each(value, line)
    })
}

pub(crate) type ObjectSink<'a> =
    dyn FnMut(Map<String, Value>, u64) -> Result<ControlFlow<()>, DataError> + 'a;

/// Hands every object to `each`, with the number of its line. Blank lines are left out.
pub(crate) fn for_each_object(path: &Path, file: File, each: &mut ObjectSink<'_>) -> Result<(), DataError> {
    let mut reader = BufReader::new(file);
    let mut bytes = Vec::new();
    let (mut line, mut line_offset) = (0, 0);
    loop {
        bytes.clear();
        reader
            .by_ref()
            .take(LINE_LIMIT_BYTES + 1)
            .read_until(b'\n', &mut bytes)
            .map_err(|cause| DataError::Read { path: path.to_owned(), cause })?;
        if bytes.is_empty() {
            return Ok(());
        }
        line += 1;
        if bytes.len() as u64 > LINE_LIMIT_BYTES {
            return Err(DataError::LineTooLong {
                path: path.to_owned(),
                line,
                limit_bytes: LINE_LIMIT_BYTES,
            });
        }
        let text = std::str::from_utf8(&bytes).map_err(|error| DataError::NotUtf8 {
            path: path.to_owned(),
            byte_offset: line_offset + error.valid_up_to() as u64,
            line,
        })?;
        line_offset += bytes.len() as u64;
        let text = if line == 1 { text.trim_start_matches(BYTE_ORDER_MARK) } else { text };
        if text.trim().is_empty() {
            continue;
        }
        if each(parse_object(path, line, text)?, line)?.is_break() {
            return Ok(());
        }
    }
}

fn parse_object(path: &Path, line: u64, text: &str) -> Result<Map<String, Value>, DataError> {
    let value: Value = serde_json::from_str(text).map_err(|error| {
        let full = error.to_string();
        // The library counts lines within this one line.
        let reason = full.rsplit_once(" at line ").map_or(full.as_str(), |(reason, _)| reason);
        DataError::BrokenJson {
            path: path.to_owned(),
            line,
            column: error.column(),
            reason: reason.to_owned(),
        }
    })?;
    match value {
        Value::Object(object) => Ok(object),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) | Value::Array(_) => {
            Err(DataError::NotAnObject { path: path.to_owned(), line, found: kind(&value) })
        }
    }
}

pub(crate) fn field_names(object: &Map<String, Value>) -> String {
    if object.is_empty() {
        return "none".to_owned();
    }
    let mut names: Vec<&str> = object.keys().take(FIELDS_SHOWN).map(String::as_str).collect();
    if object.len() > FIELDS_SHOWN {
        names.push("…");
    }
    names.join(", ")
}

pub(crate) fn wrong_type(
    path: &Path,
    line: u64,
    field: &str,
    expected: &'static str,
    found: &Value,
) -> DataError {
    DataError::WrongFieldType {
        path: path.to_owned(),
        line,
        field: field.to_owned(),
        expected,
        found: kind(found),
    }
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}
