use crate::admission::{Admitted, admit, check_evaluation, check_output, check_tasks, read_spec};
use crate::context::Context;
use crate::one_worker::Wanted;
use crate::run_book::{NewRun, NotBooked, RunRecord};
use crate::{driver, messages, one_worker, watch};
use pruning_run::Generation;
use std::sync::Arc;
use std::time::Duration;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};
use tracing::instrument;
use wire::convert::{data, mask, run};
use wire::pb;
use wire::pb::run_service_server::RunService;
use wire::status::{Failure, Reason};
use wire::{RunSpec, Violations, limits};

const DEFAULT_PAGE_SIZE: u32 = 50;
const MAX_PAGE_SIZE: u32 = 1000;
/// Longest that CancelRun waits to see the run ended; ending its sessions goes on after that.
const CANCEL_PATIENCE: Duration = Duration::from_secs(5);

/// Creates, watches and ends runs.
#[derive(Debug, Clone)]
pub(crate) struct Runs {
    pub(crate) context: Arc<Context>,
}

impl Runs {
    fn find(&self, id: &str) -> Result<Arc<RunRecord>, Failure> {
        if id.is_empty() {
            return Err(Failure::invalid_field("id", "is required: the identifier of a run"));
        }
        self.context.book.get(id).ok_or_else(|| {
            let shown: String = id.chars().take(64).collect();
            Failure::new(Reason::RunNotFound, format!("there is no run `{shown}`"))
        })
    }

    /// The run that this request has made before.
    fn made_before(&self, request_id: &str, spec: &RunSpec) -> Result<Option<Arc<RunRecord>>, Failure> {
        match self.context.book.by_request(request_id) {
            Some(record) if record.spec == *spec => Ok(Some(record)),
            Some(record) => Err(reused(&record)),
            None => Ok(None),
        }
    }

    /// Checks what needs the file system, off the async threads.
    async fn check<T: Send + 'static>(
        &self,
        check: impl FnOnce(&Context) -> Result<T, Failure> + Send + 'static,
    ) -> Result<T, Failure> {
        let context = self.context.clone();
        let checked = tokio::task::spawn_blocking(move || check(&context)).await;
        checked.unwrap_or_else(|error| Err(Failure::from_error(Reason::Internal, &error)))
    }

    fn start(&self, new: NewRun) -> Result<Arc<RunRecord>, Failure> {
        if self.context.stopping.is_cancelled() {
            return Err(Failure::new(Reason::ShuttingDown, "the coordinator is shutting down"));
        }
        let spec = new.spec.clone();
        let record = match self.context.book.add(new) {
            Ok(record) => record,
            Err(NotBooked::Repeated(record)) if record.spec == spec => return Ok(record),
            Err(NotBooked::Repeated(record)) => return Err(reused(&record)),
            Err(error @ NotBooked::SameExport { .. }) => {
                return Err(Failure::invalid_field("spec.export.path", error.to_string()));
            }
            Err(error @ NotBooked::TooMany) => return Err(Failure::from_error(Reason::TooManyRuns, &error)),
        };
        let ticket = self.context.registry.enqueue(&record.id.0, record.setup.tp_degree());
        self.context.tasks.spawn(driver::drive(self.context.clone(), record.clone(), ticket));
        Ok(record)
    }
}

fn reused(record: &RunRecord) -> Failure {
    let message = format!("this request_id has made run `{}` from another spec", record.id);
    Failure::new(Reason::RequestIdReused, message).with_fact("run_id", &record.id)
}

