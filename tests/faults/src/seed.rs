//! One seed from start to end: a cluster, a run, its faults, and the judgement.

use crate::cluster::Cluster;
use crate::figures::{Figures, Measured};
use crate::history::{Outcome, check_events};
use crate::proxy::Link;
use crate::script::{Fault, Planned, STEPS, Script, WORKERS, When};
use crate::stuck::hold_device_threads;
use crate::watcher::{Seen, follow};
use processes_tests::fixture;
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};
use tokio::sync::watch;
use wire::client::{RunClient, connected_channel, run_client, within};
use wire::convert::time::time_from_pb;
use wire::pb::{self, RunState, run_event::Kind};

/// Longest that a run may take, all its faults included.
const PATIENCE: Duration = Duration::from_secs(240);
const START: Duration = Duration::from_secs(60);
const CALL: Duration = Duration::from_secs(10);
const POLL: Duration = Duration::from_millis(50);
const REQUEST_ID: &str = "the one run of this seed";
/// Lines of each log that a failure shows.
const LOG_LINES: usize = 30;

/// A seed that went well.
#[derive(Debug)]
pub struct Report {
    measured: Vec<Measured>,
    /// Why the run began anew, each time that it did.
    pub restarts: Vec<String>,
    pub events: usize,
    pub took: Duration,
}

/// A seed that did not: its script, what is wrong, what the processes said, and how to see it again.
#[derive(Debug)]
pub struct Failure {
    script: Script,
    complaints: Vec<String>,
    events: Vec<String>,
    logs: String,
}

impl Report {
    /// How long the first fault went unnoticed.
    #[must_use]
    pub fn detected(&self) -> Option<Duration> {
        self.measured.first().and_then(|measured| measured.detected)
    }

    /// Adds this seed's times.
    pub fn add_to(&self, figures: &mut Figures) {
        figures.extend(self.measured.iter().copied());
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { script, complaints, events, logs } = self;
        write!(f, "{script}")?;
        for complaint in complaints {
            writeln!(f, "  WRONG: {complaint}")?;
        }
        writeln!(f, "events:\n  {}", events.join("\n  "))?;
        writeln!(f, "{logs}replay: FAULT_SEEDS={} cargo test -p fault-tests -- --nocapture", script.seed)
    }
}

/// A fault that has been done.
struct Done {
    kind: usize,
    at: SystemTime,
    /// From when on the run can go on at all.
    possible: SystemTime,
}

/// What the run comes to when nobody disturbs it.
///
/// # Errors
/// When it does not succeed even then.
pub async fn undisturbed() -> Result<Outcome, Box<Failure>> {
    let (outcome, _) = perform(&Script::undisturbed(), None).await?;
    Ok(outcome)
}

/// Plays a script, and holds what comes of it against the undisturbed run.
///
/// # Errors
/// When anything is not as it should be.
pub async fn play(script: &Script, reference: &Outcome) -> Result<Report, Box<Failure>> {
    let (_, report) = perform(script, Some(reference)).await?;
    Ok(report)
}

async fn perform(script: &Script, reference: Option<&Outcome>) -> Result<(Outcome, Report), Box<Failure>> {
    let started = Instant::now();
    let failure = |complaints: Vec<String>, events: &[pb::RunEvent], logs: String| {
        let events = events.iter().map(shown).collect();
        Box::new(Failure { script: script.clone(), complaints, events, logs })
    };
    let cluster = match Cluster::start(script).await {
        Ok(cluster) => cluster,
        Err(error) => return Err(failure(vec![format!("no cluster: {error}")], &[], String::new())),
    };
    let mut events = Vec::new();
    let judged = judge(&cluster, script, &mut events).await;
    cluster.stop_all().await;
    let mut complaints = cluster.take_complaints();
    let judged = match judged {
        Ok((outcome, done)) => {
            if let Some(reference) = reference {
                complaints.extend(outcome.differences(reference));
            }
            Some((outcome, done))
        }
        Err(complaint) => {
            complaints.push(complaint);
            None
        }
    };
    match judged {
        Some((outcome, done)) if complaints.is_empty() => {
            let measured = measure(&events, &done);
            let cause = |event: &pb::RunEvent| match &event.kind {
                Some(Kind::Restart(restart)) => Some(restart.cause.clone()),
                _ => None,
            };
            let restarts = events.iter().filter_map(cause).collect();
            Ok((outcome, Report { measured, restarts, events: events.len(), took: started.elapsed() }))
        }
        Some(_) | None => Err(failure(complaints, &events, cluster.logs(LOG_LINES))),
    }
}

