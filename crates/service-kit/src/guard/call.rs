//! A call under way: its end is measured, and written to the audit log if it changes something.

use crate::access::{Method, Principal};
use crate::audit::{Audit, AuditSink};
use crate::metrics::catalogue::RPC_DURATION;
use opentelemetry::KeyValue;
use opentelemetry::metrics::Histogram;
use std::net::SocketAddr;
use std::sync::{Arc, LazyLock};
use std::time::Instant;
use tonic::Code;

static DURATION: LazyLock<Histogram<f64>> = LazyLock::new(|| RPC_DURATION.histogram());

/// Noted when it is dropped.
pub(crate) struct Call {
    audit: Option<Audit>,
    method: &'static str,
    started: Instant,
    outcome: Code,
}

impl Call {
    pub(crate) fn begin(
        method: Option<&'static Method>,
        principal: Principal,
        peer: Option<SocketAddr>,
        sink: Option<Arc<dyn AuditSink>>,
    ) -> Self {
        Self {
            audit: Audit::begin(method, principal, peer, sink),
            // Whatever else callers make up must not make a series each.
            method: method.map_or("_OTHER", |method| method.path.trim_start_matches('/')),
            started: Instant::now(),
            outcome: Code::Cancelled,
        }
    }

    pub(crate) fn is_audited(&self) -> bool {
        self.audit.is_some()
    }

    pub(crate) fn outcome(&mut self, code: Code) {
        self.outcome = code;
        if let Some(audit) = &mut self.audit {
            audit.outcome(code);
        }
    }

    /// The run that it is about, if it said so.
    pub(crate) fn about(&mut self, run_id: Option<String>) {
        if let Some(audit) = &mut self.audit {
            audit.about(run_id);
        }
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        let attributes = [
            KeyValue::new("rpc.method", self.method),
            KeyValue::new("rpc.response.status_code", name(self.outcome)),
        ];
        DURATION.record(self.started.elapsed().as_secs_f64(), &attributes);
    }
}

/// As gRPC spells it.
fn name(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "CANCELLED",
        Code::Unknown => "UNKNOWN",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::NotFound => "NOT_FOUND",
        Code::AlreadyExists => "ALREADY_EXISTS",
        Code::PermissionDenied => "PERMISSION_DENIED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::Aborted => "ABORTED",
        Code::OutOfRange => "OUT_OF_RANGE",
        Code::Unimplemented => "UNIMPLEMENTED",
        Code::Internal => "INTERNAL",
        Code::Unavailable => "UNAVAILABLE",
        Code::DataLoss => "DATA_LOSS",
        Code::Unauthenticated => "UNAUTHENTICATED",
    }
}
