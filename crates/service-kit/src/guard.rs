//! Stands before every service: decides who may call before a body is read, keeps calls to their deadlines, and tells the
//! audit log.

mod bodies;
mod call;
mod subject;

use crate::access::{Method, Policy, Refusal, Subject, method};
use crate::audit::AuditSink;
use crate::incoming::Peer;
use crate::limits::LimitArgs;
use bodies::{Arrival, RequestBody, ResponseBody};
use call::Call;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;
use subject::Opening;
use tonic::body::Body;
use tonic::codegen::Service;
use tonic::codegen::http::{HeaderMap, Request, Response, header};
use tonic::{Code, Status};
use wire::status::{Failure, Reason};

const GRPC_TIMEOUT: &str = "grpc-timeout";
const GRPC_STATUS: &str = "grpc-status";

/// What all calls of a server have in common.
pub(crate) struct Rules {
    pub(crate) policy: Policy,
    pub(crate) limits: LimitArgs,
    pub(crate) sink: Option<Arc<dyn AuditSink>>,
}

/// Wraps a server's services.
#[derive(Clone)]
pub(crate) struct GuardLayer(pub(crate) Arc<Rules>);

impl<S> tower::Layer<S> for GuardLayer {
    type Service = Guard<S>;

    fn layer(&self, inner: S) -> Guard<S> {
        Guard { inner, rules: self.0.clone() }
    }
}

#[derive(Clone)]
pub(crate) struct Guard<S> {
    inner: S,
    rules: Arc<Rules>,
}

impl<S> Service<Request<Body>> for Guard<S>
where
    S: Service<Request<Body>, Response = Response<Body>>,
    S::Future: Send + 'static,
    S::Error: Send + 'static,
{
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, S::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, mut request: Request<Body>) -> Self::Future {
        let row = method(request.uri().path());
        // Taken out: nothing behind this line sees the token.
        let authorization = request.headers_mut().remove(header::AUTHORIZATION);
        let peer = request.extensions().get::<Peer>().cloned();
        let shown = crate::access::Shown {
            authorization: authorization.as_ref().map(header::HeaderValue::as_bytes),
            certificate: peer.as_ref().and_then(|peer| peer.certificate.as_deref()),
        };
        let address = peer.as_ref().map(|peer| peer.address);
        let principal = match self.rules.policy.admit(row, shown) {
            Ok(principal) => principal,
            Err(refusal) => {
                let Refusal { principal, failure } = *refusal;
                let status = Status::from(failure);
                Call::begin(row, principal, address, self.rules.sink.clone()).outcome(status.code());
                return Box::pin(std::future::ready(Ok(status.into_http())));
            }
        };
        let call = Call::begin(row, principal.clone(), address, self.rules.sink.clone());
        request.extensions_mut().insert(principal);
        let limits = self.rules.limits;
        let deadline = deadline(request.headers(), &limits);
        let opening = Arc::new(Mutex::new(Opening::default()));
        let asked = row.is_some_and(|row| row.subject == Subject::Request).then(|| opening.clone());
        let arrival = if row.is_some_and(is_endless) { Arrival::EachFrame } else { Arrival::Whole };
        let request = request.map(|body| Body::new(RequestBody::new(body, arrival, limits.request(), asked)));
        let answer = self.inner.call(request);
        Box::pin(answered(answer, row, call, deadline, limits, opening))
    }
}

