//! Secrets as we read them: in types of our own, so that values are redacted from the first byte that is ours, and
//! metadata that we do not need is dropped at decoding.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::sync::Arc;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use k8s_openapi::api::core::v1::Secret;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};
use kube::Resource;
use secrecy::{ExposeSecret, SecretSlice, SecretString};
use serde::Deserialize;
use serde::de::IgnoredAny;

use crate::api::metadata::{GROUP, LABEL_SERVICE_USER};
use crate::domain::secret::{Controller, Existing};

/// A whole Secret. Its values never fail to decode, so that kube has no body to log (reference/kube.md §0, fact 5).
#[derive(Clone, Debug, Deserialize)]
#[serde(from = "Wire")]
pub struct WholeSecret {
    metadata: ObjectMeta,
    /// `kubectl apply` and others keep a copy of the whole Secret in one.
    annotations: BTreeMap<String, SecretString>,
    data: Arc<BTreeMap<String, SecretSlice<u8>>>,
    kind: String,
    immutable: bool,
}

#[derive(Deserialize)]
struct Wire {
    metadata: Subset<Option<BTreeMap<String, SecretString>>>,
    data: Option<BTreeMap<String, Option<SecretString>>>,
    #[serde(rename = "type")]
    kind: Option<String>,
    immutable: Option<bool>,
}

impl From<Wire> for WholeSecret {
    fn from(wire: Wire) -> Self {
        let (metadata, annotations) = wire.metadata.split();
        let decode = |value: Option<SecretString>| {
            let value = value.unwrap_or_default();
            SecretSlice::from(STANDARD.decode(value.expose_secret()).unwrap_or_default())
        };
        let data = wire.data.unwrap_or_default();
        Self {
            metadata,
            annotations: annotations.unwrap_or_default(),
            data: Arc::new(data.into_iter().map(|(k, v)| (k, decode(v))).collect()),
            kind: wire.kind.unwrap_or_default(),
            immutable: wire.immutable == Some(true),
        }
    }
}

impl WholeSecret {
    /// As the domain sees it.
    #[must_use]
    pub fn into_existing(self) -> Existing {
        let meta = self.metadata;
        Existing {
            controller: controller(meta.owner_references.as_deref().unwrap_or_default()).map(|owner| Controller {
                kind: if owner.api_version.starts_with(GROUP) {
                    owner.kind.clone()
                } else {
                    String::new()
                },
                name: owner.name.clone(),
                uid: owner.uid.clone(),
            }),
            uid: meta.uid.unwrap_or_default(),
            resource_version: meta.resource_version.unwrap_or_default(),
            labels: meta.labels.unwrap_or_default(),
            annotations: self.annotations,
            data: self.data,
            opaque: self.kind == "Opaque",
            immutable: self.immutable,
        }
    }

    /// The entries.
    #[must_use]
    pub fn data(&self) -> &BTreeMap<String, SecretSlice<u8>> {
        &self.data
    }

    /// The labels.
    #[must_use]
    pub fn labels(&self) -> Option<&BTreeMap<String, String>> {
        self.metadata.labels.as_ref()
    }
}

/// A Secret's metadata, and of that only what wakes somebody: names, version, labels and owners.
#[derive(Clone, Debug, Deserialize)]
#[serde(from = "WireMeta")]
pub struct SecretMeta {
    metadata: ObjectMeta,
}

#[derive(Deserialize)]
struct WireMeta {
    /// Of many a Secret, a copy is in an annotation: passed over at decoding.
    metadata: Subset<IgnoredAny>,
}

/// Metadata without managed fields, which hold no less than all names, and in which whoever writes a Secret may set
/// times that no clock of ours can count; `A` is what becomes of the annotations.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Subset<A> {
    name: Option<String>,
    namespace: Option<String>,
    uid: Option<String>,
    resource_version: Option<String>,
    labels: Option<BTreeMap<String, String>>,
    owner_references: Option<Vec<OwnerReference>>,
    #[serde(default)]
    annotations: A,
}

