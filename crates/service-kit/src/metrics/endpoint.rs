//! The page that Prometheus reads, and beside it what a kubelet asks where gRPC is encrypted.

use crate::readiness;
use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use prometheus::{Encoder, Registry, TextEncoder};
use std::net::{SocketAddr, TcpListener};
use tracing::{info, warn};

/// Serves `GET /metrics`, `/healthz` (the process lives) and `/readyz` (it is ready for work) until the process ends. Call it inside a tokio runtime.
///
/// # Errors
/// When the address cannot be bound.
pub(crate) fn serve(address: SocketAddr, registry: Registry) -> std::io::Result<()> {
    let listener = TcpListener::bind(address)?;
    listener.set_nonblocking(true)?;
    let listener = tokio::net::TcpListener::from_std(listener)?;
    let address = listener.local_addr()?;
    let router = Router::new()
        .route("/metrics", get(page))
        .route("/healthz", get(async || StatusCode::OK))
        .route("/readyz", get(ready))
        .with_state(registry);
    tokio::spawn(async move {
        info!(%address, "metrics are served at /metrics");
        if let Err(error) = axum::serve(listener, router).await {
            warn!(%error, "metrics are not served any more");
        }
    });
    Ok(())
}

async fn ready() -> StatusCode {
    if readiness::is_ready() { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }
}

/// Observing reads locks that others hold for moments: off the async threads.
async fn page(State(registry): State<Registry>) -> Response {
    let made = tokio::task::spawn_blocking(move || {
        let mut text = Vec::new();
        TextEncoder::new().encode(&registry.gather(), &mut text).map(|()| text)
    });
    match made.await {
        Ok(Ok(text)) => ([(header::CONTENT_TYPE, prometheus::TEXT_FORMAT)], text).into_response(),
        Ok(Err(error)) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}
