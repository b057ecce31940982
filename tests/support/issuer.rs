//! The ZITADEL stand-in, one process per test, and its control port.

use std::process::Command;

use serde::Deserialize;
use serde_json::{Value, json};

use super::child::{Running, part};

pub struct Issuer {
    running: Running,
    /// The issuer in tokens and discovery.
    pub url: String,
    /// PEM of the CA, empty without TLS.
    pub ca: String,
    control: String,
    http: reqwest::Client,
}

/// One request that the stand-in received.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Recorded {
    pub seq: u64,
    /// When the stand-in received the request, in RFC 3339.
    pub time: String,
    pub method: String,
    pub path: String,
    pub host: String,
    pub instance_host: String,
    /// Whether there was an `Authorization` header.
    pub authorized: bool,
    pub query: String,
    pub form: Value,
    /// The body, if it is JSON.
    pub body: Value,
    pub assertion: Value,
    /// The user of the assertion, or else of the valid access token in the request.
    pub user_id: String,
    pub scopes: Vec<String>,
    pub status: u16,
    pub access_token: String,
}

/// A user of the stand-in.
#[derive(Debug, Clone)]
pub struct User {
    pub id: String,
    /// The machine key file, as ZITADEL writes it.
    pub key: String,
    pub key_id: String,
}

/// A key in the stand-in, without projection lag.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct StoredKey {
    pub id: String,
    /// In RFC 3339, like the expiration date.
    pub creation_date: String,
    pub expiration_date: String,
    /// SHA-256 of the public key in SPKI DER, in hexadecimal.
    pub spki_sha256: String,
}

/// The token endpoint of a real server sees a change of a user after some milliseconds, or after some hundred
/// milliseconds during a burst.
const PROJECTION_LAG: &str = "100ms";

impl Issuer {
    pub fn start(flags: &[&str]) -> Self {
        let binary = part("issuer").join("issuer");
        let (running, ready) = Running::announced(
            "issuer",
            Command::new(binary)
                .args(["--projection-lag", PROJECTION_LAG])
                .args(flags),
        );
        let text = |key: &str| ready[key].as_str().unwrap_or_default().to_owned();
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        Self {
            running,
            url: text("issuer"),
            ca: text("ca"),
            control: text("control"),
            http: reqwest::Client::builder().no_proxy().build().expect("a client"),
        }
    }

    async fn call(&self, method: reqwest::Method, path: &str, body: Option<Value>) -> Value {
        let request = self.http.request(method, format!("{}{path}", self.control));
        let request = match body {
            Some(body) => request.json(&body),
            None => request,
        };
        let answer = request.send().await.expect("the control port answers");
        let status = answer.status();
        let text = answer.text().await.expect("a body");
        assert!(status.is_success(), "{path}: {status} {text}");
        serde_json::from_str(&text).unwrap_or(Value::Null)
    }

    /// Creates a user with one key, and waits until the token endpoint knows both. `fields` are those of the control
    /// port, for example tokenType, lifetimeSeconds, roles, selfManagementRefused.
    pub async fn user(&self, fields: Value) -> User {
        let user = self.call(reqwest::Method::POST, "/users", Some(fields)).await;
        let id = user["id"].as_str().expect("an id").to_owned();
        let (key_id, key) = self.key(&id, json!({})).await;
        self.settled().await;
        User { id, key, key_id }
    }

    /// Creates another key, and returns its id and file. The token endpoint does not know the key yet. The operator
    /// must tolerate this.
    pub async fn key(&self, user: &str, fields: Value) -> (String, String) {
        let key = self
            .call(reqwest::Method::POST, &format!("/users/{user}/keys"), Some(fields))
            .await;
        (key["keyId"].as_str().expect("an id").to_owned(), key.to_string())
    }

    /// The user's keys, the oldest first.
    pub async fn keys(&self, user: &str) -> Vec<StoredKey> {
        let answer = self
            .call(reqwest::Method::GET, &format!("/users/{user}/keys"), None)
            .await;
        serde_json::from_value(answer["keys"].clone()).expect("keys")
    }

    /// Refuses a user the management of its own keys, or allows it again.
    pub async fn refuse_self_management(&self, user: &str, refused: bool) {
        self.change_user(user, json!({"selfManagementRefused": refused})).await;
    }

    /// Waits until the token endpoint and the lists of keys see every change so far.
    pub async fn settled(&self) {
        self.call(reqwest::Method::GET, "/settled", None).await;
    }

