use super::what_if::{self, LastAsked};
use crate::admission::{check_evaluation, check_output, check_tasks};
use crate::context::Context;
use crate::one_worker::Wanted;
use crate::run_book::RunRecord;
use crate::run_filter::{Filter, Order, RunFields};
use crate::stores::store_failure;
use crate::{messages, one_worker, watch};
use pruning::KeepMask;
use pruning_run::{Event, Generation, RunState};
use std::sync::Arc;
use std::time::Duration;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};
use tracing::instrument;
use wire::Violations;
use wire::convert::{data, mask, run};
use wire::pb;
use wire::pb::run_service_server::RunService;
use wire::status::{Failure, Reason};

const DEFAULT_PAGE_SIZE: u32 = 50;
const MAX_PAGE_SIZE: u32 = 1000;
/// Longest that a call waits to see what it asked for; it happens all the same after that.
const PATIENCE: Duration = Duration::from_secs(5);

/// Creates, watches and ends runs.
#[derive(Debug, Clone)]
pub(crate) struct Runs {
    pub(crate) context: Arc<Context>,
    pub(crate) last_asked: Arc<LastAsked>,
}

impl Runs {
    pub(crate) fn new(context: Arc<Context>) -> Self {
        Self { context, last_asked: Arc::default() }
    }

    pub(super) fn find(&self, id: &str) -> Result<Arc<RunRecord>, Failure> {
        if id.is_empty() {
            return Err(Failure::invalid_field("id", "is required: the identifier of a run"));
        }
        self.context.book.get(id).ok_or_else(|| {
            let shown: String = id.chars().take(64).collect();
            Failure::new(Reason::RunNotFound, format!("there is no run `{shown}`"))
        })
    }

