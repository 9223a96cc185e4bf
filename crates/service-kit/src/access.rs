//! Who may call what: roles, the table of methods, and the decision.

mod methods;
mod policy;
mod tokens;

pub use methods::{Access, METHODS, Method, Subject, method};
pub(crate) use policy::{Policy, Refusal, Shown};
pub use tokens::{NewToken, TokenFileError, TokenTable, create_token};

use std::fmt;

/// What a person may do. Each of the first three may do what the ones before it may; `Internal` is apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, clap::ValueEnum)]
pub enum Role {
    /// Look at runs, decisions, artifacts and workers
    Read,
    /// Start, change and end runs
    Operate,
    /// Remove what cannot be brought back
    Admin,
    /// Act as coordinator or worker, where those have no certificates
    Internal,
}

impl Role {
    pub const ALL: [Self; 4] = [Self::Read, Self::Operate, Self::Admin, Self::Internal];

    /// The name in token files and messages.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Operate => "operate",
            Self::Admin => "admin",
            Self::Internal => "internal",
        }
    }
}

/// The processes of the project, told apart by the names in their certificates.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Process {
    Coordinator,
    Worker,
}

/// What a caller may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Grant {
    /// By a token.
    Role(Role),
    /// By a client certificate.
    Process(Process),
    /// By a client certificate that names neither process: known, and no more.
    Nothing,
    /// Where access is not controlled.
    Everything,
}

impl Grant {
    /// Whether a caller with this grant may call what has that access.
    #[must_use]
    pub fn allows(self, access: Access) -> bool {
        match (self, access) {
            (_, Access::Open) | (Self::Everything, _) => true,
            (Self::Role(Role::Internal), Access::People(_)) => false,
            (Self::Role(role), Access::People(least)) => role >= least,
            (Self::Role(role), Access::Process(_)) => role == Role::Internal,
            (Self::Process(process), Access::Process(asked)) => process == asked,
            (Self::Process(_), Access::People(_)) | (Self::Nothing, _) => false,
        }
    }
}

impl fmt::Display for Grant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Role(role) => role.name(),
            Self::Process(Process::Coordinator) => "coordinator",
            Self::Process(Process::Worker) => "worker",
            Self::Nothing => "none",
            Self::Everything => "everything",
        })
    }
}

/// Who calls; handlers find it in their request's extensions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Principal {
    /// The token's name, the certificate's first name, or `anonymous`.
    pub name: String,
    pub grant: Grant,
}

impl Principal {
    pub(crate) fn anonymous(grant: Grant) -> Self {
        Self { name: "anonymous".into(), grant }
    }
}
