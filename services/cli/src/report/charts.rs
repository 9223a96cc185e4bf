//! The charts of a run, each for any size of card.

use super::history::{History, StepPoint};
use super::panel::{Cell, Legend, LinePanel, MapPanel, Ramp, sparse_labels};
use super::scale::spread;
use super::svg::{Area, Svg, blend, colour};
use crate::units;
use std::time::Duration;
use wire::pb;

const KEPT: &str = "#2e7d52";
/// Removed early to removed late.
const REMOVED: [(f64, f64, f64); 3] = [(247.0, 236.0, 217.0), (240.0, 190.0, 128.0), (190.0, 92.0, 38.0)];
/// Nothing kept to all kept.
const SHARE: [(f64, f64, f64); 3] = [(240.0, 244.0, 241.0), (148.0, 199.0, 168.0), (30.0, 99.0, 64.0)];
const CHANNEL_BINS: usize = 48;
/// Decisions side by side.
const MOST_COLUMNS: usize = 120;

/// One chart, not yet drawn.
pub(crate) enum Chart<'a> {
    Line(LinePanel<'a>),
    Map(MapPanel<'a>),
}

impl Chart<'_> {
    pub(crate) fn draw(&self, svg: &mut Svg, card: Area) {
        match self {
            Self::Line(panel) => panel.draw(svg, card),
            Self::Map(panel) => panel.draw(svg, card),
        }
    }

    /// The chart as a picture of its own.
    #[must_use]
    pub(crate) fn picture(&self, width: f64, height: f64) -> String {
        let mut svg = Svg::default();
        self.draw(&mut svg, Area { left: 0.5, top: 0.5, width: width - 1.0, height: height - 1.0 });
        svg.finish(width, height)
    }
}

/// Steps after which masks were decided.
#[must_use]
pub(crate) fn marks(history: &History) -> Vec<f64> {
    history.decisions.iter().map(|decision| decision.step as f64).collect()
}

/// Loss, sparsity, learning rate; memory, step time, gradient norm.
#[must_use]
pub(crate) fn over_steps<'a>(history: &History, marks: &'a [f64]) -> Vec<Chart<'a>> {
    let line = |title, subtitle: String, colour, noisy, filled, value: &dyn Fn(&StepPoint) -> f64| {
        let points = history.steps.iter().map(|point| (point.step as f64, value(point))).collect();
        Chart::Line(LinePanel { title, subtitle, points, colour, noisy, filled, marks })
    };
    let largest_memory = history.peak_memory_bytes().unwrap_or(0);
    let (memory_unit, memory_scale) =
        if largest_memory >= 1 << 30 { ("GiB", f64::from(1 << 30)) } else { ("MiB", f64::from(1 << 20)) };
    let slowest = history.steps.iter().map(|point| point.seconds).fold(0.0, f64::max);
    let (time_unit, time_scale) = if slowest >= 1.0 { ("s", 1.0) } else { ("ms", 1e-3) };
    let memory = history.memory_bytes().map_or(String::new(), |change| {
        format!(", {} to {}", units::bytes(change.first as u64), units::bytes(change.last as u64))
    });
    let time = history.step_seconds().map_or(String::new(), |change| {
        let text = |seconds| units::duration(Duration::from_secs_f64(seconds));
        format!(", {} to {}", text(change.first), text(change.last))
    });
    vec![
        line("Loss", "nats per token; dotted: mask decisions".into(), colour::LEAF, true, false, &|p| p.loss),
        line("Sparsity", "% of the projection weights gone".into(), colour::AMBER, false, true, &|p| {
            p.sparsity * 100.0
        }),
        line("Learning rate", "of the LoRA factors".into(), colour::PLUM, false, true, &|p| p.learning_rate),
        line(
            "Memory",
            format!("{memory_unit}, fullest worker{memory}"),
            colour::SKY,
            false,
            true,
            &move |p| p.memory_bytes as f64 / memory_scale,
        ),
        line("Step time", format!("{time_unit}{time}"), colour::SKY, true, true, &move |p| {
            p.seconds / time_scale
        }),
        line("Gradient norm", "before clipping".into(), colour::PLUM, true, true, &|p| p.grad_norm),
    ]
}

/// Which heads stay, by layer, and when the others went; absent without masks.
#[must_use]
pub(crate) fn heads(history: &History) -> Option<Chart<'static>> {
    let removals = history.removals.as_ref()?;
    let (first, last) = (history.decisions.first()?.step, history.decisions.last()?.step);
    let step_of = |generation: u64| {
        let decided = history.decisions.iter().find(|decision| decision.generation == generation);
        decided.map_or(last, |decision| decision.step)
    };
    let along =
        |step: u64| if last > first { (step - first.min(step)) as f64 / (last - first) as f64 } else { 1.0 };
    let cells: Vec<Vec<Cell>> = removals
        .layers
        .iter()
        .enumerate()
        .map(|(layer, removed)| {
            let cell = |(head, generation): (usize, &u64)| match generation {
                0 => Cell { fill: KEPT.into(), title: format!("layer {layer}, head {head}: kept") },
                generation => {
                    let step = step_of(*generation);
                    Cell {
                        fill: blend(&REMOVED, along(step)),
                        title: format!("layer {layer}, head {head}: removed after step {step}"),
                    }
                }
            };
            removed.query_heads.iter().enumerate().map(cell).collect()
        })
        .collect();
    let kept: usize = removals.layers.iter().map(|layer| zeros(&layer.query_heads)).sum();
    let all: usize = removals.layers.iter().map(|layer| layer.query_heads.len()).sum();
    let rows = removals.layers.iter().map(|layer| layer.query_heads.len()).max().unwrap_or(0);
    Some(Chart::Map(MapPanel {
        title: "Query heads",
        subtitle: format!("{} of {} kept", units::grouped(kept as u64), units::grouped(all as u64)),
        column_name: "layer",
        row_name: "head",
        column_labels: sparse_labels(cells.len()),
        row_labels: sparse_labels(rows),
        cells,
        legend: Legend {
            swatches: vec![(KEPT.into(), "kept".into())],
            ramp: Some(Ramp {
                low: format!("removed: step {first}"),
                high: format!("step {last}"),
                fills: (0..24).map(|index| blend(&REMOVED, f64::from(index) / 23.0)).collect(),
            }),
        },
    }))
}

