//! The run against workers that answer as real ones would, in every order.

mod course;
mod faults;
mod forks;
mod guard;
mod laws;
mod saving;
mod wishes;
mod world;
