//! Gloo over TCP, as it is inside libtorch, and the store in which its ranks meet. With libtorch's CUDA half it takes
//! tensors of a GPU as well, through the host. Nothing waits for a peer once the session is over: what libtorch would
//! wait out is asked for in slices, and a group in a collective is ended from outside.

use super::{Communicator, ReduceOp, still_wanted};
use crate::fault::{Fault, Result};
use crate::ffi;
use engine::Progress;
use std::ffi::{CString, c_int};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tch::Tensor;

/// Longest that one attempt to reach a store takes: the session may end meanwhile.
const ATTEMPT: Duration = Duration::from_millis(500);
/// Pause between looks at who has come.
const MEETING_PAUSE: Duration = Duration::from_millis(5);

/// A key-value store over TCP in which ranks find each other.
pub(crate) struct Store {
    raw: *mut ffi::RawStore,
    port: u16,
}

impl Store {
    /// Serves a store on `host`, on a port that the system picks.
    pub(crate) fn serve(host: &str, timeout: Duration) -> Result<Self> {
        Self::open(host, 0, true, timeout)
    }

    /// Waits for the server, at most `timeout`.
    pub(crate) fn connect(host: &str, port: u16, timeout: Duration, progress: &Progress) -> Result<Self> {
        let deadline = Instant::now() + timeout;
        loop {
            still_wanted(progress)?;
            let left = deadline.saturating_duration_since(Instant::now());
            match Self::open(host, port, false, left.min(ATTEMPT)) {
                Ok(store) => {
                    // SAFETY: the store is live.
                    let message = unsafe { ffi::esp_store_set_timeout(store.raw, milliseconds(timeout)) };
                    ffi::check(message, Fault::Collective)?;
                    return Ok(store);
                }
                Err(fault) if left <= ATTEMPT => return Err(fault),
                Err(_) => progress.tick(),
            }
        }
    }

    fn open(host: &str, port: u16, server: bool, timeout: Duration) -> Result<Self> {
        let host = c_string(host)?;
        let (mut raw, mut bound) = (std::ptr::null_mut(), 0);
        // SAFETY: the pointers are live for the call; on success `raw` owns a store.
        let message = unsafe {
            ffi::esp_store_new(
                host.as_ptr(),
                port,
                server,
                milliseconds(timeout),
                &raw mut raw,
                &raw mut bound,
            )
        };
        ffi::check(message, Fault::Collective)?;
        Ok(Self { raw, port: bound })
    }

    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    /// Says that `tp_rank` has come and waits for the others, at most `timeout`.
    fn meet(&self, tp_rank: usize, tp_degree: usize, timeout: Duration, progress: &Progress) -> Result<()> {
        let deadline = Instant::now() + timeout;
        let key = |rank: usize| c_string(&format!("come/{rank}"));
        // SAFETY: the store is live, and so is the key for the call.
        let message = unsafe { ffi::esp_store_set(self.raw, key(tp_rank)?.as_ptr()) };
        ffi::check(message, Fault::Collective)?;
        let mut missing: Vec<usize> = (0..tp_degree).filter(|&rank| rank != tp_rank).collect();
        while let Some(&first) = missing.first() {
            still_wanted(progress)?;
            let mut has_come = false;
            // SAFETY: as above; the flag is live for the call.
            let message = unsafe { ffi::esp_store_has(self.raw, key(first)?.as_ptr(), &raw mut has_come) };
            ffi::check(message, Fault::Collective)?;
            if has_come {
                missing.remove(0);
            } else if Instant::now() >= deadline {
                return Err(Fault::Collective(format!(
                    "rank {first} of {tp_degree} did not come to the group within {timeout:?}"
                )));
            } else {
                std::thread::sleep(MEETING_PAUSE);
            }
        }
        Ok(())
    }
}

// SAFETY: libtorch's store takes a lock for each call, and any thread may free it.
unsafe impl Send for Store {}

impl Drop for Store {
    fn drop(&mut self) {
        // SAFETY: `raw` came from `esp_store_new` and is freed once.
        unsafe { ffi::esp_store_free(self.raw) }
    }
}

/// Gloo over TCP, as it is inside libtorch.
pub(crate) struct Gloo {
    group: Arc<Group>,
    tp_rank: usize,
    tp_degree: usize,
    progress: Arc<Progress>,
    /// Outlives the group: rank 0's store is the server that the others talk to.
    _store: Store,
}

/// libtorch's group, freed with its last owner.
struct Group(*mut ffi::RawGroup);

