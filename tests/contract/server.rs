//! The server of a case: the stand-in or a real ZITADEL.

use std::fmt::Debug;
use std::io::Write;
use std::panic::{AssertUnwindSafe, resume_unwind};
use std::sync::{Mutex, Once, OnceLock};
use std::time::{Duration, Instant, SystemTime};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use futures::FutureExt;
use k8s_openapi::jiff::{SignedDuration, Timestamp};
use reqwest::{Method, StatusCode};
use secrecy::{ExposeSecret, SecretString};
use serde_json::{Value, json};
use zitadel_tokens::domain::key::{self, ServiceKey};
use zitadel_tokens::domain::scope;
use zitadel_tokens::zitadel::ZitadelClient;

use super::client::{Caller, connect, settings};
use super::support::issuer::Issuer;

/// The access token type of a user (docs/reference/zitadel-protocol.md#token-formats).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Jwt,
    Opaque,
}

/// A server and an administrator's token (`IAM_OWNER`). A case creates its users with it, by user v2 or, if the server
/// lacks that API (ZITADEL 3), by management v1.
pub struct Server {
    issuer: String,
    organization: String,
    admin: ServiceKey,
    token: SecretString,
    http: reqwest::Client,
    api: OnceLock<Api>,
    /// Ids of the created users, to be deleted at the end.
    made: Mutex<Vec<String>>,
    /// Paths of other created objects, to be deleted at the end, and their organizations.
    made_elsewhere: Mutex<Vec<(String, String)>>,
    /// Keeps the stand-in running during the case.
    stand_in: Option<Issuer>,
}

/// The API for users.
#[derive(Clone, Copy, Debug)]
enum Api {
    UserV2,
    ManagementV1,
}

/// Runs a case on the stand-in, with user v2 and without. With `CONTRACT_SERVER=zitadel` it runs on the server of
/// `TEST_ZITADEL_URL`. Users that the case created are deleted, also if the case fails.
pub async fn on_any_server(case: impl AsyncFn(&Server)) {
    match std::env::var("CONTRACT_SERVER").as_deref() {
        Ok("zitadel") => on(&Server::from_environment().await, &case).await,
        Ok(other) => panic!("CONTRACT_SERVER must be `zitadel` or unset, but is {other:?}"),
        Err(_) => {
            for user_v2 in [true, false] {
                on(&Server::stand_in(user_v2).await, &case).await;
            }
        }
    }
}

async fn on(server: &Server, case: &impl AsyncFn(&Server)) {
    let outcome = AssertUnwindSafe(case(server)).catch_unwind().await;
    server.clean_up().await;
    if let Err(panic) = outcome {
        eprintln!("the case failed on {} with API {:?}", server.issuer, server.api.get());
        resume_unwind(panic);
    }
}

impl Server {
    async fn from_environment() -> Self {
        let variable = |name: &str| std::env::var(name).unwrap_or_else(|_| panic!("{name} is not set"));
        let file = std::fs::read(variable("TEST_ZITADEL_ADMIN_KEY")).expect("TEST_ZITADEL_ADMIN_KEY is readable");
        let server = Self::with_administrator(variable("TEST_ZITADEL_URL"), &file, None).await;
        server.say_version().await;
        server
    }

    async fn stand_in(user_v2: bool) -> Self {
        let issuer = Issuer::start(&[]);
        issuer.settings(json!({"userV2": user_v2})).await;
        let admin = issuer.user(json!({"administrator": true})).await;
        Self::with_administrator(issuer.url.clone(), admin.key.as_bytes(), Some(issuer)).await
    }

    async fn with_administrator(issuer: String, key_file: &[u8], stand_in: Option<Issuer>) -> Self {
        let admin = key::parse(key_file).expect("a machine key file");
        let scope = scope::field(&scope::zitadel_api()).expect("clean scopes");
        let exchanged = connect(settings(&issuer)).exchange(&admin, &scope).await;
        let mut server = Self {
            issuer,
            organization: String::new(),
            admin,
            token: exchanged.expect("the administrator's token").answer.access_token,
            http: reqwest::Client::builder()
                .no_proxy()
                .timeout(Duration::from_secs(30))
                .build()
                .expect("a client"),
            api: OnceLock::new(),
            made: Mutex::default(),
            made_elsewhere: Mutex::default(),
            stand_in,
        };
        let iam = server.call(Method::GET, "/management/v1/iam", None).await;
        server.organization = text(&iam, "defaultOrgId");
        server
    }

