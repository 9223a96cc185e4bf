//! What a worker is told at its start.

use crate::WorkerError;
use service_kit::{ListenArgs, LogArgs, RootArgs};
use std::net::SocketAddr;
use std::time::Duration;
use wire::pb;

/// Flags of the worker's server.
#[derive(Debug, Clone, clap::Args)]
pub struct ServeArgs {
    #[command(flatten)]
    pub listen: ListenArgs,
    /// URL of the coordinator to register with
    #[arg(long, env = "ESPALIER_COORDINATOR", value_name = "URL")]
    pub coordinator: Option<String>,
    /// URL at which the coordinator reaches this worker [default: from the address listened on]
    #[arg(long, env = "ESPALIER_ADVERTISE", value_name = "URL")]
    pub advertise: Option<String>,
    /// Host at which other workers reach this one's collectives [default: that of --advertise]
    #[arg(long, env = "ESPALIER_DATA_HOST", value_name = "HOST")]
    pub data_host: Option<String>,
    /// Unique name of this worker [default: host name and process id]
    #[arg(long, env = "ESPALIER_WORKER_ID", value_name = "ID")]
    pub id: Option<String>,
    /// Pool that this worker belongs to: a run's workers are all of one pool
    #[arg(long, env = "ESPALIER_POOL", value_name = "NAME", default_value = "")]
    pub pool: String,
    /// Workers of the pool that train together: this one is ready once the coordinator knows so many
    #[arg(long, env = "ESPALIER_GROUP_SIZE", value_name = "N", default_value_t = 1,
          value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub group_size: u32,
    /// Operations a second of the device at its peak, in the format of products, for the metric of utilization
    #[arg(long, env = "ESPALIER_PEAK_FLOPS", value_name = "FLOPS")]
    pub peak_flops: Option<f64>,
    /// Device to compute on: cpu, cuda or cuda:N
    #[arg(long, env = "ESPALIER_DEVICE", value_name = "DEVICE", default_value = "cpu")]
    pub device: String,
    /// Library that sums between ranks; gloo where two workers share a GPU [default: what the coordinator says]
    #[arg(long, env = "ESPALIER_COLLECTIVES", value_name = "LIBRARY")]
    pub collectives: Option<CollectivesName>,
    /// Compute threads [default: all cores]
    #[arg(long, env = "ESPALIER_THREADS", value_name = "N", value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub threads: Option<u32>,
    #[command(flatten)]
    pub roots: RootArgs,
    /// Longest that a collective waits for its peers
    #[arg(long, env = "ESPALIER_COLLECTIVE_TIMEOUT_SECONDS", value_name = "SECONDS", default_value_t = 60,
          value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub collective_timeout_seconds: u64,
    /// How long the run's checkpoint may take once this worker is told to stop
    #[arg(long, env = "ESPALIER_DRAIN_SECONDS", value_name = "SECONDS", default_value_t = 25,
          value_parser = clap::value_parser!(u64).range(0..=3600))]
    pub drain_seconds: u64,
    /// How long to try to reach the coordinator before giving up
    #[arg(long, env = "ESPALIER_REGISTER_TIMEOUT_SECONDS", value_name = "SECONDS", default_value_t = 60,
          value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub register_timeout_seconds: u64,
    /// End when the process that started this one ends; with a value, only if that is its process id
    #[arg(long, value_name = "PID", num_args = 0..=1, require_equals = true, default_missing_value = "0")]
    pub exit_with_parent: Option<u32>,
    #[command(flatten)]
    pub log: LogArgs,
}

/// Libraries of `--collectives`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum CollectivesName {
    /// Over TCP, on any device
    Gloo,
    /// Between CUDA devices, one worker each
    Nccl,
}

/// What the library needs of the flags.
#[derive(Debug, Clone)]
pub struct WorkerConfig {
    pub listen: ListenArgs,
    /// Absent: the worker only serves.
    pub coordinator: Option<String>,
    pub advertise: Option<String>,
    pub data_host: Option<String>,
    pub id: String,
    pub pool: String,
    /// Workers of the pool without which this one is not ready.
    pub group_size: u32,
    /// Of the device, where it is known.
    pub peak_flops: Option<f64>,
    pub device: String,
    /// The device's memory, if it has its own.
    pub device_memory_bytes: Option<u64>,
    pub threads: u32,
    pub roots: RootArgs,
    pub collective_timeout: Duration,
    pub register_timeout: Duration,
    /// How long the run's checkpoint may take once the worker is told to stop.
    pub drain: Duration,
}

