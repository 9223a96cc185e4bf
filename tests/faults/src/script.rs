//! What a seed breaks, and when.

use crate::random::Random;
use std::fmt;
use std::time::Duration;

/// Workers of every run: the group takes the lowest two that are idle, so the last begins as the spare.
pub(crate) const WORKERS: usize = 3;
/// Optimizer steps of every run.
pub(crate) const STEPS: u64 = 16;

/// One to three faults in order.
#[derive(Debug, Clone)]
pub struct Script {
    pub seed: u64,
    /// Checkpoints and the result go to an object store instead of a folder.
    pub(crate) in_object_store: bool,
    /// The coordinator waits as long as it does by default, not as short as the suite likes it.
    pub(crate) default_patience: bool,
    pub(crate) faults: Vec<Planned>,
}

/// A fault and its moment: so long after something was seen.
#[derive(Debug, Clone)]
pub(crate) struct Planned {
    pub(crate) when: When,
    pub(crate) delay: Duration,
    pub(crate) fault: Fault,
}

/// What a fault waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum When {
    /// The run exists.
    Created,
    /// An event of this step was seen, or of a later one.
    Step(u64),
    /// The result is being written.
    Exporting,
}

#[derive(Debug, Clone, Copy)]
pub(crate) enum Fault {
    /// SIGKILL; started again after a pause.
    KillWorker { worker: usize, down: Duration },
    /// SIGKILL; started again after a pause.
    KillCoordinator { down: Duration },
    /// SIGSTOP, later SIGCONT: neither computes nor answers.
    FreezeWorker { worker: usize, lasts: Duration },
    /// Its compute thread alone is held: it renews its lease and gets no further.
    StickWorker { worker: usize, lasts: Duration },
    /// SIGTERM; started again once it has ended.
    DrainWorker { worker: usize, down: Duration },
    /// SIGTERM; started again once it has ended.
    StopCoordinator { down: Duration },
    /// Connections between worker and coordinator break, and no new ones are made.
    ResetLink { worker: usize, lasts: Duration },
    /// Bytes between worker and coordinator go nowhere, and no one is told.
    SilenceLink { worker: usize, lasts: Duration },
    /// Bytes between worker and coordinator come late.
    SlowLink { worker: usize, latency: Duration, lasts: Duration },
    /// No file of the coordinator can grow.
    FullDisk { lasts: Duration },
    /// No file of a worker can grow.
    FullWorkerDisk { worker: usize, lasts: Duration },
    /// Connections to the object store break, and no new ones are made.
    FailingStore { lasts: Duration },
    /// Bytes from and to the object store come late.
    SlowStore { latency: Duration, lasts: Duration },
}

/// Names of the kinds, in the order in which seeds take turns.
pub(crate) const KINDS: [&str; 13] = [
    "worker killed",
    "coordinator killed",
    "worker frozen",
    "worker stuck",
    "worker told to stop",
    "coordinator told to stop",
    "link reset",
    "link silent",
    "link slow",
    "coordinator's disk full",
    "worker's disk full",
    "object store fails",
    "object store slow",
];

/// From here on they are kinds that need an object store.
const STORE_KINDS: u64 = 11;

impl Fault {
    /// Place in [`KINDS`].
    pub(crate) fn kind(&self) -> usize {
        match self {
            Self::KillWorker { .. } => 0,
            Self::KillCoordinator { .. } => 1,
            Self::FreezeWorker { .. } => 2,
            Self::StickWorker { .. } => 3,
            Self::DrainWorker { .. } => 4,
            Self::StopCoordinator { .. } => 5,
            Self::ResetLink { .. } => 6,
            Self::SilenceLink { .. } => 7,
            Self::SlowLink { .. } => 8,
            Self::FullDisk { .. } => 9,
            Self::FullWorkerDisk { .. } => 10,
            Self::FailingStore { .. } => 11,
            Self::SlowStore { .. } => 12,
        }
    }

    fn drawn(kind: usize, random: &mut Random) -> Self {
        // The first two are the group as long as nothing has happened.
        let worker = [0, 0, 1, 1, 2][random.below(5) as usize];
        let down = random.millis(0..2000);
        let lasts = random.millis(4500..7500);
        match kind {
            0 => Self::KillWorker { worker, down },
            1 => Self::KillCoordinator { down },
            2 => Self::FreezeWorker { worker, lasts },
            3 => Self::StickWorker { worker, lasts },
            4 => Self::DrainWorker { worker, down },
            5 => Self::StopCoordinator { down },
            6 => Self::ResetLink { worker, lasts: random.millis(100..6000) },
            7 => Self::SilenceLink { worker, lasts: random.millis(500..7500) },
            8 => Self::SlowLink { worker, latency: random.millis(5..80), lasts },
            9 => Self::FullDisk { lasts: random.millis(300..4000) },
            10 => Self::FullWorkerDisk { worker, lasts: random.millis(300..4000) },
            11 => Self::FailingStore { lasts: random.millis(100..6000) },
            12 => Self::SlowStore { latency: random.millis(5..200), lasts },
            // Callers draw below the number of kinds.
            other => unreachable!("there is no kind {other}"),
        }
    }
}

impl Script {
    /// Nothing breaks.
    pub(crate) fn undisturbed() -> Self {
        Self { seed: 0, in_object_store: false, default_patience: false, faults: Vec::new() }
    }

    /// The second worker stands still under the coordinator's default limits.
    #[must_use]
    pub fn stuck_by_default() -> Self {
        let fault = Fault::StickWorker { worker: 1, lasts: Duration::from_secs(20) };
        let planned = Planned { when: When::Step(5), delay: Duration::ZERO, fault };
        Self { default_patience: true, faults: vec![planned], ..Self::undisturbed() }
    }

    /// The faults of a seed. As many seeds in a row as there are kinds begin with one each.
    #[must_use]
    pub fn of(seed: u64) -> Self {
        let mut random = Random::new(seed);
        let kinds = KINDS.len() as u64;
        let in_object_store = seed % kinds >= STORE_KINDS || seed % 5 == 4;
        let possible = if in_object_store { kinds } else { STORE_KINDS };
        let count = [1, 1, 2, 2, 3][random.below(5) as usize];
        let mut faults: Vec<Planned> = (0..count)
            .map(|index| {
                let kind = if index == 0 { seed % kinds } else { random.below(possible) };
                let when = match random.below(12) {
                    0 => When::Created,
                    1 => When::Exporting,
                    _ => When::Step(random.below(STEPS)),
                };
                let delay = match when {
                    When::Created => random.millis(0..2500),
                    When::Exporting => random.millis(0..1500),
                    When::Step(_) => random.millis(0..250),
                };
                Planned { when, delay, fault: Fault::drawn(kind as usize, &mut random) }
            })
            .collect();
        faults.sort_by_key(|planned| planned.when);
        Self { seed, in_object_store, default_patience: false, faults }
    }
}

impl fmt::Display for Script {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let place = if self.in_object_store { ", in an object store" } else { "" };
        writeln!(f, "seed {}{place}:", self.seed)?;
        for Planned { when, delay, fault } in &self.faults {
            writeln!(f, "  {delay:?} after {when:?}: {fault:?}")?;
        }
        Ok(())
    }
}
