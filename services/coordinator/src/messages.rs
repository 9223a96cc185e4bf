//! Runs and their events as messages.

use crate::records::StoredEvent;
use crate::run_book::{RunRecord, ShownDecision};
use pruning_run::{
    Accuracy, Calibration, CalibrationFound, Checkpoint, Evaluation, ExportResult, Generation, GuardVerdict,
    RankReport, Restart, RunEventKind, RunState, StepReport, TaskResult, TaskScore,
};
use std::time::Duration;
use wire::convert::{mask, run, time};
use wire::pb;

pub(crate) fn run(record: &RunRecord) -> pb::Run {
    let shown = record.shown();
    pb::Run {
        id: record.id.0.clone(),
        spec: Some(run::to_pb(&record.spec)),
        state: state(shown.state).into(),
        generation: shown.generation.0,
        status_message: match shown.trouble {
            Some(trouble) => format!("{}; {trouble}", shown.message),
            None => shown.message,
        },
        create_time: Some(time::time_to_pb(record.create_time)),
        start_time: shown.start_time.map(time::time_to_pb),
        end_time: shown.end_time.map(time::time_to_pb),
        last_step: shown.last_step.as_ref().map(step),
        evaluations: shown.evaluations.iter().map(evaluation).collect(),
        export_result: shown.export.as_ref().map(export),
        plan: Some(record.plan.clone()),
        worker_ids: shown.worker_ids,
        // Each choice's log-likelihood is in the events alone: many runs are listed in one message.
        task_results: shown
            .tasks
            .iter()
            .map(|result| pb::TaskResult { log_likelihoods: Vec::new(), ..task(result) })
            .collect(),
        last_checkpoint: shown.checkpoint.as_ref().map(checkpoint),
        restarts: shown.restarts,
        forked_from: record
            .fork
            .as_ref()
            .map(|fork| pb::ForkOrigin { run_id: fork.run_id.0.clone(), generation: fork.generation.0 }),
        revision: shown.revision,
    }
}

pub(crate) fn event(stored: &StoredEvent) -> pb::RunEvent {
    use pb::run_event::Kind;
    let event = &stored.event;
    let kind = match &event.kind {
        RunEventKind::StateChange { state, message } => {
            Kind::StateChange(pb::StateChange { state: self::state(*state).into(), message: message.clone() })
        }
        RunEventKind::Step(report) => Kind::Step(step(report)),
        RunEventKind::Decision(decision) => Kind::Decision(pb::Decision {
            generation: decision.generation.0,
            step: decision.step,
            sparsity: decision.sparsity,
            parameters: decision.parameters,
            layers: stored.widths.iter().map(mask::widths_to_pb).collect(),
        }),
        RunEventKind::Evaluation(evaluation) => Kind::Evaluation(self::evaluation(evaluation)),
        RunEventKind::Task(result) => Kind::Task(task(result)),
        RunEventKind::Export(result) => Kind::Export(export(result)),
        RunEventKind::Checkpoint(done) => Kind::Checkpoint(checkpoint(done)),
        RunEventKind::Restart(restart) => Kind::Restart(self::restart(restart)),
        RunEventKind::Guard(verdict) => Kind::Guard(guard(verdict)),
        RunEventKind::Calibration(done) => Kind::Calibration(calibration(done)),
    };
    pb::RunEvent { revision: event.revision, time: Some(time::time_to_pb(event.time)), kind: Some(kind) }
}

fn checkpoint(done: &Checkpoint) -> pb::Checkpoint {
    pb::Checkpoint {
        steps_done: done.place.steps_done,
        generation: done.place.generation.0,
        size_bytes: done.size_bytes,
        duration: Some(time::duration_to_pb(done.duration)),
    }
}

fn restart(restart: &Restart) -> pb::Restart {
    pb::Restart {
        restarts: restart.restarts,
        next_step: restart.next_step,
        generation: restart.generation.0,
        cause: restart.cause.clone(),
        tp_degree: u32::try_from(restart.tp_degree).unwrap_or(u32::MAX),
    }
}

fn calibration(done: &Calibration) -> pb::Calibration {
    let narrow = |block: &usize| u32::try_from(*block).unwrap_or(u32::MAX);
    pb::Calibration {
        step: done.step,
        block_scores: done.found.block_scores.clone(),
        block_order: done.found.block_order.iter().map(narrow).collect(),
        duration: Some(time::duration_to_pb(done.duration)),
    }
}

/// What a worker has found.
pub(crate) fn calibration_found(message: pb::CalibrationResult) -> CalibrationFound {
    CalibrationFound {
        block_scores: message.block_scores,
        block_order: message.block_order.into_iter().map(|block| block as usize).collect(),
    }
}

fn guard(verdict: &GuardVerdict) -> pb::GuardVerdict {
    let action = verdict.action.map_or(pb::GuardAction::Unspecified, run::action_to_pb);
    pb::GuardVerdict {
        perplexity: verdict.perplexity,
        max_perplexity: verdict.max_perplexity,
        generation: verdict.generation.0,
        action: action.into(),
    }
}

