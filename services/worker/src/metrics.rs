//! How this worker stands, when somebody looks.

use crate::WorkerRpc;
use crate::memory::resident_bytes;
use opentelemetry::KeyValue;
use service_kit::metrics::catalogue as names;

/// Shows it for as long as the process lives.
pub(crate) fn show(rpc: &WorkerRpc) {
    let of = rpc.clone();
    names::WORKER_STEPS.observe(move |observer| observer.observe(of.steps_done() as f64, &[]));
    let of = rpc.clone();
    names::WORKER_MEMORY.observe(move |observer| {
        observer.observe(resident_bytes() as f64, &[KeyValue::new("state", "resident")]);
        if let Some(bytes) = of.session_memory_bytes() {
            observer.observe(bytes as f64, &[KeyValue::new("state", "session")]);
        }
    });
    let of = rpc.clone();
    names::WORKER_COLLECTIVES.observe(move |observer| {
        observer.observe(of.progress().collectives_left as f64, &[]);
    });
    let of = rpc.clone();
    names::WORKER_COLLECTIVE_TIME.observe(move |observer| {
        observer.observe(of.collective_time().as_secs_f64(), &[]);
    });
    let of = rpc.clone();
    names::WORKER_SESSION.observe(move |observer| {
        observer.observe(f64::from(u8::from(of.has_session())), &[]);
    });
}
