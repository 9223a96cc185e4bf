//! Which workers there are, which of them are idle, and who waits for them.

use crate::sync::lock;
use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};
use uuid::Uuid;
use wire::pb;

/// Most workers that may be registered at once.
const MAX_WORKERS: usize = 4096;

/// The workers with a live lease, and the queue for idle ones.
#[derive(Debug)]
pub(crate) struct Registry {
    inner: Mutex<Inner>,
    /// Counts the changes, for those who wait for one.
    changes: watch::Sender<u64>,
    lease: Duration,
}

#[derive(Debug, Default)]
struct Inner {
    /// By id, so that ranks are dealt out in a fixed order.
    workers: BTreeMap<String, Entry>,
    /// Tickets in the order in which they were drawn.
    queue: VecDeque<u64>,
    last_number: u64,
}

#[derive(Debug)]
struct Entry {
    info: pb::WorkerInfo,
    lease_id: String,
    expires: Instant,
    claim: Option<Held>,
}

/// A claim as the worker's entry knows it.
#[derive(Debug)]
struct Held {
    number: u64,
    run_id: String,
    lost: mpsc::UnboundedSender<LostWorker>,
}

/// A worker that went away while it was claimed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct LostWorker {
    pub(crate) id: String,
    pub(crate) cause: String,
}

/// Why a worker is not admitted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{MAX_WORKERS} workers are registered, which is the most allowed")]
pub(crate) struct RegistryFull;

/// Workers that are held for one run, by tensor-parallel rank. They are idle again when it is dropped.
#[derive(Debug)]
pub(crate) struct GroupClaim {
    registry: Arc<Registry>,
    number: u64,
    workers: Vec<pb::WorkerInfo>,
    lost: mpsc::UnboundedReceiver<LostWorker>,
}

/// A place in the queue. Dropping it leaves the queue.
#[derive(Debug)]
pub(crate) struct Ticket {
    registry: Arc<Registry>,
    number: u64,
    run_id: String,
    needed: usize,
    changes: watch::Receiver<u64>,
    told: Option<Standing>,
}

/// Why a ticket still waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Standing {
    pub(crate) idle: usize,
    pub(crate) registered: usize,
    /// Tickets before it.
    pub(crate) ahead: usize,
}

/// What became of waiting.
#[derive(Debug)]
pub(crate) enum Turn {
    Claimed(GroupClaim),
    /// Not yet; the figures differ from those last told.
    Waiting(Standing),
}

impl Registry {
    pub(crate) fn new(lease: Duration) -> Arc<Self> {
        Arc::new(Self { inner: Mutex::default(), changes: watch::Sender::new(0), lease })
    }

    pub(crate) fn lease(&self) -> Duration {
        self.lease
    }

    /// Admits a worker, in place of any earlier entry of its id, and returns its lease.
    pub(crate) fn register(&self, info: pb::WorkerInfo) -> Result<String, RegistryFull> {
        let lease_id = Uuid::new_v4().to_string();
        let mut inner = lock(&self.inner);
        if inner.workers.len() >= MAX_WORKERS && !inner.workers.contains_key(&info.id) {
            return Err(RegistryFull);
        }
        let mut claim = None;
        if let Some(earlier) = inner.workers.remove(&info.id) {
            if earlier.info.incarnation == info.incarnation {
                claim = earlier.claim;
            } else {
                earlier.tell_lost("it has restarted and lost its session");
            }
        }
        info!(worker_id = info.id, endpoint = info.endpoint, device = info.device, "worker registered");
        let expires = Instant::now() + self.lease;
        inner.workers.insert(info.id.clone(), Entry { info, lease_id: lease_id.clone(), expires, claim });
        drop(inner);
        self.note_change();
        Ok(lease_id)
    }

    /// Prolongs a lease; false when there is none of that name.
    pub(crate) fn renew(&self, lease_id: &str) -> bool {
        let mut inner = lock(&self.inner);
        let entry = inner.workers.values_mut().find(|entry| entry.lease_id == lease_id);
        let found = entry.is_some();
        if let Some(entry) = entry {
            entry.expires = Instant::now() + self.lease;
        }
        drop(inner);
        // The keeper of the leases may sleep for longer now, but never wakes too late: nothing to note.
        found
    }

    /// All workers, by id.
    pub(crate) fn list(&self) -> Vec<pb::Worker> {
        let (now, wall) = (Instant::now(), SystemTime::now());
        let inner = lock(&self.inner);
        let shown = |entry: &Entry| pb::Worker {
            info: Some(entry.info.clone()),
            run_id: entry.claim.as_ref().map(|claim| claim.run_id.clone()).unwrap_or_default(),
            lease_expire_time: Some(wire::convert::time::time_to_pb(
                wall + entry.expires.saturating_duration_since(now),
            )),
        };
        inner.workers.values().map(shown).collect()
    }

    /// How many workers are registered.
    pub(crate) fn count(&self) -> usize {
        lock(&self.inner).workers.len()
    }

    /// Draws a place at the end of the queue.
    pub(crate) fn enqueue(self: &Arc<Self>, run_id: &str, needed: usize) -> Ticket {
        let mut inner = lock(&self.inner);
        let number = inner.next_number();
        inner.queue.push_back(number);
        drop(inner);
        Ticket {
            registry: self.clone(),
            number,
            run_id: run_id.to_owned(),
            needed,
            changes: self.changes.subscribe(),
            told: None,
        }
    }

    /// Takes one idle worker at once, past the queue; none when none is idle.
    pub(crate) fn claim_one(self: &Arc<Self>, run_id: &str) -> Option<GroupClaim> {
        let mut inner = lock(&self.inner);
        let number = inner.next_number();
        let (workers, lost) = inner.claim(number, run_id, 1)?;
        Some(GroupClaim { registry: self.clone(), number, workers, lost })
    }

