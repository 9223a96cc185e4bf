//! Bare tonic with nothing behind it: the measure of what this machine could do.

use crate::coordinator::Process;
use crate::simulated::{Shared, Simulated};
use crate::statistics::Sorted;
use anyhow::{Context as _, ensure};
use std::convert::Infallible;
use std::future::Future;
use std::io::{BufRead, BufReader};
use std::pin::Pin;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_stream::wrappers::ReceiverStream;
use tonic::body::Body;
use tonic::codegen::{Service, http};
use tonic::server::{NamedService, ServerStreamingService};
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;
use tonic::{Request, Response, Status};
use wire::client::{connected_channel, run_client, within, worker_client};
use wire::convert::time::{duration_to_pb, time_to_pb};
use wire::pb;

const CALL: Duration = Duration::from_secs(30);
/// Calls one after the other that a latency is taken over.
const CALLS: usize = 2000;
/// Callers at a time that a rate is taken over, and for how long.
const CALLERS: usize = 32;
const RATED: Duration = Duration::from_secs(2);
/// Messages that may wait for a slow client, as many as at the coordinator.
const BUFFER: usize = 16;
/// Messages of all streams together.
const MESSAGES: usize = 400_000;
/// Steps whose scores are read and dropped.
const STEPS: u64 = 5;

/// What bare tonic does on this machine.
#[derive(Debug)]
pub(crate) struct Bare {
    pub(crate) latency: Sorted,
    pub(crate) calls_a_second: f64,
    /// Messages a second to as many streams as there are clients, over as many connections.
    pub(crate) messages_a_second: f64,
    /// How often a second the scores of one step arrive.
    pub(crate) steps_a_second: f64,
}

/// Serves as bare tonic until it is killed; says where.
pub(crate) async fn serve(shared: Arc<Shared>) -> anyhow::Result<()> {
    let listener = TcpListener::bind(("127.0.0.1", 0)).await.context("no free port")?;
    println!("{}", listener.local_addr()?);
    let server = Server::builder()
        .tcp_nodelay(true)
        .add_service(Simulated::new(shared).service())
        .add_service(Events::default());
    Ok(server.serve_with_incoming(TcpIncoming::from(listener).with_nodelay(Some(true))).await?)
}

/// Measures another process of this program that serves as bare tonic.
pub(crate) async fn measure(arguments: &[String], load: Load) -> anyhow::Result<Bare> {
    let mut child = Command::new(std::env::current_exe()?)
        .args(arguments)
        .arg("--serve-bare")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()?;
    let output = child.stdout.take().context("its output is piped")?;
    let _process = Process(child);
    let mut address = String::new();
    BufReader::new(output).read_line(&mut address)?;
    let endpoint = format!("http://{}", address.trim());
    let client = worker_client(connected_channel(&endpoint).await?);
    let describe = move || {
        let mut client = client.clone();
        async move { client.describe(within(CALL, pb::DescribeRequest {})).await.map(drop) }
    };
    Ok(Bare {
        latency: latency(&describe).await?,
        calls_a_second: rate(describe).await?,
        messages_a_second: stream_events(&endpoint, load).await?,
        steps_a_second: stream_scores(&endpoint, load.workers).await?,
    })
}

/// How many of what.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Load {
    pub(crate) workers: usize,
    pub(crate) clients: usize,
    pub(crate) connections: usize,
}

/// Of calls one after the other.
pub(crate) async fn latency<Answer>(call: impl Fn() -> Answer) -> Result<Sorted, Status>
where
    Answer: Future<Output = Result<(), Status>>,
{
    let mut calls = Vec::with_capacity(CALLS);
    for _ in 0..CALLS {
        let asked = Instant::now();
        call().await?;
        calls.push(asked.elapsed());
    }
    Ok(Sorted::of(calls))
}

