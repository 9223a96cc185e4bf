//! Load on a coordinator: simulated workers with scores in the shape of LLaMA-65B, many clients on one run, and beside them
//! bare tonic on the same machine.
//!
//! Prints a table in Markdown. Fails when a client has lost an event or the run does not end well.

mod model;
mod simulated;
mod statistics;
mod watching;

use anyhow::{Context as _, bail, ensure};
use checkpoint::ModelFolder;
use clap::Parser;
use simulated::{Shared, Simulated};
use statistics::{Sorted, in_words, resident_bytes};
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use watching::Watchers;
use wire::client::{RunClient, connected_channel, registry_client, run_client, within, worker_client};
use wire::pb;

const CALL: Duration = Duration::from_secs(10);
/// Unary calls that a latency is taken over.
const CALLS: usize = 2000;
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// Puts load on a coordinator and prints what it bears.
#[derive(Debug, Parser)]
struct Args {
    /// Layers of the model, each with 64 heads and 22016 channels
    #[arg(long, default_value_t = 80)]
    layers: u64,
    /// Workers of the run
    #[arg(long, default_value_t = 8)]
    workers: usize,
    /// Optimizer steps, nine tenths of which may end with a decision
    #[arg(long, default_value_t = 100)]
    steps: u64,
    /// Steps between two decisions
    #[arg(long, default_value_t = 1)]
    every: u64,
    /// Clients that watch the run
    #[arg(long, default_value_t = 1000)]
    watchers: usize,
    /// Connections that they share
    #[arg(long, default_value_t = 100)]
    connections: usize,
    /// Only serve as bare tonic, for another process of this program
    #[arg(long, hide = true)]
    serve_bare: bool,
}

/// A process that is killed with its holder.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        // One that has ended is as good.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let folder = tempfile::tempdir()?;
    let model = folder.path().join("model");
    model::write(&model, args.layers)?;
    std::fs::write(folder.path().join("text.txt"), "text")?;
    let dense = ModelFolder::open(&model)?.spec().clone();
    let shared = Shared::new(dense, args.workers)?;
    if args.serve_bare {
        println!("{}", Simulated::serve(shared.clone()).await?);
        std::future::pending::<()>().await;
    }

    let bare = bare(&args).await?;
    let (coordinator, address) = start_coordinator(folder.path())?;
    let endpoint = format!("http://{address}");
    let renewals = idle_calls(&endpoint).await?;
    let mut runs = run_client(connected_channel(&endpoint).await?);
    // Its clients are there before its workers, so that they see it from the first step on.
    let (id, decisions) = create(&mut runs, folder.path(), &args).await?;
    let watchers = Watchers::start(&endpoint, &id, args.watchers, args.connections).await?;
    tokio::time::sleep(LOOK_EVERY).await;
    let started = Instant::now();
    for worker in 0..args.workers {
        let at = Simulated::serve(shared.clone()).await?;
        Simulated::register(at, &endpoint, format!("w{worker}")).await?;
    }
    let (memory, asked) = look(&mut runs, &id, coordinator.0.id()).await?;
    let watched = watchers.end().await?;
    let wall = started.elapsed();
    let decided = shared.decided();
    ensure!(
        watched.clients == args.watchers,
        "{} of {} clients came to an end",
        watched.clients,
        args.watchers
    );
    ensure!(
        decided.waits.len() == decisions,
        "{} of {decisions} decisions were applied",
        decided.waits.len()
    );

    let rate = decided.waits.len().saturating_sub(1) as f64 / decided.span.as_secs_f64();
    let mib = |bytes: u64| bytes >> 20;
    let quarter = |place: usize| {
        let part = memory.len().div_ceil(4);
        memory.iter().skip(place * part).take(part).max().copied().unwrap_or(0)
    };
    println!("| | |\n| --- | ---: |");
    println!("| layers x channels, workers | {} x 22,016, {} |", args.layers, args.workers);
    println!("| steps, decisions, wall time | {}, {decisions}, {} |", args.steps, in_words(wall));
    println!("| steps a second, each with all its scores | {:.2} |", args.steps as f64 / wall.as_secs_f64());
    println!("| decisions a second | {rate:.2} |");
    println!("| bare tonic: the same scores read and dropped, times a second | {:.2} |", bare.rate);
    print_latency("last report to the mask at the last rank", &decided.waits);
    println!("| clients, events of each, lost or doubled | {}, {}, 0 |", watched.clients, watched.events);
    print_latency("event to its arrival at a client", &watched.delays);
    print_latency("GetRun meanwhile", &asked);
    print_latency("Renew, idle", &renewals);
    print_latency("bare tonic: an empty call, idle", &bare.calls);
    println!(
        "| memory of the coordinator, most in each quarter of the time | {}, {}, {}, {} MiB |",
        mib(quarter(0)),
        mib(quarter(1)),
        mib(quarter(2)),
        mib(quarter(3))
    );
    Ok(())
}

