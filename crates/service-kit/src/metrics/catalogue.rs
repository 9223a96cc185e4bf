//! Every metric there is. docs/telemetry.md is written from this list.

use super::{Kind, Metric};

macro_rules! catalogue {
    ($($constant:ident: $kind:ident $name:literal [$unit:literal] ($($attribute:literal),*) $says:literal;)*) => {
        $(pub const $constant: Metric = Metric {
            name: $name,
            kind: Kind::$kind,
            unit: $unit,
            attributes: &[$($attribute),*],
            says: $says,
        };)*

        /// All of them, in the order of the document.
        pub const ALL: &[Metric] = &[$($constant),*];
    };
}

catalogue! {
    RPC_DURATION: Histogram "rpc.server.call.duration" ["s"] ("rpc.method", "rpc.response.status_code")
        "Calls answered, from their first byte to their status; a stream counts when it ends. Of both processes";
    RUNS: Gauge "espalier.runs" ["{run}"] ("state")
        "Runs that the coordinator knows, by state";
    QUEUE: Gauge "espalier.queue.runs" ["{run}"] ()
        "Runs that wait for workers";
    WORKERS: Gauge "espalier.workers" ["{worker}"] ("state")
        "Workers that are registered: idle, busy, draining or stuck";
    LEASE_AGE: Gauge "espalier.worker.lease.age" ["s"] ("worker_id")
        "Time since a worker last renewed its lease";
    RUN_STEP: Gauge "espalier.run.step" ["{step}"] ("run_id")
        "Optimizer steps that a run under way has taken";
    RUN_LOSS: Gauge "espalier.run.loss" ["nat"] ("run_id")
        "Loss of its last step";
    RUN_SPARSITY: Gauge "espalier.run.sparsity" ["1"] ("run_id")
        "Share of its projection weights that is gone";
    RUN_KEPT: Gauge "espalier.run.kept" ["{group}"] ("run_id", "layer", "kind")
        "Query heads, key-value heads and channels that each layer keeps";
    RUN_MEMORY: Gauge "espalier.run.memory" ["By"] ("run_id")
        "Memory of its fullest rank after its last step";
    RUN_FLOP_RATE: Gauge "espalier.run.flops" ["{flop}/s"] ("run_id")
        "Floating-point operations a second of its last step, all ranks together, by the planner's count";
    RUN_UTILIZATION: Gauge "espalier.run.flop.utilization" ["1"] ("run_id")
        "The same as a share of what its workers' devices do at their peak, where all of them say it (`--peak-flops`)";
    RUN_CHECKPOINT_AGE: Gauge "espalier.run.checkpoint.age" ["s"] ("run_id")
        "Time since its last complete checkpoint";
    STEP_DURATION: Histogram "espalier.step.duration" ["s"] ("run_id")
        "Optimizer steps, of the slowest rank";
    STEP_SCORE_DURATION: Histogram "espalier.step.score.duration" ["s"] ("run_id")
        "The part of a step that is spent on scores";
    STEP_TOKENS: Counter "espalier.step.tokens" ["{token}"] ("run_id")
        "Tokens that steps have read";
    STEPS_SKIPPED: Counter "espalier.steps.skipped" ["{step}"] ("run_id")
        "Steps that the optimizer left out, as for a loss that is no number";
    SCORE_BYTES: Counter "espalier.scores.received" ["By"] ("run_id")
        "Scores that the workers have streamed";
    DECISION_DURATION: Histogram "espalier.decision.duration" ["s"] ("run_id")
        "From the last rank's report to the mask at the last rank";
    CHECKPOINT_DURATION: Histogram "espalier.checkpoint.duration" ["s"] ("run_id")
        "Checkpoints, from the copy aside to the manifest; training goes on meanwhile";
    CHECKPOINT_BYTES: Counter "espalier.checkpoint.written" ["By"] ("run_id")
        "Bytes of complete checkpoints";
    EVALUATION_DURATION: Histogram "espalier.evaluation.duration" ["s"] ("run_id")
        "Perplexities and tasks";
    RESTARTS: Counter "espalier.run.restarts" ["{restart}"] ("run_id")
        "Times that a run went back to a checkpoint";
    WORKER_STEPS: Counter "espalier.worker.steps" ["{step}"] ()
        "Optimizer steps that this worker has ended";
    WORKER_MEMORY: Gauge "espalier.worker.memory" ["By"] ("state")
        "Memory of this worker: resident of the process, and of the device as its session says";
    WORKER_COLLECTIVES: Counter "espalier.worker.collectives" ["{collective}"] ()
        "Collectives that this worker's session has ended";
    WORKER_COLLECTIVE_TIME: Counter "espalier.worker.collective.time" ["s"] ()
        "Time that this worker's session has spent in collectives, waiting for peers included";
    WORKER_SESSION: Gauge "espalier.worker.session" ["{session}"] ()
        "1 while this worker holds a session";
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_used_once_and_prometheus_takes_them() {
        let mut names: Vec<String> = ALL.iter().map(Metric::prometheus_name).collect();
        for name in &names {
            assert!(name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_'), "{name}");
        }
        names.sort();
        names.dedup();
        assert_eq!(names.len(), ALL.len());
    }
}