    pub fn issuer(&self) -> &str {
        &self.issuer
    }

    /// A new client without any cached state.
    pub fn instance(&self) -> ZitadelClient {
        connect(settings(&self.issuer))
    }

    /// The organization of the users.
    pub fn organization(&self) -> &str {
        &self.organization
    }

    /// Creates a service user with a key, and waits until the token endpoint accepts the key.
    pub async fn user(&self, kind: Kind) -> ServiceKey {
        let id = self.make_user(&unique(), kind).await;
        self.made.lock().expect("not poisoned").push(id.clone());
        self.key(&id, Duration::from_hours(1)).await
    }

    /// The id of a user that the case may create.
    pub fn new_user_id(&self) -> String {
        let id = unique();
        self.made.lock().expect("not poisoned").push(id.clone());
        id
    }

    /// The administrator as a caller of ZITADEL's API.
    pub async fn administrator(&self) -> Caller {
        self.caller(&self.admin).await
    }

    /// The administrator's token, for requests that the product does not send.
    pub fn administrator_token(&self) -> &SecretString {
        &self.token
    }

    /// The user of a key as a caller of ZITADEL's API.
    pub async fn caller(&self, key: &ServiceKey) -> Caller {
        let client = self.instance();
        let token = client.api_token(key).await.expect("a token");
        Caller { client, token }
    }

    /// Creates a project, and returns its id.
    pub async fn project(&self) -> String {
        if let Some(stand_in) = &self.stand_in {
            return stand_in.project().await;
        }
        let path = "/management/v1/projects";
        let made = self.call(Method::POST, path, Some(json!({"name": unique()}))).await;
        let id = text(&made, "id");
        self.clean_up_later(format!("{path}/{id}"), &self.organization);
        id
    }

    /// Creates an organization, and returns its id.
    pub async fn other_organization(&self) -> String {
        if let Some(stand_in) = &self.stand_in {
            return stand_in.organization().await;
        }
        let made = self
            .call(Method::POST, "/management/v1/orgs", Some(json!({"name": unique()})))
            .await;
        let id = text(&made, "id");
        self.clean_up_later("/management/v1/orgs/me".into(), &id);
        id
    }

    /// Grants a project to an organization.
    pub async fn grant(&self, project: &str, organization: &str) {
        if let Some(stand_in) = &self.stand_in {
            return stand_in.grant(project, organization).await;
        }
        let path = format!("/management/v1/projects/{project}/grants");
        self.call(Method::POST, &path, Some(json!({"grantedOrgId": organization})))
            .await;
    }

    fn clean_up_later(&self, path: String, organization: &str) {
        let mut made = self.made_elsewhere.lock().expect("not poisoned");
        made.push((path, organization.to_owned()));
    }

    /// Adds a personal access token to a user, and returns its id and its text.
    pub async fn personal_access_token(&self, user: &str) -> (String, SecretString) {
        let end = Timestamp::now() + SignedDuration::from_hours(1);
        let body = json!({"expirationDate": end.to_string()});
        let made = self
            .call(Method::POST, &format!("/v2/users/{user}/pats"), Some(body))
            .await;
        (text(&made, "tokenId"), text(&made, "token").into())
    }

    pub async fn remove_personal_access_token(&self, user: &str, id: &str) {
        self.call(Method::DELETE, &format!("/v2/users/{user}/pats/{id}"), None)
            .await;
    }

    async fn make_user(&self, name: &str, kind: Kind) -> String {
        if !matches!(self.api.get(), Some(Api::ManagementV1)) {
            let machine = json!({"name": name, "accessTokenType": zitadel_kind(kind)});
            let body = json!({"organizationId": self.organization, "username": name, "machine": machine});
            let answer = self.send(Method::POST, "/v2/users/new", Some(body)).await;
            let answer = answer.expect("the server answers");
            let absent = [
                StatusCode::NOT_FOUND,
                StatusCode::METHOD_NOT_ALLOWED,
                StatusCode::NOT_IMPLEMENTED,
            ];
            if !absent.contains(&answer.status()) {
                self.api.get_or_init(|| Api::UserV2);
                return text(&json_of("/v2/users/new", answer).await, "id");
            }
            self.api.get_or_init(|| Api::ManagementV1);
        }
        let body = json!({"userName": name, "name": name, "accessTokenType": zitadel_kind(kind)});
        let made = self
            .call(Method::POST, "/management/v1/users/machine", Some(body))
            .await;
        text(&made, "userId")
    }