/// Creates the run, breaks what is to be broken, and checks all that can be asked of the coordinator.
async fn judge(
    cluster: &Arc<Cluster>,
    script: &Script,
    events: &mut Vec<pb::RunEvent>,
) -> Result<(Outcome, Vec<Done>), String> {
    until_workers(cluster).await?;
    let id = create(cluster).await?.id;
    let (seen, watching) = watch::channel(Seen::default());
    let breaking = tokio::spawn(break_things(cluster.clone(), script.faults.clone(), watching));
    let following =
        async { tokio::time::timeout(PATIENCE, follow(cluster.url(), id.clone(), &seen, events)).await };
    let supervising = async {
        while !cluster.supervise().await {
            tokio::time::sleep(POLL).await;
        }
    };
    let followed = tokio::select! {
        followed = following => followed,
        () = supervising => Ok(Err("the run was given up".to_owned())),
    };
    let followed = match followed {
        Ok(followed) => followed,
        Err(_) => Err(format!("the run has not ended after {PATIENCE:?}")),
    };
    // The faults that wait for a point of the run need wait no more.
    seen.send_modify(|seen| seen.ended = true);
    let done = breaking.await.map_err(|error| format!("the faults were not all done: {error}"))?;
    followed?;
    // Whoever was asked to end has ended, and has been started again.
    check_events(events).into_iter().for_each(|complaint| cluster.complain(complaint));
    let mut client = client(cluster).await?;
    let again = reread(&mut client, &id).await?;
    if again != *events {
        cluster.complain(format!(
            "{} events were seen, and others or {} read again",
            events.len(),
            again.len()
        ));
    }
    let repeated = create(cluster).await?;
    if repeated.id != id {
        cluster.complain(format!("the request was forgotten: it made `{}` after `{id}`", repeated.id));
    }
    if repeated.state() != RunState::Succeeded {
        cluster.complain(format!("the run is {:?}: {}", repeated.state(), repeated.status_message));
    }
    let outcome = Outcome::read(client, &id, events).await?;
    Ok((outcome, done))
}

async fn client(cluster: &Cluster) -> Result<RunClient, String> {
    let end = Instant::now() + START;
    loop {
        match connected_channel(&cluster.url()).await {
            Ok(channel) => return Ok(run_client(channel)),
            Err(error) if Instant::now() >= end => return Err(error.to_string()),
            Err(_) => tokio::time::sleep(POLL).await,
        }
    }
}

/// Waits until all workers are registered, so that each seed begins with the same group.
async fn until_workers(cluster: &Cluster) -> Result<(), String> {
    let end = Instant::now() + START;
    loop {
        if let Ok(channel) = connected_channel(&cluster.url()).await {
            let request = within(CALL, pb::ListWorkersRequest {});
            let listed = wire::client::registry_client(channel).list_workers(request).await;
            if listed.is_ok_and(|listed| listed.get_ref().workers.len() == WORKERS) {
                return Ok(());
            }
        }
        if Instant::now() >= end {
            return Err(format!("the workers have not registered within {START:?}"));
        }
        tokio::time::sleep(POLL).await;
    }
}

/// Creates the run, or finds it again: the request bears a name.
async fn create(cluster: &Cluster) -> Result<pb::Run, String> {
    let message = pb::CreateRunRequest {
        spec: Some(spec(cluster)),
        validate_only: false,
        request_id: REQUEST_ID.to_owned(),
    };
    let created = client(cluster).await?.create_run(within(CALL, message)).await;
    let created = created.map_err(|status| wire::status::describe(&status))?;
    created.into_inner().run.ok_or_else(|| "CreateRun returned no run".to_owned())
}

fn spec(cluster: &Cluster) -> pb::RunSpec {
    let text = |name: &str| pb::TextSource {
        path: fixture(&format!("text/{name}")).to_string_lossy().into_owned(),
        ..Default::default()
    };
    pb::RunSpec {
        model: fixture("models/gqa").to_string_lossy().into_owned(),
        training_data: vec![text("tiny.txt")],
        recipe: Some(pb::Recipe {
            steps: Some(STEPS),
            batch: Some(pb::Batch { window_tokens: Some(64), rows: Some(4), micro_batches: Some(2) }),
            pruning: Some(pb::Pruning {
                ramp: Some(pb::Ramp { warmup: Some(0.1), cooldown: Some(0.3), every: Some(3), shape: None }),
                compensation: Some(pb::pruning::Compensation::LeastSquares(pb::LeastSquares {
                    windows: Some(4),
                    ..Default::default()
                })),
                ..Default::default()
            }),
            ..Default::default()
        }),
        tp_degree: Some(2),
        evaluation: Some(pb::EvaluationSpec {
            sources: vec![text("held_out.txt")],
            window_tokens: Some(64),
            ..Default::default()
        }),
        export: Some(pb::ExportSpec {
            path: cluster.out(),
            dtype: Some(pb::ExportDtype::F32.into()),
            ..Default::default()
        }),
        durability: Some(pb::DurabilitySpec {
            checkpoint_every_steps: Some(2),
            max_restarts: Some(12),
            ..Default::default()
        }),
        ..Default::default()
    }
}

