//! The one table from errors to `tonic::Status`, and its reading back.
//!
//! Every status carries `google.rpc.ErrorInfo` with domain `espalier` and the [`Reason`]; one about a request's fields
//! carries `google.rpc.BadRequest` too.

use crate::fields::InvalidFields;
use recipe::FieldViolation;
use std::collections::HashMap;
use std::error::Error;
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};

/// Domain of every `ErrorInfo`.
pub const DOMAIN: &str = "espalier";

// Details travel in a response header, of which common clients take 8 KiB.
const MOST_VIOLATION_BYTES: usize = 3072;
const MOST_MESSAGE_BYTES: usize = 1024;

/// Why a call failed, as a name that programs may match on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Reason {
    /// Fields of the request are wrong.
    InvalidFields,
    RunNotFound,
    DecisionNotFound,
    /// The lease has run out or never was.
    LeaseNotFound,
    WorkerNotFound,
    ArtifactNotFound,
    /// The checkpoint that is needed was not kept.
    CheckpointNotKept,
    /// A stored file is not what was written.
    DataLoss,
    /// What the coordinator keeps cannot be reached.
    StoreFailed,
    /// The session named is not the worker's current one.
    WrongSession,
    /// The mask decision is older than the one in force.
    StaleGeneration,
    /// The mask decision is not the next one.
    SkippedGeneration,
    /// The step asked for is not the next one.
    WrongStep,
    /// The session has not joined its communicator.
    GroupNotFormed,
    /// The session is busy with another call.
    SessionBusy,
    /// The session failed earlier and must be loaded anew.
    SessionFailed,
    /// The session was aborted, or its caller went away.
    Aborted,
    /// The run has not finished, or not exported.
    RunNotReady,
    /// The run has ended.
    RunEnded,
    /// The same request id came with another spec.
    RequestIdReused,
    NoIdleWorker,
    TooManyRuns,
    /// What was asked for cannot be, for a reason that the message gives.
    Refused,
    /// A model, data, checkpoint or output file is at fault.
    BadFile,
    /// A loss, norm or score is not finite.
    NotFinite,
    /// A peer of the communicator did not answer or is gone.
    PeerLost,
    DeviceFailed,
    ShuttingDown,
    DeadlineExceeded,
    /// No valid token or client certificate came with the call.
    Unauthenticated,
    /// The caller is known, but its role does not allow the call.
    PermissionDenied,
    /// A fault of ours.
    Internal,
}

impl Reason {
    pub const ALL: [Self; 32] = [
        Self::InvalidFields,
        Self::RunNotFound,
        Self::DecisionNotFound,
        Self::LeaseNotFound,
        Self::WorkerNotFound,
        Self::ArtifactNotFound,
        Self::CheckpointNotKept,
        Self::DataLoss,
        Self::StoreFailed,
        Self::WrongSession,
        Self::StaleGeneration,
        Self::SkippedGeneration,
        Self::WrongStep,
        Self::GroupNotFormed,
        Self::SessionBusy,
        Self::SessionFailed,
        Self::Aborted,
        Self::RunNotReady,
        Self::RunEnded,
        Self::RequestIdReused,
        Self::NoIdleWorker,
        Self::TooManyRuns,
        Self::Refused,
        Self::BadFile,
        Self::NotFinite,
        Self::PeerLost,
        Self::DeviceFailed,
        Self::ShuttingDown,
        Self::DeadlineExceeded,
        Self::Unauthenticated,
        Self::PermissionDenied,
        Self::Internal,
    ];

