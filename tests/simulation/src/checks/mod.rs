//! The laws: what must hold after every event, and what must have come of it in the end.

mod watcher;

pub use watcher::Watcher;

use crate::scenario::Scenario;
use crate::store::Store;
use crate::workers::digest;
use crate::world::Outcome;
use pruning::KeepMask;
use pruning_run::{GuardAction, RunEvent, RunEventKind, RunState};
use std::collections::{BTreeMap, BTreeSet};

/// What a run comes to when nothing goes wrong.
#[derive(Debug, Clone, Default)]
pub struct Expected {
    /// Bits of the last loss of each step; NaN where it was skipped.
    losses: BTreeMap<u64, u64>,
    /// Hashes of masks by generation.
    masks: Vec<u64>,
    exported: Option<String>,
    state: Option<RunState>,
}

impl Expected {
    #[must_use]
    pub fn of(log: &[RunEvent]) -> Self {
        let mut it = Self::default();
        for event in log {
            match &event.kind {
                RunEventKind::StateChange { state, .. } => it.state = Some(*state),
                RunEventKind::Step(report) => {
                    it.losses.insert(report.step, report.loss.to_bits());
                }
                RunEventKind::Decision(decision) => it.masks.push(digest(&decision.keep_mask)),
                RunEventKind::Export(export) => it.exported = Some(export.manifest_sha256.clone()),
                RunEventKind::Evaluation(_)
                | RunEventKind::Task(_)
                | RunEventKind::Checkpoint(_)
                | RunEventKind::Restart(_)
                | RunEventKind::Guard(_)
                | RunEventKind::Calibration(_) => {}
            }
        }
        it
    }
}

/// The state that a log ends with.
#[must_use]
pub fn last_state(log: &[RunEvent]) -> Option<RunState> {
    log.iter().rev().find_map(|event| match &event.kind {
        RunEventKind::StateChange { state, .. } => Some(*state),
        RunEventKind::Step(_)
        | RunEventKind::Decision(_)
        | RunEventKind::Evaluation(_)
        | RunEventKind::Task(_)
        | RunEventKind::Export(_)
        | RunEventKind::Checkpoint(_)
        | RunEventKind::Restart(_)
        | RunEventKind::Guard(_)
        | RunEventKind::Calibration(_) => None,
    })
}

#[derive(Debug, Clone, Default)]
pub struct Checks {
    /// By run; absent while it is found out.
    expected: Option<Vec<Expected>>,
    /// Runs whose steps are repeated under another mask when the guard goes back.
    reverts: Vec<bool>,
    /// Last mask decided, by run.
    masks: Vec<Option<KeepMask>>,
    /// Revisions that someone may have seen.
    published: Vec<u64>,
    max_restarts: Vec<u32>,
    /// Restarts in a row, within one coordinator's life.
    restarts_in_a_row: Vec<u32>,
    /// Runs whose cancellation was confirmed.
    pub cancelled: BTreeSet<usize>,
    pub misfortunes: u64,
}

impl Checks {
    #[must_use]
    pub fn new(scenario: &Scenario, expected: Option<Vec<Expected>>) -> Self {
        let runs = scenario.plans.len();
        let options = || scenario.plans.iter().map(|plan| plan.setup.options());
        Self {
            expected,
            reverts: options()
                .map(|options| options.guard.is_some_and(|guard| guard.action == GuardAction::Revert))
                .collect(),
            masks: vec![None; runs],
            published: vec![0; runs],
            max_restarts: options().map(|options| options.max_restarts).collect(),
            restarts_in_a_row: vec![0; runs],
            ..Self::default()
        }
    }

    pub fn published(&mut self, run: usize, revision: u64) {
        self.published[run] = self.published[run].max(revision);
    }

