//! Rows of a task file as they stand.

use std::fs::File;
use std::ops::ControlFlow;
use std::path::Path;

use serde_json::{Map, Value};

use crate::error::DataError;
use crate::source::json_lines::{field_names, for_each_object, wrong_type};

/// One line of a task file, as [`super::TaskSet::load`] describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Row {
    Choices { query: String, choices: Vec<String>, gold: usize },
    Contexts { context_options: Vec<String>, continuation: String, gold: usize },
}

impl Row {
    pub(super) fn gold(&self) -> usize {
        match self {
            Self::Choices { gold, .. } | Self::Contexts { gold, .. } => *gold,
        }
    }
}

/// Hands the first `limit` rows, at least one, to `each`, with the number of their line.
pub(super) fn for_each(
    path: &Path,
    limit: u64,
    each: &mut dyn FnMut(Row, u64) -> Result<(), DataError>,
) -> Result<(), DataError> {
    let file = File::open(path).map_err(|cause| DataError::Open { path: path.to_owned(), cause })?;
    let mut count = 0;
    for_each_object(path, file, &mut |object, line| {
        each(Fields { path, line, object: &object }.row()?, line)?;
        count += 1;
        // What follows the last row is not even parsed.
        Ok(if count < limit { ControlFlow::Continue(()) } else { ControlFlow::Break(()) })
    })
}

struct Fields<'a> {
    path: &'a Path,
    line: u64,
    object: &'a Map<String, Value>,
}

impl Fields<'_> {
    fn row(&self) -> Result<Row, DataError> {
        if self.object.contains_key("context_options") {
            let context_options = self.texts("context_options")?;
            let gold = self.gold(context_options.len())?;
            Ok(Row::Contexts { context_options, continuation: self.text("continuation")?, gold })
        } else {
            let query = self.text("query")?;
            let choices = self.texts("choices")?;
            let gold = self.gold(choices.len())?;
            Ok(Row::Choices { query, choices, gold })
        }
    }

    fn value(&self, field: &str) -> Result<&Value, DataError> {
        self.object.get(field).ok_or_else(|| DataError::MissingField {
            path: self.path.to_owned(),
            line: self.line,
            field: field.to_owned(),
            present: field_names(self.object),
        })
    }

    fn text(&self, field: &str) -> Result<String, DataError> {
        let value = self.value(field)?;
        match value.as_str() {
            Some(text) if text.trim().is_empty() => Err(self.unusable(format!("field `{field}` is empty"))),
            Some(text) => Ok(text.to_owned()),
            None => Err(wrong_type(self.path, self.line, field, "a string", value)),
        }
    }

    fn texts(&self, field: &str) -> Result<Vec<String>, DataError> {
        let expected = "an array of strings";
        let wrong = |value: &Value| wrong_type(self.path, self.line, field, expected, value);
        let value = self.value(field)?;
        let Value::Array(items) = value else { return Err(wrong(value)) };
        if items.len() < 2 {
            let count = items.len();
            return Err(self.unusable(format!("field `{field}` holds {count} of the at least 2 choices")));
        }
        items
            .iter()
            .enumerate()
            .map(|(place, item)| match item.as_str() {
                Some(text) if text.trim().is_empty() => {
                    Err(self.unusable(format!("`{field}[{place}]` is empty")))
                }
                Some(text) => Ok(text.to_owned()),
                None => {
                    let field = format!("{field}[{place}]");
                    Err(wrong_type(self.path, self.line, &field, "a string", item))
                }
            })
            .collect()
    }

    /// The index of the right one of `count` choices.
    fn gold(&self, count: usize) -> Result<usize, DataError> {
        let value = self.value("gold")?;
        let index = value.as_u64().and_then(|index| usize::try_from(index).ok());
        match index {
            Some(index) if index < count => Ok(index),
            _ if value.is_number() => {
                Err(self.unusable(format!("field `gold` is {value}, an index in 0..{count} is needed")))
            }
            _ => Err(wrong_type(self.path, self.line, "gold", "the index of the right choice", value)),
        }
    }

    fn unusable(&self, reason: String) -> DataError {
        DataError::UnusableTaskRow { path: self.path.to_owned(), line: self.line, reason }
    }
}
