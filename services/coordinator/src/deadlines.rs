use std::time::Duration;

/// Longest that each call to a worker may take: no wait is without end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Deadlines {
    pub(crate) load: Duration,
    pub(crate) open_rendezvous: Duration,
    pub(crate) join_group: Duration,
    /// Longest silence of a rank between two messages of its stream, of training or of a task.
    pub(crate) step: Duration,
    pub(crate) apply_mask: Duration,
    /// Of a mask whose removals are compensated: several passes over the calibration windows and a solve for each layer.
    pub(crate) compensate: Duration,
    pub(crate) evaluate: Duration,
    pub(crate) checkpoint: Duration,
    pub(crate) export: Duration,
    pub(crate) abort: Duration,
}

impl Deadlines {
    pub(crate) fn with_step(step: Duration) -> Self {
        let minutes = |minutes: u64| Duration::from_secs(60 * minutes);
        Self {
            load: minutes(10),
            open_rendezvous: minutes(1),
            join_group: minutes(1),
            step,
            apply_mask: minutes(2),
            compensate: minutes(60),
            evaluate: minutes(30),
            checkpoint: minutes(10),
            export: minutes(30),
            abort: Duration::from_secs(10),
        }
    }
}
