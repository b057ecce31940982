//! All writes to Kubernetes, except those of the Lease (`ops/election.rs`). Every write is bounded in time and happens
//! only while this process is the leader. Every apply, replacement and deletion states the version that it expects
//! (docs/adr/0003-guarded-server-side-apply.md).

use std::collections::{BTreeMap, HashSet};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use hyper::header::{ACCEPT, CONTENT_TYPE, HeaderValue};
use k8s_openapi::api::core::v1::Secret;
use kube::api::{Api, DeleteParams, Patch, PatchParams, PostParams, Preconditions};
use kube::core::{NamespaceResourceScope, Request};
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use kube::{Client, Resource, ResourceExt};
use secrecy::{ExposeSecret, SecretSlice, SecretString};
use serde::ser::{SerializeMap, Serializer};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::sync::Semaphore;
use tokio::time::Instant;

use crate::api::metadata::{GROUP, LABEL_MANAGED_BY, MANAGER};
use crate::api::{ZitadelInstance, ZitadelServiceUser};
use crate::controller::ledger::Place;
use crate::controller::triggers::reference;
use crate::controller::watched::WatchedSecret;
use crate::domain::allowance::Allowances;
use crate::domain::limits::Rate;
use crate::domain::object_ref::ObjectRef;
use crate::domain::observed_secret::{OWNER_KIND, SecretRef, WritePrecondition};
use crate::domain::reason::Reason;
use crate::domain::refuser::Refuser;
use crate::domain::report::EventDraft;
use crate::domain::secret_draft::SecretDraft;
use crate::ops::lease::{LeadershipGuard, NotLeading};

/// Asks for the metadata of an object instead of the object.
const METADATA_ONLY: HeaderValue =
    HeaderValue::from_static("application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1");

/// Longest time of one write; the API server's own limit is a minute.
const WRITE_TIMEOUT: Duration = Duration::from_secs(15);

/// Concurrent status writes.
const AT_ONCE: usize = 4;

/// Rate limit of Events per object. The burst equals that of client-go's recorder
/// (<https://github.com/kubernetes/client-go/blob/master/tools/record/events_cache.go>); the sustained rate is higher.
const EVENTS_OF_OBJECT: Rate = Rate {
    burst: 25.0,
    per_second: 1.0 / 30.0,
};

/// Rate limit of Events per namespace.
const EVENTS_OF_NAMESPACE: Rate = Rate {
    burst: 1_000.0,
    per_second: 2.0,
};

/// Writes objects to the API server.
pub struct Writer {
    client: Client,
    leadership: LeadershipGuard,
    recorder: Recorder,
    /// Namespaces in which the last write of a Secret succeeded.
    accepts_secrets: Mutex<HashSet<String>>,
    events: Mutex<Allowances>,
    started: Instant,
    /// Limits concurrent status writes: each response is a whole object, which may have more than a megabyte.
    at_once: Semaphore,
}

/// Why a write failed.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// The object differs from the one that was read. Read it again.
    #[error("the object changed since it was read")]
    Conflict,
    /// The API server returned 404: the object, its namespace or its kind is missing, or a proxy answered.
    #[error("the API server did not find the object, its namespace or its kind")]
    Missing,
    /// The API server refused the write because of quota, admission, permissions or validation.
    #[error("the API server refused the write with status {code}")]
    Refused {
        /// The HTTP status.
        code: u16,
        /// The quota, webhook or policy that refused the write, if the message names it.
        by: Option<Refuser>,
    },
    /// The API server is unreachable, did not answer in time, or failed.
    #[error("the API server is unavailable")]
    Unavailable,
    /// This process is not the leader.
    #[error("this replica is not the leader")]
    NotLeading,
}

impl From<NotLeading> for WriteError {
    fn from(NotLeading: NotLeading) -> Self {
        Self::NotLeading
    }
}

impl From<kube::Error> for WriteError {
    /// Drops the text of the error, which may quote the written object.
    fn from(error: kube::Error) -> Self {
        match error {
            kube::Error::Api(status) => match status.code {
                404 => Self::Missing,
                409 => Self::Conflict,
                code @ (400..=428 | 430..=499) => Self::Refused {
                    code,
                    by: Refuser::of(&status.message),
                },
                _ => Self::Unavailable,
            },
            _ => Self::Unavailable,
        }
    }
}

