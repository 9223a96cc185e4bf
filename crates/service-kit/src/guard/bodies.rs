//! Bodies under watch: a request that never ends, and a reader that never reads, hold nothing for long.

use super::call::Call;
use super::code;
use super::subject::Opening;
use http_body::{Frame, SizeHint};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::time::{Instant, Sleep, sleep, sleep_until};
use tonic::body::Body;
use tonic::codegen::{Body as HttpBody, Bytes};
use tonic::{Code, Status};
use tracing::debug;
use wire::status::{Failure, Reason};

/// What must arrive in time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Arrival {
    Whole,
    EachFrame,
}

/// A request that must arrive in time.
pub(crate) struct RequestBody {
    inner: Body,
    arrival: Arrival,
    limit: Duration,
    overdue: Pin<Box<Sleep>>,
    /// Takes the first bytes, if they say which run the call is about.
    opening: Option<Arc<Mutex<Opening>>>,
}

impl RequestBody {
    pub(crate) fn new(
        inner: Body,
        arrival: Arrival,
        limit: Duration,
        opening: Option<Arc<Mutex<Opening>>>,
    ) -> Self {
        Self { inner, arrival, limit, overdue: Box::pin(sleep(limit)), opening }
    }
}

impl HttpBody for RequestBody {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let this = &mut *self;
        let Poll::Ready(frame) = Pin::new(&mut this.inner).poll_frame(context) else {
            ready!(this.overdue.as_mut().poll(context));
            let message = format!("the request did not arrive within {} s", this.limit.as_secs());
            return Poll::Ready(Some(Err(Failure::new(Reason::DeadlineExceeded, message).into())));
        };
        if this.arrival == Arrival::EachFrame {
            this.overdue.as_mut().reset(Instant::now() + this.limit);
        }
        if let (Some(opening), Some(Ok(frame))) = (&this.opening, &frame)
            && let Some(bytes) = frame.data_ref()
        {
            opening.lock().unwrap_or_else(PoisonError::into_inner).take(bytes);
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

/// A response whose handler is let go when its reader does not read, and whose end the audit log and the metrics are told.
pub(crate) struct ResponseBody {
    shared: Arc<Shared>,
    /// Absent once it has ended.
    call: Option<Call>,
    /// Takes the first bytes, if they say which run the call is about.
    opening: Option<Opening>,
}

struct Shared {
    state: Mutex<State>,
}

enum State {
    Flowing {
        body: Body,
        /// When a frame was handed over and none asked for since.
        unread_since: Option<Instant>,
    },
    /// The reader did not read; the handler is gone.
    Abandoned,
    Ended,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ResponseBody {
    /// `idle`: longest that a frame may stay unread; absent for a body of one message.
    pub(crate) fn new(body: Body, idle: Option<Duration>, call: Call, told: bool) -> Self {
        let shared = Arc::new(Shared { state: Mutex::new(State::Flowing { body, unread_since: None }) });
        if let Some(idle) = idle {
            tokio::spawn(watch(Arc::downgrade(&shared), idle));
        }
        let opening = (told && call.is_audited()).then(Opening::default);
        Self { shared, call: Some(call), opening }
    }

    fn end(&mut self, outcome: Option<Code>) {
        if let Some(mut call) = self.call.take() {
            call.about(self.opening.take().and_then(|opening| opening.id(&[1, 1])));
            if let Some(outcome) = outcome {
                call.outcome(outcome);
            }
        }
    }
}

/// Drops the handler's side once a frame was left unread for `idle`. What the transport holds stays bounded by its window.
async fn watch(shared: Weak<Shared>, idle: Duration) {
    let mut next = Instant::now() + idle;
    loop {
        sleep_until(next).await;
        let Some(shared) = shared.upgrade() else { return };
        let mut state = shared.state();
        next = match &*state {
            State::Flowing { unread_since: None, .. } => Instant::now() + idle,
            State::Flowing { unread_since: Some(since), .. } if since.elapsed() < idle => *since + idle,
            State::Flowing { .. } => {
                let abandoned = std::mem::replace(&mut *state, State::Abandoned);
                drop(state);
                drop(abandoned);
                debug!(seconds = idle.as_secs_f64(), "a stream was cut off: its client does not read");
                return;
            }
            State::Abandoned | State::Ended => return,
        };
    }
}

impl HttpBody for ResponseBody {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let shared = self.shared.clone();
        let mut state = shared.state();
        let frame = match &mut *state {
            State::Flowing { body, unread_since } => {
                *unread_since = None;
                let frame = ready!(Pin::new(body).poll_frame(context));
                *unread_since = Some(Instant::now());
                frame
            }
            State::Abandoned => {
                *state = State::Ended;
                drop(state);
                self.end(Some(Code::DeadlineExceeded));
                let failure = Failure::new(Reason::DeadlineExceeded, "the stream was not read in time");
                let mut trailers = tonic::codegen::http::HeaderMap::new();
                Status::from(failure).add_header(&mut trailers)?;
                return Poll::Ready(Some(Ok(Frame::trailers(trailers))));
            }
            State::Ended => return Poll::Ready(None),
        };
        match &frame {
            None | Some(Err(_)) => {
                *state = State::Ended;
                drop(state);
                let outcome = frame.as_ref().and_then(|frame| frame.as_ref().err()).map(Status::code);
                self.end(outcome);
            }
            Some(Ok(part)) => {
                drop(state);
                if let (Some(opening), Some(bytes)) = (&mut self.opening, part.data_ref()) {
                    opening.take(bytes);
                }
                if let Some(trailers) = part.trailers_ref() {
                    self.end(code(trailers));
                }
            }
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        match &*self.shared.state() {
            State::Flowing { body, .. } => body.is_end_stream(),
            State::Abandoned => false,
            State::Ended => true,
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &*self.shared.state() {
            State::Flowing { body, .. } => body.size_hint(),
            State::Abandoned | State::Ended => SizeHint::default(),
        }
    }
}

impl Drop for ResponseBody {
    fn drop(&mut self) {
        self.end(None);
    }
}
