//! Which workers there are, which of them are idle, and who waits for them.

use crate::sync::lock;
use planner::{Device, Platform};
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
/// How often it is looked whether claimed workers advance.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// A worker may pause so many times longer than it ever did before it counts as stuck.
const PAUSES_TOLERATED: u32 = 4;

/// How long things may take.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Patience {
    /// A lease without renewal.
    pub(crate) lease: Duration,
    /// A claimed worker at work without any progress, at least.
    pub(crate) stall: Duration,
    /// A run that could go on with fewer workers waits so long for all.
    pub(crate) regroup: Duration,
}

/// The workers with a live lease, and the queue for idle ones.
#[derive(Debug)]
pub(crate) struct Registry {
    inner: Mutex<Inner>,
    /// Counts the changes, for those who wait for one.
    changes: watch::Sender<u64>,
    patience: Patience,
}

#[derive(Debug, Default)]
struct Inner {
    /// By id, so that ranks are dealt out in a fixed order.
    workers: BTreeMap<String, Entry>,
    /// Tickets in the order in which they were drawn, each with the pool that it waits for.
    queue: VecDeque<(u64, String)>,
    last_number: u64,
}

#[derive(Debug)]
struct Entry {
    info: pb::WorkerInfo,
    lease_id: String,
    expires: Instant,
    claim: Option<Held>,
    /// Gets no further run.
    draining: bool,
    pace: Pace,
}

/// How a worker's compute thread advances, by its own account.
#[derive(Debug, Clone)]
struct Pace {
    progress: pb::WorkerProgress,
    /// When it was last seen to advance, or to wait for orders.
    advanced: Instant,
    /// The longest that it has paused at work and then gone on.
    longest_pause: Duration,
    /// It was named as stuck and has not moved since.
    stuck: bool,
}

/// A claim as the worker's entry knows it.
#[derive(Debug)]
struct Held {
    number: u64,
    run_id: String,
    news: mpsc::UnboundedSender<ClaimNews>,
}

/// What happens to a claimed worker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum ClaimNews {
    /// It went away, or does not advance.
    Lost { id: String, cause: String },
    /// It is to be given back once its run has a checkpoint.
    Draining { id: String },
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
    news: mpsc::UnboundedReceiver<ClaimNews>,
}

/// A place in the queue. Dropping it leaves the queue.
#[derive(Debug)]
pub(crate) struct Ticket {
    registry: Arc<Registry>,
    number: u64,
    run_id: String,
    /// Empty: any.
    pool: String,
    needed: usize,
    /// So many will do once it has waited long enough.
    at_least: usize,
    enough_from: Instant,
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
    pub(crate) fn new(patience: Patience) -> Arc<Self> {
        Arc::new(Self { inner: Mutex::default(), changes: watch::Sender::new(0), patience })
    }

    pub(crate) fn lease(&self) -> Duration {
        self.patience.lease
    }

    /// How often a worker is to renew: its progress is seen as often.
    pub(crate) fn renew_interval(&self) -> Duration {
        (self.patience.lease / 3).min(Duration::from_secs(1))
    }

    /// Admits a worker, in place of any earlier entry of its id, and returns its lease.
    pub(crate) fn register(&self, info: pb::WorkerInfo) -> Result<Registered, RegistryFull> {
        let lease_id = Uuid::new_v4().to_string();
        let mut inner = lock(&self.inner);
        if inner.workers.len() >= MAX_WORKERS && !inner.workers.contains_key(&info.id) {
            return Err(RegistryFull);
        }
        let mut claim = None;
        let mut draining = false;
        if let Some(earlier) = inner.workers.remove(&info.id) {
            if earlier.info.incarnation == info.incarnation {
                claim = earlier.claim;
                draining = earlier.draining;
            } else {
                earlier.tell_lost("it has restarted and lost its session");
            }
        }
        info!(worker_id = info.id, endpoint = info.endpoint, device = info.device, "worker registered");
        let expires = Instant::now() + self.patience.lease;
        let pace = Pace::new();
        let kind = Kind::of(&info);
        let entry = Entry { lease_id: lease_id.clone(), expires, claim, draining, pace, info };
        inner.workers.insert(entry.info.id.clone(), entry);
        let pool_workers = inner.in_service(&kind);
        drop(inner);
        self.note_change();
        Ok(Registered { lease_id, pool_workers })
    }

