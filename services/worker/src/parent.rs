//! Ending together with the process that started this one.

use std::io;
use std::time::Duration;
use tokio_util::sync::CancellationToken;
use tracing::warn;

const LOOK_EVERY: Duration = Duration::from_millis(500);

/// The process that started this one.
#[derive(Debug, Clone, Copy)]
pub struct Parent {
    process_id: u32,
}

/// Why this process should not even begin.
#[derive(Debug, thiserror::Error)]
pub enum ParentGone {
    #[error("the process {expected} that started this one has ended already")]
    Ended { expected: u32 },
    #[error("failed to ask for a signal at the parent's end")]
    NotArmed(#[source] io::Error),
}

impl Parent {
    /// Asks the kernel for SIGTERM when the parent ends. `expected` is the parent's process id, 0 for whoever it is.
    ///
    /// Call it on the main thread before any other is started.
    ///
    /// # Errors
    /// When the parent is another already.
    pub fn arm(expected: u32) -> Result<Self, ParentGone> {
        let process_id = current();
        // SAFETY: PR_SET_PDEATHSIG takes a signal number and touches no memory of ours.
        if unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGTERM) } != 0 {
            return Err(ParentGone::NotArmed(io::Error::last_os_error()));
        }
        // It may have ended before the kernel knew that we care.
        let now = current();
        if now != process_id || (expected != 0 && now != expected) {
            return Err(ParentGone::Ended { expected: if expected == 0 { process_id } else { expected } });
        }
        Ok(Self { process_id })
    }

    /// Cancels `stop` when the parent is no longer there: the kernel's signal follows the thread that started us, and
    /// this the process.
    pub async fn watch(self, stop: CancellationToken) {
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(LOOK_EVERY) => {}
            }
            if current() != self.process_id {
                warn!(parent = self.process_id, "the process that started this one has ended");
                stop.cancel();
                return;
            }
        }
    }
}

fn current() -> u32 {
    std::os::unix::process::parent_id()
}
