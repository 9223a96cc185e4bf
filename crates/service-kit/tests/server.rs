//! A real server on loopback: health, reflection, trace context and the way it ends.

use service_kit::{GrpcServer, ListenArgs};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;
use tonic_reflection::pb::v1::ServerReflectionRequest;
use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;
use wire::client::{self, within};
use wire::pb;
use wire::pb::registry_service_server::{RegistryService, RegistryServiceServer};

/// Answers Renew, at once or never, and remembers the last `traceparent`.
#[derive(Clone, Default)]
struct Registry {
    seen: Arc<Mutex<Option<String>>>,
}

#[tonic::async_trait]
impl RegistryService for Registry {
    async fn register(
        &self,
        _: Request<pb::RegisterRequest>,
    ) -> Result<Response<pb::RegisterResponse>, Status> {
        std::future::pending().await
    }
    async fn renew(&self, request: Request<pb::RenewRequest>) -> Result<Response<pb::RenewResponse>, Status> {
        let header = request.metadata().get("traceparent").map(|value| value.to_str().unwrap().to_owned());
        *self.seen.lock().unwrap() = header;
        Ok(Response::new(pb::RenewResponse::default()))
    }
    async fn deregister(
        &self,
        _: Request<pb::DeregisterRequest>,
    ) -> Result<Response<pb::DeregisterResponse>, Status> {
        Ok(Response::new(pb::DeregisterResponse::default()))
    }
    async fn drain_worker(
        &self,
        _: Request<pb::DrainWorkerRequest>,
    ) -> Result<Response<pb::DrainWorkerResponse>, Status> {
        Ok(Response::new(pb::DrainWorkerResponse::default()))
    }
    async fn list_workers(
        &self,
        _: Request<pb::ListWorkersRequest>,
    ) -> Result<Response<pb::ListWorkersResponse>, Status> {
        Err(wire::status::Failure::new(wire::status::Reason::NoIdleWorker, "none").into())
    }
}

const DEADLINE: Duration = Duration::from_secs(5);

async fn start(grace: Duration) -> (String, CancellationToken, tokio::task::JoinHandle<()>, Registry) {
    let registry = Registry::default();
    let listener = ListenArgs::default().bind(([127, 0, 0, 1], 0).into()).await.unwrap();
    let endpoint = format!("http://{}", listener.address());
    let stop = CancellationToken::new();
    let server =
        GrpcServer::new(pb::DESCRIPTORS).unwrap().with_service(RegistryServiceServer::new(registry.clone()));
    let token = stop.clone();
    let served = tokio::spawn(async move { server.serve(listener, token, grace).await.unwrap() });
    (endpoint, stop, served, registry)
}

#[tokio::test]
async fn health_is_told_for_the_server_and_each_service() {
    let (endpoint, stop, served, _) = start(DEADLINE).await;
    let mut health = HealthClient::new(client::connected_channel(&endpoint).await.unwrap());
    for service in ["", "espalier.v1.RegistryService"] {
        let request = within(DEADLINE, HealthCheckRequest { service: service.into() });
        let answer = health.check(request).await.unwrap().into_inner();
        assert_eq!(answer.status, i32::from(ServingStatus::Serving), "{service:?}");
    }
    let request = within(DEADLINE, HealthCheckRequest { service: "other".into() });
    assert_eq!(health.check(request).await.unwrap_err().code(), tonic::Code::NotFound);
    stop.cancel();
    tokio::time::timeout(DEADLINE, served).await.unwrap().unwrap();
}

#[tokio::test]
async fn reflection_lists_our_services_and_their_comments() {
    let (endpoint, _stop, _served, _) = start(DEADLINE).await;
    let mut reflection = ServerReflectionClient::new(client::connected_channel(&endpoint).await.unwrap());
    let (sender, receiver) = tokio::sync::mpsc::channel(2);
    for message in [
        MessageRequest::ListServices(String::new()),
        MessageRequest::FileContainingSymbol("espalier.v1.RegistryService".into()),
    ] {
        sender
            .send(ServerReflectionRequest { host: String::new(), message_request: Some(message) })
            .await
            .unwrap();
    }
    let mut answers =
        reflection.server_reflection_info(ReceiverStream::new(receiver)).await.unwrap().into_inner();
    let Some(MessageResponse::ListServicesResponse(list)) =
        answers.message().await.unwrap().unwrap().message_response
    else {
        panic!("no list of services")
    };
    assert!(list.service.iter().any(|service| service.name == "espalier.v1.RegistryService"));
    assert!(list.service.iter().any(|service| service.name == "grpc.health.v1.Health"));
    let Some(MessageResponse::FileDescriptorResponse(files)) =
        answers.message().await.unwrap().unwrap().message_response
    else {
        panic!("no file")
    };
    let text = String::from_utf8_lossy(&files.file_descriptor_proto[0]).into_owned();
    assert!(text.contains("Announces a worker and grants it a lease."));
}

#[tokio::test]
async fn a_server_told_to_stop_ends_although_a_call_hangs() {
    let (endpoint, stop, served, _) = start(Duration::from_millis(200)).await;
    let mut registry = client::registry_client(client::connected_channel(&endpoint).await.unwrap());
    let hanging = tokio::spawn(async move {
        registry.register(within(DEADLINE, pb::RegisterRequest::default())).await.map(drop)
    });
    tokio::time::sleep(Duration::from_millis(50)).await;
    let told = Instant::now();
    stop.cancel();
    tokio::time::timeout(DEADLINE, served).await.unwrap().unwrap();
    assert!(told.elapsed() >= Duration::from_millis(200));
    hanging.abort();
    let refused = client::connected_channel(&endpoint).await;
    assert!(refused.is_err(), "the port must be closed");
}

#[tokio::test]
async fn a_deadline_ends_a_call_that_hangs() {
    let (endpoint, _stop, _served, _) = start(DEADLINE).await;
    let mut registry = client::registry_client(client::lazy_channel(&endpoint).unwrap());
    let request = within(Duration::from_millis(50), pb::RegisterRequest::default());
    let status = registry.register(request).await.unwrap_err();
    assert!(matches!(status.code(), tonic::Code::Cancelled | tonic::Code::DeadlineExceeded), "{status:?}");
}

#[tokio::test]
async fn reasons_and_details_cross_the_wire() {
    let (endpoint, _stop, _served, registry) = start(DEADLINE).await;
    let mut remote = client::registry_client(client::lazy_channel(&endpoint).unwrap());
    let status = remote.list_workers(within(DEADLINE, pb::ListWorkersRequest {})).await.unwrap_err();
    assert_eq!(status.code(), tonic::Code::ResourceExhausted);
    assert_eq!(wire::status::reason(&status), Some(wire::status::Reason::NoIdleWorker));
    remote.renew(within(DEADLINE, pb::RenewRequest::default())).await.unwrap();
    assert_eq!(*registry.seen.lock().unwrap(), None, "no span, no trace context");
}
