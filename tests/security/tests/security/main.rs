//! Attacks on a real server, and what a client must not be talked into.

mod audit;
mod authorisation;
mod certificates;
mod documented;
mod limits;
mod reloading;
mod secrets;
mod starting;
