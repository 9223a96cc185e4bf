//! How a command ends when it does not end well, and the exit code that says so.

use std::fmt;
use std::process::ExitCode;
use tonic::{Code, Status};
use wire::status::describe;

/// Why a command stops. Exit codes: 1 a run or a machine failed, 2 the caller's input is wrong, 130 interrupted.
#[derive(Debug)]
pub(crate) enum Failure {
    /// What was asked for cannot be done; another input can.
    BadInput(anyhow::Error),
    /// The input may be right, but the work failed.
    Failed(anyhow::Error),
    /// Stopped by a signal.
    Interrupted(String),
}

impl Failure {
    #[must_use]
    pub(crate) fn exit_code(&self) -> ExitCode {
        match self {
            Self::Failed(_) => ExitCode::from(1),
            Self::BadInput(_) => ExitCode::from(2),
            Self::Interrupted(_) => ExitCode::from(130),
        }
    }

    pub(crate) fn bad_input(message: impl Into<String>) -> Self {
        Self::BadInput(anyhow::Error::msg(message.into()))
    }

    pub(crate) fn failed(message: impl Into<String>) -> Self {
        Self::Failed(anyhow::Error::msg(message.into()))
    }

    /// What happened, without the word before it.
    #[must_use]
    pub(crate) fn message(&self) -> String {
        match self {
            Self::BadInput(error) | Self::Failed(error) => format!("{error:#}"),
            Self::Interrupted(text) => text.clone(),
        }
    }

    /// Adds `note` on lines of its own below the message, such as the end of a log.
    #[must_use]
    pub(crate) fn with_note(self, note: &str) -> Self {
        if note.is_empty() {
            return self;
        }
        match self {
            Self::BadInput(error) => Self::BadInput(anyhow::Error::msg(format!("{error:#}\n{note}"))),
            Self::Failed(error) => Self::Failed(anyhow::Error::msg(format!("{error:#}\n{note}"))),
            Self::Interrupted(text) => Self::Interrupted(text),
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::BadInput(_) | Self::Failed(_) => write!(f, "error: {}", self.message()),
            Self::Interrupted(text) => write!(f, "interrupted: {text}"),
        }
    }
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        Self::Failed(error)
    }
}

impl From<wire::client::ConnectError> for Failure {
    fn from(error: wire::client::ConnectError) -> Self {
        match error {
            wire::client::ConnectError::BadUrl { .. }
            | wire::client::ConnectError::NoAuthority { .. }
            | wire::client::ConnectError::Plain { .. }
            | wire::client::ConnectError::PlainToken { .. } => Self::BadInput(error.into()),
            wire::client::ConnectError::Unreachable { .. } => Self::Failed(error.into()),
        }
    }
}

/// Marks an error as the caller's to repair.
pub(crate) trait OrBadInput<T> {
    /// # Errors
    /// The same error, as [`Failure::BadInput`].
    fn or_bad_input(self) -> Result<T, Failure>;
}

impl<T, E: Into<anyhow::Error>> OrBadInput<T> for Result<T, E> {
    fn or_bad_input(self) -> Result<T, Failure> {
        self.map_err(|error| Failure::BadInput(error.into()))
    }
}

/// What a coordinator's refusal means for the caller: its words, a line for each field that is wrong.
#[must_use]
pub(crate) fn from_status(doing: &str, status: &Status) -> Failure {
    let text = format!("{doing}: {}", describe(status));
    match status.code() {
        Code::InvalidArgument
        | Code::NotFound
        | Code::AlreadyExists
        | Code::PermissionDenied
        | Code::FailedPrecondition
        | Code::OutOfRange => Failure::bad_input(text),
        Code::Unavailable => Failure::failed(format!("{text} (is the coordinator running at this address?)")),
        Code::Ok
        | Code::Cancelled
        | Code::Unknown
        | Code::DeadlineExceeded
        | Code::ResourceExhausted
        | Code::Aborted
        | Code::Unimplemented
        | Code::Internal
        | Code::DataLoss
        | Code::Unauthenticated => Failure::failed(text),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use recipe::FieldViolation;

    #[test]
    fn a_refusal_lists_every_field() {
        let violation =
            |field: &str, problem: &str| FieldViolation { field: field.into(), problem: problem.into() };
        let violations = vec![
            violation("recipe.lora.rank", "must lie in 1..=1024; got 0"),
            violation("model", "is required"),
        ];
        let status = Status::from(wire::InvalidFields { violations });
        let failure = from_status("the run was refused", &status);
        assert!(matches!(failure, Failure::BadInput(_)));
        let text = failure.to_string();
        assert!(text.contains("`recipe.lora.rank`: must lie in 1..=1024; got 0"), "{text}");
        assert!(text.contains("`model`: is required"), "{text}");
    }

    #[test]
    fn a_lost_coordinator_is_no_fault_of_the_input() {
        assert!(matches!(from_status("listing", &Status::unavailable("refused")), Failure::Failed(_)));
        assert!(matches!(from_status("getting", &Status::not_found("run `x`")), Failure::BadInput(_)));
    }
}
