use crate::audit_log::AuditLog;
use crate::config::CoordinatorConfig;
use crate::context::Context;
use crate::metrics;
use crate::resume;
use crate::rpc::registry_service::Registration;
use crate::rpc::run_service::Runs;
use service_kit::{GrpcServer, Listener};
use std::time::Duration;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};
use wire::limits;
use wire::pb::DESCRIPTORS;
use wire::pb::registry_service_server::RegistryServiceServer;
use wire::pb::run_service_server::RunServiceServer;

/// Longest that calls may go on after the runs have ended.
const GRACE: Duration = Duration::from_secs(5);

/// Serves until `shutdown`, then checkpoints all runs, ends their sessions on the workers, and returns: the runs go on when
/// a coordinator opens the same store again.
///
/// # Errors
/// When a folder or the database of the configuration cannot be used, the transport fails, or another coordinator has
/// opened the store.
pub async fn serve(
    config: CoordinatorConfig,
    listener: Listener,
    shutdown: CancellationToken,
) -> anyhow::Result<()> {
    let context = Context::open(&config, listener.peers()).await?;
    let (audit_log, writing_audit) = AuditLog::start(context.stores.clone());
    let server = GrpcServer::new(DESCRIPTORS)?
        .with_audit(audit_log)
        .with_service(
            RunServiceServer::new(Runs::new(context.clone()))
                .max_decoding_message_size(limits::MESSAGE_BYTES)
                .max_encoding_message_size(limits::MASK_MESSAGE_BYTES),
        )
        .with_service(
            RegistryServiceServer::new(Registration { context: context.clone() })
                .max_decoding_message_size(limits::MESSAGE_BYTES)
                .max_encoding_message_size(limits::MESSAGE_BYTES),
        );
    info!(address = %listener.address(), "coordinator listens");
    let stop_serving = CancellationToken::new();
    let leases = tokio::spawn(context.registry.clone().keep_leases(stop_serving.clone()));
    resume::take_up(&context).await?;
    metrics::show(&context);
    let winding_down = {
        let (context, stop_serving) = (context.clone(), stop_serving.clone());
        async move {
            tokio::select! {
                () = shutdown.cancelled() => {}
                () = context.fenced.cancelled() => {}
                () = context.stores.taken_over() => context.fenced.cancel(),
            }
            context.stopping.cancel();
            context.tasks.close();
            if tokio::time::timeout(context.drain, context.tasks.wait()).await.is_err() {
                warn!("sessions that did not end in time were left to their workers");
            }
            context.closing.cancel();
            stop_serving.cancel();
        }
    };
    let winding_down = tokio::spawn(winding_down);
    let served = server.serve(listener, stop_serving.clone(), GRACE).await;
    // Reached early only when the transport failed.
    stop_serving.cancel();
    winding_down.abort();
    leases.await?;
    // The server is gone, and with it whoever adds to the audit.
    if tokio::time::timeout(GRACE, writing_audit).await.is_err() {
        warn!("the last calls are not in the store's audit, only in the log");
    }
    context.stores.close().await;
    served?;
    if context.fenced.is_cancelled() {
        anyhow::bail!("another coordinator has opened the store; this one must not go on");
    }
    info!("coordinator ended");
    Ok(())
}
