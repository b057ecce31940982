//! A fake API server in memory. It serves the operator's requests and watches. It follows measured behavior of the API
//! server: an apply with `resourceVersion` "1" can only create; an apply whose version or UID differs from the stored
//! one is a conflict; an apply removes the fields that the same manager applied before and now omits.

use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use hyper::{Request, Response};
use kube::Client;
use kube::client::Body;
use serde_json::{Value, json};
use tokio::sync::mpsc::UnboundedSender;
use tokio::time::{Instant, sleep};

use super::{NAMESPACE, Shared, State, lock};
use crate::domain::fixtures::NAME;

/// Duration of a hanging write, if the operator does not cancel it earlier.
const HANG: Duration = Duration::from_mins(1);

/// A failure of the API server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outage {
    /// A quota rejects writes of Secrets.
    QuotaExceeded,
    /// The API server writes the Secret, and the response is lost.
    SecretResponseLost,
    /// Writes of Secrets hang until they time out.
    SecretWritesHang,
    /// All requests fail.
    Down,
}

/// A change that a watch reports.
#[derive(Clone, Debug)]
pub enum Change {
    User(Value),
    Instance(Value),
    Policy(Value),
    Namespace(Value),
    Secret(Value),
    SecretDeleted(String),
}

/// Which part of a Secret another client edited since the operator's last write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Edit {
    /// Labels, annotations or data other than the token and the record.
    Metadata,
    /// The token or the record.
    Token,
}

/// A Secret and the fields that the operator owns.
#[derive(Clone, Debug)]
pub struct StoredSecret {
    pub object: Value,
    /// Section and key.
    owned_fields: BTreeSet<(&'static str, String)>,
    pub edit: Option<Edit>,
}

/// The maps of a Secret whose keys may have different owners.
const SECTIONS: [&str; 3] = ["/metadata/labels", "/metadata/annotations", "/data"];

impl StoredSecret {
    /// Returns the decoded value of a key.
    pub fn data(&self, key: &str) -> Option<String> {
        let encoded = self.object["data"][key].as_str()?;
        String::from_utf8(STANDARD.decode(encoded).ok()?).ok()
    }

    pub fn set_data(&mut self, key: &str, value: &str) {
        self.object["data"][key] = STANDARD.encode(value).into();
    }

    pub fn token(&self) -> Option<String> {
        self.data("token")
    }
}

/// The stored objects, the watches, and the configured failures.
pub struct Store {
    version: u64,
    pub user: Value,
    pub instance: Value,
    pub policy: Value,
    pub secrets: BTreeMap<String, StoredSecret>,
    /// All versions of all token Secrets that the operator wrote, with the Secret's name.
    pub backups: Vec<(String, StoredSecret)>,
    /// The watch of all other kinds, and the watch of Secrets.
    pub watches: Option<[UnboundedSender<(Instant, Change)>; 2]>,
    /// How late each watch delivers its events.
    pub delays: [Duration; 2],
    /// Number of watch events not yet delivered.
    pub undelivered: usize,
    /// Delay of a request, and again of its response.
    pub latency: Duration,
    pub outage: Option<Outage>,
    /// Number of writes to token Secrets.
    pub writes: usize,
    /// Number of writes of any kind by the operator, Events included.
    pub mutations: usize,
}

impl Store {
    pub fn new(user: Value, instance: Value, policy: Value) -> Self {
        Self {
            version: 100,
            user,
            instance,
            policy,
            secrets: BTreeMap::new(),
            backups: Vec::new(),
            watches: None,
            delays: [Duration::ZERO; 2],
            undelivered: 0,
            latency: Duration::ZERO,
            outage: None,
            writes: 0,
            mutations: 0,
        }
    }

    pub fn longest_delay(&self) -> Duration {
        self.delays[0].max(self.delays[1])
    }

    /// Returns all objects, like the first list of a watch.
    pub fn all(&self) -> Vec<Change> {
        let namespace = json!({"metadata": {"name": NAMESPACE, "uid": "ns", "resourceVersion": "1"}});
        let mut all = vec![
            Change::Instance(self.instance.clone()),
            Change::Policy(self.policy.clone()),
            Change::Namespace(namespace),
            Change::User(self.user.clone()),
        ];
        all.extend(
            self.secrets
                .values()
                .map(|secret| Change::Secret(secret.object.clone())),
        );
        all
    }

    fn notify(&mut self, change: Change) {
        let index = usize::from(matches!(change, Change::Secret(_) | Change::SecretDeleted(_)));
        if let Some(watches) = &self.watches
            && watches[index]
                .send((Instant::now() + self.delays[index], change))
                .is_ok()
        {
            self.undelivered += 1;
        }
    }

    fn next_version(&mut self) -> Value {
        self.version += 1;
        self.version.to_string().into()
    }

