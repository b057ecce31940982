//! A plain-http proxy in front of the API server that can hold or lose a request, cut all connections, or spoil an answer:
//! how a crash between two steps, a network that swallows, a watch that was down, and an object that nobody can decode are
//! made without hooks in the product.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use axum::Router;
use axum::body::{Body, to_bytes};
use axum::extract::{Request, State};
use axum::http::{HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use futures::StreamExt;
use kube::config::Kubeconfig;
use secrecy::ExposeSecret;
use tokio::sync::{Notify, watch};

use super::cluster::Cluster;

/// The agent of whoever comes through a proxy, in the audit log.
pub const AGENT: HeaderValue = HeaderValue::from_static("proxied");

pub struct Proxy {
    shared: Arc<Shared>,
    /// For an operator that is to go through this proxy.
    pub kubeconfig: PathBuf,
}

struct Shared {
    server: String,
    token: String,
    http: reqwest::Client,
    hold: Mutex<Option<Arc<Hold>>>,
    cut: watch::Sender<bool>,
    lost: watch::Sender<Vec<(&'static str, String)>>,
    spoiled: Mutex<Vec<Spoiled>>,
}

/// In answers to requests with this piece of path, a text is replaced.
struct Spoiled {
    path: String,
    text: String,
    by: String,
}

/// A request that is held when it comes.
pub struct Hold {
    method: &'static str,
    path: String,
    /// Whether it is held before the API server sees it, or the answer after.
    after: bool,
    reached: Notify,
    released: Notify,
}

impl Hold {
    /// Completes when the request is held.
    pub async fn reached(&self) {
        tokio::time::timeout(super::SOON, self.reached.notified())
            .await
            .unwrap_or_else(|_| panic!("no {} {} came", self.method, self.path));
    }

    /// Lets it go on.
    pub fn release(&self) {
        self.released.notify_one();
    }
}

impl Proxy {
    pub async fn start(cluster: &Cluster, name: &str) -> Self {
        let real = Kubeconfig::read_from(&cluster.kubeconfig).expect("a kubeconfig");
        let token = real.auth_infos[0]
            .auth_info
            .as_ref()
            .and_then(|a| a.token.clone())
            .expect("a token");
        let ca = real.clusters[0]
            .cluster
            .as_ref()
            .and_then(|c| c.certificate_authority_data.clone())
            .expect("a CA");
        let ca = base64::Engine::decode(&base64::engine::general_purpose::STANDARD, ca).expect("base64");
        let http = reqwest::Client::builder()
            .no_proxy()
            .tls_certs_only(reqwest::Certificate::from_pem_bundle(&ca).expect("PEM"))
            .build()
            .expect("a client");
        let shared = Arc::new(Shared {
            server: cluster.server.clone(),
            token: token.expose_secret().to_owned(),
            http,
            hold: Mutex::default(),
            cut: watch::Sender::new(false),
            lost: watch::Sender::default(),
            spoiled: Mutex::default(),
        });
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let app = Router::new().fallback(forward).with_state(shared.clone());
        tokio::spawn(async move { axum::serve(listener, app).await });
        let kubeconfig = Path::new(cluster.ready["dir"].as_str().expect("a folder")).join(format!("{name}.kubeconfig"));
        let text = format!(
            "{{apiVersion: v1, kind: Config, current-context: p, users: [{{name: p, user: {{}}}}],
             clusters: [{{name: p, cluster: {{server: \"http://{address}\"}}}}],
             contexts: [{{name: p, context: {{cluster: p, user: p}}}}]}}"
        );
        std::fs::write(&kubeconfig, text).expect("written");
        Self { shared, kubeconfig }
    }

    /// Holds the next request with this method and piece of path, before the API server sees it.
    pub fn hold_before(&self, method: &'static str, path: &str) -> Arc<Hold> {
        self.hold(method, path, false)
    }

    /// Holds the answer to the next such request: the API server has done it.
    pub fn hold_after(&self, method: &'static str, path: &str) -> Arc<Hold> {
        self.hold(method, path, true)
    }

    fn hold(&self, method: &'static str, path: &str, after: bool) -> Arc<Hold> {
        let hold = Arc::new(Hold {
            method,
            path: path.to_owned(),
            after,
            reached: Notify::new(),
            released: Notify::new(),
        });
        *self.shared.hold.lock().expect("not poisoned") = Some(hold.clone());
        hold
    }

    /// Replaces a text in whole answers (not in watches) to requests with this piece of path.
    pub fn spoil(&self, path: &str, text: &str, by: &str) {
        let [path, text, by] = [path, text, by].map(str::to_owned);
        let mut spoiled = self.shared.spoiled.lock().expect("not poisoned");
        spoiled.push(Spoiled { path, text, by });
    }

    /// Loses all requests with this method and piece of path: they get no answer, and the API server never sees them.
    pub fn lose(&self, method: &'static str, path: &str) {
        self.shared
            .lost
            .send_modify(|lost| lost.push((method, path.to_owned())));
    }

    /// Loses nothing more.
    pub fn find(&self) {
        self.shared.lost.send_replace(Vec::new());
    }

    /// Ends all answers that are under way, as an API server does with a watch after a while.
    pub fn hang_up(&self) {
        self.shared.cut.send_replace(false);
    }

    /// Ends all connections and refuses new ones, or lets them pass again.
    pub fn cut(&self, cut: bool) {
        self.shared.cut.send_replace(cut);
    }
}

impl Shared {
    /// How the answer to a request of this path is spoilt, if it is.
    fn spoiling(&self, path: &str) -> Option<impl Fn(String) -> String + use<>> {
        let spoiled = self.spoiled.lock().expect("not poisoned");
        let these = spoiled
            .iter()
            .filter(|s| path.contains(&s.path) && !path.contains("watch=true"));
        let these: Vec<(String, String)> = these.map(|s| (s.text.clone(), s.by.clone())).collect();
        let any = !these.is_empty();
        let spoil = move |body| {
            these
                .iter()
                .fold(body, |body: String, (text, by)| body.replace(text, by))
        };
        any.then_some(spoil)
    }
}

async fn forward(State(shared): State<Arc<Shared>>, request: Request) -> Response {
    let mut cut = shared.cut.subscribe();
    if *cut.borrow_and_update() {
        return StatusCode::SERVICE_UNAVAILABLE.into_response();
    }
    let (parts, body) = request.into_parts();
    let path = parts.uri.path_and_query().map_or("/", |p| p.as_str()).to_owned();
    let mut lost = shared.lost.subscribe();
    let is_lost = lost
        .borrow_and_update()
        .iter()
        .any(|(method, piece)| *method == parts.method.as_str() && path.contains(piece));
    if is_lost {
        let _ = lost.changed().await;
        return StatusCode::GATEWAY_TIMEOUT.into_response();
    }
    let hold = {
        let mut next = shared.hold.lock().expect("not poisoned");
        let this = next
            .as_ref()
            .is_some_and(|h| h.method == parts.method.as_str() && path.contains(&h.path));
        if this { next.take() } else { None }
    };
    let wait = async |after: bool| {
        if let Some(hold) = hold.as_ref().filter(|h| h.after == after) {
            hold.reached.notify_one();
            hold.released.notified().await;
        }
    };
    wait(false).await;
    let body = to_bytes(body, 16 << 20).await.expect("a body");
    let mut headers = parts.headers;
    headers.remove("host");
    // So that the audit log tells who came this way.
    headers.insert("user-agent", AGENT);
    let sent = shared
        .http
        .request(parts.method, format!("{}{path}", shared.server))
        .headers(headers)
        .bearer_auth(&shared.token)
        .body(body)
        .send()
        .await;
    wait(true).await;
    let Ok(answer) = sent else {
        return StatusCode::BAD_GATEWAY.into_response();
    };
    let mut response = Response::builder().status(answer.status());
    if let Some(kind) = answer.headers().get("content-type") {
        response = response.header("content-type", kind);
    }
    if let Some(spoil) = shared.spoiling(&path) {
        let body = spoil(answer.text().await.unwrap_or_default());
        return response.body(Body::from(body)).expect("a response");
    }
    let cut = async move {
        // An error means that the proxy is gone.
        let _ = cut.changed().await;
    };
    let stream = answer.bytes_stream().take_until(Box::pin(cut));
    response.body(Body::from_stream(stream)).expect("a response")
}
