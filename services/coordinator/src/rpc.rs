//! The services: translate, call, translate back.

mod artifacts;
mod creation;
pub(crate) mod registry_service;
pub(crate) mod run_service;
mod what_if;