    /// Whether the server has user v2, known after the first user was created. ZITADEL 3 has not.
    pub fn has_user_v2(&self) -> bool {
        matches!(self.api.get().expect("a user was created"), Api::UserV2)
    }

    /// The API that created the users, and the path of a user in it.
    fn place(&self, user: &str) -> (Api, String) {
        match self.api.get() {
            Some(Api::UserV2) => (Api::UserV2, format!("/v2/users/{user}")),
            _ => (Api::ManagementV1, format!("/management/v1/users/{user}")),
        }
    }

    /// Creates another key that is valid for a few seconds: long enough to use it, short enough to wait for its expiry.
    pub async fn short_key(&self, user: &str) -> ServiceKey {
        let seconds = if self.stand_in.is_some() { 5 } else { 15 };
        self.key(user, Duration::from_secs(seconds)).await
    }

    async fn key(&self, user: &str, life: Duration) -> ServiceKey {
        let end = Timestamp::now() + SignedDuration::try_from(life).expect("short");
        let (api, place) = self.place(user);
        let (kind, content) = match api {
            Api::UserV2 => (None, "keyContent"),
            Api::ManagementV1 => (Some("KEY_TYPE_JSON"), "keyDetails"),
        };
        let body = json!({"type": kind, "expirationDate": end.to_string()});
        let made = self.call(Method::POST, &format!("{place}/keys"), Some(body)).await;
        let file = STANDARD.decode(text(&made, content)).expect("base64");
        let key = key::parse(&file).expect("a key file");
        let instance = self.instance();
        takes_effect(async || instance.exchange(&key, "openid").await, Result::is_ok)
            .await
            .expect("a token");
        key
    }

    pub async fn remove_key(&self, key: &ServiceKey) {
        let (_, place) = self.place(&key.user_id);
        let path = format!("{place}/keys/{}", key.key_id);
        self.call(Method::DELETE, &path, None).await;
    }

    pub async fn deactivate(&self, user: &str) {
        self.set_state(user, "deactivate").await;
    }

    pub async fn reactivate(&self, user: &str) {
        self.set_state(user, "reactivate").await;
    }

    async fn set_state(&self, user: &str, verb: &str) {
        let path = match self.place(user) {
            (Api::UserV2, place) => format!("{place}/{verb}"),
            (Api::ManagementV1, place) => format!("{place}/_{verb}"),
        };
        self.call(Method::POST, &path, Some(json!({}))).await;
    }

    /// Changes the user's access token type. Management v1 returns an error if the type stays the same.
    pub async fn change_kind(&self, user: &str, kind: Kind) {
        let machine = json!({"name": user, "accessTokenType": zitadel_kind(kind)});
        let (method, path, body) = match self.place(user) {
            (Api::UserV2, place) => (Method::PATCH, place, json!({"machine": machine})),
            (Api::ManagementV1, place) => (Method::PUT, format!("{place}/machine"), machine),
        };
        self.call(method, &path, Some(body)).await;
    }

    /// Prints the server's version once, past the capture of test output: a result on a real server needs its version.
    async fn say_version(&self) {
        static ONCE: Once = Once::new();
        let me = self.call(Method::GET, "/admin/v1/instances/me", None).await;
        let version = me["instance"]["version"].as_str().unwrap_or("of unknown version");
        ONCE.call_once(|| {
            // A result without its version still counts.
            let _ = writeln!(std::io::stderr(), "ZITADEL {version} at {}", self.issuer);
        });
    }

    async fn send(&self, method: Method, path: &str, body: Option<Value>) -> reqwest::Result<reqwest::Response> {
        self.send_as(Some(&self.token), method, path, body).await
    }

