//! A client that follows a run from revision to revision.

use pruning_run::RunEvent;

#[derive(Debug, Clone)]
pub struct Watcher {
    pub run: usize,
    seen: Vec<RunEvent>,
    /// A revision that did not follow the one before.
    out_of_order: Option<u64>,
}

impl Watcher {
    #[must_use]
    pub fn of(run: usize) -> Self {
        Self { run, seen: Vec::new(), out_of_order: None }
    }

    /// Reads at most so many of the events after the last one seen.
    pub fn catch_up(&mut self, log: &[RunEvent], most: usize) {
        let last = self.seen.last().map_or(0, |event| event.revision);
        for event in log.iter().filter(|event| event.revision > last).take(most) {
            if event.revision != self.seen.len() as u64 + 1 {
                self.out_of_order.get_or_insert(event.revision);
            }
            self.seen.push(event.clone());
        }
    }

    /// What was lost, doubled or changed after it had been seen.
    #[must_use]
    pub fn differs_from(&self, log: &[RunEvent]) -> Option<String> {
        let run = self.run;
        if let Some(revision) = self.out_of_order {
            return Some(format!("run {run}: a watcher saw revision {revision} out of order"));
        }
        // By their text, since a skipped step's loss is not a number.
        let same = self.seen.len() == log.len()
            && self.seen.iter().zip(log).all(|(seen, stored)| format!("{seen:?}") == format!("{stored:?}"));
        (!same).then(|| format!("run {run}: a watcher saw other events than are stored"))
    }
}
