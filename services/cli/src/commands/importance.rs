//! What decisions were made on, and what others would have been.

use super::remote::{connect, refused, show};
use crate::args::{WatchArgs, WhatIfArgs};
use crate::failure::Failure;
use crate::output::say;
use crate::proto_json::to_json;
use crate::tables;
use wire::client::{run_client, within};
use wire::{limits, pb};

/// # Errors
/// When there is no such run or decision, the budget cannot be met, or there is no coordinator.
pub(crate) async fn what_if(args: WhatIfArgs) -> Result<(), Failure> {
    use pb::query_what_if_request::Budget;
    let (channel, _telemetry) = connect(&args.remote).await?;
    let budget = (args.sparsity.map(Budget::Sparsity))
        .or(args.parameters.map(Budget::Parameters))
        .or(args.memory_bytes.map(Budget::MemoryBytes));
    let message = pb::QueryWhatIfRequest {
        id: args.id,
        generation: args.generation,
        budget,
        serve_tp: args.serve_tp,
        multiple_of: args.multiple_of,
    };
    let answer = run_client(channel)
        .query_what_if(within(limits::QUICK_CALL, message))
        .await
        .map_err(refused("the question has no answer"))?;
    show(&args.remote, &answer.into_inner(), tables::what_if_table)
}

/// Prints one JSON object a chunk, until the run has ended.
///
/// # Errors
/// When there is no such run or no coordinator.
pub(crate) async fn watch(args: WatchArgs) -> Result<(), Failure> {
    let (channel, _telemetry) = connect(&args.remote).await?;
    let message = pb::WatchImportanceRequest { id: args.id, after_revision: args.from };
    let stream = run_client(channel).watch_importance(message).await;
    let mut stream = stream.map_err(refused("the importance cannot be watched"))?.into_inner();
    while let Some(chunk) = stream.message().await.map_err(refused("the stream broke off"))? {
        say(to_json(&chunk)?.to_string());
    }
    Ok(())
}