    /// Checks what needs the file system, off the async threads.
    pub(super) async fn check<T: Send + 'static>(
        &self,
        check: impl FnOnce(&Context) -> Result<T, Failure> + Send + 'static,
    ) -> Result<T, Failure> {
        let context = self.context.clone();
        let checked = tokio::task::spawn_blocking(move || check(&context)).await;
        checked.unwrap_or_else(|error| Err(Failure::from_error(Reason::Internal, &error)))
    }

    /// What a decision keeps.
    pub(super) async fn keep_mask(
        &self,
        record: &RunRecord,
        generation: Generation,
    ) -> Result<KeepMask, Failure> {
        let stored = self.context.stores.keep_mask(&record.id, generation).await;
        stored.map_err(store_failure)?.ok_or_else(|| {
            let message = format!("run `{}` has made no decision {generation}", record.id);
            Failure::new(Reason::DecisionNotFound, message)
        })
    }

    fn list(&self, request: pb::ListRunsRequest) -> Result<pb::ListRunsResponse, Failure> {
        let pb::ListRunsRequest { page_size, page_token, filter, order_by } = request;
        let count = match page_size {
            0 => DEFAULT_PAGE_SIZE,
            size => size.min(MAX_PAGE_SIZE),
        } as usize;
        let filter =
            Filter::parse(&filter).map_err(|error| Failure::invalid_field("filter", error.to_string()))?;
        let order =
            Order::parse(&order_by).map_err(|error| Failure::invalid_field("order_by", error.to_string()))?;
        let mut picked: Vec<_> = self
            .context
            .book
            .all()
            .into_iter()
            .map(|record| (record.shown(), record))
            .filter(|(shown, record)| filter.matches(&fields(shown, record)))
            .collect();
        picked.sort_by(|(one_shown, one), (other_shown, other)| {
            order.compare(&fields(one_shown, one), &fields(other_shown, other))
        });
        // A page begins after the run that the one before ended with.
        let after = match page_token.as_str() {
            "" => 0,
            token => {
                let number: u64 = token.parse().map_err(|_| {
                    let problem = "is not the `next_page_token` of a page of this list";
                    Failure::invalid_field("page_token", problem)
                })?;
                picked.iter().position(|(_, record)| record.number == number).map_or_else(
                    || {
                        // That run has changed or is gone: newest first, what was created before it follows.
                        picked.iter().take_while(|(_, record)| record.number > number).count()
                    },
                    |place| place + 1,
                )
            }
        };
        let page: Vec<_> = picked.iter().skip(after).take(count).collect();
        let next_page_token = match page.last() {
            Some((_, last)) if after + page.len() < picked.len() => last.number.to_string(),
            Some(_) | None => String::new(),
        };
        let runs = page.iter().map(|(_, record)| messages::run(record)).collect();
        Ok(pb::ListRunsResponse { runs, next_page_token })
    }

    async fn pause(&self, id: &str) -> Result<pb::Run, Failure> {
        let record = self.find(id)?;
        let refused = |what: &str| {
            let message = format!("run `{}` {what}; it cannot be paused", record.id);
            Failure::new(Reason::RunEnded, message).with_fact("run_id", &record.id)
        };
        match record.state() {
            RunState::Succeeded | RunState::Failed | RunState::Cancelled => return Err(refused("has ended")),
            RunState::Exporting => return Err(refused("exports its result")),
            RunState::Cancelling => return Err(refused("is being cancelled")),
            RunState::Queued
            | RunState::Starting
            | RunState::Running
            | RunState::Pausing
            | RunState::Paused
            | RunState::Recovering => {}
        }
        record.request(Event::PauseRequested { reason: "paused on request".to_owned() });
        let pauses = |state| matches!(state, RunState::Pausing | RunState::Paused) || state.has_ended();
        let _ = tokio::time::timeout(PATIENCE, record.until(|shown| pauses(shown.state))).await;
        Ok(messages::run(&record))
    }

    async fn resume(&self, id: &str) -> Result<pb::Run, Failure> {
        let record = self.find(id)?;
        if record.state().has_ended() {
            let message =
                format!("run `{}` has ended; fork it to go on from one of its decisions", record.id);
            return Err(Failure::new(Reason::RunEnded, message).with_fact("run_id", &record.id));
        }
        record.request(Event::ResumeRequested { reason: "resumed on request".to_owned() });
        let goes_on = |state| !matches!(state, RunState::Pausing | RunState::Paused);
        let _ = tokio::time::timeout(PATIENCE, record.until(|shown| goes_on(shown.state))).await;
        Ok(messages::run(&record))
    }

    async fn cancel(&self, request: pb::CancelRunRequest) -> Result<pb::Run, Failure> {
        let record = self.find(&request.id)?;
        let reason = "cancelled on request".to_owned();
        record.request(Event::CancelRequested { reason, discard: request.discard });
        let ends = |state: RunState| state == RunState::Cancelling || state.has_ended();
        let _ = tokio::time::timeout(PATIENCE, record.until(|shown| ends(shown.state))).await;
        // Without steps since the last checkpoint it has ended at once.
        let ended = record.until(|shown| shown.state.has_ended());
        let _ = tokio::time::timeout(Duration::from_millis(300), ended).await;
        Ok(messages::run(&record))
    }

    async fn delete(&self, id: &str) -> Result<(), Failure> {
        let record = self.find(id)?;
        let _creating = self.context.creating.lock().await;
        if !record.state().has_ended() {
            let message = format!("run `{}` has not ended; cancel it first", record.id);
            return Err(Failure::new(Reason::RunNotReady, message).with_fact("run_id", &record.id));
        }
        let needs = |other: &Arc<RunRecord>| {
            let shown = other.shown();
            let forked = other.fork.as_ref().is_some_and(|fork| fork.run_id == record.id);
            forked && !shown.state.has_ended() && shown.checkpoint.is_none()
        };
        if let Some(fork) = self.context.book.all().into_iter().find(needs) {
            let message = format!(
                "run `{}` was forked from run `{}` and has no checkpoint of its own yet; delete it later",
                fork.id, record.id
            );
            return Err(Failure::new(Reason::RunNotReady, message).with_fact("run_id", &fork.id));
        }
        self.context.stores.delete(&record.id).await.map_err(store_failure)?;
        self.context.book.remove(&record.id);
        Ok(())
    }
}

fn fields<'a>(shown: &crate::run_book::Shown, record: &'a RunRecord) -> RunFields<'a> {
    RunFields {
        id: &record.id.0,
        state: shown.state,
        display_name: &record.spec.display_name,
        model: &record.spec.model,
        create_time: record.create_time,
        end_time: shown.end_time,
        number: record.number,
    }
}

#[tonic::async_trait]
impl RunService for Runs {
    #[instrument(name = "create_run", skip_all, err(level = "debug"))]
    async fn create_run(
        &self,
        request: Request<pb::CreateRunRequest>,
    ) -> Result<Response<pb::CreateRunResponse>, Status> {
        let run = self.create(request.into_inner()).await?;
        Ok(Response::new(pb::CreateRunResponse { run: Some(run) }))
    }

