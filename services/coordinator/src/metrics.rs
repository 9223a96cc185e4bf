//! What the coordinator measures: run events as they are stored, and how things stand when somebody looks.

use crate::context::Context;
use crate::run_book::{RunRecord, Shown};
use opentelemetry::KeyValue;
use opentelemetry::metrics::{AsyncInstrument, Counter, Histogram};
use pruning_run::{RunEvent, RunEventKind, RunId, RunState};
use service_kit::metrics::Metric;
use service_kit::metrics::catalogue as names;
use std::collections::BTreeMap;
use std::sync::{Arc, LazyLock, Weak};
use std::time::{Duration, SystemTime};

/// Instruments that run events are counted on.
struct Instruments {
    step: Histogram<f64>,
    score: Histogram<f64>,
    tokens: Counter<u64>,
    skipped: Counter<u64>,
    score_bytes: Counter<u64>,
    decision: Histogram<f64>,
    checkpoint: Histogram<f64>,
    checkpoint_bytes: Counter<u64>,
    evaluation: Histogram<f64>,
    restarts: Counter<u64>,
}

/// Made when the first is used, after the process has set up its telemetry.
static INSTRUMENTS: LazyLock<Instruments> = LazyLock::new(|| Instruments {
    step: names::STEP_DURATION.histogram(),
    score: names::STEP_SCORE_DURATION.histogram(),
    tokens: names::STEP_TOKENS.counter(),
    skipped: names::STEPS_SKIPPED.counter(),
    score_bytes: names::SCORE_BYTES.counter(),
    decision: names::DECISION_DURATION.histogram(),
    checkpoint: names::CHECKPOINT_DURATION.histogram(),
    checkpoint_bytes: names::CHECKPOINT_BYTES.counter(),
    evaluation: names::EVALUATION_DURATION.histogram(),
    restarts: names::RESTARTS.counter(),
});

fn of_run(run_id: &RunId) -> [KeyValue; 1] {
    [KeyValue::new("run_id", run_id.0.clone())]
}

/// Counts an event that has just been stored.
pub(crate) fn note(run_id: &RunId, event: &RunEvent) {
    let (made, run) = (&*INSTRUMENTS, of_run(run_id));
    match &event.kind {
        RunEventKind::Step(report) => {
            made.step.record(report.duration.as_secs_f64(), &run);
            made.score.record(report.score_duration.as_secs_f64(), &run);
            made.tokens.add(report.tokens, &run);
            if !report.skipped.is_empty() {
                made.skipped.add(1, &run);
            }
        }
        RunEventKind::Checkpoint(checkpoint) => {
            made.checkpoint.record(checkpoint.duration.as_secs_f64(), &run);
            made.checkpoint_bytes.add(checkpoint.size_bytes, &run);
        }
        RunEventKind::Evaluation(measured) => made.evaluation.record(measured.duration.as_secs_f64(), &run),
        RunEventKind::Task(measured) => made.evaluation.record(measured.duration.as_secs_f64(), &run),
        RunEventKind::Restart(_) => made.restarts.add(1, &run),
        RunEventKind::StateChange { .. }
        | RunEventKind::Decision(_)
        | RunEventKind::Export(_)
        | RunEventKind::Guard(_)
        | RunEventKind::Calibration(_) => {}
    }
}

/// Counts scores that have arrived.
pub(crate) fn note_scores(run_id: &RunId, bytes: usize) {
    INSTRUMENTS.score_bytes.add(bytes as u64, &of_run(run_id));
}

/// Counts a decision, from the last rank's report to the mask at the last rank.
pub(crate) fn note_decision(run_id: &RunId, took: Duration) {
    INSTRUMENTS.decision.record(took.as_secs_f64(), &of_run(run_id));
}

