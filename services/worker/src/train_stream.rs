//! The response stream of Train: what the device thread sends, ended at once when the session is over.

use crate::device_thread::TrainItem;
use crate::session::SessionEnd;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};
use tokio::sync::mpsc;
use tokio_stream::Stream;
use tokio_util::sync::WaitForCancellationFutureOwned;

/// See the module. Dropping it tells the device thread that nobody listens.
pub struct TrainStream {
    items: mpsc::Receiver<TrainItem>,
    end: SessionEnd,
    over: Pin<Box<WaitForCancellationFutureOwned>>,
    ended: bool,
}

impl TrainStream {
    pub(crate) fn new(items: mpsc::Receiver<TrainItem>, end: SessionEnd) -> Self {
        let over = Box::pin(end.token().cancelled_owned());
        Self { items, end, over, ended: false }
    }
}

impl Stream for TrainStream {
    type Item = TrainItem;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<TrainItem>> {
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
