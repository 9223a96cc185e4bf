//! One chart on a card: a line over the steps, or a map of coloured cells.

use super::scale::{Scale, labels, smoothed, thinned, ticks};
use super::svg::{Anchor, Area, Stroke, Svg, TextStyle, colour};

const TITLE: TextStyle = TextStyle::new(15.0, colour::INK).bold();
const SUBTITLE: TextStyle = TextStyle::new(12.0, colour::MUTED);
const TICK: TextStyle = TextStyle::new(11.5, colour::MUTED);

/// A line has no more points than its picture has room for.
const MOST_POINTS: usize = 1200;
/// More marks than this would be a grey wall.
const MOST_MARKS: usize = 60;

/// A value over the optimizer steps.
pub(crate) struct LinePanel<'a> {
    pub title: &'a str,
    /// Unit and what is drawn, below the title.
    pub subtitle: String,
    /// Step and value.
    pub points: Vec<(f64, f64)>,
    pub colour: &'static str,
    /// Whether the values jump around a level: then a running mean is drawn over them.
    pub noisy: bool,
    /// Whether the space below the line is filled, from zero.
    pub filled: bool,
    /// Steps after which a mask was decided.
    pub marks: &'a [f64],
}

impl LinePanel<'_> {
    pub(crate) fn draw(&self, svg: &mut Svg, card: Area) {
        svg.card(card);
        head(svg, card, self.title, &self.subtitle);
        let plot = card.inset(58.0, 62.0, 20.0, 44.0);
        let finite = self.points.iter().copied().filter(|(_, value)| value.is_finite()).collect();
        let finite = thinned(finite, MOST_POINTS);
        let values: Vec<f64> = finite.iter().map(|(_, value)| *value).collect();
        let window = (values.len() / 25).clamp(3, 25);
        let means = smoothed(&values, window);
        let (Some(first), Some(last)) = (finite.first(), finite.last()) else {
            svg.text(
                (card.left + card.width / 2.0, card.top + card.height / 2.0),
                "no steps",
                SUBTITLE.anchored(Anchor::Middle),
            );
            return;
        };
        let low = values.iter().copied().fold(f64::INFINITY, f64::min);
        let high = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let rows = ticks(if self.filled { 0.0 } else { low }, high, 4);
        let (bottom, top) = (rows[0], rows[rows.len() - 1]);
        let across = Scale::new(first.0, last.0.max(first.0 + 1.0), plot.left, plot.right());
        let up = Scale::new(bottom, top, plot.bottom(), plot.top);

        for (tick, label) in rows.iter().zip(labels(&rows)) {
            let y = up.at(*tick);
            svg.line((plot.left, y), (plot.right(), y), Stroke::new(colour::GRID, 1.0));
            svg.text((plot.left - 8.0, y + 4.0), &label, TICK.anchored(Anchor::End));
        }
        step_axis(svg, plot, across, first.0, last.0);
        for mark in self.marks.iter().filter(|_| self.marks.len() <= MOST_MARKS) {
            let x = across.at(*mark);
            svg.line(
                (x, plot.top),
                (x, plot.bottom()),
                Stroke::new(colour::MUTED, 0.8).opacity(0.35).dashed(),
            );
        }

        let place = |(step, value): (f64, f64)| (across.at(step), up.at(value));
        let raw: Vec<(f64, f64)> = finite.iter().copied().map(place).collect();
        if self.filled {
            svg.filled(&raw, plot.bottom(), self.colour, 0.13);
        }
        if self.noisy {
            svg.polyline(&raw, Stroke::new(self.colour, 1.0).opacity(0.35));
            let mean: Vec<(f64, f64)> =
                finite.iter().zip(means).map(|((step, _), mean)| place((*step, mean))).collect();
            svg.polyline(&mean, Stroke::new(self.colour, 2.2));
        } else {
            svg.polyline(&raw, Stroke::new(self.colour, 2.2));
        }
        if let [only] = raw[..] {
            svg.dot(only, 3.0, self.colour);
        }
    }
}

fn head(svg: &mut Svg, card: Area, title: &str, subtitle: &str) {
    svg.text((card.left + 18.0, card.top + 27.0), title, TITLE);
    svg.text((card.left + 18.0, card.top + 45.0), subtitle, SUBTITLE);
}

fn step_axis(svg: &mut Svg, plot: Area, across: Scale, first: f64, last: f64) {
    let columns: Vec<f64> = ticks(first, last.max(first + 1.0), 7)
        .into_iter()
        .filter(|tick| *tick >= first && *tick <= last)
        .collect();
    for (tick, label) in columns.iter().zip(labels(&columns)) {
        svg.text((across.at(*tick), plot.bottom() + 18.0), &label, TICK.anchored(Anchor::Middle));
    }
    svg.text((plot.left + plot.width / 2.0, plot.bottom() + 35.0), "step", TICK.anchored(Anchor::Middle));
}

/// A map of coloured cells, columns from left to right, rows from bottom to top.
pub(crate) struct MapPanel<'a> {
    pub title: &'a str,
    pub subtitle: String,
    pub column_name: &'a str,
    pub row_name: &'a str,
    /// Labels of some columns and rows.
    pub column_labels: Vec<(usize, String)>,
    pub row_labels: Vec<(usize, String)>,
    /// Columns of rows of cells.
    pub cells: Vec<Vec<Cell>>,
    pub legend: Legend,
}

