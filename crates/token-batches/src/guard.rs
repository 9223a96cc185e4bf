//! The border to libraries that may panic on malformed input.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// Runs `work` on input that nobody has checked yet; a panic in it becomes its message.
///
/// The caller must drop whatever `work` was changing when this fails.
pub(crate) fn guard<T>(work: impl FnOnce() -> T) -> Result<T, String> {
    catch_unwind(AssertUnwindSafe(work)).map_err(|payload| panic_message(payload.as_ref()))
}

fn panic_message(payload: &(dyn Any + Send)) -> String {
    if let Some(text) = payload.downcast_ref::<&str>() {
        (*text).to_owned()
    } else if let Some(text) = payload.downcast_ref::<String>() {
        text.clone()
    } else {
        "the decoder gave up".to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_becomes_its_message() {
        assert_eq!(guard(|| 3), Ok(3));
        let empty: Vec<u8> = Vec::new();
        let message = guard(|| empty[std::hint::black_box(1)]).unwrap_err();
        assert!(message.contains("out of bounds"), "{message}");
    }
}
