//! Typed clients with the project's limits, keep-alive and trace context.
//!
//! No call goes without a deadline: wrap its message by [`within`]. A stream's deadline ends with its response headers;
//! after that keep-alive notices a peer that is gone.

mod security;
mod token;

pub use security::{ClientSecurity, SecurityError, TlsFiles};
pub use token::{Token, TokenError};

use crate::limits;
use crate::pb::registry_service_client::RegistryServiceClient;
use crate::pb::run_service_client::RunServiceClient;
use crate::pb::worker_service_client::WorkerServiceClient;
use opentelemetry::propagation::Injector;
use std::time::Duration;
use tonic::metadata::{MetadataKey, MetadataMap, MetadataValue};
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Status};
use tracing_opentelemetry::OpenTelemetrySpanExt;

/// A channel that sends the current span's trace context along, and a token if there is one.
pub type TracedChannel = InterceptedService<Channel, CallContext>;
pub type RunClient = RunServiceClient<TracedChannel>;
pub type RegistryClient = RegistryServiceClient<TracedChannel>;
pub type WorkerClient = WorkerServiceClient<TracedChannel>;

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    #[error("`{endpoint}` is not a URL such as http://127.0.0.1:7070")]
    BadUrl { endpoint: String },
    #[error("`{endpoint}` needs --tls-ca FILE: the certificates of who may sign the server's")]
    NoAuthority { endpoint: String },
    #[error("`{endpoint}` is not encrypted, but --tls-ca is given; use https://")]
    Plain { endpoint: String },
    #[error(
        "a token is not sent to `{endpoint}`, another machine, without encryption; use https://, or pass --insecure \
         where the network itself is closed"
    )]
    PlainToken { endpoint: String },
    #[error("failed to connect to {endpoint}; is it running, and is the address right?")]
    Unreachable {
        endpoint: String,
        #[source]
        cause: tonic::transport::Error,
    },
}

/// A way to a server, with what proves to it who is calling.
#[derive(Debug, Clone)]
pub struct Connection {
    channel: Channel,
    token: Option<Token>,
}

impl From<Channel> for Connection {
    fn from(channel: Channel) -> Self {
        Self { channel, token: None }
    }
}

impl Connection {
    /// The channel with trace context and token, for clients other than the three below.
    #[must_use]
    pub fn traced(self) -> TracedChannel {
        let (channel, context) = self.split();
        InterceptedService::new(channel, context)
    }

    fn split(self) -> (Channel, CallContext) {
        (self.channel, CallContext { token: self.token })
    }
}

/// A plain channel that connects at its first use, and again after it broke.
///
/// # Errors
/// When `endpoint` is not an `http://` URL with a host.
pub fn lazy_channel(endpoint: &str) -> Result<Channel, ConnectError> {
    Ok(described(endpoint)?.connect_lazy())
}

/// A plain channel that is connected.
///
/// # Errors
/// When `endpoint` is not a URL or nobody answers there in [`limits::CONNECT_TIMEOUT`].
pub async fn connected_channel(endpoint: &str) -> Result<Channel, ConnectError> {
    described(endpoint)?
        .connect()
        .await
        .map_err(|cause| ConnectError::Unreachable { endpoint: endpoint.to_owned(), cause })
}

fn described(endpoint: &str) -> Result<Endpoint, ConnectError> {
    let bad_url = || ConnectError::BadUrl { endpoint: endpoint.to_owned() };
    if !endpoint.starts_with("http://") {
        return Err(bad_url());
    }
    let described = Endpoint::from_shared(endpoint.to_owned()).map_err(|_| bad_url())?;
    if described.uri().host().is_none_or(str::is_empty) {
        return Err(bad_url());
    }
    Ok(described
        .connect_timeout(limits::CONNECT_TIMEOUT)
        .http2_keep_alive_interval(limits::KEEP_ALIVE_INTERVAL)
        .keep_alive_timeout(limits::KEEP_ALIVE_TIMEOUT)
        .keep_alive_while_idle(true)
        .http2_max_header_list_size(limits::HEADER_BYTES)
        .tcp_nodelay(true))
}

