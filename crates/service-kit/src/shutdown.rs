//! Signals into a cancellation that every task can wait for.

use std::io;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

/// Exit status of a process that was told twice.
const FORCED_EXIT: i32 = 130;

/// A token that the first SIGTERM or SIGINT cancels; the second ends the process at once.
///
/// # Errors
/// When the handlers cannot be installed.
pub fn on_signals() -> io::Result<CancellationToken> {
    let token = CancellationToken::new();
    let cancelled = token.clone();
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    tokio::spawn(async move {
        loop {
            let name = tokio::select! {
                received = terminate.recv() => received.map(|()| "SIGTERM"),
                received = interrupt.recv() => received.map(|()| "SIGINT"),
            };
            let Some(name) = name else { return };
            if cancelled.is_cancelled() {
                warn!(signal = name, "told to stop again: ending at once");
                std::process::exit(FORCED_EXIT);
            }
            info!(signal = name, "shutting down");
            cancelled.cancel();
        }
    });
    Ok(token)
}
