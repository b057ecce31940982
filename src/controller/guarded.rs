//! Objects as we read them: one that cannot be read never hides the others, and what decides nothing never makes an
//! object one that cannot be read.

use std::borrow::Cow;
use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::Resource;
use serde::de::{DeserializeOwned, Error};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::value::RawValue;

/// An object, or the name of one that does not fit its type. As kube's `DeserializeGuard`, but:
///
/// * it is read as text first, so that one that is nested deeper than the parser goes spoils no list;
/// * without `managedFields`, in which whoever writes an object may set any depth, and times that no clock of ours can
///   count;
/// * without a status that cannot be read, since a status is output: the next look writes it anew.
#[derive(Clone, Debug)]
pub struct Guarded<K>(pub Result<K, Named>);

/// What is known of an object that cannot be read.
#[derive(Clone, Debug)]
pub struct Named(ObjectMeta);

/// The fields of a JSON object, not looked into.
type Fields = BTreeMap<String, Box<RawValue>>;

impl<'de, K: DeserializeOwned> Deserialize<'de> for Guarded<K> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let mut object = Fields::deserialize(deserializer)?;
        let mut metadata: Fields = read(&object, "metadata").ok_or_else(|| D::Error::missing_field("metadata"))?;
        metadata.remove("managedFields");
        let text = |field| read(&metadata, field);
        let named = Named(ObjectMeta {
            name: text("name"),
            namespace: text("namespace"),
            uid: text("uid"),
            resource_version: text("resourceVersion"),
            generation: read(&metadata, "generation"),
            ..ObjectMeta::default()
        });
        object.insert(
            "metadata".to_owned(),
            serde_json::value::to_raw_value(&metadata).map_err(Error::custom)?,
        );
        // The text of an error could quote the object.
        let whole = |object: &Fields| serde_json::from_str(&serde_json::to_string(object).ok()?).ok();
        let read = whole(&object).or_else(|| {
            object.remove("status");
            whole(&object)
        });
        Ok(Self(read.ok_or(named)))
    }
}

fn read<T: DeserializeOwned>(fields: &Fields, name: &str) -> Option<T> {
    serde_json::from_str(fields.get(name)?.get()).ok()
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

#[cfg(test)]
mod tests {
    use kube::core::{ObjectList, WatchEvent};

    use super::*;
    use crate::api::ZitadelServiceUser;

    fn deep(depth: usize) -> String {
        "{\"a\":".repeat(depth) + "1" + &"}".repeat(depth)
    }

    /// An object that can be read, with this in place of `managedFields`, `status` and a field of the spec.
    fn object(managed: &str, status: &str, suspend: &str) -> String {
        let metadata = format!(r#""name":"n","namespace":"s","resourceVersion":"7","managedFields":{managed}"#);
        let spec =
            format!(r#""instanceRef":{{"name":"i"}},"keySecretRef":{{"name":"k"}},"tokens":[],"suspend":{suspend}"#);
        let kind = r#""apiVersion":"zitadel-tokens.dev/v1alpha1","kind":"ZitadelServiceUser""#;
        format!(r#"{{{kind},"metadata":{{{metadata}}},"spec":{{{spec}}},"status":{status}}}"#)
    }

    #[test]
    fn one_object_is_read_or_named_and_the_others_with_it() {
        let late = r#"[{"manager":"x","time":"9999-12-31T23:59:59Z"}]"#;
        let deep = deep(10_000);
        // Whether it can be read, and whether its status can.
        let table = [
            (object("[]", r#"{"userID":"7"}"#, "true"), true, true),
            (object(late, r#"{"userID":"7"}"#, "true"), true, true),
            (object(&deep, r#"{"userID":"7"}"#, "true"), true, true),
            (object("7", r#"{"userID":7}"#, "true"), true, false),
            (object("[]", &deep, "true"), true, true),
            (object("[]", &format!(r#"{{"userID":{deep}}}"#), "true"), true, false),
            (object("[]", r#"{"userID":"7"}"#, "7"), false, false),
            (object("[]", r#"{"userID":"7"}"#, &deep), false, false),
        ];
        for (text, readable, status) in &table {
            let judge = |guarded: Guarded<ZitadelServiceUser>| {
                let meta = guarded.meta();
                let names = (
                    meta.name.as_deref(),
                    meta.namespace.as_deref(),
                    meta.resource_version.as_deref(),
                );
                assert_eq!(names, (Some("n"), Some("s"), Some("7")));
                assert_eq!(meta.managed_fields, None);
                let user = guarded.0;
                assert_eq!(
                    (user.is_ok(), user.is_ok_and(|u| u.status.is_some())),
                    (*readable, *status),
                    "{text:.400}"
                );
            };
            let list = format!(
                r#"{{"kind":"List","apiVersion":"v1","metadata":{{"resourceVersion":"9"}},"items":[{text},{text}]}}"#
            );
            let list: ObjectList<Guarded<ZitadelServiceUser>> = serde_json::from_str(&list).expect("a list");
            assert_eq!(list.items.len(), 2);
            list.items.into_iter().for_each(judge);
            let event: WatchEvent<Guarded<ZitadelServiceUser>> =
                serde_json::from_str(&format!(r#"{{"type":"MODIFIED","object":{text}}}"#)).expect("an event");
            let WatchEvent::Modified(object) = event else {
                panic!("another event")
            };
            judge(object);
        }
    }
}
