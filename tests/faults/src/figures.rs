//! How long faults go unnoticed, and how long a run takes to be past where they found it.

use crate::script::KINDS;
use std::fmt;
use std::time::Duration;

/// What was measured of one fault. An absent time says that there was nothing to measure, as of a spare worker.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Measured {
    /// Place in [`KINDS`].
    pub(crate) kind: usize,
    pub(crate) detected: Option<Duration>,
    pub(crate) recovered: Option<Duration>,
}

/// Times of many faults, by kind.
#[derive(Debug, Default)]
pub struct Figures {
    measured: Vec<Measured>,
}

impl Figures {
    pub(crate) fn extend(&mut self, measured: impl IntoIterator<Item = Measured>) {
        self.measured.extend(measured);
    }
}

fn median_and_worst(mut times: Vec<Duration>) -> [String; 2] {
    times.sort_unstable();
    let shown =
        |time: Option<&Duration>| time.map_or("–".to_owned(), |time| format!("{:.2}", time.as_secs_f64()));
    [shown(times.get(times.len() / 2)), shown(times.last())]
}

impl fmt::Display for Figures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "| fault | done | noticed | median s | worst s | recovered | median s | worst s |")?;
        writeln!(f, "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")?;
        for (kind, name) in KINDS.iter().enumerate() {
            let of_kind: Vec<&Measured> = self.measured.iter().filter(|fault| fault.kind == kind).collect();
            let detected: Vec<Duration> = of_kind.iter().filter_map(|fault| fault.detected).collect();
            let recovered: Vec<Duration> = of_kind.iter().filter_map(|fault| fault.recovered).collect();
            let (done, noticed, past) = (of_kind.len(), detected.len(), recovered.len());
            let [median_detected, worst_detected] = median_and_worst(detected);
            let [median_recovered, worst_recovered] = median_and_worst(recovered);
            writeln!(
                f,
                "| {name} | {done} | {noticed} | {median_detected} | {worst_detected} | {past} | {median_recovered} \
                 | {worst_recovered} |"
            )?;
        }
        Ok(())
    }
}
