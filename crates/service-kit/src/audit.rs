//! The audit log: a line for every call that changes something, whoever made it and however it ended.

use crate::access::{Method, Principal};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Instant, SystemTime};
use tonic::Code;
use tracing::info;

/// A changing call that has ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AuditEntry {
    /// When the call came.
    pub at: SystemTime,
    pub principal: Principal,
    pub peer: Option<SocketAddr>,
    /// As `/espalier.v1.RunService/CancelRun`.
    pub method: &'static str,
    /// The run, if the call is about one and said which.
    pub run_id: Option<String>,
    /// CANCELLED also when the client went away.
    pub outcome: Code,
}

/// Keeps entries besides the log. Called on the server's own tasks: it must not block.
pub trait AuditSink: Send + Sync {
    fn record(&self, entry: &AuditEntry);
}

/// A changing call under way; recorded when it is dropped.
pub(crate) struct Audit {
    sink: Option<Arc<dyn AuditSink>>,
    entry: AuditEntry,
    started: Instant,
}

impl Audit {
    /// Nothing for a method that changes nothing.
    pub(crate) fn begin(
        method: Option<&Method>,
        principal: Principal,
        peer: Option<SocketAddr>,
        sink: Option<Arc<dyn AuditSink>>,
    ) -> Option<Self> {
        let method = method.filter(|method| method.changes)?;
        let entry = AuditEntry {
            at: SystemTime::now(),
            principal,
            peer,
            method: method.path,
            run_id: None,
            outcome: Code::Cancelled,
        };
        Some(Self { sink, entry, started: Instant::now() })
    }

    pub(crate) fn outcome(&mut self, code: Code) {
        self.entry.outcome = code;
    }

    pub(crate) fn about(&mut self, run_id: Option<String>) {
        self.entry.run_id = run_id.or(self.entry.run_id.take());
    }
}

impl Drop for Audit {
    fn drop(&mut self) {
        let AuditEntry { at: _, principal, peer, method, run_id, outcome } = &self.entry;
        info!(
            target: "audit",
            principal = principal.name,
            role = %principal.grant,
            method,
            run_id,
            outcome = ?outcome,
            peer = peer.map(tracing::field::display),
            seconds = self.started.elapsed().as_secs_f64(),
            "call"
        );
        if let Some(sink) = &self.sink {
            sink.record(&self.entry);
        }
    }
}