/// Calls a second of several callers at a time.
pub(crate) async fn rate<Answer>(call: impl Fn() -> Answer + Clone + Send + 'static) -> anyhow::Result<f64>
where
    Answer: Future<Output = Result<(), Status>> + Send,
{
    let began = Instant::now();
    let mut callers = JoinSet::new();
    for _ in 0..CALLERS {
        let call = call.clone();
        callers.spawn(async move {
            let mut calls = 0_u64;
            while began.elapsed() < RATED {
                call().await?;
                calls += 1;
            }
            Ok::<_, Status>(calls)
        });
    }
    let mut calls = 0;
    while let Some(called) = callers.join_next().await {
        calls += called??;
    }
    Ok(calls as f64 / began.elapsed().as_secs_f64())
}

async fn stream_events(endpoint: &str, load: Load) -> anyhow::Result<f64> {
    let mut channels = Vec::new();
    for _ in 0..load.connections {
        channels.push(connected_channel(endpoint).await?);
    }
    let each = (MESSAGES / load.clients.max(1)) as u64;
    let mut reading = JoinSet::new();
    let began = Instant::now();
    for client in 0..load.clients {
        let mut runs = run_client(channels[client % channels.len()].clone());
        reading.spawn(async move {
            // The bare server reads it as how many streams there will be, and how many events are wanted.
            let request = pb::WatchRunRequest { id: load.clients.to_string(), after_revision: each };
            let mut stream = runs.watch_run(request).await?.into_inner();
            let mut read = 0;
            while stream.message().await?.is_some() {
                read += 1;
            }
            Ok::<u64, Status>(read)
        });
    }
    let mut read = 0;
    while let Some(one) = reading.join_next().await {
        read += one??;
    }
    ensure!(read == each * load.clients as u64, "{read} messages of bare tonic came");
    Ok(read as f64 / began.elapsed().as_secs_f64())
}

/// A step of all ranks is as many streams of rank 0 at once, each over a connection of its own.
async fn stream_scores(endpoint: &str, workers: usize) -> anyhow::Result<f64> {
    let mut reading = JoinSet::new();
    let began = Instant::now();
    for _ in 0..workers {
        let mut client = worker_client(connected_channel(endpoint).await?);
        reading.spawn(async move {
            let request = pb::TrainRequest { end_step: STEPS, ..Default::default() };
            let mut stream = client.train(request).await?.into_inner();
            while stream.message().await?.is_some() {}
            Ok::<_, Status>(())
        });
    }
    while let Some(read) = reading.join_next().await {
        read??;
    }
    Ok(STEPS as f64 / began.elapsed().as_secs_f64())
}

/// WatchRun as bare as can be: events that go out to all streams in turn, as those of a run do, as fast as they are taken.
#[derive(Debug, Clone, Default)]
struct Events {
    waiting: Arc<Mutex<Vec<EventSender>>>,
}

type EventSender = mpsc::Sender<Result<pb::WatchRunResponse, Status>>;

impl ServerStreamingService<pb::WatchRunRequest> for Events {
    type Response = pb::WatchRunResponse;
    type ResponseStream = ReceiverStream<Result<pb::WatchRunResponse, Status>>;
    type Future = std::future::Ready<Result<Response<Self::ResponseStream>, Status>>;

    fn call(&mut self, request: Request<pb::WatchRunRequest>) -> Self::Future {
        let pb::WatchRunRequest { id, after_revision: count } = request.into_inner();
        let (sender, receiver) = mpsc::channel(BUFFER);
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.push(sender);
        if waiting.len().to_string() == id {
            let streams = std::mem::take(&mut *waiting);
            tokio::spawn(async move {
                for revision in 1..=count {
                    let message = pb::WatchRunResponse { event: Some(step_event(revision)) };
                    for stream in &streams {
                        // One that has gone away is found out by who counts.
                        let _ = stream.send(Ok(message.clone())).await;
                    }
                }
            });
        }
        std::future::ready(Ok(Response::new(ReceiverStream::new(receiver))))
    }
}

impl NamedService for Events {
    const NAME: &'static str = pb::run_service_server::SERVICE_NAME;
}

impl Service<http::Request<Body>> for Events {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let events = self.clone();
        Box::pin(async move {
            let mut grpc = tonic::server::Grpc::new(tonic_prost::ProstCodec::default());
            Ok(grpc.server_streaming(events, request).await)
        })
    }
}

/// As a coordinator tells of a step.
fn step_event(revision: u64) -> pb::RunEvent {
    let report = pb::StepReport {
        step: revision,
        loss: 2.0,
        grad_norm: 1.0,
        learning_rate: 1e-3,
        tokens: 1024,
        duration: Some(duration_to_pb(Duration::from_millis(1))),
        score_duration: Some(duration_to_pb(Duration::ZERO)),
        sparsity: 0.5,
        ..Default::default()
    };
    pb::RunEvent {
        revision,
        time: Some(time_to_pb(std::time::SystemTime::now())),
        kind: Some(pb::run_event::Kind::Step(report)),
    }
}
