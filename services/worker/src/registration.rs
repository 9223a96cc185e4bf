//! Registering with the coordinator and keeping the lease.

use crate::WorkerRpc;
use backon::{BackoffBuilder, ExponentialBuilder};
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tonic::Code;
use tracing::{debug, info, warn};
use wire::client::{ClientSecurity, ConnectError, RegistryClient, registry_client, within};
use wire::convert::time::duration_from_pb;
use wire::pb;
use wire::status::{Failure, Reason, describe};

/// Deadline of one call to the coordinator.
const CALL: Duration = Duration::from_secs(5);
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// Leases that may pass without renewal before the session is given up.
const LOST_AFTER_LEASES: u32 = 3;
/// Bounds on what a coordinator may call a lease.
const SHORTEST_LEASE: Duration = Duration::from_millis(100);
const DEFAULT_LEASE: Duration = Duration::from_secs(10);
const SHORTEST_INTERVAL: Duration = Duration::from_millis(20);
/// How often a draining worker looks whether its run was taken off it.
const DRAIN_LOOK: Duration = Duration::from_millis(100);

/// Why registering failed for good.
#[derive(Debug, thiserror::Error)]
pub enum RegistrationError {
    #[error(transparent)]
    Connect(#[from] ConnectError),
    #[error(
        "no answer from the coordinator at {coordinator} for {seconds} s; is it running there? Last: {last}"
    )]
    Unreachable { coordinator: String, seconds: u64, last: String },
    #[error("the coordinator at {coordinator} refuses this worker: {problem}")]
    Refused { coordinator: String, problem: String },
}

pub(crate) struct Registration<'a> {
    pub(crate) coordinator: &'a str,
    /// What this worker shows the coordinator.
    pub(crate) security: ClientSecurity,
    pub(crate) worker: pb::WorkerInfo,
    /// How long the first registration may take.
    pub(crate) register_timeout: Duration,
    /// How long the run's checkpoint may take at the end.
    pub(crate) drain: Duration,
    pub(crate) rpc: &'a WorkerRpc,
    /// Workers of its pool that can train together, and without which it is not ready.
    pub(crate) group_size: u32,
    /// Told whether the coordinator knows this worker and the rest of its group.
    pub(crate) ready: watch::Sender<bool>,
}

struct Lease {
    id: String,
    duration: Duration,
    /// How often to renew it.
    interval: Duration,
    /// Workers of its pool in service, itself included.
    pool_workers: u32,
}