fn print_latency(what: &str, sorted: &Sorted) {
    let [middle, most, longest] = [0.5, 0.99, 1.0].map(|share| in_words(sorted.quantile(share)));
    println!("| {what}: median, 99 %, longest of {} | {middle}, {most}, {longest} |", sorted.len());
}

fn start_coordinator(root: &Path) -> anyhow::Result<(Process, String)> {
    let program = std::env::current_exe()?.with_file_name("coordinator");
    let mut child = Command::new(&program)
        .args(["--listen", "127.0.0.1:0", "--log-level", "info", "--data-dir"])
        .arg(root.join("state"))
        .arg("--root")
        .arg(root)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("`{}` cannot be started; build it first", program.display()))?;
    let errors = child.stderr.take().context("its log is piped")?;
    let process = Process(child);
    let mut lines = BufReader::new(errors).lines();
    while let Some(line) = lines.next() {
        let line = line?;
        if let Some((_, address)) = line.split_once("coordinator listens") {
            let address = address.split_once("address=").context("it names its address")?.1.trim().to_owned();
            // A pipe that nobody reads would stop it.
            std::thread::spawn(move || lines.for_each(drop));
            return Ok((process, address));
        }
    }
    bail!("the coordinator ended before it listened")
}

/// What bare tonic does on this machine.
struct Bare {
    calls: Sorted,
    /// How often a second the scores of one step arrive.
    rate: f64,
}

/// Empty calls, and training streams that are read and dropped, between two processes.
async fn bare(args: &Args) -> anyhow::Result<Bare> {
    let mut child = Command::new(std::env::current_exe()?)
        .args(["--serve-bare", "--layers", &args.layers.to_string(), "--workers", &args.workers.to_string()])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()?;
    let output = child.stdout.take().context("its output is piped")?;
    let _process = Process(child);
    let mut address = String::new();
    BufReader::new(output).read_line(&mut address)?;
    let endpoint = format!("http://{}", address.trim());
    let mut client = worker_client(connected_channel(&endpoint).await?);
    let mut calls = Vec::with_capacity(CALLS);
    for _ in 0..CALLS {
        let asked = Instant::now();
        client.describe(within(CALL, pb::DescribeRequest {})).await?;
        calls.push(asked.elapsed());
    }
    // A step of all ranks is as many streams of rank 0 at once, each over a connection of its own.
    let steps = 5;
    let mut reading = tokio::task::JoinSet::new();
    let began = Instant::now();
    for _ in 0..args.workers {
        let mut client = worker_client(connected_channel(&endpoint).await?);
        reading.spawn(async move {
            let request = pb::TrainRequest { end_step: steps, ..Default::default() };
            let mut stream = client.train(request).await?.into_inner();
            while stream.message().await?.is_some() {}
            Ok::<_, tonic::Status>(())
        });
    }
    while let Some(read) = reading.join_next().await {
        read??;
    }
    Ok(Bare { calls: Sorted::of(calls), rate: steps as f64 / began.elapsed().as_secs_f64() })
}

