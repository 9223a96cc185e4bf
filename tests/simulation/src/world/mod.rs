//! The simulated world: what happens next, in order of time, and everything that it happens to.

mod faults;

pub use faults::Misfortune;

use crate::chance::Chance;
use crate::checks::{Checks, Expected, Watcher};
use crate::coordinator::{Coordinator, Session};
use crate::network::{Network, Node};
use crate::scenario::{SECOND, Scenario, Time};
use crate::store::Store;
use crate::workers::{Call, OpenCall, ShardCopy, Work, Worker};
use pruning_run::{CheckpointRef, Event, RunId, RunState, SavedState};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

/// How long the world may take to settle once faults have stopped.
const SETTLES_WITHIN: Time = 3_600 * SECOND;
/// Happenings that are shown when a seed fails.
const SHOWN: usize = 60;

/// Something that happens at a time.
#[derive(Debug, Clone)]
pub enum Happening {
    Create {
        run: usize,
    },
    /// A run's driver looks at its inbox.
    Drives {
        run: usize,
    },
    Called {
        call: u64,
        worker: usize,
        session: Session,
        what: Call,
    },
    Answered {
        call: u64,
        events: Vec<Event>,
        ends: bool,
    },
    Broken {
        call: u64,
        cause: &'static str,
    },
    Worked {
        call: u64,
        worker: usize,
        process: u64,
        session: Session,
        work: Work,
    },
    Met {
        session: Session,
        meeting: u64,
        group: Vec<usize>,
    },
    GivesUp {
        worker: usize,
        process: u64,
        session: Session,
        meeting: u64,
    },
    Appended {
        incarnation: u64,
        run: usize,
    },
    Committed {
        incarnation: u64,
        run: usize,
        name: String,
        state: Arc<SavedState>,
    },
    Read {
        session: Session,
        place: CheckpointRef,
    },
    Aborted {
        session: Session,
    },
    Wakes {
        incarnation: u64,
        run: usize,
    },
    Beats {
        worker: usize,
        process: u64,
    },
    Heard {
        worker: usize,
        process: u64,
        progress: u64,
    },
    Leases {
        incarnation: u64,
    },
    Watches {
        watcher: usize,
    },
    Misfortune,
    Mends {
        one: Node,
        other: Node,
    },
    StoreIsBack,
    WorkerStarts {
        worker: usize,
    },
    CoordinatorStarts,
    CoordinatorDies,
    Calm,
}

/// See the module.
#[derive(Debug)]
pub struct World {
    pub scenario: Scenario,
    pub now: Time,
    pub chance: Chance,
    pub network: Network,
    pub store: Store,
    pub coordinator: Option<Coordinator>,
    pub incarnation: u64,
    pub workers: Vec<Worker>,
    pub calls: BTreeMap<u64, OpenCall>,
    pub last_call: u64,
    /// Ranks that have come to a meeting.
    pub meetings: BTreeMap<(Session, u64), BTreeSet<usize>>,
    /// What workers have copied aside and are still writing.
    pub copies: BTreeMap<(usize, u64, String), ShardCopy>,
    pub checks: Checks,
    /// Events that runs have seen.
    pub transitions: u64,
    watchers: Vec<Watcher>,
    coming: BTreeMap<(Time, u64), Happening>,
    happened: u64,
    sequence: u64,
    is_calm: bool,
    shown: VecDeque<String>,
    violation: Option<String>,
}

/// How a seed went.
#[derive(Debug, Clone, Default)]
pub struct Outcome {
    pub happenings: u64,
    pub transitions: u64,
    pub misfortunes: u64,
    pub restarts: u64,
    pub succeeded: u64,
    pub failed: u64,
    pub cancelled: u64,
}

/// A broken law, with what led to it.
#[derive(Debug, Clone)]
pub struct Failure {
    pub what: String,
    pub at: Time,
    pub last: Vec<String>,
}

