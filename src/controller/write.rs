//! The one file that writes to Kubernetes, but for the Lease (`ops/election.rs`). Every write is guarded by what was seen, bounded in time, and made only
//! while this process leads.

use std::collections::BTreeMap;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use kube::api::{Api, DeleteParams, Patch, PatchParams, PostParams, Preconditions};
use kube::core::NamespaceResourceScope;
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use kube::{Client, Resource, ResourceExt};
use secrecy::{ExposeSecret, SecretString};
use serde::ser::{SerializeMap, Serializer};
use serde::{Serialize, de::DeserializeOwned};

use crate::api::metadata::{GROUP, MANAGER};
use crate::api::{ZitadelInstance, ZitadelServiceUser};
use crate::controller::guarded::Guarded;
use crate::controller::secrets::SecretMeta;
use crate::domain::facts::ObjectRef;
use crate::domain::reason::Reason;
use crate::domain::report::Note;
use crate::domain::secret::{OWNER_KIND, SecretDraft, SecretRef, Seen};
use crate::ops::lease::{Fence, NotLeading};

/// Longest time of one write; the API server's own limit is a minute.
const DEADLINE: Duration = Duration::from_secs(15);

/// Writes.
#[derive(Clone)]
pub struct Writer {
    client: Client,
    fence: Fence,
    recorder: Recorder,
}

/// Why a write did not happen.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// Something else was there than what was seen: look again.
    #[error("the object changed since it was read")]
    Conflict,
    /// The object is gone.
    #[error("the object is gone")]
    Gone,
    /// The API server refused it: quota, admission, permission, validation.
    #[error("the API server refused the write with status {0}")]
    Refused(u16),
    /// The API server could not be reached, did not answer in time, or failed.
    #[error("the API server did not take the write")]
    Unavailable,
    /// Another replica leads.
    #[error("another replica leads")]
    NotLeading,
}

impl From<NotLeading> for WriteError {
    fn from(NotLeading: NotLeading) -> Self {
        Self::NotLeading
    }
}

impl From<kube::Error> for WriteError {
    /// The text of the error is dropped: it may quote what was written.
    fn from(error: kube::Error) -> Self {
        match error {
            kube::Error::Api(status) => match status.code {
                404 => Self::Gone,
                409 => Self::Conflict,
                code @ (400..=428 | 430..=499) => Self::Refused(code),
                _ => Self::Unavailable,
            },
            _ => Self::Unavailable,
        }
    }
}

impl Writer {
    /// A writer that is held back by `fence`.
    #[must_use]
    pub fn new(client: Client, fence: Fence) -> Self {
        let reporter = Reporter {
            controller: MANAGER.into(),
            instance: None,
        };
        Self {
            recorder: Recorder::new(client.clone(), reporter),
            client,
            fence,
        }
    }

    /// What holds back each write, and is to hold back what leads to one.
    #[must_use]
    pub fn fence(&self) -> &Fence {
        &self.fence
    }

    /// Writes a token Secret by server-side apply, over exactly what was seen (decision K5: without the guard an
    /// apply would take over a foreign Secret). Returns the new version.
    pub async fn apply_secret(&self, draft: &SecretDraft) -> Result<String, WriteError> {
        self.apply(draft, PatchParams::apply(MANAGER).force()).await
    }

    /// Asks whether a Secret would be taken: quota, admission and permissions are checked, and nothing is written.
    pub async fn try_secret(&self, draft: &SecretDraft) -> Result<(), WriteError> {
        self.apply(draft, PatchParams::apply(MANAGER).force().dry_run())
            .await
            .map(drop)
    }

    async fn apply(&self, draft: &SecretDraft, params: PatchParams) -> Result<String, WriteError> {
        // Metadata only: the answer need not carry the token back.
        let api: Api<SecretMeta> = Api::namespaced(self.client.clone(), &draft.namespace);
        let written = self
            .bounded(api.patch(&draft.name, &params, &Patch::Apply(&Applied::new(draft))))
            .await?;
        Ok(written.resource_version().unwrap_or_default())
    }

