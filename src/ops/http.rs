//! The operator's own HTTP port: `/livez`, `/readyz`, `/metrics`.

use std::sync::Arc;

use axum::Router;
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::IntoResponse;
use axum::routing::get;
use prometheus_client::registry::Registry;
use tokio::net::TcpListener;

use crate::ops::shutdown::Shutdown;

/// A question about the process, asked at each probe.
pub type Probe = Arc<dyn Fn() -> bool + Send + Sync>;

/// Serves until shutdown.
pub async fn serve(
    listener: TcpListener,
    live: Probe,
    ready: Probe,
    registry: Arc<Registry>,
    mut shutdown: Shutdown,
) -> std::io::Result<()> {
    let app = Router::new()
        .route("/livez", get(move || answer(live())))
        .route("/readyz", get(move || answer(ready())))
        .route("/metrics", get(move || std::future::ready(metrics(&registry))));
    axum::serve(listener, app)
        .with_graceful_shutdown(async move { shutdown.requested().await })
        .await
}

fn answer(good: bool) -> std::future::Ready<(StatusCode, &'static str)> {
    std::future::ready(if good {
        (StatusCode::OK, "ok\n")
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, "not yet\n")
    })
}

fn metrics(registry: &Registry) -> impl IntoResponse + use<> {
    let mut text = String::new();
    let status = match prometheus_client::encoding::text::encode(&mut text, registry) {
        Ok(()) => StatusCode::OK,
        Err(_) => StatusCode::INTERNAL_SERVER_ERROR,
    };
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    (status, [(CONTENT_TYPE, kind)], text)
}