    /// Prolongs a lease and takes in how far the worker is; nothing when there is no lease of that name.
    pub(crate) fn renew(
        &self,
        lease_id: &str,
        progress: Option<pb::WorkerProgress>,
        draining: bool,
    ) -> Option<Renewed> {
        let mut inner = lock(&self.inner);
        let entry = inner.workers.values_mut().find(|entry| entry.lease_id == lease_id)?;
        entry.expires = Instant::now() + self.patience.lease;
        let was_stuck = entry.pace.stuck;
        if let Some(progress) = progress {
            entry.pace.take_in(progress);
        }
        let freed = was_stuck && !entry.pace.stuck;
        if draining {
            entry.drain();
        }
        let (idle, draining, kind) = (entry.claim.is_none(), entry.draining, Kind::of(&entry.info));
        let renewed = Renewed { idle, draining, pool_workers: inner.in_service(&kind) };
        drop(inner);
        // The keeper of the leases may sleep for longer now, but never wakes too late.
        if freed {
            self.note_change();
        }
        Some(renewed)
    }

    /// Takes a worker out of service; nothing when there is none of that name.
    pub(crate) fn drain(&self, id: &str) -> Option<pb::Worker> {
        let mut inner = lock(&self.inner);
        inner.workers.get_mut(id)?.drain();
        drop(inner);
        self.note_change();
        self.list().into_iter().find(|worker| worker.info.as_ref().is_some_and(|info| info.id == id))
    }

