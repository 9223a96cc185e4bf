//! Runs that end badly, and say whose fault it was.

use cluster_tests::{Cluster, LEASE_SECONDS, toy};
use engine::toy::ToyFault;
use engine::{
    Engine, EngineError, ExportJob, ExportWritten, MaskApplied, NllSum, Prompt, Rendezvous, ShardEngine,
    ShardSetup, Snapshot, StepOutcome,
};
use pruning::KeepMask;
use std::sync::Arc;
use std::time::{Duration, Instant};
use wire::pb::RunState;

/// Changes a step's outcome.
type Tamper = fn(u64, &mut StepOutcome);

/// The toy engine with one step's outcome changed.
struct Tampered(Tamper);

struct TamperedShard(Box<dyn ShardEngine>, Tamper);

impl Engine for Tampered {
    fn load(&self, setup: ShardSetup) -> Result<Box<dyn ShardEngine>, EngineError> {
        Ok(Box::new(TamperedShard(toy().load(setup)?, self.0)))
    }

    fn export(&self, job: &ExportJob) -> Result<ExportWritten, EngineError> {
        toy().export(job)
    }
}

impl ShardEngine for TamperedShard {
    fn open_rendezvous(&mut self, host: &str) -> Result<Rendezvous, EngineError> {
        self.0.open_rendezvous(host)
    }

    fn join_group(&mut self, rendezvous: &Rendezvous, host: &str) -> Result<(), EngineError> {
        self.0.join_group(rendezvous, host)
    }

    fn teach(&mut self, rows: &[&[u32]]) -> Result<(), EngineError> {
        self.0.teach(rows)
    }

    fn train_step(&mut self, step: u64, micro_batches: &[Vec<&[u32]>]) -> Result<StepOutcome, EngineError> {
        let mut outcome = self.0.train_step(step, micro_batches)?;
        self.1(step, &mut outcome);
        Ok(outcome)
    }

    fn calibrate(
        &mut self,
        rows: &[&[u32]],
        report: &mut engine::Report<'_>,
    ) -> Result<engine::Calibration, EngineError> {
        self.0.calibrate(rows, report)
    }

    fn apply_mask(
        &mut self,
        generation: u64,
        keep_mask: &KeepMask,
        calibration: &[&[u32]],
    ) -> Result<MaskApplied, EngineError> {
        self.0.apply_mask(generation, keep_mask, calibration)
    }

    fn evaluate(&mut self, rows: &[&[u32]], rows_per_pass: usize) -> Result<NllSum, EngineError> {
        self.0.evaluate(rows, rows_per_pass)
    }

