//! Tables for people.

use crate::commands::methods::{Costs, Method};
use crate::report::{History, summary};
use crate::units;
use comfy_table::{CellAlignment, ContentArrangement, Table, presets};
use std::time::{Duration, SystemTime};
use wire::pb;

/// Columns of the list of methods where there is no terminal.
const METHODS_WIDTH: u16 = 180;

/// A table whose first column is words and whose others are numbers.
fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::UTF8_BORDERS_ONLY);
    if !header.is_empty() {
        table.set_header(header.to_vec());
    }
    table
}

fn align_right(table: &mut Table, columns: impl IntoIterator<Item = usize>) {
    for column in columns {
        if let Some(column) = table.column_mut(column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
}

/// What recipes choose from.
#[must_use]
pub(crate) fn methods(methods: &[Method]) -> String {
    let mut table = table(&["choice", "what it is", "source", "memory", "communication", "time", "not with"]);
    table.set_content_arrangement(ContentArrangement::Dynamic);
    if table.width().is_none() {
        table.set_width(METHODS_WIDTH);
    }
    for Method { flag, name, about, costs } in methods {
        let Costs { source, memory, communication, time, not_with } = costs;
        let choice = format!("{flag} {name}");
        table.add_row([&choice, about, *source, *memory, *communication, *time, &not_with.join(", ")]);
    }
    table.to_string()
}

/// A state in the words of people.
#[must_use]
pub(crate) fn state_name(state: pb::RunState) -> &'static str {
    match state {
        pb::RunState::Unspecified => "unknown",
        pb::RunState::Queued => "queued",
        pb::RunState::Starting => "starting",
        pb::RunState::Running => "running",
        pb::RunState::Exporting => "exporting",
        pb::RunState::Succeeded => "succeeded",
        pb::RunState::Failed => "failed",
        pb::RunState::Cancelled => "cancelled",
        pb::RunState::Pausing => "pausing",
        pb::RunState::Paused => "paused",
        pb::RunState::Recovering => "recovering",
        pb::RunState::Cancelling => "cancelling",
    }
}

/// Whether a run in this state stays in it.
#[must_use]
pub(crate) fn has_ended(state: pb::RunState) -> bool {
    match state {
        pb::RunState::Succeeded | pb::RunState::Failed | pb::RunState::Cancelled => true,
        pb::RunState::Unspecified
        | pb::RunState::Queued
        | pb::RunState::Starting
        | pb::RunState::Running
        | pb::RunState::Exporting
        | pb::RunState::Pausing
        | pb::RunState::Paused
        | pb::RunState::Recovering
        | pb::RunState::Cancelling => false,
    }
}

/// `7`, or `3 to 9` when the counts differ.
#[must_use]
pub(crate) fn range_of(counts: impl Iterator<Item = u32> + Clone) -> String {
    match (counts.clone().min(), counts.max()) {
        (Some(least), Some(most)) if least == most => units::grouped(least.into()),
        (Some(least), Some(most)) => {
            format!("{} to {}", units::grouped(least.into()), units::grouped(most.into()))
        }
        (None, _) | (_, None) => "-".to_owned(),
    }
}

/// Before and after.
#[must_use]
pub(crate) fn summary_table(history: &History) -> Option<String> {
    let rows = summary::rows(history);
    if rows.is_empty() {
        return None;
    }
    let mut table = table(&["", "before", "after", "change"]);
    for row in rows {
        table.add_row([row.name.to_owned(), row.before, row.after, row.change]);
    }
    align_right(&mut table, 1..4);
    Some(table.to_string())
}

/// What a spec amounts to.
#[must_use]
pub(crate) fn plan_table(plan: &pb::RunPlan) -> String {
    let mut table = table(&[]);
    let mut row = |name: &str, value: String| {
        table.add_row([name.to_owned(), value]);
    };
    row("parameters", units::grouped(plan.dense_parameters));
    row("after pruning", units::grouped(plan.pruned_parameters));
    row("projection weights removed", units::percent(plan.sparsity));
    if !plan.layers.is_empty() {
        row("query heads of a layer", range_of(plan.layers.iter().map(|layer| layer.query_heads)));
        row("key/value heads of a layer", range_of(plan.layers.iter().map(|layer| layer.kv_heads)));
        row("FFN channels of a layer", range_of(plan.layers.iter().map(|layer| layer.channels)));
    }
    row("mask decisions after steps", steps_text(&plan.pruning_steps));
    row("exported as", if plan.export_form.is_empty() { "-".to_owned() } else { plan.export_form.clone() });
    let notes: String = plan.notes.iter().map(|note| format!("\nnote: {note}")).collect();
    format!("{table}{notes}")
}

fn steps_text(steps: &[u64]) -> String {
    const SHOWN: usize = 6;
    let text = |steps: &[u64]| steps.iter().map(u64::to_string).collect::<Vec<_>>().join(", ");
    match steps {
        [] => "none".to_owned(),
        [.., last] if steps.len() > SHOWN + 1 => {
            format!("{}, … {last} ({} in all)", text(&steps[..SHOWN]), steps.len())
        }
        _ => text(steps),
    }
}

/// One run in detail.
#[must_use]
pub(crate) fn run_table(run: &pb::Run) -> String {
    let mut table = table(&[]);
    let mut row = |name: &str, value: String| {
        if !value.is_empty() {
            table.add_row([name.to_owned(), value]);
        }
    };
    row("run", run.id.clone());
    row("state", state_name(run.state()).to_owned());
    row("message", run.status_message.clone());
    if let Some(spec) = &run.spec {
        row("name", spec.display_name.clone());
        row("model", spec.model.clone());
        row("workers", spec.tp_degree.map_or(String::new(), |degree| degree.to_string()));
    }
    row("assigned to", run.worker_ids.join(", "));
    row("created", ago(run.create_time));
    if let Some(step) = &run.last_step {
        let steps = run.spec.as_ref().and_then(|spec| spec.recipe.as_ref()).and_then(|recipe| recipe.steps);
        let of = steps.map_or(String::new(), |steps| format!(" of {}", units::grouped(steps)));
        row("steps done", format!("{}{of}", units::grouped(step.step + 1)));
        row("loss", format!("{:.4}", step.loss));
        row("sparsity", units::percent(step.sparsity));
        row("memory of the fullest worker", units::bytes(step.memory_bytes));
    }
    row("decision in force", run.generation.to_string());
    if run.restarts > 0 {
        row("restarts", run.restarts.to_string());
    }
    for evaluation in &run.evaluations {
        row(&format!("perplexity, {}", evaluation.label), format!("{:.4}", evaluation.perplexity));
    }
    for task in &run.task_results {
        row(&format!("{}, {}", task.task, task.label), format!("{} right", units::percent(task.accuracy)));
    }
    if let Some(result) = &run.export_result {
        row("exported to", result.path.clone());
        row("exported parameters", units::grouped(result.parameters));
        row("exported weights", units::bytes(result.weight_bytes));
        row("largest logit difference", format!("{:.2e}", result.max_logit_difference));
    }
    table.to_string()
}

/// Runs, one a row.
#[must_use]
pub(crate) fn runs_table(runs: &[pb::Run]) -> String {
    let mut table = table(&["run", "name", "state", "step", "loss", "sparsity", "created"]);
    for run in runs {
        let step =
            |value: fn(&pb::StepReport) -> String| run.last_step.as_ref().map_or("-".to_owned(), value);
        table.add_row([
            run.id.clone(),
            run.spec.as_ref().map_or(String::new(), |spec| spec.display_name.clone()),
            state_name(run.state()).to_owned(),
            step(|step| units::grouped(step.step + 1)),
            step(|step| format!("{:.4}", step.loss)),
            step(|step| units::percent(step.sparsity)),
            ago(run.create_time),
        ]);
    }
    align_right(&mut table, 3..6);
    table.to_string()
}

/// Decisions, one a row.
#[must_use]
pub(crate) fn decisions_table(decisions: &[pb::Decision]) -> String {
    let mut table =
        table(&["decision", "after step", "sparsity", "parameters", "heads", "kv heads", "channels"]);
    for decision in decisions {
        table.add_row([
            decision.generation.to_string(),
            units::grouped(decision.step),
            units::percent(decision.sparsity),
            units::grouped(decision.parameters),
            range_of(decision.layers.iter().map(|layer| layer.query_heads)),
            range_of(decision.layers.iter().map(|layer| layer.kv_heads)),
            range_of(decision.layers.iter().map(|layer| layer.channels)),
        ]);
    }
    align_right(&mut table, 0..7);
    table.to_string()
}

/// Perplexities, one a row.
#[must_use]
pub(crate) fn evaluations_table(evaluations: &[pb::Evaluation]) -> String {
    let mut table = table(&["", "window", "perplexity", "predicted tokens", "took"]);
    for evaluation in evaluations {
        table.add_row([
            evaluation.label.clone(),
            evaluation.window_tokens.to_string(),
            format!("{:.4}", evaluation.perplexity),
            units::grouped(evaluation.predicted_tokens),
            units::duration(Duration::from_secs_f64(evaluation.seconds.max(0.0))),
        ]);
    }
    align_right(&mut table, 1..5);
    table.to_string()
}

/// Tasks, one a row, and their means: shares of right answers with their standard errors.
#[must_use]
pub(crate) fn tasks_table(
    tasks: &[pb::TaskResult],
    mean: Option<f64>,
    mean_normalized: Option<f64>,
) -> String {
    let share = |share: f64, error: Option<f64>| match error {
        Some(error) => format!("{share:.4} ± {error:.4}"),
        None => format!("{share:.4}"),
    };
    let mut table = table(&["task", "rows", "accuracy", "by character", "tokens", "took"]);
    for task in tasks {
        let normalized = task.normalized_accuracy.map(|value| share(value, task.normalized_accuracy_error));
        table.add_row([
            task.task.clone(),
            units::grouped(task.count),
            share(task.accuracy, task.accuracy_error),
            normalized.unwrap_or_else(|| "-".to_owned()),
            units::grouped(task.tokens),
            units::duration(Duration::from_secs_f64(task.seconds.max(0.0))),
        ]);
    }
    if let (Some(mean), Some(mean_normalized), true) = (mean, mean_normalized, tasks.len() > 1) {
        let blank = String::new;
        table.add_row([
            "mean".to_owned(),
            blank(),
            share(mean, None),
            share(mean_normalized, None),
            blank(),
            blank(),
        ]);
    }
    align_right(&mut table, 1..6);
    table.to_string()
}

/// Workers, one a row.
#[must_use]
pub(crate) fn workers_table(workers: &[pb::Worker]) -> String {
    let mut table = table(&["worker", "run", "device", "memory", "threads", "endpoint", "version"]);
    for worker in workers {
        let info = worker.info.clone().unwrap_or_default();
        table.add_row([
            info.id,
            if worker.run_id.is_empty() { "idle".to_owned() } else { worker.run_id.clone() },
            info.device,
            units::bytes(info.memory_bytes),
            info.threads.to_string(),
            info.endpoint,
            info.version,
        ]);
    }
    align_right(&mut table, 3..5);
    table.to_string()
}

/// The kept heads of each layer as `0-3, 6`, and how many channels stay.
#[must_use]
pub(crate) fn mask_table(mask: &pb::KeepMask) -> String {
    let mut table = table(&["layer", "query heads", "kv heads", "channels kept"]);
    for (layer, keep) in mask.layers.iter().enumerate() {
        table.add_row([
            layer.to_string(),
            indices_text(&keep.query_heads),
            indices_text(&keep.kv_heads),
            units::grouped(keep.channels.len() as u64),
        ]);
    }
    align_right(&mut table, [0, 3]);
    table.to_string()
}

fn indices_text(indices: &[u32]) -> String {
    let mut parts: Vec<(u32, u32)> = Vec::new();
    for index in indices {
        match parts.last_mut() {
            Some((_, end)) if end.checked_add(1) == Some(*index) => *end = *index,
            Some(_) | None => parts.push((*index, *index)),
        }
    }
    let text =
        |(start, end): &(u32, u32)| if start == end { start.to_string() } else { format!("{start}-{end}") };
    parts.iter().map(text).collect::<Vec<_>>().join(", ")
}

/// What another budget would keep.
#[must_use]
pub(crate) fn what_if_table(answer: &pb::QueryWhatIfResponse) -> String {
    let mut table = table(&[]);
    let widths = |count: fn(&pb::LayerWidths) -> u32| range_of(answer.layers.iter().map(count));
    for (name, value) in [
        ("decision asked", answer.generation.to_string()),
        ("parameters that stay", units::grouped(answer.parameters)),
        ("projection weights gone", units::percent(answer.sparsity)),
        ("weights exported", units::bytes(answer.weight_bytes)),
        ("query heads of a layer", widths(|layer| layer.query_heads)),
        ("key/value heads of a layer", widths(|layer| layer.kv_heads)),
        ("channels of a layer", widths(|layer| layer.channels)),
        ("importance lost", units::percent(answer.importance_lost_share)),
        (
            "export",
            if answer.export_form.is_empty() { "impossible".into() } else { answer.export_form.clone() },
        ),
    ] {
        table.add_row([name.to_owned(), value]);
    }
    let problems = answer.problems.iter().map(|problem| format!("\nnote: {problem}"));
    format!("{table}{}", problems.collect::<String>())
}

/// The files that a run has exported.
#[must_use]
pub(crate) fn artifacts_table(artifacts: &[pb::Artifact]) -> String {
    let mut table = table(&["file", "size", "SHA-256"]);
    for artifact in artifacts {
        table.add_row([artifact.name.clone(), units::bytes(artifact.size_bytes), artifact.sha256.clone()]);
    }
    table.to_string()
}

fn ago(time: Option<prost_types::Timestamp>) -> String {
    let since = time.and_then(|time| SystemTime::try_from(time).ok()).map(|time| {
        let age = SystemTime::now().duration_since(time).unwrap_or(Duration::ZERO);
        format!("{} ago", units::duration(Duration::from_secs(age.as_secs().max(1))))
    });
    since.unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn indices_are_written_as_ranges() {
        for (indices, expected) in [
            (&[][..], ""),
            (&[4], "4"),
            (&[0, 1, 2, 3, 6], "0-3, 6"),
            (&[1, 3, u32::MAX], "1, 3, 4294967295"),
        ] {
            assert_eq!(indices_text(indices), expected);
        }
    }

    #[test]
    fn a_plan_names_what_stays() {
        let layer = pb::LayerWidths { query_heads: 6, kv_heads: 2, channels: 768 };
        let plan = pb::RunPlan {
            dense_parameters: 134_515_008,
            pruned_parameters: 81_000_000,
            sparsity: 0.5,
            layers: vec![layer; 3],
            pruning_steps: (1..20).map(|index| index * 10).collect(),
            export_form: "mistral".into(),
            notes: vec!["heads do not divide the hidden size".into()],
            estimate: None,
        };
        let text = plan_table(&plan);
        for word in
            ["134,515,008", "50.0 %", "768", "190 (19 in all)", "mistral", "note: heads do not divide"]
        {
            assert!(text.contains(word), "{text}");
        }
    }
}