impl Registration<'_> {
    /// Registers, renews, and registers again when the lease is lost, until `stop`.
    ///
    /// # Errors
    /// When the first registration does not succeed in time, or the coordinator refuses this worker.
    pub(crate) async fn keep(self, stop: &CancellationToken) -> Result<(), RegistrationError> {
        let mut client = registry_client(self.security.lazy(self.coordinator)?);
        let mut give_up = Some(Instant::now() + self.register_timeout);
        loop {
            let registered = tokio::select! {
                () = stop.cancelled() => return Ok(()),
                registered = self.register(&mut client, give_up) => registered?,
            };
            give_up = None;
            info!(
                coordinator = self.coordinator,
                worker_id = self.worker.id,
                lease_seconds = registered.duration.as_secs_f64(),
                "registered"
            );
            self.note_pool(registered.pool_workers);
            let lease_id = registered.id.clone();
            tokio::select! {
                () = stop.cancelled() => {
                    self.ready.send_replace(false);
                    self.leave(&mut client, lease_id).await;
                    return Ok(());
                }
                () = self.renew_until_lost(&mut client, registered) => {}
            }
            self.ready.send_replace(false);
            // The coordinator counts a worker without lease as lost, and its session with it.
            self.rpc.drop_session(Failure::new(Reason::Aborted, "the worker's lease was lost")).await;
        }
    }

    /// Ready once the whole group is there.
    fn note_pool(&self, pool_workers: u32) {
        let whole = pool_workers >= self.group_size;
        self.ready.send_if_modified(|ready| {
            let changed = *ready != whole;
            if changed && !whole {
                info!(pool_workers, group_size = self.group_size, "not ready: the group is not complete");
            }
            *ready = whole;
            changed
        });
    }

    /// Tries until it succeeds, or until `give_up`.
    async fn register(
        &self,
        client: &mut RegistryClient,
        give_up: Option<Instant>,
    ) -> Result<Lease, RegistrationError> {
        let mut pauses = pauses();
        loop {
            let request = pb::RegisterRequest { info: Some(self.worker.clone()) };
            let status = match client.register(within(CALL, request)).await {
                Ok(response) => {
                    let pb::RegisterResponse { lease_id, lease_duration, renew_interval, pool_workers } =
                        response.into_inner();
                    let duration = usable(duration_from_pb(lease_duration));
                    let third = duration / 3;
                    let interval =
                        duration_from_pb(renew_interval).unwrap_or(third).clamp(SHORTEST_INTERVAL, third);
                    return Ok(Lease { id: lease_id, duration, interval, pool_workers });
                }
                Err(status) => status,
            };
            if status.code() == Code::InvalidArgument {
                return Err(RegistrationError::Refused {
                    coordinator: self.coordinator.to_owned(),
                    problem: describe(&status),
                });
            }
            if give_up.is_some_and(|give_up| Instant::now() >= give_up) {
                return Err(RegistrationError::Unreachable {
                    coordinator: self.coordinator.to_owned(),
                    seconds: self.register_timeout.as_secs(),
                    last: describe(&status),
                });
            }
            debug!(coordinator = self.coordinator, error = %describe(&status), "not registered yet");
            let pause = pauses.next().unwrap_or(LONGEST_PAUSE);
            let wake = Instant::now() + pause;
            tokio::time::sleep_until(give_up.map_or(wake, |give_up| give_up.min(wake))).await;
        }
    }

    /// Asks for the run to be taken off this worker, waits for that as long as it may take, and gives the lease back.
    async fn leave(&self, client: &mut RegistryClient, lease_id: String) {
        let leaving = async {
            loop {
                match client.renew(within(CALL, self.renewal(&lease_id, true))).await {
                    Ok(renewed) if renewed.get_ref().idle => return,
                    Ok(_) => tokio::time::sleep(DRAIN_LOOK).await,
                    // Nobody is there to take anything off it.
                    Err(_) => return,
                }
            }
        };
        if tokio::time::timeout(self.drain, leaving).await.is_err() {
            warn!(seconds = self.drain.as_secs_f64(), "the run was not taken off this worker in time");
        }
        let request = pb::DeregisterRequest { lease_id };
        let _ = tokio::time::timeout(CALL, client.deregister(within(CALL, request))).await;
    }

    fn renewal(&self, lease_id: &str, draining: bool) -> pb::RenewRequest {
        pb::RenewRequest {
            lease_id: lease_id.to_owned(),
            steps_done: self.rpc.steps_done(),
            progress: Some(self.rpc.progress()),
            draining,
        }
    }

    /// Renews the lease as often as it was asked to; returns when it is lost.
    async fn renew_until_lost(&self, client: &mut RegistryClient, lease: Lease) {
        let Lease { id, mut duration, interval, .. } = lease;
        let mut renewed = Instant::now();
        let mut retries = pauses();
        let mut pause = interval;
        loop {
            tokio::time::sleep(pause).await;
            let request = self.renewal(&id, false);
            match client.renew(within(CALL.min(duration), request)).await {
                Ok(response) => {
                    let response = response.into_inner();
                    self.note_pool(response.pool_workers);
                    duration = usable(duration_from_pb(response.lease_duration));
                    renewed = Instant::now();
                    retries = pauses();
                    pause = interval.min(duration / 3);
                }
                Err(status) if status.code() == Code::NotFound => {
                    warn!("the lease has run out; registering again");
                    return;
                }
                Err(status) => {
                    let silent = renewed.elapsed();
                    if silent >= duration * LOST_AFTER_LEASES {
                        warn!(
                            seconds = silent.as_secs_f64(),
                            error = %describe(&status),
                            "the coordinator is gone; registering again"
                        );
                        return;
                    }
                    debug!(error = %describe(&status), "the lease was not renewed");
                    pause = retries.next().unwrap_or(LONGEST_PAUSE).min(duration / 3);
                }
            }
        }
    }
}

fn pauses() -> impl Iterator<Item = Duration> {
    ExponentialBuilder::default()
        .with_jitter()
        .with_min_delay(FIRST_PAUSE)
        .with_max_delay(LONGEST_PAUSE)
        .without_max_times()
        .build()
}

fn usable(granted: Option<Duration>) -> Duration {
    granted.filter(|granted| *granted >= SHORTEST_LEASE).unwrap_or(DEFAULT_LEASE)
}