    /// Deletes a token Secret, exactly the one that was seen.
    pub async fn delete_secret(&self, namespace: &str, secret: &SecretRef) -> Result<(), WriteError> {
        let api: Api<SecretMeta> = Api::namespaced(self.client.clone(), namespace);
        let params = DeleteParams {
            preconditions: Some(Preconditions {
                uid: Some(secret.uid.clone()),
                resource_version: Some(secret.resource_version.clone()),
            }),
            ..DeleteParams::default()
        };
        match self.bounded(api.delete(&secret.name, &params)).await {
            Ok(_) | Err(WriteError::Gone) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Replaces the status of a service user: replaced, not applied, so that nothing foreign stays in it
    /// (decision K13). Returns the new version.
    pub async fn replace_user_status(&self, user: &ZitadelServiceUser) -> Result<String, WriteError> {
        let api = Api::namespaced(self.client.clone(), &user.namespace().unwrap_or_default());
        self.replace_status(api, user).await
    }

    /// Replaces the status of an instance. Returns the new version.
    pub async fn replace_instance_status(&self, instance: &ZitadelInstance) -> Result<String, WriteError> {
        self.replace_status(Api::all(self.client.clone()), instance).await
    }

    async fn replace_status<K>(&self, api: Api<Guarded<K>>, object: &K) -> Result<String, WriteError>
    where
        K: Resource<DynamicType = ()> + Serialize + DeserializeOwned + Clone + std::fmt::Debug,
    {
        let params = PostParams {
            field_manager: Some(MANAGER.into()),
            ..PostParams::default()
        };
        let written = self
            .bounded(api.replace_status(&object.name_any(), &params, &Guarded(Ok(object.clone()))))
            .await?;
        Ok(written.resource_version().unwrap_or_default())
    }

    /// Publishes an Event. It tells, and decides nothing: a failure is logged and forgotten.
    pub async fn event<K>(&self, object: &K, action: &str, note: Note)
    where
        K: Resource<DynamicType = (), Scope = NamespaceResourceScope>,
    {
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
        if let Err(error) = self.bounded(self.recorder.publish(&event, &reference)).await {
            tracing::warn!(%error, "an Event could not be published");
        }
    }

    async fn bounded<T>(&self, write: impl Future<Output = Result<T, kube::Error>>) -> Result<T, WriteError> {
        match self.fence.while_leading(tokio::time::timeout(DEADLINE, write)).await? {
            Ok(done) => Ok(done?),
            Err(_) => Err(WriteError::Unavailable),
        }
    }
}

impl WriteError {
    /// Logs it. A conflict is no trouble: the cache was a moment behind, and the next look mends it.
    pub fn log(&self, object: &ObjectRef, what: &str) {
        if matches!(self, Self::Conflict) {
            tracing::debug!(%object, error = %self, "{what} could not be written");
        } else {
            tracing::warn!(%object, error = %self, "{what} could not be written");
        }
    }

    /// Why something else than a Secret is to be written again: soon, unless it was refused.
    #[must_use]
    pub fn reason_besides_secrets(&self) -> Reason {
        match self {
            Self::Refused(_) => Reason::Internal,
            Self::NotLeading => Reason::NotLeading,
            Self::Conflict | Self::Gone | Self::Unavailable => Reason::ApiServerUnavailable,
        }
    }

    /// The reason that a user sees when a token could not be written.
    #[must_use]
    pub fn reason(&self) -> Reason {
        match self {
            Self::NotLeading => Reason::NotLeading,
            _ => Reason::SecretWriteFailed,
        }
    }
}

/// The Secret as it goes over the wire; values are exposed while it is serialized and nowhere else.
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
    /// "1" lets a create pass and gives 409 if something is there (decision K5, measured).
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
        let (uid, resource_version) = match &draft.seen {
            Seen::Absent => (None, "1"),
            Seen::Present { uid, resource_version } => (Some(uid.as_str()), resource_version.as_str()),
        };
        let owner = AppliedOwner {
            api_version: format!("{GROUP}/{}", ZitadelServiceUser::version(&())),
            kind: OWNER_KIND,
            name: &draft.owner.0,
            uid: &draft.owner.1,
            controller: true,
            // Deletion of the object need not wait for its Secrets.
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
    fn what_goes_over_the_wire_holds_the_token_and_shows_none() {
        let draft = SecretDraft {
            namespace: "shop".into(),
            name: "billing-token".into(),
            owner: ("billing".into(), "u1".into()),
            retained: false,
            labels: BTreeMap::new(),
            annotations: BTreeMap::new(),
            data: BTreeMap::from([("token".into(), "canary".into())]),
            seen: Seen::Absent,
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
