//! QueryWhatIf and WatchImportance: what decisions were made on.

use super::run_service::Runs;
use crate::context::Context;
use crate::run_book::{RunRecord, ShownDecision};
use crate::stores::store_failure;
use checkpoint::export_form;
use model_spec::{Block, Family, ModelSpec};
use pruning::{GroupImportance, KeepMask, MovingAverage, WhatIfError, what_if};
use pruning_run::Generation;
use recipe::{Budget, Pruning};
use std::sync::{Arc, Mutex};
use std::time::Instant;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;
use wire::convert::{mask, time};
use wire::pb;
use wire::pb::query_what_if_request::Budget as Asked;
use wire::status::{Failure, Reason, chain};

/// Values in one message.
const CHUNK: usize = 16 * 1024;
const BUFFER: usize = 4;

/// What the last question was asked about: one run is usually asked many times.
#[derive(Debug, Default)]
pub(crate) struct LastAsked(Mutex<Option<(String, Arc<Basis>)>>);

/// What a decision was made on.
#[derive(Debug)]
struct Basis {
    generation: Generation,
    keep_before: KeepMask,
    average: MovingAverage,
}

impl Runs {
    pub(super) async fn answer_what_if(
        &self,
        request: pb::QueryWhatIfRequest,
    ) -> Result<pb::QueryWhatIfResponse, Failure> {
        let started = Instant::now();
        let record = self.find(&request.id)?;
        let Some(own) = record.spec.recipe.pruning.clone() else {
            return Err(Failure::new(Reason::RunNotReady, format!("run `{}` does not prune", record.id)));
        };
        let decisions = record.shown().decisions;
        let wanted = request.generation.map(Generation);
        let decision = match wanted {
            None => decisions.last(),
            Some(wanted) => decisions.iter().find(|decision| decision.generation == wanted),
        };
        let Some(decision) = decision else {
            return Err(match wanted {
                None => Failure::new(
                    Reason::RunNotReady,
                    format!("run `{}` has decided nothing yet, so there is no importance to ask", record.id),
                ),
                Some(wanted) => Failure::new(
                    Reason::DecisionNotFound,
                    format!("run `{}` has made no decision {wanted}", record.id),
                ),
            });
        };
        let basis = self.basis(&record, decision.generation).await?;
        let pruning = asked_pruning(own, &request, record.setup.dense(), weight_width(&record))?;
        let setup = record.setup.clone();
        let looked = tokio::task::spawn_blocking(move || {
            let answer = what_if(setup.dense(), &basis.keep_before, &basis.average, &pruning)?;
            Ok::<_, WhatIfError>((answer, basis.generation))
        });
        let looked = looked.await.map_err(|error| Failure::from_error(Reason::Internal, &error))?;
        let (answer, generation) = looked.map_err(|error| what_if_failure(&error))?;
        let pruned = ModelSpec { layers: answer.widths.clone(), ..record.setup.dense().clone() };
        let (form, problems) = legality(&pruned, request.serve_tp);
        Ok(pb::QueryWhatIfResponse {
            generation: generation.0,
            layers: answer.widths.iter().map(mask::widths_to_pb).collect(),
            parameters: answer.parameters,
            sparsity: answer.sparsity,
            weight_bytes: answer.parameters * weight_width(&record),
            export_form: form,
            problems,
            importance_lost: answer.importance_lost,
            importance_lost_share: answer.importance_lost_share,
            duration: Some(time::duration_to_pb(started.elapsed())),
        })
    }

    async fn basis(&self, record: &RunRecord, generation: Generation) -> Result<Arc<Basis>, Failure> {
        let last = &self.last_asked.0;
        if let Some((id, basis)) = &*crate::sync::lock(last)
            && *id == record.id.0
            && basis.generation == generation
        {
            return Ok(basis.clone());
        }
        let average = importance(&self.context, record, generation).await?;
        let before = Generation(generation.0 - 1);
        let keep_before = if before == Generation(0) {
            KeepMask::full(record.setup.dense())
        } else {
            self.keep_mask(record, before).await?
        };
        let basis = Arc::new(Basis { generation, keep_before, average });
        *crate::sync::lock(last) = Some((record.id.0.clone(), basis.clone()));
        Ok(basis)
    }
}

async fn importance(
    context: &Context,
    record: &RunRecord,
    generation: Generation,
) -> Result<MovingAverage, Failure> {
    let found = context.stores.importance(&record.id, generation).await.map_err(store_failure)?;
    found.ok_or_else(|| {
        let message = format!(
            "the importance of decision {generation} was not kept with run `{}`; ask the run that it was forked from",
            record.id
        );
        Failure::new(Reason::RunNotReady, message)
    })
}