impl World {
    /// A world of calm weather when there is nothing `expected` yet.
    #[must_use]
    pub fn new(seed: u64, expected: Option<Vec<Expected>>) -> Self {
        let scenario = Scenario::of(seed);
        let runs = scenario.plans.len();
        let is_calm = expected.is_none();
        let loss = if is_calm { 0.0 } else { scenario.loss };
        let mut world = Self {
            now: 0,
            chance: Chance::new(seed),
            network: Network::losing(loss),
            store: Store { logs: vec![Vec::new(); runs], ..Store::default() },
            coordinator: None,
            incarnation: 0,
            workers: vec![Worker::default(); scenario.workers],
            calls: BTreeMap::new(),
            last_call: 0,
            meetings: BTreeMap::new(),
            copies: BTreeMap::new(),
            checks: Checks::new(&scenario, expected),
            transitions: 0,
            watchers: (0..2 * runs).map(|place| Watcher::of(place % runs)).collect(),
            coming: BTreeMap::new(),
            happened: 0,
            sequence: 0,
            is_calm,
            shown: VecDeque::new(),
            violation: None,
            scenario,
        };
        world.coordinator_starts();
        for worker in 0..world.workers.len() {
            world.after(0, Happening::WorkerStarts { worker });
        }
        for run in 0..runs {
            world.at(world.scenario.plans[run].created_at, Happening::Create { run });
        }
        for watcher in 0..2 * runs {
            world.after(1, Happening::Watches { watcher });
        }
        if !is_calm {
            world.after(SECOND, Happening::Misfortune);
            world.at(world.scenario.horizon, Happening::Calm);
        }
        world
    }

    pub fn at(&mut self, time: Time, happening: Happening) {
        self.sequence += 1;
        self.coming.insert((time.max(self.now), self.sequence), happening);
    }

    pub fn after(&mut self, delay: Time, happening: Happening) {
        self.at(self.now + delay, happening);
    }

    /// A law is broken; nothing happens any more.
    pub fn violation(&mut self, what: String) {
        self.violation.get_or_insert(what);
    }

    /// Keeps a line to show should a law break soon.
    pub fn note(&mut self, line: impl FnOnce() -> String) {
        if self.shown.len() == SHOWN {
            self.shown.pop_front();
        }
        let line = line();
        let cut = line.char_indices().nth(240).map_or(line.len(), |(place, _)| place);
        self.shown.push_back(format!("{:>12.6} {}", self.now as f64 / SECOND as f64, &line[..cut]));
    }

    #[must_use]
    pub fn run_named(&self, id: &RunId) -> usize {
        id.0.trim_start_matches("run-").parse().unwrap_or(0)
    }

    /// Lets everything happen until all runs have ended.
    ///
    /// # Errors
    /// With the first law that is broken.
    pub fn play(&mut self) -> Result<Outcome, Failure> {
        while !(self.is_calm && self.has_settled()) {
            let Some((&(time, _), _)) = self.coming.first_key_value() else {
                self.violation("nothing happens any more, and a run has not ended".into());
                return Err(self.failure());
            };
            let Some((_, happening)) = self.coming.pop_first() else { break };
            self.now = time;
            self.happened += 1;
            if !matches!(
                happening,
                Happening::Beats { .. }
                    | Happening::Drives { .. }
                    | Happening::Heard { .. }
                    | Happening::Watches { .. }
                    | Happening::Leases { .. }
            ) {
                self.note(|| format!("{happening:?}"));
            }
            self.happen(happening);
            self.check_claims();
            if self.now > self.scenario.horizon + SETTLES_WITHIN {
                self.violation("the world does not settle".into());
            }
            if self.violation.is_some() {
                return Err(self.failure());
            }
        }
        for watcher in &mut self.watchers {
            watcher.catch_up(&self.store.logs[watcher.run], usize::MAX);
        }
        let lost =
            self.watchers.iter().find_map(|watcher| watcher.differs_from(&self.store.logs[watcher.run]));
        if let Some(broken) = lost.or_else(|| self.checks.at_the_end(&self.store)) {
            self.violation(broken);
            return Err(self.failure());
        }
        let mut outcome = self.checks.outcome(&self.store);
        (outcome.happenings, outcome.transitions) = (self.happened, self.transitions);
        Ok(outcome)
    }

