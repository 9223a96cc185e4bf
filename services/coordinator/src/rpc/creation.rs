//! CreateRun and ForkRun: checked, stored, shown, driven.

use super::run_service::Runs;
use crate::admission::{Admitted, admit, read_spec};
use crate::driver::{self, Start};
use crate::messages;
use crate::records::{Fork, StoredEvent, StoredRun};
use crate::resume;
use crate::run_book::{Identity, NotBooked, RunRecord};
use crate::stores::{Creation, StoresError, store_failure};
use prost::Message;
use pruning::Target;
use pruning_run::{Effect, Generation, History, Run, RunEvent, RunEventKind, RunId};
use recipe::FieldViolation;
use run_store::Created;
use sha2::{Digest, Sha256};
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use wire::convert::run as run_message;
use wire::status::{Failure, Reason};
use wire::{RunSpec, Violations, limits, pb};

/// Label of the measurements that a fork takes over.
const DENSE: &str = "dense";
const PAGE: u32 = 1000;

/// A run to be made.
struct Wanted {
    run: StoredRun,
    setup: Arc<pruning_run::RunSetup>,
    request_id: Option<String>,
    /// What the request asked for.
    request: Vec<u8>,
    /// Events taken over from another run.
    taken_over: Vec<RunEvent>,
}

impl Runs {
    pub(super) async fn create(&self, request: pb::CreateRunRequest) -> Result<pb::Run, Failure> {
        let pb::CreateRunRequest { spec, validate_only, request_id } = request;
        let mut found = Violations::default();
        let spec = read_spec(spec, &mut found);
        let request_id = checked_request_id(request_id, &mut found);
        let asked = run_message::to_pb(&spec).encode_to_vec();
        if found.is_empty()
            && let Some(earlier) = self.made_before(request_id.as_deref(), &asked)?
        {
            return Ok(messages::run(&earlier));
        }
        let (spec, Admitted { setup, plan }) = self
            .check(move |context| {
                let admitted = admit(
                    &spec,
                    &context.roots,
                    context.blame_grace(),
                    &context.registry.device(spec.tp_degree, &spec.worker_pool),
                    false,
                    found,
                )?;
                Ok((spec, admitted))
            })
            .await?;
        if validate_only {
            return Ok(messages::checked_run(&spec, plan));
        }
        let run = StoredRun { dense: setup.dense().clone(), spec, plan, fork: None };
        let wanted = Wanted { run, setup, request_id, request: asked, taken_over: Vec::new() };
        Ok(messages::run(&*self.start(wanted).await?))
    }

    pub(super) async fn fork(&self, request: pb::ForkRunRequest) -> Result<pb::Run, Failure> {
        let asked = pb::ForkRunRequest { validate_only: false, ..request.clone() }.encode_to_vec();
        let pb::ForkRunRequest { id, generation, spec, stop_pruning, validate_only, request_id } = request;
        let parent = self.find(&id)?;
        let mut found = Violations::default();
        let request_id = checked_request_id(request_id, &mut found);
        let spec = match spec {
            Some(spec) => read_spec(Some(spec), &mut found),
            None => RunSpec { export: None, ..parent.spec.clone() },
        };
        if found.is_empty()
            && let Some(earlier) = self.made_before(request_id.as_deref(), &asked)?
        {
            return Ok(messages::run(&earlier));
        }
        let generation = Generation(generation);
        let shown = parent.shown();
        let Some(decision) = shown.decisions.iter().find(|decision| decision.generation == generation) else {
            let message = format!("run `{}` has made no decision {generation}", parent.id);
            return Err(Failure::new(Reason::DecisionNotFound, message));
        };
        let kept = self.context.stores.checkpoints(&parent.id).await.map_err(store_failure)?;
        let Some(checkpoint) = kept.into_iter().find(|place| place.generation == generation) else {
            let message =
                format!("the checkpoint of decision {generation} of run `{}` was not kept", parent.id);
            return Err(Failure::new(Reason::CheckpointNotKept, message));
        };
        check_kinship(&parent.spec, &spec, checkpoint.steps_done, &mut found);
        let widths = decision.widths.clone();
        let (spec, Admitted { setup, plan }) = self
            .check(move |context| {
                let admitted = admit(
                    &spec,
                    &context.roots,
                    context.blame_grace(),
                    &context.registry.device(spec.tp_degree, &spec.worker_pool),
                    stop_pruning,
                    found,
                )?;
                Ok((spec, admitted))
            })
            .await?;
        if !stop_pruning && let Some(target) = setup.target() {
            check_room(target, &widths)?;
        }
        if validate_only {
            return Ok(messages::checked_run(&spec, plan));
        }
        let taken_over = self.taken_over(&parent, generation).await.map_err(store_failure)?;
        let fork = Fork { run_id: parent.id.clone(), generation, checkpoint, stop_pruning };
        let run = StoredRun { dense: setup.dense().clone(), spec, plan, fork: Some(fork) };
        let wanted = Wanted { run, setup, request_id, request: asked, taken_over };
        Ok(messages::run(&*self.start(wanted).await?))
    }