    /// Looks at an event that follows `log`.
    ///
    /// # Errors
    /// Which law it breaks.
    pub fn stored(&mut self, run: usize, log: &[RunEvent], event: &RunEvent) -> Result<(), String> {
        if event.revision != log.len() as u64 + 1 {
            return Err(format!("revision {} follows {}", event.revision, log.len()));
        }
        if last_state(log).is_some_and(RunState::has_ended) {
            return Err(format!("after the end comes {:?}", event.kind));
        }
        let expected = self.expected.as_ref().map(|all| &all[run]);
        match &event.kind {
            RunEventKind::StateChange { state, message } => {
                if message.is_empty() {
                    return Err(format!("{state:?} has no reason"));
                }
                if message.contains("started anew") {
                    self.restarts_in_a_row[run] = 0;
                }
            }
            RunEventKind::Step(report) => {
                let due = expected.filter(|_| !self.reverts[run]).map(|all| all.losses.get(&report.step));
                if due.is_some_and(|due| due != Some(&report.loss.to_bits())) {
                    return Err(format!("the loss of step {} is not the undisturbed run's", report.step));
                }
            }
            RunEventKind::Decision(decision) => {
                let place = decision.generation.0 as usize;
                if let Some(earlier) = &self.masks[run]
                    && decision.keep_mask.check_subset_of(earlier).is_err()
                {
                    return Err(format!("mask {place} keeps what the one before does not"));
                }
                let before =
                    log.iter().filter(|event| matches!(event.kind, RunEventKind::Decision(_))).count();
                if place != before + 1 {
                    return Err(format!("mask {place} is decided after {before} others"));
                }
                let due = expected.map(|all| all.masks.get(place - 1).copied());
                if due.is_some_and(|due| due != Some(digest(&decision.keep_mask))) {
                    return Err(format!("mask {place} is not the undisturbed run's"));
                }
                self.masks[run] = Some(decision.keep_mask.clone());
            }
            RunEventKind::Checkpoint(_) => self.restarts_in_a_row[run] = 0,
            RunEventKind::Restart(_) => {
                self.restarts_in_a_row[run] += 1;
                if self.restarts_in_a_row[run] > self.max_restarts[run] + 1 {
                    return Err("it restarts more often than it may".into());
                }
            }
            RunEventKind::Evaluation(_)
            | RunEventKind::Task(_)
            | RunEventKind::Export(_)
            | RunEventKind::Guard(_)
            | RunEventKind::Calibration(_) => {}
        }
        Ok(())
    }

    /// What is wrong with how it ended.
    #[must_use]
    pub fn at_the_end(&self, store: &Store) -> Option<String> {
        store.logs.iter().enumerate().find_map(|(run, log)| {
            if (log.len() as u64) < self.published[run] {
                return Some(format!(
                    "run {run}: of {} published events {} are left",
                    self.published[run],
                    log.len()
                ));
            }
            let actual = Expected::of(log);
            let expected = self.expected.as_ref().map(|all| &all[run])?;
            match actual.state {
                Some(RunState::Succeeded) if self.cancelled.contains(&run) => {
                    Some(format!("run {run}: it was cancelled, and succeeded"))
                }
                Some(RunState::Succeeded) => {
                    let differs = [
                        ("losses", actual.losses != expected.losses),
                        ("masks", actual.masks != expected.masks),
                        ("export", actual.exported != expected.exported),
                    ];
                    let what = differs.iter().find(|(_, differs)| *differs);
                    what.map(|(what, _)| format!("run {run}: its {what} are not the undisturbed run's"))
                }
                Some(RunState::Failed) => {
                    let cause = last_message(log);
                    let is_known =
                        ["did not help", "cannot be read", "was not written", "another digest", "is missing"]
                            .iter()
                            .any(|known| cause.contains(known));
                    (!is_known).then(|| format!("run {run}: it failed without a known cause: {cause}"))
                }
                Some(RunState::Cancelled) if self.cancelled.contains(&run) => None,
                other => Some(format!("run {run}: it ended {other:?}")),
            }
        })
    }

    #[must_use]
    pub fn outcome(&self, store: &Store) -> Outcome {
        let ended = |state| store.logs.iter().filter(|log| last_state(log) == Some(state)).count() as u64;
        let restarts =
            store.logs.iter().flatten().filter(|event| matches!(event.kind, RunEventKind::Restart(_)));
        Outcome {
            misfortunes: self.misfortunes,
            restarts: restarts.count() as u64,
            succeeded: ended(RunState::Succeeded),
            failed: ended(RunState::Failed),
            cancelled: ended(RunState::Cancelled),
            ..Outcome::default()
        }
    }
}

fn last_message(log: &[RunEvent]) -> &str {
    let message = |event: &'_ RunEvent| matches!(event.kind, RunEventKind::StateChange { .. });
    match log.iter().rev().find(|event| message(event)).map(|event| &event.kind) {
        Some(RunEventKind::StateChange { message, .. }) => message,
        Some(_) | None => "",
    }
}
