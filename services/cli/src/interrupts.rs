//! SIGINT and SIGTERM, counted: the first asks, the second insists.

use anyhow::Context;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

/// How often we were told to stop.
#[derive(Debug, Clone)]
pub(crate) struct Interrupts(watch::Receiver<u32>);

impl Interrupts {
    /// Listens from now on, instead of ending at the first signal.
    ///
    /// # Errors
    /// When the handlers cannot be installed.
    pub(crate) fn listen() -> anyhow::Result<Self> {
        let mut interrupt = signal(SignalKind::interrupt()).context("failed to listen for SIGINT")?;
        let mut terminate = signal(SignalKind::terminate()).context("failed to listen for SIGTERM")?;
        let (count, receiver) = watch::channel(0);
        tokio::spawn(async move {
            loop {
                let received = tokio::select! {
                    received = interrupt.recv() => received,
                    received = terminate.recv() => received,
                };
                if received.is_none() {
                    return;
                }
                count.send_modify(|count| *count += 1);
            }
        });
        Ok(Self(receiver))
    }

    /// Returns once `count` signals have come.
    pub(crate) async fn reach(&mut self, count: u32) {
        if self.0.wait_for(|received| *received >= count).await.is_err() {
            // No more signals can come.
            std::future::pending::<()>().await;
        }
    }
}