/// All events of a run that has ended.
async fn reread(client: &mut RunClient, id: &str) -> Result<Vec<pb::RunEvent>, String> {
    let request = pb::WatchRunRequest { id: id.to_owned(), after_revision: 0 };
    let reading = async {
        let mut stream = client.watch_run(request).await?.into_inner();
        let mut events = Vec::new();
        while let Some(message) = stream.message().await? {
            events.extend(message.event);
        }
        Ok::<_, tonic::Status>(events)
    };
    match tokio::time::timeout(CALL, reading).await {
        Ok(events) => events.map_err(|status| format!("the events cannot be read again: {status}")),
        Err(_) => Err(format!("reading the events of an ended run takes longer than {CALL:?}")),
    }
}

/// Does all faults in order. The next may come while the last is not healed yet.
async fn break_things(
    cluster: Arc<Cluster>,
    faults: Vec<Planned>,
    mut seen: watch::Receiver<Seen>,
) -> Vec<Done> {
    let mut healing = Vec::new();
    for Planned { when, delay, fault } in faults {
        let reached = |seen: &Seen| {
            seen.ended
                || match when {
                    When::Created => true,
                    When::Step(step) => seen.last_step >= Some(step),
                    When::Exporting => seen.exporting,
                }
        };
        // The sender outlives this.
        let _ = seen.wait_for(reached).await;
        tokio::time::sleep(delay).await;
        healing.push(tokio::spawn(do_fault(cluster.clone(), fault)));
    }
    let mut done = Vec::new();
    for healed in healing {
        match healed.await {
            Ok(fault) => done.extend(fault),
            Err(error) => cluster.complain(format!("a fault was not done: {error}")),
        }
    }
    done
}

/// Breaks something and mends it again. Nothing when what is to be broken is down already.
async fn do_fault(cluster: Arc<Cluster>, fault: Fault) -> Option<Done> {
    let kind = fault.kind();
    let at = SystemTime::now();
    let mut possible = at;
    match fault {
        Fault::KillWorker { worker, down } => {
            if !cluster.kill_worker(worker).await {
                return None;
            }
            tokio::time::sleep(down).await;
            cluster.start_worker(worker);
        }
        Fault::DrainWorker { worker, down } => {
            if !cluster.stop_worker(worker).await {
                return None;
            }
            tokio::time::sleep(down).await;
            cluster.start_worker(worker);
        }
        Fault::KillCoordinator { down } => {
            if !cluster.kill_coordinator().await {
                return None;
            }
            tokio::time::sleep(down).await;
            cluster.start_coordinator();
            possible = SystemTime::now();
        }
        Fault::StopCoordinator { down } => {
            if !cluster.stop_coordinator().await {
                return None;
            }
            tokio::time::sleep(down).await;
            cluster.start_coordinator();
            possible = SystemTime::now();
        }
        Fault::FreezeWorker { worker, lasts } => {
            let process = cluster.worker_process(worker)?;
            signal(process, libc::SIGSTOP);
            tokio::time::sleep(lasts).await;
            // Another fault may be waiting for its end, which comes only now.
            signal(process, libc::SIGCONT);
        }
        Fault::StickWorker { worker, lasts } => {
            let process = cluster.worker_process(worker)?;
            let held = tokio::task::spawn_blocking(move || hold_device_threads(process, lasts)).await;
            if !held.is_ok_and(|held| held) {
                return None;
            }
        }
        Fault::ResetLink { worker, lasts } => {
            cluster.set_links(worker, Link::Reset);
            tokio::time::sleep(lasts).await;
            cluster.set_links(worker, Link::Open);
        }
        Fault::SilenceLink { worker, lasts } => {
            cluster.set_links(worker, Link::Silent);
            tokio::time::sleep(lasts).await;
            cluster.set_links(worker, Link::Open);
        }
        Fault::SlowLink { worker, latency, lasts } => {
            cluster.set_links(worker, Link::Slow(latency));
            tokio::time::sleep(lasts).await;
            cluster.set_links(worker, Link::Open);
        }
        Fault::FailingStore { lasts } => {
            cluster.set_store_link(Link::Reset);
            tokio::time::sleep(lasts).await;
            cluster.set_store_link(Link::Open);
            possible = SystemTime::now();
        }
        Fault::SlowStore { latency, lasts } => {
            cluster.set_store_link(Link::Slow(latency));
            tokio::time::sleep(lasts).await;
            cluster.set_store_link(Link::Open);
        }
        Fault::FullDisk { lasts } => {
            fill_disk(cluster.coordinator_process()?, lasts).await;
            possible = SystemTime::now();
        }
        Fault::FullWorkerDisk { worker, lasts } => {
            fill_disk(cluster.worker_process(worker)?, lasts).await;
            possible = SystemTime::now();
        }
    }
    Some(Done { kind, at, possible })
}

