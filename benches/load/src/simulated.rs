//! Workers that compute nothing: they answer as workers do and send scores in the shape of their shard.

use crate::statistics::Sorted;
use anyhow::Context as _;
use model_spec::{ModelSpec, Projection};
use sharding::{Placement, RankLayer};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::transport::Server;
use tonic::{Request, Response, Status};
use wire::client::{lazy_channel, registry_client, within};
use wire::convert::mask;
use wire::convert::time::{duration_from_pb, duration_to_pb};
use wire::pb;
use wire::pb::worker_service_server::{WorkerService, WorkerServiceServer};

/// Messages of a training stream that may wait to be sent.
const BUFFER: usize = 64;
const CALL: Duration = Duration::from_secs(5);

/// What all simulated workers share.
#[derive(Debug)]
pub(crate) struct Shared {
    dense: ModelSpec,
    tp_degree: usize,
    /// By layer and projection, of every unit of the dense model: the same in each step.
    scores: Vec<[Vec<f32>; 7]>,
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    generation: u64,
    placement: Arc<Placement>,
    /// When the last report of a step went out.
    reported: Instant,
    /// Ranks that were told of the decision in force.
    told: usize,
    waits: Vec<Duration>,
    decided: Vec<Instant>,
}

/// How the decisions came.
#[derive(Debug)]
pub(crate) struct Decided {
    /// From the last report of a step to the mask at the last rank.
    pub(crate) waits: Sorted,
    /// From the first decision to the last.
    pub(crate) span: Duration,
}

impl Shared {
    pub(crate) fn new(dense: ModelSpec, tp_degree: usize) -> anyhow::Result<Arc<Self>> {
        let placement = Arc::new(Placement::dense(&dense, tp_degree)?);
        let scores = dense
            .layers
            .iter()
            .enumerate()
            .map(|(layer, widths)| {
                Projection::ALL.map(|projection| {
                    let units = match projection {
                        Projection::Q | Projection::O => widths.query_head_count,
                        Projection::K | Projection::V => widths.kv_head_count,
                        Projection::Gate | Projection::Up | Projection::Down => widths.intermediate_size,
                    };
                    (0..units).map(|unit| score(layer, projection, unit)).collect()
                })
            })
            .collect();
        let inner = Inner {
            generation: 0,
            placement,
            reported: Instant::now(),
            told: 0,
            waits: Vec::new(),
            decided: Vec::new(),
        };
        Ok(Arc::new(Self { dense, tp_degree, scores, inner: Mutex::new(inner) }))
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn decided(&self) -> Decided {
        let inner = self.lock();
        let span = match (inner.decided.first(), inner.decided.last()) {
            (Some(first), Some(last)) => *last - *first,
            (None, _) | (_, None) => Duration::ZERO,
        };
        Decided { waits: Sorted::of(inner.waits.clone()), span }
    }

    /// A rank has been told of a decision.
    fn apply(&self, request: pb::ApplyMaskRequest) -> Result<(), Status> {
        let mut inner = self.lock();
        if request.generation != inner.generation {
            // The first rank to hear of it works out who holds what now; all would come to the same.
            let kept = mask::checked(request.keep_mask, "keep_mask")?;
            inner.placement = Arc::new(inner.placement.restricted_to(&kept).rebalanced(&self.dense));
            inner.generation = request.generation;
            inner.told = 0;
        }
        inner.told += 1;
        if inner.told == self.tp_degree {
            let now = Instant::now();
            let wait = now - inner.reported;
            inner.waits.push(wait);
            inner.decided.push(now);
        }
        Ok(())
    }
}

/// Between 0 and some 20, with the long tail of real ones.
fn score(layer: usize, projection: Projection, unit: usize) -> f32 {
    let mut bits = (layer as u64) << 40 ^ (projection.index() as u64) << 32 ^ unit as u64;
    // SplitMix64 (Steele, Lea and Flood 2014): each unit its own number, the same in each run.
    for (shift, factor) in [(30, 0xbf58_476d_1ce4_e5b9), (27, 0x94d0_49bb_1331_11eb)] {
        bits = bits.wrapping_add(0x9e37_79b9_7f4a_7c15);
        bits = (bits ^ bits >> shift).wrapping_mul(factor);
    }
    let uniform = ((bits >> 40) as f32 + 1.0) / (1_u64 << 24) as f32;
    -uniform.min(1.0 - f32::EPSILON).ln()
}

/// One worker.
#[derive(Debug, Clone)]
pub(crate) struct Simulated {
    shared: Arc<Shared>,
    tp_rank: Arc<Mutex<usize>>,
}

impl Simulated {
    /// Serves on a free port, as one worker.
    pub(crate) async fn serve(shared: Arc<Shared>) -> anyhow::Result<SocketAddr> {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.context("no free port")?;
        let address = listener.local_addr()?;
        let worker = Self { shared, tp_rank: Arc::default() };
        let service = WorkerServiceServer::new(worker)
            .max_decoding_message_size(wire::limits::MASK_MESSAGE_BYTES)
            .max_encoding_message_size(wire::limits::MASK_MESSAGE_BYTES);
        let server = Server::builder().tcp_nodelay(true).add_service(service);
        tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
        Ok(address)
    }