/// The coordinator, as operators see it.
#[must_use]
pub fn run_client(connection: impl Into<Connection>) -> RunClient {
    let (channel, context) = connection.into().split();
    RunServiceClient::with_interceptor(channel, context)
        .max_decoding_message_size(limits::MASK_MESSAGE_BYTES)
        .max_encoding_message_size(limits::MESSAGE_BYTES)
}

/// The coordinator, as workers see it.
#[must_use]
pub fn registry_client(connection: impl Into<Connection>) -> RegistryClient {
    let (channel, context) = connection.into().split();
    RegistryServiceClient::with_interceptor(channel, context)
        .max_decoding_message_size(limits::MESSAGE_BYTES)
        .max_encoding_message_size(limits::MESSAGE_BYTES)
}

/// A worker, as the coordinator sees it.
#[must_use]
pub fn worker_client(connection: impl Into<Connection>) -> WorkerClient {
    let (channel, context) = connection.into().split();
    WorkerServiceClient::with_interceptor(channel, context)
        .max_decoding_message_size(limits::MASK_MESSAGE_BYTES)
        .max_encoding_message_size(limits::MASK_MESSAGE_BYTES)
}

/// A request that must be answered within `deadline`.
#[must_use]
pub fn within<T>(deadline: Duration, message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(deadline);
    request
}

/// Puts the current span's W3C trace context, and the token, into the metadata of every call.
#[derive(Debug, Clone, Default)]
pub struct CallContext {
    token: Option<Token>,
}

impl Interceptor for CallContext {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        let context = tracing::Span::current().context();
        opentelemetry::global::get_text_map_propagator(|propagator| {
            propagator.inject_context(&context, &mut Metadata(request.metadata_mut()));
        });
        if let Some(token) = &self.token {
            request.metadata_mut().insert("authorization", token.authorization());
        }
        Ok(request)
    }
}

struct Metadata<'a>(&'a mut MetadataMap);

impl Injector for Metadata<'_> {
    fn set(&mut self, key: &str, value: String) {
        // A propagator's keys and values are ASCII; one that is not is left out rather than failing the call.
        if let (Ok(key), Ok(value)) =
            (MetadataKey::from_bytes(key.as_bytes()), MetadataValue::try_from(value))
        {
            self.0.insert(key, value);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status;

    #[tokio::test]
    async fn what_is_not_an_http_url_is_refused_before_anything_is_sent() {
        for endpoint in ["", "127.0.0.1:7070", "http://", "https://a:1", "unix:/x", "http://a b"] {
            assert!(matches!(lazy_channel(endpoint), Err(ConnectError::BadUrl { .. })), "{endpoint:?}");
        }
    }

    #[tokio::test]
    async fn an_address_where_nobody_listens_is_named() {
        let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let endpoint = format!("http://{free}");
        let error = connected_channel(&endpoint).await.unwrap_err();
        assert!(status::chain(&error).contains(&endpoint), "{error}");
    }

    #[test]
    fn the_span_of_the_caller_travels_as_traceparent() {
        use opentelemetry::trace::{TraceContextExt, TracerProvider};
        use tracing_subscriber::layer::SubscriberExt;

        opentelemetry::global::set_text_map_propagator(
            opentelemetry_sdk::propagation::TraceContextPropagator::new(),
        );
        let provider = opentelemetry_sdk::trace::SdkTracerProvider::builder().build();
        let subscriber = tracing_subscriber::registry()
            .with(tracing_opentelemetry::layer().with_tracer(provider.tracer("test")));
        let (sent, trace_id) = tracing::subscriber::with_default(subscriber, || {
            let span = tracing::info_span!("call");
            let _entered = span.enter();
            let request = CallContext::default().call(Request::new(())).unwrap();
            let sent = request.metadata().get("traceparent").unwrap().to_str().unwrap().to_owned();
            (sent, span.context().span().span_context().trace_id().to_string())
        });
        assert!(sent.contains(&trace_id), "{sent} {trace_id}");
    }
}
