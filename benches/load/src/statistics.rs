//! What many samples come to.

use anyhow::Context as _;
use std::time::Duration;

/// Samples, sorted.
#[derive(Debug, Clone, Default)]
pub(crate) struct Sorted(Vec<Duration>);

impl Sorted {
    pub(crate) fn of(mut samples: Vec<Duration>) -> Self {
        samples.sort_unstable();
        Self(samples)
    }

    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    /// The sample that this share of all does not exceed; zero without samples.
    pub(crate) fn quantile(&self, share: f64) -> Duration {
        let last = self.0.len().saturating_sub(1);
        let place = (share * self.0.len() as f64).ceil() as usize;
        self.0.get(place.saturating_sub(1).min(last)).copied().unwrap_or_default()
    }
}

/// `1.2 ms`, `340 µs`, `2.1 s`.
pub(crate) fn in_words(duration: Duration) -> String {
    let seconds = duration.as_secs_f64();
    match seconds {
        _ if seconds >= 1.0 => format!("{seconds:.2} s"),
        _ if seconds >= 1e-3 => format!("{:.1} ms", seconds * 1e3),
        _ => format!("{:.0} µs", seconds * 1e6),
    }
}

/// Resident memory of a process, in bytes.
pub(crate) fn resident_bytes(process_id: u32) -> anyhow::Result<u64> {
    let text =
        std::fs::read_to_string(format!("/proc/{process_id}/status")).context("the process is gone")?;
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("it has no VmRSS")?;
    let kib: u64 = line.trim().trim_end_matches("kB").trim().parse().context("VmRSS is no number")?;
    Ok(kib * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quantile_is_a_sample_that_so_many_do_not_exceed() {
        let samples = Sorted::of((1..=100).rev().map(Duration::from_millis).collect());
        for (share, expected) in [(0.0, 1), (0.5, 50), (0.99, 99), (1.0, 100)] {
            assert_eq!(samples.quantile(share), Duration::from_millis(expected));
        }
        assert_eq!(Sorted::default().quantile(0.5), Duration::ZERO);
    }
}
