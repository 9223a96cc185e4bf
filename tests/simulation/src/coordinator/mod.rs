//! The coordinator: `pruning_run::transition` with a driver around it, a registry with leases and a queue. All of it is
//! lost in a crash; the next one knows what the store holds.

mod effects;
mod registry;

use crate::scenario::Time;
use crate::world::{Happening, World};
use pruning_run::{Effect, Event, History, Run, RunEvent, RunId, RunState, transition};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::{Duration, SystemTime};

pub use registry::{Entry, Queued};

/// Names the calls that belong together: those to one group between two ends of its sessions. Later ones are greater.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Session {
    pub incarnation: u64,
    pub epoch: u64,
    pub run: usize,
}

#[derive(Debug, Clone, Default)]
pub struct Coordinator {
    pub incarnation: u64,
    pub drivers: BTreeMap<usize, Driver>,
    pub last_epoch: u64,
    /// By worker.
    pub registry: BTreeMap<usize, Entry>,
    /// Workers that runs hold.
    pub claims: BTreeMap<usize, usize>,
    pub queue: Vec<Queued>,
    /// Processes that were found stuck.
    pub banned: BTreeSet<(usize, u64)>,
}

/// What drives one run: one event after the other, and no effect before what it records is stored.
#[derive(Debug, Clone)]
pub struct Driver {
    pub run: Run,
    pub epoch: u64,
    /// By rank.
    pub workers: Vec<usize>,
    pub inbox: VecDeque<Event>,
    /// Effects still to be performed, in order.
    pending: VecDeque<Effect>,
    /// Events on their way to the store.
    appending: Option<Vec<RunEvent>>,
    /// What someone asked for, whom it has yet to be confirmed to.
    asked: Option<Event>,
    refused: bool,
}

impl Driver {
    fn new(run: Run, effects: Vec<Effect>) -> Self {
        Self {
            run,
            epoch: 0,
            workers: Vec::new(),
            inbox: VecDeque::new(),
            pending: effects.into(),
            appending: None,
            asked: None,
            refused: false,
        }
    }
}

/// The time that a run sees.
#[must_use]
pub fn clock(now: Time) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_micros(now)
}

#[must_use]
pub fn run_id(run: usize) -> RunId {
    RunId(format!("run-{run}"))
}

impl World {
    /// A coordinator starts, and takes up every run that the store knows.
    pub fn coordinator_starts(&mut self) {
        if self.coordinator.is_some() {
            return;
        }
        self.incarnation += 1;
        let mut coordinator = Coordinator { incarnation: self.incarnation, ..Coordinator::default() };
        for (run, log) in self.store.logs.iter().enumerate().filter(|(_, log)| !log.is_empty()) {
            let mut history = History::default();
            log.iter().for_each(|event| history.take_in(event));
            let setup = self.scenario.plans[run].setup.clone();
            let (state, effects) = Run::resumed(run_id(run), setup, None, history, clock(self.now));
            coordinator.drivers.insert(run, Driver::new(state, effects));
        }
        let runs: Vec<usize> = coordinator.drivers.keys().copied().collect();
        self.coordinator = Some(coordinator);
        self.after(1, Happening::Leases { incarnation: self.incarnation });
        runs.into_iter().for_each(|run| self.drive(run));
    }

    /// The coordinator's process dies. What it was storing may or may not be stored.
    pub fn coordinator_dies(&mut self) {
        let Some(coordinator) = self.coordinator.take() else { return };
        self.calls.clear();
        for (run, driver) in coordinator.drivers {
            if let Some(events) = driver.appending
                && !self.store.is_down
                && self.chance.happens(0.5)
            {
                self.store_events(run, events);
            }
        }
    }

    /// Someone creates a run, and tries again until it is stored.
    pub fn create(&mut self, run: usize) {
        if !self.store.logs[run].is_empty() {
            return;
        }
        self.after(2_000_000, Happening::Create { run });
        let now = clock(self.now);
        let setup = self.scenario.plans[run].setup.clone();
        let Some(coordinator) = self.coordinator.as_mut().filter(|it| !it.drivers.contains_key(&run)) else {
            return;
        };
        let (state, effects) = Run::new(run_id(run), setup, None, now);
        coordinator.drivers.insert(run, Driver::new(state, effects));
        self.drive(run);
    }