/// The share of FFN channels that stays, by layer and place in the layer; absent without masks.
#[must_use]
pub(crate) fn channels(history: &History) -> Option<Chart<'static>> {
    let removals = history.removals.as_ref()?;
    history.decisions.last()?;
    let widest = removals.layers.iter().map(|layer| layer.channels.len()).max().unwrap_or(0);
    let bin_count = CHANNEL_BINS.min(widest);
    let cells: Vec<Vec<Cell>> = removals
        .layers
        .iter()
        .enumerate()
        .map(|(layer, removed)| {
            let count = removed.channels.len();
            let bin = |bin: usize| {
                let (start, end) = (bin * count / bin_count, ((bin + 1) * count / bin_count).min(count));
                let part = &removed.channels[start..end];
                let share = zeros(part) as f64 / part.len().max(1) as f64;
                let title = format!(
                    "layer {layer}, channels {start} to {}: {} kept",
                    end.saturating_sub(1),
                    units::percent(share)
                );
                Cell { fill: blend(&SHARE, share), title }
            };
            (0..bin_count).map(bin).collect()
        })
        .collect();
    let kept: usize = removals.layers.iter().map(|layer| zeros(&layer.channels)).sum();
    let all: usize = removals.layers.iter().map(|layer| layer.channels.len()).sum();
    let row_labels = (0..=4)
        .map(|quarter| (quarter * bin_count.saturating_sub(1) / 4, (quarter * widest / 4).to_string()))
        .collect();
    Some(Chart::Map(MapPanel {
        title: "FFN channels",
        subtitle: format!("{} of {} kept", units::grouped(kept as u64), units::grouped(all as u64)),
        column_name: "layer",
        row_name: "channel",
        column_labels: sparse_labels(cells.len()),
        row_labels,
        cells,
        legend: share_legend(),
    }))
}

/// What part of a layer is drawn by [`kept_share`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Part {
    Heads,
    Channels,
}

/// The share of heads or channels that stays, by decision and layer; absent without decisions.
#[must_use]
pub(crate) fn kept_share(history: &History, part: Part) -> Option<Chart<'static>> {
    let dense = dense_widths(history, part)?;
    let width = |widths: &pb::LayerWidths| match part {
        Part::Heads => widths.query_heads,
        Part::Channels => widths.channels,
    };
    let shown: Vec<&pb::Decision> = spread(history.decisions.len(), MOST_COLUMNS)
        .into_iter()
        .map(|index| &history.decisions[index])
        .collect();
    let cells: Vec<Vec<Cell>> = shown
        .iter()
        .map(|decision| {
            let cell = |(layer, (widths, dense)): (usize, (&pb::LayerWidths, &u64))| {
                let share = f64::from(width(widths)) / (*dense).max(1) as f64;
                let title = format!(
                    "after step {}, layer {layer}: {} of {dense} ({})",
                    decision.step,
                    width(widths),
                    units::percent(share)
                );
                Cell { fill: blend(&SHARE, share), title }
            };
            decision.layers.iter().zip(&dense).enumerate().map(cell).collect()
        })
        .collect();
    let columns = sparse_labels(shown.len());
    let step_label = |(index, _): (usize, String)| (index, shown[index].step.to_string());
    Some(Chart::Map(MapPanel {
        title: match part {
            Part::Heads => "Heads kept by layer",
            Part::Channels => "Channels kept by layer",
        },
        subtitle: "share of the unpruned layer".into(),
        column_name: "mask decision after step",
        row_name: "layer",
        column_labels: columns.into_iter().map(step_label).collect(),
        row_labels: sparse_labels(dense.len()),
        cells,
        legend: share_legend(),
    }))
}

/// Widths before pruning: known from the masks, else the widest that any decision shows.
fn dense_widths(history: &History, part: Part) -> Option<Vec<u64>> {
    if let Some(removals) = &history.removals {
        let width = |layer: &super::LayerRemovals| match part {
            Part::Heads => layer.query_heads.len() as u64,
            Part::Channels => layer.channels.len() as u64,
        };
        return (!history.decisions.is_empty()).then(|| removals.layers.iter().map(width).collect());
    }
    let first = history.decisions.first()?;
    let widest = |widths: &pb::LayerWidths| match part {
        Part::Heads => u64::from(widths.query_heads),
        Part::Channels => u64::from(widths.channels),
    };
    let most = first.layers.iter().map(widest).max().unwrap_or(0);
    Some(vec![most; first.layers.len()])
}

fn share_legend() -> Legend {
    Legend {
        swatches: Vec::new(),
        ramp: Some(Ramp {
            low: "0 % kept".into(),
            high: "100 %".into(),
            fills: (0..24).map(|index| blend(&SHARE, f64::from(index) / 23.0)).collect(),
        }),
    }
}

fn zeros(removed_at: &[u64]) -> usize {
    removed_at.iter().filter(|generation| **generation == 0).count()
}
