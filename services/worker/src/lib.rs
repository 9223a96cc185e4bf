//! One process, one device, one tensor-parallel rank: it loads a shard, trains it, streams scores, applies masks and
//! writes the result, as the coordinator tells it.
//!
//! The async side never computes and never blocks; one OS thread a session owns the engine's shard (`device_thread`).

mod config;
mod data;
mod device_thread;
mod failure;
mod logits;
mod memory;
mod metrics;
mod parent;
mod places;
mod registration;
mod rpc;
mod session;
mod session_stream;

pub use config::{CollectivesName, ServeArgs, WorkerConfig};
pub use logits::{TokensFileError, read_tokens_file};
pub use parent::{Parent, ParentGone};
pub use rpc::WorkerRpc;

use engine::Engine;
use registration::{Registration, RegistrationError};
use service_kit::grpc_server::{GrpcServer, ServeError};
use service_kit::{ListenError, RootsError};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::info;
use wire::pb;
use wire::pb::worker_service_server::WorkerServiceServer;

/// Longest that running calls may take to end once the worker was told to stop.
const SHUTDOWN_GRACE: Duration = Duration::from_secs(5);

/// Why a worker ended badly.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    #[error(transparent)]
    Listen(#[from] ListenError),
    #[error(transparent)]
    Roots(#[from] RootsError),
    #[error(transparent)]
    Serve(#[from] ServeError),
    #[error("the worker listens on {address}, which tells others not where it is; pass --advertise URL")]
    NoAddress { address: SocketAddr },
    #[error("--advertise `{url}` has no host; give a URL such as http://worker-0:7071")]
    AdvertiseWithoutHost { url: String },
    #[error("failed to register")]
    Registration(#[from] RegistrationError),
    /// Another process can go on.
    #[error("the device thread does not come back; start the worker anew")]
    DeviceHung,
}

/// Serves until `stop`: registers with the coordinator, if one is given, and keeps its lease. Told to stop, it asks for its
/// run to be checkpointed and taken off it, and serves on until that has happened or the time for it is over.
///
/// # Errors
/// When the address cannot be bound, a root is missing, the coordinator is not reached in time, or the device hangs.
pub async fn run(
    config: WorkerConfig,
    engine: Arc<dyn Engine>,
    stop: CancellationToken,
) -> Result<(), WorkerError> {
    let roots = config.roots.open()?;
    let listener = config.listen.bind(SocketAddr::from(([127, 0, 0, 1], 0))).await?;
    let announced = config.announced(listener.address())?;
    let peers = listener.peers();
    let rpc = WorkerRpc::new(engine, roots, announced.data_host.clone(), config.collective_timeout);
    metrics::show(&rpc);
    // Ready for runs once the coordinator knows it and the rest of its group.
    let (ready, is_ready) = watch::channel(config.coordinator.is_none());
    info!(
        worker_id = announced.id,
        address = %listener.address(),
        endpoint = announced.endpoint,
        device = announced.device,
        "worker serves"
    );
    let service = WorkerServiceServer::new(rpc.clone())
        .max_decoding_message_size(wire::limits::MASK_MESSAGE_BYTES)
        .max_encoding_message_size(wire::limits::MASK_MESSAGE_BYTES);
    let server = GrpcServer::new(pb::DESCRIPTORS)?.with_service(service).with_readiness(is_ready);
    // Whatever ends first ends the others. Calls are answered until the worker has been drained.
    let stop = stop.child_token();
    let stop_serving = CancellationToken::new();
    let registering = async {
        let ended = match &config.coordinator {
            Some(coordinator) => {
                Registration {
                    coordinator,
                    security: peers,
                    worker: announced,
                    register_timeout: config.register_timeout,
                    drain: config.drain,
                    rpc: &rpc,
                    group_size: config.group_size,
                    ready,
                }
                .keep(&stop)
                .await
            }
            None => {
                stop.cancelled().await;
                Ok(())
            }
        };
        stop.cancel();
        // Calls of a session end at once, so that the server need not wait for them.
        rpc.shut_down().await;
        stop_serving.cancel();
        ended
    };
    let working = async {
        tokio::join!(
            async {
                let served = server.serve(listener, stop_serving.clone(), SHUTDOWN_GRACE).await;
                stop.cancel();
                served
            },
            registering
        )
    };
    let (served, registered) = tokio::select! {
        ended = working => ended,
        () = rpc.hung() => return Err(WorkerError::DeviceHung),
    };
    served?;
    registered?;
    info!("worker ended");
    Ok(())
}