    /// What the runs came to, for others to be compared with.
    #[must_use]
    pub fn expected(&self) -> Vec<Expected> {
        self.store.logs.iter().map(|log| Expected::of(log)).collect()
    }

    /// The law that was broken.
    #[must_use]
    pub fn failure(&self) -> Failure {
        Failure {
            what: self.violation.clone().unwrap_or_default(),
            at: self.now,
            last: self.shown.iter().cloned().collect(),
        }
    }

    fn has_settled(&self) -> bool {
        self.store.logs.iter().all(|log| crate::checks::last_state(log).is_some_and(RunState::has_ended))
            && self.coordinator.as_ref().is_some_and(|it| it.claims.is_empty() && it.queue.is_empty())
    }

    /// A worker is claimed by the run that thinks so, and by no other.
    fn check_claims(&mut self) {
        let Some(coordinator) = &self.coordinator else { return };
        let held: usize = coordinator.drivers.values().map(|driver| driver.workers.len()).sum();
        let agrees = coordinator.drivers.iter().all(|(run, driver)| {
            driver.workers.iter().all(|worker| coordinator.claims.get(worker) == Some(run))
        });
        if !agrees || held != coordinator.claims.len() {
            self.violation("runs and registry disagree on who holds which worker".into());
        }
    }

    fn happen(&mut self, happening: Happening) {
        match happening {
            Happening::Create { run } => self.create(run),
            Happening::Drives { run } => self.drive(run),
            Happening::Called { call, worker, session, what } => self.called(call, worker, session, what),
            Happening::Answered { call, events, ends } => self.answered(call, events, ends),
            Happening::Broken { call, cause } => self.broken(call, cause),
            Happening::Worked { call, worker, process, session, work } => {
                self.worked(call, worker, process, session, work);
            }
            Happening::Met { session, meeting, group } => self.met(session, meeting, &group),
            Happening::GivesUp { worker, process, session, meeting } => {
                self.gives_up(worker, process, session, meeting);
            }
            Happening::Appended { incarnation, run } => self.appended(incarnation, run),
            Happening::Committed { incarnation, run, name, state } => {
                self.committed(incarnation, run, name, state);
            }
            Happening::Read { session, place } => self.read(session, &place),
            Happening::Aborted { session } => self.aborted(session),
            Happening::Wakes { incarnation, run } => self.wakes(incarnation, run),
            Happening::Beats { worker, process } => self.beats(worker, process),
            Happening::Heard { worker, process, progress } => self.heard(worker, process, progress),
            Happening::Leases { incarnation } => self.leases(incarnation),
            Happening::Watches { watcher } => self.watches(watcher),
            Happening::Misfortune => self.misfortune(),
            Happening::Mends { one, other } => self.network.mend(one, other),
            Happening::StoreIsBack => self.store.is_down = false,
            Happening::WorkerStarts { worker } => self.worker_starts(worker),
            Happening::CoordinatorStarts => self.coordinator_starts(),
            Happening::CoordinatorDies => self.coordinator_dies(),
            Happening::Calm => self.calm(),
        }
    }

    fn beats(&mut self, worker: usize, process: u64) {
        let state = &self.workers[worker];
        if !state.is_up || state.process != process {
            return;
        }
        let progress = state.progress;
        if let Some(delay) = self.network.carry(Node::Worker(worker), Node::Coordinator, &mut self.chance) {
            self.after(delay, Happening::Heard { worker, process, progress });
        }
        self.after(SECOND, Happening::Beats { worker, process });
    }

    /// A watcher, which is cut off again and again, reads on from its revision.
    fn watches(&mut self, watcher: usize) {
        let most = 1 + self.chance.index(20);
        if self.coordinator.is_some() && !self.chance.happens(0.2) {
            let watcher = &mut self.watchers[watcher];
            watcher.catch_up(&self.store.logs[watcher.run], most);
        }
        let delay = self.chance.between(SECOND / 10, 3 * SECOND);
        self.after(delay, Happening::Watches { watcher });
    }
}
