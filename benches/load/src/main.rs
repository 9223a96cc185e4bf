//! Load on a coordinator: simulated workers with scores in the shape of LLaMA-65B, many clients on one run that are cut off
//! again and again, and beside them bare tonic on the same machine.
//!
//! Prints one line of JSON; times are in seconds. Fails when a client has lost an event, a mask is not the one that was to
//! come, or the run does not end well.

mod bare;
mod coordinator;
mod expected;
mod model;
mod simulated;
mod statistics;
mod watching;

use anyhow::{Context as _, bail, ensure};
use bare::Bare;
use checkpoint::ModelFolder;
use clap::Parser;
use coordinator::Process;
use model_spec::ModelSpec;
use recipe::{Pruning, Ramp, Recipe};
use serde_json::json;
use simulated::{Shared, Simulated};
use statistics::Sorted;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::task::JoinSet;
use watching::{Plan, Watched, Watchers};
use wire::client::{RunClient, connected_channel, registry_client, run_client, within};
use wire::pb;

const CALL: Duration = Duration::from_secs(30);
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// Puts load on a coordinator and prints what it bears.
#[derive(Debug, Parser)]
struct Args {
    #[command(flatten)]
    shape: model::Shape,
    /// Workers of the run
    #[arg(long, default_value_t = 8)]
    workers: usize,
    /// Optimizer steps; their scores are the same, but for what is gone
    #[arg(long, default_value_t = 100)]
    steps: u64,
    /// Steps between two decisions, in the first nine tenths of the steps
    #[arg(long, default_value_t = 1)]
    every: u64,
    /// Least time that the steps take together; 0 for as fast as they can
    #[arg(long, default_value_t = 0.0)]
    seconds: f64,
    /// Clients that watch the run
    #[arg(long, default_value_t = 1000)]
    watchers: usize,
    /// Connections that they share
    #[arg(long, default_value_t = 100)]
    connections: usize,
    /// Events after which a connection with its clients, and beside it each stream, is cut, on average; 0 for never
    #[arg(long, default_value_t = 100)]
    cut_every: u64,
    /// Fail when the coordinator's memory is not flat: in the last quarter a tenth above the second
    #[arg(long)]
    flat: bool,
    /// Folder for the coordinator's files, which are removed at the end [default: the system's for temporary files]
    #[arg(long)]
    scratch: Option<PathBuf>,
    /// Only serve as bare tonic, for another process of this program
    #[arg(long, hide = true)]
    serve_bare: bool,
}

impl Args {
    fn recipe(&self) -> Recipe {
        let ramp = Ramp { warmup: 0.0, cooldown: 0.1, every: self.every, ..Ramp::published() };
        let pruning = Pruning { ramp, ..Pruning::published() };
        Recipe { steps: self.steps, pruning: Some(pruning), ..Recipe::default() }
    }

    fn pace(&self) -> Duration {
        Duration::from_secs_f64(self.seconds / self.steps.max(1) as f64)
    }
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    ensure!(args.seconds.is_finite() && args.seconds >= 0.0, "--seconds must be 0 or more");
    ensure!((1..=args.watchers).contains(&args.connections), "--connections must be from 1 to --watchers");
    let scratch = args.scratch.clone().unwrap_or_else(std::env::temp_dir);
    std::fs::create_dir_all(&scratch).with_context(|| format!("`{}` cannot be made", scratch.display()))?;
    let folder = tempfile::tempdir_in(&scratch)?;
    let model = folder.path().join("model");
    model::write(&model, args.shape)?;
    std::fs::write(folder.path().join("text.txt"), "text")?;
    let dense = ModelFolder::open(&model)?.spec().clone();
    let scores = simulated::scores(&dense);
    if args.serve_bare {
        drop(folder);
        return bare::serve(Shared::new(dense, args.workers, scores, Vec::new(), Duration::ZERO)?).await;
    }
    let load = bare::Load { workers: args.workers, clients: args.watchers, connections: args.connections };
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let bare = bare::measure(&arguments, load).await?;
    let expected = expected::masks(&dense, &args.recipe(), &scores)?;
    let shared = Shared::new(dense.clone(), args.workers, scores, expected, args.pace())?;
    let (process, endpoint) = Process::coordinator(folder.path())?;
    let under_load = run(&args, &shared, &process, &endpoint, folder.path()).await?;
    println!("{}", figures(&args, &dense, &shared, &bare, &under_load));
    let quarters = under_load.memory_by_quarters();
    ensure!(
        !args.flat || quarters[3] <= quarters[1] + quarters[1] / 10,
        "the coordinator's memory is not flat: {quarters:?} bytes by quarters of the time"
    );
    Ok(())
}

/// What was seen while the run was under way.
struct UnderLoad {
    decisions: usize,
    wall: Duration,
    watched: Watched,
    /// Before the run, and twice a second while it was under way.
    memory_before: u64,
    memory: Vec<u64>,
    processor: Duration,
    get_run: Sorted,
    /// Before the run.
    renew: Sorted,
    renewals_a_second: f64,
}

impl UnderLoad {
    /// The median of each quarter of the time.
    fn memory_by_quarters(&self) -> [u64; 4] {
        let place = |quarter: usize| quarter * self.memory.len() / 4;
        [0, 1, 2, 3].map(|quarter| {
            let mut part = self.memory[place(quarter)..place(quarter + 1)].to_vec();
            part.sort_unstable();
            part.get(part.len() / 2).copied().unwrap_or(self.memory_before)
        })
    }
}