// SAFETY: libtorch's process group may be used and freed by any thread.
unsafe impl Send for Group {}
// SAFETY: the two calls that may happen at once are a reduction, by the shard's thread alone, and the end of the group,
// which locks each connection before it fails it.
unsafe impl Sync for Group {}

impl Group {
    /// Ends whatever waits in the group.
    fn give_up(&self) {
        // SAFETY: the group is live.
        let message = unsafe { ffi::esp_group_give_up(self.0) };
        if let Err(Fault::Collective(error)) = ffi::check(message, Fault::Collective) {
            tracing::warn!(%error, "a group could not be ended; it waits for its timeout");
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // SAFETY: the group came from `esp_gloo_new` and is freed once.
        unsafe { ffi::esp_group_free(self.0) }
    }
}

impl Gloo {
    /// Joins the group that meets in `store`; sockets listen on `host`. Waits for all ranks, at most `timeout`, which holds
    /// for reductions too. When `progress` is told to give up, every wait ends.
    pub(crate) fn join(
        store: Store,
        host: &str,
        tp_rank: usize,
        tp_degree: usize,
        timeout: Duration,
        progress: Arc<Progress>,
    ) -> Result<Self> {
        // Inside libtorch nobody could break off the wait for ranks that do not come.
        store.meet(tp_rank, tp_degree, timeout, &progress)?;
        let host = c_string(host)?;
        let mut raw = std::ptr::null_mut();
        // SAFETY: the pointers are live for the call; on success `raw` owns a group.
        let message = unsafe {
            ffi::esp_gloo_new(
                store.raw,
                host.as_ptr(),
                tp_rank as c_int,
                tp_degree as c_int,
                milliseconds(timeout),
                &raw mut raw,
            )
        };
        ffi::check(message, Fault::Collective)?;
        let group = Arc::new(Group(raw));
        let to_end = Arc::downgrade(&group);
        progress.on_give_up(move || {
            if let Some(group) = to_end.upgrade() {
                group.give_up();
            }
        });
        Ok(Self { group, tp_rank, tp_degree, progress, _store: store })
    }
}

impl Communicator for Gloo {
    fn tp_degree(&self) -> usize {
        self.tp_degree
    }

    fn tp_rank(&self) -> usize {
        self.tp_rank
    }

