//! One picture with everything that a reader of a README wants to see.

use super::charts::{Chart, Part, channels, heads, kept_share, marks, over_steps};
use super::history::History;
use super::summary::tiles;
use super::svg::{Area, Svg, TextStyle, colour};

const WIDTH: f64 = 1240.0;
const MARGIN: f64 = 24.0;
const GAP: f64 = 16.0;
const HEAD: f64 = 74.0;
const TILE: f64 = 84.0;
const LINE: f64 = 250.0;
const MAP: f64 = 360.0;

/// The picture as SVG text.
#[must_use]
pub(crate) fn overview(history: &History) -> String {
    let marks = marks(history);
    let lines = over_steps(history, &marks);
    let maps: Vec<Chart<'_>> = [
        heads(history).or_else(|| kept_share(history, Part::Heads)),
        channels(history).or_else(|| kept_share(history, Part::Channels)),
    ]
    .into_iter()
    .flatten()
    .collect();
    let map_rows = if maps.is_empty() { 0.0 } else { MAP + GAP };
    let height = MARGIN + HEAD + TILE + GAP + 2.0 * (LINE + GAP) + map_rows - GAP + MARGIN;

    let mut svg = Svg::default();
    svg.rect(Area { left: 0.0, top: 0.0, width: WIDTH, height }, colour::PAGE, 0.0);
    svg.text((MARGIN, MARGIN + 26.0), &super::page::title(history), TextStyle::new(24.0, colour::INK).bold());
    svg.text((MARGIN, MARGIN + 50.0), &super::page::subtitle(history), TextStyle::new(14.0, colour::MUTED));
    let mut top = MARGIN + HEAD;
    let tiles = tiles(history);
    for (tile, area) in tiles.iter().zip(row(tiles.len(), top, TILE)) {
        svg.card(area);
        svg.text((area.left + 16.0, area.top + 24.0), &tile.name, TextStyle::new(12.5, colour::MUTED));
        svg.text((area.left + 16.0, area.top + 49.0), &tile.value, TextStyle::new(18.0, colour::INK).bold());
        svg.text((area.left + 16.0, area.top + 69.0), &tile.note, TextStyle::new(12.0, colour::MUTED));
    }
    top += TILE + GAP;
    for three in lines.chunks(3) {
        draw_row(&mut svg, three, top, LINE);
        top += LINE + GAP;
    }
    draw_row(&mut svg, &maps, top, MAP);
    svg.finish(WIDTH, height)
}

fn draw_row(svg: &mut Svg, charts: &[Chart<'_>], top: f64, height: f64) {
    for (chart, area) in charts.iter().zip(row(charts.len(), top, height)) {
        chart.draw(svg, area);
    }
}

/// `count` areas side by side.
fn row(count: usize, top: f64, height: f64) -> Vec<Area> {
    let width = (WIDTH - 2.0 * MARGIN - GAP * count.saturating_sub(1) as f64) / count.max(1) as f64;
    (0..count).map(|index| Area { left: MARGIN + index as f64 * (width + GAP), top, width, height }).collect()
}