#[tonic::async_trait]
impl RunService for Runs {
    #[instrument(name = "create_run", skip_all, err(level = "debug"))]
    async fn create_run(
        &self,
        request: Request<pb::CreateRunRequest>,
    ) -> Result<Response<pb::CreateRunResponse>, Status> {
        let pb::CreateRunRequest { spec, validate_only, request_id } = request.into_inner();
        let mut found = Violations::default();
        let spec = read_spec(spec, &mut found);
        if request_id.len() > limits::MAX_TEXT_BYTES {
            found.reject("request_id", format!("must not exceed {} bytes", limits::MAX_TEXT_BYTES));
        }
        let request_id = Some(request_id).filter(|request_id| !request_id.is_empty());
        if let Some(request_id) = &request_id
            && found.is_empty()
            && let Some(earlier) = self.made_before(request_id, &spec)?
        {
            return Ok(Response::new(pb::CreateRunResponse { run: Some(messages::run(&earlier)) }));
        }
        let (spec, Admitted { setup, plan }) = self
            .check(move |context| {
                let admitted = admit(&spec, &context.roots, context.blame_grace(), found)?;
                Ok((spec, admitted))
            })
            .await?;
        let run = if validate_only {
            messages::checked_run(&spec, plan)
        } else {
            messages::run(&*self.start(NewRun { spec, setup, plan, request_id })?)
        };
        Ok(Response::new(pb::CreateRunResponse { run: Some(run) }))
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
        let pb::ListRunsRequest { page_size, page_token } = request.into_inner();
        let count = match page_size {
            0 => DEFAULT_PAGE_SIZE,
            size => size.min(MAX_PAGE_SIZE),
        } as usize;
        let before = match page_token.as_str() {
            "" => u64::MAX,
            token => token.parse().map_err(|_| {
                Failure::invalid_field("page_token", "is not the `next_page_token` of a page of this list")
            })?,
        };
        let mut page = self.context.book.newest(before, count + 1);
        let more = page.len() > count;
        page.truncate(count);
        let next_page_token = match page.last() {
            Some(last) if more => last.number.to_string(),
            Some(_) | None => String::new(),
        };
        let runs = page.iter().map(|record| messages::run(record)).collect();
        Ok(Response::new(pb::ListRunsResponse { runs, next_page_token }))
    }

    type WatchRunStream = ReceiverStream<Result<pb::WatchRunResponse, Status>>;

    #[instrument(name = "watch_run", skip_all, err(level = "debug"))]
    async fn watch_run(
        &self,
        request: Request<pb::WatchRunRequest>,
    ) -> Result<Response<Self::WatchRunStream>, Status> {
        let pb::WatchRunRequest { id, after_revision } = request.into_inner();
        let record = self.find(&id)?;
        Ok(Response::new(watch::stream(record, after_revision)))
    }

    #[instrument(name = "cancel_run", skip_all, err(level = "debug"))]
    async fn cancel_run(
        &self,
        request: Request<pb::CancelRunRequest>,
    ) -> Result<Response<pb::CancelRunResponse>, Status> {
        let record = self.find(&request.into_inner().id)?;
        record.request_cancel("cancelled on request");
        // The run is returned as it then is; the driver sees the request before anything else.
        let _ = tokio::time::timeout(CANCEL_PATIENCE, record.ended()).await;
        Ok(Response::new(pb::CancelRunResponse { run: Some(messages::run(&record)) }))
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
        let decisions =
            record.shown().decisions.iter().map(|decision| messages::decision(decision)).collect();
        Ok(Response::new(pb::ListDecisionsResponse { decisions }))
    }

    #[instrument(name = "get_keep_mask", skip_all, err(level = "debug"))]
    async fn get_keep_mask(
        &self,
        request: Request<pb::GetKeepMaskRequest>,
    ) -> Result<Response<pb::GetKeepMaskResponse>, Status> {
        let pb::GetKeepMaskRequest { id, generation } = request.into_inner();
        let record = self.find(&id)?;
        let generation = generation.map_or_else(|| record.shown().generation(), Generation);
        let Some(keep_mask) = record.keep_mask(generation) else {
            let message = format!("run `{}` has made no decision {generation}", record.id);
            return Err(Failure::new(Reason::DecisionNotFound, message).into());
        };
        let keep_mask = Some(mask::to_pb(&keep_mask));
        Ok(Response::new(pb::GetKeepMaskResponse { generation: generation.0, keep_mask }))
    }
}
