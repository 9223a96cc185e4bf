//! Services that answer UNIMPLEMENTED, but for a few methods that behave in ways that matter here.

use http_body::Frame;
use prost::Message;
use std::convert::Infallible;
use std::future::{pending, poll_fn};
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use tonic::body::Body;
use tonic::codegen::http::{HeaderMap, Request, Response};
use tonic::codegen::{Body as HttpBody, Bytes, Service};
use tonic::server::NamedService;
use tonic::{Code, Status};
use wire::pb;
use wire::pb::registry_service_server::RegistryService;

const CHUNK_BYTES: usize = 16 << 10;

/// What the services saw.
#[derive(Debug, Clone, Default)]
pub struct Stub(Arc<Seen>);

#[derive(Debug, Default)]
struct Seen {
    calls: Mutex<Vec<Call>>,
    streamed_bytes: AtomicU64,
    stream_dropped: AtomicBool,
}

/// A call that reached a service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Call {
    pub path: String,
    pub principal: Option<service_kit::Principal>,
    /// Whether the token was still among the headers.
    pub authorization: bool,
}

impl Stub {
    #[must_use]
    pub fn calls(&self) -> Vec<Call> {
        self.0.calls.lock().expect("no panic").clone()
    }

    /// Bytes that WatchRun handed to the server.
    #[must_use]
    pub fn streamed_bytes(&self) -> u64 {
        self.0.streamed_bytes.load(Ordering::SeqCst)
    }

    /// Whether the server let go of a WatchRun.
    #[must_use]
    pub fn stream_dropped(&self) -> bool {
        self.0.stream_dropped.load(Ordering::SeqCst)
    }

    pub(crate) fn runs(&self) -> Runs {
        Runs(self.clone())
    }

    pub(crate) fn workers(&self) -> Workers {
        Workers(self.clone())
    }

    async fn answer(self, request: Request<Body>) -> Response<Body> {
        let path = request.uri().path().to_owned();
        let call = Call {
            path: path.clone(),
            principal: request.extensions().get().cloned(),
            authorization: request.headers().contains_key("authorization"),
        };
        self.0.calls.lock().expect("no panic").push(call);
        match path.rsplit('/').next() {
            Some("WatchRun") => grpc(Body::new(Endless(self))),
            Some("CancelRun") => match read(request.into_body()).await {
                Ok(()) => message(&pb::CancelRunResponse::default()),
                Err(status) => status.into_http(),
            },
            Some("CreateRun") => {
                let run = pb::Run { id: "run-7".into(), ..pb::Run::default() };
                message(&pb::CreateRunResponse { run: Some(run) })
            }
            Some("GetKeepMask") => pending().await,
            Some(_) | None => Status::new(Code::Unimplemented, "a stub").into_http(),
        }
    }
}

fn grpc(body: Body) -> Response<Body> {
    let mut response = Response::new(body);
    response.headers_mut().insert("content-type", "application/grpc".parse().expect("a header"));
    response
}

fn message(message: &impl Message) -> Response<Body> {
    let mut bytes = vec![0];
    bytes.extend_from_slice(&u32::try_from(message.encoded_len()).expect("a small message").to_be_bytes());
    message.encode(&mut bytes).expect("a vector grows");
    grpc(Body::new(One(vec![Frame::trailers(trailers()), Frame::data(bytes.into())])))
}

fn trailers() -> HeaderMap {
    let mut trailers = HeaderMap::new();
    Status::new(Code::Ok, "").add_header(&mut trailers).expect("a header");
    trailers
}

async fn read(body: Body) -> Result<(), Status> {
    let mut body = pin!(body);
    while let Some(frame) = poll_fn(|context| body.as_mut().poll_frame(context)).await {
        frame?;
    }
    Ok(())
}

/// Frames, the last one first.
struct One(Vec<Frame<Bytes>>);

impl HttpBody for One {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        Poll::Ready(self.0.pop().map(Ok))
    }
}

/// As much as is asked for.
struct Endless(Stub);

impl HttpBody for Endless {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let mut bytes = vec![0; CHUNK_BYTES];
        let length = u32::try_from(CHUNK_BYTES - 5).expect("a small message");
        bytes[1..5].copy_from_slice(&length.to_be_bytes());
        self.0.0.streamed_bytes.fetch_add(CHUNK_BYTES as u64, Ordering::SeqCst);
        Poll::Ready(Some(Ok(Frame::data(bytes.into()))))
    }
}

impl Drop for Endless {
    fn drop(&mut self) {
        self.0.0.stream_dropped.store(true, Ordering::SeqCst);
    }
}

macro_rules! service {
    ($name:ident, $path:literal) => {
        #[derive(Debug, Clone)]
        pub(crate) struct $name(Stub);

        impl NamedService for $name {
            const NAME: &'static str = $path;
        }

        impl Service<Request<Body>> for $name {
            type Response = Response<Body>;
            type Error = Infallible;
            type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, Infallible>> + Send>>;

            fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
                Poll::Ready(Ok(()))
            }

            fn call(&mut self, request: Request<Body>) -> Self::Future {
                let stub = self.0.clone();
                Box::pin(async move { Ok(stub.answer(request).await) })
            }
        }
    };
}

service!(Runs, "espalier.v1.RunService");
service!(Workers, "espalier.v1.WorkerService");

/// The generated service, which decodes what it is sent.
#[derive(Debug, Clone)]
pub struct Registry(pub Stub);

impl Registry {
    fn unimplemented<T>(&self, name: &str, request: &tonic::Request<impl Sized>) -> Result<T, Status> {
        let call = Call {
            path: format!("/espalier.v1.RegistryService/{name}"),
            principal: request.extensions().get().cloned(),
            authorization: request.metadata().contains_key("authorization"),
        };
        self.0.0.calls.lock().expect("no panic").push(call);
        Err(Status::new(Code::Unimplemented, "a stub"))
    }
}

type Answer<T> = Result<tonic::Response<T>, Status>;

#[tonic::async_trait]
impl RegistryService for Registry {
    async fn register(&self, request: tonic::Request<pb::RegisterRequest>) -> Answer<pb::RegisterResponse> {
        self.unimplemented("Register", &request)
    }

    async fn renew(&self, request: tonic::Request<pb::RenewRequest>) -> Answer<pb::RenewResponse> {
        self.unimplemented("Renew", &request)
    }

    async fn deregister(
        &self,
        request: tonic::Request<pb::DeregisterRequest>,
    ) -> Answer<pb::DeregisterResponse> {
        self.unimplemented("Deregister", &request)
    }

    async fn list_workers(
        &self,
        request: tonic::Request<pb::ListWorkersRequest>,
    ) -> Answer<pb::ListWorkersResponse> {
        self.unimplemented("ListWorkers", &request)
    }

    async fn drain_worker(
        &self,
        request: tonic::Request<pb::DrainWorkerRequest>,
    ) -> Answer<pb::DrainWorkerResponse> {
        self.unimplemented("DrainWorker", &request)
    }
}