    /// Lets a run's driver see an event.
    pub fn tell(&mut self, run: usize, event: Event) {
        if let Some(driver) = self.driver(run) {
            driver.inbox.push_back(event);
            self.drive(run);
        }
    }

    pub fn driver(&mut self, run: usize) -> Option<&mut Driver> {
        self.coordinator.as_mut()?.drivers.get_mut(&run)
    }

    /// Performs what is due, up to the next write to the store.
    pub fn drive(&mut self, run: usize) {
        let now = clock(self.now);
        loop {
            let Some(driver) = self.driver(run) else { return };
            if driver.appending.is_some() {
                return;
            }
            if let Some(effect) = driver.pending.pop_front() {
                if let Effect::Record(event) = effect {
                    let mut events = vec![event];
                    while let Some(Effect::Record(_) | Effect::KeepImportance { .. }) = driver.pending.front()
                    {
                        if let Some(Effect::Record(event)) = driver.pending.pop_front() {
                            events.push(event);
                        }
                    }
                    driver.appending = Some(events);
                    self.append(run);
                } else {
                    driver.refused |= matches!(effect, Effect::Refuse(_));
                    self.perform(run, effect);
                }
                continue;
            }
            if let Some(asked) = driver.asked.take() {
                let refused = std::mem::take(&mut driver.refused);
                self.confirm(run, &asked, refused);
                continue;
            }
            let Some(event) = driver.inbox.pop_front() else { return };
            if matches!(
                event,
                Event::CancelRequested { .. } | Event::PauseRequested { .. } | Event::ResumeRequested { .. }
            ) {
                driver.asked = Some(event.clone());
                driver.refused = false;
            }
            let had_ended = driver.run.state().has_ended();
            let (state, effects) = transition(driver.run.clone(), event, now);
            driver.run = state;
            driver.pending = effects.into();
            if had_ended && !driver.pending.is_empty() {
                return self.violation(format!("run {run}: something happens after the end"));
            }
            self.transitions += 1;
        }
    }

    fn append(&mut self, run: usize) {
        let time = if self.chance.happens(0.7) { 0 } else { self.chance.between(1, 20_000) };
        let incarnation = self.incarnation;
        if time == 0 && !self.store.is_down {
            self.acknowledge(run);
        } else {
            self.after(time, Happening::Appended { incarnation, run });
        }
    }

    /// The store has answered; while it is down it is asked again.
    pub fn appended(&mut self, incarnation: u64, run: usize) {
        if incarnation != self.incarnation {
            return;
        }
        if self.store.is_down {
            return self.after(500_000, Happening::Appended { incarnation, run });
        }
        self.acknowledge(run);
        self.drive(run);
    }

    fn acknowledge(&mut self, run: usize) {
        let Some(events) = self.driver(run).and_then(|driver| driver.appending.take()) else { return };
        let published = events.last().map_or(0, |event| event.revision);
        self.store_events(run, events);
        self.checks.published(run, published);
    }

    fn store_events(&mut self, run: usize, events: Vec<RunEvent>) {
        for event in events {
            if let Err(broken) = self.checks.stored(run, &self.store.logs[run], &event) {
                return self.violation(format!("run {run}: {broken}"));
            }
            self.store.logs[run].push(event);
        }
    }

    /// Who asked for something is told that it is so: whatever dies from now on, it stays so.
    fn confirm(&mut self, run: usize, asked: &Event, refused: bool) {
        if refused {
            return;
        }
        let mut history = History::default();
        self.store.logs[run].iter().for_each(|event| history.take_in(event));
        let setup = self.scenario.plans[run].setup.clone();
        let (after_a_crash, _) = Run::resumed(run_id(run), setup, None, history, clock(self.now));
        let state = after_a_crash.state();
        let is_so = if let Event::CancelRequested { .. } = asked {
            state.has_ended()
        } else if let Event::PauseRequested { .. } = asked {
            state.has_ended() || state == RunState::Paused
        } else {
            state != RunState::Paused
        };
        if !is_so {
            self.violation(format!(
                "run {run}: {asked:?} was confirmed, but a crash now would leave it {state:?}"
            ));
        }
        if state == RunState::Cancelled {
            self.checks.cancelled.insert(run);
        }
    }
}
