//! The operator's own HTTP port: `/livez`, `/readyz`, `/metrics`.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::Bytes;
use axum::http::header::{ACCEPT, CONTENT_TYPE};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use prometheus_client::registry::Registry;
use tokio::net::TcpListener;
use tokio::sync::Mutex;

use crate::ops::exposition::{asks_for_open_metrics, expose};
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
    let scrapes = Arc::new(Scrapes {
        registry,
        last: Mutex::default(),
    });
    let app = Router::new()
        .route("/livez", get(move || answer(live())))
        .route("/readyz", get(move || answer(ready())))
        .route(
            "/metrics",
            get(move |headers: HeaderMap| scrapes.clone().answer(headers)),
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

/// Whoever reaches the port may ask, and a large fleet has much to tell: one at a time, away from the threads that renew
/// the lease, and all who ask within a moment share one text.
struct Scrapes {
    registry: Arc<Registry>,
    last: Mutex<Option<Scrape>>,
}

#[derive(Clone)]
struct Scrape {
    at: Instant,
    open_metrics: bool,
    content_type: &'static str,
    text: Bytes,
}

/// For how long a text is shown.
const MOMENT: Duration = Duration::from_millis(500);

impl Scrapes {
    async fn answer(self: Arc<Self>, headers: HeaderMap) -> Response {
        let accept = headers.get(ACCEPT).and_then(|value| value.to_str().ok());
        let open_metrics = accept.is_some_and(asks_for_open_metrics);
        let mut last = self.last.lock().await;
        let fresh = last
            .clone()
            .filter(|l| l.open_metrics == open_metrics && l.at.elapsed() < MOMENT);
        let scrape = match fresh {
            Some(scrape) => Some(scrape),
            None => self.clone().scrape(open_metrics).await,
        };
        last.clone_from(&scrape);
        drop(last);
        match scrape {
            Some(scrape) => ([(CONTENT_TYPE, scrape.content_type)], scrape.text).into_response(),
            None => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
        }
    }

    async fn scrape(self: Arc<Self>, open_metrics: bool) -> Option<Scrape> {
        let shown = tokio::task::spawn_blocking(move || expose(&self.registry, open_metrics)).await;
        let shown = shown.ok()?.ok()?;
        Some(Scrape {
            at: Instant::now(),
            open_metrics,
            content_type: shown.content_type,
            text: shown.text.into(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn each_probe_tells_of_its_own_question() {
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        for (live, ready) in [(true, true), (true, false), (false, true)] {
            let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
            let address = listener.local_addr().expect("an address");
            let shutdown = Shutdown::on_signal().expect("signals");
            let registry = Arc::new(Registry::default());
            let server = tokio::spawn(serve(
                listener,
                Arc::new(move || live),
                Arc::new(move || ready),
                registry,
                shutdown,
            ));
            for (path, good) in [("livez", live), ("readyz", ready)] {
                let answer = reqwest::get(format!("http://{address}/{path}"))
                    .await
                    .expect("an answer");
                assert_eq!(answer.status().as_u16(), if good { 200 } else { 503 }, "{path}");
            }
            server.abort();
        }
    }
}
