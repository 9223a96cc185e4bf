//! Replaying a run's events to those who watch it.

use crate::messages;
use crate::run_book::RunRecord;
use std::sync::Arc;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;
use wire::pb;

/// Events that are converted at once.
const PAGE: usize = 64;
/// Events that may wait for a slow client; the rest waits in the book.
const BUFFER: usize = 16;

/// All events past `after_revision`, those to come included, each once and in order. Ends with the run.
///
/// The client's pace is its own: the run writes to the book and never waits.
pub(crate) fn stream(
    record: Arc<RunRecord>,
    after_revision: u64,
) -> ReceiverStream<Result<pb::WatchRunResponse, Status>> {
    let (sender, receiver) = mpsc::channel(BUFFER);
    tokio::spawn(async move {
        let mut revisions = record.revisions();
        let mut seen = after_revision;
        loop {
            // Marked before the book is read, so that what comes after the reading wakes us.
            revisions.mark_unchanged();
            let (events, ends) = record.events_after(seen, PAGE);
            let caught_up = events.len() < PAGE;
            for event in events {
                seen = event.revision;
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
                }
            }
        }
    });
    ReceiverStream::new(receiver)
}