impl<A> Subset<A> {
    fn split(self) -> (ObjectMeta, A) {
        let metadata = ObjectMeta {
            name: self.name,
            namespace: self.namespace,
            uid: self.uid,
            resource_version: self.resource_version,
            labels: self.labels,
            owner_references: self.owner_references,
            ..ObjectMeta::default()
        };
        (metadata, self.annotations)
    }
}

impl From<WireMeta> for SecretMeta {
    fn from(wire: WireMeta) -> Self {
        let (metadata, IgnoredAny) = wire.metadata.split();
        Self { metadata }
    }
}

impl SecretMeta {
    /// Name of the service user in our label, if the Secret is labelled as one of ours.
    #[must_use]
    pub fn service_user(&self) -> Option<&str> {
        self.metadata
            .labels
            .as_ref()?
            .get(LABEL_SERVICE_USER)
            .map(String::as_str)
    }

    /// UID of the object that controls it.
    #[must_use]
    pub fn controller_uid(&self) -> Option<&str> {
        controller(self.metadata.owner_references.as_deref()?).map(|owner| owner.uid.as_str())
    }
}

fn controller(owners: &[OwnerReference]) -> Option<&OwnerReference> {
    owners.iter().find(|owner| owner.controller == Some(true))
}

/// Both types are the core Secret; they differ in what is asked for and kept.
macro_rules! is_secret {
    ($type:ty, metadata_only: $metadata_only:literal) => {
        impl Resource for $type {
            type DynamicType = ();
            type Scope = <Secret as Resource>::Scope;

            fn kind((): &()) -> Cow<'_, str> {
                Secret::kind(&())
            }
            fn group((): &()) -> Cow<'_, str> {
                Secret::group(&())
            }
            fn version((): &()) -> Cow<'_, str> {
                Secret::version(&())
            }
            fn plural((): &()) -> Cow<'_, str> {
                Secret::plural(&())
            }
            fn metadata_api() -> bool {
                $metadata_only
            }
            fn meta(&self) -> &ObjectMeta {
                &self.metadata
            }
            fn meta_mut(&mut self) -> &mut ObjectMeta {
                &mut self.metadata
            }
        }
    };
}

is_secret!(WholeSecret, metadata_only: false);
is_secret!(SecretMeta, metadata_only: true);

#[cfg(test)]
mod tests {
    use super::*;

    /// As the API server sends it after `kubectl apply`.
    fn applied() -> serde_json::Value {
        serde_json::json!({
            "metadata": {"name": "s", "annotations": {
                "kubectl.kubernetes.io/last-applied-configuration": "a copy of canary", "a": "b"},
                "managedFields": [{"manager": "canary", "time": "9999-12-31T23:59:59Z"}]},
            "data": {"token": STANDARD.encode("canary"), "broken": "%%%canary", "null": null}, "type": "Opaque"
        })
    }

    #[test]
    fn values_are_redacted_and_never_fail_to_decode() {
        let secret: WholeSecret = serde_json::from_value(applied()).expect("decodes");
        let shown = format!("{secret:?}");
        assert!(
            !shown.contains("canary") && !shown.contains(&STANDARD.encode("canary")),
            "{shown}"
        );
        let existing = secret.into_existing();
        assert_eq!(existing.token(), Some("canary"));
        assert_eq!(existing.data["broken"].expose_secret(), b"");
        assert_eq!(existing.annotations["a"].expose_secret(), "b");
        assert!(!format!("{existing:?}").contains("canary"));
    }

    #[test]
    fn of_a_watched_secret_neither_annotations_nor_managed_fields_are_kept() {
        let secret: SecretMeta = serde_json::from_value(applied()).expect("decodes");
        let meta = secret.meta();
        assert_eq!((&meta.annotations, &meta.managed_fields), (&None, &None));
        assert_eq!(meta.name.as_deref(), Some("s"));
    }
}
