//! Keeps the audit log in the run store, beside the lines of the log.

use crate::stores::Stores;
use run_store::AuditEntry;
use service_kit::AuditSink;
use std::sync::Arc;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tracing::warn;
use wire::status::chain;

/// Entries that may wait for the store. What comes beyond is in the log alone.
const WAITING: usize = 4096;

/// Where the server leaves its entries.
pub(crate) struct AuditLog {
    entries: mpsc::Sender<AuditEntry>,
}

impl AuditLog {
    /// Starts writing. The task ends once this is dropped and all is written.
    pub(crate) fn start(stores: Stores) -> (Arc<Self>, JoinHandle<()>) {
        let (sender, mut entries) = mpsc::channel(WAITING);
        let writing = tokio::spawn(async move {
            let mut batch = Vec::new();
            while entries.recv_many(&mut batch, WAITING).await > 0 {
                if let Err(error) = stores.audit(&batch).await {
                    warn!(entries = batch.len(), error = %chain(&error), "the audit is in the log alone");
                }
                batch.clear();
            }
        });
        (Arc::new(Self { entries: sender }), writing)
    }
}

impl AuditSink for AuditLog {
    fn record(&self, entry: &service_kit::AuditEntry) {
        let stored = AuditEntry {
            time: entry.at,
            principal: entry.principal.name.clone(),
            method: entry.method.to_owned(),
            target: entry.run_id.clone().unwrap_or_default(),
            outcome: format!("{:?}", entry.outcome),
        };
        if self.entries.try_send(stored).is_err() {
            warn!(method = entry.method, "the store is behind; this call is in the log alone");
        }
    }
}
