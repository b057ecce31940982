//! The server that a case runs on: the stand-in, or a real ZITADEL.

use std::io::Write;
use std::panic::{AssertUnwindSafe, resume_unwind};
use std::sync::{Mutex, Once};
use std::time::{Duration, SystemTime};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use futures::FutureExt;
use k8s_openapi::jiff::{SignedDuration, Timestamp};
use reqwest::Method;
use secrecy::{ExposeSecret, SecretString};
use serde_json::{Value, json};
use zitadel_tokens::domain::key::{self, ServiceKey};
use zitadel_tokens::domain::scope;
use zitadel_tokens::zitadel::Instance;

use super::client::{connect, settings};
use super::support::issuer::Issuer;

/// The kinds of access tokens, one per user (§4.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Jwt,
    Opaque,
}

pub enum Server {
    StandIn(Issuer),
    Zitadel(Zitadel),
}

/// Runs a case on the stand-in or, with `CONTRACT_SERVER=zitadel`, on the server of `TEST_ZITADEL_URL`. Users that
/// the case made there are deleted, also when it fails.
pub async fn on_any_server(case: impl AsyncFnOnce(&Server)) {
    let server = match std::env::var("CONTRACT_SERVER").as_deref() {
        Ok("zitadel") => Server::Zitadel(Zitadel::from_environment().await),
        Ok(other) => panic!("CONTRACT_SERVER is zitadel or not set, but not {other:?}"),
        Err(_) => Server::StandIn(Issuer::start(&[])),
    };
    let outcome = AssertUnwindSafe(case(&server)).catch_unwind().await;
    if let Server::Zitadel(zitadel) = &server {
        zitadel.clean_up().await;
    }
    if let Err(panic) = outcome {
        resume_unwind(panic);
    }
}

impl Server {
    pub fn issuer(&self) -> &str {
        match self {
            Self::StandIn(issuer) => &issuer.url,
            Self::Zitadel(zitadel) => &zitadel.issuer,
        }
    }

    /// A new connection, which knows nothing yet.
    pub fn instance(&self) -> Instance {
        connect(settings(self.issuer()))
    }

    /// The organization of the users.
    pub fn organization(&self) -> &str {
        match self {
            // defaultOrganizationID in tests/testbed/issuer/control.go.
            Self::StandIn(_) => "401085856582143014",
            Self::Zitadel(zitadel) => &zitadel.organization,
        }
    }

    /// A new service user and a key of it.
    pub async fn user(&self, kind: Kind) -> ServiceKey {
        match self {
            Self::StandIn(issuer) => {
                let user = issuer.user(json!({"tokenType": stand_in_kind(kind)})).await;
                key::parse(user.key.as_bytes()).expect("a key file")
            }
            Self::Zitadel(zitadel) => {
                let id = zitadel.user(kind).await;
                zitadel.key(&id, Duration::from_hours(1)).await
            }
        }
    }

    /// Another key of a user, good for a few seconds: few enough to wait for, and enough to be used before.
    pub async fn short_key(&self, user: &str) -> ServiceKey {
        match self {
            Self::StandIn(issuer) => {
                let end = Timestamp::now() + SignedDuration::from_secs(5);
                let (_, file) = issuer.key(user, json!({"expirationDate": end.to_string()})).await;
                key::parse(file.as_bytes()).expect("a key file")
            }
            Self::Zitadel(zitadel) => zitadel.key(user, Duration::from_secs(15)).await,
        }
    }

    pub async fn remove_key(&self, key: &ServiceKey) {
        match self {
            Self::StandIn(issuer) => issuer.remove_key(&key.user_id, &key.key_id).await,
            Self::Zitadel(zitadel) => {
                let path = format!("/v2/users/{}/keys/{}", key.user_id, key.key_id);
                zitadel.call(Method::DELETE, &path, None).await;
            }
        }
    }

    pub async fn deactivate(&self, user: &str) {
        match self {
            Self::StandIn(issuer) => issuer.change_user(user, json!({"state": "inactive"})).await,
            Self::Zitadel(zitadel) => zitadel.post(&format!("/v2/users/{user}/deactivate")).await,
        }
    }

    pub async fn reactivate(&self, user: &str) {
        match self {
            Self::StandIn(issuer) => issuer.change_user(user, json!({"state": "active"})).await,
            Self::Zitadel(zitadel) => zitadel.post(&format!("/v2/users/{user}/reactivate")).await,
        }
    }

    pub async fn change_kind(&self, user: &str, kind: Kind) {
        match self {
            Self::StandIn(issuer) => {
                issuer
                    .change_user(user, json!({"tokenType": stand_in_kind(kind)}))
                    .await;
            }
            Self::Zitadel(zitadel) => {
                let body = json!({"machine": {"accessTokenType": zitadel_kind(kind)}});
                zitadel
                    .call(Method::PATCH, &format!("/v2/users/{user}"), Some(body))
                    .await;
            }
        }
    }
}

fn stand_in_kind(kind: Kind) -> &'static str {
    match kind {
        Kind::Jwt => "JWT",
        Kind::Opaque => "BEARER",
    }
}