async fn run(
    args: &Args,
    shared: &Arc<Shared>,
    process: &Process,
    endpoint: &str,
    root: &Path,
) -> anyhow::Result<UnderLoad> {
    let (renew, renewals_a_second) = renewals(endpoint).await?;
    let memory_before = process.resident_bytes()?;
    let mut runs = run_client(connected_channel(endpoint).await?);
    // Its clients are there before its workers, so that they see it from the first step on.
    let (id, decisions) = create(&mut runs, root, args).await?;
    let plan = Plan {
        endpoint: endpoint.to_owned(),
        run_id: id.clone(),
        steps: args.steps,
        clients: args.watchers,
        connections: args.connections,
        cut_every: args.cut_every,
    };
    let watchers = Watchers::start(&plan).await?;
    let (started, processor) = (Instant::now(), process.processor_time()?);
    let mut workers = JoinSet::new();
    for worker in 0..args.workers {
        Simulated::start(shared.clone(), endpoint, format!("w{worker}"), &mut workers).await?;
    }
    let (memory, get_run) = look(&mut runs, &id, process).await?;
    let watched = watchers.end().await?;
    let wall = started.elapsed();
    let run =
        runs.get_run(within(CALL, pb::GetRunRequest { id })).await?.into_inner().run.unwrap_or_default();
    ensure!(watched.clients == args.watchers, "{} clients came to an end", watched.clients);
    ensure!(
        watched.events == run.revision,
        "clients have seen {} of {} events",
        watched.events,
        run.revision
    );
    ensure!(run.restarts == 0, "the run had to go back {} times", run.restarts);
    ensure!(shared.decided().last.len() == decisions, "not all of {decisions} masks came to all ranks");
    Ok(UnderLoad {
        decisions,
        wall,
        watched,
        memory_before,
        memory,
        processor: process.processor_time()? - processor,
        get_run,
        renew,
        renewals_a_second,
    })
}

/// The coordinator's smallest call, on a worker of its own.
async fn renewals(endpoint: &str) -> anyhow::Result<(Sorted, f64)> {
    let mut client = registry_client(connected_channel(endpoint).await?);
    let info = pb::WorkerInfo {
        // Gone before the run asks for workers.
        id: "z".to_owned(),
        endpoint: "http://127.0.0.1:1".to_owned(),
        device: "none".to_owned(),
        incarnation: "z".to_owned(),
        ..Default::default()
    };
    let lease = client.register(within(CALL, pb::RegisterRequest { info: Some(info) })).await?.into_inner();
    let renew = {
        let (client, lease_id) = (client.clone(), lease.lease_id.clone());
        move || {
            let (mut client, lease_id) = (client.clone(), lease_id.clone());
            async move {
                let request = pb::RenewRequest { lease_id, ..Default::default() };
                client.renew(within(CALL, request)).await.map(drop)
            }
        }
    };
    let measured = (bare::latency(&renew).await?, bare::rate(renew).await?);
    client.deregister(within(CALL, pb::DeregisterRequest { lease_id: lease.lease_id })).await?;
    Ok(measured)
}

/// A run that waits for its workers, and how many masks it will decide.
async fn create(runs: &mut RunClient, root: &Path, args: &Args) -> anyhow::Result<(String, usize)> {
    let path = |name: &str| root.join(name).to_string_lossy().into_owned();
    let spec = pb::RunSpec {
        model: path("model"),
        training_data: vec![pb::TextSource { path: path("text.txt"), ..Default::default() }],
        recipe: Some(wire::convert::recipe::to_pb(&args.recipe())),
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
async fn look(runs: &mut RunClient, id: &str, process: &Process) -> anyhow::Result<(Vec<u64>, Sorted)> {
    let (mut memory, mut asked) = (Vec::new(), Vec::new());
    loop {
        memory.push(process.resident_bytes()?);
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

fn figures(
    args: &Args,
    dense: &ModelSpec,
    shared: &Shared,
    bare: &Bare,
    load: &UnderLoad,
) -> serde_json::Value {
    let decided = shared.decided();
    let seconds = load.wall.as_secs_f64();
    let latency = |sorted: &Sorted| {
        let [median, most, longest] = [0.5, 0.99, 1.0].map(|share| sorted.quantile(share).as_secs_f64());
        json!({"count": sorted.len(), "median": median, "p99": most, "longest": longest})
    };
    json!({
        "layers": dense.layers.len(),
        "channels": dense.layers.first().map_or(0, |layer| layer.intermediate_size),
        "workers": args.workers,
        "steps": args.steps,
        "decisions": load.decisions,
        "wall_s": seconds,
        "steps_a_second": args.steps as f64 / seconds,
        "decisions_a_second": load.decisions.saturating_sub(1) as f64 / decided.span.as_secs_f64(),
        "score_bytes_a_second": decided.score_bytes as f64 / seconds,
        "first_mask_s": latency(&decided.first),
        "last_mask_s": latency(&decided.last),
        "clients": load.watched.clients,
        "connections": args.connections,
        "events": load.watched.events,
        "cut_streams": load.watched.cut_streams,
        "cut_connections": load.watched.cut_connections,
        "events_a_second": load.watched.events as f64 * load.watched.clients as f64 / seconds,
        "event_s": latency(&load.watched.delays),
        "get_run_s": latency(&load.get_run),
        "renew_s": latency(&load.renew),
        "renewals_a_second": load.renewals_a_second,
        "processor_s": load.processor.as_secs_f64(),
        "memory_before_bytes": load.memory_before,
        "memory_quarters_bytes": load.memory_by_quarters(),
        "memory_most_bytes": load.memory.iter().max(),
        "bare_call_s": latency(&bare.latency),
        "bare_calls_a_second": bare.calls_a_second,
        "bare_messages_a_second": bare.messages_a_second,
        "bare_steps_a_second": bare.steps_a_second,
    })
}