    fn all_reduce(&mut self, values: &mut Tensor, op: ReduceOp) -> Result<()> {
        if values.numel() == 0 {
            return Ok(());
        }
        // SAFETY: the group is live and the tensor is one; Gloo writes within its storage.
        let message = unsafe { ffi::esp_all_reduce(self.group.0, ffi::raw(values), op as c_int) };
        ffi::check(message, Fault::Collective).map_err(|fault| match still_wanted(&self.progress) {
            Ok(()) => fault,
            Err(over) => over,
        })
    }
}

fn c_string(text: &str) -> Result<CString> {
    CString::new(text)
        .map_err(|_| Fault::Refused(format!("host name `{}` holds a zero byte", text.escape_debug())))
}

fn milliseconds(duration: Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;
    use tch::{Device, Kind};

    /// No test waits so long.
    const TIMEOUT: Duration = Duration::from_secs(60);
    const SOON: Duration = Duration::from_millis(1500);

    fn ones(count: i64) -> Tensor {
        Tensor::ones([count], (Kind::Float, Device::Cpu))
    }

    fn text(fault: Fault) -> String {
        let Fault::Collective(text) = fault else { panic!("expected a collective's fault, got {fault:?}") };
        text
    }

    /// Both ranks of a group, each on a thread of its own.
    fn pair(behave: impl Fn(usize, Gloo) + Sync, progress: [Arc<Progress>; 2]) {
        let store = Store::serve("127.0.0.1", TIMEOUT).unwrap();
        let port = store.port();
        let [first, second] = progress;
        std::thread::scope(|scope| {
            let behave = &behave;
            scope.spawn(move || {
                let store = Store::connect("127.0.0.1", port, TIMEOUT, &second).unwrap();
                behave(1, Gloo::join(store, "127.0.0.1", 1, 2, TIMEOUT, second).unwrap());
            });
            behave(0, Gloo::join(store, "127.0.0.1", 0, 2, TIMEOUT, first).unwrap());
        });
    }

    #[test]
    fn a_rank_that_waits_in_a_reduction_returns_soon_after_its_session_ended() {
        // Of a few bytes and of some megabytes: Gloo has another way for each.
        for count in [3, 1 << 20] {
            let progress = [Arc::<Progress>::default(), Arc::default()];
            let (is_over, over) = mpsc::channel::<()>();
            let over = std::sync::Mutex::new(over);
            let (ended, ends) = mpsc::channel();
            let ends_session = {
                let progress = progress[0].clone();
                std::thread::spawn(move || {
                    std::thread::sleep(Duration::from_millis(300));
                    ended.send(Instant::now()).unwrap();
                    progress.give_up();
                })
            };
            let ends = std::sync::Mutex::new(ends);
            pair(
                |rank, mut group| {
                    let mut values = ones(count);
                    group.all_reduce(&mut values, ReduceOp::Sum).unwrap();
                    if rank == 1 {
                        // It never comes again.
                        over.lock().unwrap().recv_timeout(TIMEOUT).unwrap();
                        return;
                    }
                    let fault = text(group.all_reduce(&mut values, ReduceOp::Sum).unwrap_err());
                    let asked = ends.lock().unwrap().recv().unwrap();
                    assert!(asked.elapsed() < SOON, "{:?}", asked.elapsed());
                    assert!(fault.contains("the session is over"), "{fault}");
                    let again = Instant::now();
                    group.all_reduce(&mut values, ReduceOp::Sum).unwrap_err();
                    drop(group);
                    assert!(again.elapsed() < SOON, "an ended group neither waits nor keeps anyone");
                    is_over.send(()).unwrap();
                },
                progress,
            );
            ends_session.join().unwrap();
        }
    }

    #[test]
    fn the_other_ranks_of_an_ended_group_do_not_wait_for_it() {
        let progress = [Arc::<Progress>::default(), Arc::default()];
        let gives_up = progress[0].clone();
        let (gone, goes) = mpsc::channel::<()>();
        let goes = std::sync::Mutex::new(goes);
        pair(
            |rank, mut group| {
                group.all_reduce(&mut ones(3), ReduceOp::Sum).unwrap();
                if rank == 0 {
                    std::thread::sleep(Duration::from_millis(200));
                    gives_up.give_up();
                    // The group is still there: it is not its end that frees the other rank.
                    goes.lock().unwrap().recv_timeout(TIMEOUT).unwrap();
                    return;
                }
                let started = Instant::now();
                let fault = text(group.all_reduce(&mut ones(3), ReduceOp::Sum).unwrap_err());
                assert!(!fault.contains("the session is over"), "it is the other's that is over: {fault}");
                assert!(started.elapsed() < SOON);
                gone.send(()).unwrap();
            },
            progress,
        );
    }

    #[test]
    fn a_group_that_is_complete_is_ended_also_between_reductions() {
        let progress = [Arc::<Progress>::default(), Arc::default()];
        let both = progress.clone();
        pair(
            |rank, mut group| {
                group.all_reduce(&mut ones(3), ReduceOp::Sum).unwrap();
                both[rank].give_up();
                both[rank].give_up();
                let fault = text(group.all_reduce(&mut ones(3), ReduceOp::Sum).unwrap_err());
                assert!(fault.contains("the session is over"), "{fault}");
            },
            progress,
        );
    }

    #[test]
    fn forming_a_group_ends_with_the_session_and_names_who_did_not_come() {
        let progress = Arc::<Progress>::default();
        let store = Store::serve("127.0.0.1", TIMEOUT).unwrap();
        let timeout = Duration::from_millis(200);
        let fault = text(Gloo::join(store, "127.0.0.1", 0, 3, timeout, progress.clone()).err().unwrap());
        assert!(fault.contains("rank 1 of 3 did not come"), "{fault}");

        let store = Store::serve("127.0.0.1", TIMEOUT).unwrap();
        // Nobody listens there any more.
        let unused = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let started = std::thread::scope(|scope| {
            let joins = scope.spawn(|| Gloo::join(store, "127.0.0.1", 0, 2, TIMEOUT, progress.clone()).err());
            let connects = scope.spawn(|| Store::connect("127.0.0.1", unused, TIMEOUT, &progress).err());
            std::thread::sleep(Duration::from_millis(300));
            let started = Instant::now();
            progress.give_up();
            for fault in [joins.join().unwrap(), connects.join().unwrap()] {
                let fault = text(fault.unwrap());
                assert!(fault.contains("the session is over"), "{fault}");
            }
            started
        });
        // An attempt and libtorch's pause between two.
        assert!(started.elapsed() < 3 * SOON, "{:?}", started.elapsed());
    }
}