    /// Ends leases when they run out, until told to stop.
    pub(crate) async fn keep_leases(self: Arc<Self>, stop: CancellationToken) {
        let mut changes = self.changes.subscribe();
        loop {
            let next = lock(&self.inner).workers.values().map(|entry| entry.expires).min();
            let due = async {
                match next {
                    Some(at) => tokio::time::sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = stop.cancelled() => return,
                // The sender lives in `self`, so this cannot fail.
                _ = changes.changed() => {}
                () = due => self.expire(Instant::now()),
            }
        }
    }

    fn expire(&self, now: Instant) {
        let mut inner = lock(&self.inner);
        let overdue: Vec<String> = inner
            .workers
            .iter()
            .filter(|(_, entry)| entry.expires <= now)
            .map(|(id, _)| id.clone())
            .collect();
        for id in &overdue {
            if let Some(entry) = inner.workers.remove(id) {
                warn!(worker_id = id, lease_seconds = self.lease.as_secs_f64(), "lease ran out");
                entry.tell_lost(&format!("it has not renewed its lease for {} s", self.lease.as_secs_f64()));
            }
        }
        drop(inner);
        if !overdue.is_empty() {
            self.note_change();
        }
    }

    fn release(&self, number: u64, picked: impl Fn(&str) -> bool) {
        let mut inner = lock(&self.inner);
        for (id, entry) in &mut inner.workers {
            if picked(id) && entry.claim.as_ref().is_some_and(|claim| claim.number == number) {
                entry.claim = None;
            }
        }
        drop(inner);
        self.note_change();
    }

    fn note_change(&self) {
        self.changes.send_modify(|count| *count += 1);
    }
}

impl Inner {
    fn next_number(&mut self) -> u64 {
        self.last_number += 1;
        self.last_number
    }

    /// Takes `needed` idle workers of one kind of device, the lowest ids first; all or none. GPUs go before CPUs.
    fn claim(
        &mut self,
        number: u64,
        run_id: &str,
        needed: usize,
    ) -> Option<(Vec<pb::WorkerInfo>, mpsc::UnboundedReceiver<LostWorker>)> {
        let mut kinds: BTreeMap<(bool, &str), Vec<String>> = BTreeMap::new();
        for (id, entry) in self.workers.iter().filter(|(_, entry)| entry.claim.is_none()) {
            let kind = device_kind(&entry.info.device);
            kinds.entry((kind == "cpu", kind)).or_default().push(id.clone());
        }
        let ids = kinds.into_values().find(|ids| ids.len() >= needed)?;
        let (sender, lost) = mpsc::unbounded_channel();
        let mut workers = Vec::with_capacity(needed);
        for id in ids.iter().take(needed) {
            if let Some(entry) = self.workers.get_mut(id) {
                entry.claim = Some(Held { number, run_id: run_id.to_owned(), lost: sender.clone() });
                workers.push(entry.info.clone());
            }
        }
        Some((workers, lost))
    }

    fn idle(&self) -> usize {
        self.workers.values().filter(|entry| entry.claim.is_none()).count()
    }
}

impl Entry {
    fn tell_lost(&self, cause: &str) {
        if let Some(claim) = &self.claim {
            // A claim that has just ended does not care any more.
            let _ = claim.lost.send(LostWorker { id: self.info.id.clone(), cause: cause.to_owned() });
        }
    }
}

impl GroupClaim {
    /// The workers by tensor-parallel rank.
    pub(crate) fn workers(&self) -> &[pb::WorkerInfo] {
        &self.workers
    }

    /// The next of them that goes away.
    pub(crate) async fn next_lost(&mut self) -> LostWorker {
        match self.lost.recv().await {
            Some(lost) => lost,
            // All of them are gone or given back: nothing more to hear.
            None => std::future::pending().await,
        }
    }

    /// Gives back all but rank 0's.
    pub(crate) fn release_all_but_first(&self) {
        let first = self.workers.first().map(|worker| worker.id.as_str());
        self.registry.release(self.number, |id| Some(id) != first);
    }
}

impl Drop for GroupClaim {
    fn drop(&mut self) {
        self.registry.release(self.number, |_| true);
    }
}

impl Ticket {
    /// Waits for the group, or for news about why it is not there yet. Nothing is lost when the wait is given up.
    pub(crate) async fn next(&mut self) -> Turn {
        loop {
            self.changes.mark_unchanged();
            let standing = {
                let mut inner = lock(&self.registry.inner);
                let ahead = inner.queue.iter().take_while(|number| **number != self.number).count();
                if ahead == 0
                    && let Some((workers, lost)) = inner.claim(self.number, &self.run_id, self.needed)
                {
                    let registry = self.registry.clone();
                    return Turn::Claimed(GroupClaim { registry, number: self.number, workers, lost });
                }
                Standing { idle: inner.idle(), registered: inner.workers.len(), ahead }
            };
            if self.told.replace(standing) != Some(standing) {
                return Turn::Waiting(standing);
            }
            if self.changes.changed().await.is_err() {
                // The registry is gone and with it this process's purpose.
                std::future::pending::<()>().await;
            }
        }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let number = self.number;
        lock(&self.registry.inner).queue.retain(|waiting| *waiting != number);
        self.registry.note_change();
    }
}

/// `cuda` of `cuda:0`.
pub(crate) fn device_kind(device: &str) -> &str {
    device.split(':').next().unwrap_or(device)
}

#[cfg(test)]
#[path = "registry_tests.rs"]
mod tests;