fn asked_pruning(
    own: Pruning,
    request: &pb::QueryWhatIfRequest,
    dense: &ModelSpec,
    weight_bytes: u64,
) -> Result<Pruning, Failure> {
    let budget = match request.budget {
        None => own.budget,
        Some(Asked::Sparsity(sparsity)) => Budget::Sparsity(sparsity),
        Some(Asked::Parameters(parameters)) => Budget::Parameters(parameters),
        Some(Asked::MemoryBytes(bytes)) => Budget::Parameters(bytes / weight_bytes),
    };
    let serve_tp = match request.serve_tp {
        None => own.serve_tp.clone(),
        Some(0) => return Err(Failure::invalid_field("serve_tp", "must be at least 1")),
        Some(degree) => vec![degree as usize],
    };
    let widest = dense.layers.iter().map(|layer| layer.intermediate_size).max().unwrap_or(1);
    let channel_multiple = match request.multiple_of {
        None => own.channel_multiple,
        Some(multiple) if multiple >= 1 && multiple as usize <= widest => multiple as usize,
        Some(multiple) => {
            let problem = format!("must lie in 1..={widest}; got {multiple}");
            return Err(Failure::invalid_field("multiple_of", problem));
        }
    };
    Ok(Pruning { budget, serve_tp, channel_multiple, ..own })
}

fn what_if_failure(error: &WhatIfError) -> Failure {
    match error {
        WhatIfError::Budget(violations) => {
            let problem = violations.iter().map(|violation| violation.problem.clone());
            Failure::invalid_field("budget", problem.collect::<Vec<_>>().join("; "))
        }
        WhatIfError::Regrowth { .. } => Failure::invalid_field("budget", chain(error)),
        WhatIfError::Decide(_) => Failure::from_error(Reason::Internal, error),
    }
}

/// Bytes of a weight as it is exported.
fn weight_width(record: &RunRecord) -> u64 {
    match record.spec.export.as_ref().map(|export| export.dtype) {
        Some(wire::ExportDtype::F32) => 4,
        Some(wire::ExportDtype::Bf16 | wire::ExportDtype::F16 | wire::ExportDtype::Source) | None => 2,
    }
}

fn legality(pruned: &ModelSpec, serve_tp: Option<u32>) -> (String, Vec<String>) {
    let mut problems = Vec::new();
    let form = match export_form(pruned) {
        Ok(form) => {
            let name = match form.family {
                Family::Llama => "llama",
                Family::Mistral => "mistral",
            };
            if form.padded {
                problems.push("layers differ in width, so they are padded to the widest".to_owned());
            }
            name.to_owned()
        }
        Err(error) => {
            problems.push(chain(&error));
            String::new()
        }
    };
    if let Some(degree) = serve_tp.map(|degree| degree as usize) {
        for (layer, widths) in pruned.layers.iter().enumerate() {
            for (what, count) in
                [("query heads", widths.query_head_count), ("channels", widths.intermediate_size)]
            {
                if count % degree != 0 {
                    problems
                        .push(format!("layer {layer} keeps {count} {what}, which {degree} does not divide"));
                }
            }
        }
        problems.truncate(16);
    }
    (form, problems)
}

/// The importance of every decision past `after_revision`, those to come included, in chunks.
pub(super) fn watch(
    record: Arc<RunRecord>,
    context: Arc<Context>,
    after_revision: u64,
) -> ReceiverStream<Result<pb::WatchImportanceResponse, Status>> {
    let (sender, receiver) = mpsc::channel(BUFFER);
    tokio::spawn(async move {
        let mut revisions = record.revisions();
        let mut seen = after_revision;
        loop {
            // Marked before the book is read, so that what comes after the reading wakes us.
            revisions.mark_unchanged();
            let shown = record.shown();
            for decision in shown.decisions.iter().filter(|decision| decision.revision > seen) {
                match importance(&context, &record, decision.generation).await {
                    Ok(average) => {
                        for chunk in chunks(decision, &average) {
                            if sender.send(Ok(chunk)).await.is_err() {
                                return;
                            }
                        }
                    }
                    // Taken over from the run that this one was forked from, which has it.
                    Err(failure) if failure.reason == Reason::RunNotReady => {}
                    Err(failure) => {
                        let _ = sender.send(Err(failure.into())).await;
                        return;
                    }
                }
            }
            seen = seen.max(shown.revision);
            if shown.state.has_ended() {
                return;
            }
            tokio::select! {
                // The sender lives in the record, so this cannot fail.
                _ = revisions.changed() => {}
                () = sender.closed() => return,
                () = context.closing.cancelled() => return,
            }
        }
    });
    ReceiverStream::new(receiver)
}

fn chunks(decision: &ShownDecision, average: &MovingAverage) -> Vec<pb::WatchImportanceResponse> {
    let mut all = Vec::new();
    for (layer, importance) in average.layers.iter().enumerate() {
        for (block, values) in blocks(importance) {
            for (place, values) in values.chunks(CHUNK).enumerate() {
                all.push(pb::WatchImportanceResponse {
                    revision: decision.revision,
                    generation: decision.generation.0,
                    step: decision.step,
                    layer: u32::try_from(layer).unwrap_or(u32::MAX),
                    block: block.into(),
                    first_group: u32::try_from(place * CHUNK).unwrap_or(u32::MAX),
                    values: values.to_vec(),
                    last: false,
                });
            }
        }
    }
    if let Some(last) = all.last_mut() {
        last.last = true;
    }
    all
}

fn blocks(importance: &GroupImportance) -> [(pb::Block, &[f64]); 2] {
    [(pb::Block::Attention, importance.of(Block::Attention)), (pb::Block::Mlp, importance.of(Block::Mlp))]
}
