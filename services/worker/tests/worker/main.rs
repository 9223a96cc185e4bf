//! A worker with a toy engine, driven over real gRPC on loopback.

mod faults;
mod harness;
mod registration;
mod rules;
mod session;
mod tasks;
mod teaching;
