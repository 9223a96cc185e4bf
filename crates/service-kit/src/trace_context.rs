//! The server's side of W3C trace context: a span for every call, below the caller's.

use opentelemetry::propagation::Extractor;
use opentelemetry::trace::TraceContextExt;
use tonic::codegen::http;
use tracing::{Span, field, info_span, trace_span};
use tracing_opentelemetry::OpenTelemetrySpanExt;

/// The span of an incoming call, child of the span that its `traceparent` names. Health and reflection calls get one
/// that is not shown by default.
#[must_use]
pub fn request_span(request: &http::Request<()>) -> Span {
    let mut parts = request.uri().path().trim_start_matches('/').splitn(2, '/');
    let service = parts.next().unwrap_or_default();
    let method = parts.next().unwrap_or_default();
    if service.starts_with("grpc.") {
        return trace_span!("rpc", rpc.service = service, rpc.method = method);
    }
    let span = info_span!(
        "rpc",
        otel.name = %format_args!("{service}/{method}"),
        otel.kind = "server",
        rpc.system = "grpc",
        rpc.service = service,
        rpc.method = method,
        trace_id = field::Empty,
    );
    let parent = opentelemetry::global::get_text_map_propagator(|propagator| {
        propagator.extract(&Headers(request.headers()))
    });
    let trace = parent.span().span_context().clone();
    // A span that no layer records has nothing to attach a parent to.
    if trace.is_valid() && span.set_parent(parent).is_ok() {
        span.record("trace_id", field::display(trace.trace_id()));
    }
    span
}

struct Headers<'a>(&'a http::HeaderMap);

impl Extractor for Headers<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key)?.to_str().ok()
    }

    fn keys(&self) -> Vec<&str> {
        self.0.keys().map(http::HeaderName::as_str).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use opentelemetry::trace::TracerProvider;
    use opentelemetry_sdk::propagation::TraceContextPropagator;
    use opentelemetry_sdk::trace::SdkTracerProvider;
    use tracing_subscriber::layer::SubscriberExt;

    #[test]
    fn a_call_continues_the_trace_of_its_caller() {
        opentelemetry::global::set_text_map_propagator(TraceContextPropagator::new());
        let provider = SdkTracerProvider::builder().build();
        let subscriber = tracing_subscriber::registry()
            .with(tracing_opentelemetry::layer().with_tracer(provider.tracer("test")));
        let trace_id = "0af7651916cd43dd8448eb211c80319c";
        let request = http::Request::builder()
            .uri("http://x/espalier.v1.RunService/GetRun")
            .header("traceparent", format!("00-{trace_id}-b7ad6b7169203331-01"))
            .body(())
            .unwrap();
        tracing::subscriber::with_default(subscriber, || {
            let span = request_span(&request);
            assert_eq!(span.context().span().span_context().trace_id().to_string(), trace_id);
        });
    }

    #[test]
    fn a_broken_traceparent_starts_a_new_trace() {
        for header in ["", "00-zz-zz-01", "nonsense"] {
            let request = http::Request::builder()
                .uri("/espalier.v1.RunService/GetRun")
                .header("traceparent", header)
                .body(())
                .unwrap();
            let _ = request_span(&request);
        }
    }
}
