//! A small deterministic engine without tensors, for testing the services.