    /// Takes a lease back; none of that name is as good.
    pub(crate) fn deregister(&self, lease_id: &str) {
        let mut inner = lock(&self.inner);
        let id = inner.workers.iter().find(|(_, entry)| entry.lease_id == lease_id).map(|(id, _)| id.clone());
        if let Some(entry) = id.and_then(|id| inner.workers.remove(&id)) {
            info!(worker_id = entry.info.id, "worker deregistered");
            entry.tell_lost("it has ended");
        }
        drop(inner);
        self.note_change();
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
            draining: entry.draining,
            progress: Some(entry.pace.progress),
        };
        inner.workers.values().map(shown).collect()
    }

    /// What a rank of a group of `tp_degree` from `pool` will have at least, as far as the workers are known that could take
    /// it.
    pub(crate) fn device(&self, tp_degree: usize, pool: &str) -> Device {
        let inner = lock(&self.inner);
        let memory_of = |cuda: bool| -> Option<u64> {
            let of_pool = inner.workers.values().filter(|entry| is_of(&entry.info, pool));
            let kind = of_pool.filter(|entry| (device_kind(&entry.info.device) == "cuda") == cuda);
            let mut memory: Vec<u64> = kind.map(|entry| entry.info.memory_bytes).collect();
            memory.sort_unstable_by(|one, other| other.cmp(one));
            memory.get(tp_degree.saturating_sub(1)).copied().filter(|bytes| *bytes > 0)
        };
        match (memory_of(true), memory_of(false)) {
            (Some(bytes), _) => Device {
                name: "cuda".to_owned(),
                platform: Platform::Cuda,
                memory_bytes: Some(bytes),
                rates: None,
            },
            (None, memory_bytes) => Device { memory_bytes, ..Device::cpu() },
        }
    }

    /// What these workers' devices do at their peak together; nothing where one does not say.
    pub(crate) fn peak_flops(&self, ids: &[String]) -> Option<f64> {
        let inner = lock(&self.inner);
        let peak = |id: &String| Some(inner.workers.get(id)?.info.peak_flops).filter(|peak| *peak > 0.0);
        ids.iter().map(peak).sum::<Option<f64>>().filter(|sum| *sum > 0.0)
    }

    /// How many runs wait for workers.
    pub(crate) fn waiting(&self) -> usize {
        lock(&self.inner).queue.len()
    }

    /// Each worker's id, how it stands, and how long ago it renewed its lease.
    pub(crate) fn census(&self) -> Vec<(String, &'static str, Duration)> {
        let now = Instant::now();
        let stands = |entry: &Entry| match entry {
            entry if entry.pace.stuck => "stuck",
            entry if entry.draining => "draining",
            entry if entry.claim.is_some() => "busy",
            _ => "idle",
        };
        let age =
            |entry: &Entry| self.patience.lease.saturating_sub(entry.expires.saturating_duration_since(now));
        let inner = lock(&self.inner);
        inner.workers.values().map(|entry| (entry.info.id.clone(), stands(entry), age(entry))).collect()
    }

    /// How many workers are registered.
    pub(crate) fn count(&self) -> usize {
        lock(&self.inner).workers.len()
    }

    /// Draws a place at the end of the queue, for `needed` workers of `pool`, or after a while for `at_least` so many. Those
    /// who wait for other pools are not before it.
    pub(crate) fn enqueue(
        self: &Arc<Self>,
        run_id: &str,
        pool: &str,
        needed: usize,
        at_least: usize,
    ) -> Ticket {
        let mut inner = lock(&self.inner);
        let number = inner.next_number();
        inner.queue.push_back((number, pool.to_owned()));
        drop(inner);
        Ticket {
            registry: self.clone(),
            number,
            run_id: run_id.to_owned(),
            pool: pool.to_owned(),
            needed,
            at_least: at_least.clamp(1, needed),
            enough_from: Instant::now() + self.patience.regroup,
            changes: self.changes.subscribe(),
            told: None,
        }
    }

    /// Takes one idle worker of `pool` at once, past the queue; none when none is idle.
    pub(crate) fn claim_one(self: &Arc<Self>, run_id: &str, pool: &str) -> Option<GroupClaim> {
        let mut inner = lock(&self.inner);
        let number = inner.next_number();
        let (workers, news) = inner.claim(number, run_id, pool, 1, 1)?;
        Some(GroupClaim { registry: self.clone(), number, workers, news })
    }

    /// Ends leases when they run out, until told to stop.
    pub(crate) async fn keep_leases(self: Arc<Self>, stop: CancellationToken) {
        let mut changes = self.changes.subscribe();
        let mut look = tokio::time::interval(LOOK_EVERY);
        look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
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
                _ = look.tick() => self.name_stuck(Instant::now()),
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
                let seconds = self.patience.lease.as_secs_f64();
                warn!(worker_id = id, lease_seconds = seconds, "lease ran out");
                entry.tell_lost(&format!("it has not renewed its lease for {seconds} s"));
            }
        }
        drop(inner);
        if !overdue.is_empty() {
            self.note_change();
        }
    }

    /// Names claimed workers that renew their leases and do not advance. Of those that wait in a collective the one that
    /// has begun the fewest is named: it is the one that the others wait for. Where all have begun the same one, nothing
    /// tells them apart, and the message says so.
    fn name_stuck(&self, now: Instant) {
        let mut inner = lock(&self.inner);
        let mut groups: BTreeMap<u64, Vec<String>> = BTreeMap::new();
        for (id, entry) in &inner.workers {
            if let Some(claim) = &entry.claim {
                groups.entry(claim.number).or_default().push(id.clone());
            }
        }
        let mut named = Vec::new();
        for ids in groups.into_values() {
            let stalled: Vec<&Entry> = ids
                .iter()
                .filter_map(|id| inner.workers.get(id))
                .filter(|entry| entry.pace.is_stalled(now, self.patience.stall))
                .collect();
            let culprit = match stalled.iter().find(|entry| !entry.pace.is_in_collective()) {
                Some(entry) => Some(entry),
                // As long as one of the group still advances, the others rightly wait for it.
                None if ids.iter().filter_map(|id| inner.workers.get(id)).all(|entry| {
                    !entry.pace.progress.working || entry.pace.is_stalled(now, self.patience.stall)
                }) =>
                {
                    stalled.iter().min_by_key(|entry| entry.pace.progress.collectives_entered)
                }
                None => None,
            };
            let Some(culprit) = culprit else { continue };
            let begun = culprit.pace.progress.collectives_entered;
            let place = if !culprit.pace.is_in_collective() {
                ""
            } else if stalled.iter().any(|entry| entry.pace.progress.collectives_entered > begun) {
                ", in a collective"
            } else {
                ", in a collective that all ranks have begun: it may be another's fault, or the network's"
            };
            named.push((culprit.info.id.clone(), place));
        }
        for (id, place) in named {
            if let Some(entry) = inner.workers.get_mut(&id) {
                let seconds = now.saturating_duration_since(entry.pace.advanced).as_secs_f64();
                warn!(worker_id = id, seconds, "worker does not advance");
                entry.pace.stuck = true;
                entry.tell_lost(&format!("it answers but has made no progress for {seconds:.1} s{place}"));
            }
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

    /// Takes `needed` idle workers of one pool and kind of device, the lowest ids first, or failing that as many as there are
    /// but `at_least` so many; else none. GPUs go before CPUs.
    fn claim(
        &mut self,
        number: u64,
        run_id: &str,
        pool: &str,
        needed: usize,
        at_least: usize,
    ) -> Option<(Vec<pb::WorkerInfo>, mpsc::UnboundedReceiver<ClaimNews>)> {
        let mut kinds: BTreeMap<Kind, Vec<String>> = BTreeMap::new();
        let of_pool = self.workers.iter().filter(|(_, entry)| is_of(&entry.info, pool));
        for (id, entry) in of_pool.filter(|(_, entry)| entry.is_idle()) {
            kinds.entry(Kind::of(&entry.info)).or_default().push(id.clone());
        }
        let kinds: Vec<Vec<String>> = kinds.into_values().collect();
        let whole = kinds.iter().find(|ids| ids.len() >= needed);
        let ids = whole.or_else(|| {
            let most = kinds.iter().map(Vec::len).max()?;
            kinds.iter().find(|ids| ids.len() == most && most >= at_least)
        })?;
        let (sender, news) = mpsc::unbounded_channel();
        let mut workers = Vec::with_capacity(needed);
        for id in ids.iter().take(needed) {
            if let Some(entry) = self.workers.get_mut(id) {
                entry.claim = Some(Held { number, run_id: run_id.to_owned(), news: sender.clone() });
                entry.pace.advanced = Instant::now();
                workers.push(entry.info.clone());
            }
        }
        Some((workers, news))
    }

    /// How many workers of `pool` are idle, and how many there are.
    fn count(&self, pool: &str) -> (usize, usize) {
        let of_pool = self.workers.values().filter(|entry| is_of(&entry.info, pool));
        of_pool.fold((0, 0), |(idle, all), entry| (idle + usize::from(entry.is_idle()), all + 1))
    }

    fn in_service(&self, kind: &Kind) -> u32 {
        let alike = self.workers.values().filter(|entry| !entry.draining && Kind::of(&entry.info) == *kind);
        alike.count() as u32
    }

    /// Tickets before this one that workers of `pool` might go to.
    fn ahead(&self, number: u64, pool: &str) -> usize {
        let before = self.queue.iter().take_while(|(other, _)| *other != number);
        before.filter(|(_, other)| pool.is_empty() || other.is_empty() || other == pool).count()
    }
}

/// Workers that a run may have together. GPUs come first.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Kind {
    is_cpu: bool,
    device: String,
    pool: String,
}

