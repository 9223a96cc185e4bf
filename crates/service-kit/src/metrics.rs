//! Metrics: OpenTelemetry instruments, read by Prometheus at `/metrics` and sent to the OTLP endpoint where there is one.

pub mod catalogue;
mod endpoint;

pub(crate) use endpoint::serve;

use opentelemetry::metrics::{AsyncInstrument, Counter, Histogram, Meter};
use std::fmt;

const SCOPE: &str = "espalier";
/// Seconds, from a local call to a long step.
const SECONDS: [f64; 18] = [
    0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 300.0,
    1000.0,
];

/// A metric: its name by OpenTelemetry's conventions, and what it says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Metric {
    pub name: &'static str,
    pub kind: Kind,
    /// In UCUM, as OpenTelemetry has it: `s`, `By`, `{token}`; `1` for a ratio.
    pub unit: &'static str,
    pub attributes: &'static [&'static str],
    pub says: &'static str,
}

/// What its values mean over time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Only rises while the process lives.
    Counter,
    /// How values are spread.
    Histogram,
    /// As it is now.
    Gauge,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Counter => "counter",
            Self::Histogram => "histogram",
            Self::Gauge => "gauge",
        })
    }
}

/// Instruments of before [`crate::telemetry::init`] go nowhere.
fn meter() -> Meter {
    opentelemetry::global::meter(SCOPE)
}

impl Metric {
    /// A counter that is added to.
    #[must_use]
    pub fn counter(&self) -> Counter<u64> {
        meter().u64_counter(self.name).with_unit(self.unit).with_description(self.says).build()
    }

    /// A histogram of seconds.
    #[must_use]
    pub fn histogram(&self) -> Histogram<f64> {
        let meter = meter();
        let builder = meter.f64_histogram(self.name).with_unit(self.unit).with_description(self.says);
        builder.with_boundaries(SECONDS.to_vec()).build()
    }

    /// Calls `read` for the values whenever somebody looks: a gauge's as they are, a counter's since the start.
    pub fn observe(&self, read: impl Fn(&dyn AsyncInstrument<f64>) + Send + Sync + 'static) {
        let meter = meter();
        // What is built only names the instrument: the callback stays with the meter.
        match self.kind {
            Kind::Counter => {
                let _ = meter
                    .f64_observable_counter(self.name)
                    .with_unit(self.unit)
                    .with_description(self.says)
                    .with_callback(read)
                    .build();
            }
            Kind::Gauge | Kind::Histogram => {
                let _ = meter
                    .f64_observable_gauge(self.name)
                    .with_unit(self.unit)
                    .with_description(self.says)
                    .with_callback(read)
                    .build();
            }
        }
    }

    /// Its name as Prometheus shows it.
    #[must_use]
    pub fn prometheus_name(&self) -> String {
        let unit = match self.unit {
            "s" => "_seconds",
            "By" => "_bytes",
            unit if unit.ends_with("}/s") => "_per_second",
            "1" if self.kind == Kind::Gauge => "_ratio",
            _ => "",
        };
        let total = if self.kind == Kind::Counter { "_total" } else { "" };
        format!("{}{unit}{total}", self.name.replace('.', "_"))
    }
}
