//! From values to places and to the words beside an axis.

/// A linear scale from values to pixels.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Scale {
    low: f64,
    high: f64,
    from_pixel: f64,
    to_pixel: f64,
}

impl Scale {
    /// `low` falls on `from_pixel`, `high` on `to_pixel`.
    #[must_use]
    pub(crate) fn new(low: f64, high: f64, from_pixel: f64, to_pixel: f64) -> Self {
        let high = if high > low { high } else { low + 1.0 };
        Self { low, high, from_pixel, to_pixel }
    }

    #[must_use]
    pub(crate) fn at(&self, value: f64) -> f64 {
        let share = (value - self.low) / (self.high - self.low);
        self.from_pixel + share * (self.to_pixel - self.from_pixel)
    }
}

/// Round values from the first at or below `low` to the first at or above `high`, about `count` of them.
#[must_use]
pub(crate) fn ticks(low: f64, high: f64, count: usize) -> Vec<f64> {
    let span = if high > low { high - low } else { low.abs().max(1.0) };
    let step = round_step(span / count.max(1) as f64);
    let first = (low / step + 1e-9).floor();
    let last = ((low + span) / step - 1e-9).ceil();
    // A step is at least a tenth of the span's share, so this is a short list whatever the values.
    (0..=(last - first).min(1000.0) as u64).map(|index| (first + index as f64) * step).collect()
}

/// 1, 2 or 5 times a power of ten, at least `least`.
fn round_step(least: f64) -> f64 {
    let magnitude = 10f64.powf(least.log10().floor());
    [1.0, 2.0, 5.0, 10.0]
        .into_iter()
        .map(|factor| factor * magnitude)
        .find(|step| *step >= least * 0.999)
        .unwrap_or(10.0 * magnitude)
}

/// Values of one axis with as many decimals as tell neighbours apart.
#[must_use]
pub(crate) fn labels(ticks: &[f64]) -> Vec<String> {
    let step = match ticks {
        [first, second, ..] => (second - first).abs(),
        [] | [_] => 1.0,
    };
    let largest = ticks.iter().fold(0f64, |most, tick| most.max(tick.abs()));
    if largest > 0.0 && largest < 1e-3 {
        return ticks
            .iter()
            .map(|tick| if *tick == 0.0 { "0".to_owned() } else { format!("{tick:.0e}") })
            .collect();
    }
    let decimals = if step > 0.0 { (-step.log10().floor()).clamp(0.0, 6.0) as usize } else { 0 };
    ticks.iter().map(|tick| format!("{:.decimals$}", if *tick == 0.0 { 0.0 } else { *tick })).collect()
}

/// At most `most` points in the place of many: the means of runs of neighbours.
#[must_use]
pub(crate) fn thinned(points: Vec<(f64, f64)>, most: usize) -> Vec<(f64, f64)> {
    let run = points.len().div_ceil(most.max(1));
    if run <= 1 {
        return points;
    }
    let mean = |part: &[(f64, f64)]| {
        let (x, y) = part.iter().fold((0.0, 0.0), |(x, y), point| (x + point.0, y + point.1));
        (x / part.len() as f64, y / part.len() as f64)
    };
    points.chunks(run).map(mean).collect()
}

/// At most `most` places out of `count`, evenly spread, the last among them.
#[must_use]
pub(crate) fn spread(count: usize, most: usize) -> Vec<usize> {
    let shown = count.min(most.max(1));
    (1..=shown).map(|index| index * count / shown - 1).collect()
}

/// A running mean over the last `window` values: what an eye follows in a noisy line.
#[must_use]
pub(crate) fn smoothed(values: &[f64], window: usize) -> Vec<f64> {
    let window = window.max(1);
    (0..values.len())
        .map(|index| {
            let recent = &values[index.saturating_sub(window - 1)..=index];
            recent.iter().sum::<f64>() / recent.len() as f64
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_cover_the_values() {
        for (low, high) in [(0.0, 1.0), (2.31, 4.87), (0.0, 1.7e9), (3.0, 3.0), (0.0, 1e-4), (-2.0, 5.0)] {
            let ticks = ticks(low, high, 5);
            assert!(ticks.len() >= 2 && ticks.len() <= 12, "{ticks:?}");
            assert!(ticks[0] <= low + 1e-9 && ticks[ticks.len() - 1] >= high - 1e-9, "{ticks:?}");
        }
        assert_eq!(labels(&ticks(0.0, 1.0, 5)), ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]);
        assert_eq!(labels(&ticks(0.0, 100.0, 5)), ["0", "20", "40", "60", "80", "100"]);
        assert_eq!(labels(&ticks(0.0, 1e-4, 2))[0], "0");
    }

    #[test]
    fn many_points_become_few_and_few_stay() {
        let points: Vec<(f64, f64)> = (0..10).map(|index| (f64::from(index), 1.0)).collect();
        assert_eq!(thinned(points.clone(), 10), points);
        assert_eq!(thinned(points, 5), [(0.5, 1.0), (2.5, 1.0), (4.5, 1.0), (6.5, 1.0), (8.5, 1.0)]);
        assert!(thinned(Vec::new(), 5).is_empty());
        assert_eq!(spread(3, 9), [0, 1, 2]);
        assert_eq!(spread(10, 4), [1, 4, 6, 9]);
        assert!(spread(0, 4).is_empty());
    }

    #[test]
    fn smoothing_keeps_length_and_level() {
        assert_eq!(smoothed(&[1.0, 3.0, 5.0], 2), [1.0, 2.0, 4.0]);
        assert!(smoothed(&[], 9).is_empty());
    }
}
