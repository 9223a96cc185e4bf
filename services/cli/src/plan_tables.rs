//! What `plan` prints for people.

use crate::units;
use comfy_table::{CellAlignment, Table, presets};
use planner::{Device, Estimate, Kind};
use std::time::Duration;

/// Memory by kind and stage, memory by rank, and the rest in words.
#[must_use]
pub(crate) fn plan(estimate: &Estimate, device: &Device, form: &str) -> String {
    let mut parts = vec![summary(estimate, device, form), memory(estimate)];
    if estimate.ranks.len() > 1 {
        parts.push(ranks(estimate));
    }
    parts.push(steps(estimate));
    parts.extend(estimate.notes.iter().map(|note| format!("note: {note}")));
    parts.join("\n")
}

fn table(header: Vec<String>) -> Table {
    let mut table = Table::new();
    table.load_style(presets::UTF8_BORDERS_ONLY);
    if !header.is_empty() {
        table.set_header(header);
    }
    table
}

fn right_aligned(mut table: Table) -> String {
    for column in 1..table.column_count() {
        if let Some(column) = table.column_mut(column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table.to_string()
}

fn summary(estimate: &Estimate, device: &Device, form: &str) -> String {
    let mut table = table(Vec::new());
    let mut row = |name: &str, value: String| {
        table.add_row([name.to_owned(), value]);
    };
    row("parameters", units::grouped(estimate.dense_parameters));
    row("after pruning", units::grouped(estimate.pruned_parameters));
    row("projection weights removed", units::percent(estimate.sparsity));
    if let Some(layer) = estimate.layers.as_ref().and_then(|layers| layers.first()) {
        row(
            "first layer keeps",
            format!(
                "{} query heads, {} key/value heads, {} channels",
                layer.query_head_count, layer.kv_head_count, layer.intermediate_size
            ),
        );
    }
    row("exported as", form.to_owned());
    row("workers", format!("{} of at most {}", estimate.tp_degree, estimate.largest_degree));
    row(
        "parameters of the fullest worker",
        estimate.rank_parameters.map(units::grouped).join(", after pruning "),
    );
    row("trained by it", estimate.rank_lora.map(units::grouped).join(", after pruning "));
    row(
        "checkpoint",
        format!(
            "{}, {} of one worker",
            units::bytes(estimate.checkpoint.total),
            units::bytes(estimate.checkpoint.rank)
        ),
    );
    let (stage, peak) = estimate.peak();
    let has = device.memory_bytes.map_or(String::new(), |has| format!(" of {}", units::bytes(has)));
    row("peak memory", format!("{}{has}, in {stage}", units::bytes(peak.total())));
    if let Some(run) = &estimate.run {
        row("run, without loading and export", seconds(run.total()));
        row("of that decisions", seconds(run.decisions));
        row("device hours", format!("{:.2}", run.device_hours));
    }
    table.to_string()
}

fn memory(estimate: &Estimate) -> String {
    let names = estimate.stages.iter().map(|(stage, _)| stage.name().to_owned());
    let mut table = table(std::iter::once("memory of the fullest worker".to_owned()).chain(names).collect());
    for kind in Kind::ALL {
        let cells = estimate.stages.iter().map(|(_, memory)| units::bytes(memory.of(kind)));
        table.add_row(std::iter::once(kind.name().to_owned()).chain(cells).collect::<Vec<_>>());
    }
    let totals = estimate.stages.iter().map(|(_, memory)| units::bytes(memory.total()));
    table.add_row(std::iter::once("together".to_owned()).chain(totals).collect::<Vec<_>>());
    right_aligned(table)
}

fn ranks(estimate: &Estimate) -> String {
    let kinds = Kind::ALL.iter().map(|kind| kind.name().to_owned());
    let header =
        std::iter::once("worker".to_owned()).chain(kinds).chain(["a step before pruning".to_owned()]);
    let mut table = table(header.collect());
    for (rank, memory) in estimate.ranks.iter().enumerate() {
        let cells = Kind::ALL.iter().map(|kind| units::bytes(memory.of(*kind)));
        let row = std::iter::once(rank.to_string()).chain(cells).chain([units::bytes(memory.total())]);
        table.add_row(row.collect::<Vec<_>>());
    }
    right_aligned(table)
}

fn steps(estimate: &Estimate) -> String {
    let header = ["a step of one worker", "before pruning", "after pruning"].map(str::to_owned).to_vec();
    let mut table = table(header);
    let mut row = |name: &str, cells: [String; 2]| {
        let [before, after] = cells;
        table.add_row([name.to_owned(), before, after]);
    };
    let figures = &estimate.steps;
    row("operations, forward", figures.map(|step| operations(step.work.forward)));
    row("operations, backward", figures.map(|step| operations(step.work.backward)));
    row("operations, scores", figures.map(|step| operations(step.work.scores)));
    row("summed over workers, forward", figures.map(|step| units::bytes(step.traffic.forward)));
    row("summed over workers, backward", figures.map(|step| units::bytes(step.traffic.backward)));
    row("summed over workers, loss", figures.map(|step| units::bytes(step.traffic.loss)));
    row("summed over workers, LoRA gradients", figures.map(|step| units::bytes(step.traffic.lora_gradients)));
    row("scores to the coordinator", figures.map(|step| units::bytes(step.traffic.scores)));
    if figures.iter().all(|step| step.time.is_some()) {
        let part = |of: fn(&planner::StepTime) -> f64| {
            figures.map(|step| step.time.as_ref().map_or(String::new(), |time| seconds(of(time))))
        };
        row("time, passes", part(|time| time.passes));
        row("time, scores and update", part(|time| time.scores_and_update));
        row("time, sums over workers", part(|time| time.sums_over_ranks));
        row("time", part(planner::StepTime::total));
    }
    right_aligned(table)
}

fn operations(count: f64) -> String {
    format!("{count:.2e}")
}

fn seconds(seconds: f64) -> String {
    match Duration::try_from_secs_f64(seconds) {
        Ok(span) => units::duration(span),
        Err(_) => "-".to_owned(),
    }
}