    /// Registers with the coordinator and keeps the lease, for ever.
    pub(crate) async fn register(address: SocketAddr, coordinator: &str, id: String) -> anyhow::Result<()> {
        let mut client = registry_client(lazy_channel(coordinator)?);
        let info = pb::WorkerInfo {
            endpoint: format!("http://{address}"),
            device: "cpu".to_owned(),
            threads: 1,
            data_host: "127.0.0.1".to_owned(),
            incarnation: format!("{id} at {address}"),
            id,
            ..Default::default()
        };
        let request = pb::RegisterRequest { info: Some(info) };
        let lease = client.register(within(CALL, request)).await?.into_inner();
        let interval = duration_from_pb(lease.renew_interval).unwrap_or(Duration::from_secs(1));
        tokio::spawn(async move {
            for ticks in 1.. {
                tokio::time::sleep(interval).await;
                let progress = pb::WorkerProgress { ticks, working: true, ..Default::default() };
                let renewal = pb::RenewRequest {
                    lease_id: lease.lease_id.clone(),
                    progress: Some(progress),
                    ..Default::default()
                };
                if let Err(status) = client.renew(within(CALL, renewal)).await {
                    eprintln!("a lease was not renewed: {}", status.message());
                }
            }
        });
        Ok(())
    }

    fn rank(&self) -> MutexGuard<'_, usize> {
        self.tp_rank.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A stream of messages made by a task of its own.
type Made<T> = ReceiverStream<Result<T, Status>>;

/// The scores and the report of one step, in the order in which a worker sends them; false when nobody listens.
async fn send_step(
    shared: &Shared,
    layers: &[RankLayer],
    (step, generation): (u64, u64),
    sender: &mpsc::Sender<Result<pb::TrainResponse, Status>>,
) -> bool {
    use pb::train_response::Kind;
    for (layer, held) in layers.iter().enumerate() {
        for projection in Projection::ALL {
            let units = match projection {
                Projection::Q | Projection::O => &held.query_heads,
                Projection::K | Projection::V => &held.kv_heads,
                Projection::Gate | Projection::Up | Projection::Down => &held.channels,
            };
            let all = &shared.scores[layer][projection.index()];
            let chunk = pb::ScoreChunk {
                step,
                generation,
                layer: u32::try_from(layer).unwrap_or(u32::MAX),
                projection: mask::projection_to_pb(projection).into(),
                first_unit: 0,
                values_f32: units.iter().map(|&unit| all[unit]).collect(),
                values_f64: Vec::new(),
            };
            let message = pb::TrainResponse { kind: Some(Kind::Scores(chunk)) };
            if sender.send(Ok(message)).await.is_err() {
                return false;
            }
        }
    }
    let report = pb::StepReport {
        step,
        loss: 2.0,
        grad_norm: 1.0,
        learning_rate: 1e-3,
        tokens: 1024,
        duration: Some(duration_to_pb(Duration::from_millis(1))),
        generation,
        ..Default::default()
    };
    shared.lock().reported = Instant::now();
    sender.send(Ok(pb::TrainResponse { kind: Some(Kind::Report(report)) })).await.is_ok()
}

#[tonic::async_trait]
impl WorkerService for Simulated {
    type TrainStream = Made<pb::TrainResponse>;
    type EvaluateTaskStream = Made<pb::EvaluateTaskResponse>;
    type CheckpointStream = Made<pb::CheckpointResponse>;

