//! Typed access to the fields of a JSON object, with errors that say which file and field and what was expected.

use crate::ConfigError;
use serde_json::{Map, Value};
use std::path::Path;

/// An object inside a JSON file; `prefix` is its place there, such as `rope_scaling.`.
#[derive(Clone, Copy)]
pub(crate) struct Fields<'a> {
    pub(crate) path: &'a Path,
    pub(crate) prefix: &'a str,
    pub(crate) object: &'a Map<String, Value>,
}

impl<'a> Fields<'a> {
    pub(crate) fn name(&self, field: &str) -> String {
        format!("{}{field}", self.prefix)
    }

    /// The value, unless it is absent or null.
    pub(crate) fn get(&self, field: &str) -> Option<&'a Value> {
        self.object.get(field).filter(|value| !value.is_null())
    }

    pub(crate) fn missing(&self, field: &str, expected: &'static str) -> ConfigError {
        ConfigError::MissingField { path: self.path.to_owned(), field: self.name(field), expected }
    }

    pub(crate) fn wrong(&self, field: &str, actual: &Value, expected: impl Into<String>) -> ConfigError {
        ConfigError::WrongValue {
            path: self.path.to_owned(),
            field: self.name(field),
            actual: brief(actual),
            expected: expected.into(),
        }
    }

    /// A whole number from 1 to `max`.
    pub(crate) fn optional_count(&self, field: &str, max: usize) -> Result<Option<usize>, ConfigError> {
        let Some(value) = self.get(field) else { return Ok(None) };
        value
            .as_u64()
            .and_then(|count| usize::try_from(count).ok())
            .filter(|count| (1..=max).contains(count))
            .map(Some)
            .ok_or_else(|| self.wrong(field, value, format!("a whole number from 1 to {max}")))
    }

    pub(crate) fn count(&self, field: &str, max: usize) -> Result<usize, ConfigError> {
        self.optional_count(field, max)?.ok_or_else(|| self.missing(field, "a whole number of at least 1"))
    }

    /// A finite number above 0.
    pub(crate) fn optional_positive(&self, field: &str) -> Result<Option<f64>, ConfigError> {
        let Some(value) = self.get(field) else { return Ok(None) };
        value
            .as_f64()
            .filter(|number| number.is_finite() && *number > 0.0)
            .map(Some)
            .ok_or_else(|| self.wrong(field, value, "a number above 0"))
    }

    pub(crate) fn positive(&self, field: &str) -> Result<f64, ConfigError> {
        self.optional_positive(field)?.ok_or_else(|| self.missing(field, "a number above 0"))
    }

    pub(crate) fn bool_or(&self, field: &str, default: bool) -> Result<bool, ConfigError> {
        match self.get(field) {
            None => Ok(default),
            Some(value) => value.as_bool().ok_or_else(|| self.wrong(field, value, "true or false")),
        }
    }

    pub(crate) fn optional_text(&self, field: &str) -> Result<Option<&'a str>, ConfigError> {
        match self.get(field) {
            None => Ok(None),
            Some(value) => value.as_str().map(Some).ok_or_else(|| self.wrong(field, value, "a string")),
        }
    }

    pub(crate) fn optional_object(&self, field: &str) -> Result<Option<&'a Map<String, Value>>, ConfigError> {
        match self.get(field) {
            None => Ok(None),
            Some(value) => value.as_object().map(Some).ok_or_else(|| self.wrong(field, value, "an object")),
        }
    }
}

/// A value as a message shows it: short, and with the kind of what is too long to show.
pub(crate) fn brief(value: &Value) -> String {
    match value {
        Value::Array(items) => format!("an array of {} items", items.len()),
        Value::Object(fields) => format!("an object of {} fields", fields.len()),
        Value::String(text) if text.chars().count() > 60 => {
            format!("\"{}…\"", text.chars().take(60).collect::<String>())
        }
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => value.to_string(),
    }
}
