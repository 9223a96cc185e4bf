//! A gRPC server with health, reflection, access control, limits, a span for each call, and an orderly end.

use crate::audit::AuditSink;
use crate::guard::{GuardLayer, Rules};
use crate::incoming::Incoming;
use crate::listen::Listener;
use crate::readiness;
use crate::trace_context::request_span;
use std::convert::Infallible;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tonic::body::Body;
use tonic::codegen::{Service, http};
use tonic::server::NamedService;
use tonic::service::RoutesBuilder;
use tonic::transport::Server;
use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;
use tracing::{debug, warn};

/// Has the health of the services follow `ready` for as long as that is told.
async fn follow(ready: Option<watch::Receiver<bool>>, health: HealthReporter, names: Vec<&'static str>) {
    let mut ready = ready.unwrap_or_else(|| watch::channel(true).1);
    loop {
        let is_ready = *ready.borrow_and_update();
        readiness::set(is_ready);
        let status = if is_ready { ServingStatus::Serving } else { ServingStatus::NotServing };
        for name in &names {
            health.set_service_status(*name, status).await;
        }
        if ready.changed().await.is_err() {
            return;
        }
    }
}

/// Why a server could not run.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    #[error("the descriptors for reflection cannot be read")]
    Reflection(#[source] tonic_reflection::server::Error),
    #[error("the server failed")]
    Transport(#[source] tonic::transport::Error),
}

/// Collects services, then serves them. The health of the server as a whole, under the empty name, is SERVING from the
/// start and NOT_SERVING once told to stop; that of its services as well, unless they wait to be ready.
pub struct GrpcServer {
    routes: RoutesBuilder,
    health: HealthReporter,
    names: Vec<&'static str>,
    sink: Option<Arc<dyn AuditSink>>,
    ready: Option<watch::Receiver<bool>>,
}

impl fmt::Debug for GrpcServer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GrpcServer").field("names", &self.names).finish_non_exhaustive()
    }
}

impl GrpcServer {
    /// A server with health and reflection (v1 and v1alpha) of `descriptors`, an encoded `FileDescriptorSet`.
    ///
    /// # Errors
    /// When the descriptors cannot be read.
    pub fn new(descriptors: &'static [u8]) -> Result<Self, ServeError> {
        let configured = || {
            tonic_reflection::server::Builder::configure()
                .register_encoded_file_descriptor_set(descriptors)
                .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        };
        let (health, health_service) = tonic_health::server::health_reporter();
        let mut routes = RoutesBuilder::default();
        routes
            .add_service(health_service)
            .add_service(configured().build_v1().map_err(ServeError::Reflection)?)
            .add_service(configured().build_v1alpha().map_err(ServeError::Reflection)?);
        Ok(Self { routes, health, names: Vec::new(), sink: None, ready: None })
    }

    /// Adds a service.
    #[must_use]
    pub fn with_service<S>(mut self, service: S) -> Self
    where
        S: Service<http::Request<Body>, Response = http::Response<Body>, Error = Infallible>
            + NamedService
            + Clone
            + Send
            + Sync
            + 'static,
        S::Future: Send + 'static,
    {
        self.routes.add_service(service);
        self.names.push(S::NAME);
        self
    }

    /// Tells `sink` of every changing call, besides the log.
    #[must_use]
    pub fn with_audit(mut self, sink: Arc<dyn AuditSink>) -> Self {
        self.sink = Some(sink);
        self
    }

    /// Its services are SERVING only while `ready` says so, and not from the start; the server as a whole is.
    #[must_use]
    pub fn with_readiness(mut self, ready: watch::Receiver<bool>) -> Self {
        self.ready = Some(ready);
        self
    }

    /// What sets the health of the services, by their full names.
    #[must_use]
    pub fn health(&self) -> HealthReporter {
        self.health.clone()
    }

    /// Serves until `stop`, then lets running calls end for at most `grace`.
    ///
    /// # Errors
    /// When the transport fails.
    pub async fn serve(
        self,
        listener: Listener,
        stop: CancellationToken,
        grace: Duration,
    ) -> Result<(), ServeError> {
        let Self { routes, health, names, sink, ready } = self;
        health.set_service_status("", ServingStatus::Serving).await;
        let following = follow(ready, health.clone(), names.clone());
        let address = listener.address();
        let draining = CancellationToken::new();
        let told = {
            let (stop, draining) = (stop.clone(), draining.clone());
            async move {
                stop.cancelled().await;
                readiness::set(false);
                for name in names.into_iter().chain([""]) {
                    health.set_service_status(name, ServingStatus::NotServing).await;
                }
                draining.cancel();
            }
        };
        let Listener { socket, tls, policy, limits, .. } = listener;
        let keep_alive = Some(Duration::from_secs(limits.keep_alive_seconds));
        let mut server = Server::builder();
        if let Some(seconds) = limits.max_connection_seconds {
            server = server.max_connection_age(Duration::from_secs(seconds));
        }
        let serving = server
            .trace_fn(request_span)
            .http2_keepalive_interval(keep_alive)
            .http2_keepalive_timeout(keep_alive)
            .max_concurrent_streams(limits.max_streams)
            .http2_max_header_list_size(limits.max_header_bytes)
            .concurrency_limit_per_connection(limits.max_calls as usize)
            .load_shed(true)
            .layer(GuardLayer(Arc::new(Rules { policy, limits, sink })))
            .add_routes(routes.routes())
            .serve_with_incoming_shutdown(Incoming::new(socket, tls, limits), told);
        let overdue = async {
            draining.cancelled().await;
            tokio::time::sleep(grace).await;
        };
        tokio::select! {
            ended = serving => ended.map_err(ServeError::Transport)?,
            () = async {
                following.await;
                std::future::pending::<()>().await;
            } => {}
            () = overdue => warn!(%address, grace_seconds = grace.as_secs_f64(), "calls still running were cut off"),
        }
        debug!(%address, "server ended");
        Ok(())
    }
}