    #[instrument(name = "fork_run", skip_all, err(level = "debug"))]
    async fn fork_run(
        &self,
        request: Request<pb::ForkRunRequest>,
    ) -> Result<Response<pb::ForkRunResponse>, Status> {
        let run = self.fork(request.into_inner()).await?;
        Ok(Response::new(pb::ForkRunResponse { run: Some(run) }))
    }

    #[instrument(name = "get_run", skip_all, err(level = "debug"))]
    async fn get_run(
        &self,
        request: Request<pb::GetRunRequest>,
    ) -> Result<Response<pb::GetRunResponse>, Status> {
        let record = self.find(&request.into_inner().id)?;
        Ok(Response::new(pb::GetRunResponse { run: Some(messages::run(&record)) }))
    }

    #[instrument(name = "list_runs", skip_all, err(level = "debug"))]
    async fn list_runs(
        &self,
        request: Request<pb::ListRunsRequest>,
    ) -> Result<Response<pb::ListRunsResponse>, Status> {
        Ok(Response::new(self.list(request.into_inner())?))
    }

    type WatchRunStream = ReceiverStream<Result<pb::WatchRunResponse, Status>>;

    #[instrument(name = "watch_run", skip_all, err(level = "debug"))]
    async fn watch_run(
        &self,
        request: Request<pb::WatchRunRequest>,
    ) -> Result<Response<Self::WatchRunStream>, Status> {
        let pb::WatchRunRequest { id, after_revision } = request.into_inner();
        let record = self.find(&id)?;
        Ok(Response::new(watch::stream(record, self.context.clone(), after_revision)))
    }

    #[instrument(name = "pause_run", skip_all, err(level = "debug"))]
    async fn pause_run(
        &self,
        request: Request<pb::PauseRunRequest>,
    ) -> Result<Response<pb::PauseRunResponse>, Status> {
        let run = self.pause(&request.into_inner().id).await?;
        Ok(Response::new(pb::PauseRunResponse { run: Some(run) }))
    }

    #[instrument(name = "resume_run", skip_all, err(level = "debug"))]
    async fn resume_run(
        &self,
        request: Request<pb::ResumeRunRequest>,
    ) -> Result<Response<pb::ResumeRunResponse>, Status> {
        let run = self.resume(&request.into_inner().id).await?;
        Ok(Response::new(pb::ResumeRunResponse { run: Some(run) }))
    }

    #[instrument(name = "cancel_run", skip_all, err(level = "debug"))]
    async fn cancel_run(
        &self,
        request: Request<pb::CancelRunRequest>,
    ) -> Result<Response<pb::CancelRunResponse>, Status> {
        let run = self.cancel(request.into_inner()).await?;
        Ok(Response::new(pb::CancelRunResponse { run: Some(run) }))
    }

    #[instrument(name = "delete_run", skip_all, err(level = "debug"))]
    async fn delete_run(
        &self,
        request: Request<pb::DeleteRunRequest>,
    ) -> Result<Response<pb::DeleteRunResponse>, Status> {
        self.delete(&request.into_inner().id).await?;
        Ok(Response::new(pb::DeleteRunResponse {}))
    }

    #[instrument(name = "evaluate_run", skip_all, err(level = "debug"))]
    async fn evaluate_run(
        &self,
        request: Request<pb::EvaluateRunRequest>,
    ) -> Result<Response<pb::EvaluateRunResponse>, Status> {
        let pb::EvaluateRunRequest { id, evaluation, tasks } = request.into_inner();
        let record = self.find(&id)?;
        let wanted = self
            .check(move |context| {
                let mut found = Violations::default();
                let (roots, found_here) = (&context.roots, &mut found);
                let tasks = tasks.map(|tasks| {
                    let spec = data::tasks_from_pb(tasks, "tasks", found_here);
                    check_tasks(&spec, "tasks", roots, found_here);
                    spec
                });
                // Nothing at all is a text that names no file.
                let evaluation = evaluation.or_else(|| tasks.is_none().then(Default::default));
                let evaluation = evaluation.map(|evaluation| {
                    let spec = data::evaluation_from_pb(evaluation, "evaluation", found_here);
                    check_evaluation(&spec, "evaluation", roots, found_here);
                    spec
                });
                Ok(found.finish(Wanted { evaluation, tasks })?)
            })
            .await?;
        let measured = one_worker::evaluate(&self.context, &record, wanted).await?;
        let mut evaluations = measured.evaluations.iter().map(messages::evaluation);
        Ok(Response::new(pb::EvaluateRunResponse {
            evaluation: evaluations.next(),
            more_evaluations: evaluations.collect(),
            task_results: measured.tasks.iter().map(messages::task).collect(),
        }))
    }

