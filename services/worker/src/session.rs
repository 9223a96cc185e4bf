//! A session as the async side sees it: a name, a bounded queue of orders to the device thread, and its end.

use crate::device_thread::{self, Command, Loaded, Order, SessionSetup};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread;
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;
use tracing::Span;
use wire::pb;
use wire::status::{Failure, Reason};

/// Calls that may wait while another is at work.
const QUEUE: usize = 4;
const STACK_BYTES: usize = 16 << 20;

/// Whether a session has ended, and why. The first reason stays.
#[derive(Debug, Clone, Default)]
pub(crate) struct SessionEnd {
    token: CancellationToken,
    why: Arc<OnceLock<Failure>>,
    shard: Arc<engine::Progress>,
}

impl SessionEnd {
    pub(crate) fn end(&self, why: Failure) {
        // A later reason is a consequence of the first.
        let _ = self.why.set(why);
        self.token.cancel();
        self.shard.give_up();
    }

    /// How far the shard is.
    pub(crate) fn shard(&self) -> &Arc<engine::Progress> {
        &self.shard
    }

    pub(crate) fn is_over(&self) -> bool {
        self.token.is_cancelled()
    }

    pub(crate) async fn over(&self) {
        self.token.cancelled().await;
    }

    /// Why the session has ended.
    pub(crate) fn why(&self) -> Failure {
        self.why.get().cloned().unwrap_or_else(|| Failure::new(Reason::Aborted, "the session has ended"))
    }

    pub(crate) fn token(&self) -> CancellationToken {
        self.token.clone()
    }
}

/// Where a session stands, kept by the device thread and read by anyone.
#[derive(Debug, Default)]
pub(crate) struct Progress {
    pub(crate) generation: AtomicU64,
    pub(crate) next_step: AtomicU64,
    pub(crate) memory_bytes: AtomicU64,
    /// The device thread obeys an order, and does not wait for one.
    pub(crate) working: AtomicBool,
}

/// The handle of a session. Its thread ends when `end` is over, whatever else holds the handle.
#[derive(Debug)]
pub(crate) struct Session {
    pub(crate) id: String,
    pub(crate) end: SessionEnd,
    pub(crate) progress: Arc<Progress>,
    /// Cancelled once the thread, and with it the shard, is gone.
    pub(crate) thread_gone: CancellationToken,
    orders: mpsc::Sender<Order>,
}

/// What is needed to start a session's thread, once the device is free.
pub(crate) struct Starter {
    end: SessionEnd,
    progress: Arc<Progress>,
    thread_gone: CancellationToken,
    orders: mpsc::Receiver<Order>,
}

impl Session {
    pub(crate) fn new(id: String) -> (Arc<Self>, Starter) {
        let (sender, receiver) = mpsc::channel(QUEUE);
        let (end, progress, thread_gone) = (SessionEnd::default(), Arc::default(), CancellationToken::new());
        let starter = Starter {
            end: end.clone(),
            progress: Arc::clone(&progress),
            thread_gone: thread_gone.clone(),
            orders: receiver,
        };
        (Arc::new(Self { id, end, progress, thread_gone, orders: sender }), starter)
    }

    pub(crate) fn generation(&self) -> u64 {
        self.progress.generation.load(Ordering::Relaxed)
    }

    pub(crate) fn next_step(&self) -> u64 {
        self.progress.next_step.load(Ordering::Relaxed)
    }

    pub(crate) fn memory_bytes(&self) -> u64 {
        self.progress.memory_bytes.load(Ordering::Relaxed)
    }

    /// How far the device thread is, for the coordinator.
    pub(crate) fn advance(&self) -> pb::WorkerProgress {
        let counts = self.end.shard().counts();
        // An order that is not even taken up is work that does not advance.
        let waits = self.orders.capacity() < self.orders.max_capacity();
        pb::WorkerProgress {
            ticks: counts.ticks,
            working: waits || self.progress.working.load(Ordering::Relaxed),
            collectives_entered: counts.collectives_entered,
            collectives_left: counts.collectives_left,
        }
    }

    /// Hands a command to the device thread and waits for its answer, or for the session's end.
    pub(crate) async fn call<T>(
        &self,
        command: impl FnOnce(oneshot::Sender<Result<T, Failure>>) -> Command,
    ) -> Result<T, Failure> {
        let (reply, answer) = oneshot::channel();
        self.orders.try_send(Order { span: Span::current(), command: command(reply) }).map_err(
            |refused| match refused {
                mpsc::error::TrySendError::Full(_) => Failure::new(
                    Reason::SessionBusy,
                    format!("{QUEUE} calls are already waiting for this session"),
                ),
                mpsc::error::TrySendError::Closed(_) => self.end.why(),
            },
        )?;
        self.answer(answer).await
    }

    /// The device thread's answer, or why the session ended without one.
    pub(crate) async fn answer<T>(
        &self,
        answer: oneshot::Receiver<Result<T, Failure>>,
    ) -> Result<T, Failure> {
        tokio::select! {
            biased;
            answered = answer => answered.unwrap_or_else(|_| Err(self.end.why())),
            () = self.end.over() => Err(self.end.why()),
        }
    }
}

impl Starter {
    /// Starts the device thread, which loads the shard and answers through the receiver returned.
    pub(crate) fn start(self, setup: SessionSetup) -> oneshot::Receiver<Result<Loaded, Failure>> {
        let (ready, loaded) = oneshot::channel();
        let (end, gone) = (self.end.clone(), self.thread_gone.clone());
        let context = device_thread::Context {
            end: self.end,
            progress: self.progress,
            runtime: tokio::runtime::Handle::current(),
        };
        let span = Span::current();
        let spawned = thread::Builder::new().name("device".into()).stack_size(STACK_BYTES).spawn(move || {
            // Told whatever happens to the thread.
            let _gone = self.thread_gone.drop_guard();
            device_thread::run(setup, &context, span, self.orders, ready);
        });
        if let Err(error) = spawned {
            end.end(Failure::from_error(Reason::Internal, &error));
            gone.cancel();
        }
        loaded
    }

    /// Gives up before the thread was started; `device_free` tells when the session before has left the device.
    pub(crate) async fn give_up(self, why: Failure, device_free: CancellationToken) {
        self.end.end(why);
        device_free.cancelled().await;
        self.thread_gone.cancel();
    }

    pub(crate) fn end(&self) -> &SessionEnd {
        &self.end
    }
}