    /// Changes the service user as another client does.
    pub fn change_user(&mut self, change: impl FnOnce(&mut Value)) {
        let before = self.user.clone();
        change(&mut self.user);
        if self.user == before {
            return;
        }
        if self.user["spec"] != before["spec"] {
            let generation = before["metadata"]["generation"]
                .as_i64()
                .expect("generation is a number");
            self.user["metadata"]["generation"] = (generation + 1).into();
        }
        self.user["metadata"]["resourceVersion"] = self.next_version();
        self.notify(Change::User(self.user.clone()));
    }

    pub fn change_policy(&mut self, change: impl FnOnce(&mut Value)) {
        change(&mut self.policy);
        self.policy["metadata"]["resourceVersion"] = self.next_version();
        self.notify(Change::Policy(self.policy.clone()));
    }

    /// Changes a Secret as another client does. The operator loses ownership of the changed fields.
    pub fn change_secret(&mut self, name: &str, edit: Option<Edit>, change: impl FnOnce(&mut StoredSecret)) {
        let Some(mut secret) = self.secrets.get(name).cloned() else {
            return;
        };
        let before = secret.object.clone();
        change(&mut secret);
        let object = secret.object.clone();
        if object == before {
            return;
        }
        secret.owned_fields.retain(|(section, key)| {
            let field = |object: &Value| object.pointer(section).and_then(|section| section.get(key)).cloned();
            field(&object) == field(&before)
        });
        // `Edit::Token` remains until the operator writes the Secret; `Edit::Metadata` does not replace it.
        secret.edit = secret.edit.filter(|edit| *edit == Edit::Token).or(edit);
        self.put(name, secret);
    }

    pub fn put(&mut self, name: &str, mut secret: StoredSecret) {
        secret.object["metadata"]["resourceVersion"] = self.next_version();
        self.notify(Change::Secret(secret.object.clone()));
        self.secrets.insert(name.to_owned(), secret);
    }

    pub fn put_new(&mut self, name: &str, data: &Value) {
        let uid = self.next_version();
        let metadata = json!({"name": name, "namespace": NAMESPACE, "uid": uid});
        let object = json!({"metadata": metadata, "type": "Opaque", "data": data});
        let secret = StoredSecret {
            object,
            owned_fields: BTreeSet::new(),
            edit: None,
        };
        self.put(name, secret);
    }

    pub fn delete(&mut self, name: &str) {
        if self.secrets.remove(name).is_some() {
            self.notify(Change::SecretDeleted(name.to_owned()));
        }
    }

    /// Restores version `n`, counted from the oldest, or the newest if there are fewer.
    pub fn restore(&mut self, name: &str, n: usize) {
        let versions = self.backups.iter().filter(|(of, _)| of == name).take(n + 1);
        let Some(mut secret) = versions.last().map(|(_, secret)| secret.clone()) else {
            return;
        };
        match self.secrets.get(name) {
            Some(stored) => secret.object["metadata"]["uid"] = stored.object["metadata"]["uid"].clone(),
            None => secret.object["metadata"]["uid"] = self.next_version(),
        }
        secret.edit = Some(Edit::Token);
        self.put(name, secret);
    }
}

type Answer = (u16, Value);

fn failure(code: u16, name: &str, message: &str) -> Answer {
    let reason = match code {
        403 => "Forbidden",
        404 => "NotFound",
        409 => "Conflict",
        _ => "InternalError",
    };
    let status = json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "message": message,
        "reason": reason, "code": code, "details": {"name": name}});
    (code, status)
}

/// Returns a client whose requests go to this fake API server.
pub fn client(shared: &Shared) -> Client {
    let shared = shared.clone();
    let service = tower::service_fn(move |request| serve(shared.clone(), request));
    Client::new(service, NAMESPACE)
}

async fn serve(shared: Shared, request: Request<Body>) -> Result<Response<Body>, Infallible> {
    let (parts, body) = request.into_parts();
    let body = body.collect_bytes().await.expect("the body is in memory");
    let body: Value = serde_json::from_slice(&body).unwrap_or_default();
    let latency = lock(&shared).store.latency;
    sleep(latency).await;
    let method = parts.method.as_str();
    let (path, query) = (parts.uri.path(), parts.uri.query().unwrap_or_default());
    let writes_secret = method == "PATCH" && path.contains("/secrets/");
    let outage = lock(&shared).store.outage;
    let (code, answer) = match outage {
        Some(Outage::Down) => failure(503, "", "unavailable"),
        Some(Outage::QuotaExceeded) if writes_secret => failure(403, "", "exceeded quota: tokens"),
        Some(Outage::SecretWritesHang) if writes_secret => {
            sleep(HANG).await;
            failure(504, "", "timeout")
        }
        Some(Outage::SecretResponseLost) if writes_secret => {
            let _ = lock(&shared).answer(method, path, query, &body);
            failure(500, "", "response lost")
        }
        _ => lock(&shared).answer(method, path, query, &body),
    };
    // The watch may report a change before the response arrives.
    sleep(latency).await;
    let body = Body::from(answer.to_string().into_bytes());
    Ok(Response::builder()
        .status(code)
        .body(body)
        .expect("the response is valid"))
}

