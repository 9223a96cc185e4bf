//! The contract between processes: generated messages and services, conversions into domain types, clients, and the one
//! table from errors to statuses.
//!
//! Messages are converted once, on receipt. A conversion names every field that is wrong, not only the first.

pub mod client;
pub mod convert;
mod fields;
pub mod limits;
pub mod reloading;
mod spec;
pub mod status;
pub mod tls;

pub use fields::{InvalidFields, Violations};
pub use recipe::FieldViolation;
pub use spec::{
    Durability, EvaluationMode, EvaluationSpec, ExportDtype, ExportSpec, RunSpec, TaskSpec, TextFormat,
    TextSource,
};

/// Messages, clients and servers generated from `proto/espalier/v1`.
pub mod pb {
    #![allow(clippy::all, clippy::pedantic, missing_docs, unreachable_pub)]
    tonic::include_proto!("espalier.v1");

    /// The schema with its comments, for server reflection.
    pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));
}
