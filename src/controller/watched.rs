//! The types that the watches decode. Each type decodes every object and keeps little of it, so an invalid or very
//! large object neither costs memory nor hides other objects.

use std::borrow::Cow;
use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Namespace, Secret};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};
use kube::Resource;
use serde::de::IgnoredAny;
use serde::{Deserialize, Deserializer};
use serde_json::value::RawValue;

use crate::api::ZitadelServiceUser;
use crate::api::metadata::LABEL_SERVICE_USER;
use crate::domain::summary::UserSummary;

/// Largest size of a namespace's labels that is kept, in bytes, with [`LABEL_COST`] for each label. Typical namespaces
/// have a few hundred bytes.
const MAX_NAMESPACE_LABELS: usize = 8 * 1024;

/// Bytes of memory that a label takes besides its characters.
const LABEL_COST: usize = 64;

/// Longest UID that is kept. UIDs made by Kubernetes have 36 characters, but an owner reference may contain any text.
const MAX_UID: usize = 64;

/// A service user, reduced to its summary.
#[derive(Clone, Debug)]
pub struct WatchedUser {
    metadata: ObjectMeta,
    /// What the operator keeps of the object.
    pub summary: UserSummary,
}

/// A namespace: its labels and whether it is being deleted.
#[derive(Clone, Debug, Deserialize)]
#[serde(from = "Object")]
pub struct WatchedNamespace {
    metadata: ObjectMeta,
    /// Whether the namespace is being deleted.
    pub terminating: bool,
    /// None if the labels are larger than [`MAX_NAMESPACE_LABELS`]. They are not truncated, because a selector that
    /// excludes a label would then match.
    pub labels: Option<BTreeMap<String, String>>,
}

/// A Secret: its version, the operator's label and its controller.
#[derive(Clone, Debug, Deserialize)]
#[serde(from = "Object")]
pub struct WatchedSecret {
    metadata: ObjectMeta,
    /// Name of the service user in the operator's label.
    pub service_user: Option<String>,
    /// UID of the object that controls it.
    pub controller: Option<String>,
    /// Whether it is being deleted.
    pub terminating: bool,
}

#[derive(Deserialize)]
struct Object {
    metadata: Metadata,
}

/// Metadata without annotations, in which `kubectl apply` keeps a copy of the whole object, and without managed fields,
/// in which any writer can set any depth and times that do not decode.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Metadata {
    name: Option<String>,
    namespace: Option<String>,
    uid: Option<String>,
    resource_version: Option<String>,
    #[serde(default)]
    labels: Option<BTreeMap<String, String>>,
    owner_references: Option<Vec<OwnerReference>>,
    deletion_timestamp: Option<IgnoredAny>,
}

impl Metadata {
    fn identity(&mut self) -> ObjectMeta {
        ObjectMeta {
            name: self.name.take(),
            namespace: self.namespace.take(),
            uid: self.uid.take(),
            resource_version: self.resource_version.take(),
            ..ObjectMeta::default()
        }
    }
}

impl<'de> Deserialize<'de> for WatchedUser {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = Box::<RawValue>::deserialize(deserializer)?;
        let unreadable = |_| serde::de::Error::custom("an object has no metadata");
        let mut object: Object = serde_json::from_str(text.get()).map_err(unreadable)?;
        Ok(Self {
            metadata: object.metadata.identity(),
            summary: serde_json::from_str(text.get()).map_err(unreadable)?,
        })
    }
}

impl From<Object> for WatchedNamespace {
    fn from(Object { mut metadata }: Object) -> Self {
        let labels = metadata.labels.take().unwrap_or_default();
        let size: usize = labels
            .iter()
            .map(|(key, value)| key.len() + value.len() + LABEL_COST)
            .sum();
        Self {
            terminating: metadata.deletion_timestamp.is_some(),
            labels: (size <= MAX_NAMESPACE_LABELS).then_some(labels),
            metadata: metadata.identity(),
        }
    }
}

impl From<Object> for WatchedSecret {
    fn from(Object { mut metadata }: Object) -> Self {
        let owners = metadata.owner_references.take().unwrap_or_default();
        let controller = owners.into_iter().find(|owner| owner.controller == Some(true));
        Self {
            service_user: metadata
                .labels
                .take()
                .and_then(|mut labels| labels.remove(LABEL_SERVICE_USER)),
            controller: controller.map(|owner| owner.uid).filter(|uid| uid.len() <= MAX_UID),
            terminating: metadata.deletion_timestamp.is_some(),
            metadata: metadata.identity(),
        }
    }
}

