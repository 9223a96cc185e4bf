//! The run against workers that answer as real ones would, in every order.

mod course;
mod laws;
mod world;
