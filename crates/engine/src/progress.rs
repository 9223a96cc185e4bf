use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How far a shard's thread is, for others to see, and the word to give up.
///
/// The engine ticks wherever it passes something: a layer forward or backward, a tile of scores, a layer compensated, a
/// tensor loaded. A thread whose ticks stand still while it works is stuck.
#[derive(Default)]
pub struct Progress {
    ticks: AtomicU64,
    collectives_entered: AtomicU64,
    collectives_left: AtomicU64,
    collective_nanos: AtomicU64,
    gives_up: AtomicBool,
    /// What frees a thread that waits in a collective.
    on_give_up: Mutex<Option<Box<dyn Fn() + Send>>>,
}

/// A look at a [`Progress`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ProgressCounts {
    pub ticks: u64,
    /// Collectives begun.
    pub collectives_entered: u64,
    /// Collectives ended.
    pub collectives_left: u64,
}

impl Progress {
    /// Something was passed.
    pub fn tick(&self) {
        self.ticks.fetch_add(1, Ordering::Relaxed);
    }

    /// Counts a collective in, does it and counts it out, also when it fails.
    pub fn collective<T>(&self, wait: impl FnOnce() -> T) -> T {
        self.collectives_entered.fetch_add(1, Ordering::Relaxed);
        let entered = Instant::now();
        let done = wait();
        let nanos = u64::try_from(entered.elapsed().as_nanos()).unwrap_or(u64::MAX);
        self.collective_nanos.fetch_add(nanos, Ordering::Relaxed);
        self.collectives_left.fetch_add(1, Ordering::Relaxed);
        self.tick();
        done
    }

    /// Time spent in collectives that have ended, waiting for peers included.
    #[must_use]
    pub fn collective_time(&self) -> Duration {
        Duration::from_nanos(self.collective_nanos.load(Ordering::Relaxed))
    }

    #[must_use]
    pub fn counts(&self) -> ProgressCounts {
        ProgressCounts {
            ticks: self.ticks.load(Ordering::Relaxed),
            collectives_entered: self.collectives_entered.load(Ordering::Relaxed),
            collectives_left: self.collectives_left.load(Ordering::Relaxed),
        }
    }

    /// Says what frees a thread that waits for its peers; called at once where it is too late already.
    pub fn on_give_up(&self, free: impl Fn() + Send + 'static) {
        let mut on_give_up = self.on_give_up.lock().unwrap_or_else(PoisonError::into_inner);
        if self.gives_up() {
            free();
        }
        *on_give_up = Some(Box::new(free));
    }

    /// Has the shard's thread end what it does: its session is over. Called from another thread.
    pub fn give_up(&self) {
        self.gives_up.store(true, Ordering::Release);
        let on_give_up = self.on_give_up.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(free) = &*on_give_up {
            free();
        }
    }

    /// Whether the session is over.
    #[must_use]
    pub fn gives_up(&self) -> bool {
        self.gives_up.load(Ordering::Acquire)
    }
}

impl fmt::Debug for Progress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Progress").field("counts", &self.counts()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[test]
    fn a_collective_is_counted_in_and_out() {
        let progress = Progress::default();
        let inside = progress.collective(|| progress.counts());
        assert_eq!((inside.collectives_entered, inside.collectives_left), (1, 0));
        let after = progress.counts();
        assert_eq!((after.collectives_entered, after.collectives_left, after.ticks), (1, 1, 1));
    }

    #[test]
    fn giving_up_frees_whoever_waits_now_or_later() {
        let (progress, freed) = (Progress::default(), Arc::new(AtomicU64::new(0)));
        let free = |freed: &Arc<AtomicU64>| {
            let freed = freed.clone();
            move || {
                freed.fetch_add(1, Ordering::Relaxed);
            }
        };
        progress.on_give_up(free(&freed));
        assert!(!progress.gives_up());
        progress.give_up();
        assert_eq!(freed.load(Ordering::Relaxed), 1);
        progress.on_give_up(free(&freed));
        assert_eq!(freed.load(Ordering::Relaxed), 2);
        assert!(progress.gives_up());
    }
}