/// Waits for the response's head until the deadline, then follows its body.
async fn answered<F, E>(
    answer: F,
    row: Option<&'static Method>,
    mut call: Call,
    deadline: Duration,
    limits: LimitArgs,
    opening: Arc<Mutex<Opening>>,
) -> Result<Response<Body>, E>
where
    F: Future<Output = Result<Response<Body>, E>>,
{
    let answer = tokio::time::timeout(deadline, answer).await;
    if row.is_some_and(|row| row.subject == Subject::Request) {
        call.about(opening.lock().unwrap_or_else(PoisonError::into_inner).id(&[1]));
    }
    let response = match answer {
        Ok(response) => response?,
        Err(_) => {
            call.outcome(Code::DeadlineExceeded);
            let message = format!("no answer within {} s", deadline.as_secs_f64());
            return Ok(Status::from(Failure::new(Reason::DeadlineExceeded, message)).into_http());
        }
    };
    if let Some(code) = code(response.headers()) {
        call.outcome(code);
    }
    let idle = row.is_some_and(|row| row.streams).then(|| limits.stream_idle());
    let told = row.is_some_and(|row| row.subject == Subject::Response);
    Ok(response.map(|body| Body::new(ResponseBody::new(body, idle, call, told))))
}

/// Reflection's stream of requests ends when its client likes.
fn is_endless(row: &Method) -> bool {
    row.path.starts_with("/grpc.reflection.")
}

pub(crate) fn code(headers: &HeaderMap) -> Option<Code> {
    headers.get(GRPC_STATUS).map(|value| Code::from_bytes(value.as_bytes()))
}

/// The client's deadline, if it asks for one that is sooner than ours.
fn deadline(headers: &HeaderMap, limits: &LimitArgs) -> Duration {
    let asked = headers.get(GRPC_TIMEOUT).and_then(|value| value.to_str().ok()).and_then(parse_timeout);
    asked.map_or(limits.call(), |asked| asked.min(limits.call()))
}

/// At most eight digits and a unit.
fn parse_timeout(text: &str) -> Option<Duration> {
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if digits.is_empty() || digits.len() > 8 || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let value: u64 = digits.parse().ok()?;
    Some(match unit {
        "H" => Duration::from_secs(value * 3600),
        "M" => Duration::from_secs(value * 60),
        "S" => Duration::from_secs(value),
        "m" => Duration::from_millis(value),
        "u" => Duration::from_micros(value),
        "n" => Duration::from_nanos(value),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::access::METHODS;

    #[test]
    fn the_sooner_deadline_holds() {
        let limits = LimitArgs { call_seconds: 60, ..LimitArgs::default() };
        for (asked, expected) in [
            (None, Duration::from_secs(60)),
            (Some("2S"), Duration::from_secs(2)),
            (Some("250m"), Duration::from_millis(250)),
            (Some("99999999H"), Duration::from_secs(60)),
            (Some("999999999S"), Duration::from_secs(60)),
            (Some("S"), Duration::from_secs(60)),
            (Some("-1S"), Duration::from_secs(60)),
            (Some("1é"), Duration::from_secs(60)),
        ] {
            let mut headers = HeaderMap::new();
            if let Some(asked) = asked {
                headers.insert(GRPC_TIMEOUT, header::HeaderValue::from_bytes(asked.as_bytes()).unwrap());
            }
            assert_eq!(deadline(&headers, &limits), expected, "{asked:?}");
        }
    }

    #[tokio::test]
    async fn a_call_ends_at_its_own_deadline() {
        let policy = Policy { tokens: None, anonymous: Some(crate::access::Grant::Everything) };
        let rules = Rules { policy, limits: LimitArgs::default(), sink: None };
        let silent = tower::service_fn(|_: Request<Body>| {
            std::future::pending::<Result<Response<Body>, std::convert::Infallible>>()
        });
        let mut guard = tower::Layer::layer(&GuardLayer(Arc::new(rules)), silent);
        let request = Request::post("/espalier.v1.RunService/GetRun").header(GRPC_TIMEOUT, "50m");
        let answer = guard.call(request.body(Body::empty()).unwrap());
        let response = tokio::time::timeout(Duration::from_secs(5), answer).await.unwrap().unwrap();
        assert_eq!(code(response.headers()), Some(Code::DeadlineExceeded));
    }

    #[test]
    fn only_reflection_has_requests_without_end() {
        assert_eq!(METHODS.iter().filter(|row| is_endless(row)).count(), 2);
    }
}
