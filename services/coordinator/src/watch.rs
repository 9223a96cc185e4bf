//! Replaying a run's events to those who watch it.

use crate::context::Context;
use crate::messages;
use crate::records::StoredEvent;
use crate::run_book::{Recent, RunRecord};
use crate::stores::Stores;
use std::sync::Arc;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;
use wire::pb;
use wire::status::{Failure, Reason};

/// Events that are converted at once.
const PAGE: usize = 64;
/// Events that may wait for a slow client; the rest waits in the book, or in the store.
const BUFFER: usize = 16;

/// All events past `after_revision`, those to come included, each once and in order. Ends with the run.
///
/// The client's pace is its own: the run never waits for it.
pub(crate) fn stream(
    record: Arc<RunRecord>,
    context: Arc<Context>,
    after_revision: u64,
) -> ReceiverStream<Result<pb::WatchRunResponse, Status>> {
    let (sender, receiver) = mpsc::channel(BUFFER);
    tokio::spawn(async move {
        let mut revisions = record.revisions();
        let mut seen = after_revision;
        loop {
            // Marked before the book is read, so that what comes after the reading wakes us.
            revisions.mark_unchanged();
            let (events, ends) = match record.recent(seen, PAGE) {
                Recent::Events { events, ends } => (events, ends),
                Recent::Older => match stored(&record, &context.stores, seen).await {
                    Ok(events) => (events, false),
                    Err(failure) => {
                        let _ = sender.send(Err(failure.into())).await;
                        return;
                    }
                },
            };
            let caught_up = events.is_empty();
            for event in events {
                seen = event.event.revision;
                let message = pb::WatchRunResponse { event: Some(messages::event(&event)) };
                if sender.send(Ok(message)).await.is_err() {
                    return;
                }
            }
            if ends {
                return;
            }
            if caught_up {
                tokio::select! {
                    // The sender lives in the record, so this cannot fail.
                    _ = revisions.changed() => {}
                    () = sender.closed() => return,
                    () = context.closing.cancelled() => {
                        let message = "the coordinator is shutting down; go on from the last revision";
                        let _ = sender.send(Err(Failure::new(Reason::ShuttingDown, message).into())).await;
                        return;
                    }
                }
            }
        }
    });
    ReceiverStream::new(receiver)
}

async fn stored(record: &RunRecord, stores: &Stores, seen: u64) -> Result<Vec<Arc<StoredEvent>>, Failure> {
    let events = stores.events(&record.id, seen, PAGE as u32).await;
    let events = events.map_err(|error| Failure::from_error(Reason::StoreFailed, &error))?;
    Ok(events.into_iter().map(Arc::new).collect())
}
