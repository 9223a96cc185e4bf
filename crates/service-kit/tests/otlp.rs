//! Spans reach an OTLP endpoint, at the latest when the guard is dropped.

use service_kit::{GrpcServer, ListenArgs, LogArgs, telemetry};
use std::convert::Infallible;
use std::future::{Ready, ready};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;
use tokio_util::sync::CancellationToken;
use tonic::body::Body;
use tonic::codegen::{Service, http};
use tonic::server::NamedService;

/// Counts the calls to a collector, and answers each with an empty success.
#[derive(Clone, Default)]
struct Collector(Arc<AtomicU64>);

impl NamedService for Collector {
    const NAME: &'static str = "opentelemetry.proto.collector.trace.v1.TraceService";
}

impl Service<http::Request<Body>> for Collector {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = Ready<Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        assert!(request.uri().path().ends_with("/Export"));
        self.0.fetch_add(1, Ordering::SeqCst);
        let response =
            http::Response::builder().header("content-type", "application/grpc").header("grpc-status", "0");
        ready(Ok(response.body(Body::empty()).unwrap()))
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn spans_are_sent_when_the_guard_is_dropped() {
    let collector = Collector::default();
    let listener = ListenArgs::default().bind(([127, 0, 0, 1], 0).into()).await.unwrap();
    let endpoint = format!("http://{}", listener.address());
    let server = GrpcServer::new(wire::pb::DESCRIPTORS).unwrap().with_service(collector.clone());
    tokio::spawn(server.serve(listener, CancellationToken::new(), Duration::ZERO));

    let args = LogArgs { otlp_endpoint: Some(endpoint), ..LogArgs::default() };
    let guard = telemetry::init("test", &args).unwrap();
    assert!(telemetry::init("test", &args).is_err(), "once a process");
    tracing::info_span!("work").in_scope(|| tracing::info!("done"));
    tokio::task::spawn_blocking(move || drop(guard)).await.unwrap();
    assert!(collector.0.load(Ordering::SeqCst) >= 1);
}
