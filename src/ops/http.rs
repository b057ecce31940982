//! The operator's own HTTP port: `/livez`, `/readyz`, `/metrics`.

use std::sync::Arc;

use axum::Router;
use axum::http::header::{ACCEPT, CONTENT_TYPE};
use axum::http::{HeaderMap, StatusCode};
use axum::response::IntoResponse;
use axum::routing::get;
use prometheus_client::registry::Registry;
use tokio::net::TcpListener;

use crate::ops::exposition::expose;
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
        .route(
            "/metrics",
            get(move |headers: HeaderMap| std::future::ready(metrics(&registry, &headers))),
        );
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

fn metrics(registry: &Registry, headers: &HeaderMap) -> impl IntoResponse + use<> {
    let accept = headers.get(ACCEPT).and_then(|value| value.to_str().ok());
    match expose(registry, accept.unwrap_or_default()) {
        Ok(shown) => ([(CONTENT_TYPE, shown.content_type)], shown.text).into_response(),
        Err(_) => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
    }
}
