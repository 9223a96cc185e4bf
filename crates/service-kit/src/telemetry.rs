//! Logs to standard error; traces and metrics to an OTLP endpoint, and metrics to Prometheus.

use crate::metrics;
use opentelemetry::trace::TracerProvider;
use opentelemetry_otlp::WithExportConfig;
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::metrics::SdkMeterProvider;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::{SdkTracer, SdkTracerProvider};
use std::net::SocketAddr;
use std::time::Duration;
use tracing::Subscriber;
use tracing::level_filters::LevelFilter;
use tracing_subscriber::filter::{EnvFilter, ParseError, Targets};
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::prelude::*;

const FLUSH_TIMEOUT: Duration = Duration::from_secs(3);
/// What the libraries below us say is of interest only when asked for by name.
const QUIET: &str =
    "opentelemetry=warn,opentelemetry_sdk=warn,h2=warn,hyper=warn,hyper_util=warn,tonic=warn,tower=warn";

/// What is logged, and where traces go.
#[derive(Debug, Clone, clap::Args)]
pub struct LogArgs {
    /// What to log: a level, or directives such as `info,worker=debug`
    #[arg(long, env = "RUST_LOG", value_name = "DIRECTIVES", default_value = "info")]
    pub log_level: String,
    /// Form of the log lines on standard error
    #[arg(long, env = "ESPALIER_LOG_FORMAT", value_enum, default_value_t = LogFormat::Text)]
    pub log_format: LogFormat,
    /// Send traces and metrics to this OTLP/gRPC endpoint, such as http://localhost:4317
    #[arg(long, env = "OTEL_EXPORTER_OTLP_ENDPOINT", value_name = "URL")]
    pub otlp_endpoint: Option<String>,
    /// Serve metrics for Prometheus at http://ADDRESS/metrics; in plain text, to whoever reaches the address
    #[arg(long, env = "ESPALIER_METRICS_LISTEN", value_name = "ADDRESS")]
    pub metrics_listen: Option<SocketAddr>,
}

impl Default for LogArgs {
    fn default() -> Self {
        Self {
            log_level: "info".into(),
            log_format: LogFormat::Text,
            otlp_endpoint: None,
            metrics_listen: None,
        }
    }
}

/// Form of log lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum LogFormat {
    Text,
    Json,
}

/// Why logs or traces cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    #[error("--log-level `{directives}` is not a level or a list of target=level")]
    Directives {
        directives: String,
        #[source]
        cause: ParseError,
    },
    #[error("traces cannot be sent to `{endpoint}`")]
    Exporter {
        endpoint: String,
        #[source]
        cause: opentelemetry_otlp::ExporterBuildError,
    },
    #[error("metrics cannot be set up")]
    Metrics(#[source] opentelemetry_sdk::error::OTelSdkError),
    #[error("--metrics-listen {address} cannot be used; is another process listening there?")]
    MetricsListen {
        address: SocketAddr,
        #[source]
        cause: std::io::Error,
    },
    #[error("logging is already set up in this process")]
    AlreadySet,
}

/// Sends what is left of the traces when dropped, for at most three seconds.
#[derive(Debug)]
#[must_use = "traces are sent when this is dropped"]
pub struct Telemetry {
    provider: SdkTracerProvider,
    /// Absent where nobody asks for metrics.
    meters: Option<SdkMeterProvider>,
}

impl Drop for Telemetry {
    fn drop(&mut self) {
        // Nobody is left to hear of a failure but standard error.
        if let Err(error) = self.provider.shutdown_with_timeout(FLUSH_TIMEOUT) {
            eprintln!("the last traces were not sent: {error}");
        }
        if let Some(meters) = &self.meters
            && let Err(error) = meters.shutdown_with_timeout(FLUSH_TIMEOUT)
        {
            eprintln!("the last metrics were not sent: {error}");
        }
    }
}

/// Sets up logs on standard error and, when an endpoint is given, traces. Call it inside a tokio runtime, once.
///
/// # Errors
/// When the directives or the endpoint cannot be read.
pub fn init(service: &'static str, args: &LogArgs) -> Result<Telemetry, TelemetryError> {
    init_with_writer(service, args, std::io::stderr)
}

/// [`init`] with log lines written elsewhere, such as above a progress bar.
///
/// # Errors
/// When the directives or the endpoint cannot be read.
pub fn init_with_writer<W>(
    service: &'static str,
    args: &LogArgs,
    writer: W,
) -> Result<Telemetry, TelemetryError>
where
    W: for<'writer> MakeWriter<'writer> + Send + Sync + 'static,
{
    let provider = provider(service, args.otlp_endpoint.as_deref())?;
    let subscriber = subscriber(args, provider.tracer(service), writer)?;
    subscriber.try_init().map_err(|_| TelemetryError::AlreadySet)?;
    opentelemetry::global::set_text_map_propagator(TraceContextPropagator::new());
    opentelemetry::global::set_tracer_provider(provider.clone());
    let meters = meters(service, args)?;
    if let Some(meters) = &meters {
        opentelemetry::global::set_meter_provider(meters.clone());
    }
    Ok(Telemetry { provider, meters })
}