fn signal(process: u32, signal: i32) {
    let process = i32::try_from(process).unwrap_or_default();
    // SAFETY: `kill` only sends a signal, to a child of ours.
    unsafe { libc::kill(process, signal) };
}

async fn fill_disk(process: u32, lasts: Duration) {
    limit_files(process, 0);
    tokio::time::sleep(lasts).await;
    limit_files(process, libc::RLIM_INFINITY);
}

/// Bounds the files that a process of ours may write. Writes beyond fail, as SIGXFSZ is ignored.
fn limit_files(process: u32, bytes: u64) {
    let limit = libc::rlimit { rlim_cur: bytes, rlim_max: libc::RLIM_INFINITY };
    let process = i32::try_from(process).unwrap_or_default();
    // SAFETY: the call reads one local; a process that has ended meanwhile is an error that changes nothing.
    unsafe { libc::prlimit(process, libc::RLIMIT_FSIZE, &limit, std::ptr::null_mut()) };
}

/// The times of each fault that no other came before or fell into.
fn measure(events: &[pb::RunEvent], done: &[Done]) -> Vec<Measured> {
    let time = |event: &pb::RunEvent| time_from_pb(event.time).unwrap_or(SystemTime::UNIX_EPOCH);
    let is_alone = |fault: &Done, end: SystemTime| {
        done.iter().filter(|other| !std::ptr::eq(*other, fault)).all(|other| other.at > end)
    };
    let measured = |fault: &Done| {
        let before = events.iter().take_while(|event| time(event) < fault.at);
        let last_step = before.filter_map(step).max();
        let after = || events.iter().filter(|event| time(event) >= fault.at);
        let noticed = after().find(|event| match &event.kind {
            Some(Kind::StateChange(change)) => change.state() == RunState::Recovering,
            Some(Kind::Restart(_)) => true,
            Some(
                Kind::Step(_)
                | Kind::Decision(_)
                | Kind::Evaluation(_)
                | Kind::Export(_)
                | Kind::Task(_)
                | Kind::Checkpoint(_)
                | Kind::Guard(_)
                | Kind::Calibration(_),
            )
            | None => false,
        });
        let since = |from: SystemTime, event: &pb::RunEvent| {
            is_alone(fault, time(event)).then(|| time(event).duration_since(from).unwrap_or_default())
        };
        let detected = noticed.and_then(|event| since(fault.at, event));
        let past = noticed.and_then(|noticed| {
            let mut later = after().filter(|event| event.revision > noticed.revision);
            later.find(|event| step(event) > last_step || matches!(event.kind, Some(Kind::Export(_))))
        });
        let recovered = past.and_then(|event| since(fault.possible, event));
        Measured { kind: fault.kind, detected, recovered }
    };
    done.iter().map(measured).collect()
}

fn step(event: &pb::RunEvent) -> Option<u64> {
    if let Some(Kind::Step(step)) = &event.kind { Some(step.step) } else { None }
}

fn shown(event: &pb::RunEvent) -> String {
    let time = time_from_pb(event.time).and_then(|time| time.duration_since(SystemTime::UNIX_EPOCH).ok());
    let seconds = time.unwrap_or_default().as_secs_f64() % 1000.0;
    let what = match &event.kind {
        Some(Kind::StateChange(change)) => format!("{:?}: {}", change.state(), change.message),
        Some(Kind::Step(step)) => format!("step {} under {}, loss {}", step.step, step.generation, step.loss),
        Some(Kind::Decision(decision)) => format!("decision {}", decision.generation),
        Some(Kind::Evaluation(measured)) => format!("{}: {}", measured.label, measured.perplexity),
        Some(Kind::Export(_)) => "export".to_owned(),
        Some(Kind::Task(task)) => format!("task {}", task.task),
        Some(Kind::Checkpoint(checkpoint)) => format!("checkpoint after {} steps", checkpoint.steps_done),
        Some(Kind::Restart(restart)) => format!("restart from step {}: {}", restart.next_step, restart.cause),
        Some(Kind::Guard(_) | Kind::Calibration(_)) => "guard".to_owned(),
        None => "nothing".to_owned(),
    };
    format!("{seconds:.3} {}: {what}", event.revision)
}
