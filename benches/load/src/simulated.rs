//! Workers that compute nothing: they answer as workers do and send scores in the shape of their shard.

use crate::expected::{Scores, digest};
use crate::statistics::{Random, Sorted};
use anyhow::Context as _;
use model_spec::{LayerSpec, ModelSpec, Projection};
use prost::Message;
use sharding::{Placement, RankLayer};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;
use tonic::{Request, Response, Status};
use wire::client::{lazy_channel, registry_client, within};
use wire::convert::mask;
use wire::convert::time::{duration_from_pb, duration_to_pb};
use wire::pb;
use wire::pb::worker_service_server::{WorkerService, WorkerServiceServer};
use wire::status::{Failure, Reason};

/// Messages of a training stream that may wait to be sent.
const BUFFER: usize = 64;
const CALL: Duration = Duration::from_secs(5);

/// What all simulated workers share.
#[derive(Debug)]
pub(crate) struct Shared {
    dense: ModelSpec,
    tp_degree: usize,
    /// The same in each step.
    scores: Scores,
    /// Digests of the masks that must come, by generation.
    expected: Vec<u64>,
    /// Least time from a step to the next.
    pace: Duration,
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    generation: u64,
    /// The mask in force as the first rank was told it, for the others to be held against.
    told_mask: Option<pb::KeepMask>,
    placement: Arc<Placement>,
    /// When the first step began.
    began: Option<Instant>,
    /// When the last report of a step went out.
    reported: Instant,
    /// Ranks that were told of the decision in force.
    told: usize,
    first: Vec<Duration>,
    last: Vec<Duration>,
    decided: Vec<Instant>,
    score_bytes: u64,
}

/// How the decisions came.
#[derive(Debug)]
pub(crate) struct Decided {
    /// From the last report of a step to the mask at the first rank.
    pub(crate) first: Sorted,
    /// And at the last rank.
    pub(crate) last: Sorted,
    /// From the first decision to the last.
    pub(crate) span: Duration,
    /// Of the messages that carried scores.
    pub(crate) score_bytes: u64,
}

impl Shared {
    /// # Errors
    /// When the model cannot be cut in so many.
    pub(crate) fn new(
        dense: ModelSpec,
        tp_degree: usize,
        scores: Scores,
        expected: Vec<u64>,
        pace: Duration,
    ) -> anyhow::Result<Arc<Self>> {
        let inner = Inner {
            generation: 0,
            told_mask: None,
            placement: Arc::new(Placement::dense(&dense, tp_degree)?),
            began: None,
            reported: Instant::now(),
            told: 0,
            first: Vec::new(),
            last: Vec::new(),
            decided: Vec::new(),
            score_bytes: 0,
        };
        Ok(Arc::new(Self { dense, tp_degree, scores, expected, pace, inner: Mutex::new(inner) }))
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
        Decided {
            first: Sorted::of(inner.first.clone()),
            last: Sorted::of(inner.last.clone()),
            span,
            score_bytes: inner.score_bytes,
        }
    }

    /// When a step is due.
    fn due(&self, step: u64) -> Instant {
        let began = *self.lock().began.get_or_insert_with(Instant::now);
        began + self.pace.saturating_mul(u32::try_from(step).unwrap_or(u32::MAX))
    }

    /// A rank has been told of a decision, which must be the one that was to come.
    fn apply(&self, request: pb::ApplyMaskRequest) -> Result<(), Status> {
        let now = Instant::now();
        let told = request.keep_mask.unwrap_or_default();
        let mut inner = self.lock();
        let wait = now.saturating_duration_since(inner.reported);
        if request.generation == inner.generation {
            if inner.told_mask.as_ref() != Some(&told) {
                return Err(wrong(format!("mask {} differs between ranks", request.generation)));
            }
        } else {
            let place = usize::try_from(inner.generation).unwrap_or(usize::MAX);
            if request.generation != inner.generation + 1 || self.expected.get(place) != Some(&digest(&told))
            {
                return Err(wrong(format!("mask {} is not the one that was to come", request.generation)));
            }
            // The first rank to hear of it works out who holds what now; all would come to the same.
            let kept = mask::checked(Some(told.clone()), "keep_mask")?;
            inner.placement = Arc::new(inner.placement.restricted_to(&kept).rebalanced(&self.dense));
            inner.told_mask = Some(told);
            inner.generation = request.generation;
            inner.told = 0;
            inner.first.push(wait);
        }
        inner.told += 1;
        if inner.told == self.tp_degree {
            inner.last.push(wait);
            inner.decided.push(now);
        }
        Ok(())
    }
}

/// One that no restart would mend.
fn wrong(message: String) -> Status {
    Failure::new(Reason::Refused, message).into()
}

