//! A gRPC server with health, reflection, keep-alive, limits, a span for each call, and an orderly end.

use crate::listen::Listener;
use crate::trace_context::request_span;
use std::convert::Infallible;
use std::time::Duration;
use tokio_util::sync::CancellationToken;
use tonic::body::Body;
use tonic::codegen::{Service, http};
use tonic::server::NamedService;
use tonic::service::RoutesBuilder;
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;
use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;
use tracing::{debug, warn};

const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(10);
const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(10);
const MAX_STREAMS_PER_CONNECTION: u32 = 256;
const MAX_HEADER_BYTES: u32 = 64 << 10;

/// Why a server could not run.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    #[error("the descriptors for reflection cannot be read")]
    Reflection(#[source] tonic_reflection::server::Error),
    #[error("the server failed")]
    Transport(#[source] tonic::transport::Error),
}

/// Collects services, then serves them. The health of each, and of the server as a whole under the empty name, is
/// SERVING from the start and NOT_SERVING once told to stop.
#[derive(Debug)]
pub struct GrpcServer {
    routes: RoutesBuilder,
    health: HealthReporter,
    names: Vec<&'static str>,
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
        Ok(Self { routes, health, names: vec![""] })
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
        let Self { routes, health, names } = self;
        for name in &names {
            health.set_service_status(*name, ServingStatus::Serving).await;
        }
        let address = listener.address();
        let draining = CancellationToken::new();
        let told = {
            let (stop, draining) = (stop.clone(), draining.clone());
            async move {
                stop.cancelled().await;
                for name in names {
                    health.set_service_status(name, ServingStatus::NotServing).await;
                }
                draining.cancel();
            }
        };
        let serving = Server::builder()
            .trace_fn(request_span)
            .http2_keepalive_interval(Some(KEEP_ALIVE_INTERVAL))
            .http2_keepalive_timeout(Some(KEEP_ALIVE_TIMEOUT))
            .max_concurrent_streams(MAX_STREAMS_PER_CONNECTION)
            .http2_max_header_list_size(MAX_HEADER_BYTES)
            .add_routes(routes.routes())
            .serve_with_incoming_shutdown(TcpIncoming::from(listener.socket).with_nodelay(Some(true)), told);
        let overdue = async {
            draining.cancelled().await;
            tokio::time::sleep(grace).await;
        };
        tokio::select! {
            ended = serving => ended.map_err(ServeError::Transport)?,
            () = overdue => warn!(%address, grace_seconds = grace.as_secs_f64(), "calls still running were cut off"),
        }
        debug!(%address, "server ended");
        Ok(())
    }
}
