//! Performing a run's effects.

use super::{Session, run_id};
use crate::network::Node;
use crate::scenario::{MILLISECOND, SECOND};
use crate::workers::Call;
use crate::world::{Happening, World};
use pruning_run::{Effect, Event};
use std::sync::Arc;
use std::time::SystemTime;

impl World {
    pub(super) fn perform(&mut self, run: usize, effect: Effect) {
        match effect {
            // Stored by the driver.
            Effect::Record(_) | Effect::KeepImportance { .. } => {}
            Effect::Enqueue { workers, at_least } => self.enqueue(run, workers, at_least),
            Effect::LeaveQueue => self.leave_queue(run),
            Effect::Restore(place) => {
                let session = self.session(run);
                let delay = self.chance.between(10 * MILLISECOND, SECOND);
                self.after(delay, Happening::Read { session, place });
            }
            Effect::Load { restore } => {
                let group = self.group(run);
                self.call_all(run, |tp_rank| Call::Load {
                    tp_rank,
                    group: group.clone(),
                    restore: restore.clone(),
                });
            }
            Effect::OpenRendezvous => self.call_first(run, Call::OpenRendezvous),
            Effect::JoinGroup { .. } => self.call_all(run, |_| Call::Join),
            Effect::Evaluate(measurement) => self.call_all(run, |_| Call::Evaluate(measurement)),
            Effect::Train { first_step: step, end_step, generation } => {
                self.call_all(run, |_| Call::Train { step, end_step, generation });
            }
            Effect::Calibrate { generation } => {
                self.call_all(run, |_| Call::Calibrate { generation });
            }
            Effect::ApplyMask { generation, keep_mask } => {
                self.call_all(run, |_| Call::ApplyMask { generation, keep_mask: Arc::clone(&keep_mask) });
            }
            Effect::Checkpoint { name, .. } => {
                self.call_all(run, |_| Call::Checkpoint { name: name.clone() })
            }
            Effect::Commit { name, state } => {
                let incarnation = self.incarnation;
                let delay = self.chance.between(5 * MILLISECOND, 2 * SECOND);
                self.after(delay, Happening::Committed { incarnation, run, name, state });
            }
            Effect::Retain(kept) => {
                let of_run = self.store.manifests.keys().filter(|(of, _)| *of == run);
                let gone: Vec<String> = of_run
                    .map(|(_, name)| name.clone())
                    .filter(|name| {
                        !kept.iter().any(|place| place.run_id == run_id(run) && place.name == *name)
                    })
                    .collect();
                gone.iter().for_each(|name| self.store.remove(run, name));
            }
            Effect::AbortSessions => self.abort(run),
            Effect::ReleaseWorkers => self.release(run, 0),
            Effect::ReleaseAllButFirst => self.release(run, 1),
            Effect::Export { checkpoint, shards, keep_mask } => {
                self.call_first(run, Call::Export { checkpoint, shards, keep_mask });
            }
            Effect::WakeAt(time) => {
                let due = time.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_micros());
                self.at(due as u64, Happening::Wakes { incarnation: self.incarnation, run });
            }
            Effect::Refuse(refusal) => self.note(|| format!("run {run} refuses: {refusal}")),
        }
    }

    fn session(&mut self, run: usize) -> Session {
        let epoch = self.driver(run).map_or(0, |driver| driver.epoch);
        Session { incarnation: self.incarnation, epoch, run }
    }

    fn group(&mut self, run: usize) -> Vec<usize> {
        self.driver(run).map(|driver| driver.workers.clone()).unwrap_or_default()
    }

    fn call_all(&mut self, run: usize, what: impl Fn(usize) -> Call) {
        let session = self.session(run);
        for (tp_rank, worker) in self.group(run).into_iter().enumerate() {
            self.call(session, tp_rank, worker, what(tp_rank));
        }
    }

    fn call_first(&mut self, run: usize, what: Call) {
        let session = self.session(run);
        if let Some(&worker) = self.group(run).first() {
            self.call(session, 0, worker, what);
        }
    }

    /// Drops every call in flight, tells the workers, and says when that is done.
    fn abort(&mut self, run: usize) {
        let old = self.session(run);
        self.calls.retain(|_, open| open.session.run != run);
        let group = self.group(run);
        for &worker in &group {
            self.call(old, 0, worker, Call::Abort);
        }
        let reached = group.iter().all(|&worker| {
            self.network.is_up(Node::Coordinator, Node::Worker(worker)) && self.workers[worker].is_up
        });
        let Some(coordinator) = &mut self.coordinator else { return };
        coordinator.last_epoch += 1;
        let epoch = coordinator.last_epoch;
        if let Some(driver) = coordinator.drivers.get_mut(&run) {
            driver.epoch = epoch;
            // What had arrived but was not yet looked at came from calls that are dropped now.
            driver.inbox.retain(|event| !is_from_a_call(event));
        }
        let delay =
            if reached { self.chance.between(20 * MILLISECOND, 200 * MILLISECOND) } else { 2 * SECOND };
        let session = Session { epoch, ..old };
        self.after(delay, Happening::Aborted { session });
    }

    /// A checkpoint was read back.
    pub fn read(&mut self, session: Session, place: &pruning_run::CheckpointRef) {
        if self.session(session.run) != session {
            return;
        }
        let from = self.run_named(&place.run_id);
        let event = if self.store.is_down {
            Event::RestoreFailed { cause: "the store does not answer".into(), damaged: false }
        } else {
            match self.store.read(from, &place.name) {
                Ok(state) => Event::Restored { state },
                Err(cause) => Event::RestoreFailed { cause, damaged: true },
            }
        };
        self.tell(session.run, event);
    }

    /// The manifest is written, or is not.
    pub fn committed(
        &mut self,
        incarnation: u64,
        run: usize,
        name: String,
        state: Arc<pruning_run::SavedState>,
    ) {
        // The process that wrote it may have died before, or right after.
        if incarnation != self.incarnation || self.coordinator.is_none() {
            return;
        }
        if self.store.is_down || self.chance.happens(self.network.loss * 5.0) {
            let cause = "the store does not answer".into();
            return self.tell(run, Event::CheckpointFailed { name, cause });
        }
        if self.store.manifests.insert((run, name.clone()), state).is_some() {
            return self.violation(format!("run {run}: two checkpoints are called {name}"));
        }
        self.tell(run, Event::CheckpointWritten { name, size_bytes: 1 });
    }

    pub fn aborted(&mut self, session: Session) {
        if self.session(session.run) == session {
            self.tell(session.run, Event::SessionsAborted);
        }
    }

    pub fn wakes(&mut self, incarnation: u64, run: usize) {
        if incarnation == self.incarnation {
            self.tell(run, Event::Woken);
        }
    }

    /// An answer reaches the coordinator, or the news that none will come.
    pub fn answered(&mut self, call: u64, events: Vec<Event>, ends: bool) {
        let Some(open) = self.calls.get(&call) else { return };
        let session = open.session;
        if ends {
            self.calls.remove(&call);
        }
        for event in events {
            if let Event::Snapshotted { name, .. } = &event
                && let Some(open) = self.calls.get_mut(&call)
            {
                open.writes = Some(name.clone());
            }
            if self.session(session.run) == session {
                self.tell(session.run, event);
            }
        }
    }

    pub fn broken(&mut self, call: u64, cause: &'static str) {
        let Some(open) = self.calls.remove(&call) else { return };
        if self.session(open.session.run) != open.session {
            return;
        }
        let event = match open.writes {
            Some(name) => Event::CheckpointFailed { name, cause: cause.into() },
            None => Event::RankFailed { tp_rank: open.tp_rank, fault: pruning_run::Fault::Own(cause.into()) },
        };
        self.tell(open.session.run, event);
    }
}

fn is_from_a_call(event: &Event) -> bool {
    !matches!(
        event,
        Event::CheckpointWritten { .. }
            | Event::CheckpointFailed { .. }
            | Event::WorkerLost { .. }
            | Event::CancelRequested { .. }
            | Event::PauseRequested { .. }
            | Event::ResumeRequested { .. }
            | Event::YieldRequested { .. }
            | Event::WorkersShort { .. }
            | Event::WorkersAssigned { .. }
            | Event::CoordinatorFailed { .. }
            | Event::Woken
    )
}