/// One cell: its colour, and what it says under the pointer.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Cell {
    pub fill: String,
    pub title: String,
}

/// Swatches with their words, then perhaps a ramp between two words.
#[derive(Debug, Clone, Default)]
pub(crate) struct Legend {
    pub swatches: Vec<(String, String)>,
    pub ramp: Option<Ramp>,
}

/// Colours from `low` to `high`.
#[derive(Debug, Clone)]
pub(crate) struct Ramp {
    pub low: String,
    pub high: String,
    pub fills: Vec<String>,
}

impl MapPanel<'_> {
    pub(crate) fn draw(&self, svg: &mut Svg, card: Area) {
        svg.card(card);
        head(svg, card, self.title, &self.subtitle);
        let plot = card.inset(66.0, 64.0, 20.0, 78.0);
        let column_count = self.cells.len();
        let row_count = self.cells.iter().map(Vec::len).max().unwrap_or(0);
        if column_count == 0 || row_count == 0 {
            return;
        }
        let (width, height) = (plot.width / column_count as f64, plot.height / row_count as f64);
        // A hair of white between cells that are large enough to bear it.
        let gap = if width > 6.0 && height > 3.0 { 1.0 } else { 0.0 };
        for (column, cells) in self.cells.iter().enumerate() {
            for (row, cell) in cells.iter().enumerate() {
                let area = Area {
                    left: plot.left + column as f64 * width,
                    top: plot.bottom() - (row + 1) as f64 * height,
                    width: width - gap,
                    height: height - gap,
                };
                svg.titled_rect(area, &cell.fill, if gap > 0.0 { 1.5 } else { 0.0 }, &cell.title);
            }
        }
        for (column, label) in &self.column_labels {
            let x = plot.left + (*column as f64 + 0.5) * width;
            svg.text((x, plot.bottom() + 17.0), label, TICK.anchored(Anchor::Middle));
        }
        for (row, label) in &self.row_labels {
            let y = plot.bottom() - (*row as f64 + 0.5) * height + 4.0;
            svg.text((plot.left - 8.0, y), label, TICK.anchored(Anchor::End));
        }
        let middle = plot.left + plot.width / 2.0;
        svg.text((middle, plot.bottom() + 33.0), self.column_name, TICK.anchored(Anchor::Middle));
        svg.upright_text(
            (card.left + 20.0, plot.top + plot.height / 2.0),
            self.row_name,
            TICK.anchored(Anchor::Middle),
        );
        self.legend.draw(svg, plot.left, plot.bottom() + 50.0);
    }
}

impl Legend {
    fn draw(&self, svg: &mut Svg, left: f64, top: f64) {
        let mut x = left;
        for (fill, words) in &self.swatches {
            svg.rect(Area { left: x, top, width: 12.0, height: 12.0 }, fill, 2.5);
            svg.text((x + 18.0, top + 10.5), words, TICK);
            x += 18.0 + 6.6 * words.chars().count() as f64 + 18.0;
        }
        let Some(ramp) = &self.ramp else { return };
        svg.text((x, top + 10.5), &ramp.low, TICK);
        x += 6.3 * ramp.low.chars().count() as f64 + 8.0;
        let width = 110.0 / ramp.fills.len().max(1) as f64;
        for fill in &ramp.fills {
            // Each a little wider than its share, so that no seam shows.
            svg.rect(Area { left: x, top, width: width + 0.4, height: 12.0 }, fill, 0.0);
            x += width;
        }
        svg.text((x + 8.0, top + 10.5), &ramp.high, TICK);
    }
}

/// About eight labels for `count` places, the first and the last among them.
#[must_use]
pub(crate) fn sparse_labels(count: usize) -> Vec<(usize, String)> {
    let step = count.div_ceil(8).max(1);
    let last = count.saturating_sub(1);
    let keep =
        |index: &usize| *index == last || (index.is_multiple_of(step) && last - index >= step.div_ceil(2));
    (0..count).filter(keep).map(|index| (index, index.to_string())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_few_and_do_not_crowd() {
        for count in [1, 2, 8, 9, 30, 80, 1000] {
            let labels = sparse_labels(count);
            assert!(labels.len() <= 10, "{count}: {labels:?}");
            assert_eq!(labels.last().map(|(index, _)| *index), Some(count - 1));
        }
        assert!(sparse_labels(0).is_empty());
    }

    #[test]
    fn a_panel_survives_any_values() {
        for points in [vec![], vec![(0.0, f64::NAN)], vec![(3.0, 0.0)], vec![(0.0, 1e300), (1.0, -1e300)]] {
            let mut svg = Svg::default();
            let panel = LinePanel {
                title: "loss",
                subtitle: String::new(),
                points,
                colour: colour::LEAF,
                noisy: true,
                filled: true,
                marks: &[0.0],
            };
            panel.draw(&mut svg, Area { left: 0.0, top: 0.0, width: 300.0, height: 200.0 });
            let text = svg.finish(300.0, 200.0);
            assert!(!text.contains("NaN") && !text.contains("inf"), "{text}");
        }
    }
}