    fn continuation_log_likelihoods(&mut self, prompts: &[Prompt<'_>]) -> Result<Vec<Vec<f64>>, EngineError> {
        self.0.continuation_log_likelihoods(prompts)
    }

    fn snapshot(&mut self, prompts: &[Vec<u32>]) -> Result<Box<dyn Snapshot>, EngineError> {
        self.0.snapshot(prompts)
    }

    fn memory_bytes(&self) -> u64 {
        self.0.memory_bytes()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_worker_gets_wrong_fails_the_run_by_name() {
    let at_step_3 = |fault| Arc::new(toy().with_fault(3, fault)) as Arc<dyn Engine>;
    for (engine, parts) in [
        (
            at_step_3(ToyFault::NotFinite),
            vec!["worker `w1` (rank 1)", "ranks diverged at step 3", "whether it counts"],
        ),
        (at_step_3(ToyFault::DeviceFailed), vec!["worker `w1` (rank 1)", "the toy device has failed"]),
        (at_step_3(ToyFault::Panic), vec!["worker `w1` (rank 1)", "panics at step 3"]),
        (
            Arc::new(Tampered(|step, outcome| {
                if step == 1 {
                    outcome.scores[11].values[2] = f64::NAN;
                }
            })),
            vec!["worker `w1` (rank 1)", "step 1", "layer 1 `gate_proj`: score of unit", "is NaN"],
        ),
        (
            Arc::new(Tampered(|step, outcome| {
                if step == 2 {
                    outcome.scores.remove(3);
                }
            })),
            vec!["step 2", "scores are missing", "layer 0 `o_proj`"],
        ),
        (
            Arc::new(Tampered(|step, outcome| {
                if step == 4 {
                    outcome.loss += 0.01;
                }
            })),
            vec!["ranks diverged at step 4", "worker `w1` (rank 1)"],
        ),
    ] {
        let mut cluster = Cluster::start().await;
        cluster.add_worker("w0", Arc::new(toy())).await;
        cluster.add_worker("w1", engine).await;
        let run = cluster.create(cluster.spec(2, "out")).await;
        let run = cluster.ended(&run.id).await;
        assert_eq!(run.state(), RunState::Failed);
        for part in parts {
            assert!(run.status_message.contains(part), "{part} in {}", run.status_message);
        }
        assert!(run.export_result.is_none());
        let free = |workers: &[wire::pb::Worker]| workers.iter().all(|worker| worker.run_id.is_empty());
        cluster.until_workers("the workers to be idle", free).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_dies_is_named_within_seconds_and_the_other_is_free_again() {
    let mut cluster = Cluster::start().await;
    let slow = Arc::new(toy().with_step_time(Duration::from_millis(20))) as Arc<dyn Engine>;
    cluster.add_workers(2, &slow).await;
    let mut spec = cluster.spec(2, "out");
    spec.recipe.as_mut().unwrap().steps = Some(10_000);
    let run = cluster.create(spec).await;
    cluster.until(&run.id, "a step", |run| run.last_step.is_some()).await;
    let started = Instant::now();
    cluster.kill("w1");
    let run = cluster.ended(&run.id).await;
    assert_eq!(run.state(), RunState::Failed);
    assert!(run.status_message.contains("worker `w1` (rank 1)"), "{}", run.status_message);
    assert!(started.elapsed() < Duration::from_secs(LEASE_SECONDS + 8), "{:?}", started.elapsed());
    cluster
        .until_workers("w1 to be gone and w0 idle", |workers| {
            workers.len() == 1 && workers[0].run_id.is_empty()
        })
        .await;
    let next = cluster.create(cluster.spec(1, "next")).await;
    let next = cluster.ended(&next.id).await;
    assert_eq!(next.state(), RunState::Succeeded, "{}", next.status_message);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_dead_worker_is_blamed_and_not_the_one_that_misses_it() {
    let mut cluster = Cluster::start().await;
    let slow = toy().with_step_time(Duration::from_millis(20));
    cluster.add_worker("w0", Arc::new(slow.clone().with_fault(30, ToyFault::PeerLost))).await;
    cluster.add_worker("w1", Arc::new(slow.with_step_time(Duration::from_millis(200)))).await;
    let mut spec = cluster.spec(2, "out");
    let recipe = spec.recipe.as_mut().unwrap();
    (recipe.steps, recipe.pruning) = (Some(10_000), None);
    let run = cluster.create(spec).await;
    cluster.until(&run.id, "a step", |run| run.last_step.is_some()).await;
    // Rank 0 complains at its step 30, while rank 1 lives; it dies before the grace is over.
    tokio::time::sleep(Duration::from_millis(1500)).await;
    assert_eq!(cluster.get(&run.id).await.state(), RunState::Running);
    cluster.kill("w1");
    let run = cluster.ended(&run.id).await;
    assert!(run.status_message.contains("worker `w1` (rank 1)"), "{}", run.status_message);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_silent_worker_fails_the_run_at_the_step_deadline() {
    let mut cluster = Cluster::start_with(|config| config.step_deadline_seconds = 1).await;
    let stuck = Arc::new(toy().with_step_time(Duration::from_secs(20))) as Arc<dyn Engine>;
    cluster.add_workers(1, &stuck).await;
    let run = cluster.create(cluster.spec(1, "out")).await;
    let run = cluster.ended(&run.id).await;
    assert_eq!(run.state(), RunState::Failed);
    for part in ["worker `w0` (rank 0)", "training step 0", "no sign of life from Train in 1 s"] {
        assert!(run.status_message.contains(part), "{}", run.status_message);
    }
}