fn zitadel_kind(kind: Kind) -> &'static str {
    match kind {
        Kind::Jwt => "ACCESS_TOKEN_TYPE_JWT",
        Kind::Opaque => "ACCESS_TOKEN_TYPE_BEARER",
    }
}

/// A real server, with the token of an administrator (`IAM_OWNER`). The calls are those of §6.3 and §10.3: user v2,
/// so ZITADEL 4 or newer.
pub struct Zitadel {
    issuer: String,
    organization: String,
    token: SecretString,
    http: reqwest::Client,
    /// Ids of the users to delete.
    made: Mutex<Vec<String>>,
}

impl Zitadel {
    async fn from_environment() -> Self {
        let variable = |name: &str| std::env::var(name).unwrap_or_else(|_| panic!("{name} is not set"));
        let issuer = variable("TEST_ZITADEL_URL");
        let file = std::fs::read(variable("TEST_ZITADEL_ADMIN_KEY")).expect("TEST_ZITADEL_ADMIN_KEY is a file");
        let admin = key::parse(&file).expect("TEST_ZITADEL_ADMIN_KEY is a machine key file");
        let scope = scope::field(&scope::zitadel_api()).expect("clean scopes");
        let exchanged = connect(settings(&issuer)).exchange(&admin, &scope).await;
        let mut zitadel = Self {
            issuer,
            organization: String::new(),
            token: exchanged.expect("the administrator's token").answer.access_token,
            http: reqwest::Client::builder()
                .no_proxy()
                .timeout(Duration::from_secs(30))
                .build()
                .expect("a client"),
            made: Mutex::default(),
        };
        let iam = zitadel.call(Method::GET, "/management/v1/iam", None).await;
        zitadel.organization = text(&iam, "defaultOrgId");
        zitadel.say_version().await;
        zitadel
    }

    /// Once, and past the capture of test output: a result on a real server is worth what its version is.
    async fn say_version(&self) {
        static ONCE: Once = Once::new();
        let me = self.call(Method::GET, "/admin/v1/instances/me", None).await;
        let version = me["instance"]["version"].as_str().unwrap_or("of unknown version");
        ONCE.call_once(|| {
            // A result without its version is still one.
            let _ = writeln!(std::io::stderr(), "ZITADEL {version} at {}", self.issuer);
        });
    }

    async fn send(&self, method: Method, path: &str, body: Option<Value>) -> reqwest::Result<reqwest::Response> {
        let request = self
            .http
            .request(method, format!("{}{path}", self.issuer))
            .bearer_auth(self.token.expose_secret());
        match body {
            Some(body) => request.json(&body).send().await,
            None => request.send().await,
        }
    }

    async fn call(&self, method: Method, path: &str, body: Option<Value>) -> Value {
        let answer = self.send(method, path, body).await.expect("the server answers");
        let status = answer.status();
        let text = answer.text().await.expect("a body");
        assert!(status.is_success(), "{path}: {status} {text}");
        serde_json::from_str(&text).expect("JSON")
    }

    async fn post(&self, path: &str) {
        self.call(Method::POST, path, Some(json!({}))).await;
    }

    async fn user(&self, kind: Kind) -> String {
        let now = SystemTime::now()
            .duration_since(SystemTime::UNIX_EPOCH)
            .expect("a time");
        let name = format!("zitadel-tokens-contract-{}-{}", std::process::id(), now.as_nanos());
        let body = json!({
            "organizationId": self.organization,
            "username": name,
            "machine": {"name": name, "accessTokenType": zitadel_kind(kind)},
        });
        let id = text(&self.call(Method::POST, "/v2/users/new", Some(body)).await, "id");
        self.made.lock().expect("not poisoned").push(id.clone());
        id
    }

    async fn key(&self, user: &str, life: Duration) -> ServiceKey {
        let end = Timestamp::now() + SignedDuration::try_from(life).expect("short");
        let body = json!({"expirationDate": end.to_string()});
        let made = self
            .call(Method::POST, &format!("/v2/users/{user}/keys"), Some(body))
            .await;
        let file = STANDARD.decode(text(&made, "keyContent")).expect("base64");
        let key = key::parse(&file).expect("a key file");
        self.await_projection(&key).await;
        key
    }

    /// A key that was made a moment ago may be refused at first (§2, §9.5): nothing tells when that is over, hence
    /// the retries, here and nowhere else.
    async fn await_projection(&self, key: &ServiceKey) {
        let instance = connect(settings(&self.issuer));
        for _ in 0..120 {
            if instance.exchange(key, "openid").await.is_ok() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
        panic!("a new key is still refused after a minute");
    }

    /// Deletes what was made. A failure here is told, but does not hide how the case ended.
    async fn clean_up(&self) {
        let made = std::mem::take(&mut *self.made.lock().expect("not poisoned"));
        for user in made {
            let outcome = self.send(Method::DELETE, &format!("/v2/users/{user}"), None).await;
            if let Err(e) = outcome.and_then(reqwest::Response::error_for_status) {
                eprintln!("user {user} could not be deleted: {e}");
            }
        }
    }
}

fn text(answer: &Value, field: &str) -> String {
    answer[field]
        .as_str()
        .unwrap_or_else(|| panic!("no {field}"))
        .to_owned()
}