/// Shows how things stand to whoever looks, as long as `context` lives.
pub(crate) fn show(context: &Arc<Context>) {
    observe(context, names::RUNS, |context, observer| {
        let runs: Vec<RunState> = context.book.all().iter().map(|run| run.state()).collect();
        for (state, name) in STATES {
            let count = runs.iter().filter(|other| **other == state).count();
            observer.observe(count as f64, &[KeyValue::new("state", name)]);
        }
    });
    observe(context, names::QUEUE, |context, observer| {
        let waiting = context.registry.waiting();
        observer.observe(waiting as f64, &[]);
    });
    observe(context, names::WORKERS, |context, observer| {
        let mut counts: BTreeMap<&'static str, u32> =
            ["idle", "busy", "draining", "stuck"].map(|state| (state, 0)).into();
        for (_, state, _) in context.registry.census() {
            *counts.entry(state).or_default() += 1;
        }
        for (state, count) in counts {
            observer.observe(f64::from(count), &[KeyValue::new("state", state)]);
        }
    });
    observe(context, names::LEASE_AGE, |context, observer| {
        for (id, _, age) in context.registry.census() {
            observer.observe(age.as_secs_f64(), &[KeyValue::new("worker_id", id)]);
        }
    });
    let step = |shown: &Shown| shown.last_step.clone();
    observe_runs(context, names::RUN_STEP, move |_, shown| step(shown).map(|step| step.step as f64 + 1.0));
    observe_runs(context, names::RUN_LOSS, move |_, shown| step(shown).map(|step| step.loss));
    observe_runs(context, names::RUN_SPARSITY, move |_, shown| step(shown).map(|step| step.sparsity));
    observe_runs(context, names::RUN_MEMORY, move |_, shown| {
        step(shown).map(|step| step.memory_bytes as f64)
    });
    observe_runs(context, names::RUN_FLOP_RATE, flop_rate);
    let registry = context.registry.clone();
    observe_runs(context, names::RUN_UTILIZATION, move |run, shown| {
        Some(flop_rate(run, shown)? / registry.peak_flops(&shown.worker_ids)?)
    });
    observe_runs(context, names::RUN_CHECKPOINT_AGE, |_, shown| {
        let age = SystemTime::now().duration_since(shown.checkpoint_time?).unwrap_or_default();
        Some(age.as_secs_f64())
    });
    observe(context, names::RUN_KEPT, |context, observer| {
        for run in under_way(context) {
            let shown = run.shown();
            let widths = shown.decisions.last().map_or(&run.setup.dense().layers, |last| &last.widths);
            for (layer, kept) in widths.iter().enumerate() {
                for (kind, count) in [
                    ("query_heads", kept.query_head_count),
                    ("kv_heads", kept.kv_head_count),
                    ("channels", kept.intermediate_size),
                ] {
                    let attributes = [
                        KeyValue::new("run_id", run.id.0.clone()),
                        KeyValue::new("layer", layer as i64),
                        KeyValue::new("kind", kind),
                    ];
                    observer.observe(count as f64, &attributes);
                }
            }
        }
    });
}

fn observe(
    context: &Arc<Context>,
    metric: Metric,
    read: impl Fn(&Context, &dyn AsyncInstrument<f64>) + Send + Sync + 'static,
) {
    let context: Weak<Context> = Arc::downgrade(context);
    metric.observe(move |observer| {
        if let Some(context) = context.upgrade() {
            read(&context, observer);
        }
    });
}

/// One number of each run that has not ended, where there is one.
fn observe_runs(
    context: &Arc<Context>,
    metric: Metric,
    read: impl Fn(&RunRecord, &Shown) -> Option<f64> + Send + Sync + 'static,
) {
    observe(context, metric, move |context, observer| {
        for run in under_way(context) {
            if let Some(value) = read(&run, &run.shown()).filter(|value| value.is_finite()) {
                observer.observe(value, &of_run(&run.id));
            }
        }
    });
}

fn under_way(context: &Context) -> Vec<Arc<RunRecord>> {
    context.book.all().into_iter().filter(|run| !run.state().has_ended()).collect()
}

/// By the planner's work of a step, which shrinks in proportion to what is gone.
fn flop_rate(run: &RunRecord, shown: &Shown) -> Option<f64> {
    let (estimate, step) = (run.plan.estimate.as_ref()?, shown.last_step.as_ref()?);
    let work = |step: &Option<wire::pb::StepEstimate>| {
        let step = step.as_ref()?;
        Some(step.forward_operations + step.backward_operations + step.score_operations)
    };
    let (first, last) = (work(&estimate.first_step)?, work(&estimate.last_step)?);
    let gone = if run.plan.sparsity > 0.0 { (step.sparsity / run.plan.sparsity).min(1.0) } else { 0.0 };
    let seconds = step.duration.as_secs_f64();
    let of_a_rank = first + gone * (last - first);
    (seconds > 0.0).then(|| of_a_rank * f64::from(estimate.tp_degree) / seconds)
}

/// Each state with its name.
const STATES: [(RunState, &str); 11] = [
    (RunState::Queued, "queued"),
    (RunState::Starting, "starting"),
    (RunState::Running, "running"),
    (RunState::Pausing, "pausing"),
    (RunState::Paused, "paused"),
    (RunState::Recovering, "recovering"),
    (RunState::Exporting, "exporting"),
    (RunState::Cancelling, "cancelling"),
    (RunState::Succeeded, "succeeded"),
    (RunState::Failed, "failed"),
    (RunState::Cancelled, "cancelled"),
];