impl Writer {
    /// A writer that writes only while `leadership` allows it.
    #[must_use]
    pub fn new(client: Client, leadership: LeadershipGuard) -> Self {
        Self {
            recorder: Recorder::new(client.clone(), reporter()),
            client,
            leadership,
            accepts_secrets: Mutex::default(),
            events: Mutex::new(Allowances::new(EVENTS_OF_OBJECT, EVENTS_OF_NAMESPACE)),
            started: Instant::now(),
            at_once: Semaphore::new(AT_ONCE),
        }
    }

    /// The guard that every write checks. Work that leads to a write must check it too.
    #[must_use]
    pub fn leadership(&self) -> &LeadershipGuard {
        &self.leadership
    }

    /// Writes a token Secret by server-side apply, with the write precondition of the draft. Without it, an apply would
    /// take over a foreign Secret (docs/adr/0003-guarded-server-side-apply.md). Returns the new resource version.
    pub async fn apply_secret(&self, draft: &SecretDraft) -> Result<String, WriteError> {
        self.apply(draft, PatchParams::apply(MANAGER).force()).await
    }

    /// Checks with a dry run whether quota, admission and permissions allow the write of a Secret.
    pub async fn try_secret(&self, draft: &SecretDraft) -> Result<(), WriteError> {
        self.apply(draft, PatchParams::apply(MANAGER).force().dry_run())
            .await
            .map(drop)
    }

    async fn apply(&self, draft: &SecretDraft, params: PatchParams) -> Result<String, WriteError> {
        // Request only the metadata, so that the response does not contain the token.
        let api: Api<WatchedSecret> = Api::namespaced(self.client.clone(), &draft.namespace);
        let written = self
            .bounded(api.patch(&draft.name, &params, &Patch::Apply(&Applied::new(draft))))
            .await;
        let mut takes = lock(&self.accepts_secrets);
        match &written {
            Ok(_) => drop(takes.insert(draft.namespace.clone())),
            Err(WriteError::Refused { .. }) => drop(takes.remove(&draft.namespace)),
            Err(_) => {}
        }
        drop(takes);
        Ok(written?.resource_version().unwrap_or_default())
    }

    /// Whether the last write of a Secret in this namespace succeeded. If not, check with [`Self::try_secret`] before
    /// requesting a token, because a token that cannot be written is lost.
    #[must_use]
    pub fn accepts_secrets(&self, namespace: &str) -> bool {
        lock(&self.accepts_secrets).contains(namespace)
    }

    /// Forgets a namespace that was deleted.
    pub fn forget_namespace(&self, namespace: &str) {
        lock(&self.accepts_secrets).remove(namespace);
    }