    /// Sends a request with a user's access token, or without one, and returns the answer with any status.
    pub async fn ask(&self, token: Option<&SecretString>, method: Method, path: &str, body: Option<Value>) -> Answer {
        let answer = self.send_as(token, method, path, body).await;
        let answer = answer.expect("the server answers");
        Answer {
            status: answer.status(),
            // An absent path may be answered without JSON.
            body: serde_json::from_str(&answer.text().await.expect("a body")).unwrap_or_default(),
        }
    }

    async fn send_as(
        &self,
        token: Option<&SecretString>,
        method: Method,
        path: &str,
        body: Option<Value>,
    ) -> reqwest::Result<reqwest::Response> {
        let mut request = self.http.request(method, format!("{}{path}", self.issuer));
        if let Some(token) = token {
            request = request.bearer_auth(token.expose_secret());
        }
        match body {
            Some(body) => request.json(&body).send().await,
            None => request.send().await,
        }
    }

    async fn call(&self, method: Method, path: &str, body: Option<Value>) -> Value {
        json_of(path, self.send(method, path, body).await.expect("the server answers")).await
    }

    /// Deletes what the case created and has not deleted. A failure is printed and does not hide the outcome of the case.
    async fn clean_up(&self) {
        let users = std::mem::take(&mut *self.made.lock().expect("not poisoned"));
        let users = users.iter().map(|user| (self.place(user).1, self.organization.clone()));
        let others = std::mem::take(&mut *self.made_elsewhere.lock().expect("not poisoned"));
        for (path, organization) in users.chain(others) {
            let request = self.http.delete(format!("{}{path}", self.issuer));
            let request = request.bearer_auth(self.token.expose_secret());
            let outcome = request.header("x-zitadel-orgid", organization).send().await;
            match outcome.and_then(reqwest::Response::error_for_status) {
                Err(e) if e.status() != Some(StatusCode::NOT_FOUND) => eprintln!("{path} could not be deleted: {e}"),
                _ => {}
            }
        }
    }
}

/// An answer of ZITADEL's API.
#[derive(Debug)]
pub struct Answer {
    pub status: StatusCode,
    pub body: Value,
}

impl Answer {
    /// Status and error id, such as `404 COMMAND-4m77G`. The texts can be localized
    /// (docs/reference/zitadel-protocol.md#api-errors).
    pub fn outcome(&self) -> String {
        let detail = &self.body["details"][0];
        let id = detail["id"].as_str().or_else(|| detail["debug"]["id"].as_str());
        let id = id.unwrap_or_default();
        format!("{} {id}", self.status.as_u16()).trim_end().to_owned()
    }
}

/// Maximum wait until a change of a user or key takes effect.
const TAKES_EFFECT: Duration = Duration::from_mins(1);

/// Repeats `ask` until the answer is `wanted`. A server reads projections that lag behind confirmed changes, and no API
/// reports when they are current (docs/reference/zitadel-protocol.md#eventual-consistency).
pub async fn takes_effect<T: Debug>(ask: impl AsyncFn() -> T, wanted: impl Fn(&T) -> bool) -> T {
    let deadline = Instant::now() + TAKES_EFFECT;
    loop {
        let got = ask().await;
        if wanted(&got) {
            return got;
        }
        assert!(Instant::now() < deadline, "no effect within {TAKES_EFFECT:?}: {got:?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

async fn json_of(path: &str, answer: reqwest::Response) -> Value {
    let status = answer.status();
    let text = answer.text().await.expect("a body");
    assert!(status.is_success(), "{path}: {status} {text}");
    serde_json::from_str(&text).expect("JSON")
}

/// A name that no other case uses.
fn unique() -> String {
    let now = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .expect("a time");
    format!("zitadel-tokens-contract-{}-{}", std::process::id(), now.as_nanos())
}

fn zitadel_kind(kind: Kind) -> &'static str {
    match kind {
        Kind::Jwt => "ACCESS_TOKEN_TYPE_JWT",
        Kind::Opaque => "ACCESS_TOKEN_TYPE_BEARER",
    }
}

fn text(answer: &Value, field: &str) -> String {
    answer[field]
        .as_str()
        .unwrap_or_else(|| panic!("no {field}"))
        .to_owned()
}
