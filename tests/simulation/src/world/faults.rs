//! What goes wrong, and how it comes right again.

use super::{Happening, World};
use crate::coordinator::run_id;
use crate::network::Node;
use crate::scenario::{MILLISECOND, SECOND};
use pruning_run::{Event, RunState};

/// Everything that can go wrong, or be asked for at a bad time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Misfortune {
    WorkerDies,
    WorkerHangs,
    CoordinatorDies,
    CoordinatorIsAskedToEnd,
    ControlLinkCut,
    DataLinkCut,
    SlowLink,
    StoreDown,
    LossIsNotANumber,
    FileDamaged,
    Pause,
    Resume,
    Yield,
    Cancel,
}

/// Each as often as it is listed.
const MISFORTUNES: [Misfortune; 24] = {
    use Misfortune::{
        Cancel, ControlLinkCut, CoordinatorDies, CoordinatorIsAskedToEnd, DataLinkCut, FileDamaged,
        LossIsNotANumber, Pause, Resume, SlowLink, StoreDown, WorkerDies, WorkerHangs, Yield,
    };
    [
        WorkerDies,
        WorkerDies,
        WorkerDies,
        WorkerHangs,
        CoordinatorDies,
        CoordinatorDies,
        CoordinatorDies,
        CoordinatorIsAskedToEnd,
        ControlLinkCut,
        ControlLinkCut,
        DataLinkCut,
        DataLinkCut,
        SlowLink,
        SlowLink,
        StoreDown,
        LossIsNotANumber,
        LossIsNotANumber,
        FileDamaged,
        Pause,
        Pause,
        Resume,
        Resume,
        Yield,
        Cancel,
    ]
};

impl World {
    pub(super) fn misfortune(&mut self) {
        if self.is_calm {
            return;
        }
        let interval = self.scenario.fault_interval;
        let next = self.chance.between(interval / 10, 2 * interval);
        self.after(next, Happening::Misfortune);
        let kind = MISFORTUNES[self.chance.index(MISFORTUNES.len())];
        // An end that is asked for is rare, so that most runs get to theirs.
        if kind == Misfortune::Cancel && self.chance.happens(0.7) {
            return;
        }
        self.checks.misfortunes += 1;
        self.note(|| format!("--- {kind:?}"));
        let worker = self.chance.index(self.workers.len());
        let other = self.chance.index(self.workers.len());
        let run = self.chance.index(self.scenario.plans.len());
        let lasts = self.chance.between(200 * MILLISECOND, 12 * SECOND);
        let reason = "asked".to_owned();
        match kind {
            Misfortune::WorkerDies => self.worker_dies(worker, lasts),
            Misfortune::WorkerHangs => self.workers[worker].is_stuck = true,
            Misfortune::CoordinatorDies => {
                self.coordinator_dies();
                self.after(lasts, Happening::CoordinatorStarts);
            }
            Misfortune::CoordinatorIsAskedToEnd => {
                for run in 0..self.scenario.plans.len() {
                    self.tell(run, Event::YieldRequested { reason: reason.clone(), requeue: false });
                }
                let grace = self.chance.between(0, 8 * SECOND);
                self.after(grace, Happening::CoordinatorDies);
                self.after(grace + lasts, Happening::CoordinatorStarts);
            }
            Misfortune::ControlLinkCut => self.cut(Node::Coordinator, Node::Worker(worker), lasts),
            Misfortune::DataLinkCut if worker != other => {
                self.cut(Node::Worker(other), Node::Worker(worker), lasts)
            }
            Misfortune::DataLinkCut => {}
            Misfortune::SlowLink => {
                let end = if worker == other { Node::Coordinator } else { Node::Worker(other) };
                let factor = self.chance.between(2, 50);
                self.network.slow(end, Node::Worker(worker), factor);
                self.after(lasts, Happening::Mends { one: end, other: Node::Worker(worker) });
            }
            Misfortune::StoreDown => {
                self.store.is_down = true;
                self.after(lasts, Happening::StoreIsBack);
            }
            Misfortune::LossIsNotANumber => self.workers[worker].glitches = true,
            Misfortune::FileDamaged => self.damage(run),
            Misfortune::Pause => {
                self.tell(run, Event::PauseRequested { reason });
                self.note(|| format!("{} is asked to pause", run_id(run)));
            }
            Misfortune::Resume => self.tell(run, Event::ResumeRequested { reason }),
            Misfortune::Yield => self.tell(run, Event::YieldRequested { reason, requeue: true }),
            Misfortune::Cancel => {
                let discard = self.chance.happens(0.5);
                self.tell(run, Event::CancelRequested { reason, discard });
            }
        }
    }

    fn cut(&mut self, one: Node, other: Node, lasts: u64) {
        self.network.cut(one, other);
        self.after(lasts, Happening::Mends { one, other });
    }

    pub fn worker_dies(&mut self, worker: usize, comes_back_after: u64) {
        let state = &mut self.workers[worker];
        if !state.is_up {
            return;
        }
        state.is_up = false;
        state.process += 1;
        let held = state.held.take();
        self.copies.retain(|(of, _, _), _| *of != worker);
        if let Some(held) = held {
            self.peers_see_the_death_of(worker, held.session, &held.group);
        }
        let is_reached = self.network.is_up(Node::Coordinator, Node::Worker(worker));
        let delay = if is_reached { 20 * MILLISECOND } else { 4 * SECOND };
        let of_it: Vec<u64> =
            self.calls.iter().filter(|(_, open)| open.worker == worker).map(|(call, _)| *call).collect();
        of_it.into_iter().for_each(|call| self.break_call(call, delay, "connection reset"));
        self.after(comes_back_after, Happening::WorkerStarts { worker });
    }

    pub(super) fn worker_starts(&mut self, worker: usize) {
        let state = &mut self.workers[worker];
        if state.is_up {
            return;
        }
        state.process += 1;
        (state.is_up, state.is_stuck, state.glitches) = (true, false, false);
        let process = state.process;
        self.after(0, Happening::Beats { worker, process });
    }

    /// A bit of the newest checkpoint flips, where there is an older one to go back to.
    fn damage(&mut self, run: usize) {
        let mut of_run =
            self.store.manifests.keys().filter(|(of, _)| *of == run).map(|(_, name)| name.clone());
        let (first, last) = (of_run.next(), of_run.next_back());
        if let (Some(_), Some(name)) = (first, last)
            && let Some(file) = self.store.files.get_mut(&(run, name, 0))
        {
            file.trajectory ^= 1;
        }
    }

    /// Nothing goes wrong any more, and who waits to be asked on is asked on.
    pub(super) fn calm(&mut self) {
        self.is_calm = true;
        self.network.heal();
        self.store.is_down = false;
        for worker in 0..self.workers.len() {
            if self.workers[worker].is_stuck {
                self.worker_dies(worker, SECOND);
            }
        }
        self.after(0, Happening::CoordinatorStarts);
        for run in 0..self.scenario.plans.len() {
            let paused = crate::checks::last_state(&self.store.logs[run])
                .is_some_and(|state| matches!(state, RunState::Paused | RunState::Pausing));
            if paused {
                self.tell(run, Event::ResumeRequested { reason: "asked".into() });
            }
        }
        // Who was to end, as asked, starts again.
        if self.coordinator.as_ref().is_some_and(|it| it.drivers.values().any(|driver| driver.run.rests())) {
            self.coordinator_dies();
            self.after(SECOND, Happening::CoordinatorStarts);
        }
        if !self.has_settled() {
            self.after(20 * SECOND, Happening::Calm);
        }
    }
}
