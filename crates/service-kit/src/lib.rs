//! What every process of the project does alike: command-line groups, logs and traces, a gRPC server with health and
//! reflection, TLS, access control and limits before it, signals, and the check that paths stay below the allowed roots.

pub mod access;
pub mod audit;
pub mod grpc_server;
mod guard;
mod incoming;
pub mod limits;
pub mod listen;
pub mod metrics;
mod readiness;
pub mod roots;
pub mod shutdown;
pub mod telemetry;
pub mod tls;
pub mod trace_context;

pub use access::{Grant, Principal, Process, Role};
pub use audit::{AuditEntry, AuditSink};
pub use grpc_server::GrpcServer;
pub use limits::LimitArgs;
pub use listen::{ListenArgs, ListenError, Listener, TokenArgs};
pub use roots::{Location, PathRefused, RootArgs, Roots, RootsError};
pub use telemetry::{LogArgs, LogFormat, Telemetry, TelemetryError};
pub use tls::{ClientAuth, TlsArgs};
