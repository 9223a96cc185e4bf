use std::time::Duration;

/// Why the store did not do what it was asked. Nothing of the call has happened then, unless the answer was lost on the
/// way: `Unreachable` and `Deadline` leave that open, and the call can be made again.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error("another coordinator has opened the store; this one must end")]
    Fenced,
    #[error("run `{run_id}` has {actual} events; the next one must be {expected}, not {given}", expected = .actual + 1)]
    Revision { run_id: String, actual: u64, given: u64 },
    #[error("the store has another run `{run_id}`")]
    RunExists { run_id: String },
    #[error("run `{run_id}` is not in the store")]
    NoRun { run_id: String },
    #[error(
        "the store has schema version {actual}, this program knows versions up to {known}; use a newer one"
    )]
    NewerSchema { actual: i64, known: i64 },
    #[error("the store did not answer within {} s", .after.as_secs_f64())]
    Deadline { after: Duration },
    #[error("the store failed while {doing}; is its disk full, or its server down?")]
    Unreachable {
        doing: &'static str,
        #[source]
        cause: sqlx::Error,
    },
}

impl StoreError {
    /// Whether the same call may succeed later.
    #[must_use]
    pub fn may_pass(&self) -> bool {
        match self {
            Self::Deadline { .. } | Self::Unreachable { .. } => true,
            Self::Fenced
            | Self::Revision { .. }
            | Self::RunExists { .. }
            | Self::NoRun { .. }
            | Self::NewerSchema { .. } => false,
        }
    }
}
