//! The contract between processes: generated messages and services, conversions into domain types, clients, and the one
//! table from errors to statuses.

/// Messages, clients and servers generated from `proto/espalier/v1`.
pub mod pb {
    #![allow(clippy::all, clippy::pedantic, missing_docs, unreachable_pub)]
    tonic::include_proto!("espalier.v1");

    /// The schema with its comments, for server reflection.
    pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));
}