    async fn describe(
        &self,
        _: Request<pb::DescribeRequest>,
    ) -> Result<Response<pb::DescribeResponse>, Status> {
        Ok(Response::new(pb::DescribeResponse::default()))
    }

    async fn load(&self, request: Request<pb::LoadRequest>) -> Result<Response<pb::LoadResponse>, Status> {
        let request = request.into_inner();
        if request.restore.is_some() {
            return Err(Status::unimplemented("simulated workers keep no state: the run was not to go back"));
        }
        *self.rank() = request.tp_rank as usize;
        let loaded = pb::LoadResponse { data_sha256: "0".repeat(64), ..Default::default() };
        Ok(Response::new(loaded))
    }

    async fn open_rendezvous(
        &self,
        _: Request<pb::OpenRendezvousRequest>,
    ) -> Result<Response<pb::OpenRendezvousResponse>, Status> {
        Ok(Response::new(pb::OpenRendezvousResponse { rendezvous: "here".into() }))
    }

    async fn join_group(
        &self,
        _: Request<pb::JoinGroupRequest>,
    ) -> Result<Response<pb::JoinGroupResponse>, Status> {
        Ok(Response::new(pb::JoinGroupResponse {}))
    }

    async fn train(&self, request: Request<pb::TrainRequest>) -> Result<Response<Self::TrainStream>, Status> {
        let pb::TrainRequest { first_step, end_step, generation, .. } = request.into_inner();
        let (shared, tp_rank) = (self.shared.clone(), *self.rank());
        let placement = shared.lock().placement.clone();
        let (sender, receiver) = mpsc::channel(BUFFER);
        tokio::spawn(async move {
            for step in first_step..end_step {
                if !send_step(&shared, &placement.ranks[tp_rank], (step, generation), &sender).await {
                    return;
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(receiver)))
    }

    async fn apply_mask(
        &self,
        request: Request<pb::ApplyMaskRequest>,
    ) -> Result<Response<pb::ApplyMaskResponse>, Status> {
        self.shared.apply(request.into_inner())?;
        Ok(Response::new(pb::ApplyMaskResponse::default()))
    }

    async fn evaluate(
        &self,
        _: Request<pb::EvaluateRequest>,
    ) -> Result<Response<pb::EvaluateResponse>, Status> {
        Err(Status::unimplemented("simulated workers measure nothing"))
    }

    async fn evaluate_task(
        &self,
        _: Request<pb::EvaluateTaskRequest>,
    ) -> Result<Response<Self::EvaluateTaskStream>, Status> {
        Err(Status::unimplemented("simulated workers measure nothing"))
    }

    async fn checkpoint(
        &self,
        _: Request<pb::CheckpointRequest>,
    ) -> Result<Response<Self::CheckpointStream>, Status> {
        use pb::checkpoint_response::Kind;
        let tp_rank = *self.rank();
        let shard = pb::CheckpointShard {
            file: format!("rank-{tp_rank}.safetensors"),
            sha256: "0".repeat(64),
            size_bytes: 1,
        };
        let (sender, receiver) = mpsc::channel(2);
        for kind in [Kind::Snapshot(pb::CheckpointSnapshot { size_bytes: 1 }), Kind::Shard(shard)] {
            // There is room for both.
            let _ = sender.send(Ok(pb::CheckpointResponse { kind: Some(kind) })).await;
        }
        Ok(Response::new(ReceiverStream::new(receiver)))
    }

    async fn export(&self, _: Request<pb::ExportRequest>) -> Result<Response<pb::ExportResponse>, Status> {
        Err(Status::unimplemented("simulated workers write nothing"))
    }

    async fn abort(&self, _: Request<pb::AbortRequest>) -> Result<Response<pb::AbortResponse>, Status> {
        Ok(Response::new(pb::AbortResponse {}))
    }
}
