//! The tables of `docs/planning.md`, between its words.

use crate::device::{Device, known_device};
use crate::estimate::{Estimate, Question, Stage, estimate};
use crate::memory::{Kind, Memory};
use crate::refusal::{Refusal, refusals};
use model_spec::ModelSpec;
use recipe::{Batch, Compute, Precision, Recipe, Storage};

/// Degrees that the page looks at.
const DEGREES: [usize; 5] = [1, 2, 4, 8, 16];
const DEVICES: [&str; 2] = ["a100", "h100"];

/// What the page's run is told beside its defaults, in words.
pub const PAGE_RECIPE: &str = "the default recipe (half of the projection weights, LoRA of rank 8, least-squares compensation), \
                               200 steps of 16 micro-batches of 8 x 512 tokens, weights and products in bf16";

fn recipe() -> Recipe {
    Recipe {
        batch: Batch { window_tokens: 512, rows: 8, micro_batches: 16 },
        precision: Precision { compute: Compute::Bf16, storage: Storage::Bf16 },
        ..Recipe::default()
    }
}

/// Markdown tables for these models, by name.
#[must_use]
pub fn page(models: &[(&str, ModelSpec)]) -> String {
    let mut text = format!("Planned: {PAGE_RECIPE}.\n");
    for (name, dense) in models {
        text += &section(name, dense);
    }
    text
}

fn section(name: &str, dense: &ModelSpec) -> String {
    let recipe = recipe();
    let mut text = format!("\n### {name}\n\n");
    let devices: Vec<Device> = DEVICES.into_iter().filter_map(known_device).collect();
    let Some(first) = devices.first() else { return text };
    let plan = |tp_degree, device| estimate(&Question { dense, recipe: &recipe, tp_degree, device });
    let planned: Vec<(usize, Result<Estimate, Vec<Refusal>>)> =
        DEGREES.into_iter().map(|degree| (degree, plan(degree, first))).collect();
    if let Some((_, Ok(estimate))) = planned.iter().find(|(_, planned)| planned.is_ok()) {
        text += &shape_words(dense, estimate);
    }
    text += "\n| GPUs | weights | LoRA, gradients, moments | activations | buffers | process | a step | a decision | after pruning | fits 80 GiB |\n";
    text += "| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |\n";
    for (degree, planned) in &planned {
        text += &match planned {
            Ok(estimate) => memory_row(*degree, estimate, &recipe, first.memory_bytes),
            Err(found) => format!("| {degree} | {} |\n", refused(found, 8)),
        };
    }
    text += "\n| GPUs | sent for sums, a step | operations, a step | A100: step, after pruning | run | GPU-hours | H100: step, after pruning | run | GPU-hours |\n";
    text += "| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n";
    for (degree, planned) in &planned {
        let Ok(estimate) = planned else { continue };
        if !refusals(estimate, &recipe, first.memory_bytes, None).is_empty() {
            continue;
        }
        let [figures, _] = &estimate.steps;
        text += &format!(
            "| {degree} | {} | {:.2e}",
            decimal_bytes(figures.traffic.sent(*degree)),
            figures.work.total()
        );
        for device in &devices {
            if let Ok(estimate) = plan(*degree, device) {
                text += &time_cells(&estimate);
            }
        }
        text += " |\n";
    }
    text
}

fn shape_words(dense: &ModelSpec, estimate: &Estimate) -> String {
    let widths = estimate.layers.as_ref().and_then(|layers| layers.first());
    let widths = widths.map_or(String::new(), |widths| {
        format!(
            "; each layer keeps {} query heads, {} key/value heads and {} channels",
            widths.query_head_count, widths.kv_head_count, widths.intermediate_size
        )
    });
    format!(
        "{} layers, {:.2} billion parameters, {:.2} billion after pruning{widths}. Legal degrees: 1 to {}. A checkpoint of all ranks \
         takes {} on one GPU.\n",
        dense.layers.len(),
        estimate.dense_parameters as f64 / 1e9,
        estimate.pruned_parameters as f64 / 1e9,
        estimate.largest_degree,
        decimal_bytes(estimate.checkpoint.total as f64),
    )
}

fn memory_row(degree: usize, estimate: &Estimate, recipe: &Recipe, memory_bytes: Option<u64>) -> String {
    let of = |stage| estimate.stage(stage).unwrap_or_default();
    let step = of(Stage::FirstStep);
    let small = Memory { weights: 0, activations: 0, buffers: 0, process: 0, ..step };
    let found = refusals(estimate, recipe, memory_bytes, None);
    let verdict = match found.first() {
        None => "yes".to_owned(),
        Some(Refusal::DoesNotFit { stage, need, .. }) => format!("no: {} in {stage}", need.dominant()),
        Some(other) => other.to_string(),
    };
    format!(
        "| {degree} | {} | {} | {} | {} | {} | {} | {} | {} | {verdict} |\n",
        gib(step.of(Kind::Weights)),
        gib(small.total()),
        gib(step.of(Kind::Activations)),
        gib(step.of(Kind::Buffers)),
        gib(step.of(Kind::Process)),
        gib(step.total()),
        gib(of(Stage::Decision).total()),
        gib(of(Stage::LastStep).total()),
    )
}

fn refused(found: &[Refusal], cells_after: usize) -> String {
    let words = found.first().map_or(String::new(), ToString::to_string);
    format!("{words}{}", " |".repeat(cells_after))
}

fn time_cells(estimate: &Estimate) -> String {
    let [first, last] = estimate.steps.map(|figures| figures.time.map_or(0.0, |time| time.total()));
    let run = estimate.run.map_or((0.0, 0.0), |run| (run.total(), run.device_hours));
    format!(" | {}, {} | {} | {:.1}", seconds(first), seconds(last), hours(run.0), run.1)
}

fn gib(bytes: u64) -> String {
    format!("{:.1}", bytes as f64 / f64::from(1 << 30))
}

fn decimal_bytes(bytes: f64) -> String {
    match bytes {
        0.0 => "–".to_owned(),
        bytes if bytes < 1e9 => format!("{:.0} MB", bytes / 1e6),
        bytes => format!("{:.1} GB", bytes / 1e9),
    }
}

fn seconds(seconds: f64) -> String {
    if seconds < 10.0 { format!("{seconds:.1} s") } else { format!("{seconds:.0} s") }
}

fn hours(seconds: f64) -> String {
    if seconds < 5400.0 { format!("{:.0} min", seconds / 60.0) } else { format!("{:.1} h", seconds / 3600.0) }
}