/// Of every unit of a model.
pub(crate) fn scores(dense: &ModelSpec) -> Scores {
    let of_layer = |(layer, widths): (usize, &LayerSpec)| {
        Projection::ALL.map(|projection| {
            let units = match projection {
                Projection::Q | Projection::O => widths.query_head_count,
                Projection::K | Projection::V => widths.kv_head_count,
                Projection::Gate | Projection::Up | Projection::Down => widths.intermediate_size,
            };
            (0..units).map(|unit| score(layer, projection, unit)).collect()
        })
    };
    dense.layers.iter().enumerate().map(of_layer).collect()
}

/// Between 0 and some 17, with the long tail of real ones: each unit its own, the same in each run.
fn score(layer: usize, projection: Projection, unit: usize) -> f32 {
    let place = (layer as u64) << 40 ^ (projection.index() as u64) << 32 ^ unit as u64;
    let uniform = ((Random::new(place).next() >> 40) as f32 + 1.0) / (1_u64 << 24) as f32;
    -uniform.min(1.0 - f32::EPSILON).ln()
}

/// One worker.
#[derive(Debug, Clone)]
pub(crate) struct Simulated {
    shared: Arc<Shared>,
    tp_rank: Arc<Mutex<usize>>,
}

impl Simulated {
    pub(crate) fn new(shared: Arc<Shared>) -> Self {
        Self { shared, tp_rank: Arc::default() }
    }

    pub(crate) fn service(self) -> WorkerServiceServer<Self> {
        WorkerServiceServer::new(self)
            .max_decoding_message_size(wire::limits::MASK_MESSAGE_BYTES)
            .max_encoding_message_size(wire::limits::MASK_MESSAGE_BYTES)
    }

    /// Serves on a free port as one worker, registers with the coordinator and keeps the lease, until `tasks` is dropped.
    ///
    /// # Errors
    /// When there is no port, or the coordinator does not admit it.
    pub(crate) async fn start(
        shared: Arc<Shared>,
        coordinator: &str,
        id: String,
        tasks: &mut JoinSet<()>,
    ) -> anyhow::Result<()> {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.context("no free port")?;
        let address = listener.local_addr()?;
        let server = Server::builder().add_service(Self::new(shared).service());
        tasks.spawn(async move {
            if let Err(error) =
                server.serve_with_incoming(TcpIncoming::from(listener).with_nodelay(Some(true))).await
            {
                eprintln!("a worker does not serve any more: {error}");
            }
        });
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
        tasks.spawn(async move {
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
    tokio::time::sleep_until(shared.due(step).into()).await;
    let mut score_bytes = 0;
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
            score_bytes += message.encoded_len() as u64;
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
    {
        let mut inner = shared.lock();
        inner.reported = Instant::now();
        inner.score_bytes += score_bytes;
    }
    sender.send(Ok(pb::TrainResponse { kind: Some(Kind::Report(report)) })).await.is_ok()
}

#[tonic::async_trait]
impl WorkerService for Simulated {
    type TrainStream = Made<pb::TrainResponse>;
    type CalibrateStream = Made<pb::CalibrateResponse>;
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

    async fn calibrate(
        &self,
        _: Request<pb::CalibrateRequest>,
    ) -> Result<Response<Self::CalibrateStream>, Status> {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model;
    use checkpoint::ModelFolder;
    use pruning::KeepMask;

    fn shared(expected: Vec<u64>) -> Arc<Shared> {
        let folder = tempfile::tempdir().unwrap();
        model::write(folder.path(), model::Shape { layers: 1, hidden: 8, heads: 2, channels: 6 }).unwrap();
        let dense = ModelFolder::open(folder.path()).unwrap().spec().clone();
        let scores = scores(&dense);
        Shared::new(dense, 2, scores, expected, Duration::ZERO).unwrap()
    }

    #[test]
    fn a_mask_that_is_not_the_expected_one_on_every_rank_is_refused() {
        let mut kept = KeepMask::full(&shared(Vec::new()).dense);
        kept.layers[0].channels.truncate(4);
        let right = mask::to_pb(&kept);
        kept.layers[0].channels[3] = 5;
        let wrong = mask::to_pb(&kept);
        let told = |generation, mask: &pb::KeepMask| pb::ApplyMaskRequest {
            generation,
            keep_mask: Some(mask.clone()),
            ..Default::default()
        };
        let shared = || shared(vec![digest(&right)]);
        for (first, second, are_good) in [
            (told(1, &right), told(1, &right), [true, true]),
            (told(1, &wrong), told(1, &right), [false, true]),
            (told(1, &right), told(1, &wrong), [true, false]),
            (told(2, &right), told(1, &right), [false, true]),
            (told(1, &right), told(2, &right), [true, false]),
        ] {
            let shared = shared();
            let answers = [first, second].map(|request| shared.apply(request).is_ok());
            assert_eq!(answers, are_good);
            assert_eq!(shared.decided().last.len(), usize::from(are_good == [true, true]));
        }
    }
}