    /// Removes a key, and waits until the token endpoint knows this.
    pub async fn remove_key(&self, user: &str, key: &str) {
        self.call(reqwest::Method::DELETE, &format!("/users/{user}/keys/{key}"), None)
            .await;
        self.settled().await;
    }

    /// Changes a user, and waits until the token endpoint knows this.
    pub async fn change_user(&self, user: &str, fields: Value) {
        self.call(reqwest::Method::PATCH, &format!("/users/{user}"), Some(fields))
            .await;
        self.settled().await;
    }

    /// Deletes a user, and waits until the token endpoint knows this.
    pub async fn delete_user(&self, user: &str) {
        self.call(reqwest::Method::DELETE, &format!("/users/{user}"), None)
            .await;
        self.settled().await;
    }

    /// All users, as the control port shows them.
    pub async fn users(&self) -> Vec<Value> {
        let answer = self.call(reqwest::Method::GET, "/users", None).await;
        answer["users"].as_array().expect("users").clone()
    }

    /// Gives a user exactly these manager roles in a scope, as a person does in ZITADEL's console, and waits until the
    /// lists show it. The scope has the form of ZITADEL's API.
    pub async fn set_manager_roles(&self, user: &str, resource: &Value, roles: &[&str]) {
        let body = json!({"resource": resource, "roles": roles});
        self.call(
            reqwest::Method::PUT,
            &format!("/users/{user}/manager-roles"),
            Some(body),
        )
        .await;
        self.settled().await;
    }

    /// The manager roles of a user in a scope.
    pub async fn manager_roles(&self, user: &str, resource: &Value) -> Vec<String> {
        let user = self.call(reqwest::Method::GET, &format!("/users/{user}"), None).await;
        let held = user["managerRoles"].as_array().expect("roles");
        let here = held.iter().find(|held| held["resource"] == *resource);
        let roles = here.map(|held| held["roles"].as_array().expect("roles").iter());
        let mut roles: Vec<String> = roles
            .into_iter()
            .flatten()
            .map(|role| role.as_str().expect("a role").to_owned())
            .collect();
        roles.sort_unstable();
        roles
    }

    /// Creates a personal access token of a user.
    pub async fn personal_token(&self, user: &str) -> String {
        let made = self
            .call(reqwest::Method::POST, &format!("/users/{user}/pats"), Some(json!({})))
            .await;
        made["token"].as_str().expect("a token").to_owned()
    }

    /// Changes the metadata of a user: sets keys, or removes those that are null.
    pub async fn change_metadata(&self, user: &str, metadata: Value) {
        self.call(
            reqwest::Method::PATCH,
            &format!("/users/{user}/metadata"),
            Some(metadata),
        )
        .await;
    }

    /// Creates an organization, and returns its id.
    pub async fn organization(&self) -> String {
        self.create("/organizations", json!({})).await
    }

    /// Creates a project in the default organization, and returns its id.
    pub async fn project(&self) -> String {
        self.create("/projects", json!({})).await
    }

    /// Grants a project to an organization.
    pub async fn grant(&self, project: &str, organization: &str) {
        let fields = json!({"organizationId": organization});
        self.create(&format!("/projects/{project}/grants"), fields).await;
    }

    async fn create(&self, path: &str, fields: Value) -> String {
        let created = self.call(reqwest::Method::POST, path, Some(fields)).await;
        created["id"].as_str().expect("an id").to_owned()
    }

    pub async fn settings(&self, fields: Value) -> Value {
        self.call(reqwest::Method::PATCH, "/settings", Some(fields)).await
    }

    /// Adds a fault; returns its id.
    pub async fn fault(&self, fields: Value) -> Value {
        self.call(reqwest::Method::POST, "/faults", Some(fields)).await["id"].clone()
    }

    pub async fn clear_faults(&self) {
        self.call(reqwest::Method::DELETE, "/faults", None).await;
    }

    pub async fn requests(&self) -> Vec<Recorded> {
        let answer = self.call(reqwest::Method::GET, "/requests", None).await;
        serde_json::from_value(answer["requests"].clone()).expect("requests")
    }

    /// The number of tokens issued for workloads, without the operator's own tokens for the ZITADEL API.
    pub async fn mints(&self) -> usize {
        let counts = self.call(reqwest::Method::GET, "/counts", None).await;
        let mints = counts["mints"].as_array().cloned().unwrap_or_default();
        let own = "urn:zitadel:iam:org:project:id:zitadel:aud";
        let counted = mints
            .iter()
            .filter(|m| m["scope"] != own)
            .filter_map(|m| m["count"].as_u64());
        usize::try_from(counted.sum::<u64>()).expect("a count")
    }
}