/// Metrics are kept only where somebody asks for them.
fn meters(service: &'static str, args: &LogArgs) -> Result<Option<SdkMeterProvider>, TelemetryError> {
    let endpoint = args.otlp_endpoint.as_deref().filter(|endpoint| !endpoint.is_empty());
    if endpoint.is_none() && args.metrics_listen.is_none() {
        return Ok(None);
    }
    let resource = Resource::builder().with_service_name(service).build();
    let mut builder = SdkMeterProvider::builder().with_resource(resource);
    if let Some(address) = args.metrics_listen {
        let registry = prometheus::Registry::new();
        let reader =
            opentelemetry_prometheus::exporter().with_registry(registry.clone()).scope_info_enabled(false);
        builder = builder.with_reader(reader.build().map_err(TelemetryError::Metrics)?);
        metrics::serve(address, registry)
            .map_err(|cause| TelemetryError::MetricsListen { address, cause })?;
    }
    if let Some(endpoint) = endpoint {
        let exporter = opentelemetry_otlp::MetricExporter::builder()
            .with_tonic()
            .with_endpoint(endpoint)
            .with_timeout(FLUSH_TIMEOUT)
            .build()
            .map_err(|cause| TelemetryError::Exporter { endpoint: endpoint.to_owned(), cause })?;
        builder = builder.with_periodic_exporter(exporter);
    }
    Ok(Some(builder.build()))
}

/// Spans get trace ids whether or not they are sent anywhere, so that logs of several processes can be joined.
fn provider(service: &'static str, endpoint: Option<&str>) -> Result<SdkTracerProvider, TelemetryError> {
    let resource = Resource::builder().with_service_name(service).build();
    let builder = SdkTracerProvider::builder().with_resource(resource);
    let Some(endpoint) = endpoint.filter(|endpoint| !endpoint.is_empty()) else {
        return Ok(builder.build());
    };
    let exporter = opentelemetry_otlp::SpanExporter::builder()
        .with_tonic()
        .with_endpoint(endpoint)
        .with_timeout(FLUSH_TIMEOUT)
        .build()
        .map_err(|cause| TelemetryError::Exporter { endpoint: endpoint.to_owned(), cause })?;
    Ok(builder.with_batch_exporter(exporter).build())
}

fn subscriber<W>(
    args: &LogArgs,
    tracer: SdkTracer,
    writer: W,
) -> Result<impl Subscriber + Send + Sync + use<W>, TelemetryError>
where
    W: for<'writer> MakeWriter<'writer> + Send + Sync + 'static,
{
    let directives = format!("{QUIET},{}", args.log_level);
    let filter = EnvFilter::try_new(directives)
        .map_err(|cause| TelemetryError::Directives { directives: args.log_level.clone(), cause })?;
    let lines = tracing_subscriber::fmt::layer().with_writer(writer);
    let lines = match args.log_format {
        LogFormat::Text => lines.with_ansi(false).with_filter(filter).boxed(),
        LogFormat::Json => lines.json().flatten_event(true).with_filter(filter).boxed(),
    };
    let spans = tracing_opentelemetry::layer().with_tracer(tracer).with_filter(
        Targets::new()
            .with_default(LevelFilter::INFO)
            .with_target("h2", LevelFilter::OFF)
            .with_target("hyper_util", LevelFilter::OFF)
            .with_target("opentelemetry", LevelFilter::OFF)
            .with_target("tonic", LevelFilter::OFF)
            .with_target("tower", LevelFilter::OFF),
    );
    Ok(tracing_subscriber::registry().with(lines).with(spans))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{self, Write};
    use std::sync::{Arc, Mutex};

    #[derive(Clone, Default)]
    struct Lines(Arc<Mutex<Vec<u8>>>);

    impl Write for Lines {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn logged(args: &LogArgs) -> String {
        let lines = Lines::default();
        let writer = lines.clone();
        let tracer = SdkTracerProvider::builder().build().tracer("test");
        let subscriber = subscriber(args, tracer, move || writer.clone()).unwrap();
        tracing::subscriber::with_default(subscriber, || {
            let _span = tracing::info_span!("run", run_id = "r1").entered();
            tracing::info!(generation = 3, "mask decided");
            tracing::debug!("detail");
            tracing::info!(target: "h2", "frame");
        });
        let bytes = lines.0.lock().unwrap().clone();
        String::from_utf8(bytes).unwrap()
    }

    #[test]
    fn json_lines_carry_fields_and_span() {
        let args = LogArgs { log_format: LogFormat::Json, ..LogArgs::default() };
        let text = logged(&args);
        assert_eq!(text.lines().count(), 1, "{text}");
        for part in
            [r#""message":"mask decided""#, r#""generation":3"#, r#""run_id":"r1""#, r#""level":"INFO""#]
        {
            assert!(text.contains(part), "{part} in {text}");
        }
    }

    #[test]
    fn directives_choose_what_is_logged() {
        for (directives, lines) in [("info", 1), ("debug", 2), ("error", 0), ("info,h2=info", 2), ("off", 0)]
        {
            let args = LogArgs { log_level: directives.into(), ..LogArgs::default() };
            assert_eq!(logged(&args).lines().count(), lines, "{directives}");
        }
    }

    #[test]
    fn directives_that_mean_nothing_are_refused() {
        let args = LogArgs { log_level: "info,worker=loud".into(), ..LogArgs::default() };
        let tracer = SdkTracerProvider::builder().build().tracer("test");
        let error = subscriber(&args, tracer, io::sink).err().expect("must be refused");
        assert!(error.to_string().contains("worker=loud"), "{error}");
    }

    #[tokio::test]
    async fn an_endpoint_that_is_no_url_is_named() {
        let error = provider("test", Some("not a url")).unwrap_err();
        assert!(error.to_string().contains("not a url"), "{error}");
    }
}