impl Kind {
    fn of(info: &pb::WorkerInfo) -> Self {
        let device = device_kind(&info.device);
        Self { is_cpu: device == "cpu", device: device.to_owned(), pool: info.pool.clone() }
    }
}

/// Whether a worker is of a pool; an empty name means any.
fn is_of(info: &pb::WorkerInfo, pool: &str) -> bool {
    pool.is_empty() || info.pool == pool
}

impl Entry {
    fn is_idle(&self) -> bool {
        self.claim.is_none() && !self.draining && !self.pace.stuck
    }

    fn tell_lost(&self, cause: &str) {
        self.tell(ClaimNews::Lost { id: self.info.id.clone(), cause: cause.to_owned() });
    }

    fn tell(&self, news: ClaimNews) {
        if let Some(claim) = &self.claim {
            // A claim that has just ended does not care any more.
            let _ = claim.news.send(news);
        }
    }

    fn drain(&mut self) {
        if !std::mem::replace(&mut self.draining, true) {
            info!(worker_id = self.info.id, "worker is taken out of service");
            self.tell(ClaimNews::Draining { id: self.info.id.clone() });
        }
    }
}

impl Pace {
    fn new() -> Self {
        Self {
            progress: pb::WorkerProgress::default(),
            advanced: Instant::now(),
            longest_pause: Duration::ZERO,
            stuck: false,
        }
    }