pub(crate) fn state(state: RunState) -> pb::RunState {
    match state {
        RunState::Queued => pb::RunState::Queued,
        RunState::Starting => pb::RunState::Starting,
        RunState::Running => pb::RunState::Running,
        RunState::Exporting => pb::RunState::Exporting,
        RunState::Succeeded => pb::RunState::Succeeded,
        RunState::Failed => pb::RunState::Failed,
        RunState::Cancelled => pb::RunState::Cancelled,
        RunState::Pausing => pb::RunState::Pausing,
        RunState::Paused => pb::RunState::Paused,
        RunState::Recovering => pb::RunState::Recovering,
        RunState::Cancelling => pb::RunState::Cancelling,
    }
}

pub(crate) fn decision(decision: &ShownDecision) -> pb::Decision {
    pb::Decision {
        generation: decision.generation.0,
        step: decision.step,
        sparsity: decision.sparsity,
        parameters: decision.parameters,
        layers: decision.widths.iter().map(mask::widths_to_pb).collect(),
    }
}

pub(crate) fn evaluation(evaluation: &Evaluation) -> pb::Evaluation {
    pb::Evaluation {
        label: evaluation.label.clone(),
        perplexity: evaluation.perplexity,
        negative_log_likelihood: evaluation.negative_log_likelihood,
        predicted_tokens: evaluation.predicted_tokens,
        step: evaluation.step,
        seconds: evaluation.duration.as_secs_f64(),
        window_tokens: evaluation.window_tokens,
    }
}

pub(crate) fn task(result: &TaskResult) -> pb::TaskResult {
    let score = &result.score;
    let plain = Accuracy::new(score.correct, score.count);
    let normalized = score.correct_normalized.map(|correct| Accuracy::new(correct, score.count));
    pb::TaskResult {
        label: result.label.clone(),
        task: score.task.clone(),
        count: score.count,
        correct: score.correct,
        correct_normalized: score.correct_normalized,
        accuracy: plain.share,
        accuracy_error: plain.standard_error,
        normalized_accuracy: normalized.map(|accuracy| accuracy.share),
        normalized_accuracy_error: normalized.and_then(|accuracy| accuracy.standard_error),
        log_likelihood: score.log_likelihood,
        tokens: score.tokens,
        step: result.step,
        seconds: result.duration.as_secs_f64(),
        log_likelihoods: score.log_likelihoods.clone(),
    }
}

pub(crate) fn task_score(message: pb::TaskScore) -> TaskScore {
    TaskScore {
        task: message.task,
        count: message.count,
        correct: message.correct,
        correct_normalized: message.correct_normalized,
        log_likelihood: message.log_likelihood,
        tokens: message.tokens,
        log_likelihoods: message.log_likelihoods,
    }
}

pub(crate) fn export(result: &ExportResult) -> pb::ExportResult {
    pb::ExportResult {
        path: result.path.clone(),
        parameters: result.parameters,
        weight_bytes: result.weight_bytes,
        model_type: result.model_type.clone(),
        manifest_sha256: result.manifest_sha256.clone(),
        max_logit_difference: result.max_logit_difference,
        max_logit: result.max_logit,
        top_token_agreement: result.top_token_agreement,
        mean_kl: result.mean_kl,
    }
}

pub(crate) fn export_from(message: pb::ExportResult) -> ExportResult {
    ExportResult {
        path: message.path,
        parameters: message.parameters,
        weight_bytes: message.weight_bytes,
        model_type: message.model_type,
        manifest_sha256: message.manifest_sha256,
        max_logit_difference: message.max_logit_difference,
        max_logit: message.max_logit,
        top_token_agreement: message.top_token_agreement,
        mean_kl: message.mean_kl,
    }
}

/// A rank's report. What it says of sparsity is not read: the coordinator knows.
pub(crate) fn rank_report(message: pb::StepReport) -> RankReport {
    RankReport {
        step: message.step,
        loss: message.loss,
        grad_norm: message.grad_norm,
        learning_rate: message.learning_rate,
        tokens: message.tokens,
        duration: time::duration_from_pb(message.duration).unwrap_or(Duration::ZERO),
        score_duration: time::duration_from_pb(message.score_duration).unwrap_or(Duration::ZERO),
        memory_bytes: message.memory_bytes,
        generation: Generation(message.generation),
        skipped: message.skipped,
    }
}

fn step(report: &StepReport) -> pb::StepReport {
    pb::StepReport {
        step: report.step,
        loss: report.loss,
        grad_norm: report.grad_norm,
        learning_rate: report.learning_rate,
        tokens: report.tokens,
        duration: Some(time::duration_to_pb(report.duration)),
        score_duration: Some(time::duration_to_pb(report.score_duration)),
        memory_bytes: report.memory_bytes,
        sparsity: report.sparsity,
        generation: report.generation.0,
        skipped: report.skipped.clone(),
    }
}

/// A run that was only checked.
pub(crate) fn checked_run(spec: &wire::RunSpec, plan: pb::RunPlan) -> pb::Run {
    pb::Run {
        spec: Some(run::to_pb(spec)),
        state: pb::RunState::Queued.into(),
        status_message: "only checked; nothing was stored".to_owned(),
        plan: Some(plan),
        ..pb::Run::default()
    }
}