    /// What a run forked from a decision knows of the run before: how the dense model measured, and all decisions.
    async fn taken_over(
        &self,
        parent: &RunRecord,
        generation: Generation,
    ) -> Result<Vec<RunEvent>, StoresError> {
        let stores = &self.context.stores;
        let mut taken: Vec<RunEvent> = Vec::new();
        let mut seen = 0;
        loop {
            let events = stores.events(&parent.id, seen, PAGE).await?;
            let Some(last) = events.last() else { return Ok(taken) };
            seen = last.event.revision;
            for stored in events {
                let mask = match &stored.event.kind {
                    RunEventKind::Decision(decision) if decision.generation <= generation => {
                        stores.keep_mask(&parent.id, decision.generation).await?
                    }
                    RunEventKind::Evaluation(evaluation) if evaluation.label == DENSE => None,
                    RunEventKind::Task(task) if task.label == DENSE => None,
                    RunEventKind::Decision(_)
                    | RunEventKind::Evaluation(_)
                    | RunEventKind::Task(_)
                    | RunEventKind::StateChange { .. }
                    | RunEventKind::Step(_)
                    | RunEventKind::Export(_)
                    | RunEventKind::Checkpoint(_)
                    | RunEventKind::Restart(_)
                    | RunEventKind::Guard(_)
                    | RunEventKind::Calibration(_) => continue,
                };
                let revision = taken.len() as u64 + 1;
                taken.push(RunEvent { revision, ..stored.with_mask(mask) });
            }
        }
    }

    /// The run that this request has made before.
    fn made_before(&self, request_id: Option<&str>, asked: &[u8]) -> Result<Option<Arc<RunRecord>>, Failure> {
        match request_id.and_then(|request_id| self.context.book.by_request(request_id)) {
            Some(record) if record.request_digest == Sha256::digest(asked).to_vec() => Ok(Some(record)),
            Some(record) => Err(reused(&record.id)),
            None => Ok(None),
        }
    }

    /// Stores a run, shows it and drives it.
    async fn start(&self, wanted: Wanted) -> Result<Arc<RunRecord>, Failure> {
        let Wanted { run, setup, request_id, request, taken_over } = wanted;
        let context = &self.context;
        let _creating = context.creating.lock().await;
        if context.stopping.is_cancelled() {
            return Err(Failure::new(Reason::ShuttingDown, "the coordinator is shutting down"));
        }
        // Another call of the same request may have come in between.
        if let Some(earlier) = self.made_before(request_id.as_deref(), &request)? {
            return Ok(earlier);
        }
        context.book.check_room(&run.spec).map_err(|error| match error {
            NotBooked::SameExport { .. } => Failure::invalid_field("spec.export.path", error.to_string()),
            NotBooked::TooMany => Failure::from_error(Reason::TooManyRuns, &error),
        })?;
        let id = RunId(format!("run-{}", &uuid::Uuid::new_v4().simple().to_string()[..12]));
        // As fine as the store keeps it, so that a restart changes nothing.
        let since_epoch = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let millis = u64::try_from(since_epoch.as_millis()).unwrap_or(u64::MAX);
        let create_time = SystemTime::UNIX_EPOCH + Duration::from_millis(millis);
        let mut history = History::default();
        taken_over.iter().for_each(|event| history.take_in(event));
        let origin = run.fork.as_ref().map(|fork| fork.checkpoint.clone());
        let (machine, effects) = Run::forked(id.clone(), setup.clone(), origin, history, create_time);
        let mut events = taken_over;
        for effect in &effects {
            if let Effect::Record(event) = effect {
                events.push(event.clone());
            }
        }
        let creation = Creation {
            id: &id,
            request_id: request_id.as_deref(),
            request: &request,
            create_time,
            run: &run,
            events: &events,
        };
        let number = match context.stores.create(&creation).await.map_err(store_failure)? {
            Created::New { number } => number,
            // An earlier answer of the store was lost, and the caller was told of a failure.
            Created::Repeated { id, same_request: true } => {
                return resume::take_up_one(context, &id).await.map_err(store_failure);
            }
            Created::Repeated { id, same_request: false } => return Err(reused(&RunId(id))),
        };
        let request_digest = Sha256::digest(&request).to_vec();
        let identity = Identity { id, number, create_time, request_digest };
        let (record, requests) = RunRecord::new(identity, run, setup);
        events.iter().for_each(|event| record.publish(StoredEvent::of(event)));
        context.book.add(record.clone(), request_id);
        let start = Start::Created(Box::new(machine), effects);
        context.tasks.spawn(driver::drive(context.clone(), record.clone(), start, requests));
        Ok(record)
    }
}

