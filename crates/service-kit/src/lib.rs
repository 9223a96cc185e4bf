//! What every process of the project does alike: command-line groups, logs and traces, a gRPC server with health and
//! reflection, signals, and the check that paths stay below the allowed roots.

pub mod grpc_server;
pub mod listen;
pub mod roots;
pub mod shutdown;
pub mod telemetry;
pub mod trace_context;

pub use grpc_server::GrpcServer;
pub use listen::{ListenArgs, ListenError, Listener};
pub use roots::{PathRefused, RootArgs, Roots, RootsError};
pub use telemetry::{LogArgs, LogFormat, Telemetry, TelemetryError};
