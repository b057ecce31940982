//! An API server in memory: what it answers to the few requests that the operator makes, and its watches. Measured
//! rules: `resourceVersion` "1" in an apply lets a create pass only; another version or UID than stored is a conflict; an
//! apply removes what the same manager applied before and names no longer.

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

/// A write that hangs ends when the operator gives up.
const HANGS: Duration = Duration::from_mins(1);

/// What goes wrong at the API server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outage {
    /// A quota refuses Secrets.
    SecretsRefused,
    /// Secrets are written, and the answer is lost.
    AnswersLost,
    /// Writes of Secrets hang.
    SecretsHang,
    /// Nothing can be read or written.
    Down,
}

/// Something that a watch tells.
#[derive(Clone, Debug)]
pub enum Change {
    User(Value),
    Instance(Value),
    Policy(Value),
    Namespace(Value),
    Secret(Value),
    SecretGone(String),
}

/// Who changed a Secret since the operator wrote it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Edit {
    /// What is around the token.
    Metadata,
    /// Token or record.
    Token,
}

/// A Secret, and which of its fields the operator owns.
#[derive(Clone, Debug)]
pub struct Stored {
    pub object: Value,
    ours: BTreeSet<(&'static str, String)>,
    pub edit: Option<Edit>,
}

/// Where an applied Secret has fields of several owners.
const SECTIONS: [&str; 3] = ["/metadata/labels", "/metadata/annotations", "/data"];

impl Stored {
    /// The decoded value of an entry.
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

/// All that is stored.
pub struct Store {
    version: u64,
    pub user: Value,
    pub instance: Value,
    pub policy: Value,
    pub namespace: Value,
    pub secrets: BTreeMap<String, Stored>,
    /// Each version of each token Secret.
    pub backups: Vec<(String, Stored)>,
    /// The watch of Secrets, and all others.
    pub watches: Option<[UnboundedSender<(Instant, Change)>; 2]>,
    /// How late their events come.
    pub delays: [Duration; 2],
    /// Events that have not come.
    pub undelivered: usize,
    pub latency: Duration,
    pub outage: Option<Outage>,
    /// Writes of token Secrets.
    pub writes: usize,
    /// Changes and Events of any kind that the operator made.
    pub mutations: usize,
}

impl Store {
    pub fn new(user: Value, instance: Value, policy: Value) -> Self {
        let namespace = json!({"metadata": {"name": NAMESPACE, "uid": "ns", "resourceVersion": "1"}});
        Self {
            version: 100,
            user,
            instance,
            policy,
            namespace,
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

    pub fn is_late(&self) -> bool {
        self.delays.iter().any(|delay| !delay.is_zero())
    }

    /// Everything, as a first list tells it.
    pub fn all(&self) -> Vec<Change> {
        let mut all = vec![
            Change::Instance(self.instance.clone()),
            Change::Policy(self.policy.clone()),
            Change::Namespace(self.namespace.clone()),
            Change::User(self.user.clone()),
        ];
        all.extend(
            self.secrets
                .values()
                .map(|secret| Change::Secret(secret.object.clone())),
        );
        all
    }

    fn tell(&mut self, change: Change) {
        let which = usize::from(matches!(change, Change::Secret(_) | Change::SecretGone(_)));
        if let Some(watches) = &self.watches
            && watches[which]
                .send((Instant::now() + self.delays[which], change))
                .is_ok()
        {
            self.undelivered += 1;
        }
    }

    fn next_version(&mut self) -> Value {
        self.version += 1;
        self.version.to_string().into()
    }

    /// Somebody changes the spec of the service user.
    pub fn change_user(&mut self, change: impl FnOnce(&mut Value)) {
        let before = self.user.clone();
        change(&mut self.user);
        if self.user == before {
            return;
        }
        if self.user["spec"] != before["spec"] {
            let generation = before["metadata"]["generation"].as_i64().expect("a number");
            self.user["metadata"]["generation"] = (generation + 1).into();
        }
        self.user["metadata"]["resourceVersion"] = self.next_version();
        self.tell(Change::User(self.user.clone()));
    }

    pub fn change_policy(&mut self, change: impl FnOnce(&mut Value)) {
        change(&mut self.policy);
        self.policy["metadata"]["resourceVersion"] = self.next_version();
        self.tell(Change::Policy(self.policy.clone()));
    }

    /// Somebody changes a Secret, whose changed fields are no longer the operator's.
    pub fn change_secret(&mut self, name: &str, edit: Option<Edit>, change: impl FnOnce(&mut Stored)) {
        let Some(mut secret) = self.secrets.get(name).cloned() else {
            return;
        };
        let before = secret.object.clone();
        change(&mut secret);
        let object = secret.object.clone();
        if object == before {
            return;
        }
        secret.ours.retain(|(section, key)| {
            let field = |object: &Value| object.pointer(section).and_then(|section| section.get(key)).cloned();
            field(&object) == field(&before)
        });
        // An edited token stays one until the operator writes.
        secret.edit = secret.edit.filter(|edit| *edit == Edit::Token).or(edit);
        self.put(name, secret);
    }

    pub fn put(&mut self, name: &str, mut secret: Stored) {
        secret.object["metadata"]["resourceVersion"] = self.next_version();
        self.tell(Change::Secret(secret.object.clone()));
        self.secrets.insert(name.to_owned(), secret);
    }

    pub fn put_new(&mut self, name: &str, data: &Value) {
        let uid = self.next_version();
        let metadata = json!({"name": name, "namespace": NAMESPACE, "uid": uid});
        let object = json!({"metadata": metadata, "type": "Opaque", "data": data});
        let secret = Stored {
            object,
            ours: BTreeSet::new(),
            edit: None,
        };
        self.put(name, secret);
    }

    pub fn delete(&mut self, name: &str) -> Option<Stored> {
        let gone = self.secrets.remove(name)?;
        self.tell(Change::SecretGone(name.to_owned()));
        Some(gone)
    }

    /// A Secret of an earlier version comes back, as from a backup.
    pub fn put_back(&mut self, name: &str, n: usize) {
        let earlier = self.backups.iter().filter(|(of, _)| of == name).take(n + 1);
        let Some(mut secret) = earlier.last().map(|(_, secret)| secret.clone()) else {
            return;
        };
        match self.secrets.get(name) {
            Some(there) => secret.object["metadata"]["uid"] = there.object["metadata"]["uid"].clone(),
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

/// A client of this server.
pub fn client(shared: &Shared) -> Client {
    let shared = shared.clone();
    let service = tower::service_fn(move |request| serve(shared.clone(), request));
    Client::new(service, NAMESPACE)
}

async fn serve(shared: Shared, request: Request<Body>) -> Result<Response<Body>, Infallible> {
    let (parts, body) = request.into_parts();
    let body = body.collect_bytes().await.expect("in memory");
    let body: Value = serde_json::from_slice(&body).unwrap_or_default();
    let latency = lock(&shared).store.latency;
    sleep(latency).await;
    let method = parts.method.as_str();
    let (path, query) = (parts.uri.path(), parts.uri.query().unwrap_or_default());
    let writes_secret = method == "PATCH" && path.contains("/secrets/");
    let outage = lock(&shared).store.outage;
    let (code, answer) = match outage {
        Some(Outage::Down) => failure(503, "", "down"),
        Some(Outage::SecretsRefused) if writes_secret => failure(403, "", "exceeded quota: tokens"),
        Some(Outage::SecretsHang) if writes_secret => {
            sleep(HANGS).await;
            failure(504, "", "late")
        }
        Some(Outage::AnswersLost) if writes_secret => {
            let _ = lock(&shared).answer(method, path, query, &body);
            failure(500, "", "lost")
        }
        _ => lock(&shared).answer(method, path, query, &body),
    };
    // The answer is on its way while the watch may tell already.
    sleep(latency).await;
    let body = Body::from(answer.to_string().into_bytes());
    Ok(Response::builder().status(code).body(body).expect("an answer"))
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
            _ => panic!("unexpected: {method} {path}"),
        }
    }

    fn put_status(&mut self, body: &Value, of: fn(&mut Store) -> &mut Value, change: fn(Value) -> Change) -> Answer {
        let stored = of(&mut self.store).clone();
        let version = |object: &Value| object["metadata"]["resourceVersion"].clone();
        if version(body) != version(&stored) {
            return failure(409, NAME, "the object has been modified");
        }
        if stored["status"] == body["status"] {
            self.violated(format!("a status is written without a change: {}", body["status"]));
        }
        self.store.mutations += 1;
        let next = self.store.next_version();
        let object = of(&mut self.store);
        object["status"] = body["status"].clone();
        object["metadata"]["resourceVersion"] = next;
        let object = object.clone();
        self.store.tell(change(object.clone()));
        (200, object)
    }

    fn apply(&mut self, name: &str, draft: &Value, dry: bool) -> Answer {
        let asked = &draft["metadata"];
        let mut secret = match self.store.secrets.get(name) {
            None if asked["resourceVersion"] == "1" && asked["uid"].is_null() => Stored {
                object: json!({"metadata": {"name": name, "namespace": NAMESPACE, "labels": {}, "annotations": {}},
                    "type": draft["type"], "data": {}}),
                ours: BTreeSet::new(),
                edit: None,
            },
            Some(secret)
                if asked["resourceVersion"] == secret.object["metadata"]["resourceVersion"]
                    && asked["uid"] == secret.object["metadata"]["uid"] =>
            {
                secret.clone()
            }
            _ => return failure(409, name, "another version is stored"),
        };
        let before = secret.object.clone();
        for section in SECTIONS {
            let wanted = draft.pointer(section).and_then(Value::as_object).expect("a map");
            let pointer = secret.object.pointer_mut(section).expect("a map");
            if pointer.is_null() {
                *pointer = json!({});
            }
            let fields = pointer.as_object_mut().expect("a map");
            secret.ours.retain(|(of, key)| {
                let stays = *of != section || wanted.contains_key(key);
                if !stays {
                    fields.remove(key);
                }
                stays
            });
            for (key, value) in wanted {
                fields.insert(key.clone(), value.clone());
                secret.ours.insert((section, key.clone()));
            }
        }
        secret.object["metadata"]["ownerReferences"] = asked["ownerReferences"].clone();
        if dry {
            return (200, secret.object);
        }
        if secret.object == before {
            self.violated(format!("Secret {name} is written without a change"));
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
        self.secret_was_written(name, repairs);
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
        self.secret_was_deleted(&secret);
        (
            200,
            json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success"}),
        )
    }
}
