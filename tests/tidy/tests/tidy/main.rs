//! The repository holds to its own rules: layers, pure domain crates, lints, and documents that agree with the code.

mod api;
mod documents;
mod layers;
mod sources;
mod telemetry;
