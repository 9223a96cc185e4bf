//! Logs and traces of this command: `RUST_LOG` says what, `OTEL_EXPORTER_OTLP_ENDPOINT` where traces go.

use crate::failure::{Failure, OrBadInput};
use anyhow::Context;
use service_kit::telemetry::{LogArgs, Telemetry, init, init_with_writer};
use std::path::Path;
use std::sync::Mutex;

const SERVICE: &str = "espalier";

/// Logs to standard error, warnings only unless asked for more.
///
/// # Errors
/// When `RUST_LOG` or the endpoint cannot be read.
pub(crate) fn to_stderr() -> Result<Telemetry, Failure> {
    init(SERVICE, &arguments("warn")).or_bad_input()
}

/// Logs to a new file, the coordinator's among them.
///
/// # Errors
/// When the file cannot be created, or `RUST_LOG` or the endpoint cannot be read.
pub(crate) fn to_file(path: &Path) -> Result<Telemetry, Failure> {
    let file =
        std::fs::File::create(path).with_context(|| format!("failed to create `{}`", path.display()))?;
    init_with_writer(SERVICE, &arguments("info"), Mutex::new(file)).or_bad_input()
}

fn arguments(default_level: &str) -> LogArgs {
    LogArgs {
        log_level: std::env::var("RUST_LOG").unwrap_or_else(|_| default_level.to_owned()),
        otlp_endpoint: std::env::var("OTEL_EXPORTER_OTLP_ENDPOINT").ok(),
        ..LogArgs::default()
    }
}