impl From<ServeArgs> for WorkerConfig {
    fn from(args: ServeArgs) -> Self {
        let cores = || std::thread::available_parallelism().map_or(1, |cores| cores.get() as u32);
        Self {
            threads: args.threads.unwrap_or_else(cores),
            id: args.id.filter(|id| !id.is_empty()).unwrap_or_else(default_id),
            listen: args.listen,
            coordinator: args.coordinator,
            advertise: args.advertise.filter(|url| !url.is_empty()),
            data_host: args.data_host.filter(|host| !host.is_empty()),
            pool: args.pool,
            group_size: args.group_size,
            peak_flops: args.peak_flops,
            device: args.device,
            device_memory_bytes: None,
            roots: args.roots,
            drain: Duration::from_secs(args.drain_seconds),
            collective_timeout: Duration::from_secs(args.collective_timeout_seconds),
            register_timeout: Duration::from_secs(args.register_timeout_seconds),
        }
    }
}

/// Host name and process id.
fn default_id() -> String {
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let host = if host.trim().is_empty() { "worker" } else { host.trim() };
    format!("{host}-{}", std::process::id())
}

impl WorkerConfig {
    /// What the worker says of itself once it listens on `bound`.
    pub(crate) fn announced(&self, bound: SocketAddr) -> Result<pb::WorkerInfo, WorkerError> {
        let endpoint = match &self.advertise {
            Some(url) => url.clone(),
            None if bound.ip().is_unspecified() => return Err(WorkerError::NoAddress { address: bound }),
            None => {
                let scheme = if self.listen.tls.tls_cert.is_some() { "https" } else { "http" };
                format!("{scheme}://{bound}")
            }
        };
        let data_host = match &self.data_host {
            Some(host) => host.clone(),
            None => host_of(&endpoint)
                .ok_or_else(|| WorkerError::AdvertiseWithoutHost { url: endpoint.clone() })?,
        };
        Ok(pb::WorkerInfo {
            id: self.id.clone(),
            pool: self.pool.clone(),
            peak_flops: self.peak_flops.unwrap_or(0.0),
            endpoint,
            device: self.device.clone(),
            memory_bytes: self.device_memory_bytes.unwrap_or_else(crate::memory::available_to_process_bytes),
            threads: self.threads,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            data_host,
            incarnation: uuid::Uuid::new_v4().to_string(),
        })
    }
}

/// Host of a URL, without the brackets of an IPv6 address.
fn host_of(url: &str) -> Option<String> {
    let uri: tonic::transport::Uri = url.parse().ok()?;
    uri.scheme()?;
    let host = uri.host()?.trim_start_matches('[').trim_end_matches(']');
    (!host.is_empty()).then(|| host.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> WorkerConfig {
        WorkerConfig {
            listen: ListenArgs::default(),
            coordinator: None,
            advertise: None,
            data_host: None,
            id: "w".into(),
            pool: String::new(),
            group_size: 1,
            peak_flops: None,
            device: "cpu".into(),
            device_memory_bytes: None,
            threads: 1,
            roots: RootArgs::default(),
            collective_timeout: Duration::from_secs(1),
            register_timeout: Duration::from_secs(1),
            drain: Duration::ZERO,
        }
    }

    #[test]
    fn a_worker_announces_where_it_listens_unless_told_otherwise() {
        for (bound, advertise, data_host, endpoint, host) in [
            ("127.0.0.1:80", None, None, "http://127.0.0.1:80", "127.0.0.1"),
            ("[::1]:80", None, None, "http://[::1]:80", "::1"),
            ("0.0.0.0:80", Some("http://w-0.pool:7071"), None, "http://w-0.pool:7071", "w-0.pool"),
            ("0.0.0.0:80", Some("http://w-0:7071"), Some("10.0.0.1"), "http://w-0:7071", "10.0.0.1"),
        ] {
            let config = WorkerConfig {
                advertise: advertise.map(str::to_owned),
                data_host: data_host.map(str::to_owned),
                ..config()
            };
            let info = config.announced(bound.parse().unwrap()).unwrap();
            assert_eq!((info.endpoint.as_str(), info.data_host.as_str()), (endpoint, host));
            assert!(info.memory_bytes > 1 << 20);
        }
    }

    #[test]
    fn a_device_with_memory_of_its_own_announces_that() {
        let config = WorkerConfig { device: "cuda:0".into(), device_memory_bytes: Some(1 << 37), ..config() };
        let info = config.announced("127.0.0.1:80".parse().unwrap()).unwrap();
        assert_eq!((info.device.as_str(), info.memory_bytes), ("cuda:0", 1 << 37));
    }

    #[test]
    fn a_worker_that_cannot_be_found_is_refused() {
        assert!(matches!(
            config().announced("0.0.0.0:80".parse().unwrap()),
            Err(WorkerError::NoAddress { .. })
        ));
        for url in ["worker-0", "/x", "http://"] {
            let config = WorkerConfig { advertise: Some(url.into()), ..config() };
            let refused = config.announced("0.0.0.0:80".parse().unwrap());
            assert!(matches!(refused, Err(WorkerError::AdvertiseWithoutHost { .. })), "{url}");
        }
    }

    #[test]
    fn two_workers_never_share_an_incarnation() {
        let bound = "127.0.0.1:80".parse().unwrap();
        let (one, two) = (config().announced(bound).unwrap(), config().announced(bound).unwrap());
        assert_ne!(one.incarnation, two.incarnation);
    }
}
