//! A client that watches a run through every fault, going on from the last revision that it has seen.

use std::time::Duration;
use tokio::sync::watch;
use tokio_stream::StreamExt;
use wire::client::{connected_channel, run_client};
use wire::pb::{self, RunState, run_event::Kind};

const PAUSE: Duration = Duration::from_millis(50);

/// How far the run is, for those who wait for a point of it.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Seen {
    pub(crate) last_step: Option<u64>,
    pub(crate) exporting: bool,
    pub(crate) ended: bool,
}

pub(crate) fn has_ended(state: RunState) -> bool {
    matches!(state, RunState::Succeeded | RunState::Failed | RunState::Cancelled)
}

/// Every event of the run up to its end, in the order of arrival; or what is wrong with the stream.
pub(crate) async fn follow(
    url: String,
    id: String,
    seen: &watch::Sender<Seen>,
    events: &mut Vec<pb::RunEvent>,
) -> Result<(), String> {
    loop {
        match follow_once(&url, &id, seen, events).await? {
            true => return Ok(()),
            false => tokio::time::sleep(PAUSE).await,
        }
    }
}

/// Follows one stream; false when it broke and another must follow.
async fn follow_once(
    url: &str,
    id: &str,
    seen: &watch::Sender<Seen>,
    events: &mut Vec<pb::RunEvent>,
) -> Result<bool, String> {
    let Ok(channel) = connected_channel(url).await else { return Ok(false) };
    let after_revision = events.last().map_or(0, |event| event.revision);
    let request = pb::WatchRunRequest { id: id.to_owned(), after_revision };
    let mut stream = match run_client(channel).watch_run(request).await {
        Ok(response) => response.into_inner(),
        Err(status) if status.code() == tonic::Code::NotFound => {
            return Err(format!("an acknowledged run is gone: {status}"));
        }
        Err(_) => return Ok(false),
    };
    while let Some(message) = stream.next().await {
        // A stream that breaks is what the suite is about.
        let Ok(message) = message else { return Ok(false) };
        let event = message.event.ok_or("a message without an event")?;
        let last = events.last().map_or(0, |event| event.revision);
        if event.revision != last + 1 {
            return Err(format!("revision {} came after {last}", event.revision));
        }
        seen.send_modify(|seen| seen.take_in(&event));
        events.push(event);
    }
    // The stream ends well only with the run.
    if seen.borrow().ended { Ok(true) } else { Err("the stream ended before the run".to_owned()) }
}

impl Seen {
    fn take_in(&mut self, event: &pb::RunEvent) {
        match &event.kind {
            Some(Kind::StateChange(change)) => {
                self.exporting |= change.state() == RunState::Exporting;
                self.ended |= has_ended(change.state());
            }
            Some(Kind::Step(step)) => self.last_step = self.last_step.max(Some(step.step)),
            Some(
                Kind::Decision(_)
                | Kind::Evaluation(_)
                | Kind::Export(_)
                | Kind::Task(_)
                | Kind::Checkpoint(_)
                | Kind::Restart(_)
                | Kind::Guard(_)
                | Kind::Calibration(_),
            )
            | None => {}
        }
    }
}
