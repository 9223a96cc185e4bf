//! The services: translate, call, translate back.

pub(crate) mod registry_service;
pub(crate) mod run_service;
