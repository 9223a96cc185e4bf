//! The response stream of Train, Calibrate and EvaluateTask: what the device thread sends, ended at once when the session is over.

use crate::session::SessionEnd;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};
use tokio::sync::mpsc;
use tokio_stream::Stream;
use tokio_util::sync::WaitForCancellationFutureOwned;
use tonic::Status;

/// See the module. Dropping it tells the device thread that nobody listens.
pub struct SessionStream<T> {
    items: mpsc::Receiver<Result<T, Status>>,
    end: SessionEnd,
    over: Pin<Box<WaitForCancellationFutureOwned>>,
    ended: bool,
}

impl<T> SessionStream<T> {
    pub(crate) fn new(items: mpsc::Receiver<Result<T, Status>>, end: SessionEnd) -> Self {
        let over = Box::pin(end.token().cancelled_owned());
        Self { items, end, over, ended: false }
    }
}

impl<T> Stream for SessionStream<T> {
    type Item = Result<T, Status>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<T, Status>>> {
        if self.ended {
            return Poll::Ready(None);
        }
        // What was sent before the end, above all the reason for it, comes first.
        match self.items.poll_recv(context) {
            Poll::Ready(Some(item)) => {
                self.ended = item.is_err();
                return Poll::Ready(Some(item));
            }
            Poll::Ready(None) => {
                self.ended = true;
                return Poll::Ready(self.end.is_over().then(|| Err(self.end.why().into())));
            }
            Poll::Pending => {}
        }
        if self.over.as_mut().poll(context).is_ready() {
            self.ended = true;
            return Poll::Ready(Some(Err(self.end.why().into())));
        }
        Poll::Pending
    }
}
