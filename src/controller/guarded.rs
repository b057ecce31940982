//! Objects as we read them: one that cannot be read never hides the others, and what decides nothing never makes an
//! object one that cannot be read.

use std::borrow::Cow;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::Resource;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::Value;

/// An object, or the name of one that does not fit its type. As kube's `DeserializeGuard`, but without
/// `managedFields`, whose times whoever writes an object may set, also to some that no clock of ours can count; and
/// without a status that cannot be read, since a status is output: the next look writes it anew.
#[derive(Clone, Debug)]
pub struct Guarded<K>(pub Result<K, Named>);

/// What is known of an object that cannot be read.
#[derive(Clone, Debug)]
pub struct Named(ObjectMeta);

#[derive(Deserialize)]
struct Wire {
    metadata: Names,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Names {
    name: Option<String>,
    namespace: Option<String>,
    resource_version: Option<String>,
}

impl<'de, K: DeserializeOwned> Deserialize<'de> for Guarded<K> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let mut object = Value::deserialize(deserializer)?;
        let metadata = object.get_mut("metadata").and_then(Value::as_object_mut);
        metadata.map(|metadata| metadata.remove("managedFields"));
        if let Ok(read) = K::deserialize(&object) {
            return Ok(Self(Ok(read)));
        }
        object.as_object_mut().map(|object| object.remove("status"));
        if let Ok(read) = K::deserialize(&object) {
            return Ok(Self(Ok(read)));
        }
        // The text of the error could quote the object.
        let Names {
            name,
            namespace,
            resource_version,
        } = Wire::deserialize(&object).map_err(serde::de::Error::custom)?.metadata;
        Ok(Self(Err(Named(ObjectMeta {
            name,
            namespace,
            resource_version,
            ..ObjectMeta::default()
        }))))
    }
}

impl<K: Serialize> Serialize for Guarded<K> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let object = self.0.as_ref().ok();
        object.serialize(serializer)
    }
}

impl<K: Resource> Resource for Guarded<K> {
    type DynamicType = K::DynamicType;
    type Scope = K::Scope;

    fn kind(dynamic: &Self::DynamicType) -> Cow<'_, str> {
        K::kind(dynamic)
    }
    fn group(dynamic: &Self::DynamicType) -> Cow<'_, str> {
        K::group(dynamic)
    }
    fn version(dynamic: &Self::DynamicType) -> Cow<'_, str> {
        K::version(dynamic)
    }
    fn plural(dynamic: &Self::DynamicType) -> Cow<'_, str> {
        K::plural(dynamic)
    }
    fn metadata_api() -> bool {
        K::metadata_api()
    }
    fn meta(&self) -> &ObjectMeta {
        self.0.as_ref().map_or_else(|named| &named.0, K::meta)
    }
    fn meta_mut(&mut self) -> &mut ObjectMeta {
        self.0.as_mut().map_or_else(|named| &mut named.0, K::meta_mut)
    }
}
