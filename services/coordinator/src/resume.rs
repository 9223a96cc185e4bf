//! Taking up, after a start, what the store holds.

use crate::admission;
use crate::context::Context;
use crate::driver::{self, Start};
use crate::records::{RecordError, StoredEvent, StoredRun};
use crate::run_book::{Identity, RunRecord};
use crate::stores::StoresError;
use anyhow::Context as _;
use pruning_run::{Event, History, Run, RunId};
use run_store::StoredRunRow;
use std::sync::Arc;
use std::time::SystemTime;
use tokio::sync::mpsc::UnboundedReceiver;
use tracing::{error, info};
use wire::status::chain;

/// A run as it is in the store.
struct Found {
    record: Arc<RunRecord>,
    history: History,
    requests: UnboundedReceiver<Event>,
}

/// Reads all runs, in the order of their creation, and drives on those that have not ended.
///
/// # Errors
/// When the store fails. A run that cannot be read is left where it is, and said so.
pub(crate) async fn take_up(context: &Arc<Context>) -> anyhow::Result<()> {
    let rows = context.stores.runs().await.context("the store's runs cannot be read")?;
    for row in rows {
        let id = row.id.clone();
        match read(context, row).await {
            Ok(found) => go_on(context, found),
            Err(problem) => error!(run_id = id, error = %problem, "a run in the store cannot be read"),
        }
    }
    Ok(())
}

/// Takes up one run that the store has and the book has not.
///
/// # Errors
/// When it cannot be read.
pub(crate) async fn take_up_one(context: &Arc<Context>, id: &str) -> Result<Arc<RunRecord>, StoresError> {
    let unreadable = |cause| StoresError::from(RecordError::Unreadable { what: "a run", cause });
    let row = context.stores.runs().await?.into_iter().find(|row| row.id == id);
    let row = row.ok_or_else(|| unreadable(format!("`{id}` is not in the store")))?;
    let found = read(context, row).await.map_err(unreadable)?;
    let record = found.record.clone();
    go_on(context, found);
    Ok(record)
}

async fn read(context: &Arc<Context>, row: StoredRunRow) -> Result<Found, String> {
    let StoredRunRow { number, id, request_id, request_digest, create_time, record, late_export } = row;
    let run = StoredRun::decode(&record).map_err(|error| chain(&error))?;
    let setup = admission::setup_of(&run, context.blame_grace())?;
    let identity = Identity { id: RunId(id), number, create_time, request_digest };
    let (record, requests) = RunRecord::new(identity, run, setup);
    let publish = |event: StoredEvent| record.publish(event);
    let history = context.stores.history(&record.id, publish).await.map_err(|error| chain(&error))?;
    if let Some(payload) = late_export {
        record.set_export(serde_json::from_slice(&payload).map_err(|error| error.to_string())?);
    }
    context.book.add(record.clone(), request_id);
    Ok(Found { record, history, requests })
}

fn go_on(context: &Arc<Context>, found: Found) {
    let Found { record, history, requests } = found;
    if record.state().has_ended() {
        return;
    }
    info!(run_id = %record.id, "taken up from the store");
    let origin = record.fork.as_ref().map(|fork| fork.checkpoint.clone());
    let now = SystemTime::now();
    let (run, effects) = Run::resumed(record.id.clone(), record.setup.clone(), origin, history, now);
    let start = Start::Stored(Box::new(run), effects);
    context.tasks.spawn(driver::drive(context.clone(), record, start, requests));
}