impl State {
    fn answer(&mut self, method: &str, path: &str, query: &str, body: &Value) -> Answer {
        let parts: Vec<&str> = path.trim_matches('/').split('/').collect();
        match (method, &parts[..]) {
            ("GET", [.., "secrets", name]) => match self.store.secrets.get(*name) {
                Some(secret) => (200, secret.object.clone()),
                None => failure(404, name, "not found"),
            },
            ("GET", [.., "zitadelserviceusers", NAME]) => (200, self.store.user.clone()),
            ("PUT", [.., "zitadelserviceusers", NAME, "status"]) => {
                self.put_status(body, |store| &mut store.user, Change::User)
            }
            ("PUT", [.., "zitadelinstances", _, "status"]) => {
                self.put_status(body, |store| &mut store.instance, Change::Instance)
            }
            ("PATCH", [.., "secrets", name]) => self.apply(name, body, query.contains("dryRun=All")),
            ("DELETE", [.., "secrets", name]) => self.delete(name, body),
            ("POST" | "PATCH", [.., "events"] | [.., "events", _]) => {
                self.store.mutations += 1;
                (201, body.clone())
            }
            _ => panic!("unexpected request: {method} {path}"),
        }
    }

    fn put_status(&mut self, body: &Value, of: fn(&mut Store) -> &mut Value, change: fn(Value) -> Change) -> Answer {
        let stored = of(&mut self.store).clone();
        let version = |object: &Value| object["metadata"]["resourceVersion"].clone();
        if version(body) != version(&stored) {
            return failure(409, NAME, "the object has been modified");
        }
        if stored["status"] == body["status"] {
            self.violation(format!("the operator wrote an unchanged status: {}", body["status"]));
        }
        self.store.mutations += 1;
        let next = self.store.next_version();
        let object = of(&mut self.store);
        object["status"] = body["status"].clone();
        object["metadata"]["resourceVersion"] = next;
        let object = object.clone();
        self.store.notify(change(object.clone()));
        (200, object)
    }

    fn apply(&mut self, name: &str, draft: &Value, dry_run: bool) -> Answer {
        let metadata = &draft["metadata"];
        let mut secret = match self.store.secrets.get(name) {
            None if metadata["resourceVersion"] == "1" && metadata["uid"].is_null() => StoredSecret {
                object: json!({"metadata": {"name": name, "namespace": NAMESPACE, "labels": {}, "annotations": {}},
                    "type": draft["type"], "data": {}}),
                owned_fields: BTreeSet::new(),
                edit: None,
            },
            Some(secret)
                if metadata["resourceVersion"] == secret.object["metadata"]["resourceVersion"]
                    && metadata["uid"] == secret.object["metadata"]["uid"] =>
            {
                secret.clone()
            }
            _ => return failure(409, name, "another version is stored"),
        };
        let before = secret.object.clone();
        for section in SECTIONS {
            let wanted = draft.pointer(section).and_then(Value::as_object).expect("an object");
            let pointer = secret.object.pointer_mut(section).expect("an object");
            if pointer.is_null() {
                *pointer = json!({});
            }
            let fields = pointer.as_object_mut().expect("an object");
            secret.owned_fields.retain(|(of, key)| {
                let stays = *of != section || wanted.contains_key(key);
                if !stays {
                    fields.remove(key);
                }
                stays
            });
            for (key, value) in wanted {
                fields.insert(key.clone(), value.clone());
                secret.owned_fields.insert((section, key.clone()));
            }
        }
        secret.object["metadata"]["ownerReferences"] = metadata["ownerReferences"].clone();
        if dry_run {
            return (200, secret.object);
        }
        if secret.object == before {
            self.violation(format!("the operator wrote Secret {name} without a change"));
        }
        if secret.object["metadata"]["uid"].is_null() {
            secret.object["metadata"]["uid"] = self.store.next_version();
        }
        let same_token = secret.object["data"]["token"] == before["data"]["token"];
        let repairs = secret.edit.take() == Some(Edit::Metadata) && same_token;
        self.store.writes += 1;
        self.store.mutations += 1;
        self.store.put(name, secret);
        let stored = self.store.secrets[name].clone();
        self.store.backups.push((name.to_owned(), stored.clone()));
        self.on_secret_written(name, repairs);
        (200, stored.object)
    }

    fn delete(&mut self, name: &str, options: &Value) -> Answer {
        let Some(secret) = self.store.secrets.get(name).cloned() else {
            return failure(404, name, "not found");
        };
        let (wanted, metadata) = (&options["preconditions"], &secret.object["metadata"]);
        if wanted["uid"] != metadata["uid"] || wanted["resourceVersion"] != metadata["resourceVersion"] {
            return failure(409, name, "another version is stored");
        }
        self.store.delete(name);
        self.store.mutations += 1;
        self.on_secret_deleted(&secret);
        (
            200,
            json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success"}),
        )
    }
}
