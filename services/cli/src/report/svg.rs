//! A picture as SVG text: the few shapes that the charts need, in fractions of a pixel.

use std::fmt::Write as _;

pub(crate) const FONT: &str =
    "system-ui, 'Segoe UI', Roboto, 'Helvetica Neue', 'DejaVu Sans', Arial, sans-serif";

/// Colours of the report.
pub(crate) mod colour {
    pub(crate) const INK: &str = "#22302a";
    pub(crate) const MUTED: &str = "#66756d";
    pub(crate) const GRID: &str = "#e7ece9";
    pub(crate) const CARD: &str = "#ffffff";
    pub(crate) const EDGE: &str = "#dde5e0";
    pub(crate) const PAGE: &str = "#f5f8f6";
    pub(crate) const LEAF: &str = "#2e7d52";
    pub(crate) const AMBER: &str = "#c9742b";
    pub(crate) const SKY: &str = "#3a6ea5";
    pub(crate) const PLUM: &str = "#7b5ea7";
}

/// A rectangle of the picture, in pixels.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Area {
    pub left: f64,
    pub top: f64,
    pub width: f64,
    pub height: f64,
}

impl Area {
    #[must_use]
    pub(crate) fn right(&self) -> f64 {
        self.left + self.width
    }

    #[must_use]
    pub(crate) fn bottom(&self) -> f64 {
        self.top + self.height
    }

