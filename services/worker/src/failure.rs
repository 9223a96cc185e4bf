//! Errors of engine, data and paths as failures of a call.

use checkpoint::OpenModelError;
use engine::EngineError;
use token_batches::DataError;
use wire::status::{Failure, Reason};

pub(crate) fn of_engine(error: &EngineError) -> Failure {
    match error {
        EngineError::Refused(_) => Failure::from_error(Reason::Refused, error),
        EngineError::File(_) => Failure::from_error(Reason::BadFile, error),
        EngineError::Unwritten(_) => Failure::from_error(Reason::StoreFailed, error),
        EngineError::NotFinite { what, step, value } => Failure::from_error(Reason::NotFinite, error)
            .with_fact("what", what)
            .with_fact("step", step)
            .with_fact("value", value),
        EngineError::Collective(_) => Failure::from_error(Reason::PeerLost, error),
        EngineError::Device(_) => Failure::from_error(Reason::DeviceFailed, error),
    }
}

/// Whether the shard may not be used any more after this.
pub(crate) fn ends_session(error: &EngineError) -> bool {
    match error {
        EngineError::Refused(_)
        | EngineError::File(_)
        | EngineError::Unwritten(_)
        | EngineError::NotFinite { .. } => false,
        EngineError::Collective(_) | EngineError::Device(_) => true,
    }
}

pub(crate) fn of_data(error: &DataError) -> Failure {
    Failure::from_error(Reason::BadFile, error)
}

pub(crate) fn of_model(error: &OpenModelError) -> Failure {
    Failure::from_error(Reason::BadFile, error)
}

pub(crate) fn of_panic(payload: &(dyn std::any::Any + Send), what: &str) -> Failure {
    let message = payload
        .downcast_ref::<&str>()
        .map(|text| (*text).to_owned())
        .or_else(|| payload.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "no message".into());
    Failure::new(Reason::DeviceFailed, format!("{what} panicked: {message}"))
}