fn checked_request_id(request_id: String, found: &mut Violations) -> Option<String> {
    if request_id.len() > limits::MAX_TEXT_BYTES {
        found.reject("request_id", format!("must not exceed {} bytes", limits::MAX_TEXT_BYTES));
    }
    Some(request_id).filter(|request_id| !request_id.is_empty())
}

fn reused(id: &RunId) -> Failure {
    let message = format!("this request_id has made run `{id}` from another request");
    Failure::new(Reason::RequestIdReused, message).with_fact("run_id", id)
}

/// What a fork must have in common with the run before.
fn check_kinship(parent: &RunSpec, spec: &RunSpec, steps_done: u64, found: &mut Violations) {
    let (old, new) = (&parent.recipe, &spec.recipe);
    for (field, same) in [
        ("spec.model", parent.model == spec.model),
        ("spec.training_data", parent.training_data == spec.training_data),
        ("spec.recipe.seed", old.seed == new.seed),
        ("spec.recipe.batch", old.batch == new.batch),
        ("spec.recipe.lora", old.lora == new.lora),
        ("spec.recipe.precision", old.precision == new.precision),
        ("spec.recipe.distillation", old.distillation == new.distillation),
    ] {
        if !same && !found.notes(field) {
            found.reject(field, "must be that of the run that is forked");
        }
    }
    let grouping = |recipe: &recipe::Recipe| recipe.pruning.as_ref().map(|pruning| pruning.head_grouping);
    if grouping(old) != grouping(new) {
        found.reject("spec.recipe.pruning.head_grouping", "must be that of the run that is forked");
    }
    let shrink = |recipe: &recipe::Recipe| recipe.pruning.as_ref().map(|pruning| pruning.shrink);
    if shrink(old) != shrink(new) {
        found.reject("spec.recipe.pruning.shrink", "must be that of the run that is forked");
    }
    if new.steps < steps_done {
        let problem = format!("must not be below the {steps_done} steps that are done; got {}", new.steps);
        found.reject("spec.recipe.steps", problem);
    }
}

/// Nothing that is gone can be among what the new run would keep.
fn check_room(target: &Target, widths: &[model_spec::LayerSpec]) -> Result<(), Failure> {
    let Some(last) = target.counts_at(1.0) else { return Ok(()) };
    let grown = last.iter().zip(widths).position(|(last, now)| {
        last.query_head_count > now.query_head_count
            || last.kv_head_count > now.kv_head_count
            || last.intermediate_size > now.intermediate_size
    });
    match grown {
        None => Ok(()),
        Some(layer) => Err(Failure::from(wire::InvalidFields {
            violations: vec![FieldViolation {
                field: "spec.recipe.pruning".to_owned(),
                problem: format!(
                    "asks for more than the decision has left in layer {layer}; ask for more sparsity, fork an earlier \
                     decision, or set `stop_pruning`"
                ),
            }],
        })),
    }
}