/// Implements `Resource` for `$type` as the resource `$resource`, with requests for metadata only or for whole objects.
macro_rules! is_resource {
    ($type:ty, $resource:ty, metadata_only: $metadata_only:literal) => {
        impl Resource for $type {
            type DynamicType = ();
            type Scope = <$resource as Resource>::Scope;

            fn kind((): &()) -> Cow<'_, str> {
                <$resource>::kind(&())
            }
            fn group((): &()) -> Cow<'_, str> {
                <$resource>::group(&())
            }
            fn version((): &()) -> Cow<'_, str> {
                <$resource>::version(&())
            }
            fn plural((): &()) -> Cow<'_, str> {
                <$resource>::plural(&())
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

is_resource!(WatchedUser, ZitadelServiceUser, metadata_only: false);
is_resource!(WatchedNamespace, Namespace, metadata_only: true);
is_resource!(WatchedSecret, Secret, metadata_only: true);

#[cfg(test)]
mod tests {
    use kube::core::WatchEvent;
    use serde_json::json;

    use super::*;

    #[test]
    fn large_object_takes_little_memory() {
        let long = "x".repeat(100_000);
        let metadata = json!({"name": "n", "namespace": "s", "resourceVersion": "7",
            "labels": {LABEL_SERVICE_USER: "billing", "a": &long},
            "annotations": {"kubectl.kubernetes.io/last-applied-configuration": &long},
            "managedFields": [{"manager": &long, "time": "9999-12-31T23:59:59Z"}],
            "ownerReferences": [{"apiVersion": "v1", "kind": "K", "name": "o", "uid": "u", "controller": true}]});
        // The API server writes the two fields in this order.
        let event = |object: serde_json::Value| format!(r#"{{"type":"ADDED","object":{object}}}"#);
        let secret = event(json!({"metadata": metadata}));
        let WatchEvent::Added(secret) = serde_json::from_str::<WatchEvent<WatchedSecret>>(&secret).expect("an event")
        else {
            panic!("not an ADDED event")
        };
        assert_eq!(
            (secret.service_user.as_deref(), secret.controller.as_deref()),
            (Some("billing"), Some("u"))
        );
        assert!(format!("{secret:?}").len() < 2_000);
        let owner = json!({"apiVersion": "v1", "kind": "K", "name": "o", "uid": &long, "controller": true});
        let secret: WatchedSecret =
            serde_json::from_value(json!({"metadata": {"name": "n", "ownerReferences": [owner]}})).expect("a Secret");
        assert_eq!(secret.controller, None, "too long for a UID");
        let spec = json!({"instanceRef": {"name": "main"}, "tokens": [{"name": "t", "secret": {"name": "s", "template": {"a": &long}}}]});
        let user = event(json!({"metadata": metadata, "spec": spec}));
        let WatchEvent::Added(user) = serde_json::from_str::<WatchEvent<WatchedUser>>(&user).expect("an event") else {
            panic!("not an ADDED event")
        };
        assert_eq!(
            (user.meta().name.as_deref(), &*user.summary.instance),
            (Some("n"), "main")
        );
        assert!(format!("{user:?}").len() < 2_000);
        let namespace: WatchedNamespace = serde_json::from_value(json!({"metadata": metadata})).expect("a namespace");
        assert_eq!(namespace.labels, None, "labels with long values are dropped");
        let many: BTreeMap<String, &str> = (0..200).map(|i| (format!("{i}"), "")).collect();
        let namespace: WatchedNamespace =
            serde_json::from_value(json!({"metadata": {"name": "n", "labels": many}})).expect("a namespace");
        assert_eq!(namespace.labels, None, "many short labels are dropped");
        let namespace: WatchedNamespace =
            serde_json::from_value(json!({"metadata": {"name": "n", "labels": {"a": "b"}}})).expect("a namespace");
        assert_eq!(namespace.labels.map(|labels| labels.len()), Some(1));
    }

    #[test]
    fn undecodable_object_keeps_its_name() {
        for spec in [
            json!(7),
            json!({"tokens": "none"}),
            json!({"instanceRef": {"name": [1]}}),
        ] {
            let object = json!({"metadata": {"name": "n", "namespace": "s"}, "spec": spec}).to_string();
            let user: WatchedUser = serde_json::from_str(&object).expect("a user");
            assert_eq!((user.meta().name.as_deref(), &*user.summary.instance), (Some("n"), ""));
        }
    }
}
