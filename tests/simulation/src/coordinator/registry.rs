//! Who is there, who moves, and who is next in the queue.

use super::run_id;
use crate::scenario::{SECOND, Time};
use crate::world::{Happening, World};
use pruning_run::{Event, WorkerId};

/// A worker that has not been heard of for so long is lost.
const LEASE: Time = 4 * SECOND;
/// One that is called and does not move for so long is stuck.
const STUCK_AFTER: Time = 10 * SECOND;
/// How long a run that may do with fewer workers waits for more.
const WAITS_FOR_MORE: Time = 5 * SECOND;

#[derive(Debug, Clone)]
pub struct Entry {
    pub process: u64,
    seen: Time,
    progress: u64,
    moved: Time,
}

#[derive(Debug, Clone)]
pub struct Queued {
    pub run: usize,
    workers: usize,
    at_least: usize,
    since: Time,
}

fn worker_id(worker: usize) -> WorkerId {
    WorkerId(format!("w{worker}"))
}

impl World {
    pub(super) fn enqueue(&mut self, run: usize, workers: usize, at_least: usize) {
        let since = self.now;
        let Some(coordinator) = &mut self.coordinator else { return };
        if coordinator.queue.iter().any(|queued| queued.run == run)
            || coordinator.claims.values().any(|of| *of == run)
        {
            return self.violation(format!("run {run} queues while it queues or holds workers"));
        }
        coordinator.queue.push(Queued { run, workers, at_least, since });
        self.assign();
    }

    /// Drops a run from the queue, and a group that it was given but has not heard of.
    pub(super) fn leave_queue(&mut self, run: usize) {
        let Some(coordinator) = &mut self.coordinator else { return };
        coordinator.queue.retain(|queued| queued.run != run);
        let Some(driver) = coordinator.drivers.get_mut(&run) else { return };
        let unheard = driver.inbox.iter().any(|event| matches!(event, Event::WorkersAssigned { .. }));
        driver.inbox.retain(|event| !matches!(event, Event::WorkersAssigned { .. }));
        if unheard {
            self.release(run, 0);
        }
    }

    pub(super) fn release(&mut self, run: usize, but: usize) {
        let Some(coordinator) = &mut self.coordinator else { return };
        let Some(driver) = coordinator.drivers.get_mut(&run) else { return };
        for worker in driver.workers.drain(but.min(driver.workers.len())..) {
            coordinator.claims.remove(&worker);
        }
        self.assign();
    }

    /// Gives the first in the queue a whole group, or nothing.
    fn assign(&mut self) {
        loop {
            let now = self.now;
            let Some(coordinator) = &mut self.coordinator else { return };
            let idle: Vec<usize> = coordinator
                .registry
                .keys()
                .copied()
                .filter(|worker| !coordinator.claims.contains_key(worker))
                .collect();
            let Some(first) = coordinator.queue.first() else { return };
            let enough = idle.len() >= first.workers
                || (idle.len() >= first.at_least && now >= first.since + WAITS_FOR_MORE);
            if !enough {
                let registered = coordinator.registry.len();
                let waiting: Vec<usize> = coordinator.queue.iter().map(|queued| queued.run).collect();
                for (ahead, run) in waiting.into_iter().enumerate() {
                    let short = Event::WorkersShort { idle: idle.len(), registered, ahead };
                    if let Some(driver) = self.driver(run) {
                        driver.inbox.push_back(short);
                    }
                    self.after(0, Happening::Drives { run });
                }
                return;
            }
            let Queued { run, workers, .. } = coordinator.queue.remove(0);
            let group: Vec<usize> = idle.into_iter().take(workers).collect();
            let names = group.iter().map(|&worker| worker_id(worker)).collect();
            coordinator.last_epoch += 1;
            let epoch = coordinator.last_epoch;
            for &worker in &group {
                if let Some(other) = coordinator.claims.insert(worker, run) {
                    return self.violation(format!("worker {worker} is claimed by runs {other} and {run}"));
                }
            }
            if let Some(driver) = coordinator.drivers.get_mut(&run) {
                (driver.workers, driver.epoch) = (group, epoch);
                driver.inbox.push_back(Event::WorkersAssigned { workers: names });
            }
            self.after(0, Happening::Drives { run });
        }
    }

    /// A heartbeat has come through.
    pub fn heard(&mut self, worker: usize, process: u64, progress: u64) {
        let now = self.now;
        let Some(coordinator) = &mut self.coordinator else { return };
        if coordinator.banned.contains(&(worker, process)) {
            // A process that was only slow hears of it, ends and comes back as another.
            if self.workers[worker].process == process && !self.workers[worker].is_stuck {
                self.worker_dies(worker, SECOND);
            }
            return;
        }
        match coordinator.registry.get_mut(&worker) {
            Some(entry) if entry.process == process => {
                entry.seen = now;
                if entry.progress != progress {
                    (entry.progress, entry.moved) = (progress, now);
                }
            }
            Some(entry) if entry.process > process => {}
            Some(_) => {
                self.lose(worker, "it has come back as another process");
                self.heard(worker, process, progress);
            }
            None => {
                coordinator.registry.insert(worker, Entry { process, seen: now, progress, moved: now });
                self.assign();
            }
        }
    }

    fn lose(&mut self, worker: usize, cause: &str) {
        let Some(coordinator) = &mut self.coordinator else { return };
        coordinator.registry.remove(&worker);
        if let Some(&run) = coordinator.claims.get(&worker) {
            self.tell(run, Event::WorkerLost { worker: worker_id(worker), cause: cause.into() });
        }
    }

    /// Looks through leases and for ranks that do not move.
    pub fn leases(&mut self, incarnation: u64) {
        let now = self.now;
        let Some(coordinator) = self.coordinator.as_ref().filter(|it| it.incarnation == incarnation) else {
            return;
        };
        let expired: Vec<usize> = coordinator
            .registry
            .iter()
            .filter(|(_, entry)| now > entry.seen + LEASE)
            .map(|(worker, _)| *worker)
            .collect();
        expired.into_iter().for_each(|worker| self.lose(worker, "its lease ran out"));
        let runs: Vec<usize> = self.scenario.plans.iter().enumerate().map(|(run, _)| run).collect();
        for run in runs {
            if let Some((worker, process)) = self.stuck(run) {
                if let Some(coordinator) = &mut self.coordinator {
                    coordinator.banned.insert((worker, process));
                }
                self.note(|| format!("{} looks stuck to {}", worker_id(worker), run_id(run)));
                self.lose(worker, "it makes no progress");
            }
        }
        self.assign();
        self.after(SECOND, Happening::Leases { incarnation });
    }

    /// Of a run's ranks that are called, the one that has not moved for longest, if that is too long.
    fn stuck(&self, run: usize) -> Option<(usize, u64)> {
        let coordinator = self.coordinator.as_ref()?;
        let called = self.calls.values().filter(|open| open.session.run == run);
        let (moved, worker, process) = called
            .filter_map(|open| {
                let entry = coordinator.registry.get(&open.worker)?;
                Some((entry.moved.max(open.since), open.worker, entry.process))
            })
            .min()?;
        (self.now > moved + STUCK_AFTER).then_some((worker, process))
    }
}
