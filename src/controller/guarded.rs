//! Tolerant decoding: an object that cannot be decoded does not hide the others, and fields that the operator does not
//! use never prevent an object from being decoded.

use std::borrow::Cow;
use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::Resource;
use serde::de::{DeserializeOwned, Error};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::value::RawValue;

/// An object, or the identity of an object that does not match its type. Like kube's `DeserializeGuard`, with these
/// differences:
///
/// * The object is read as text first, so an object that exceeds the recursion limit of the parser does not break a
///   list.
/// * `managedFields` are dropped: any writer of an object can nest them to any depth and set times that do not decode.
/// * A status that cannot be decoded is dropped. Status is output only, and the next reconcile replaces it.
#[derive(Clone, Debug)]
pub struct Guarded<K>(pub Result<K, Named>);

/// The identity of an object that cannot be decoded.
#[derive(Clone, Debug)]
pub struct Named(ObjectMeta);

/// The fields of a JSON object, with their values as unparsed text.
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
        // Errors are dropped: their text may quote the object.
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

    /// A valid object with the given values of `managedFields`, `status` and `spec.suspend`.
    fn object(managed: &str, status: &str, suspend: &str) -> String {
        let metadata = format!(r#""name":"n","namespace":"s","resourceVersion":"7","managedFields":{managed}"#);
        let spec =
            format!(r#""instanceRef":{{"name":"i"}},"keySecretRef":{{"name":"k"}},"tokens":[],"suspend":{suspend}"#);
        let kind = r#""apiVersion":"zitadel-tokens.dev/v1alpha1","kind":"ZitadelServiceUser""#;
        format!(r#"{{{kind},"metadata":{{{metadata}}},"spec":{{{spec}}},"status":{status}}}"#)
    }

    #[test]
    fn an_undecodable_object_keeps_its_name_and_does_not_hide_others() {
        let late = r#"[{"manager":"x","time":"9999-12-31T23:59:59Z"}]"#;
        let deep = deep(10_000);
        // The object, whether it can be decoded, and whether its status can.
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
            let check = |guarded: Guarded<ZitadelServiceUser>| {
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
            list.items.into_iter().for_each(check);
            let event: WatchEvent<Guarded<ZitadelServiceUser>> =
                serde_json::from_str(&format!(r#"{{"type":"MODIFIED","object":{text}}}"#)).expect("an event");
            let WatchEvent::Modified(object) = event else {
                panic!("not a MODIFIED event")
            };
            check(object);
        }
    }
}