    /// The table: the reason's name on the wire and its gRPC code.
    fn row(self) -> (&'static str, Code) {
        match self {
            Self::InvalidFields => ("INVALID_FIELDS", Code::InvalidArgument),
            Self::RunNotFound => ("RUN_NOT_FOUND", Code::NotFound),
            Self::DecisionNotFound => ("DECISION_NOT_FOUND", Code::NotFound),
            Self::LeaseNotFound => ("LEASE_NOT_FOUND", Code::NotFound),
            Self::WorkerNotFound => ("WORKER_NOT_FOUND", Code::NotFound),
            Self::ArtifactNotFound => ("ARTIFACT_NOT_FOUND", Code::NotFound),
            Self::CheckpointNotKept => ("CHECKPOINT_NOT_KEPT", Code::FailedPrecondition),
            Self::DataLoss => ("DATA_LOSS", Code::DataLoss),
            Self::StoreFailed => ("STORE_FAILED", Code::Unavailable),
            Self::WrongSession => ("WRONG_SESSION", Code::FailedPrecondition),
            Self::StaleGeneration => ("STALE_GENERATION", Code::FailedPrecondition),
            Self::SkippedGeneration => ("SKIPPED_GENERATION", Code::FailedPrecondition),
            Self::WrongStep => ("WRONG_STEP", Code::FailedPrecondition),
            Self::GroupNotFormed => ("GROUP_NOT_FORMED", Code::FailedPrecondition),
            Self::SessionBusy => ("SESSION_BUSY", Code::FailedPrecondition),
            Self::SessionFailed => ("SESSION_FAILED", Code::FailedPrecondition),
            Self::Aborted => ("ABORTED", Code::Aborted),
            Self::RunNotReady => ("RUN_NOT_READY", Code::FailedPrecondition),
            Self::RunEnded => ("RUN_ENDED", Code::FailedPrecondition),
            Self::RequestIdReused => ("REQUEST_ID_REUSED", Code::AlreadyExists),
            Self::NoIdleWorker => ("NO_IDLE_WORKER", Code::ResourceExhausted),
            Self::TooManyRuns => ("TOO_MANY_RUNS", Code::ResourceExhausted),
            Self::Refused => ("REFUSED", Code::FailedPrecondition),
            Self::BadFile => ("BAD_FILE", Code::FailedPrecondition),
            Self::NotFinite => ("NOT_FINITE", Code::OutOfRange),
            Self::PeerLost => ("PEER_LOST", Code::Unavailable),
            Self::DeviceFailed => ("DEVICE_FAILED", Code::Internal),
            Self::ShuttingDown => ("SHUTTING_DOWN", Code::Unavailable),
            Self::DeadlineExceeded => ("DEADLINE_EXCEEDED", Code::DeadlineExceeded),
            Self::Unauthenticated => ("UNAUTHENTICATED", Code::Unauthenticated),
            Self::PermissionDenied => ("PERMISSION_DENIED", Code::PermissionDenied),
            Self::Internal => ("INTERNAL", Code::Internal),
        }
    }

    #[must_use]
    pub fn name(self) -> &'static str {
        self.row().0
    }

    #[must_use]
    pub fn code(self) -> Code {
        self.row().1
    }
}

/// A call's failure, about to become a `Status`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    pub reason: Reason,
    pub message: String,
    /// What a program may want to know besides, such as `generation`.
    pub facts: Vec<(&'static str, String)>,
    pub violations: Vec<FieldViolation>,
}

impl Failure {
    #[must_use]
    pub fn new(reason: Reason, message: impl Into<String>) -> Self {
        Self { reason, message: message.into(), facts: Vec::new(), violations: Vec::new() }
    }