    #[instrument(name = "export_run", skip_all, err(level = "debug"))]
    async fn export_run(
        &self,
        request: Request<pb::ExportRunRequest>,
    ) -> Result<Response<pb::ExportRunResponse>, Status> {
        let pb::ExportRunRequest { id, export } = request.into_inner();
        let record = self.find(&id)?;
        let spec = self
            .check(move |context| {
                let mut found = Violations::default();
                let spec = run::export_from_pb(export.unwrap_or_default(), "export", &mut found);
                check_output(&spec, "export", &context.roots, &mut found);
                Ok(found.finish(spec)?)
            })
            .await?;
        let result = one_worker::export(&self.context, &record, spec).await?;
        Ok(Response::new(pb::ExportRunResponse { export_result: Some(messages::export(&result)) }))
    }

    #[instrument(name = "list_decisions", skip_all, err(level = "debug"))]
    async fn list_decisions(
        &self,
        request: Request<pb::ListDecisionsRequest>,
    ) -> Result<Response<pb::ListDecisionsResponse>, Status> {
        let record = self.find(&request.into_inner().id)?;
        let decisions = record.shown().decisions.iter().map(messages::decision).collect();
        Ok(Response::new(pb::ListDecisionsResponse { decisions }))
    }

    #[instrument(name = "get_keep_mask", skip_all, err(level = "debug"))]
    async fn get_keep_mask(
        &self,
        request: Request<pb::GetKeepMaskRequest>,
    ) -> Result<Response<pb::GetKeepMaskResponse>, Status> {
        let pb::GetKeepMaskRequest { id, generation } = request.into_inner();
        let record = self.find(&id)?;
        let generation = generation.map_or_else(|| record.shown().generation, Generation);
        let keep_mask = match generation {
            Generation(0) => KeepMask::full(record.setup.dense()),
            decided => self.keep_mask(&record, decided).await?,
        };
        let keep_mask = Some(mask::to_pb(&keep_mask));
        Ok(Response::new(pb::GetKeepMaskResponse { generation: generation.0, keep_mask }))
    }

    type WatchImportanceStream = ReceiverStream<Result<pb::WatchImportanceResponse, Status>>;

    #[instrument(name = "watch_importance", skip_all, err(level = "debug"))]
    async fn watch_importance(
        &self,
        request: Request<pb::WatchImportanceRequest>,
    ) -> Result<Response<Self::WatchImportanceStream>, Status> {
        let pb::WatchImportanceRequest { id, after_revision } = request.into_inner();
        let record = self.find(&id)?;
        Ok(Response::new(what_if::watch(record, self.context.clone(), after_revision)))
    }

    #[instrument(name = "query_what_if", skip_all, err(level = "debug"))]
    async fn query_what_if(
        &self,
        request: Request<pb::QueryWhatIfRequest>,
    ) -> Result<Response<pb::QueryWhatIfResponse>, Status> {
        Ok(Response::new(self.answer_what_if(request.into_inner()).await?))
    }

    #[instrument(name = "list_artifacts", skip_all, err(level = "debug"))]
    async fn list_artifacts(
        &self,
        request: Request<pb::ListArtifactsRequest>,
    ) -> Result<Response<pb::ListArtifactsResponse>, Status> {
        let artifacts = self.artifacts(&request.into_inner().id).await?;
        Ok(Response::new(pb::ListArtifactsResponse { artifacts }))
    }

    type DownloadArtifactStream = ReceiverStream<Result<pb::DownloadArtifactResponse, Status>>;

    #[instrument(name = "download_artifact", skip_all, err(level = "debug"))]
    async fn download_artifact(
        &self,
        request: Request<pb::DownloadArtifactRequest>,
    ) -> Result<Response<Self::DownloadArtifactStream>, Status> {
        Ok(Response::new(self.download(request.into_inner()).await?))
    }
}