/// The coordinator's smallest call, on a worker of its own.
async fn idle_calls(endpoint: &str) -> anyhow::Result<Sorted> {
    let mut client = registry_client(connected_channel(endpoint).await?);
    let info = pb::WorkerInfo {
        // Behind all others, and gone before the run asks for workers.
        id: "z".to_owned(),
        endpoint: "http://127.0.0.1:1".to_owned(),
        device: "none".to_owned(),
        incarnation: "z".to_owned(),
        ..Default::default()
    };
    let lease = client.register(within(CALL, pb::RegisterRequest { info: Some(info) })).await?.into_inner();
    let mut calls = Vec::with_capacity(CALLS);
    for _ in 0..CALLS {
        let request = pb::RenewRequest { lease_id: lease.lease_id.clone(), ..Default::default() };
        let asked = Instant::now();
        client.renew(within(CALL, request)).await?;
        calls.push(asked.elapsed());
    }
    client.deregister(within(CALL, pb::DeregisterRequest { lease_id: lease.lease_id })).await?;
    Ok(Sorted::of(calls))
}

/// A run that waits for its workers, and how many masks it will decide.
async fn create(runs: &mut RunClient, root: &Path, args: &Args) -> anyhow::Result<(String, usize)> {
    let path = |name: &str| root.join(name).to_string_lossy().into_owned();
    let ramp = pb::Ramp { warmup: Some(0.0), cooldown: Some(0.1), every: Some(args.every), shape: None };
    let pruning = pb::Pruning {
        criterion: Some(pb::Criterion::LorapruneCode.into()),
        budget: Some(pb::pruning::Budget::Sparsity(0.5)),
        ramp: Some(ramp),
        compensation: Some(pb::pruning::Compensation::NoCompensation(pb::NoCompensation {})),
        ..Default::default()
    };
    let spec = pb::RunSpec {
        model: path("model"),
        training_data: vec![pb::TextSource { path: path("text.txt"), ..Default::default() }],
        recipe: Some(pb::Recipe { steps: Some(args.steps), pruning: Some(pruning), ..Default::default() }),
        tp_degree: Some(u32::try_from(args.workers)?),
        durability: Some(pb::DurabilitySpec {
            forget_decisions: true,
            max_restarts: Some(0),
            ..Default::default()
        }),
        ..Default::default()
    };
    let request = pb::CreateRunRequest { spec: Some(spec), ..Default::default() };
    let run =
        runs.create_run(within(CALL, request)).await?.into_inner().run.context("an answer has a run")?;
    let decisions = run.plan.context("a run has a plan")?.pruning_steps.len();
    Ok((run.id, decisions))
}

/// Looks at memory and asks for the run until it ends.
async fn look(runs: &mut RunClient, id: &str, process: u32) -> anyhow::Result<(Vec<u64>, Sorted)> {
    let (mut memory, mut asked) = (Vec::new(), Vec::new());
    loop {
        memory.push(resident_bytes(process)?);
        let began = Instant::now();
        let request = within(CALL, pb::GetRunRequest { id: id.to_owned() });
        let run = runs.get_run(request).await?.into_inner().run.context("an answer has a run")?;
        asked.push(began.elapsed());
        match run.state() {
            pb::RunState::Succeeded => return Ok((memory, Sorted::of(asked))),
            pb::RunState::Failed | pb::RunState::Cancelled => bail!("{}", run.status_message),
            pb::RunState::Unspecified
            | pb::RunState::Queued
            | pb::RunState::Starting
            | pb::RunState::Running
            | pb::RunState::Exporting
            | pb::RunState::Pausing
            | pb::RunState::Paused
            | pb::RunState::Recovering
            | pb::RunState::Cancelling => {}
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}
