use crate::context::Context;
use crate::registry::RegistryFull;
use std::sync::Arc;
use tonic::{Request, Response, Status};
use tracing::instrument;
use wire::client::ClientSecurity;
use wire::convert::time::duration_to_pb;
use wire::pb;
use wire::pb::registry_service_server::RegistryService;
use wire::status::{Failure, Reason};
use wire::{Violations, limits};

/// Admits workers.
#[derive(Debug, Clone)]
pub(crate) struct Registration {
    pub(crate) context: Arc<Context>,
}

#[tonic::async_trait]
impl RegistryService for Registration {
    #[instrument(name = "register", skip_all, err(level = "debug"))]
    async fn register(
        &self,
        request: Request<pb::RegisterRequest>,
    ) -> Result<Response<pb::RegisterResponse>, Status> {
        let info = request.into_inner().info.unwrap_or_default();
        let mut found = Violations::default();
        check(&info, &self.context.peers, &mut found);
        let info = found.finish(info)?;
        let registered = self
            .context
            .registry
            .register(info)
            .map_err(|full: RegistryFull| Failure::from_error(Reason::Refused, &full))?;
        Ok(Response::new(pb::RegisterResponse {
            lease_id: registered.lease_id,
            pool_workers: registered.pool_workers,
            lease_duration: Some(duration_to_pb(self.context.registry.lease())),
            renew_interval: Some(duration_to_pb(self.context.registry.renew_interval())),
        }))
    }

    async fn renew(&self, request: Request<pb::RenewRequest>) -> Result<Response<pb::RenewResponse>, Status> {
        let pb::RenewRequest { lease_id, progress, draining, .. } = request.into_inner();
        let Some(renewed) = self.context.registry.renew(&lease_id, progress, draining) else {
            return Err(Failure::new(Reason::LeaseNotFound, "the lease has run out; register again").into());
        };
        Ok(Response::new(pb::RenewResponse {
            lease_duration: Some(duration_to_pb(self.context.registry.lease())),
            idle: renewed.idle,
            draining: renewed.draining,
            pool_workers: renewed.pool_workers,
        }))
    }

    #[instrument(name = "deregister", skip_all)]
    async fn deregister(
        &self,
        request: Request<pb::DeregisterRequest>,
    ) -> Result<Response<pb::DeregisterResponse>, Status> {
        self.context.registry.deregister(&request.into_inner().lease_id);
        Ok(Response::new(pb::DeregisterResponse {}))
    }

    #[instrument(name = "drain_worker", skip_all, err(level = "debug"))]
    async fn drain_worker(
        &self,
        request: Request<pb::DrainWorkerRequest>,
    ) -> Result<Response<pb::DrainWorkerResponse>, Status> {
        let id = request.into_inner().worker_id;
        if id.is_empty() {
            return Err(Failure::invalid_field("worker_id", "is required: the name of a worker").into());
        }
        let Some(worker) = self.context.registry.drain(&id) else {
            let shown: String = id.chars().take(64).collect();
            let message = format!("no worker `{shown}` is registered");
            return Err(Failure::new(Reason::WorkerNotFound, message).into());
        };
        Ok(Response::new(pb::DrainWorkerResponse { worker: Some(worker) }))
    }

    #[instrument(name = "list_workers", skip_all)]
    async fn list_workers(
        &self,
        _request: Request<pb::ListWorkersRequest>,
    ) -> Result<Response<pb::ListWorkersResponse>, Status> {
        Ok(Response::new(pb::ListWorkersResponse { workers: self.context.registry.list() }))
    }
}

fn check(info: &pb::WorkerInfo, peers: &ClientSecurity, found: &mut Violations) {
    for (field, text) in
        [("info.id", &info.id), ("info.device", &info.device), ("info.incarnation", &info.incarnation)]
    {
        if text.is_empty() {
            found.reject(field, "is required");
        }
    }
    for (field, text) in [
        ("info.id", &info.id),
        ("info.endpoint", &info.endpoint),
        ("info.device", &info.device),
        ("info.version", &info.version),
        ("info.data_host", &info.data_host),
        ("info.incarnation", &info.incarnation),
        ("info.pool", &info.pool),
    ] {
        if text.len() > limits::MAX_TEXT_BYTES {
            found.reject(field, format!("must not exceed {} bytes", limits::MAX_TEXT_BYTES));
        }
    }
    if !(info.peak_flops.is_finite() && info.peak_flops >= 0.0) {
        found.reject("info.peak_flops", format!("must be zero or positive; got {}", info.peak_flops));
    }
    if let Err(error) = peers.check(&info.endpoint) {
        found.reject("info.endpoint", error.to_string());
    }
}