    /// Writes a ledger: creates its Secret, or replaces the one that was read. A replacement also drops entries that
    /// another writer added. Returns the UID and the resource version of the Secret.
    pub async fn write_ledger(
        &self,
        namespace: &str,
        place: &Place<'_>,
        stored: Option<&SecretRef>,
        data: BTreeMap<&'static str, SecretSlice<u8>>,
    ) -> Result<(String, String), WriteError> {
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Metadata {
            uid: String,
            resource_version: String,
        }
        #[derive(Deserialize)]
        struct Written {
            metadata: Metadata,
        }
        let mut secret = json!({
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"name": place.name, "labels": {LABEL_MANAGED_BY: MANAGER, place.label: place.key}},
            "type": "Opaque",
        });
        let request = Request::new(Secret::url_path(&(), Some(namespace)));
        if let Some(SecretRef {
            uid, resource_version, ..
        }) = stored
        {
            secret["metadata"]["uid"] = uid.as_str().into();
            secret["metadata"]["resourceVersion"] = resource_version.as_str().into();
        }
        let body = WithData { secret: &secret, data };
        let body = serde_json::to_vec(&body).map_err(|_| WriteError::Unavailable)?;
        let params = PostParams {
            field_manager: Some(MANAGER.into()),
            ..PostParams::default()
        };
        let request = match stored {
            Some(_) => request.replace(&place.name, &params, body),
            None => request.create(&params, body),
        };
        let mut request = request.map_err(|_| WriteError::Unavailable)?;
        // Request only the metadata, so that the response does not contain the keys.
        request.headers_mut().insert(ACCEPT, METADATA_ONLY);
        let written = self.bounded(self.client.request::<Written>(request)).await?.metadata;
        Ok((written.uid, written.resource_version))
    }

    /// Adds a finalizer of the operator to a service user, or removes it. Returns the new resource version.
    pub async fn set_finalizer(
        &self,
        user: &ZitadelServiceUser,
        ours: &str,
        present: bool,
    ) -> Result<String, WriteError> {
        let finalizers = user.finalizers();
        let place = finalizers.iter().position(|finalizer| finalizer == ours);
        let change = match (place, present) {
            (Some(place), false) => json!({"op": "remove", "path": format!("/metadata/finalizers/{place}")}),
            (None, true) if finalizers.is_empty() => {
                json!({"op": "add", "path": "/metadata/finalizers", "value": [ours]})
            }
            (None, true) => json!({"op": "add", "path": "/metadata/finalizers/-", "value": ours}),
            _ => return Ok(user.resource_version().unwrap_or_default()),
        };
        // Another writer must not have moved the finalizers meanwhile.
        let version = json!({"op": "replace", "path": "/metadata/resourceVersion", "value": user.resource_version()});
        let body = serde_json::to_vec(&json!([version, change])).map_err(|_| WriteError::Unavailable)?;
        let path = ZitadelServiceUser::url_path(&(), user.metadata.namespace.as_deref());
        let request = hyper::Request::patch(format!("{path}/{}?fieldManager={MANAGER}", user.name_any()))
            .header(ACCEPT, METADATA_ONLY)
            .header(CONTENT_TYPE, "application/json-patch+json")
            .body(body)
            .map_err(|_| WriteError::Unavailable)?;
        self.write_object(request).await
    }

    /// Deletes a token Secret or a ledger, if it still has the observed UID and resource version.
    pub async fn delete_secret(&self, namespace: &str, secret: &SecretRef) -> Result<(), WriteError> {
        let api: Api<WatchedSecret> = Api::namespaced(self.client.clone(), namespace);
        let params = DeleteParams {
            preconditions: Some(Preconditions {
                uid: Some(secret.uid.clone()),
                resource_version: Some(secret.resource_version.clone()),
            }),
            ..DeleteParams::default()
        };
        match self.bounded(api.delete(&secret.name, &params)).await {
            // If the Secret is missing, it needs no deletion. The next reconcile detects any other cause of the 404.
            Ok(_) | Err(WriteError::Missing) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Replaces the status of a service user. An apply would keep foreign fields; a replacement does not
    /// (docs/adr/0005-status-is-output-only.md). Returns the new resource version.
    pub async fn replace_user_status(&self, user: &ZitadelServiceUser) -> Result<String, WriteError> {
        self.replace_status(user.metadata.namespace.as_deref(), user).await
    }

    /// Replaces the status of an instance. Returns the new resource version.
    pub async fn replace_instance_status(&self, instance: &ZitadelInstance) -> Result<String, WriteError> {
        self.replace_status(None, instance).await
    }

    async fn replace_status<K>(&self, namespace: Option<&str>, object: &K) -> Result<String, WriteError>
    where
        K: Resource<DynamicType = ()> + Serialize,
    {
        let params = PostParams {
            field_manager: Some(MANAGER.into()),
            ..PostParams::default()
        };
        let body = serde_json::to_vec(object).map_err(|_| WriteError::Unavailable)?;
        let request = Request::new(K::url_path(&(), namespace));
        self.write_status(request.replace_subresource("status", &object.name_any(), &params, body))
            .await
    }

    async fn write_status(
        &self,
        request: Result<hyper::Request<Vec<u8>>, kube::core::request::Error>,
    ) -> Result<String, WriteError> {
        self.write_object(request.map_err(|_| WriteError::Unavailable)?).await
    }

    /// Sends the write of a service user or instance. Only the resource version of the response is decoded, which may be
    /// the whole object.
    async fn write_object(&self, request: hyper::Request<Vec<u8>>) -> Result<String, WriteError> {
        #[derive(Deserialize)]
        struct Object {
            metadata: Metadata,
        }
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Metadata {
            resource_version: String,
        }
        // The semaphore is never closed.
        let _place = self.at_once.acquire().await;
        let written = self.bounded(self.client.request_text(request)).await?;
        let object: Object = serde_json::from_str(&written).map_err(|_| WriteError::Unavailable)?;
        Ok(object.metadata.resource_version)
    }

    /// Writes to the status of a service user why the operator does not serve it. A merge patch works even if the
    /// present status is unreadable. Returns the new resource version.
    pub async fn patch_user_status(&self, id: &ObjectRef, patch: &Value) -> Result<String, WriteError> {
        self.patch_status::<ZitadelServiceUser>(Some(&id.namespace), &id.name, patch)
            .await
    }

    /// Like [`Self::patch_user_status`], for an instance.
    pub async fn patch_instance_status(&self, name: &str, patch: &Value) -> Result<String, WriteError> {
        self.patch_status::<ZitadelInstance>(None, name, patch).await
    }

    async fn patch_status<K>(&self, namespace: Option<&str>, name: &str, patch: &Value) -> Result<String, WriteError>
    where
        K: Resource<DynamicType = ()>,
    {
        let params = PatchParams {
            field_manager: Some(MANAGER.into()),
            ..PatchParams::default()
        };
        let request = Request::new(K::url_path(&(), namespace));
        self.write_status(request.patch_subresource("status", name, &params, &Patch::Merge(patch)))
            .await
    }

    /// Publishes an Event, or counts it as a repetition of one with the same reason. Events are informational, so a failure
    /// is only logged. Events beyond the rate limits are dropped.
    pub async fn event<K>(&self, object: &K, action: &str, note: EventDraft)
    where
        K: Resource<DynamicType = (), Scope = NamespaceResourceScope>,
    {
        self.publish(&self.recorder, object, action, note).await;
    }

    /// Publishes an Event whose note matters. A repetition keeps the note of the first one: kube's recorder compares the
    /// reasons, not the notes.
    pub async fn event_of_its_own<K>(&self, object: &K, action: &str, note: EventDraft)
    where
        K: Resource<DynamicType = (), Scope = NamespaceResourceScope>,
    {
        let recorder = Recorder::new(self.client.clone(), reporter());
        self.publish(&recorder, object, action, note).await;
    }

    async fn publish<K>(&self, recorder: &Recorder, object: &K, action: &str, note: EventDraft)
    where
        K: Resource<DynamicType = (), Scope = NamespaceResourceScope>,
    {
        let id = reference(object);
        if lock(&self.events).try_take(self.started.elapsed(), &id).is_err() {
            tracing::debug!(object = %id, reason = %note.reason, "Event dropped because of the rate limit");
            return;
        }
        let event = Event {
            type_: if note.warning {
                EventType::Warning
            } else {
                EventType::Normal
            },
            reason: note.reason.name().to_owned(),
            note: Some(note.text),
            action: action.to_owned(),
            secondary: None,
        };
        let reference = object.object_ref(&());
        if let Err(error) = self.bounded(recorder.publish(&event, &reference)).await {
            tracing::warn!(%error, "could not publish an Event");
        }
    }

    async fn bounded<T>(&self, write: impl Future<Output = Result<T, kube::Error>>) -> Result<T, WriteError> {
        match self
            .leadership
            .while_leading(tokio::time::timeout(WRITE_TIMEOUT, write))
            .await?
        {
            Ok(done) => Ok(done?),
            Err(_) => Err(WriteError::Unavailable),
        }
    }
}

fn reporter() -> Reporter {
    Reporter {
        controller: MANAGER.into(),
        instance: None,
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl WriteError {
    /// Logs the error. A conflict is harmless and logged at debug level: the cache was behind, and the next reconcile
    /// retries.
    pub fn log(&self, object: &ObjectRef, what: &str) {
        if matches!(self, Self::Conflict) {
            tracing::debug!(%object, error = %self, "{what} could not be written");
        } else {
            tracing::warn!(%object, error = %self, "{what} could not be written");
        }
    }

    /// The reason of a failed write of an object other than a Secret. The operator retries soon, unless the API server
    /// refused the write.
    #[must_use]
    pub fn reason_for_status(&self) -> Reason {
        match self {
            Self::Refused { .. } => Reason::Internal,
            Self::NotLeading => Reason::NotLeading,
            Self::Conflict | Self::Missing | Self::Unavailable => Reason::APIServerUnavailable,
        }
    }

    /// The reason that users see if a Secret could not be written or deleted.
    #[must_use]
    pub fn reason(&self) -> Reason {
        match self {
            Self::NotLeading => Reason::NotLeading,
            Self::Conflict | Self::Missing => Reason::SecretChanged,
            Self::Unavailable => Reason::APIServerUnavailable,
            Self::Refused { .. } => Reason::SecretWriteFailed,
        }
    }

    /// The reason that users see if a ledger or a finalizer could not be written.
    #[must_use]
    pub fn reason_for_ledger(&self) -> Reason {
        match self {
            // The operator's namespace does not exist.
            Self::Refused { .. } | Self::Missing => Reason::LedgerWriteFailed,
            _ => self.reason_for_status(),
        }
    }

    /// The quota, webhook or policy that refused the write, if known.
    #[must_use]
    pub fn refused_by(self) -> Option<Refuser> {
        match self {
            Self::Refused { by, .. } => by,
            _ => None,
        }
    }
}

/// The body of the apply request. Secret values are exposed only during serialization.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Applied<'a> {
    api_version: &'static str,
    kind: &'static str,
    metadata: AppliedMeta<'a>,
    #[serde(rename = "type")]
    type_: &'static str,
    #[serde(serialize_with = "encoded")]
    data: &'a BTreeMap<String, SecretString>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct AppliedMeta<'a> {
    name: &'a str,
    namespace: &'a str,
    /// With "1" the API server creates the Secret, or returns 409 if one exists
    /// (docs/adr/0003-guarded-server-side-apply.md).
    resource_version: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    uid: Option<&'a str>,
    labels: &'a BTreeMap<String, String>,
    annotations: &'a BTreeMap<String, String>,
    owner_references: Vec<AppliedOwner<'a>>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct AppliedOwner<'a> {
    api_version: String,
    kind: &'static str,
    name: &'a str,
    uid: &'a str,
    controller: bool,
    block_owner_deletion: bool,
}

impl<'a> Applied<'a> {
    fn new(draft: &'a SecretDraft) -> Self {
        let (uid, resource_version) = match &draft.precondition {
            WritePrecondition::Absent => (None, "1"),
            WritePrecondition::Present { uid, resource_version } => (Some(uid.as_str()), resource_version.as_str()),
        };
        let owner = AppliedOwner {
            api_version: format!("{GROUP}/{}", ZitadelServiceUser::version(&())),
            kind: OWNER_KIND,
            name: &draft.owner.0,
            uid: &draft.owner.1,
            controller: true,
            // A foreground deletion of the owner does not wait for its Secrets.
            block_owner_deletion: false,
        };
        Self {
            api_version: "v1",
            kind: "Secret",
            metadata: AppliedMeta {
                name: &draft.name,
                namespace: &draft.namespace,
                resource_version,
                uid,
                labels: &draft.labels,
                annotations: &draft.annotations,
                owner_references: if draft.retained { Vec::new() } else { vec![owner] },
            },
            type_: "Opaque",
            data: &draft.data,
        }
    }
}

/// A Secret whose data are exposed only during serialization.
#[derive(Serialize)]
struct WithData<'a> {
    #[serde(flatten)]
    secret: &'a Value,
    #[serde(serialize_with = "encoded_bytes")]
    data: BTreeMap<&'static str, SecretSlice<u8>>,
}

fn encoded_bytes<S: Serializer>(
    data: &BTreeMap<&'static str, SecretSlice<u8>>,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    let mut map = serializer.serialize_map(Some(data.len()))?;
    for (key, value) in data {
        let encoded = SecretString::from(STANDARD.encode(value.expose_secret()));
        map.serialize_entry(key, encoded.expose_secret())?;
    }
    map.end()
}

fn encoded<S: Serializer>(data: &BTreeMap<String, SecretString>, serializer: S) -> Result<S::Ok, S::Error> {
    let mut map = serializer.serialize_map(Some(data.len()))?;
    for (key, value) in data {
        let encoded = SecretString::from(STANDARD.encode(value.expose_secret()));
        map.serialize_entry(key, encoded.expose_secret())?;
    }
    map.end()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn debug_output_of_an_apply_omits_the_token() {
        let draft = SecretDraft {
            namespace: "shop".into(),
            name: "billing-token".into(),
            owner: ("billing".into(), "u1".into()),
            retained: false,
            labels: BTreeMap::new(),
            annotations: BTreeMap::new(),
            data: BTreeMap::from([("token".into(), "canary".into())]),
            precondition: WritePrecondition::Absent,
            repair: false,
        };
        let applied = Applied::new(&draft);
        let encoded = STANDARD.encode("canary");
        let sent = serde_json::to_value(&applied).expect("JSON");
        assert_eq!(sent["data"]["token"], *encoded);
        let shown = format!("{applied:?}");
        assert!(!shown.contains("canary") && !shown.contains(&encoded), "{shown}");
    }
}