    /// A failure whose message is an error with all its sources.
    #[must_use]
    pub fn from_error(reason: Reason, error: &(dyn Error + 'static)) -> Self {
        Self::new(reason, chain(error))
    }

    #[must_use]
    pub fn with_fact(mut self, name: &'static str, value: impl ToString) -> Self {
        self.facts.push((name, value.to_string()));
        self
    }

    /// One wrong field.
    #[must_use]
    pub fn invalid_field(field: impl Into<String>, problem: impl Into<String>) -> Self {
        let violations = vec![FieldViolation { field: field.into(), problem: problem.into() }];
        InvalidFields { violations }.into()
    }
}

/// An error and its sources in one line.
#[must_use]
pub fn chain(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}

impl From<InvalidFields> for Failure {
    fn from(invalid: InvalidFields) -> Self {
        Self {
            reason: Reason::InvalidFields,
            message: invalid.to_string(),
            facts: Vec::new(),
            violations: invalid.violations,
        }
    }
}

impl From<Failure> for Status {
    fn from(failure: Failure) -> Self {
        let facts: HashMap<String, String> = failure
            .facts
            .into_iter()
            .map(|(name, value)| (name.to_owned(), shortened(&value, 256)))
            .collect();
        let mut details = ErrorDetails::new();
        details.set_error_info(failure.reason.name(), DOMAIN, facts);
        let mut bytes = 0;
        let mut left_out = 0;
        for violation in &failure.violations {
            let problem = shortened(&violation.problem, 512);
            let field = shortened(&violation.field, 256);
            bytes += field.len() + problem.len() + 8;
            if bytes <= MOST_VIOLATION_BYTES {
                details.add_bad_request_violation(field, problem);
            } else {
                left_out += 1;
            }
        }
        if left_out > 0 {
            details.add_bad_request_violation("", format!("and {left_out} more"));
        }
        let message = shortened(&failure.message, MOST_MESSAGE_BYTES);
        Status::with_error_details(failure.reason.code(), message, details)
    }
}

impl From<InvalidFields> for Status {
    fn from(invalid: InvalidFields) -> Self {
        Failure::from(invalid).into()
    }
}

impl From<sharding::PlacementError> for Failure {
    fn from(error: sharding::PlacementError) -> Self {
        Self::invalid_field("tp_degree", error.to_string())
    }
}

impl From<pruning::NotASubset> for Failure {
    fn from(error: pruning::NotASubset) -> Self {
        Self::invalid_field("keep_mask", error.to_string())
    }
}

fn shortened(text: &str, most_bytes: usize) -> String {
    if text.len() <= most_bytes {
        return text.to_owned();
    }
    let end = (0..=most_bytes - 3).rev().find(|&end| text.is_char_boundary(end)).unwrap_or(0);
    format!("{}...", &text[..end])
}

/// The reason that a status of ours carries; nothing for a foreign one, such as a broken connection.
#[must_use]
pub fn reason(status: &Status) -> Option<Reason> {
    let info = status.get_details_error_info()?;
    if info.domain != DOMAIN {
        return None;
    }
    Reason::ALL.into_iter().find(|reason| reason.name() == info.reason)
}

/// The fields that a status complains of.
#[must_use]
pub fn violations(status: &Status) -> Vec<FieldViolation> {
    status
        .get_details_bad_request()
        .into_iter()
        .flat_map(|bad_request| bad_request.field_violations)
        .map(|violation| FieldViolation { field: violation.field, problem: violation.description })
        .collect()
}

/// A status as text for people: a line a field for wrong fields, else its message, else what its code means.
#[must_use]
pub fn describe(status: &Status) -> String {
    let violations = violations(status);
    if !violations.is_empty() {
        let lines = violations.iter().map(|violation| {
            if violation.field.is_empty() {
                format!("  {}", violation.problem)
            } else {
                format!("  {violation}")
            }
        });
        return std::iter::once("the request was refused:".to_owned())
            .chain(lines)
            .collect::<Vec<_>>()
            .join("\n");
    }
    let mut text = if status.message().is_empty() {
        status.code().description().to_owned()
    } else {
        status.message().to_owned()
    };
    if reason(status).is_none()
        && let Some(source) = status.source()
    {
        text = format!("{text}: {}", chain(source));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_survives_the_trip_through_a_status() {
        for expected in Reason::ALL {
            let status = Status::from(Failure::new(expected, "because").with_fact("step", 3));
            assert_eq!(reason(&status), Some(expected));
            assert_eq!(status.code(), expected.code());
            assert_eq!(describe(&status), "because");
            assert_eq!(status.get_details_error_info().unwrap().metadata["step"], "3");
        }
        let names: std::collections::HashSet<_> = Reason::ALL.iter().map(|reason| reason.name()).collect();
        assert_eq!(names.len(), Reason::ALL.len());
    }

    #[test]
    fn all_violations_of_a_request_are_listed() {
        let mut found = crate::Violations::default();
        found.reject("recipe.lora.rank", "must lie in 1..=1024; got 0");
        found.reject("model", "is required");
        let status = Status::from(found.finish(()).unwrap_err());
        assert_eq!(status.code(), Code::InvalidArgument);
        assert_eq!(
            describe(&status),
            "the request was refused:\n  `recipe.lora.rank`: must lie in 1..=1024; got 0\n  `model`: is required"
        );
    }

    #[test]
    fn a_flood_of_violations_still_fits_into_a_header() {
        let mut found = crate::Violations::default();
        for place in 0..10_000 {
            found.reject(format!("training_data[{place}].path"), "é".repeat(4000));
        }
        let status = Status::from(found.finish(()).unwrap_err());
        assert!(status.details().len() < 8192, "{}", status.details().len());
        assert!(status.message().len() <= MOST_MESSAGE_BYTES);
        assert!(describe(&status).ends_with("more"));
    }

    #[test]
    fn a_foreign_status_has_no_reason_and_is_described_by_its_code() {
        let status = Status::new(Code::Unavailable, "");
        assert_eq!(reason(&status), None);
        assert_eq!(describe(&status), Code::Unavailable.description());
    }
}
