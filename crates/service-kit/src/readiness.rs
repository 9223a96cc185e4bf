//! Whether this process is ready for work: what `/readyz` answers beside the metrics.

use std::sync::atomic::{AtomicBool, Ordering};

static READY: AtomicBool = AtomicBool::new(false);

pub(crate) fn set(ready: bool) {
    READY.store(ready, Ordering::Relaxed);
}

pub(crate) fn is_ready() -> bool {
    READY.load(Ordering::Relaxed)
}
