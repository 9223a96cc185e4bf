use engine::EngineError;
use tch::TchError;

/// Why a computation did not happen; turned into [`EngineError`] at the crate's border.
#[derive(Debug)]
pub(crate) enum Fault {
    Tensor(TchError),
    Collective(String),
    File(String),
    Unwritten(String),
    Refused(String),
    NotFinite { what: String, step: u64, value: f64 },
}

pub(crate) type Result<T> = std::result::Result<T, Fault>;

impl From<TchError> for Fault {
    fn from(error: TchError) -> Self {
        Self::Tensor(error)
    }
}

impl From<Fault> for EngineError {
    fn from(fault: Fault) -> Self {
        match fault {
            Fault::Tensor(error) => Self::Device(error.to_string()),
            Fault::Collective(text) => Self::Collective(text),
            Fault::File(text) => Self::File(text),
            Fault::Unwritten(text) => Self::Unwritten(text),
            Fault::Refused(text) => Self::Refused(text),
            Fault::NotFinite { what, step, value } => Self::NotFinite { what, step, value },
        }
    }
}

/// An error with all its sources, as one line for people.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text.push_str(": ");
        text.push_str(&error.to_string());
        source = error.source();
    }
    text
}
