//! A coordinator and workers as separate processes.

use crate::{Finished, Running, Tool};
use std::net::TcpListener;
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

const STOP_DEADLINE: Duration = Duration::from_secs(30);
const START_DEADLINE: Duration = Duration::from_secs(60);

/// A coordinator process that listens.
pub struct Coordinator {
    pub url: String,
    process: Running,
}

impl Coordinator {
    /// Starts one with `root` as its only root and its state in `root/state`.
    ///
    /// # Panics
    /// When it does not listen within a minute.
    #[must_use]
    pub fn start(root: &Path) -> Self {
        let port = free_port();
        let address = format!("127.0.0.1:{port}");
        let mut process = Tool::new("coordinator")
            .flag("--listen", &address)
            .flag("--root", root)
            .flag("--data-dir", root.join("state"))
            .start();
        let listens = process.wait_for(START_DEADLINE, || std::net::TcpStream::connect(&address).ok());
        assert!(listens.is_some(), "the coordinator does not listen on {address}");
        Self { url: format!("http://{address}"), process }
    }

    /// Asks it to end.
    #[must_use]
    pub fn stop(self) -> Finished {
        self.process.signal(libc::SIGTERM);
        self.process.finish(STOP_DEADLINE)
    }
}

/// A worker process.
pub struct WorkerProcess(pub Running);

impl WorkerProcess {
    /// Starts one that registers with `coordinator`.
    #[must_use]
    pub fn start(coordinator: &Coordinator, id: &str, root: &Path) -> Self {
        let tool = Tool::new("worker")
            .flag("--listen", "127.0.0.1:0")
            .flag("--coordinator", &coordinator.url)
            .flag("--id", id)
            .flag("--threads", "1")
            .flag("--root", root);
        Self(tool.start())
    }

    /// Asks it to end.
    #[must_use]
    pub fn stop(self) -> Finished {
        self.0.signal(libc::SIGTERM);
        self.0.finish(STOP_DEADLINE)
    }
}

/// Ports that Linux gives to nobody who does not ask for one by number, so that no connection takes it meanwhile.
const PORTS: std::ops::Range<u16> = 10_000..32_000;

/// A port that was free a moment ago, and that this process is not given again.
///
/// # Panics
/// When there is none.
#[must_use]
pub fn free_port() -> u16 {
    static GIVEN: AtomicU32 = AtomicU32::new(0);
    let count = u32::from(PORTS.end - PORTS.start);
    // Processes that run side by side begin at different places.
    let start = std::process::id().wrapping_mul(997);
    let mut candidates = (0..count).map(|_| {
        let place = start.wrapping_add(GIVEN.fetch_add(1, Ordering::Relaxed)) % count;
        PORTS.start + u16::try_from(place).unwrap_or_default()
    });
    candidates.find(|port| TcpListener::bind(("127.0.0.1", *port)).is_ok()).expect("a free port")
}
