use recipe::FieldViolation;
use std::fmt;

/// A message that cannot be accepted: every field that is wrong, by its path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InvalidFields {
    /// At least one.
    pub violations: Vec<FieldViolation>,
}

impl fmt::Display for InvalidFields {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (place, violation) in self.violations.iter().enumerate() {
            let separator = if place == 0 { "" } else { "; " };
            write!(f, "{separator}{violation}")?;
        }
        Ok(())
    }
}

impl std::error::Error for InvalidFields {}

/// Collects what is wrong with a message, so that the caller sees all of it at once.
#[derive(Debug, Default)]
pub struct Violations(Vec<FieldViolation>);

impl Violations {
    /// Notes that the field at `path` is wrong; `problem` says what it must be.
    pub fn reject(&mut self, path: impl Into<String>, problem: impl Into<String>) {
        self.0.push(FieldViolation { field: path.into(), problem: problem.into() });
    }

    /// Notes all of `found`, their paths taken to be below `path`.
    pub fn extend_below(&mut self, path: &str, found: impl IntoIterator<Item = FieldViolation>) {
        self.0.extend(
            found.into_iter().map(|FieldViolation { field, problem }| FieldViolation {
                field: below(path, &field),
                problem,
            }),
        );
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// `value` when nothing was wrong.
    ///
    /// # Errors
    /// With everything that was noted.
    pub fn finish<T>(self, value: T) -> Result<T, InvalidFields> {
        if self.0.is_empty() { Ok(value) } else { Err(InvalidFields { violations: self.0 }) }
    }

    pub fn notes(&self, path: &str) -> bool {
        self.0.iter().any(|violation| violation.field == path)
    }
}

/// The path of `field` inside the message at `path`, which is empty for the outermost.
pub(crate) fn below(path: &str, field: &str) -> String {
    if path.is_empty() { field.to_owned() } else { format!("{path}.{field}") }
}
