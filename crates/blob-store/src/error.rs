use std::io;
use std::path::PathBuf;
use std::time::Duration;

/// Why a blob was not read or written.
#[derive(Debug, thiserror::Error)]
pub enum BlobError {
    #[error("{store} cannot be opened; check the URL and the AWS_* variables")]
    Open {
        store: String,
        #[source]
        cause: Box<object_store::Error>,
    },
    #[error("`{name}` is no name of a file below {store}: {problem}")]
    BadName { store: String, name: String, problem: &'static str },
    #[error("there is no `{name}` in {store}")]
    Missing { store: String, name: String },
    #[error("failed to {doing} `{name}` in {store}; is it reachable, and is there space left?")]
    Failed {
        store: String,
        name: String,
        doing: &'static str,
        #[source]
        cause: Box<object_store::Error>,
    },
    #[error("{store} did not {doing} `{name}` within {} s", .after.as_secs_f64())]
    Deadline { store: String, name: String, doing: &'static str, after: Duration },
    #[error("`{name}` in {store} has {actual} bytes, at most {most} are read")]
    TooLarge { store: String, name: String, actual: u64, most: u64 },
    #[error("`{name}` in {store} has SHA-256 {actual}, expected {expected}; it was changed or damaged")]
    WrongDigest { store: String, name: String, actual: String, expected: String },
    #[error("failed to use the local file `{path}`")]
    Local {
        path: PathBuf,
        #[source]
        cause: io::Error,
    },
}

impl BlobError {
    /// Whether the blob itself is at fault, so that reading it again cannot help.
    #[must_use]
    pub fn is_damage(&self) -> bool {
        match self {
            Self::Missing { .. } | Self::TooLarge { .. } | Self::WrongDigest { .. } => true,
            Self::Open { .. }
            | Self::BadName { .. }
            | Self::Failed { .. }
            | Self::Deadline { .. }
            | Self::Local { .. } => false,
        }
    }
}
