//! A plain HTTP proxy in front of the API server. It can hold or lose a request, refuse or silence requests, answer
//! with an error, or change an answer. Tests use it to cause a crash between two steps, a network that drops packets, a
//! broken watch, a failing API server and an undecodable object, without hooks in the product.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use axum::Router;
use axum::body::{Body, to_bytes};
use axum::extract::{Request, State};
use axum::http::{HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use futures::StreamExt;
use kube::config::Kubeconfig;
use secrecy::ExposeSecret;
use serde_json::json;
use tokio::sync::{Notify, watch};

use super::cluster::Cluster;

/// The user agent in the audit log of requests that came through a proxy.
pub const AGENT: HeaderValue = HeaderValue::from_static("proxied");

pub struct Proxy {
    shared: Arc<Shared>,
    /// A kubeconfig for an operator behind this proxy.
    pub kubeconfig: PathBuf,
}

struct Shared {
    server: String,
    token: String,
    http: reqwest::Client,
    hold: Mutex<Option<Arc<Hold>>>,
    way: watch::Sender<Way>,
    hung_up: watch::Sender<()>,
    deadened: watch::Sender<()>,
    lost: watch::Sender<Vec<(&'static str, String)>>,
    errors: Mutex<Vec<Answered>>,
    spoiled: Mutex<Vec<Spoiled>>,
    count: AtomicUsize,
}

/// Whether the proxy forwards requests.
enum Way {
    Open,
    /// The proxy refuses requests whose path contains this text, and ends their watches.
    Refused(String),
    /// No answer arrives, and no connection ends.
    Silent,
}

impl Way {
    fn is_refused(&self, path: &str) -> bool {
        matches!(self, Self::Refused(piece) if path.contains(piece))
    }
}

/// The proxy answers the next `times` requests with this method and this text in the path by `status`, and does not
/// forward them.
struct Answered {
    method: &'static str,
    path: String,
    status: u16,
    times: usize,
}

/// The proxy replaces `text` in answers to requests whose path contains `path`.
struct Spoiled {
    path: String,
    text: String,
    by: String,
}

/// A request that the proxy holds.
pub struct Hold {
    method: &'static str,
    path: String,
    /// Whether the proxy holds the answer, after the API server has handled the request, or the request before that.
    after: bool,
    reached: Notify,
    released: Notify,
}

impl Hold {
    /// Waits until the proxy holds the request.
    pub async fn reached(&self) {
        tokio::time::timeout(super::SOON, self.reached.notified())
            .await
            .unwrap_or_else(|_| panic!("no request {} {} arrived", self.method, self.path));
    }

    /// Lets the request continue.
    pub fn release(&self) {
        self.released.notify_one();
    }
}

impl Proxy {
    pub async fn start(cluster: &Cluster, name: &str) -> Self {
        Self::before(cluster, &cluster.server, name).await
    }

    /// Starts a proxy in front of another API server of the cluster.
    pub async fn before(cluster: &Cluster, server: &str, name: &str) -> Self {
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
            server: server.to_owned(),
            token: token.expose_secret().to_owned(),
            http,
            hold: Mutex::default(),
            way: watch::Sender::new(Way::Open),
            hung_up: watch::Sender::default(),
            deadened: watch::Sender::default(),
            lost: watch::Sender::default(),
            errors: Mutex::default(),
            spoiled: Mutex::default(),
            count: AtomicUsize::new(0),
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

    /// Holds the next request with this method and this text in the path before the API server receives it.
    pub fn hold_before(&self, method: &'static str, path: &str) -> Arc<Hold> {
        self.hold(method, path, false)
    }

    /// Holds the answer to the next such request, after the API server has handled it.
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

    /// Replaces a text in answers to requests whose path contains `path`, except in watches.
    pub fn spoil(&self, path: &str, text: &str, by: &str) {
        let [path, text, by] = [path, text, by].map(str::to_owned);
        let mut spoiled = self.shared.spoiled.lock().expect("not poisoned");
        spoiled.push(Spoiled { path, text, by });
    }

    /// The number of requests so far.
    pub fn count(&self) -> usize {
        self.shared.count.load(Ordering::Relaxed)
    }

    /// Waits until the API server behind it is ready.
    pub async fn reached(&self) {
        super::eventually("the API server is ready", async || {
            let asked = self.shared.http.get(format!("{}/readyz", self.shared.server));
            let answer = asked.bearer_auth(&self.shared.token).send().await;
            answer.is_ok_and(|a| a.status().is_success())
        })
        .await;
    }

    /// Refuses requests whose path contains `path` (all if it is empty), and ends their watches. Answers in flight
    /// arrive.
    pub fn refuse(&self, path: &str) {
        self.shared.way.send_replace(Way::Refused(path.to_owned()));
    }

    /// Ends all answers in flight, as an API server ends a watch after some time.
    pub fn hang_up(&self) {
        self.shared.hung_up.send_replace(());
    }

    /// Stops all answers in flight without ending them, as when a firewall has dropped the state of their connections.
    /// New requests are forwarded.
    pub fn deaden(&self) {
        self.shared.deadened.send_replace(());
    }

    /// Stops all traffic without ending a connection, as when the network drops all packets.
    pub fn silence(&self) {
        self.shared.way.send_replace(Way::Silent);
    }

    /// Forwards all requests again.
    pub fn open(&self) {
        self.shared.way.send_replace(Way::Open);
    }

    /// Answers the next `times` requests with this method and this text in the path by this status.
    pub fn answer(&self, method: &'static str, path: &str, status: u16, times: usize) {
        let path = path.to_owned();
        let mut errors = self.shared.errors.lock().expect("not poisoned");
        errors.push(Answered {
            method,
            path,
            status,
            times,
        });
    }

    /// Whether all answers of [`Proxy::answer`] were given.
    pub fn answered(&self) -> bool {
        self.shared.errors.lock().expect("not poisoned").is_empty()
    }

    /// Loses all requests with this method and this text in the path: they get no answer, and the API server never
    /// receives them.
    pub fn lose(&self, method: &'static str, path: &str) {
        self.shared
            .lost
            .send_modify(|lost| lost.push((method, path.to_owned())));
    }

    /// Stops losing requests.
    pub fn find(&self) {
        self.shared.lost.send_replace(Vec::new());
    }
}

impl Shared {
    /// The error for this request, if a test has set one.
    fn error(&self, method: &str, path: &str) -> Option<Response> {
        let mut errors = self.errors.lock().expect("not poisoned");
        let this = errors
            .iter_mut()
            .find(|e| e.method == method && path.contains(&e.path))?;
        this.times -= 1;
        let code = this.status;
        errors.retain(|e| e.times > 0);
        let reason = if code == 403 { "Forbidden" } else { "Made" };
        let status = json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code, "reason": reason, "message": "made by a test"});
        let code = StatusCode::from_u16(code).expect("a status");
        Some((code, [("content-type", "application/json")], status.to_string()).into_response())
    }

    /// Waits while the proxy is silent.
    async fn heard(&self) {
        let mut way = self.way.subscribe();
        // This cannot fail: `self` holds the sender.
        let _ = way.wait_for(|way| !matches!(way, Way::Silent)).await;
    }

    /// The replacement for answers to this path, if a test has set one.
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
    let mut hung_up = shared.hung_up.subscribe();
    let deadened = shared.deadened.subscribe();
    let (parts, body) = request.into_parts();
    let path = parts.uri.path_and_query().map_or("/", |p| p.as_str()).to_owned();
    shared.count.fetch_add(1, Ordering::Relaxed);
    shared.heard().await;
    if shared.way.borrow().is_refused(&path) {
        return StatusCode::SERVICE_UNAVAILABLE.into_response();
    }
    if let Some(error) = shared.error(parts.method.as_str(), &path) {
        return error;
    }
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
    // Marks requests through the proxy in the audit log.
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
    shared.heard().await;
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
    let mut way = shared.way.subscribe();
    let ended = async move {
        // An error means that the proxy is gone.
        tokio::select! {
            _ = way.wait_for(|way| way.is_refused(&path) && path.contains("watch=true")) => {}
            _ = hung_up.changed() => {}
        }
    };
    let heard = answer.bytes_stream().then(move |chunk| {
        let (shared, deadened) = (shared.clone(), deadened.clone());
        async move {
            // An error means that the proxy is gone.
            if deadened.has_changed().unwrap_or(true) {
                std::future::pending::<()>().await;
            }
            shared.heard().await;
            chunk
        }
    });
    let stream = heard.take_until(Box::pin(ended));
    response.body(Body::from_stream(stream)).expect("a response")
}
