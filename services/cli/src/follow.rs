//! A run's events, from first to last, over broken connections.

use crate::failure::{Failure, from_status};
use crate::tables::has_ended;
use std::time::Duration;
use tokio::time::{Instant, sleep};
use tonic::{Code, Status};
use wire::client::{RunClient, within};
use wire::{limits, pb};

/// Longest that the coordinator may be away before following it is given up.
const PATIENCE: Duration = Duration::from_secs(60);
const PAUSE: Duration = Duration::from_millis(500);

/// Hands every event after `revision` to `each`, once and in order, until the run has ended.
///
/// # Errors
/// When the run is not known, the coordinator stays away for a minute, or `each` fails.
pub(crate) async fn follow(
    client: &mut RunClient,
    id: &str,
    mut revision: u64,
    mut each: impl FnMut(&pb::RunEvent) -> Result<(), Failure>,
) -> Result<(), Failure> {
    let mut away_since: Option<Instant> = None;
    let mut ended = false;
    loop {
        let before = revision;
        let result = follow_once(client, id, &mut revision, &mut ended, &mut each).await;
        match result {
            Ok(()) if ended => return Ok(()),
            Err(Stop::Failure(failure)) => return Err(failure),
            Err(Stop::Status(status)) if !is_passing(&status) => {
                return Err(from_status(&format!("failed to follow run `{id}`"), &status));
            }
            // The stream broke, or ended early: go on behind the last event seen.
            Ok(()) => {}
            Err(Stop::Status(status)) => {
                let since = *away_since.get_or_insert_with(Instant::now);
                if since.elapsed() > PATIENCE {
                    return Err(from_status(
                        &format!("lost the coordinator while following run `{id}`"),
                        &status,
                    ));
                }
            }
        }
        if revision > before {
            away_since = None;
        }
        sleep(PAUSE).await;
    }
}

enum Stop {
    Status(Status),
    Failure(Failure),
}

async fn follow_once(
    client: &mut RunClient,
    id: &str,
    revision: &mut u64,
    ended: &mut bool,
    each: &mut impl FnMut(&pb::RunEvent) -> Result<(), Failure>,
) -> Result<(), Stop> {
    let before = *revision;
    let request = pb::WatchRunRequest { id: id.to_owned(), after_revision: *revision };
    let mut events = client.watch_run(tonic::Request::new(request)).await.map_err(Stop::Status)?.into_inner();
    while let Some(response) = events.message().await.map_err(Stop::Status)? {
        let Some(event) = response.event else { continue };
        if event.revision <= *revision {
            continue;
        }
        *revision = event.revision;
        if let Some(pb::run_event::Kind::StateChange(change)) = &event.kind {
            *ended = has_ended(change.state());
        }
        each(&event).map_err(Stop::Failure)?;
    }
    if !*ended && *revision == before {
        // Nothing new came: the last event was seen already, or there is none yet.
        let request = within(limits::QUICK_CALL, pb::GetRunRequest { id: id.to_owned() });
        let run = client.get_run(request).await.map_err(Stop::Status)?.into_inner().run;
        *ended = run.is_some_and(|run| has_ended(run.state()));
    }
    Ok(())
}

/// Whether the same call may succeed in a moment.
fn is_passing(status: &Status) -> bool {
    match status.code() {
        Code::Unavailable | Code::Cancelled | Code::Unknown | Code::DeadlineExceeded | Code::Internal => true,
        Code::Ok
        | Code::InvalidArgument
        | Code::NotFound
        | Code::AlreadyExists
        | Code::PermissionDenied
        | Code::ResourceExhausted
        | Code::FailedPrecondition
        | Code::Aborted
        | Code::OutOfRange
        | Code::Unimplemented
        | Code::DataLoss
        | Code::Unauthenticated => false,
    }
}
