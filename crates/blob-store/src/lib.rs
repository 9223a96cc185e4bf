//! Files of checkpoints and artifacts in a folder or in an S3 bucket, through one interface.
//!
//! What is put is complete or absent, and durable once the call has returned. Credentials of S3 come from the standard
//! `AWS_*` variables of the process and are never part of a URL, an error or a log line.

mod error;
mod location;
mod store;

pub use error::BlobError;
pub use location::{InvalidLocation, Location};
pub use store::{BlobStore, Limits};
