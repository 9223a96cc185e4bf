//! What a run changed, as the few numbers that people ask for first.

use super::history::History;
use crate::units;
use std::time::Duration;

/// A number before and after, ready to print.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Row {
    pub name: &'static str,
    pub before: String,
    pub after: String,
    /// Change in words, such as `-49.8 %` or `1.52x faster`.
    pub change: String,
}

/// The summary table; a row whose numbers are not known is left out.
#[must_use]
pub(crate) fn rows(history: &History) -> Vec<Row> {
    let mut rows = Vec::new();
    if let Some(change) = history.perplexities() {
        rows.push(Row {
            name: "perplexity",
            before: format!("{:.2}", change.first),
            after: format!("{:.2}", change.last),
            change: format!("{:.2}x", change.last / change.first),
        });
    }
    if let (Some(dense), Some(pruned)) = (history.dense_parameters(), history.pruned_parameters()) {
        rows.push(Row {
            name: "parameters",
            before: units::grouped(dense),
            after: units::grouped(pruned),
            change: relative(dense as f64, pruned as f64),
        });
    }
    if let Some(change) = history.memory_bytes() {
        rows.push(Row {
            name: "peak memory, fullest worker",
            before: units::bytes(change.first as u64),
            after: units::bytes(change.last as u64),
            change: relative(change.first, change.last),
        });
    }
    if let Some(change) = history.step_seconds() {
        rows.push(Row {
            name: "step time",
            before: units::duration(Duration::from_secs_f64(change.first)),
            after: units::duration(Duration::from_secs_f64(change.last)),
            change: speed(change.first, change.last),
        });
    }
    rows
}

fn speed(before: f64, after: f64) -> String {
    let factor = before.max(1e-9) / after.max(1e-9);
    if factor >= 1.0 { format!("{factor:.2}x faster") } else { format!("{:.2}x slower", 1.0 / factor) }
}

fn relative(before: f64, after: f64) -> String {
    format!("{:+.1} %", (after / before - 1.0) * 100.0)
}

/// A number of the overview.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Tile {
    pub name: String,
    pub value: String,
    pub note: String,
}

/// The numbers above the charts.
#[must_use]
pub(crate) fn tiles(history: &History) -> Vec<Tile> {
    let mut tiles: Vec<Tile> = rows(history)
        .into_iter()
        .map(|row| {
            let shorten = |text: String| {
                text.replace(',', "").parse().map_or(text, |count: u64| units::short_count(count))
            };
            let (before, after) = match row.name {
                "parameters" => (shorten(row.before), shorten(row.after)),
                _ => (row.before, row.after),
            };
            let name = row.name.replace(", fullest worker", "");
            Tile { name: capitalised(&name), value: format!("{before} → {after}"), note: row.change }
        })
        .collect();
    if let Some(result) = &history.export {
        tiles.push(Tile {
            name: "Written".into(),
            value: units::bytes(result.weight_bytes),
            note: format!("`{}`, {}", result.model_type, check_words(result)),
        });
    }
    if tiles.len() < 3
        && let Some(steps) = history.steps.last()
    {
        tiles.push(Tile {
            name: "Steps".into(),
            value: units::grouped(steps.step + 1),
            note: format!("sparsity {}", units::percent(history.final_sparsity())),
        });
    }
    tiles
}

/// What the reload of the written model found.
#[must_use]
pub(crate) fn check_words(result: &wire::pb::ExportResult) -> String {
    format!("{} same top token", units::percent(result.top_token_agreement))
}

fn capitalised(text: &str) -> String {
    let mut letters = text.chars();
    letters.next().map_or(String::new(), |first| first.to_uppercase().chain(letters).collect())
}