    fn take_in(&mut self, progress: pb::WorkerProgress) {
        let now = Instant::now();
        let moved = progress != self.progress;
        if moved || !progress.working {
            if moved && progress.working && self.progress.working {
                self.longest_pause = self.longest_pause.max(now.saturating_duration_since(self.advanced));
            }
            self.advanced = now;
            self.stuck = false;
        }
        self.progress = progress;
    }

    fn is_in_collective(&self) -> bool {
        self.progress.collectives_entered > self.progress.collectives_left
    }

    /// Whether it has been at work without any progress for longer than it ever was before it went on.
    fn is_stalled(&self, now: Instant, at_least: Duration) -> bool {
        let tolerated = at_least.max(self.longest_pause * PAUSES_TOLERATED);
        self.progress.working && !self.stuck && now.saturating_duration_since(self.advanced) > tolerated
    }
}

/// What a registration tells the worker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Registered {
    pub(crate) lease_id: String,
    /// Workers of its pool and kind in service, itself included.
    pub(crate) pool_workers: u32,
}

/// What a renewal tells the worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Renewed {
    /// No run holds it.
    pub(crate) idle: bool,
    pub(crate) draining: bool,
    /// Workers of its pool and kind in service, itself included.
    pub(crate) pool_workers: u32,
}

impl GroupClaim {
    /// The workers by tensor-parallel rank.
    pub(crate) fn workers(&self) -> &[pb::WorkerInfo] {
        &self.workers
    }

    /// What happens next to one of them.
    pub(crate) async fn next_news(&mut self) -> ClaimNews {
        match self.news.recv().await {
            Some(news) => news,
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
                let ahead = inner.ahead(self.number, &self.pool);
                let least = if Instant::now() >= self.enough_from { self.at_least } else { self.needed };
                if ahead == 0
                    && let Some((workers, news)) =
                        inner.claim(self.number, &self.run_id, &self.pool, self.needed, least)
                {
                    let registry = self.registry.clone();
                    return Turn::Claimed(GroupClaim { registry, number: self.number, workers, news });
                }
                let (idle, registered) = inner.count(&self.pool);
                Standing { idle, registered, ahead }
            };
            if self.told.replace(standing) != Some(standing) {
                return Turn::Waiting(standing);
            }
            let enough = Instant::now() < self.enough_from && self.at_least < self.needed;
            tokio::select! {
                changed = self.changes.changed() => if changed.is_err() {
                    // The registry is gone and with it this process's purpose.
                    std::future::pending::<()>().await;
                },
                () = tokio::time::sleep_until(self.enough_from), if enough => {}
            }
        }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let number = self.number;
        lock(&self.registry.inner).queue.retain(|(waiting, _)| *waiting != number);
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