    /// What is left inside after `left`, `top`, `right` and `bottom` are taken off.
    #[must_use]
    pub(crate) fn inset(&self, left: f64, top: f64, right: f64, bottom: f64) -> Self {
        Self {
            left: self.left + left,
            top: self.top + top,
            width: (self.width - left - right).max(1.0),
            height: (self.height - top - bottom).max(1.0),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Anchor {
    Start,
    Middle,
    End,
}

/// How a text looks.
#[derive(Debug, Clone, Copy)]
pub(crate) struct TextStyle {
    pub size: f64,
    pub colour: &'static str,
    pub bold: bool,
    pub anchor: Anchor,
}

impl TextStyle {
    #[must_use]
    pub(crate) const fn new(size: f64, colour: &'static str) -> Self {
        Self { size, colour, bold: false, anchor: Anchor::Start }
    }

    #[must_use]
    pub(crate) const fn bold(self) -> Self {
        Self { bold: true, ..self }
    }

    #[must_use]
    pub(crate) const fn anchored(self, anchor: Anchor) -> Self {
        Self { anchor, ..self }
    }
}

/// How a line looks.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Stroke {
    pub colour: &'static str,
    pub width: f64,
    pub opacity: f64,
    pub dashed: bool,
}

impl Stroke {
    #[must_use]
    pub(crate) const fn new(colour: &'static str, width: f64) -> Self {
        Self { colour, width, opacity: 1.0, dashed: false }
    }

    #[must_use]
    pub(crate) const fn opacity(self, opacity: f64) -> Self {
        Self { opacity, ..self }
    }

    #[must_use]
    pub(crate) const fn dashed(self) -> Self {
        Self { dashed: true, ..self }
    }
}

/// Collects shapes; later ones lie on top.
#[derive(Debug, Default)]
pub(crate) struct Svg(String);

impl Svg {
    pub(crate) fn rect(&mut self, area: Area, fill: &str, radius: f64) {
        self.titled_rect(area, fill, radius, "");
    }

    /// A rectangle that shows `title` under the pointer.
    pub(crate) fn titled_rect(&mut self, area: Area, fill: &str, radius: f64, title: &str) {
        let Area { left, top, width, height } = area;
        let _ = write!(
            self.0,
            "<rect x=\"{left:.2}\" y=\"{top:.2}\" width=\"{width:.2}\" height=\"{height:.2}\" fill=\"{fill}\""
        );
        if radius > 0.0 {
            let _ = write!(self.0, " rx=\"{radius}\"");
        }
        if title.is_empty() {
            self.0.push_str("/>\n");
        } else {
            let _ = writeln!(self.0, "><title>{}</title></rect>", escaped(title));
        }
    }

    /// A white card with a thin edge.
    pub(crate) fn card(&mut self, area: Area) {
        let Area { left, top, width, height } = area;
        let _ = writeln!(
            self.0,
            "<rect x=\"{left:.2}\" y=\"{top:.2}\" width=\"{width:.2}\" height=\"{height:.2}\" rx=\"10\" \
             fill=\"{}\" stroke=\"{}\"/>",
            colour::CARD,
            colour::EDGE
        );
    }

    pub(crate) fn line(&mut self, from: (f64, f64), to: (f64, f64), stroke: Stroke) {
        self.polyline(&[from, to], stroke);
    }

    pub(crate) fn polyline(&mut self, points: &[(f64, f64)], stroke: Stroke) {
        if points.len() < 2 {
            return;
        }
        let _ = write!(
            self.0,
            "<path d=\"{}\" fill=\"none\" stroke=\"{}\" stroke-width=\"{}\" stroke-linejoin=\"round\" \
             stroke-linecap=\"round\"",
            path_of(points),
            stroke.colour,
            stroke.width
        );
        if stroke.opacity < 1.0 {
            let _ = write!(self.0, " stroke-opacity=\"{}\"", stroke.opacity);
        }
        if stroke.dashed {
            self.0.push_str(" stroke-dasharray=\"2 4\"");
        }
        self.0.push_str("/>\n");
    }

    /// The area between `points` and the height `base`.
    pub(crate) fn filled(&mut self, points: &[(f64, f64)], base: f64, fill: &str, opacity: f64) {
        let (Some(first), Some(last)) = (points.first(), points.last()) else { return };
        let _ = writeln!(
            self.0,
            "<path d=\"{}L{:.2} {base:.2}L{:.2} {base:.2}Z\" fill=\"{fill}\" fill-opacity=\"{opacity}\"/>",
            path_of(points),
            last.0,
            first.0
        );
    }

    pub(crate) fn dot(&mut self, at: (f64, f64), radius: f64, fill: &str) {
        let _ = writeln!(
            self.0,
            "<circle cx=\"{:.2}\" cy=\"{:.2}\" r=\"{radius}\" fill=\"{fill}\"/>",
            at.0, at.1
        );
    }

    /// A text whose baseline starts, is centred or ends at `at`.
    pub(crate) fn text(&mut self, at: (f64, f64), text: &str, style: TextStyle) {
        let anchor = match style.anchor {
            Anchor::Start => "start",
            Anchor::Middle => "middle",
            Anchor::End => "end",
        };
        let weight = if style.bold { " font-weight=\"600\"" } else { "" };
        let _ = writeln!(
            self.0,
            "<text x=\"{:.2}\" y=\"{:.2}\" font-size=\"{}\" fill=\"{}\" text-anchor=\"{anchor}\"{weight}>{}</text>",
            at.0,
            at.1,
            style.size,
            style.colour,
            escaped(text)
        );
    }

    /// A text that reads from bottom to top.
    pub(crate) fn upright_text(&mut self, at: (f64, f64), text: &str, style: TextStyle) {
        let _ = writeln!(self.0, "<g transform=\"translate({:.2} {:.2}) rotate(-90)\">", at.0, at.1);
        self.text((0.0, 0.0), text, style);
        self.0.push_str("</g>\n");
    }

    /// The whole picture.
    #[must_use]
    pub(crate) fn finish(self, width: f64, height: f64) -> String {
        format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" width=\"{width}\" \
             height=\"{height}\" font-family=\"{FONT}\" role=\"img\">\n{}</svg>\n",
            self.0
        )
    }
}

fn path_of(points: &[(f64, f64)]) -> String {
    let mut path = String::with_capacity(points.len() * 14);
    for (index, (x, y)) in points.iter().enumerate() {
        let _ = write!(path, "{}{x:.2} {y:.2}", if index == 0 { 'M' } else { 'L' });
    }
    path
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

/// The colour at `share` (0 to 1) of the way along `stops`, each `(red, green, blue)`.
#[must_use]
pub(crate) fn blend(stops: &[(f64, f64, f64)], share: f64) -> String {
    let place = share.clamp(0.0, 1.0) * stops.len().saturating_sub(1) as f64;
    let index = (place.floor() as usize).min(stops.len().saturating_sub(2));
    let (Some(low), Some(high)) = (stops.get(index), stops.get(index + 1)) else {
        return colour::GRID.to_owned();
    };
    let along = place - index as f64;
    let mix = |low: f64, high: f64| (low + (high - low) * along).round() as u8;
    format!("#{:02x}{:02x}{:02x}", mix(low.0, high.0), mix(low.1, high.1), mix(low.2, high.2))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_cannot_leave_their_element() {
        let mut svg = Svg::default();
        svg.text((1.0, 2.0), "</text><script>", TextStyle::new(12.0, colour::INK));
        assert!(!svg.finish(10.0, 10.0).contains("<script>"));
    }

    #[test]
    fn colours_run_from_the_first_stop_to_the_last() {
        let stops = [(0.0, 0.0, 0.0), (255.0, 255.0, 255.0)];
        for (share, expected) in [(-1.0, "#000000"), (0.0, "#000000"), (1.0, "#ffffff"), (2.0, "#ffffff")] {
            assert_eq!(blend(&stops, share), expected);
        }
    }
}
